"""Subsets as folders: ``data/train.parquet`` for any tool, ``manifest.json`` for provenance and checks.

Rows are hashed, never Parquet bytes, since different writers give different bytes. A folder appears whole or not at
all. Must not know: how selections are made, the Hub.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from calset.catalog import subsets
from calset.catalog.catalog import Catalog
from calset.catalog.manifest import MANIFEST_SCHEMA, moment, read_manifest, require_size
from calset.catalog.recipes import Kind
from calset.catalog.records import Problem, Sample, Subset
from calset.errors import InputError, first_line
from calset.files import drafted, written
from calset.jsonable import jsonable
from calset.parquetfiles import Bounds, read_batches

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
DATA = Path("data") / "train.parquet"
_REQUIRED = ("sample_id", "kind", "problem_id", "trace_id", "input_ids", "n_prompt_tokens")
_KINDS = list(get_args(Kind))
# Row groups small enough that a viewer or a partial reader need not fetch all token ids.
_ROW_GROUP = 500


def resolve(ref: str | Path, catalog: Catalog | str | Path | None = None) -> Subset:
    """A calibration reference as a subset, its content checked against its hash; ``origin`` says which runs made it.

    Args:
        ref: ``name`` (latest version), ``name@2``, the folder of an exported subset, or ``hub:org/repo/name@2``.
        catalog: where names are looked up; by default ``CALSET_CATALOG``, else ``calset.duckdb`` here.

    Raises:
        InputError: neither, or a folder whose content is not what its manifest says.
        CatalogError: stored samples without their hash.
    """
    return locate(ref, catalog)[0]


def locate(ref: str | Path, catalog: Catalog | str | Path | None = None) -> tuple[Subset, Path | None]:
    """As ``resolve``, with the exported folder that the subset was read from, if it was one."""
    path = Path(ref)
    if isinstance(ref, str) and ref.startswith("hub:"):
        from calset.catalog.hub import open_reference

        return open_reference(ref), None
    if isinstance(ref, Path) or "/" in ref or os.sep in ref:
        # os.path says False, where Path's methods raise, of a text that can be no path.
        if os.path.isdir(path):
            return read_directory(path), path
        raise InputError(
            f"no calibration subset at {ref}: give NAME or NAME@VERSION of the catalog, an exported folder, or "
            "hub:ORG/REPO/NAME@VERSION"
        )
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    try:
        subset = subsets.load(catalog, ref)
        return (subset if subset.origin else replace(subset, origin=provenance_of(subset, catalog))), None
    except InputError:
        # A name means the catalog's subset; a folder of that name here counts only when there is none.
        if os.path.isfile(path / MANIFEST):
            return read_directory(path), path
        raise


def export(catalog: Catalog | str | Path, subset: Subset | str, directory: str | Path) -> Path:
    """Write a subset to a folder; the same subset again is fine, anything else in its way is not touched.

    Args:
        subset: a Subset or a reference to one.

    Returns:
        the folder.

    Raises:
        InputError: the folder holds something else, or cannot be made.
        CatalogError: no space left.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    subset = resolve(subset, catalog) if isinstance(subset, str) else subset
    directory = Path(directory)
    if _holds(directory, subset):
        return directory
    table = rows_table(subset, catalog)
    manifest = manifest_of(subset, catalog)
    with written(directory, "folder"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with drafted(directory) as draft:
            _write(draft, table, manifest)
            draft.replace(directory)
    return directory


def _holds(directory: Path, subset: Subset) -> bool:
    """Whether the folder is this very subset already.

    Raises:
        InputError: it holds anything else.
    """
    if not os.path.exists(directory):
        return False
    if not os.path.isdir(directory):
        raise InputError(f"{directory} is a file: name a new folder")
    if not any(directory.iterdir()):
        return False
    other = InputError(f"{directory} is not empty and not {subset.ref}: name a new folder")
    try:
        there = read_directory(directory)
    except InputError:
        raise other from None
    if (there.name, there.version, there.content_hash) != (subset.name, subset.version, subset.content_hash):
        raise other
    return True


def _write(folder: Path, table: pa.Table, manifest: Mapping[str, Any]) -> None:
    (folder / DATA).parent.mkdir(parents=True)
    write_rows(table, folder / DATA)
    # The manifest last: a reader that finds it finds everything.
    write_manifest(manifest, folder / MANIFEST)


def write_rows(table: pa.Table, path: Path) -> None:
    """Parquet that viewers page through and that the Hub's storage shares between versions."""
    import pyarrow.parquet as pq

    pq.write_table(
        table,
        path,
        compression="zstd",
        row_group_size=_ROW_GROUP,
        use_content_defined_chunking=True,
        write_page_index=True,
    )


def write_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    text = (json.dumps(jsonable(manifest), indent=2, ensure_ascii=False) + "\n").encode()
    require_size(f"the manifest of {manifest['name']}", len(text))  # or nobody could read it back
    path.write_bytes(text)


def _schema() -> pa.Schema:
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("kind", pa.string()),
            ("problem_id", pa.string()),
            ("trace_id", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("n_prompt_tokens", pa.int32()),
            ("n_tokens", pa.int32()),  # completion tokens, as everywhere in calset
            ("question", pa.string()),
            ("answer", pa.string()),
            ("text", pa.string()),
            ("messages", pa.list_(message)),
            ("verdict", pa.string()),
            ("difficulty", pa.float64()),
            ("finish_reason", pa.string()),
            ("source", pa.string()),
        ]
    )


