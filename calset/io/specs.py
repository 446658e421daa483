"""One-line names of data, ``PLACE@REVISION?option=value&option=value``: how they are taken apart.

Why apart: problems and text corpora are named alike, on the command line and in what the catalog records. Must not
know: what any place or option means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl

from calset.errors import InputError


class Spec(NamedTuple):
    """``openai/gsm8k`` and ``main`` of ``openai/gsm8k@main?split=test``, with its options."""

    place: str
    revision: str | None
    options: dict[str, str]


def parse(text: str, known: Sequence[str]) -> Spec:
    """Take a spec apart; a '?' or '@' within a place cannot be written.

    Raises:
        InputError: an option that is not known or has no value, or text after '?' that is no options.
    """
    name, options = parse_options(text, known)
    place, _, revision = name.partition("@")
    return Spec(place, revision or None, options)


def parse_options(text: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What stands before the '?' of a spec, '@' and all, and the options after it.

    Raises:
        InputError: as ``parse``.
    """
    name, _, query = text.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and len(pairs) != query.count("&") + 1:
        raise InputError(f"cannot read the options of {text!r}; write {name}?option=value&option=value")
    for option, value in pairs:
        if option not in known:
            raise InputError(f"{name} takes no option {option!r}; it takes {', '.join(known)}")
        if not value:
            raise InputError(f"the option {option!r} of {name} has no value; write {option}=VALUE, or leave it out")
    given = dict(pairs)
    return name, {option: given[option] for option in known if option in given}  # in one order however typed
