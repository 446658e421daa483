"""Show the keywords of a TypedDict in ``help()``, where Python shows ``**options: Unpack[Options]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _Optional:
    def __repr__(self) -> str:
        return "..."


def shows(options: Any) -> Callable[[F], F]:
    """Decorate a function of ``**keywords: Unpack[options]`` so that its signature lists them.

    Args:
        options: the TypedDict, all of whose keys may be left out; ``...`` stands for their defaults.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        listed = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_Optional(), annotation=_text(kind))
            for name, kind in options.__annotations__.items()
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *listed])
        return function

    return decorate


def _text(kind: Any) -> str:
    return getattr(kind, "__forward_arg__", str(kind))