def rows_table(subset: Subset, catalog: Catalog) -> pa.Table:
    """A row a sample: token ids, and what the catalog knows of its trace and problem."""
    import pyarrow as pa

    if (published := _published(subset)) is not None:
        return published[0]
    facts = subsets.trace_facts(catalog, subset) if catalog.exists() else {}
    wanted = sorted({s.problem_id for s in subset.samples if s.problem_id})
    problems = catalog.problems(wanted) if catalog.exists() else {}
    prompts = _system_prompts(catalog, wanted) if catalog.exists() else {}
    rows = []
    for sample in subset.samples:
        problem, known = problems.get(sample.problem_id or ""), facts.get(sample.trace_id, {})
        messages = _messages(sample, problem, known.get("text"), prompts)
        rows.append(_export_row(sample, known, problem, messages))
    return pa.Table.from_pylist(rows, schema=_schema())


def _published(subset: Subset) -> tuple[pa.Table, dict[str, Any]] | None:
    """What was published of a pulled subset, whose traces and their texts the catalog does not have."""
    if not subset.origin or "hub" not in subset.origin:
        return None
    from calset.catalog.hub import published

    return published(subset)


def _system_prompts(catalog: Catalog, problem_ids: Sequence[str]) -> dict[str, str | None]:
    """The system prompt that was served, by the id of any sample (trace, prompt, gold) of these problems.

    The prompt is part of the generation key, so every attempt of a trace and every run of a key has the same.
    """
    rows = catalog.rows(
        "SELECT DISTINCT t.trace_id, t.problem_id, t.generation_key, r.system_prompt FROM traces t "
        "JOIN runs r ON r.run_id = t.run_id WHERE t.problem_id IN (SELECT unnest(?::VARCHAR[]))",
        [list(problem_ids)],
    )
    found = {row["trace_id"]: row["system_prompt"] for row in rows}
    for problem, key, prompt in {(r["problem_id"], r["generation_key"], r["system_prompt"]) for r in rows}:
        found |= {subsets.prompt_sample_id(kind, problem, key): prompt for kind in ("prompt", "gold")}
    return found


def _messages(
    sample: Sample, problem: Problem | None, text: str | None, system_prompts: Mapping[str, str | None]
) -> list[dict[str, str]] | None:
    """The turns as the model was served them and what followed; None when the catalog does not know them."""
    if problem is None or sample.sample_id not in system_prompts:
        return None
    system = system_prompts[sample.sample_id]
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": problem.question})
    answer = problem.reference_solution if sample.kind == "gold" else text
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def _export_row(
    sample: Sample, facts: Mapping[str, Any], problem: Problem | None, messages: list[dict[str, str]] | None
) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "kind": sample.kind,
        "problem_id": sample.problem_id,
        "trace_id": sample.trace_id,
        "input_ids": list(sample.input_ids),
        "n_prompt_tokens": sample.n_prompt_tokens,
        "n_tokens": len(sample.input_ids) - sample.n_prompt_tokens,
        "question": problem.question if problem else None,
        "answer": problem.answer if problem else None,
        # A window of a trace has no text of its own: its tokens are never decoded, and the trace's is another.
        "text": facts.get("text") if sample.sample_id == sample.trace_id else None,
        "messages": messages,
        "verdict": facts.get("verdict"),
        "difficulty": facts.get("difficulty"),
        "finish_reason": facts.get("finish_reason"),
        "source": problem.source if problem else None,
    }


