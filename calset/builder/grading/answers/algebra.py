r"""Formulas as sympy expressions, read whole or not at all, and whether two of them are equal, exactly.

Why it exists: math-verify's parser (latex2sympy) reads a formula to its end or fails, but what math-verify tries then
is a number somewhere inside it; and its comparison rounds to six decimals, so that 2^-98 equals 2^-99. Here a decimal
is the rational that it writes, constants are compared to fifty digits and more, and formulas with variables at points
where a coincidence is out of the question (Schwartz, JACM 1980). Must not know: text, units, lists, verdicts.
"""

from __future__ import annotations

import re
from typing import Any

# Every command that latex2sympy gives a meaning; with another one a formula is text.
_KNOWN = frozenset(
    (  # noqa: SIM905
        "frac sqrt cdot times div pm mp binom sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh "
        "cosh tanh arsinh arcosh artanh arcsinh arccosh arctanh log ln exp lim to sum prod int infty max min gcd lcm "
        "det lfloor rfloor lceil rceil vec hat bar overline tilde overrightarrow dot ddot mathop sgn Re Im begin end "
        "circ prime bmod pmod ell hbar nabla alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota "
        "kappa lambda mu nu xi pi varpi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta "
        "Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
    ).split()
)
_ENVIRONMENTS = {"matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "array", "smallmatrix"}
_SPREAD = (("37/29", "41/23", "53/31"), ("-43/37", "59/41", "-31/19"), ("61/47", "-29/17", "67/43"))
_SPREAD += (("-71/53", "-47/61", "-83/59"),)
MAX_EXACT_BITS = 100_000  # of a power that is worked out; a larger one is compared by its leading digits
DIGITS = 50


class Unread(Exception):
    """A formula of which a part has no meaning here; the message says which."""


def read(text: str) -> Any:
    """The sympy expression (or matrix) of a normal text; nothing in it is evaluated.

    Raises:
        Unread: the text holds anything that is not read.
    """
    for command in re.findall(r"\\([A-Za-z]+)", text):
        if command not in _KNOWN:
            raise Unread(f"no meaning is given to \\{command}")
    for environment in re.findall(r"\\begin\s*\{([^{}]*)\}", text):
        if environment not in _ENVIRONMENTS:
            raise Unread(f"no meaning is given to {environment}")
    if re.search(
        r"[^\x20-\x7e]|[=<>?@#~`\"\[\]]", re.sub(r"\\(?:sqrt\s*\[[^\]]*\]|(?:sum|prod)\s*_\s*\{[^{}]*\})", "", text)
    ):
        raise Unread("it holds a sign that has no meaning here")
    return _found(_latex2sympy(_prepared(text)))


def equal(left: Any, right: Any) -> bool:
    """Return True if two expressions, or matrices of one shape, are equal for all values of their symbols."""
    import sympy

    if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
        both = isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase)
        return both and left.shape == right.shape and all(map(equal, left.flat(), right.flat()))
    if left == right:
        return True
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        return _same_constant(left, right)
    valid = 0
    for row, spread in enumerate(_SPREAD):
        point = {s: sympy.Rational(spread[(i + row) % len(spread)]) + i for i, s in enumerate(symbols)}
        same = _same_at(left, right, point)
        if same is False:
            return False
        valid += same is True
    return valid >= 2


def constant_ratio(left: Any, right: Any) -> Any:
    """The number that ``left`` is a multiple of ``right`` by; None where there is none, or it cannot be seen."""
    import sympy

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    ratio = None
    for row, spread in enumerate(_SPREAD[: 3 if symbols else 1]):
        point = {s: sympy.Rational(spread[(i + row) % len(spread)]) + i for i, s in enumerate(symbols)}
        one, two = _value(left, point), _value(right, point)
        if one is None or two is None or _small(one) or _small(two):
            return None
        found = one / two
        if ratio is not None and not _close(found, ratio):
            return None
        ratio = found
    return ratio


def rational(expression: Any) -> Any:
    """The exact ``Rational`` of a constant that is one; None for all else."""
    import sympy

    if expression.is_Rational:
        return expression
    if expression.free_symbols or not isinstance(expression, sympy.Expr) or _bits(expression) > MAX_EXACT_BITS:
        return None
    try:
        found = expression.doit()
    except Exception:
        return None
    return found if getattr(found, "is_Rational", False) else None


def sign(expression: Any) -> int | None:
    """-1, 0 or 1 for a real constant; None for all else."""
    import sympy

    if expression in (sympy.oo, -sympy.oo):
        return 1 if expression == sympy.oo else -1
    value = None if expression.free_symbols else _value(expression, {})
    if value is None or not value.is_real:
        return None
    return 0 if _small(value) else (1 if value > 0 else -1)


