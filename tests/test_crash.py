"""Twenty SIGKILLs into real vLLM builds (engine, grader, writer, main): nothing saved is lost, nothing comes twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from calset.builder.problems import load_problems
from calset.catalog.catalog import Catalog

PROBLEMS = "gym:chain_sum?min_terms=3&max_terms=7&size=75&seed=11"
SAMPLES = 8
SLOTS = 8
IN_FLIGHT = SLOTS + 16  # what VllmEngine keeps in flight for so many slots
PULLED = 16  # what a RequestFeed pulls ahead: asked for, not begun
HELD = 32  # finished and not yet saved, before the engine gets no more work
KILLS = 20
# Each request that the engine is given is written down, so that what a restart repeats can be counted.
SCRIPT = """
import sys, time
import calset
from calset.builder import pipeline
from calset.builder.engines import open_engine
from calset.builder.model_info import inspect

class Noting:
    def __init__(self, engine, path):
        self._engine, self._notes = engine, open(path, "a", buffering=1)

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream(self, requests, sampling):
        def noted():
            for request in requests:
                self._notes.write(request.key + "\\n")
                yield request

        return self._engine.stream(noted(), sampling)

if __name__ == "__main__":
    model, catalog, problems, samples, slots, held, notes = sys.argv[1:]
    pipeline.MAX_HELD = int(held)
    engine = Noting(open_engine("vllm", inspect(model), max_model_len=512, concurrency=int(slots)), notes)
    report = calset.build(model, problems, samples=int(samples), catalog=catalog, engine=engine, max_tokens=300,
                          commit_every_seconds=0.1, progress=lambda e: print(e.phase, e.existing + e.saved, flush=True))
    engine.close()
    print("report", report.n_new, flush=True)
"""


def keys(path: Path) -> list[str]:
    return [key for (key,) in Catalog(path).query("SELECT trace_id FROM traces").rows] if path.exists() else []


class Build:
    """A build in a process of its own, watched by its progress lines."""

    def __init__(self, folder: Path, model: Path, catalog: Path) -> None:
        script = folder / "build.py"
        script.write_text(SCRIPT)
        self.notes, self.errors = folder / f"{catalog.stem}.requests", folder / "errors.txt"
        arguments = [str(model), str(catalog), PROBLEMS, str(SAMPLES), str(SLOTS), str(HELD), str(self.notes)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.claimed = 0
        self.started = self.finished = False
        self._progressed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._progressed:
                if line.startswith("report"):
                    self.finished = True
                elif line.startswith("generating"):
                    self.started, self.claimed = True, int(line.split()[-1])
                self._progressed.notify_all()

    def wait_for_saved(self, more: int, seconds: float = 600) -> None:
        with self._progressed:
            self._progressed.wait_for(lambda: self.started or self.finished, seconds)
            at_least = self.claimed + more
            self._progressed.wait_for(lambda: self.claimed >= at_least or self.finished, seconds)

    def wait_for_commit(self, seconds: float = 60) -> None:
        with self._progressed:
            before = self.claimed
            self._progressed.wait_for(lambda: self.claimed > before or self.finished, seconds)

    def pids(self, mark: str) -> list[int]:
        listed = subprocess.run(["ps", "-ww", "-eo", "sess=,pid=,stat=,args="], capture_output=True, text=True).stdout
        rows = (line.split(None, 3) for line in listed.splitlines())
        mine = str(self.process.pid)
        # Grading workers have a process group of their own, but the session is the build's.
        return [int(pid) for sess, pid, stat, args in rows if sess == mine and stat[0] != "Z" and mark in args]

    def end(self) -> str:
        """Wait until the build and all it started are gone; what it said on standard error."""
        self.process.wait(timeout=900)
        self._reader.join(timeout=30)
        deadline = time.monotonic() + 60
        while self.pids("") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.pids("")
        return self.errors.read_text()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_kills_lose_nothing_saved_and_repeat_only_what_was_in_flight(tmp_path: Path, tiny_model: Path):
    pytest.importorskip("vllm")
    chance = random.Random(20261124)
    path = tmp_path / "killed.duckdb"
    expected = {p.problem_id for p in load_problems(PROBLEMS)[1]}
    kills: Counter[str] = Counter()
    saved: set[str] = set()
    repeated: list[int] = []
    plan = ["grader", "engine", "grader", "writer", "grader", "main"] * 4
    build: Build | None = None
    for victim in plan[:KILLS]:
        if build is None:
            build = Build(tmp_path, tiny_model, path)
        build.wait_for_saved(chance.randint(4, 16))
        assert not build.finished, "the build ended before it was killed: give it more to do"
        if victim == "grader":
            workers = build.pids("calset.builder.grading.pool")
            assert workers
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills[victim] += 1
            continue
        if victim == "engine":
            os.kill(build.pids("VLLM::EngineCore")[0], signal.SIGKILL)
        else:
            if victim == "writer":  # the next commit is at most a tenth of a second away
                build.wait_for_commit()
                time.sleep(chance.random() * 0.12)
            else:
                time.sleep(chance.random() * 0.5)
            build.process.kill()
        kills[victim] += 1
        said = build.end()
        if victim == "engine":
            assert "run the same command again to continue" in said
            assert build.process.returncode == 1
        now = keys(path)
        assert len(now) == len(set(now)) >= build.claimed
        assert saved <= set(now)
        saved = set(now)
        asked = Counter(build.notes.read_text().split())
        repeated.append(len(set(asked) - saved))
        assert repeated[-1] <= IN_FLIGHT + PULLED + HELD + 1
        build = None
    last = build or Build(tmp_path, tiny_model, path)
    last.end()
    assert last.finished
    whole = Build(tmp_path, tiny_model, tmp_path / "whole.duckdb")
    whole.end()
    assert whole.finished
    columns = "SELECT problem_id, sample_index FROM traces ORDER BY ALL"
    rows = Catalog(path).query(columns).rows
    assert rows == Catalog(tmp_path / "whole.duckdb").query(columns).rows
    assert len(rows) == len(set(rows)) == len(expected) * SAMPLES
    assert Catalog(path).query("SELECT count(*), count(DISTINCT trace_id) FROM grades").rows == [(len(rows),) * 2]
    assert not Catalog(path).query("SELECT 1 FROM grades WHERE verdict = 'error'").rows
    print(f"kills {dict(kills)}; in flight and repeated after each restart: {repeated}; {len(rows)} traces")
