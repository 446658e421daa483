"""Jinja templates that escape by default: every value becomes harmless text of the page's kind, or is Markup already.

Why one place: what is filled in was written by models and strangers, and this is the wall. Must not know: what a page
says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


def open_template(path: Path, shown: Callable[[Any], Any], **filters: Callable[[Any], str]) -> Template:
    """Open a template file.

    Args:
        shown: makes a value harmless; what it returns is escaped as HTML unless it is ``Markup``.
        filters: by name; what they return is not escaped again.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: lambda value, make=make: Markup(make(value)) for name, make in filters.items()}
    return environment.get_template(path.name)
