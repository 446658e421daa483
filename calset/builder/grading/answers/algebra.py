r"""Formulas as sympy expressions, read whole or not at all, and whether two of them are equal, exactly.

Why it exists: math-verify's parser (latex2sympy) reads a formula to its end or fails, but what math-verify tries then
is a number somewhere inside it; and its comparison rounds to six decimals, so that 2^-98 equals 2^-99. Here a decimal
is the rational that it writes, constants are compared to a hundred digits, and formulas with variables at points
where a coincidence is out of the question (Schwartz, JACM 1980). Must not know: text, units, lists, verdicts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Every command that latex2sympy gives a meaning; with another one a formula is text.
_KNOWN = frozenset(
    (  # noqa: SIM905
        "frac sqrt cdot times div pm mp binom sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh "
        "cosh tanh arsinh arcosh artanh arcsinh arccosh arctanh log ln exp lim to sum prod int infty max min gcd lcm "
        "det lfloor rfloor lceil rceil vec hat bar overline tilde overrightarrow dot ddot Re Im begin end "
        "circ prime bmod pmod ell hbar nabla alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota "
        "kappa lambda mu nu xi pi varpi rho varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta "
        "Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
    ).split()
)
_ENVIRONMENTS = {"matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "array", "smallmatrix"}
MAX_EXACT_BITS = 2_000_000  # of a power that is worked out; a larger one is a name of its own
MAX_NESTING = 16  # of brackets: latex2sympy takes a second for 20
DIGITS = 100
# Sizes of the points at which formulas are compared: a fraction, a whole number, and far out, where |x - 5| is x - 5.
_SIZES = (2, 2, 0, 40, 900, 9_000, 0)
_PIECEWISE = ("Abs", "floor", "ceiling", "Max", "Min", "Mod", "sign", "Piecewise")


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
    if _nesting(text) > MAX_NESTING:
        raise Unread("its brackets nest too deep")
    for environment in re.findall(r"\\begin\s*\{([^{}]*)\}", text):
        if environment not in _ENVIRONMENTS:
            raise Unread(f"no meaning is given to {environment}")
    if re.search(
        r"[^\x20-\x7e]|[=<>?@#~`\"\[\]]", re.sub(r"\\(?:sqrt\s*\[[^\]]*\]|(?:sum|prod)\s*_\s*\{[^{}]*\})", "", text)
    ):
        raise Unread("it holds a sign that has no meaning here")
    try:
        return _found(_latex2sympy(_prepared(text)))
    except Unread:
        raise
    except Exception as error:  # sympy's own, of every kind: max(2, i)
        raise Unread(f"sympy refuses it: {error}"[:100]) from None


def _nesting(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


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
    left, right = (side if side.has(sympy.oo) else _worked_out(side) for side in (left, right))
    parts: set[Any] = {part for side in (left, right) for part in sympy.preorder_traversal(side)}
    jumps = any(type(part).__name__ in _PIECEWISE or (part.is_Pow and not part.exp.is_integer) for part in parts)
    valid = 0
    for size, point in _points(symbols, 7 if jumps else 4):
        same = _same_at(left, right, point)
        if same is False:
            return False
        valid += same is True and size > 0
    return valid >= 2


def _holds_a_loop(expression: Any) -> bool:
    import sympy

    return expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)


def _worked_out(expression: Any) -> Any:
    """The expression with its sums, integrals and limits worked out, where sympy can."""
    try:
        return expression.doit()
    except Exception:  # sympy's own, of every kind
        return expression


def _points(symbols: Sequence[Any], n: int) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Points of rational coordinates, the same in every process; size 0 stands for whole numbers."""
    import sympy

    for i, size in enumerate(_SIZES[:n]):
        draw = random.Random(f"point {i}")
        below = [draw.randint(11, 97) if size else 1 for _ in symbols]
        # Right behind a whole number, right before one, and between: where rounding jumps.
        above = [size * q + (1, q - 1, draw.randint(1, 10))[i % 3] if size else draw.randint(1, 60) for q in below]
        yield (
            size,
            {s: sympy.Rational(draw.choice((-1, 1)) * p, q) for s, p, q in zip(symbols, above, below, strict=True)},
        )


