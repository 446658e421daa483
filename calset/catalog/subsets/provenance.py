"""Where a subset's samples come from: the runs that made the traces, the sources of the problems.

What goes to others names no folder of the building machine and no secret. Must not know: files, the Hub.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.records import Subset
from calset.catalog.subsets.facts import Fact, facts_of
from calset.io.jsonable import jsonable


def provenance_of(subset: Subset, catalog: Catalog, facts: Sequence[Fact | None] | None = None) -> dict[str, Any]:
    """Return the runs and sources of a subset's samples; of one that was read from elsewhere, those it came with.

    Args:
        facts: of ``facts_of``, where the caller has them.
    """
    if subset.origin:
        return dict(subset.origin)
    if not catalog.exists():
        return {"runs": [], "sources": []}
    facts = facts_of(catalog, subset) if facts is None else facts
    runs = sorted({fact.run_id for fact in facts if fact and fact.run_id})
    problems = sorted({s.problem_id for s in subset.samples if s.problem_id})
    sources = catalog.rows(
        "SELECT DISTINCT s.* FROM sources s JOIN problems p ON p.source_id = s.source_id "
        "WHERE p.problem_id IN (SELECT unnest(?::VARCHAR[])) ORDER BY s.name, s.source_id",
        [problems],
    )
    # Where a folder lay on the building machine is nobody else's business.
    found = [jsonable(asdict(catalog.run(run_id))) for run_id in runs]
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
