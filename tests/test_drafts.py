"""What is made beside a file or folder on the way to it: nobody can guess its name, no link is followed, and what comes
of it has the modes that the umask gives."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from factories import fill
from processes import python

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.compact import compact
from calset.catalog.report.page import report
from calset.catalog.select import select
from calset.errors import InputError
from calset.io.files import whole_file
from calset.pruning.blockwise import workfolder

PLAN = [[("correct", 10), ("correct", 12), ("incorrect", 9)]] * 4


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = fill(tmp_path / "c.duckdb", PLAN)
    select(made, "math")
    return made


@contextmanager
def watched(folder: Path) -> Iterator[set[str]]:
    """The names that appear in a folder while the block runs, by a hook on every name that this process makes."""
    names: set[str] = set()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event in ("open", "os.mkdir", "os.rename", "os.link"):
            for place in arguments[:2]:
                if isinstance(place, str | os.PathLike) and Path(os.fspath(place)).parent == folder:
                    names.add(Path(os.fspath(place)).name)

    active = [True]
    sys.addaudithook(hook)
    try:
        yield names
    finally:
        active.clear()


def draft_names(folder: Path, work: Callable[[], object]) -> set[str]:
    with watched(folder) as names:
        work()
    return {name for name in names if name.startswith(".")}


def test_a_draft_has_another_name_each_time_and_stands_in_a_private_folder(catalog: Catalog, tmp_path: Path) -> None:
    works: dict[str, Callable[[], object]] = {
        "r.html": lambda: report(catalog, "math", tmp_path / "r.html"),
        "c.duckdb": lambda: compact(catalog),
    }
    for name, work in works.items():
        first, second = draft_names(tmp_path, work), draft_names(tmp_path, work)
        assert len(first) == len(second) == 1, (name, first, second)
        assert first != second
        assert str(os.getpid()) not in "".join(first)
    seen = []
    with whole_file(tmp_path / "a.txt") as draft:
        seen.append(stat.S_IMODE(draft.parent.stat().st_mode))
        draft.write_text("x")
    assert seen == [0o700]
    left = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert left == []


ASK = "calset.catalog.query.output.Question('FROM problems')"
OUTPUT = "calset.catalog.query.output"
LINKS = {
    "report": (".r.html.{pid}.new", "calset.report(path, 'math', folder / 'r.html')"),
    "query": (".q.csv.{pid}.new", f"{OUTPUT}.save_answer(calset.Catalog(path), {ASK}, 'csv', folder / 'q.csv')"),
    "new catalog": (".n.duckdb.{pid}-{thread}.new", "calset.merge(folder / 'n.duckdb', path)"),
    "compact": (".c.duckdb.compact", "calset.compact(path)"),
}  # fmt: skip
PLANT = """
    import os, sys, threading
    from pathlib import Path
    import calset, calset.catalog.query.output
    folder = Path(sys.argv[1])
    path = folder / "c.duckdb"
    name = sys.argv[2].format(pid=os.getpid(), thread=threading.get_ident())
    (folder / name).symlink_to(folder / "precious")
    try:
        {work}
    except Exception as error:
        print("refused", error)
"""


@pytest.mark.parametrize("what", LINKS)
def test_a_link_where_a_draft_used_to_stand_is_not_written_through(catalog: Catalog, tmp_path: Path, what: str) -> None:
    name, work = LINKS[what]
    (tmp_path / "precious").write_text("kept")
    process = python(PLANT.replace("{work}", work), tmp_path, name)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "refused" not in out
    assert (tmp_path / "precious").read_text() == "kept"


# --- the work folder of a pruning --------------------------------------------------------------------------------


def _linked(folder: Path, elsewhere: Path) -> None:
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)


def _open_to_others(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize(
    ("put", "reason"), [(_linked, "a link or a file"), (_open_to_others, "others may write to it")]
)
def test_a_work_folder_that_somebody_else_may_have_put_there_is_refused(
    tmp_path: Path, put: Callable[[Path, Path], None], reason: str
) -> None:
    out = tmp_path / "pruned"
    put(workfolder.folder_of(out), tmp_path / "elsewhere")
    (workfolder.folder_of(out) / "lock").write_text("kept")

    def open_it() -> None:
        with workfolder.opened(out, None, {}):
            raise AssertionError("it was opened")

    for work in (open_it, lambda: workfolder.check_out(out, 0)):
        with pytest.raises(InputError, match=reason) as caught:
            work()
        assert "\n" not in str(caught.value)
    assert (workfolder.folder_of(out) / "lock").read_text() == "kept"


def test_the_work_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    out = tmp_path / "pruned"
    workfolder.folder_of(out).mkdir(mode=0o700)
    os.chown(workfolder.folder_of(out), 12345, -1)
    with pytest.raises(InputError, match="belongs to another user"):
        workfolder.check_out(out, 0)


# --- modes -------------------------------------------------------------------------------------------------------

MAKE = """
    import os, sys
    from pathlib import Path
    os.umask(int(sys.argv[2], 8))
    import calset, calset.catalog.query.output
    from calset.pruning.blockwise import workfolder
    folder, path = Path(sys.argv[1]), Path(sys.argv[1]) / "c.duckdb"
    out = folder / "made"
    out.mkdir()
    calset.export(path, "math", out / "exported")
    calset.report(path, "math", out / "r.html")
    for name in ("q.csv", "q.parquet"):
        question = calset.catalog.query.output.Question("FROM problems")
        calset.catalog.query.output.save_answer(calset.Catalog(path), question, name[2:], out / name)
    calset.merge(out / "n.duckdb", path)
    source = folder / "source"
    with workfolder.opened(out / "pruned", source, {}) as work:
        work.complete(source, {}, "# Card")
"""


@pytest.mark.parametrize("umask", ["077", "002", "027"])
def test_what_is_made_has_the_modes_that_the_umask_gives(
    catalog: Catalog, tiny_model: Path, tmp_path: Path, umask: str
) -> None:
    (tmp_path / "source").mkdir()
    for path in tiny_model.iterdir():
        if path.is_file():
            (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    templates = tmp_path / "source" / "additional_chat_templates"
    templates.mkdir(mode=0o700)
    (templates / "a.jinja").write_text("x")
    process = python(MAKE, tmp_path, umask)
    _, err = process.communicate()
    assert process.returncode == 0, err
    mask = int(umask, 8)
    made = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    assert {path.name for path in made} >= {"exported", "train.parquet", "r.html", "q.parquet", "n.duckdb", "pruned"}
    wrong = {
        str(path): oct(mode)
        for path in made
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
