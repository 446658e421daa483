"""Values as JSON knows them, for what the command line prints and for what the catalog hands out; JSON files.

Why apart: both need the same answer, and the command line must start without numpy, which is why arrays and scalars of
numpy and torch are told by their ``tolist``.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from calset.errors import InputError, first_line


def jsonable(value: Any) -> Any:
    """What ``json.dumps`` takes: dates as ISO text, decimals as numbers, bytes as base64, NaN and infinities as None.

    Sets become sorted lists, and what JSON has no type for its ``str()``.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    # Real: numpy's floats too, of which only float64 is a float and longdouble's tolist() is no Python number.
    if isinstance(value, (float, Real)) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(value)).decode("ascii")
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [jsonable(item) for item in sorted(value, key=repr)]
    plain = getattr(value, "tolist", None)
    return str(value) if plain is None else jsonable(plain())


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is corrupt: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is corrupt: it is no JSON object")
    return found
