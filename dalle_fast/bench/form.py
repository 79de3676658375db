# SPDX-License-Identifier: MIT
"""What the JSON of a result looks like, for whoever reads one that others have written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import shown

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _error(value: Any) -> bool:
    return _number(value) or (type(value) is float and (math.isnan(value) or value == math.inf))


_ROW: dict[str, Check] = {"median_ms": _positive, "best_ms": _positive, "floor_ms": _number, "share": _number,
                          "error": _error, "bound": _number, "bytes": _number, "flops": _number}  # fmt: skip
_PEER: dict[str, Check] = {"median_ms": _positive, "best_ms": _positive, "ratio": _positive}
_EXTRA: dict[str, Check] = {"cold_ms": _number, "memory_mb": _number, "note": _text}
_MACHINE: dict[str, Check] = {"device": _text}


def wrong_in(report: Any) -> str | None:
    """What is wrong in a result, by its key; None: all that is read of it has its form."""
    for keys in ((), ("table",), ("machine",)):
        value = report
        for key in keys:
            value = value.get(key)
        if not isinstance(value, dict):
            return f"{'.'.join(keys) or 'it'}: expected an object, got {shown(value)}"
    if not _text(report.get("date")):
        return f"date: expected a text, got {shown(report.get('date'))}"
    return (
        _fields("machine", report["machine"], _MACHINE)
        or _all("table.roofs", _rates(report["table"]), lambda where, rate: _is(where, rate, _number))
        or _all("table.rows", report["table"].get("rows"), _row)
        or _all("overhead", report.get("overhead", []), _call)
        or _all("scaling", report.get("scaling", []), _curve)
    )


def _all(where: str, items: Any, wrong: Callable[[str, Any], str | None]) -> str | None:
    if not isinstance(items, list):
        return f"{where}: expected a list, got {shown(items)}"
    return next((text for i, item in enumerate(items) if (text := wrong(f"{where}[{i}]", item))), None)


def _rates(table: dict) -> Any:
    """What the machine does at best, by either of the names that results have for it."""
    rates = table.get("roofs", table.get("peaks"))
    return list(rates.values()) if isinstance(rates, dict) else rates


def _is(where: str, value: Any, check: Check) -> str | None:
    return None if check(value) else f"{where}: got {shown(value)}"


def _fields(where: str, value: Any, checks: Mapping[str, Check], extra: Mapping[str, Check] = _EXTRA) -> str | None:
    if not isinstance(value, dict):
        return f"{where}: expected an object, got {shown(value)}"
    for key, check in checks.items():
        if not check(value.get(key)):
            return f"{where}.{key}: got {shown(value.get(key))}"
    return next(
        (f"{where}.{k}: got {shown(value[k])}" for k, c in extra.items() if k in value and not c(value[k])), None
    )


def _row(where: str, row: Any) -> str | None:
    wrong = _fields(where, row, {"name": lambda name: _text(name) and bool(name.split())})
    if wrong:
        return wrong
    if not isinstance(row.get("peers"), dict):
        return f"{where}.peers: expected an object, got {shown(row.get('peers'))}"
    if "median_ms" in row:
        wrong = _fields(where, row, _ROW)
    else:
        wrong = _fields(where, row, {"failed" if "failed" in row else "skipped": _text})
    for name, peer in row["peers"].items():
        if isinstance(peer, dict):
            wrong = wrong or _fields(f"{where}.peers.{shown(name)[1:-1]}", peer, _PEER)
    return wrong


def _call(where: str, call: Any) -> str | None:
    return _fields(where, call, {"name": _text, "ours_us": _number}) or _peers(where, call, _number)


def _peers(where: str, value: dict, check: Check) -> str | None:
    if not isinstance(value.get("peers"), dict):
        return f"{where}.peers: expected an object, got {shown(value.get('peers'))}"
    return next((w for k, v in value["peers"].items() if (w := _is(f"{where}.peers.{shown(k)[1:-1]}", v, check))), None)


def _curve(where: str, curve: Any) -> str | None:
    wrong = _fields(where, curve, {"name": _text, "unit": _text, "points": lambda points: bool(points)})
    return wrong or _all(f"{where}.points", curve["points"], _point)


def _point(where: str, point: Any) -> str | None:
    return _fields(where, point, {"x": _positive, "ours_ms": _positive}) or _peers(where, point, _positive)
