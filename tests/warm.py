"""Start commands as processes of their own in milliseconds, by forking an interpreter that has imported what they need.

Each command has its own arguments, environment, folder and standard streams, as a program that a shell starts. What
libraries read from the environment when they are imported (such as the number of OpenMP's threads) is the warm
interpreter's; where the Hub and its cache are is read again. Tests of imports themselves start an interpreter.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

TESTS = Path(__file__).parent
# pyarrow and polars start threads when they are imported.
MODULES = ("torch", "transformers", "safetensors.torch", "duckdb", "rich.table", "calset.cli")
LAZY = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "Qwen2ForCausalLM")  # of transformers
PROGRAM = """#!{python} -IS
import sys
sys.path.append({tests!r})
import warm
warm.program({address!r}, {name!r})
"""


class Running:
    """A command that was started in a warm interpreter; closed before its end, it is killed."""

    def __init__(self, address: str, command: Sequence[object], cwd: str, env: Mapping[str, str], streams: list[int]):
        request = json.dumps({"command": [str(word) for word in command], "cwd": cwd, "env": dict(env)}).encode()
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        socket.send_fds(self.connection, [len(request).to_bytes(8, "big")], streams)
        self.connection.sendall(request)
        self.pid = self._number()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal that killed it."""
        with self.connection:
            self.connection.settimeout(timeout)
            return self._number()

    def close(self) -> None:
        self.connection.close()

    def _number(self) -> int:
        answer = self.connection.recv(12, socket.MSG_WAITALL)
        assert answer, "the warm interpreter has ended"
        return int(answer)


class Warm:
    """A warm interpreter, which ends at the latest with this process."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.address = f"{self.folder.name}/socket"
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.folder.name,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"warm\n"

    def start(self, *command: object, cwd: Path, env: Mapping[str, str] | None = None, streams: list[int]) -> Running:
        """Start ``calset ARGUMENTS`` or ``python -c CODE ARGUMENTS`` with the descriptors of its standard streams.

        It leads a session of its own: signals to its group reach what it started, and no test.
        """
        return Running(self.address, command, str(cwd), os.environ if env is None else env, streams)

    def run(
        self, *command: object, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run such a command to its end, as ``subprocess.run`` does with captured output and nothing to read."""
        with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            streams = [file.fileno() for file in (nothing, out, err)]
            code = self.start(*command, cwd=cwd, env=env, streams=streams).wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())

    def programs(self) -> Path:
        """A folder with the programs ``calset`` and ``python``, to be put first in a shell's PATH."""
        folder = Path(self.folder.name, "bin")
        folder.mkdir(exist_ok=True)
        for name in ("calset", "python"):
            text = PROGRAM.format(python=sys.executable, tests=str(TESTS), address=self.address, name=name)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder


@cache
def warm() -> Warm:
    """The one of this process."""
    return Warm()


def calset(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``calset ARGUMENTS`` with these environment variables and those of this process but CALSET_CATALOG."""
    inherited = {name: value for name, value in os.environ.items() if name != "CALSET_CATALOG"}
    return warm().run("calset", *arguments, cwd=cwd, env=inherited | environment)


def program(address: str, name: str) -> NoReturn:
    """Be ``calset`` or ``python`` of ``Warm.programs``."""
    if name == "python" and sys.argv[1:2] != ["-c"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    sys.exit(Running(address, [name, *sys.argv[1:]], os.getcwd(), os.environ, [0, 1, 2]).wait() % 256)


# --- the warm interpreter ---------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork for each request until standard input ends."""
    import gc
    from importlib import import_module

    for module in MODULES:
        import_module(module)
    for name in LAZY:
        getattr(sys.modules["transformers"], name)
    gc.collect()
    gc.freeze()  # or a fork's collector would copy every page
    assert len(os.listdir("/proc/self/task")) == 1, "threads are not forked"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    running: dict[int, socket.socket] = {}  # who waits for which process
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("warm", flush=True)
    while 0 not in (ready := select.select([0, woken, listener, *running.values()], [], [])[0]):
        for process, connection in running.items():
            if connection in ready:  # nobody waits any more
                with suppress(ProcessLookupError):  # it does not lead its session yet
                    os.killpg(process, signal.SIGKILL)
        if woken in ready:
            os.read(woken, 4096)
            for process in list(running):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    _tell(running.pop(process), os.waitstatus_to_exitcode(status)).close()
        if listener in ready:
            connection = listener.accept()[0]
            head, streams, _, _ = socket.recv_fds(connection, 8, 3)
            request = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
            if process := os.fork():
                running[process] = _tell(connection, process)
                for stream in streams:
                    os.close(stream)
            else:
                signal.set_wakeup_fd(-1)
                for inherited in (woken, wake, *(c.detach() for c in (listener, connection, *running.values()))):
                    os.close(inherited)
                work(streams=streams, **json.loads(request))


def _tell(connection: socket.socket, number: int) -> socket.socket:
    with suppress(OSError):  # nobody waits any more
        connection.sendall(b"%12d" % number)
    return connection


def work(command: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> NoReturn:
    """Be a program that was just started."""
    import atexit
    import random
    import threading
    import traceback
    from types import ModuleType

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, (stream, name, mode) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), "rww", strict=True)):
        os.dup2(stream, number)
        os.close(stream)
        setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    before = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [entry for entry in sys.path if entry not in before]
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    _find_the_hub()
    random.seed()
    sys.modules["numpy"].random.seed()
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        if command[0] == "calset":
            sys.argv[:] = command
            sys.modules["calset.cli"].main()
        else:
            sys.argv[:] = ["-c", *command[3:]]
            exec(compile(command[2], "<string>", "exec"), main.__dict__)
        code = 0
    except SystemExit as exit:
        code = int(exit.code is not None)
        if isinstance(exit.code, int):
            code = exit.code
        elif exit.code is not None:
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends, but for the modules: to take torch apart costs a quarter of a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _find_the_hub() -> None:
    """Have huggingface_hub read its environment again."""
    from importlib import reload

    from huggingface_hub import constants, hf_api

    reload(constants)  # whoever uses them looks them up there
    hf_api.api.endpoint = constants.ENDPOINT


if __name__ == "__main__":
    serve(sys.argv[1])
