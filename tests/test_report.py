"""The report of a subset: complete, escaped, and, in a real browser, readable and silent."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories import fill, make_grade, make_problem, make_run, make_source, make_trace

import calset
from calset.catalog.catalog import Catalog
from calset.catalog.records import Subset
from calset.catalog.report import chart
from calset.catalog.select import select
from calset.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</pre></details><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<style>body{display:none}</style><meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>\x00\x1b[2J\u202e&amp;"
)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """60 problems x 4 traces, and one whose every text would like to be markup."""
    path = tmp_path_factory.mktemp("report") / "c.duckdb"
    plan = [
        [("correct" if i < n % 5 else "incorrect", 20 + (n * 37 + i * 53) % 900) for i in range(4)] for n in range(60)
    ]
    catalog = fill(path, plan)
    odd = make_problem(99, "o<b>dd", question=HOSTILE + " " + "long" * 300, answer=HOSTILE)
    catalog.add_source(make_source("o<b>dd"))
    run = make_run(command=f"calset build --model '{HOSTILE}' --problems /home/somebody/secret/q.jsonl")
    catalog.add_run(run)
    traces = [
        make_trace(odd, run, i, 300 + i, text=f"<think>{HOSTILE}</think>{HOSTILE}", response=HOSTILE) for i in range(8)
    ]
    verdicts = ["correct"] + ["incorrect"] * 7  # the hardest problem, so the first of the samples to read
    grades = [make_grade(t, v, extracted=HOSTILE, detail=HOSTILE) for t, v in zip(traces, verdicts, strict=True)]
    catalog.record(traces, grades, problems=[odd])
    return catalog


@pytest.fixture(scope="module")
def subset(catalog: Catalog) -> Subset:
    found = select(catalog, "math", "ssgr", difficulty=(0.2, 1), length_quantiles=(0, 1), where="n_tokens <> 1")
    assert any(s.trace_id in _odd(catalog) for s in found.samples)
    return found


def _odd(catalog: Catalog) -> set[str]:
    return {row["trace_id"] for row in catalog.rows("SELECT trace_id FROM trace WHERE source = 'o<b>dd'")}


@pytest.fixture(scope="module")
def page(catalog: Catalog, subset: Subset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calset.report(catalog, "math@1", tmp_path_factory.mktemp("page") / "math.html")


class Tags(HTMLParser):
    """All tags, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_was_taken_how_and_from_where(catalog: Catalog, subset: Subset, page: Path) -> None:
    text = re.sub(r"\s+", " ", Tags(page.read_text(encoding="utf-8")).text)
    for said in ("math@1", subset.content_hash, f"{subset.n_tokens:,}", "Correct and finished traces of tiny",
                 "difficulty 0.2 to 1", "harder ones first", "n_tokens <> 1", "calset prune tiny --calibration math@1",
                 "tokenizer hash", "How many were left at each stage", "o<b>dd", "MIT"):  # fmt: skip
        assert said in text, said
    assert "/home/somebody" not in text  # of the building machine, as in a manifest
    rows = catalog.query("SELECT verdict, count(*) FROM trace GROUP BY 1").rows
    taken = {"correct": subset.n_samples, "incorrect": 0}
    assert all(f"{verdict}{taken[verdict]}{n}" in text for verdict, n in rows)


def test_the_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    parsed = Tags(page.read_text(encoding="utf-8"))
    assert {tag for tag, _ in parsed.tags}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    )
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert names.isdisjoint({"src", "href", "action", "style"})
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in page.read_text(encoding="utf-8").replace("0;url=", "")
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in parsed.tags].count("style") == 1


def test_the_picture_holds_the_pool_and_the_selection(catalog: Catalog, subset: Subset, page: Path) -> None:
    tags = Tags(page.read_text(encoding="utf-8")).tags
    assert sum(tag == "circle" for tag, _ in tags) == subset.n_samples
    drawn = sum(int(n.replace(",", "")) for n in re.findall(r"<title>([\d,]+) traces</title>", page.read_text()))
    assert drawn == catalog.query("SELECT count(*) FROM trace WHERE difficulty IS NOT NULL").rows[0][0]
    for tag, attributes in tags:
        for name, most in (("cx", chart.WIDTH), ("cy", chart.HEIGHT), ("x1", chart.WIDTH)):
            assert tag not in ("circle", "line") or name not in attributes or 0 < float(attributes[name] or 0) < most


