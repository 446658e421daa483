"""What is said to an OpenAI-compatible server, and how much of its answer is believed.

The dialect is that of vLLM's ``/v1/completions``, which SGLang speaks too: prompts as token ids, and
``return_token_ids`` for those of the completion. Pure functions; must not know sockets, retries or threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import urlsplit

from calset import ids
from calset.builder.engines.base import Request
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError

if TYPE_CHECKING:
    from calset.builder.model.info import ModelInfo

NEEDS = "vLLM has it from 0.10.2, SGLang from 0.5.17"
LINE = 300  # characters of a server's own words that an error repeats
# Bytes of an answer at most. A token is its id (10 digits, a comma and a space) and its text: the longest tokens of
# today's vocabularies are 128 bytes (runs of blanks), or some 200 where a server writes other letters as \uXXXX. What
# stands around them is a few hundred bytes, and no list of models or version of a server is near a megabyte.
TOKEN_BYTES = 256
PROMPT_TOKEN_BYTES = 16  # prompt_token_ids repeat the prompt
OTHER_BYTES = 1 << 20
ERROR_BYTES = 1 << 16  # of an error's body; the rest is not read


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as ``/v1/models`` lists it; ``root`` is what the server loaded, where it says so."""

    name: str
    root: str | None
    max_model_len: int | None
    software: str | None


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def parse_urls(text: str) -> tuple[str, ...]:
    """``http://a:8000,http://b:8000/v1/`` -> their roots, in order, without the ``/v1``.

    Raises:
        InputError: not an http(s) address, one twice, or one that holds a password.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            split = urlsplit(part)
            host, _ = split.hostname, split.port
        except ValueError:
            split, host = None, None
        if split is None or not host or split.scheme not in ("http", "https") or split.query or split.fragment:
            raise InputError(f"{one_line(part)!r} is not a server's address; give one such as http://localhost:8000")
        if split.username or split.password:
            raise InputError(
                f"leave the user and password of {host} out of its address; a key goes into CALSET_API_KEY"
            )
        url = f"{split.scheme}://{split.netloc}{split.path.rstrip('/').removesuffix('/v1')}"
        if url in found:
            raise InputError(f"the server {url} is given twice")
        found.append(url)
    if not found:
        raise InputError("no server's address given; give one such as http://localhost:8000")
    return tuple(found)


def completion_body(
    request: Request, sampling: Sampling, model: str, stop_token_ids: tuple[int, ...]
) -> dict[str, Any]:
    """The JSON of one ``/v1/completions`` request.

    Every sampling parameter is given, also where it is off: both servers fill what is missing from the model folder's
    generation_config.json. -1 for no top_k is the one spelling that both take (SGLang refuses 0).
    """
    body = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(stop_token_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
        "stream": False,
    }
    if request.json_schema is not None:
        schema = {"name": "answer", "schema": json.loads(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def answer_bytes(request: Request) -> int:
    """How many bytes the answer to a request may have."""
    return OTHER_BYTES + TOKEN_BYTES * request.max_tokens + PROMPT_TOKEN_BYTES * len(request.prompt_ids)


def read_completion(
    payload: Any, request: Request, stop_token_ids: tuple[int, ...], url: str, n_vocabulary: int
) -> tuple[tuple[int, ...], str]:
    """(token ids, finish reason) of a ``/v1/completions`` answer, once they are proven to be what was served.

    A finish reason that is none, ``abort``, means that the server gave up on the request.

    Args:
        n_vocabulary: token ids from there on are no tokens.

    Raises:
        EngineError: no token ids, or such as are no tokens; ids that are not those of the prompt, of the count or of
            the limit; a stop without the token that it stopped on.
    """
    choices = payload.get("choices") if isinstance(payload, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise EngineError(f"{url} answered with something that is no completion; is it an OpenAI-compatible server?")
    choice, usage = choices[0], payload.get("usage")
    token_ids = choice.get("token_ids")
    if not _are_ids(token_ids):
        raise EngineError(
            f"{url} returns no token ids (it ignores return_token_ids), and calset stores none but the served ones; "
            f"start a newer server there: {NEEDS}"
        )
    if (stray := ids.outside(token_ids, n_vocabulary)) is not None:
        raise EngineError(
            f"{url} returned the token id {stray}, outside the model's vocabulary of {n_vocabulary}: it serves another "
            "model, or is broken"
        )
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(request.prompt_ids):
        raise EngineError(f"{url} answered another prompt than the one sent to it: its prompt_token_ids differ")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if counted != len(token_ids):
        raise EngineError(f"{url} returned {len(token_ids)} token ids and counts {counted} completion tokens")
    reason = one_line(str(choice.get("finish_reason") or "")) or "abort"
    _check_end(token_ids, reason, choice, request, stop_token_ids, url)
    return tuple(token_ids), reason


def _are_ids(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _check_end(
    token_ids: list[int], reason: str, choice: dict[str, Any], request: Request, stops: tuple[int, ...], url: str
) -> None:
    limit = request.max_tokens
    if len(token_ids) > limit or (reason == "length" and len(token_ids) < limit):
        raise EngineError(
            f"{url} ended a completion at {len(token_ids)} tokens for its length, where {limit} were asked for; start "
            "it without limits of its own (vLLM: --generation-config vllm, and a larger --max-model-len)"
        )
    # Where it stopped on a token of its own (tool calls of some models), vLLM and SGLang say which.
    own = (choice.get("stop_reason"), choice.get("matched_stop"))
    if reason == "stop" and (not token_ids or (token_ids[-1] not in stops and token_ids[-1] not in own)):
        raise EngineError(
            f"{url} stopped a completion without one of the model's end tokens {list(stops)} as its last token id: it "
            "cuts them off, or it stops on text"
        )


def choose_model(payload: Any, model: ModelInfo, wanted: str | None, url: str) -> ServedModel:
    """The served model to ask for: the one named, the only one, or the one called as ``model`` is.

    Raises:
        InputError: none fits; the message lists those there are.
        EngineError: not the answer of a ``/v1/models``.
    """
    data = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(data, list) or not all(isinstance(row, dict) and _is_name(row.get("id")) for row in data):
        raise EngineError(f"{url}/v1/models lists no models; is it an OpenAI-compatible server?")
    served = [_served(row) for row in data]
    names = {wanted} if wanted else {model.model, model.location}
    fitting = [row for row in served if row.name in names]
    if not fitting and not wanted:
        fitting = [row for row in served if row.root in names]
    if not fitting and not wanted and len(served) == 1:
        fitting = served
    if len(fitting) != 1:
        listed = ", ".join(one_line(row.name) for row in served) or "none"
        raise InputError(
            f"{url} does not serve {wanted or model.model!r} under one name; it serves: {listed}; choose one by "
            "--engine-option served_model=NAME"
        )
    return fitting[0]


def _is_name(value: Any) -> bool:
    """Return True if the value is text that can be sent back: JSON can hold half a surrogate pair, UTF-8 cannot."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _served(row: dict[str, Any]) -> ServedModel:
    root, length, software = row.get("root"), row.get("max_model_len"), row.get("owned_by")
    return ServedModel(
        row["id"],
        root if isinstance(root, str) else None,
        length if isinstance(length, int) else None,
        software if isinstance(software, str) else None,
    )


def looks_like(served: ServedModel, model: ModelInfo) -> bool:
    """Whether the served model's names say that it is ``model``; a name proves nothing, but another one is news."""
    ours = {model.model, PurePath(model.location).name, model.model.rpartition("/")[2]}
    theirs = {name for text in (served.name, served.root) if text for name in (text, PurePath(text).name)}
    return bool(ours & theirs)


def error_text(status: int, body: str) -> str:
    """What a server said of a request that it refused, in one line: ``HTTP 400 (its message)``."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body
    for name in ("error", "message", "detail"):  # vLLM nests message in error; SGLang has it on top
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    text = one_line(found if isinstance(found, str) else body)
    return f"HTTP {status} ({text})" if text else f"HTTP {status}"


def one_line(text: str) -> str:
    """A stranger's text for an error of ours: one line, printable, not too long."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= LINE else f"{flat[:LINE]}…"
