"""What a grading worker can see and do, asked of a grader that tries everything; and what a worker may answer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from brought import bring
from processes import python

from calset.builder.grading import Outcome
from calset.builder.grading.pool import GradingPool

LINUX = sys.platform == "linux"
OWN_VARIABLES = {"HOME", "TMPDIR", "LC_ALL", "PYTHONUTF8", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}

# Each attempt ends with what it brought, or with the name of the error that kept it from it.
GRADER = """
import json, os, resource, socket, subprocess, sys, threading
from pathlib import Path

from calset.builder.grading import Outcome

def version():
    return "1"

def connected(family, address):
    with socket.socket(family) as client:
        client.connect(address)
    return "connected"

def appended(path):
    with open(path, "a") as file:
        return file.write("x")

def threaded():
    found = []
    thread = threading.Thread(target=found.append, args=("ran",))
    thread.start()
    thread.join()
    return found[0]

def silenced():
    with open(os.devnull, "w") as file:
        return f"{print('lost', file=file)}"

ATTEMPTS = {
    "pid": lambda to: os.getpid(),
    "environment": lambda to: dict(os.environ),
    "cwd": lambda to: os.getcwd(),
    "descriptor": lambda to: os.fstat(to["descriptor"]).st_ino,
    "parent": lambda to: len(Path(f"/proc/{os.getppid()}/environ").read_bytes()),
    "signal": lambda to: os.kill(os.getppid(), 0),
    "new": lambda to: Path(to["folder"], "new").write_text("x"),
    "empty": lambda to: Path(to["folder"], "empty").touch(),
    "here": lambda to: Path("here").write_text("x"),
    "append": lambda to: appended(to["kept"]),
    "overwrite": lambda to: Path(to["kept"]).write_text("x"),
    "truncate": lambda to: os.truncate(to["kept"], 0),
    "delete": lambda to: os.unlink(to["kept"]),
    "rename": lambda to: os.rename(to["kept"], to["kept"] + "2"),
    "link": lambda to: os.link(to["kept"], to["kept"] + "3"),
    "folder": lambda to: os.mkdir(to["folder"] + "/made"),
    "mode": lambda to: os.chmod(to["kept"], 0o777),
    "times": lambda to: os.utime(to["kept"], (1, 1)),
    "group": lambda to: os.setpgid(0, os.getpgid(os.getppid())),
    "limits": lambda to: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    "program": lambda to: subprocess.run([sys.executable, "-c", "pass"]).returncode,
    "process": lambda to: os.waitpid(os.fork() or os._exit(0), 0)[1],
    "tcp": lambda to: connected(socket.AF_INET, ("127.0.0.1", to["port"])),
    "unix": lambda to: connected(socket.AF_UNIX, to["socket"]),
    "thread": lambda to: threaded(),
    "silence": lambda to: silenced(),
    "read": lambda to: Path(to["kept"]).read_text(),
}

def attempt(name, to):
    try:
        return ATTEMPTS[name](to)
    except Exception as error:
        return type(error).__name__

def grade(answer, response, metadata):
    if response == "memory":
        return Outcome("correct", str(len(bytes(int(answer)))))
    told = {name: attempt(name, metadata) for name in ATTEMPTS}
    return Outcome("correct", json.dumps(told))
