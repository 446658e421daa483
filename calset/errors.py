"""calset's errors: a small tree whose messages say what happened, to what, and what to do.

The command line prints the message on one line and exits with ``exit_code``: 2 for bad input, 1 for a failure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CalsetError(Exception):
    """Anything calset reports to its user; a failure (exit code 1) unless a subclass says otherwise."""

    exit_code = 1


class InputError(CalsetError):
    """The caller asked for something that cannot be done: a bad option, file, name or model (exit code 2)."""

    exit_code = 2


class CatalogError(CalsetError):
    """The catalog could not be read or written."""


class CatalogLocked(CatalogError):
    """Another process holds the catalog's lock longer than the deadline; the message names its PID."""


class SchemaTooNew(InputError):
    """The catalog was written by a newer calset."""


class CatalogUpgraded(UserWarning):
    """A warning, no error: a catalog of an older schema is upgraded; the message names the copy that is kept."""


class TextsMissing(UserWarning):
    """A warning, no error: a subset has its samples and not the texts that were published beside them."""


class BuildWarning(UserWarning):
    """A warning before a build's engine starts: what the catalog holds, or the Hub, is not what the build goes by."""


class EngineWarning(UserWarning):
    """A warning before an error: what an engine had noted when the build that used it failed."""


class Stopped(CalsetError):
    """The user stopped it (Ctrl-C); what was saved stays and the same command continues."""

    exit_code = 130


class EngineError(CalsetError):
    """An inference engine could not start, or died; what was committed stays and the build can be resumed."""


class PruningError(CalsetError):
    """Pruning could not go on: non-finite activations, a singular matrix that damping does not cure, a full disk."""


class VerificationError(CalsetError):
    """A pruned checkpoint is not what its pruning.json says."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none, for a report of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to put after an unknown word: a suggestion, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def import_problem(error: BaseException, remedy: str) -> str:
    """Why an import failed and what to do, in one line.

    transformers hides the reason in its error's cause. Three companions of torch that calset does not use, when they
    were built for another torch, take transformers and vLLM down with them.
    """
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    if any(name in str(link) for link in chain for name in ("torchvision", "torchaudio", "torchcodec")):
        remedy = "pip uninstall -y torchvision torchaudio torchcodec"
    return f"{first_line(chain[-1])}; {remedy}"
