"""Chat templates at work in a process that can be killed.

A chat template is a program of whoever made the model. transformers runs it in Jinja's sandbox, which keeps it from
files and from Python, not from a loop or a text without end. During a long C call no thread or signal handler of this
process runs that could stop it. So one child process, shared by all templates, renders them by transformers' own code:
with a deadline of processor time, a limit of memory, no file to write and hardly an environment.
Must not know: tokenizers beyond their template and special tokens, problems, engines.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calset.errors import CalsetError, InputError, first_line
from calset.io import child

CPU_SECONDS = 5.0  # of one rendering; a template takes a tenth of a millisecond, its first rendering 50
WALL_SECONDS = 120.0  # for one prompt, and for the child's start, on a machine that is busy
MEMORY_BYTES = 1 << 30  # on top of what the child has when it is ready
# Characters of a rendered conversation at most: what a template adds, and how often it may repeat what it is given.
OWN_CHARS, REPEATS = 1 << 20, 4
# HOME, because transformers looks for its cache there; TZ, because templates write the date.
KEPT = ("HOME", "TZ", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")

MAX_REASON = 1000  # characters of a template's own error

Message = Mapping[str, str]


class TemplateRefusal(InputError):
    """A chat template raised an error on a conversation; another conversation may be fine."""


def render(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    *,
    options: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
    model: str | Path = "",
) -> list[str]:
    """Render conversations by the tokenizer's chat template, as ``apply_chat_template(tokenize=False)`` does each.

    Args:
        conversations: each a list of messages. The way to the child and back costs as much as ten short renderings, so
            many conversations at once are cheaper than one after another.
        options: what the template is rendered with beside the conversation.
        model: whose template it is, for messages.

    Raises:
        TemplateRefusal: the template raised an error on one of them.
        InputError: the template did not end in time, or takes too much memory or text.
        CalsetError: no child process can be started.
    """
    whose = f"the chat template of {model}" if model else "the chat template"
    program = (tokenizer.get_chat_template(), json.dumps({**_special_tokens(tokenizer), **(options or {})}))
    texts = []
    for reply in _ask(program, conversations, add_generation_prompt, whose):
        if "refused" in reply:
            raise TemplateRefusal(f"{whose} refuses the prompt: {reply['refused']}")
        if "error" in reply:
            raise InputError(f"{whose} {reply['error']}; take another revision of the model, or correct its template")
        texts.append(reply["text"])
    return texts


def prepare() -> None:
    """Start the child process, so that it imports what it needs while this process imports, too."""
    with _lock:
        _running()


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    found = tokenizer.special_tokens_map.items()
    return {name: [str(v) for v in value] if isinstance(value, list) else str(value) for name, value in found}


def _ask(
    program: tuple[str, str], conversations: Sequence[Sequence[Message]], add_generation_prompt: bool, whose: str
) -> list[dict[str, Any]]:
    """The child's replies, one a conversation, up to the first that is no text."""
    global _child
    with _lock:
        why = ""
        for _ in range(2):  # a child may have been killed from outside, which is not the template's fault at once
            renderer = _running()
            try:
                return renderer.ask(program, conversations, add_generation_prompt)
            except BaseException as error:  # Ctrl-C too: what the child has yet to say would be taken for other prompts
                _child = None
                renderer.end()
                if not isinstance(error, _Ended):
                    raise
                if error.endless:
                    return [{"error": f"does not end: no prompt after {CPU_SECONDS:g} seconds of computing"}]
                why = str(error)
    raise CalsetError(f"the process that renders {whose} ended twice ({why}); free some memory, then try again")


def _running() -> _Child:
    global _child
    _child = _child or _Child()
    return _child


class _Ended(Exception):
    """The child process ended without a reply; ``endless``: because of the deadline of processor time."""

    def __init__(self, why: str, *, endless: bool = False) -> None:
        super().__init__(why)
        self.endless = endless


class _TooMuch(Exception):
    """A template's text is out of all proportion."""