def constant_ratio(left: Any, right: Any) -> Any:
    """The number that ``left`` is a multiple of ``right`` by; None where there is none, or it cannot be seen."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    ratio = None
    for _, point in _points(symbols, 3 if symbols else 1):
        one, two = _value(left, point), _value(right, point)
        if one is None or two is None or one == 0 or two == 0:
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
    return 0 if value == 0 else (1 if value > 0 else -1)


# What latex2sympy drops, or reads as something else, without a word.
_MISREAD = (
    (r"\\text", "words"),
    (r"\^\\circ|circ|prime\}|'|!!", "a mark that has no meaning here"),
    (r"(?<![A-Za-z_^{\d])\d+\s*_|(?<![\dA-Za-z])0[xXbB][0-9A-Fa-f]", "a number of another base"),
    (r"(?<![\d._^{])\d+(?:\.\d+)?\s+\d", "two numbers side by side"),
    (r"(?<![A-Za-z\\])[A-Za-z]\s*\^\s*\{\s*-\s*1\s*\}\s*\(\s*[a-z]\s*\)", "an inverse function"),
    (r"(?<![A-Za-z\\{])(?:[A-Za-z]{5}|[A-Za-z]{3,}\s+(?:\d|[A-Za-z]{2})|[A-Za-z]{2,}\s+[A-Za-z]{3})", "words"),
    (r"\^\s*\{?\s*[+*]", "an exponent that has no meaning here"),
)
_MATRIX_INVERSE = re.compile(r"[A-Z]\s*\^\s*\{\s*-\s*1\s*\}")


def _prepared(text: str) -> str:
    """The text in a spelling that latex2sympy reads as it is meant.

    Raises:
        Unread: there is none.
    """
    # A prime is a part of the name, a letter in text a name, a degree inside a function an angle.
    text = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{prime{len(m[2])}}}", text)
    text = re.sub(r"\\text\s*\{\s*([A-Za-z])\s*\}", r"\1", text)
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\\frac{\1}{180}\\pi)", text)
    for misread, what in _MISREAD:
        if re.search(misread, text):
            raise Unread(f"it holds {what}")
    if _MATRIX_INVERSE.search(text) and len(set(re.findall(r"(?<![A-Za-z\\])[A-Z]|(?<=[A-Z])[A-Z]", text))) > 1:
        raise Unread("it holds matrices, which do not commute")
    return _as_meant(text)


def _as_meant(text: str) -> str:
    # A transpose, which latex2sympy drops from a name: an exponent of its own.
    text = re.sub(r"\^\s*(?:\{\s*(?:T|\\top|\\intercal)\s*\}|T(?![A-Za-z])|\\top(?![A-Za-z]))", r"^{\\Xi}", text)
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
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)


def _latex2sympy(text: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    text = normalize_latex(text, NormalizationConfig(malformed_operators=True, boxed="none"))
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
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
    indexed = {str(s).partition("_")[2] for s in expression.free_symbols if "_" in str(s)}
    if any(str(s) in re.findall(r"[a-z]", index) for s in bound for index in indexed):
        raise Unread("it sums names with an index")
    changed = {float_: sympy.Rational(str(float_)) for float_ in expression.atoms(sympy.Float)}
    # Two assumptions make two symbols of one name.
    changed |= {s: known.get(str(s)) or sympy.Symbol(str(s)) for s in expression.free_symbols - bound}
    return expression.xreplace(changed) if changed else expression


def _same_constant(left: Any, right: Any) -> bool:
    import sympy

    one, two = rational(left), rational(right)
    if one is not None and two is not None:
        return bool(one == two)
    if max(_bits(left), _bits(right)) > MAX_EXACT_BITS:
        left, right = _named_powers(left), _named_powers(right)
        return bool(sympy.expand(left - right) == 0)
    same = _same_at(left, right, {})
    if same is None:
        one, two = _worked_out(left), _worked_out(right)
        undefined = any(value.has(sympy.nan, sympy.zoo) for value in (one, two))
        endless = one in (sympy.oo, -sympy.oo) and left != one and right != two
        return not undefined and not endless and bool(one == two)
    # A decimal of fewer digits than were compared is not irrational by chance; one of more may be a rounding.
    exact = one if two is None else two if one is None else None
    return same and (exact is None or max(abs(exact.p), exact.q).bit_length() < 3 * (DIGITS - 20))


def _named_powers(expression: Any) -> Any:
    """Powers and factorials that are too large to be worked out, as names: 2^82589933 - 1 is not 2^82589933."""
    import sympy

    changed: dict[Any, Any] = {}
    for part in expression.atoms(sympy.Pow, sympy.factorial):
        if _bits(part) <= MAX_EXACT_BITS:
            continue
        base, exponent = (part.base, part.exp) if isinstance(part, sympy.Pow) else (part, sympy.Integer(1))
        power = sympy.perfect_power(base) if base.is_Integer and base < 10**6 else False
        if power:
            base, exponent = sympy.Integer(power[0]), exponent * power[1]
        changed[part] = sympy.Symbol(f"large {base} {exponent}")
    return expression.xreplace(changed)


def _same_at(left: Any, right: Any, point: dict[Any, Any]) -> bool | None:
    """Whether both have one value there; None where one of them has none."""
    one, two = _value(left, point), _value(right, point)
    return None if one is None or two is None else _close(one, two)


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point: exact where it is rational, else of a hundred digits; None where it has none."""
    import sympy

    if _holds_a_loop(expression):
        if point:
            return None  # a sum at each point takes seconds
    elif expression.has(sympy.oo, -sympy.oo):
        return None
    there = expression.xreplace(point)
    exact = rational(there)
    if exact is not None:
        return exact
    try:
        found = there.evalf(DIGITS, maxn=4 * DIGITS, strict=True)
    except sympy.core.evalf.PrecisionExhausted:
        return sympy.Integer(0)  # nothing but rounding is left of it
    except Exception:
        return None
    try:
        if not found.is_number or found.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or found.atoms(sympy.Function):
            return None
        real, imaginary = found.as_real_imag()
    except Exception:
        return None
    return found if real.is_Number and imaginary.is_Number else None


