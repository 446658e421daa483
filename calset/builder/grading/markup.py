r"""Mark-up that a response puts around an answer, and the answer without it.

Why it exists: a task's scorer compares texts, and a model writes ``\boxed{\text{True}}``, ``**True**`` or ``$12$``.
Must not know: tasks, verdicts, what an answer means.
"""

from __future__ import annotations

import re

MAX_NESTED = 12  # wrappers within one another

_COMMANDS = (
    r"text(?:bf|it|rm|sf|tt|normal|md|up)?|math(?:rm|bf|it|sf|tt|cal)|operatorname\*?|mbox|hbox|emph|boxed|fbox"
    r"|boldsymbol|bm|underline|ensuremath"
)
_WRAPPED = re.compile(rf"\\(?:{_COMMANDS})\s*\{{((?:[^{{}}\\]|\\.)*)\}}", re.S)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|([0-9])\s*([0-9]))")
MATRIX = re.compile(
    r"\\begin\{((?:small)?[pbBvV]?matrix|array|aligned|gathered|tabular)\}(?:\{[^{}]*\})?(.{0,5000}?)\\end\{\1\}", re.S
)
_ANSWER = r"(?:so|therefore|thus|hence)?,?\s*(?:the\s+|my\s+)?(?:final\s+|correct\s+)?answer"
LEAD = re.compile(
    rf"(?i)^(?:\*\*{_ANSWER}(?:\s+is)?\s*:?\s*\*\*\s*(?:is\b|:|=|\uff1a)?|{_ANSWER}\s*(?:is\b|:|=|\uff1a))\s*:?\s*"
)
# Around a word or a phrase; a power like x**2 or 2 ** 3 has a letter before the stars or a space behind them.
_BOLD = re.compile(r"(?<![\w)*])(\*\*|__)(?=\S)((?:(?!\1).)+?)(?<=\S)\1(?![\w(*])", re.S)
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)\n?```$", re.S)
_OPENED = re.compile(rf"^\\(?:{_COMMANDS})\s*\{{")
_ENCLOSED = (
    re.compile(r"^\*\*(?!\*)(.+?)\*\*$", re.S),  # no formula begins with a power
    re.compile(r"^\$\$(.*)\$\$$", re.S),
    re.compile(r"^\$(?!\$)([^$]*)\$$", re.S),
    re.compile(r"^\\\((.*)\\\)$", re.S),
    re.compile(r"^\\\[(.*)\\\]$", re.S),
    re.compile(r"^`+([^`]*)`+$", re.S),
    re.compile(r"^\*([^*]+)\*$", re.S),
    re.compile(r"^_(?=[^\s_])([^_]*[^\s_])_$", re.S),
    re.compile(r"""^["'“]([\[{].*[\]}])["'”]$""", re.S),  # of a list with quotes of its own
    re.compile(r"^<(?:b|strong|code|answer)>(.*)</(?:b|strong|code|answer)>$", re.S | re.I),
)
_QUOTED = tuple(
    re.compile(rf"^{a}([^{a}{b}]*){b}$", re.S) for a, b in (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"))
)
_SIGNS = {
    **dict.fromkeys(("times",), "×"), **dict.fromkeys(("cdot",), "·"), "div": "÷", "degree": "°",
    **dict.fromkeys(("to", "rightarrow", "Rightarrow", "implies", "longrightarrow", "Longrightarrow"), "→"),
    **dict.fromkeys(("leftrightarrow", "Leftrightarrow", "iff", "longleftrightarrow"), "↔"),
    **dict.fromkeys(("land", "wedge"), "∧"), **dict.fromkeys(("lor", "vee"), "∨"),
    **dict.fromkeys(("neg", "lnot"), "¬"), **dict.fromkeys(("left", "right", "displaystyle"), ""),
    **dict.fromkeys(("varnothing", "emptyset"), "∅"), **dict.fromkeys(("quad", "qquad", "newline"), " "),
}  # fmt: skip
_SIGN = re.compile(rf"\\({'|'.join(sorted(_SIGNS, key=len, reverse=True))})(?![A-Za-z])")


def bare(text: str, *, like: str = "") -> str:
    r"""Remove the mark-up around an answer: ``\text{True}``, ``**True**``, ``$12$``, "Answer: 12" and so on.

    Args:
        like: the reference answer. What it has itself stays: a dollar sign, a backslash, quotes, a final full stop,
            several lines.
    """
    before = None
    text = text.strip()
    for _ in range(MAX_NESTED):
        if text == before:
            break
        before, text = text, _layer(text, like)
    return text


def _layer(text: str, like: str) -> str:
    """One pass over all kinds of mark-up, from the outermost to the innermost."""
    if (fenced := _FENCED.match(text)) and "`" not in like:
        text = fenced[1]
    if not like.startswith("#"):
        text = re.sub(r"^#{2,6}\s+", "", text)
    if not LEAD.match(like):
        text = LEAD.sub("", text).strip()
    text = _unwrapped(text) if not _OPENED.match(like) else text
    if "**" not in like and "__" not in like:
        text = _BOLD.sub(r"\2", text)
    for pattern in _ENCLOSED:
        if (found := pattern.match(text)) and not pattern.match(like):
            text = found[1].strip()
    if not like.startswith("**"):  # its end was taken for a sentence's
        text = re.sub(r"^\*\*(?=[^*\s])(?!.*\*\*$)", "", text, flags=re.S)
    if "`" not in like:
        text = re.sub(r"`([^`\n]+)`", r"\1", text)
    if "\\" not in like:
        text = MATRIX.sub(lambda found: "\n" + _rows(found[2]) + "\n", text).strip()
        if "\n" in like.strip():
            text = re.sub(r"[ \t]*(?:\\\\|<br */?>)[ \t]*\n?", "\n", text)
        text = _without_tex(text)
    if "$" not in like:  # a price has one sign, or a space before the next
        text = re.sub(r"\$\$?(?=\S)([^$]+?)(?<=\S)\$\$?(?![0-9])", r"\1", text)
    for pattern in _QUOTED:
        if (found := pattern.match(text)) and not pattern.match(like):
            text = found[1].strip()
    if not like.rstrip().endswith("."):
        text = re.sub(r"(?<=[^.])\.$", "", text)
    return text.strip()


def _unwrapped(text: str) -> str:
    r"""The content of the one command that the whole text is, with braces in it: ``\text{{"a": 1}}``."""
    opened = _OPENED.match(text)
    if opened is None or not text.endswith("}"):
        return text
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[opened.end() : -1], re.S):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:  # the brace was closed before the end
            return text
    return text[opened.end() : -1].strip()


def _without_tex(text: str) -> str:
    """A text with LaTeX's commands for letters and signs replaced by what they print."""
    text = re.sub(r"``([^`']*)''|\{\\(?:bf|it|rm|tt|em)\s([^{}]*)\}", r"\1\2", _WRAPPED.sub(r"\1", text))
    text = _FRACTION.sub(lambda found: _quotient(found[1] or found[3] or "", found[2] or found[4] or ""), text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "°", text)
    text = _SIGN.sub(lambda found: _SIGNS[found[1]], text)
    text = re.sub(r"(?<=\d)(?:\\[,!;:]|\{,\})(?=\d{3})", ",", text)
    text = re.sub(r"(?<!\\)\\[,;:> ]|(?<!\\)~", " ", text).replace(r"\!", "")
    return re.sub(r"\\([_#%&{}$])", r"\1", text)


def _rows(cells: str) -> str:
    rows = (" ".join(row.replace("&", " ").split()) for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\hline", cells))
    return "\n".join(row for row in rows if row)


def _quotient(above: str, below: str) -> str:
    parts = (part.strip() for part in (above, below))
    return "/".join(part if re.fullmatch(r"[\w.]+", part) else f"({part})" for part in parts)
