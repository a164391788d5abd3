"""Numbers as text. A value is a plain number, or a dict with `value`, `low` and `high` as results hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MISSING = "–"


def _number(x: float, digits: int, percent: bool, sign: bool = False) -> str:
    text = f"{100 * x if percent else x:{'+' if sign else ''}.{digits}f}"
    # "-0.000" says nothing that "0.000" does not.
    return text.replace("-", "", 1) if float(text) == 0 and text.startswith("-") else text


def _with_ends(data: Any, digits: int, percent: bool, sign: bool) -> str:
    if isinstance(data, dict):
        value, low, high = data.get("value"), data.get("low"), data.get("high")
    else:
        value, low, high = data, None, None
    if value is None:
        return MISSING
    unit = " %" if percent else ""
    digits = max(0, digits - 2) if percent else digits
    text = _number(value, digits, percent, sign)
    if low is None or high is None:
        return text + unit
    return f"{text}{unit} [{_number(low, digits, percent, sign)}, {_number(high, digits, percent, sign)}]"


def interval(data: Any, digits: int = 3, percent: bool = False) -> str:
    """`0.842 [0.801, 0.877]`; as percent with two digits fewer; a dash for nothing."""
    return _with_ends(data, digits, percent, False)


def signed_interval(data: Any, digits: int = 3) -> str:
    """`-0.013 [-0.041, +0.015]`."""
    return _with_ends(data, digits, False, True)


def size(data: Any) -> str:
    """Bytes as MB or GB of 10^6 and 10^9."""
    if data is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if data >= factor:
            return f"{data / factor:.2f} {unit}"
    return f"{data} B"


def text(data: Any) -> str:
    """Anything as it is, with `|` and line breaks made safe for a markdown cell."""
    return MISSING if data is None else " ".join(str(data).split()).replace("|", "\\|")


def _decimal(digits: int) -> Callable[[Any], str]:
    return lambda data: interval(data, digits)


def _point(data: Any, digits: int) -> str:
    return interval(data.get("value") if isinstance(data, dict) else data, digits)


def kernel(data: Any) -> str:
    """Of a run's `settings.extra`: whether a ternary model drew with kernels; nothing for a dense one."""
    if not isinstance(data, dict):
        return text(data)
    if "mode" not in data:
        return MISSING
    backend = data.get("backend")
    return "off" if backend == "reference" else f"on ({backend})" if backend not in (None, "auto") else "on"


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": text,
    "kernel": kernel,
    "yes": lambda data: MISSING if data is None else "yes" if data else "no",
    "int": lambda data: MISSING if data is None else f"{round(data):,}",
    "number": _decimal(3),
    "number1": _decimal(1),
    "number2": _decimal(2),
    "score": lambda data: _with_ends(data, 3, False, False),
    "point": lambda data: _point(data, 3),
    "point4": lambda data: _point(data, 4),
    "difference": signed_interval,
    "percent": lambda data: _with_ends(data, 3, True, False),
    "dB": _decimal(2),
    "ms": _decimal(1),
    "ratio": lambda data: MISSING if data is None else f"{interval(data, 2)}x",
    "bytes": size,
}
"""How a column may print its values, by the name a table's spec uses."""
WORDS = ("text", "kernel", "yes")
"""Formats of words; the others are of numbers."""
