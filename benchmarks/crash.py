"""Does a build that is killed lose what it said was saved, or repeat more than what was in flight?

SIGKILLs at random moments into a build's grading workers, engine, writer (just before a commit) and main process; after
each of the last three the same build is started again. Then the whole catalog is checked. Linux only (``ps``).

    python benchmarks/crash.py                  # twenty kills, real vLLM, the bundled model
    python benchmarks/crash.py --engine double  # an engine double whose core is a process of its own

``tests/test_crash.py`` runs four kills with vLLM and twenty with the double.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import calset
from calset.builder import pipeline
from calset.builder.engines import Completion, Request, Sampling, open_engine
from calset.builder.engines.base import RESUME_HINT
from calset.builder.model.info import ModelInfo, inspect
from calset.builder.problems import load_problems
from calset.bundled import MODEL
from calset.catalog.catalog import Catalog
from calset.errors import EngineError

SAMPLES = 8
MAX_TOKENS = 300
SLOTS = 8
IN_FLIGHT = SLOTS + 16  # requests that VllmEngine keeps in flight for so many slots
PULLED = 16  # requests that a RequestFeed pulls ahead: asked for, not begun
HELD = 32  # finished and not yet saved, before the engine gets no more work
VICTIMS = ("grader", "engine", "writer", "main")
TWENTY = [*("grader", "engine", "grader", "writer", "grader", "main") * 3, "grader", "engine"]
GRADER = "calset.builder.grading.pool"  # in the worker's command line
CORES = {"vllm": "VLLM::EngineCore", "double": "ENGINE-DOUBLE"}
# Gives each line back after a while, as long as somebody listens.
DOUBLE = """
import sys, time  # ENGINE-DOUBLE
for line in sys.stdin:
    time.sleep(0.02)
    sys.stdout.write(line)
    sys.stdout.flush()
"""


def problems(size: int) -> str:
    return f"gym:chain_sum?min_terms=3&max_terms=7&size={size}&seed=11"


class Double:
    """An engine whose core is a process that can be killed; each completion is the same box."""

    name, version, max_model_len = "double", "1", 512

    def __init__(self, model: ModelInfo) -> None:
        self.loaded = model.revision
        text = model.tokenizer("46\n</think>\n\\boxed{46}", add_special_tokens=False).input_ids
        self.token_ids = (*text, model.eos_token_ids[0])
        command = [sys.executable, "-S", "-c", DOUBLE]
        self.core = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        assert self.core.stdin is not None
        assert self.core.stdout is not None
        for request in requests:
            try:
                print(request.key, file=self.core.stdin, flush=True)
            except OSError as error:
                raise EngineError(f"the double's core is gone; {RESUME_HINT}") from error
            if self.core.stdout.readline().strip() != request.key:
                raise EngineError(f"the double's core is gone; {RESUME_HINT}")
            yield Completion(request.key, self.token_ids, "stop", 0.02)

    def cancel(self) -> None: ...
    def load_weights(self, model: Path, revision: str) -> None: ...

    def close(self) -> None:
        self.core.kill()
        self.core.wait()


class Noting:
    """Passes everything on to an engine and writes each request down that the engine is given."""

    def __init__(self, engine: calset.builder.engines.Engine, path: Path) -> None:
        self.engine, self.notes = engine, path.open("a", buffering=1)

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        def noted() -> Iterator[Request]:
            for request in requests:
                self.notes.write(request.key + "\n")
                yield request

        return self.engine.stream(noted(), sampling)


def work(engine_name: str, model: str, asked: str, catalog: str, notes: str) -> None:
    """Build in this process, which is to be killed, and print a line for each event of its progress."""
    pipeline.MAX_HELD = HELD
    info = inspect(model)
    inner = Double(info) if engine_name == "double" else open_engine("vllm", info, max_model_len=512, concurrency=SLOTS)
    report = calset.build(
        model, asked, samples=SAMPLES, catalog=catalog, engine=Noting(inner, Path(notes)), max_tokens=MAX_TOKENS,
        commit_every_seconds=0.1, progress=lambda e: print(e.phase, e.existing + e.saved, flush=True),
    )  # fmt: skip
    inner.close()
    print("report", report.n_new, flush=True)


class Build:
    """A build in a process of its own, watched by its progress lines."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here.parent), str(here)])
        self.errors = folder / "errors.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys, crash; crash.work(*sys.argv[1:])", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        self.claimed = 0
        self.started = self.finished = False
        self.progressed = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.progressed:
                if line.startswith("report"):
                    self.finished = True
                elif line.startswith("generating"):
                    self.started, self.claimed = True, int(line.split()[-1])
                self.progressed.notify_all()

    def wait_for_saved(self, more: int, seconds: float = 600) -> None:
        with self.progressed:
            self.progressed.wait_for(lambda: self.started or self.finished, seconds)
            at_least = self.claimed + more
            self.progressed.wait_for(lambda: self.claimed >= at_least or self.finished, seconds)

    def wait_for_commit(self, seconds: float = 60) -> None:
        with self.progressed:
            before = self.claimed
            self.progressed.wait_for(lambda: self.claimed > before or self.finished, seconds)

    def pids(self, mark: str = "") -> list[int]:
        listed = subprocess.run(["ps", "-ww", "-eo", "sess=,pid=,stat=,args="], capture_output=True, text=True).stdout
        rows = (line.split(None, 3) for line in listed.splitlines())
        mine = str(self.process.pid)
        # Grading workers have a process group of their own, but the session is the build's.
        return [int(pid) for sess, pid, stat, args in rows if sess == mine and stat[0] != "Z" and mark in args]

    def wait_for_pids(self, mark: str, seconds: float = 60) -> list[int]:
        """The only grading worker may be dead, and the next one about to start."""
        deadline = time.monotonic() + seconds
        while not (found := self.pids(mark)):
            assert time.monotonic() < deadline, f"no process {mark}: {self.errors.read_text()}"
            time.sleep(0.05)
        return found

    def end(self) -> str:
        """Wait until the build and all it started are gone; return its standard error."""
        self.process.wait(timeout=900)
        self.reader.join(timeout=30)
        deadline = time.monotonic() + 60
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.pids(), "processes outlived their build"
        return self.errors.read_text()


