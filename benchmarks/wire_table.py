# SPDX-License-Identifier: MIT
"""The tables of benchmarks/wire.py, from what it measured in one run or in several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

HEADER = (
    f"{'link':>10}  {'':22}{'s a step':>9}{'ratio':>7}{'predicted':>11}{'/ measured':>12}"
    f"{'cpu s':>7}{'MB sent':>9}{'counted':>9}   (best step)"
)


def lines(rows: list[dict]) -> Iterator[str]:
    plain = {row["mbit"]: row["best"] for row in rows if row["method"] == "DDP"}
    for row in rows:
        counted = f"{row['counted_bytes'] / 1e6:9.2f}" if row["counted_bytes"] is not None else ""
        yield (
            f"{row['mbit']:5d} Mbit  {row['method']:22}{row['best']:9.3f}{plain[row['mbit']] / row['best']:6.1f}x"
            f"{row['predicted']:11.3f}{row['predicted'] / row['best']:12.2f}"
            f"{row['cpu']:7.2f}{row['interface_bytes'] / 1e6:9.2f}{counted}"
        )


def describe(result: dict) -> str:
    """The tables, as text."""
    text = []
    if result["steps"]:
        text += [HEADER, *lines(result["steps"])]
    if result["hooks_alone"]:
        first = result["hooks_alone"][0]
        text.append(f"\nhooks alone, {first['numbers'] / 1e6:.1f} million numbers, one thread, one rank")
        text += [
            f"  {row['hook']:44}{row['seconds'] * 1e3:9.1f} ms  {first['seconds'] / row['seconds']:5.2f}x"
            for row in result["hooks_alone"]
        ]
    return "\n".join(text) + "\n"


def merged(result: dict, path: Path) -> dict:
    """With what an earlier run of the same settings wrote there and this one did not measure."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("settings") != result["settings"] or before["machine"]["torch"] != result["machine"]["torch"]:
        return result
    rates = {row["mbit"] for row in result["steps"]}
    steps = [row for row in before["steps"] if row["mbit"] not in rates] + result["steps"]
    steps.sort(key=lambda row: row["mbit"])
    return {**result, "steps": steps, "hooks_alone": result["hooks_alone"] or before["hooks_alone"]}
