r"""TeX of answers in one spelling: the same formula, written by two hands, becomes the same tokens.

Why it exists: `\dfrac12`, `\frac{1}{2}` and `½` are one fraction, `^{\prime}` and `'` one prime, and a parser of TeX
drops what it does not know. Must not know: verdicts, sympy, what an answer means.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from calset.builder.grading.characters import plain_digits, plain_fractions, visible

_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ",
    "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "λ": r"\lambda ", "∠": r"\angle ", "△": r"\triangle ", "≡": r"\equiv ", "→": r"\to ",
    "°": r"^\circ ", "′": "'", "″": "''", "’": "'", "…": r"\dots ", "²": "^2", "³": "^3", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "⟨": r"\langle ", "⟩": r"\rangle ", "∖": r"\setminus ", "⁄": "/",
    "，": ",", "、": ",", "；": ";", "：": ":", "（": "(", "）": ")", "｛": "{", "｝": "}", "＝": "=",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
# Commands with another name, and those that only say how something looks.
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "varnothing": "emptyset",
    "rightarrow": "to", "ldots": "dots", "cdots": "dots", "dotsc": "dots", "dotsb": "dots", "mid": "|", "vert": "|",
    "lvert": "|", "rvert": "|", "colon": ":", "degree": "circ", "ast": "*", "lbrace": "{", "rbrace": "}",
    "lbrack": "[", "rbrack": "]", "land": "wedge", "lor": "vee", "backslash": "setminus", "smallsetminus": "setminus",
    "lg": "log_{10}", "exponentialE": "e", "imaginaryI": "i", "mod": "bmod",
}  # fmt: skip
_GONE = ("displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "left", "right", "mleft", "mright", "middle")
_GONE += tuple(size + side for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m"))
_SPACES = ("enspace", "thinspace", "medspace", "thickspace", "nobreakspace", "newline")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_TEXTUAL = (
    r"\\(?:text(?:normal|rm|bf|it|sf|tt|up)?|mathrm|mathbf|mathit|mathsf"
    r"|mathtt|mathnormal|mbox|hbox|bold(?:symbol)?|bm|rm|bf|operatorname\*?|emph|underline)"
)
_TEXT = re.compile(_TEXTUAL + r"\s*\{((?:[^{}]|\^\s*\{[^{}]*\})*)\}")
_COLOURED = re.compile(r"\\(?:textcolor|color|colorbox)\s*\{[^{}]*\}\s*")
_FRAC = re.compile(r"\\frac\s*(?:(\d)\s*(\d)|(\d)\s*(?=\{)|(?<=\\frac)\s+(?=\{)|([A-Za-z])\s*([A-Za-z\d]))")
_SQRT = re.compile(r"\\sqrt\s*(?:(\d)|([A-Za-z](?![A-Za-z])))")
_NAMES = {
    "tg": "tan", "ctg": "cot", "cotg": "cot", "arctg": "arctan", "arcctg": "arccot", "cosec": "csc", "sh": "sinh",
    "ch": "cosh", "th": "tanh", "arsh": "arsinh", "asin": "arcsin", "acos": "arccos", "atan": "arctan",
    "log": "log", "ln": "ln", "lg": "log_{10}", "exp": "exp", "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot",
    "sec": "sec", "csc": "csc", "arcsin": "arcsin", "arccos": "arccos", "arctan": "arctan", "arccot": "arccot",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "max": "max", "min": "min", "gcd": "gcd", "lcm": "lcm",
    "oo": "infty", "det": "det", "sqrt": "sqrt", "pi": "pi", "infinity": "infty", "infty": "infty", "theta": "theta",
}  # fmt: skip
# "5 sec" and "3 min" are units, "sec x" is a function.
_ALONE = ("pi", "infinity", "infty", "oo", "theta")
_PRIMES = re.compile(r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*\\prime(?![A-Za-z])")
_BARE_NAME = re.compile(
    r"(?<![A-Za-z\\])(?:("
    + "|".join(sorted(_NAMES, key=len, reverse=True))
    + r")(?=\s*[\d(^_{\\]|\s+[A-Za-z](?![A-Za-z]))|("
    + "|".join(_ALONE)
    + r")(?![A-Za-z]))"
)
_SET = re.compile(r"\\(?:mathbb|Bbb)\s*(?:\{\s*([NZQRC])\s*\}|([NZQRC])(?![A-Za-z]))")
_IN_SET = re.compile(r"(\\in\s*)(?:\\(?:mathbf|mathrm|text|bf|rm)\s*)?(?:\{\s*([NZQRC])\s*\}|([NZQRC])(?![A-Za-z]))")
_ARRAY = re.compile(
    r"(?P<open>\\?[\[({|]|\\lbrace)?\s*\\begin\s*\{(?P<name>array|matrix)\}\s*(?:\{[lcr|\s]*\}|\[[^\]]*\])?"
    r"(?P<body>(?:(?!\\begin).)*?)\\end\s*\{(?P=name)\}\s*(?P<close>\\?[\])}|.])?",
    re.S,
)
_THOUSANDS = re.compile(r"(?<=\d)\s*(?:\\,|\\!|\\ |\{,\}|[ \u00a0\u202f\u2009])\s*(?=\d{3}(?!\d))")
_EXPONENT = re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\d.A-Za-z])")
_DELIMITED = re.compile(r"(?s)^\\([(\[])(.*)\\[)\]]$")
# A formula of one line in an environment of several.
_ALIGNED = re.compile(
    r"(?s)^\s*\\begin\s*\{(?:aligned|align\*?|gathered|equation\*?|split)\}((?:(?!\\\\).)*)\\end\s*\{\w+\*?\}\s*$"
)
_CHOOSE = re.compile(r"(?:(?<![A-Za-z\\])|(?<=\d))([CAP])_\s*\{?\s*(\d{1,4})\s*\}?\s*\^\s*\{?\s*(\d{1,4})\s*\}?")
_CHOOSE_BEFORE = re.compile(r"(?:\{\s*\})?[_^]\s*\{?\s*(\d{1,4})\s*\}?\s*([CP])_\s*\{?\s*(\d{1,4})\s*\}?")
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s*\{\s*(\d+)\s*\}|\\(?:dot"
    r"|bar)\s*\{\s*(\d)\s*\}(?:(\d*)\\dot\s*\{\s*(\d)\s*\})?|\((\d+)\))"
)
# A proper fraction right behind a whole number; "2\frac12\pi" is 5/2 of pi.
_MIXED = re.compile(
    r"(?<![\d.^_A-Za-z)])(?P<sign>-?)\s*(?P<whole>\d{1,9})\s*(?:\\frac\s*\{\s*(\d{1,9})\s*\}\s*\{\s*(\d{1,9})\s*\}"
    r"|\s(?P<top>\d{1,9})\s*/\s*(?P<below>\d{1,9})(?!\d))"
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+|\s+|.", re.S)
_OPEN, _CLOSE = (
    ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"),
    (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"),
)


def normal(text: str) -> str:
    r"""Bring an answer to one spelling: no outer delimiters, one name a command, text groups as ``\text{}``."""
    text = re.sub(r"\\(q?quad)(?=[A-Za-z])", r"\\\1 ", re.sub(r"\s+", " ", text))
    text = re.sub(r"(?<=\d)\s*\u2013\s*(?=\d)", r"\\text{ to }", text)  # 3–5 is a range
    text = plain_fractions(unicodedata.normalize("NFC", plain_digits(visible(text))), r"\frac{%s}{%s}")
    text = _undelimited(_SYMBOL.sub(lambda found: _SYMBOLS[found[0]], text))
    for stage in (_grouped_digits, _escaped_once, _named_sets, _text_groups, _marks, _commands, _spaces, _formulas):
        text = stage(text)
    return _MIXED.sub(_mixed, re.sub(r"\s+", " ", text)).strip()


def _grouped_digits(text: str) -> str:
    """Commas in braces: thousands go, a decimal comma is a point."""
    text = re.sub(r"\{\s*([,:])\s*\}", lambda m: "{,}" if m[1] == "," else ":", text)
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?:\{,\}\d{3})++(?!\d|\{,\})", lambda m: m[0].replace("{,}", ""), text)
    text = re.sub(r"(?<![\d.])(\d+)\{,\}(\d+)(?![\d{])", _decimal_comma, text)
    return _THOUSANDS.sub("", re.sub(r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))", "", text))


def _escaped_once(text: str) -> str:
    """``\\\\frac`` is ``\\frac`` where no lines are told apart."""
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=(?:le|ge|ne|pi|in|cup|cap|pm|[a-zA-Z]{3,})(?![a-zA-Z]))", r"\\", text)
    return re.sub(r"\\\\\s*(?=\\end)", "", text)


def _named_sets(text: str) -> str:
    text = _IN_SET.sub(lambda found: rf"{found[1]}\mathbb{{{found[2] or found[3]}}}", text)
    return _SET.sub(lambda found: rf"\mathbb{{{found[1] or found[2]}}}", text)


def _text_groups(text: str) -> str:
    """Commands for text as ``\\text{}``; those around a letter or a number of a formula, and colours, go."""
    text = re.sub(r"\\(?:mathrm|mathbf|text|rm)\s*\{\s*([CAP])\s*\}(?=\s*_)", r"\1", _COLOURED.sub("", text))
    for _ in range(4):
        text = _TEXT.sub(_text_group, text)
    return text


def _marks(text: str) -> str:
    """Signs with a meaning of their own: a currency, micro, a third derivative, an angle, a half-open interval."""
    text = re.sub(r"\\\$|\\textdollar(?![A-Za-z])", "$", text)
    text = re.sub(r"\\(?:blacksquare|square|qed|Box)(?![A-Za-z])\s*$", "", text)
    text = re.sub(r"\\mu\s*\\text\s*\{\s*(?=[A-Za-z])", r"\\text{µ", text)
    text = re.sub(r"([A-Za-z])\^\s*\{\s*\((\d)\)\s*\}", lambda m: m[1] + "'" * int(m[2]), text)
    text = re.sub(r"\\angle\s*([A-Z])([A-Z])([A-Z])(?![A-Za-z])", _angle, text)
    return re.sub(r"(?<![\w)}\]])([\[\]])([^\[\](){}]+,[^\[\](){}]+)([\[\]])(?![\w(])", _interval, text)


def _commands(text: str) -> str:
    return _COMMAND.sub(_command, text)


def _spaces(text: str) -> str:
    """A wide space between two parts is a comma, any other a space; an answer of words is those words."""
    text = re.sub(r"(?<=[\w})])\s*\\q?quad\s*(?=[\w\-]|\\(?:frac|sqrt|pi)(?![A-Za-z]))", ", ", text)
    text = re.sub(r"(?<!\\)\\[,;:!> \n]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = re.sub(r"^(?:\\text\s*\{\s*)?(?:negative|minus)\s*\}?\s*(?=[\d\\$])", "-", text)
    words = re.fullmatch(r"\\text\s*\{([^{}]*,[^{}]*)\}", text)
    text = words[1] if words else text
    return re.sub(r"(?<=\d)\s*(?:\\text\s*\{\s*([kM])\s*\})?\s*\\Omega\s*$", r" \\text{\1ohm}", text)


def _formulas(text: str) -> str:
    """One spelling of primes, degrees, functions, roots, fractions, arrays, binomials and repeating decimals."""
    text = re.sub(r"\.\.\.+", r"\\dots ", text)
    text = _PRIMES.sub(lambda m: "'" * max(1, (m[1] or "").count("prime")), text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", r"^\\circ ", text)
    text = re.sub(r"(?<![A-Za-z])(?:np|math|sympy|sp)\.(?=[a-z])", "", text.replace("**", "^"))
    text = _BARE_NAME.sub(lambda found: "\\" + _NAMES[found[1] or found[2]] + " ", text)
    text = re.sub(r"√\s?(\d+|[a-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _ARRAY.sub(_array, _EXPONENT.sub(r"\1\\times 10^{\2}", text))
    for _ in range(3):
        text = _FRAC.sub(_frac, text)
    text = _SQRT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    text = _CHOOSE_BEFORE.sub(_chosen_before, _CHOOSE.sub(_chosen, text))
    text = re.sub(r"(?<![\d.])(\d*)\.(\d*?)(\d)\3\3+\s*\\dots(?![A-Za-z])", r"\1.\2\\overline{\3}", text)
    return re.sub(r"(?<=\d)\.(?![\d.])", "", _REPEATING.sub(_repeating, text))


def tokens(text: str) -> list[str]:
    """The tokens of a normal text: commands, runs of digits, single characters; spaces only between two numbers; no
    braces around one token; text groups as their letters."""
    text = re.sub(r",(?=\s*&)", "", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    found: list[str] = []
    space = False
    for token in _TOKEN.findall(text):
        if token.isspace():
            space = True
            continue
        if space and found and found[-1][-1].isdigit() and token[0].isdigit():
            found.append(" ")
        space = False
        found.append(token)
        if token == "}" and len(found) >= 3 and found[-3] == "{":
            found[-3:] = [found[-2]]
    return found


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """A text cut at a pattern wherever that stands outside of all brackets; a half-open interval is a bracket too."""
    pieces, start = [], 0
    inside = list(_depths(text))
    for found in separator.finditer(text):
        if found.end() > found.start() and inside[found.start()] == 0:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def bracketed(text: str) -> tuple[str, str, str] | None:
    r"""Opening bracket, content and closing bracket of a text that one pair of brackets encloses; None otherwise."""
    opened = next((mark for mark in (r"\{", r"\langle", "(", "[", "{") if text.startswith(mark)), None)
    closed = next((mark for mark in (r"\}", r"\rangle", ")", "]", "}") if text.endswith(mark)), None)
    if opened is None or closed is None or len(text) < len(opened) + len(closed):
        return None
    last = len(text) - len(closed)
    depth = position = 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN or token == r"\begin") - (token in _CLOSE or token == r"\end")
        position += len(token)
        if depth <= 0 and position < len(text):
            return None  # "(1)(2)"
    if closed == "}" and text.endswith(r"\}"):
        return None
    return opened, text[len(opened) : last].strip(), closed


def _depths(text: str) -> Iterator[int]:
    """How many brackets each character stands in; a bracket itself stands inside."""
    depth = 0
    for token in _TOKEN.findall(text):
        if token in _OPEN or token == r"\begin":
            depth += 1
        yield from [depth] * len(token)
        if token in _CLOSE or token == r"\end":
            depth = max(0, depth - 1)


def _undelimited(text: str) -> str:
    """Without Markdown, quotes, mathematical delimiters and a final mark around the whole."""
    before = None
    for _ in range(20):
        if text == before:
            break
        before = text
        text = re.sub(r"(?<![\\.])(?:[,;。\s]|\.(?!\.))+$", "", text.strip(" \t\r\n*`")).strip()
        if found := _DELIMITED.match(text):
            text = found[2]
        if len(text) > 1 and text[0] == text[-1] and text[0] in '"“”' and text.count(text[0]) == 2:
            text = text[1:-1]
        if found := _ALIGNED.match(text):
            text = found[1].replace("&", " ")
        if (found := bracketed(text)) and (found[0], found[2]) == ("{", "}"):
            text = found[1]
    text = re.sub(r"\\[()\[\]]", " ", text) if re.search(r"\\[(\[].*\\[)\]]", text, re.S) else text
    dollars = len(re.findall(r"(?<!\\)\$", text))
    # An odd one is a currency.
    return re.sub(r"(?<!\\)\$", "" if dollars else "$", text) if dollars % 2 == 0 else text


def _text_group(found: re.Match[str]) -> str:
    inner = re.sub(r"\^\s*\{([^{}]*)\}", r"^\1", found[1]).strip()
    name = found[0].partition("{")[0]
    if re.fullmatch(r"[eid]|\d*", inner) and "text" not in name:
        return inner
    if "operatorname" in name or "math" in name:
        if inner in _NAMES and not (inner in ("sec", "min") and not found.string[found.end() :].strip(" .}$")):
            return "\\" + _NAMES[inner] + " "
        if "operatorname" in name:
            return rf"\operatorname{{{inner}}}"
    if re.fullmatch(r"[\d\s.,+\-]*", found[1]) or ("rm" not in name and "text" not in name and len(inner) == 1):
        return found[1]
    return rf"\text{{{re.sub(r'[{}]', '', found[1])}}}"


def _command(found: re.Match[str]) -> str:
    name = found[1]
    if name in _GONE:
        return ""
    if name in _SPACES:
        return " "
    same = _SAME.get(name)
    if same is None:
        return "\\" + name
    if same in "{}":
        return "\\" + same
    return same if not same[0].isalpha() else "\\" + same


def _array(found: re.Match[str]) -> str:
    """An array in brackets is a matrix; behind one open brace it is a system."""
    body = re.sub(r"\\hline|\\\\\s*$", "", found["body"])
    kinds = {"[]": "bmatrix", "()": "pmatrix", "||": "vmatrix"}
    opened, closed = found["open"] or "", found["close"] or ""
    if opened in ("\\{", "\\lbrace") and closed in (".", ""):
        return rf"\begin{{cases}}{body}\end{{cases}}"
    kind = kinds.get(opened + closed)
    if kind:
        return rf"\begin{{{kind}}}{body}\end{{{kind}}}"
    return rf"{opened}\begin{{matrix}}{body}\end{{matrix}}{closed}"


def _angle(found: re.Match[str]) -> str:
    return rf"\angle {min(found[1], found[3])}{found[2]}{max(found[1], found[3])}"


def _interval(found: re.Match[str]) -> str:
    """``]0,1[`` is (0,1)."""
    return ("[" if found[1] == "[" else "(") + found[2] + ("]" if found[3] == "]" else ")")


def _decimal_comma(found: re.Match[str]) -> str:
    thousands = len(found[2]) == 3 and found[1].lstrip("0")
    return found[1] + ("" if thousands else ".") + found[2]


def _frac(found: re.Match[str]) -> str:
    if found[1]:
        return rf"\frac{{{found[1]}}}{{{found[2]}}}"
    if found[3]:
        return rf"\frac{{{found[3]}}}"
    return rf"\frac{{{found[4]}}}{{{found[5]}}}" if found[4] else r"\frac"


def _chosen(found: re.Match[str]) -> str:
    return _choice(found[1], int(found[2]), int(found[3])) or found[0]


def _chosen_before(found: re.Match[str]) -> str:
    return _choice(found[2], int(found[1]), int(found[3])) or found[0]


def _choice(letter: str, n: int, k: int) -> str:
    """``C_{10}^3``, the binomial coefficient, and ``A_5^2``, its ordered kin; empty where the numbers say otherwise."""
    if n < k:
        return ""
    return rf"\binom{{{n}}}{{{k}}}" if letter == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed = found[1] or "0", found[2]
    period = found[3] or (found[4] or "") + (found[5] or "") + (found[6] or "") or found[7]
    if len(whole + fixed + period) > 60:
        return found[0]
    below = 10 ** len(fixed) * (10 ** len(period) - 1)
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{below}}}"


def _mixed(found: re.Match[str]) -> str:
    above, below = int(found[3] or found["top"]), int(found[4] or found["below"])
    if not 0 < above < below:
        return found[0]
    return rf"{found['sign']}\frac{{{int(found['whole']) * below + above}}}{{{below}}}"