"""

HARMLESS = {"pid", "environment", "cwd", "thread", "silence", "read"}
# Below Linux 5.13 or without Landlock (which doctor names) files of the user can be deleted, and emptied by opening.
REFUSED = {
    "use the network": {"tcp"},
    "connect to local services": {"unix"},
    "write files": {"new", "here", "append"},
    "empty and delete files": {"empty", "overwrite", "delete", "rename", "link", "folder"},
    "change the permissions of files": {"truncate", "mode", "times", "group", "limits"},
    "start processes": {"program", "process"},
    "read the environment of calset's process": {"parent"},
}
PASSED_ON = {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with a package whose grader ``nosy`` tries everything."""
    bring(tmp_path / "site", "nosy", GRADER)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the grader is to reach: files, an inheritable descriptor, a variable, listening sockets."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONSTARTUP", "LD_PRELOAD_MARKER"):
        monkeypatch.setenv(name, "marker")
    folder = tmp_path / "target"
    folder.mkdir()
    kept = folder / "kept"
    kept.write_text("kept")
    opened = os.open(kept, os.O_RDWR)
    marker = fcntl.fcntl(opened, fcntl.F_DUPFD, 51)  # inheritable, and no number that a worker has by itself
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        tempfile.TemporaryDirectory() as short,  # a socket's name has a hundred characters at most
    ):
        unix.bind(f"{short}/s")
        unix.listen()
        yield {
            "folder": str(folder),
            "kept": str(kept),
            "descriptor": marker,
            "port": tcp.getsockname()[1],
            "socket": f"{short}/s",
        }
    os.close(marker)
    os.close(opened)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def ask(pool: GradingPool, target: dict[str, Any]) -> dict[str, Any]:
    outcome = pool.submit("nosy", "1", "all", target).result(timeout=60)
    assert outcome.verdict == "correct", outcome
    return json.loads(str(outcome.extracted))


def check(told: dict[str, Any], gaps: list[str], target: dict[str, Any]) -> None:
    assert set(told) == HARMLESS | {"descriptor", "signal"} | set().union(*REFUSED.values())
    names = set(told["environment"])
    assert names - PASSED_ON == OWN_VARIABLES
    scratch = told["environment"]["HOME"]
    assert {told["cwd"], told["environment"]["TMPDIR"]} == {scratch}
    assert os.listdir(scratch) == []
    assert told["descriptor"] == "OSError"
    assert (told["thread"], told["silence"], told["read"]) == ("ran", "None", "kept")
    for gap, attempts in REFUSED.items():
        if gap in gaps:
            continue
        succeeded = {name: told[name] for name in attempts if told[name] not in ("PermissionError", "OSError")}
        assert succeeded == {}, gap
    if LINUX and os.uname().machine in ("x86_64", "aarch64") and not gaps:
        assert sorted(os.listdir(target["folder"])) == ["kept"]
        assert Path(target["kept"]).read_text() == "kept"
        version = tuple(int("".join(filter(str.isdigit, part))) for part in platform.release().split(".")[:2])
        assert version < (6, 12) or told["signal"] == "PermissionError"


@pytest.mark.parametrize("background", [True, False])
def test_a_grader_sees_and_changes_nothing_even_in_a_worker_that_replaced_another(
    background: bool, site: Path, target: dict[str, Any]
) -> None:
    with GradingPool(1, background=background) as pool:
        first = ask(pool, target)
        gaps = pool.gaps
        check(first, gaps, target)
        os.kill(first["pid"], signal.SIGKILL)
        second = ask(pool, target)
        check(second, gaps, target)
        assert second["pid"] != first["pid"]
        assert second["cwd"] == first["cwd"]  # one folder a pool
    assert not Path(first["cwd"]).exists()
    assert not alive(second["pid"])


def test_a_grader_that_wants_more_memory_than_its_share_is_an_error_and_the_next_answer_has_a_new_worker(
    site: Path, target: dict[str, Any]
) -> None:
    with GradingPool(1) as pool:
        before = ask(pool, target)["pid"]
        less, more = (pool.submit("nosy", str(size * 2**30), "memory", {}) for size in (2, 5))
        assert less.result(timeout=60) == Outcome("correct", str(2 * 2**30))  # not one byte of it is touched
        outcome = more.result(timeout=60)
        assert (outcome.verdict, str(outcome.detail)[:11]) == ("error", "MemoryError")
        after = pool.submit("math", "1/2", r"\boxed{0.5}", {}).result(timeout=60)
        assert after.verdict == "correct"
        assert ask(pool, target)["pid"] != before