class _Child:
    """One process that renders; used by one thread at a time."""

    def __init__(self) -> None:
        try:
            # A group of its own, or Ctrl-C at a terminal would end it, too.
            process = subprocess.Popen(
                child.command("calset.builder.model.templates", "work()"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child.environment(KEPT),
                process_group=0,
            )
        except OSError as error:
            raise CalsetError(f"the process that renders chat templates does not start: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._known: dict[tuple[str, str], int] = {}
        self._buffer, self._ready = b"", False
        self.end = weakref.finalize(self, _end, process, os.getpid())

    def ask(
        self, program: tuple[str, str], conversations: Sequence[Sequence[Message]], add_generation_prompt: bool
    ) -> list[dict[str, Any]]:
        """Have conversations rendered; the replies end with the first that is no text.

        Args:
            program: template, and its variables as JSON; sent once, then named by a number.

        Raises:
            _Ended: the process ended, or took too long.
        """
        number = self._known.get(program)
        new = {} if number is not None else {"template": program[0], "variables": program[1]}
        number = self._known.setdefault(program, len(self._known))
        job = {"conversations": list(conversations), "add_generation_prompt": add_generation_prompt, **new}
        try:
            if not self._ready:
                self._ready = self._reply() == {}
            self._stdin.write(json.dumps({**job, "program": number, "seconds": CPU_SECONDS}).encode() + b"\n")
            self._stdin.flush()
            replies: list[dict[str, Any]] = []
            while len(replies) < len(conversations) and (not replies or "text" in replies[-1]):
                replies.append(self._reply())
        except (OSError, ValueError) as error:
            raise _Ended(first_line(error)) from error
        return replies

    def _reply(self) -> dict[str, Any]:
        """The child's next line."""
        deadline, pieces = time.monotonic() + WALL_SECONDS, [self._buffer]
        with selectors.PollSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise _Ended(f"no answer within {WALL_SECONDS:g} seconds")
                pieces.append(os.read(self._stdout.fileno(), 1 << 16))
                if not pieces[-1]:
                    code = self._process.wait()
                    raise _Ended(f"exit code {code}", endless=code == -signal.SIGPROF)
        line, _, self._buffer = b"".join(pieces).partition(b"\n")
        return json.loads(line)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process whose child it is
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


_lock = threading.Lock()
_child: _Child | None = None


def _forget() -> None:
    """In a fork: the child and its pipes are the parent's, and a thread that is not here may hold the lock."""
    global _child, _lock
    _child, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


# --- in the child ------------------------------------------------------------------------------------------------


def work() -> None:
    """The child's main loop: JSON lines from stdin until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers.utils.chat_template_utils import render_jinja_template

    child.limit_memory(MEMORY_BYTES)
    for name in ("FSIZE", "CORE"):  # pipes are no files
        child.limit(name, 0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    programs: dict[int, tuple[str, dict[str, Any]]] = {}

    def say(reply: dict[str, Any]) -> None:
        left = memoryview(json.dumps(reply).encode() + b"\n")
        while left:
            left = left[replies.write(left) :]

    say({})  # ready
    for line in sys.stdin.buffer:
        job = json.loads(line)
        if "template" in job:
            programs[job["program"]] = job["template"], json.loads(job["variables"])
        template, variables = programs[job["program"]]
        variables["add_generation_prompt"] = job["add_generation_prompt"]
        try:
            for messages in job["conversations"]:
                # The kernel's default for SIGPROF ends the process: also inside a C call, where no Python would run.
                signal.setitimer(signal.ITIMER_PROF, job["seconds"])
                (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
                signal.setitimer(signal.ITIMER_PROF, 0)
                if len(text) > OWN_CHARS + REPEATS * sum(len(message["content"]) for message in messages):
                    raise _TooMuch(f"makes a prompt of {len(text):,} characters")
                say({"text": text})
        except MemoryError:
            reason = {"error": f"takes more than {MEMORY_BYTES >> 30} GiB of memory"}
        except _TooMuch as error:
            reason = {"error": str(error)}
        except Exception as error:  # Jinja's, or whatever the template raises
            reason = {"refused": first_line(error)[:MAX_REASON]}
        else:
            continue
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(reason)