def _prepared(text: str) -> str:
    """What latex2sympy reads otherwise than it is meant, spelt so that it does not."""
    # A prime is a part of the name; latex2sympy's normalisation drops it.
    text = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{prime{len(m[2])}}}", text)
    text = re.sub(r"\\text\s*\{\s*([A-Za-z])\s*\}", r"\1", text)
    if r"\text" in text:
        raise Unread("it holds words")
    # A transpose, which latex2sympy drops from a name: an exponent of its own.
    text = re.sub(r"\^\s*(?:\{\s*(?:T|\\top|\\intercal)\s*\}|T(?![A-Za-z])|\\top(?![A-Za-z]))", r"^{\\Xi}", text)
    # Degrees inside a function are an angle.
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\\frac{\1}{180}\\pi)", text)
    if "circ" in text or "prime}" in text:
        raise Unread("it holds a mark that has no meaning here")
    if re.search(r"(?<![A-Za-z\\{])(?:[A-Za-z]{5}|[A-Za-z]{3,}\s+(?:\d|[A-Za-z]{2})|[A-Za-z]{2,}\s+[A-Za-z]{3})", text):
        raise Unread("it holds words")
    text = re.sub(r"\|([^|]*)\|", r"\\lvert \1\\rvert ", text)
    # "3\binom52", "(2)(3)": latex2sympy adds two numbers that stand side by side, as in 2 1/2.
    following = r"\s*(?=\(|\\(?:frac|binom|lvert|lfloor|lceil|max|min|gcd))"
    text = re.sub(rf"(?<![\d.^_])(\d+(?:\.\d+)?){following}", r"\1\\cdot ", text)
    text = re.sub(rf"\)(?:{following}|\s*(?=\d))", r")\\cdot ", text)
    text = re.sub(
        r"(\\(?:frac|binom)\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\\(?:frac|binom|lvert)|\d|\()", r"\1\\cdot ", text
    )
    text = re.sub(r"\\gamma(?![A-Za-z])", r"\\varsigma ", text)  # a name, no function
    # Its constant e takes no index, and a capital E is a name.
    text = re.sub(r"(?<![A-Za-z\\])e(?=_)", r"\\varpi ", re.sub(r"(?<![A-Za-z\\])E(?![A-Za-z])", r"\\Upsilon ", text))
    if re.search(r"\^\s*\{?\s*[+*]", text):
        raise Unread("it holds an exponent that has no meaning here")
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)


def _latex2sympy(text: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    text = normalize_latex(text, NormalizationConfig(malformed_operators=True, boxed="none"))
    letters = set(
        re.findall(r"(?<![A-Za-z\\])[A-Za-z]|(?<=[A-Za-z])(?<!\\)[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text))
    )
    both_cases = any(letter.swapcase() in letters for letter in letters)
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=not both_cases),
        )
    except Exception as error:
        raise Unread(str(error).partition("\n")[0][:100] or type(error).__name__) from None


def _found(expression: Any) -> Any:
    """The expression with exact decimals and the known constants; refused where it is no single value."""
    import sympy

    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(_found)
    if not isinstance(expression, sympy.Expr):
        raise Unread("it is not one value")
    if expression.has(sympy.Derivative):
        raise Unread("it holds a derivative")
    if expression.has(sympy.nan, sympy.zoo):
        raise Unread("it has no value")
    known = {"i": sympy.I, "e": sympy.E}
    bound = set().union(*(loop.variables for loop in expression.atoms(sympy.Sum, sympy.Product, sympy.Integral)))
    changed = {float_: sympy.Rational(str(float_)) for float_ in expression.atoms(sympy.Float)}
    # Two assumptions make two symbols of one name.
    changed |= {s: known.get(str(s)) or sympy.Symbol(str(s)) for s in expression.free_symbols - bound}
    return expression.xreplace(changed) if changed else expression


def _same_constant(left: Any, right: Any) -> bool:
    one, two = rational(left), rational(right)
    if one is not None and two is not None:
        return bool(one == two)
    same = _same_at(left, right, {})
    if same is None:
        return bool(left.doit() == right.doit())
    # A decimal of fewer digits than were compared is not irrational by chance; one of more may be a rounding.
    exact = one if two is None else two if one is None else None
    return same and (exact is None or max(abs(exact.p), exact.q).bit_length() < 3 * (DIGITS - 15))


def _same_at(left: Any, right: Any, point: dict[Any, Any]) -> bool | None:
    """Whether both have one value there; None where one of them has none."""
    one, two = _value(left, point), _value(right, point)
    return None if one is None or two is None else _close(one, two)


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point as a number of fifty digits; None where it has none."""
    import sympy

    if point and expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
        return None  # a sum at each point takes seconds
    try:
        found = expression.evalf(DIGITS, subs=point) if point else expression.evalf(DIGITS)
        if not found.is_number or found.has(sympy.nan, sympy.zoo, sympy.oo) or found.atoms(sympy.Function):
            return None
        real, imaginary = found.as_real_imag()
        return found if real.is_Number and imaginary.is_Number else None
    except Exception:
        return None


def _close(one: Any, two: Any) -> bool:
    """Equal in the leading forty digits, or both nothing but rounding."""
    size = max(abs(one), abs(two))
    return bool(_small(size) or abs(one - two) <= size * 10 ** -(DIGITS - 15))


def _small(value: Any) -> bool:
    return bool(abs(value) < 10 ** -(3 * DIGITS))


def _bits(expression: Any) -> float:
    """A bound on the digits that working a constant out would take, in bits."""
    import sympy

    total = 0.0
    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow):
            exponent: Any = part.exp
            if not exponent.is_Rational:
                return float("inf") if exponent.atoms(sympy.Pow, sympy.factorial) else total
            base = max((max(abs(n.p), n.q).bit_length() for n in part.base.atoms(sympy.Rational)), default=1)
            total += base * abs(float(exponent))
        elif isinstance(part, sympy.factorial):
            argument: Any = part.args[0]
            total += 64 * abs(float(argument)) if argument.is_Rational else float("inf")
        elif isinstance(part, sympy.Rational):
            total += max(abs(part.p), part.q).bit_length()
    return total
