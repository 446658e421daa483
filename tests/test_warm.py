"""What the warm interpreter starts is as a process that was started cold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import heeding
from warm import warm

SEEN = """
import json, os, signal, sys
from huggingface_hub import HfApi, constants, get_token
print(json.dumps([
    __name__, sys.argv, sys.path, os.getcwd(), dict(os.environ), sys.stdin.read(), sys.stdout.isatty(),
    signal.getsignal(signal.SIGINT) is signal.default_int_handler, constants.ENDPOINT, constants.HF_HUB_CACHE,
    constants.HF_HUB_OFFLINE, HfApi().endpoint, get_token(),
]))
sys.exit("bye")
"""


def test_a_warm_command_sees_what_a_cold_one_sees(tmp_path: Path) -> None:
    hub = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_me", "HF_HUB_OFFLINE": "0"}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "mine"), "LC_ALL": "C.UTF-8", **hub}
    command = ["-c", SEEN, "one", "two"]
    cold = subprocess.run(
        heeding(sys.executable, *command),
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    done = warm().run("python", *command, cwd=tmp_path, env=environment)
    assert done.stdout == cold.stdout
    assert (done.returncode, done.stderr) == (cold.returncode, cold.stderr) == (1, "bye\n")


def test_a_command_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    read, write = os.pipe()
    running = warm().start("python", "-c", "import time; time.sleep(600)", cwd=tmp_path, streams=[0, write, write])
    os.close(write)
    running.close()
    assert os.read(read, 1) == b""  # it had the other end
    os.close(read)