def manifest_of(subset: Subset, catalog: Catalog) -> dict[str, Any]:
    """What a reader must know of a subset: where it comes from, its numbers, its content hash."""
    if (published := _published(subset)) is not None:
        return {**published[1], **(subset.origin or {})}
    described = subsets.describe(subset, catalog)
    quantiles = {key: described[key] for key in described if key.endswith("_quantiles")}
    return {
        "schema": MANIFEST_SCHEMA,
        **subset.facts(),
        "n_problems": described["n_problems"],
        **quantiles,
        "pool": dict(subset.pool),
        "warnings": list(subset.warnings),
        "created_at": subset.created_at.isoformat(),
        **provenance_of(subset, catalog),
    }


def provenance_of(subset: Subset, catalog: Catalog) -> dict[str, Any]:
    """The runs and sources that the samples come from; of a subset that was read from elsewhere, those it came with."""
    if subset.origin:
        return dict(subset.origin)
    if not catalog.exists():
        return {"runs": [], "sources": []}
    taken = subsets.attempts_of(catalog, subset)
    problems = sorted({s.problem_id for s in subset.samples if s.problem_id})
    runs = catalog.rows(
        "SELECT DISTINCT t.run_id FROM traces t JOIN (SELECT unnest(?::VARCHAR[]) AS trace_id, "
        "unnest(?::INTEGER[]) AS attempt) w ON w.trace_id = t.trace_id AND w.attempt = t.attempt ORDER BY t.run_id",
        [list(taken), list(taken.values())],
    )
    sources = catalog.rows(
        "SELECT DISTINCT s.* FROM sources s JOIN problems p ON p.source_id = s.source_id "
        "WHERE p.problem_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY s.name, s.source_id",
        [problems],
    )
    # Where a folder lay on the building machine is nobody else's business.
    found = [jsonable(asdict(catalog.run(row["run_id"]))) for row in runs]
    made = [{k: v for k, v in run.items() if k != "model_path"} for run in found]
    for run in made:
        run["command"] = _without_folders(run["command"])
        run["engine_options"] = _bare(run["engine_options"])
    return {"runs": made, "sources": [{**source, "spec": _without_folder(source["spec"])} for source in sources]}


def _without_folders(command: str) -> str:
    """A command line whose full paths are names only."""
    try:
        words = shlex.split(command)
    except ValueError:  # not written by shlex.join
        words = command.split()
    return shlex.join(map(_without_folder, words))