@pytest.mark.skipif(not LINUX, reason="the kernel's own walls are Linux'")
def test_where_the_kernel_has_no_walls_graders_work_and_doctor_says_what_they_can_do(
    site: Path, target: dict[str, Any]
) -> None:
    """In a process that is refused namespaces, filters and Landlock, as some containers are."""
    refused = {"x86_64": (0xC000003E, [272, 317, 444]), "aarch64": (0xC00000B7, [97, 277, 444])}[platform.machine()]
    code = f"""
        import ctypes, json, struct, sys
        audit, numbers = {refused!r}
        steps = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (6, 0, 0, 0x7FFF0000), (0x20, 0, 0, 0)]
        for number in numbers:
            steps += [(0x15, 0, 1, number), (6, 0, 0, 0x00050000 | {errno.EPERM})]
        steps.append((6, 0, 0, 0x7FFF0000))
        packed = b"".join(struct.pack("HBBI", *step) for step in steps)
        buffer = ctypes.create_string_buffer(packed)
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(buffer)), 0, 0) == 0

        from calset.builder.grading.pool import GradingPool
        from calset.diagnosis import grading
        sys.path.insert(0, {str(site)!r})
        with GradingPool(1) as pool:
            told = json.loads(pool.submit("nosy", "1", "all", {target!r}).result().extracted)
        print(json.dumps([told, *(check.as_dict() for check in grading())]))
    """
    process = python(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told, grading, walls = json.loads(out)
    assert grading["state"] == "ok"
    assert (walls["name"], walls["state"]) == ("walls", "warning")
    for gap in ("use the network", "empty and delete files", "change the permissions of files"):
        assert gap in walls["message"]
    assert walls["remedy"]
    assert told["tcp"] == "connected"
    assert set(told["environment"]) - PASSED_ON == OWN_VARIABLES
    # The limit on a file's size needs no such kernel.
    assert {told[name] for name in ("new", "here", "append")} == {"OSError"}


def test_doctor_says_that_graders_have_walls_exactly_where_they_have(site: Path, target: dict[str, Any]) -> None:
    from calset.diagnosis import grading

    _, walls = grading()
    with GradingPool(1) as pool:
        told, gaps = ask(pool, target), pool.gaps
    assert (walls.state == "ok") == (gaps == [])
    assert all(gap in walls.message for gap in gaps)
    assert ("use the network" in walls.message) == (told["tcp"] == "connected")


def test_an_import_may_cache_what_it_compiles_and_nothing_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: an entry of sys.path that means the current folder means the parent's."""
    bring(tmp_path / "site", "plain", GRADER)
    bring(tmp_path / "site", "late", "import helper\n" + GRADER)
    (tmp_path / "site" / "helper.py").write_text("")
    monkeypatch.chdir(tmp_path / "site")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    with GradingPool(1) as pool:
        for grader in ("plain", "late", "plain"):  # a worker that has seen an answer imports no other grader
            assert pool.submit(grader, "1", "memory", {}).result(timeout=60) == Outcome("correct", "1")
        cached = sorted(path.name.split(".")[0] for path in Path("__pycache__").iterdir())
        assert cached == ["helper", "late", "plain"]
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for path in Path("__pycache__").iterdir():
        path.unlink()
    with GradingPool(1) as pool:
        assert pool.submit("late", "1", "memory", {}).result(timeout=60) == Outcome("correct", "1")
    assert list(Path("__pycache__").iterdir()) == []


def test_a_working_folder_that_was_tidied_away_is_made_anew(site: Path, target: dict[str, Any]) -> None:
    with GradingPool(1) as pool:
        first = ask(pool, target)
        os.rmdir(first["cwd"])
        assert ask(pool, target)["pid"] == first["pid"]
        os.kill(first["pid"], signal.SIGKILL)
        second = ask(pool, target)
        assert os.listdir(second["cwd"]) == []
    assert not Path(second["cwd"]).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone reads what belongs to others")
def test_root_grades_with_an_environment_in_the_home_of_somebody_else(site: Path) -> None:
    os.chown(site, 1234, 1234)
    site.chmod(0o700)
    with GradingPool(1) as pool:
        assert pool.submit("nosy", "1", "memory", {}).result(timeout=60) == Outcome("correct", "1")


STARTING = """
import os, subprocess, sys

from calset.builder.grading import Outcome

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

def version():
    return "1"

def grade(answer, response, metadata):
    if response == "crash":
        os._exit(3)
    return Outcome("correct", str(child.pid))
"""


def test_a_process_that_an_import_started_ends_with_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(tmp_path / "site", "starting", STARTING)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with GradingPool(1) as pool:

        def graded(response: str) -> Outcome:
            return pool.submit("starting", "1", response, {}).result(timeout=60)

        first = int(str(graded("1").extracted))
        assert alive(first)
        assert graded("crash").verdict == "error"
        wait_for(lambda: not alive(first), 20)
        second = int(str(graded("1").extracted))
        assert alive(second)
    wait_for(lambda: not alive(second), 20)


@pytest.mark.skipif(not LINUX, reason="process groups as Linux has them")
def test_a_worker_that_left_its_process_group_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os\nif os.environ.get('HOME') == os.getcwd():\n    os.setpgid(0, os.getpgid(os.getppid()))\n"
    bring(
        tmp_path / "site",
        "astray",
        code + GRADER.replace('if response == "memory":', "while True:\n        pass\n    if True:"),
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with GradingPool(1, deadline_seconds=1) as pool:
        assert pool.submit("astray", "1", "all", {}).result(timeout=60).verdict == "timeout"


@pytest.mark.skipif(not LINUX, reason="Landlock is Linux'")
def test_a_thread_that_an_import_started_is_not_said_to_have_walls_that_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    code = f"\nif os.environ.get('HOME') == os.getcwd():\n    {begun}\n"
    bring(tmp_path / "site", "threaded", GRADER + code)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with GradingPool(1) as pool:
        assert pool.submit("threaded", "1", "memory", {}).result(timeout=60).verdict == "correct"
        assert "empty and delete files" in pool.gaps


def test_what_a_killed_parent_leaves_is_one_empty_folder(site: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    code = f"""
        import sys, tempfile, time
        sys.path.insert(0, {str(site)!r})
        tempfile.tempdir = {str(tmp_path / "tmp")!r}
        from calset.builder.grading.pool import GradingPool
        with GradingPool(2) as pool:
            print(*(pool.submit("nosy", "1", "memory", {{}}).result().verdict for _ in range(3)), flush=True)
            if len(sys.argv) > 1:
                time.sleep(600)
    """
    killed = python(code, "stay")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "correct correct correct\n"
    killed.kill()
    killed.wait()
    (left,) = (tmp_path / "tmp").iterdir()
    assert (left.stat().st_mode & 0o777, list(left.iterdir())) == (0o700, [])
    after = python(code)
    assert after.communicate(timeout=60)[0] == "correct correct correct\n"
    assert list((tmp_path / "tmp").iterdir()) == [left]


REPLIES = """
import os, signal, time

from calset.builder.grading import Outcome

def version():
    return "1"

def say(line):
    for descriptor in range(3, 10):  # one of them is the worker's pipe of replies
        try:
            os.write(descriptor, line)
        except OSError:
            pass

def grade(answer, response, metadata):
    if response == "flood":
        while True:
            say(b"x" * 60_000)
    if response == "say":
        say(answer.encode() + bytes([10]))
    if response == "deaf":  # what this answer has set off stops the worker when it waits for the next one
        signal.signal(signal.SIGALRM, lambda *_: time.sleep(600))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    return Outcome("incorrect", response[:10])
"""


def test_a_worker_is_believed_one_verdict_an_answer_in_bounds_and_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(tmp_path / "site", "liar", REPLIES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    told = '{"verdict": "correct", "extracted": null, "detail": null}'
    with GradingPool(1, deadline_seconds=1) as pool:

        def graded(answer: str, response: str) -> Outcome:
            return pool.submit("liar", answer, response, {}).result(timeout=60)

        assert graded("", "flood") == Outcome("error", detail="the grader crashed twice (its reply is too long)")
        lines = ["[]", "{}", "no JSON", "[" * 100_000, told, told.replace("correct", "right")]
        for line in lines:
            assert graded(line, "say").verdict == "error", line[:20]
            assert graded("", "honest") == Outcome("incorrect", "honest")
        # A worker that reads no more is given up, whatever there is to be sent.
        assert graded("", "deaf") == Outcome("incorrect", "deaf")
        time.sleep(0.1)
        assert graded("", "long " * 40_000).verdict == "timeout"
        assert graded("", "honest") == Outcome("incorrect", "honest")