def test_kinds_without_a_difficulty_have_a_page_too(catalog: Catalog, tmp_path: Path) -> None:
    select(catalog, "asks", "prompts", samples=3)
    text = calset.report(catalog, "asks", tmp_path / "asks.html").read_text(encoding="utf-8")
    assert "There is no picture" in text
    assert "What is" in text
    select(catalog, "parts", "random", window=40, stratify="source")
    assert "in windows of 40 tokens, equal shares by source" in calset.report(
        catalog, "parts", tmp_path / "parts.html"
    ).read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_leaves_nothing(catalog: Catalog, subset: Subset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        calset.report(catalog, "math", tmp_path / "no" / "x.html")
    with pytest.raises(InputError, match="is a folder"):
        calset.report(catalog, "math", tmp_path)
    with pytest.raises(InputError, match="no subset 'nope'"):
        calset.report(catalog, "nope", tmp_path / "x.html")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.html").write_text("before")
    assert calset.report(catalog, "math", tmp_path / "x.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# -- in a browser --------------------------------------------------------------------------------------------------

# The page in a frame of a page of ours, which may look inside, since both come from one place.
PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0"><iframe id=f width={width} height=800
 style="border:0"></iframe><script>
const frame = document.getElementById('f');
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll('details').forEach(d => d.open = true);
  const wide = [...page.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg') &&
    e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName);
  const seen = e => getComputedStyle(e);
  document.title = JSON.stringify({{
    title: page.title, scroll: root.scrollWidth, wide, resources: frame.contentWindow.performance
      .getEntriesByType('resource').length,
    scripts: page.scripts.length, dots: page.querySelectorAll('circle').length,
    svg: page.querySelector('svg').getBoundingClientRect().width, sections: page.querySelectorAll('section').length,
    paper: seen(page.body).backgroundColor, ink: seen(page.body).color, size: seen(page.body).fontSize,
    dot: seen(page.querySelector('circle')).fill, display: seen(page.body).display,
    said: page.body.innerText.includes("<script>document.title='owned'<" + "/script>"),
  }});
}};
frame.src = '/page.html';
</script>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


def look(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, object]:
    """What a headless Chromium sees of the page at a width, asked by a page beside it over HTTP."""
    shutil.copy(page, folder / "page.html")
    (folder / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    asked: list[str] = []
    handler = type("Handler", (_Quiet,), {"asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args, **kw: handler(*args, directory=str(folder), **kw)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = subprocess.run(
            [CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=8000",
             "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
             "--dump-dom", f"http://127.0.0.1:{server.server_address[1]}/probe.html"],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescaped), "console": console, "asked": sorted(set(asked) - {"/favicon.ico"})}


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: the package chromium)")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_whole_silently_and_inert(page: Path, subset: Subset, tmp_path: Path, width: int) -> None:
    seen = look(page, tmp_path, width=width)
    assert seen["title"] == "math@1 · calibration subset"
    assert seen["said"]  # the hostile text is there, as text
    assert (seen["scripts"], seen["resources"], seen["console"]) == (0, 0, [])
    assert seen["asked"] == ["/page.html", "/probe.html"]
    assert seen["scroll"] <= width  # type: ignore[operator]
    assert seen["wide"] == []
    assert seen["dots"] == subset.n_samples
    assert seen["sections"] == 6
    assert 280 < seen["svg"] <= 760  # type: ignore[operator]
    assert seen["display"] == "block"


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: the package chromium)")
def test_ink_and_paper_change_places_in_the_dark(page: Path, tmp_path: Path) -> None:
    light, dark = (look(page, _made(tmp_path / name), width=700, dark=name == "dark") for name in ("light", "dark"))
    for seen, brighter in ((light, "paper"), (dark, "ink")):
        darker = {"paper": "ink", "ink": "paper"}[brighter]
        assert _luminance(seen[brighter]) > 0.6 > 0.2 > _luminance(seen[darker])
        contrast = (_luminance(seen[brighter]) + 0.05) / (_luminance(seen[darker]) + 0.05)
        assert contrast > 7  # WCAG AAA
    assert light["dot"] != dark["dot"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _luminance(colour: object) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", str(colour))[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