def _close(one: Any, two: Any) -> bool:
    """Equal, if both are exact; else in the leading eighty digits."""
    if one.is_Rational and two.is_Rational:
        return bool(one == two)
    return bool(abs(one - two) <= max(abs(one), abs(two)) * 10 ** -(DIGITS - 20))


def _bits(expression: Any) -> float:
    """A bound on the digits that working a constant out would take, in bits."""
    import sympy

    total = 0.0
    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow):
            exponent: Any = _small_value(part.exp)
            if exponent is None:
                exponent = part.exp.evalf(15) if _bits(part.exp) < MAX_EXACT_BITS else None
                if exponent is None or not exponent.is_number:
                    return float("inf")
                exponent = abs(exponent).evalf(15)
            base = max((max(abs(n.p), n.q).bit_length() for n in part.base.atoms(sympy.Rational)), default=1)
            total += base * abs(float(exponent))
        elif isinstance(part, sympy.factorial):
            argument: Any = _small_value(part.args[0])
            total += 64 * abs(float(argument)) if argument is not None else float("inf")
        elif isinstance(part, sympy.Rational):
            total += max(abs(part.p), part.q).bit_length()
    return total


def _small_value(expression: Any) -> Any:
    """The rational that a sum or a product of numbers is; None where working it out could be large, or it is none."""
    import sympy

    if expression.is_Rational:
        return expression
    if expression.free_symbols or expression.atoms(sympy.Pow, sympy.factorial, sympy.Function):
        return None
    found = expression.doit()
    return found if found.is_Rational else None
