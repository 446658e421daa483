"""The dataset card of a repository of published subsets, and each subset's picture.

The card is a pure function of the manifests in the repository and of what others wrote into it: publishing a second
subset keeps the first one's config and section, and text outside calset's marks stays as it is. Manifests may be
somebody else's, so every text from one is escaped. Must not know: the Hub's client, catalogs, Parquet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calset.catalog.hub.names import PREFIX, data_folder, manifest_path, plot_path, tag_of
from calset.io.markdown import code, line
from calset.io.templates import open_template

if TYPE_CHECKING:
    import pyarrow as pa

    from calset.catalog.records import Subset

TAG = "calset"
BEGIN, END = "<!-- calset: begin -->", "<!-- calset: end -->"
_TAGS = (TAG, "calibration", "pruning", "reasoning")
# What the Hub takes as a licence's identifier; any other is "other" there, and named in the text.
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0
ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense zlib
"""
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "1M<n<10M"))
_QUANTILES = ("p0", "p10", "p25", "p50", "p75", "p90", "p100")


def render(repo: str, manifests: Sequence[Mapping[str, Any]], before: str | None = None) -> str:
    """The whole card: YAML, what it holds, how it was made, how to use it.

    Args:
        manifests: of every subset in the repository; they are shown by name.
        before: the card as it is. What calset did not write is kept: other YAML keys, other configs, and text outside
            calset's marks.
    """
    ordered = sorted(manifests, key=lambda m: m["name"])
    metadata, text = _split(before or "")
    ours = "\n\n".join([BEGIN, _text(repo, ordered).strip(), END])
    if BEGIN in text and END in text:
        head, tail = text[: text.index(BEGIN)], text[text.rindex(END) + len(END) :]
        body = head + ours + tail
    else:
        body = f"{text.rstrip()}\n\n{ours}\n" if text.strip() else f"\n{ours}\n"
    return f"---\n{_yaml(_metadata(ordered, metadata))}\n---\n{body}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's YAML and its text; YAML that is none counts as none."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", card, re.S)
    if not found:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, found[2]


def _metadata(manifests: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    names = {m["name"] for m in manifests}
    theirs = [c for c in _list(before.get("configs")) if isinstance(c, dict) and c.get("config_name") not in names]
    tags = [tag for tag in _list(before.get("tags")) if isinstance(tag, str)]
    return {
        **{key: value for key, value in before.items() if isinstance(key, str)},
        "license": licences(manifests),
        "tags": list(dict.fromkeys([*tags, *_TAGS])),
        "task_categories": _list(before.get("task_categories")) or ["text-generation"],
        "size_categories": [next(name for top, name in _SIZES if sum(m["n_samples"] for m in manifests) < top)],
        "configs": theirs
        + [
            {
                "config_name": m["name"],
                "data_files": [{"split": "train", "path": f"{data_folder(m['name'])}train-*.parquet"}],
            }
            for m in manifests
        ],
    }


def _yaml(metadata: Mapping[str, Any]) -> str:
    from huggingface_hub import DatasetCardData

    return DatasetCardData(**metadata).to_yaml()


def licences(manifests: Sequence[Mapping[str, Any]]) -> str | list[str]:
    """The Hub's identifiers of all licences, of the questions and the models; ``unknown`` is one of them."""
    found = {_identifier(text) for m in manifests for text in _licences(m).values()} or {"unknown"}
    return sorted(found) if len(found) > 1 else found.pop()


def _licences(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """What is under which licence: ``questions of NAME`` and ``model NAME``."""
    known = manifest.get("licences") or {}
    questions = {f"questions of {name}": licence for name, licence in (known.get("questions") or {}).items()}
    return {**questions, f"model {manifest['model']}": known.get("model")}


def unknown_licences(manifest: Mapping[str, Any]) -> list[str]:
    """What has no known licence."""
    return [what for what, licence in _licences(manifest).items() if not licence or licence == "unknown"]


def _identifier(licence: str | None) -> str:
    if not licence:
        return "unknown"
    name = re.sub(r"\s+", "-", licence.strip().lower())
    return name if name in _LICENCES.split() else "other"


# --- the text -----------------------------------------------------------------------------------------------------


def _text(repo: str, manifests: Sequence[Mapping[str, Any]]) -> str:
    """What the card says between calset's marks, by ``card.md.jinja``."""
    from markupsafe import Markup

    # Markdown is escaped in its own way, and then not as HTML.
    template = open_template(
        Path(__file__).with_name("card.md.jinja"), lambda value: Markup(line(value)), code=code, cell=_cell
    )
    first = manifests[0]
    return template.render(
        repo=repo,
        manifests=manifests,
        first=first,
        reference=f"{PREFIX}{repo}/{first['name']}@{first['version']}",
        tag=lambda m: tag_of(m["name"], m["version"]),
        chosen=lambda m: [(key, value) for key, value in m["recipe"].items() if key != "name" and value is not None],
        licences_of=_licences,
        quantiles=_quantiles,
        manifest_path=manifest_path,
        plot_path=plot_path,
        data_folder=data_folder,
    )


def _quantiles(m: Mapping[str, Any]) -> list[tuple[str, list[Any]]]:
    found = [(what, m.get(f"{what}_quantiles")) for what in ("length", "difficulty")]
    return [(what, [of.get(q) for q in _QUANTILES]) for what, of in found if isinstance(of, Mapping)]


def _cell(value: Any) -> str:
    """A table's cell: numbers short, a dash for what is missing, any text as one escaped line."""
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else line(value)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


# --- the picture --------------------------------------------------------------------------------------------------

_INK, _QUIET, _BAR = "#22272e", "#8b949e", "#d1495b"


def draw(rows: pa.Table, subset: Subset, path: Path) -> None:
    """Write the PNG: how long the samples are, and, where it is known, how difficult their problems.

    Args:
        rows: with the columns ``n_tokens``, ``input_ids``, ``difficulty``.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = np.asarray([len(sample.input_ids) for sample in subset.samples])
    difficulties = [value for value in rows["difficulty"].to_pylist() if value is not None]
    with mpl.rc_context({"font.size": 10, "axes.edgecolor": _QUIET, "axes.labelcolor": _INK, "text.color": _INK}):
        figure = Figure(figsize=(9, 3.2), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2 if difficulties else 1, squeeze=False)[0]
        _histogram(
            panels[0], lengths, "tokens (prompt and completion)", bins=min(30, max(1, len(set(lengths.tolist()))))
        )
        if difficulties:
            _histogram(panels[1], np.asarray(difficulties), "difficulty (1 - pass rate)", bins=np.linspace(0, 1, 21))
        title = f"{subset.ref}: {subset.n_samples:,} samples, {subset.n_tokens:,} tokens"
        figure.suptitle(title, fontsize=10, color=_QUIET, x=0.01, ha="left")
        figure.savefig(path, dpi=120)


def _histogram(axes: Any, values: np.ndarray, label: str, bins: Any) -> None:
    axes.hist(values, bins=bins, color=_BAR, rwidth=0.92)
    axes.set(xlabel=label, ylabel="samples")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_QUIET, labelcolor=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