def _bare(value: Any) -> Any:
    """A JSON-able value, the full paths in it names only, and no secret in it."""
    if isinstance(value, dict):
        return {key: HIDDEN if _SECRET.search(key) and item else _bare(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_bare(item) for item in value]
    return _without_folder(value) if isinstance(value, str) else value


# What an engine may be given that is nobody else's business: hf_token, api_key, VLLM_API_KEY, ...
_SECRET = re.compile(r"(?:^|[_-])(?:token|secret|password|passwd|api[_-]?key)$", re.IGNORECASE)
HIDDEN = "***"


def _without_folder(word: str) -> str:
    """A word as others may see it: its full path (``/home/me/x``, ``~/x``, ``--option=/home/me/x``, ``file:///x``) cut
    to the name, and no secret (``hf_token=...``, ``http://me:password@host``) in it."""
    option, equals, value = word.partition("=") if re.match(r"-|\w+=", word) else ("", "", word)
    if equals and _SECRET.search(option):
        return f"{option}={HIDDEN}"
    if option.startswith("-") and re.match(r"\w+=", value):  # --engine-option=hf_token=...
        return f"{option}={_without_folder(value)}"
    if value.startswith(("{", "[")):  # --engine-option 'hf_overrides={"api_key": ...}'
        with suppress(ValueError, RecursionError):
            return f"{option}{equals}{json.dumps(_bare(json.loads(value)), ensure_ascii=False)}"
    path = re.sub(r"(\w://)[^/\s,@]*@", rf"\1{HIDDEN}@", value).removeprefix("file://")
    return f"{option}{equals}{Path(path).name if path.startswith(('/', '~')) else path}"


def read_directory(path: str | Path) -> Subset:
    """An exported folder as a subset.

    Raises:
        InputError: no usable manifest, one of a newer schema, or rows that do not have its content hash.
    """
    path = Path(path)
    manifest = read_manifest(path / MANIFEST)
    subsets.check_name(manifest["name"])
    return read_subset(manifest, path / MANIFEST, [path / DATA])


def read_subset(
    manifest: Mapping[str, Any], where: Path, data: Sequence[Path], *, hub: Mapping[str, str] | None = None
) -> Subset:
    """A subset from its manifest and its Parquet files in order.

    Args:
        manifest: of ``read_manifest``.
        where: the manifest's file, for messages.
        hub: where on the Hub it was read: repo, commit, tag, manifest.

    Raises:
        InputError: rows that are none, or that do not have the manifest's content hash and counts.
    """
    samples = list(_read_samples(data, _bounds(manifest, data)))
    subset = Subset(
        name=manifest["name"],
        version=manifest["version"],
        content_hash=manifest["content_hash"],
        recipe=dict(manifest["recipe"]),
        seed=manifest["seed"],
        model=manifest["model"],
        model_revision=manifest["model_revision"],
        tokenizer_hash=manifest["tokenizer_hash"],
        samples=samples,
        pool=dict(manifest["pool"]),
        warnings=list(manifest["warnings"]),
        created_at=moment(manifest["created_at"]),
        origin=_origin(manifest, hub),
    )
    if subsets.hash_samples(samples) != subset.content_hash:
        raise InputError(
            f"the rows of {where.parent} do not have the content hash of its manifest: it was changed; export it again"
        )
    n_problems = len({sample.problem_id for sample in samples if sample.problem_id})
    counted = {"n_samples": subset.n_samples, "n_tokens": subset.n_tokens, "n_problems": n_problems}
    if wrong := next((key for key, n in counted.items() if manifest[key] != n), None):
        raise InputError(f"{where} says {wrong} {manifest[wrong]}, its rows have {counted[wrong]}: export it again")
    return subset


def _origin(manifest: Mapping[str, Any], hub: Mapping[str, str] | None) -> dict[str, Any]:
    known = hub or manifest.get("hub")
    listed = {key: [dict(item) for item in manifest[key]] for key in ("runs", "sources")}
    return {**({"hub": dict(known)} if known else {}), **listed}


def _read_samples(data: Sequence[Path], bounds: Bounds) -> Iterator[Sample]:
    number = 0
    for batch in read_batches(data, _REQUIRED, bounds):
        if missing := sorted(set(_REQUIRED) - set(batch.schema.names)):
            raise InputError(f"cannot read {data[0]}: it has no column {missing[0]}; export the subset again")
        for row in batch.to_pylist():
            yield _sample(data[0], number, row)
            number += 1


def _sample(path: Path, number: int, row: Mapping[str, Any]) -> Sample:
    """One row as a sample; checked here, so that nothing but 32-bit token ids reaches the hash and a model."""
    token_ids, n_prompt = row["input_ids"], row["n_prompt_tokens"]
    texts = (row["sample_id"], row["problem_id"] or "", row["trace_id"] or "")
    good = {
        "input_ids": isinstance(token_ids, list) and all(_is_count(i, 2**31 - 1) for i in token_ids),
        "n_prompt_tokens": isinstance(token_ids, list) and _is_count(n_prompt, len(token_ids)),
        "kind": row["kind"] in _KINDS,
        "sample_id, problem_id or trace_id": all(isinstance(text, str) for text in texts),
    }
    for column, is_good in good.items():
        if not is_good:
            raise InputError(f"cannot read {path}: row {number} has no usable {column}; export the subset again")
    return Sample(row["sample_id"], token_ids, n_prompt, row["kind"], row["trace_id"], row["problem_id"])


def read_rows(manifest: Mapping[str, Any], data: Sequence[Path]) -> pa.Table:
    """Read calset's own columns of a subset's Parquet files in order, with their types; a missing one is all nulls.

    Raises:
        InputError: a column of another type, or more than the manifest says.
    """
    import pyarrow as pa

    schema = _schema()
    batches = []
    try:
        for batch in read_batches(data, schema.names, _bounds(manifest, data)):
            there = dict(zip(batch.schema.names, batch.columns, strict=True))
            columns = [there.get(f.name, pa.nulls(len(batch), f.type)).cast(f.type) for f in schema]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    except pa.ArrowException as error:
        raise InputError(f"cannot read {data[0]}: {first_line(error)}; export the subset again") from error
    return pa.Table.from_batches(batches, schema=schema)


def _bounds(manifest: Mapping[str, Any], data: Sequence[Path]) -> Bounds:
    return Bounds.of(data, manifest["n_samples"], manifest["n_tokens"])


def _is_count(value: Any, highest: int) -> bool:
    return type(value) is int and 0 <= value <= highest
