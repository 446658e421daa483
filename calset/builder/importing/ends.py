"""How a completion ended, from whatever a row says of it, in the words of the catalog.

The one place that decides: ``stop`` is a proper end, ``length`` and ``repetition`` are cut, ``abort`` and ``error`` are
what something other than the model did. A reason that is none of those known here is no proper end: it becomes
``abort``, which counts for nothing, and is reported. If several fields disagree, the worst counts. Must not know:
what a trace says, tokenizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from calset.builder.problems.values import structure

# Spelled as `_word` leaves them. vLLM, SGLang and OpenAI; then TGI, Anthropic, Bedrock, Gemini, Cohere, Mistral,
# llama.cpp, Ollama, watsonx, DeepSeek, TensorRT-LLM and OpenAI's Responses.
_MEANINGS = {
    "stop": "stop eos eostoken eosid endturn endofturn stopsequence stoptoken stopstring stopword stopwords endid "
    "endoftext complete completed finished finishedstopped word",
    "length": "length maxtokens maxlength maxnewtokens maxoutputtokens maxcompletiontokens modellength tokenlimit "
    "limit errorlimit contextlength contextlengthexceeded modelcontextwindowexceeded incomplete truncated notfinished "
    "unfinished finishedlengthcapped",
    "repetition": "repetition",
    "abort": "abort aborted cancel canceled cancelled usercancel timeout timedout timelimit contentfilter "
    "contentfiltered guardrailintervened refusal safety imagesafety recitation blocklist prohibitedcontent spii "
    "language toolcalls toolcall tooluse functioncall pauseturn insufficientsystemresource errortoxic load unload "
    "finishedaborted finishedignored",
    "error": "error failed failure malformedfunctioncall finishederror",
}
KNOWN = {word: reason for reason, words in _MEANINGS.items() for word in words.split()}
# What a row that has nothing to say writes.
_NOTHING = {"", "none", "null", "nan", "unspecified"}
# From the worst: of several statements the first of these counts.
_ORDER = ("error", "abort", "length", "repetition", "stop")

REASONS = ("finish_reason", "finish_reasons", "stop_reason", "stop_reasons", "done_reason", "stop_type", "finishReason",
           "stopReason", "finish_details")  # fmt: skip
CUT = ("is_truncated", "truncated", "stopped_limit")  # flags of a cut completion
WHOLE = (
    "is_reasoning_complete",
    "is_finished",
    "finished",
    "is_complete",
    "is_completed",
    "done",
)  # and of one that is not
INSIDE = (
    "meta_info",
    "response_metadata",
    "generation_info",
    "incomplete_details",
    "details",
    "metadata",
)  # objects that hold reasons
FIELDS = (*REASONS, *CUT, *WHOLE, *INSIDE)
# vLLM: the token id or the text that a completion stopped at; it stands beside a finish reason.
_MATCHED = ("stop_reason", "stop_reasons")


class End(NamedTuple):
    """How a completion ended; ``unknown`` is the file's own word where calset does not know it."""

    reason: str
    unknown: str | None = None


def end_of(objects: Sequence[Mapping[str, Any]], place: int = 0) -> End | None:
    """Return how a completion ended; None where nothing is said.

    Args:
        objects: what may say it: the row, a message, the objects that a path to the completion goes through.
        place: of the completion among its row's; a list in a field has an item for each.
    """
    known: set[str] = set()
    unknown: list[tuple[str, str]] = []
    for field, value in _statements(objects, place):
        for reason, said in _read(field, value):
            if reason is None:
                unknown.append((field, said))
            else:
                known.add(reason)
    worst = next((reason for reason in _ORDER if reason in known), None)
    if worst not in (None, "stop"):
        return End(worst)
    strange = [said for field, said in unknown if worst is None or field not in _MATCHED]
    if strange:
        return End("abort", strange[0])
    return None if worst is None else End(worst)


def _statements(objects: Sequence[Mapping[str, Any]], place: int) -> Iterator[tuple[str, Any]]:
    for found in objects:
        for field in (*REASONS, *CUT, *WHOLE):
            if found.get(field) is not None:
                yield field, _own(found[field], place)
        if found.get("status") == "incomplete":  # OpenAI's Responses; in other files a status is anything
            yield "finish_reason", "incomplete"
        for name in INSIDE:
            inside = structure(_own(found.get(name), place))
            if isinstance(inside, Mapping):
                yield from _statements([inside], place)
                if name == "incomplete_details":
                    yield "finish_reason", inside.get("reason")


def _own(value: Any, place: int) -> Any:
    """The item of one completion where a field has one for each."""
    value = structure(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(value, (list, tuple)):
        return value[place] if place < len(value) else None
    return value


def _read(field: str, value: Any) -> Iterator[tuple[str | None, str]]:
    """What one statement means: reasons of the catalog, or None and the word that is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if field in CUT or field in WHOLE:
        said = _flag(value)
        if said is None and field.startswith("is_") and _word(str(value)) not in _NOTHING:
            yield None, f"{field} {value}"[:80]
        elif said is not None and said == (field in CUT):
            yield "length", ""
        return
    if field in _MATCHED and isinstance(value, (int, float)) and not isinstance(value, bool):
        return  # vLLM: the id of the token that it stopped at
    text = _named(value)
    word = _word(text)
    if word not in _NOTHING:
        yield KNOWN.get(word), " ".join(text.split())[:80]


def _flag(value: Any) -> bool | None:
    if isinstance(value, (bool, int, float)):
        return bool(value)
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
        str(value).strip().lower()
    )


def _named(value: Any) -> str:
    """The reason in an object (SGLang: ``{"type": "length", "length": 4096}``), in JSON or as Python prints it."""
    if isinstance(value, str) and (found := re.match(r"\s*\{\s*['\"](?:type|reason)['\"]\s*:\s*['\"]([^'\"]*)", value)):
        return found[1]
    value = structure(value)
    if isinstance(value, Mapping):
        inside = [value[name] for name in ("type", "reason", "finish_reason", "name", "value") if value.get(name)]
        return _named(inside[0]) if inside else next(iter(map(str, value)), "")
    return str(value)


def _word(text: str) -> str:
    """A reason without case, spaces, signs and the name of its enumeration: ``<FinishReason.MAX_TOKENS: 2>``."""
    text = text.strip().strip("'\"")
    if enumerated := re.fullmatch(r"<?[A-Za-z_]\w*\.([A-Za-z_][\w\s-]*)(?::[^>]*)?>?", text):
        text = enumerated[1]
    word = re.sub(r"[\s_\-]+", "", text.casefold())
    return re.sub(r"^(?:finish|stop)reason(?=.)", "", word)
