"""Does a build hold on to anything? Resident memory of the main process at 1,000 and at 100,000 saved traces.

The engine is a double that answers at once (so the figure says nothing of speed); problems are streamed from a file,
grading workers and the DuckDB catalog are real. Wanted: growth below 200 MB.

    python benchmarks/memory.py --traces 100000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import calset
from calset.builder.engines import Completion, Request, Sampling
from calset.builder.model.info import inspect
from calset.bundled import MODEL

SAMPLES = 4
FIRST = 1000


class Double:
    """Answers every request at once with 100 to 400 tokens of thinking and a box."""

    name, version, max_model_len = "double", "1", 2048

    def __init__(self) -> None:
        info = inspect(MODEL)
        self.loaded = info.revision
        self._text = info.tokenizer("<think>\n" + "12 + 34 = 46, " * 100, add_special_tokens=False).input_ids
        self._end = info.tokenizer("\n</think>\n\\boxed{46}", add_special_tokens=False).input_ids
        self._stop = info.eos_token_ids[0]

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            n = random.Random(request.seed).randint(100, 400)
            yield Completion(request.key, (*self._text[:n], *self._end, self._stop), "stop", 0.0)

    def cancel(self) -> None: ...
    def load_weights(self, model: Path, revision: str) -> None: ...
    def close(self) -> None: ...


def resident_mb() -> float:
    """This process's resident memory in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=100_000)
    args = parser.parse_args()
    seen: list[tuple[int, float]] = []

    def watch(event) -> None:
        seen.append((event.saved, resident_mb()))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.jsonl"
        with path.open("w") as file:
            for i in range(args.traces // SAMPLES):
                file.write(json.dumps({"question": f"Problem {i}: 12 + {i} = ?", "answer": str(12 + i)}) + "\n")
        began = time.monotonic()
        catalog = Path(folder) / "c.duckdb"
        report = calset.build(MODEL, str(path), samples=SAMPLES, engine=Double(), catalog=catalog, progress=watch)
        seconds, size = time.monotonic() - began, catalog.stat().st_size / 1e6
    early = max(mb for saved, mb in seen if saved <= max(FIRST, seen[1][0]))
    late = max(mb for saved, mb in seen)
    print(f"{report.n_new} traces in {seconds:.0f} s, catalog {size:.0f} MB")
    print(f"resident MB: {early:.0f} at up to {FIRST} traces, {late:.0f} at most after; growth {late - early:.0f} MB")


if __name__ == "__main__":
    main()