class Crashes:
    """One catalog, and the builds that were killed while they filled it.

    Attributes:
        saved: trace ids that the catalog held after the last kill of a build.
        repeated: for each kill of a build, how many requests the engine had been given that were not saved.
    """

    def __init__(self, folder: Path, model: Path, *, engine: str, n_problems: int, seed: int = 20261124) -> None:
        self.folder, self.model, self.engine = folder, model, engine
        self.problems = problems(n_problems)
        self.catalog, self.notes = folder / "killed.duckdb", folder / "requests.txt"
        self.chance = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.saved: set[str] = set()
        self.repeated: list[int] = []
        self.build: Build | None = None

    def running(self) -> Build:
        if self.build is None:
            self.build = Build(self.folder, self.engine, self.model, self.problems, self.catalog, self.notes)
        return self.build

    def kill(self, victim: str) -> None:
        """Kill one process of a running build; check the catalog if that ends the build."""
        build = self.running()
        build.wait_for_saved(self.chance.randint(4, 16))
        assert not build.finished, "the build ended before it was killed: give it more to do"
        self.kills[victim] += 1
        if victim == "grader":
            os.kill(self.chance.choice(build.wait_for_pids(GRADER)), signal.SIGKILL)
            return
        if victim == "engine":
            os.kill(build.wait_for_pids(CORES[self.engine])[0], signal.SIGKILL)
        else:
            if victim == "writer":  # the next commit is at most a tenth of a second away
                build.wait_for_commit()
                time.sleep(self.chance.random() * 0.12)
            else:
                time.sleep(self.chance.random() * 0.5)
            build.process.kill()
        said = build.end()
        if victim == "engine":
            assert "run the same command again to continue" in said
            assert build.process.returncode == 1
        self.build = None
        self.check_saved(build.claimed)

    def check_saved(self, claimed: int) -> None:
        """Check that nothing saved is lost or doubled, and that few requests have to be repeated."""
        now = [key for (key,) in Catalog(self.catalog).query("SELECT trace_id FROM traces").rows]
        assert len(now) == len(set(now)) >= claimed
        assert self.saved <= set(now)
        self.saved = set(now)
        self.repeated.append(len(set(self.notes.read_text().split()) - self.saved))
        assert self.repeated[-1] <= IN_FLIGHT + PULLED + HELD + 1

    def finish(self) -> None:
        """Let the build end by itself."""
        build = self.running()
        said = build.end()
        assert build.finished, said

    def check_whole(self) -> int:
        """Check that the catalog holds each sample of each problem once, with one verdict; return their number."""
        catalog = Catalog(self.catalog)
        rows = catalog.query("SELECT problem_id, sample_index FROM traces ORDER BY ALL").rows
        expected = [(p.problem_id, index) for p in load_problems(self.problems)[1] for index in range(SAMPLES)]
        assert rows == sorted(expected)
        assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM trace_tokens").rows == [(len(rows),) * 2]
        assert catalog.query("SELECT count(*), count(DISTINCT trace_id) FROM grades").rows == [(len(rows),) * 2]
        assert not catalog.query("SELECT 1 FROM grades WHERE verdict = 'error'").rows
        return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=sorted(CORES), default="vllm")
    parser.add_argument("--kills", type=int, default=len(TWENTY))
    parser.add_argument("--problems", type=int, default=150, help=f"number of problems, {SAMPLES} samples each")
    parser.add_argument("--seed", type=int, default=20261124)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        crashes = Crashes(Path(folder), MODEL, engine=args.engine, n_problems=args.problems, seed=args.seed)
        for n in range(args.kills):
            victim = TWENTY[n % len(TWENTY)]
            crashes.kill(victim)
            print(f"{n + 1:3}  {victim:7} {len(crashes.saved):5} saved", flush=True)
        crashes.finish()
        n_traces = crashes.check_whole()
    print(f"kills {dict(crashes.kills)}; repeated after each restart {crashes.repeated}; {n_traces} traces, each once")


if __name__ == "__main__":
    main()
