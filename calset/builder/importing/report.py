"""Report of an import: what was read, kept, graded and refused.

Must not know: files, tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from calset.builder.problems.source import BadRow


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did. ``n_tokens`` (completion) and ``verdicts`` are of the new traces."""

    model: str
    catalog: str
    n_rows: int
    n_traces: int  # new ones
    n_existing: int
    n_problems: int
    n_tokens: int
    n_from_file: int  # of the new ones, with the file's own token ids
    n_from_text: int
    n_without_reference: int  # new ones that nothing could grade
    n_matched: int  # new ones whose problem a source of ``problems`` holds
    n_bad: int
    bad: tuple[BadRow, ...]  # the first ones
    verdicts: Mapping[str, int]
    finish_reasons: Mapping[str, int]
    run_ids: tuple[str, ...]  # of the catalog's runs that these traces belong to, old ones and new
    seconds: float
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
