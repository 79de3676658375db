# SPDX-License-Identifier: MIT
"""What a run says while it works: metrics.jsonl (the truth), TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import DataError
from ..files import open_regular, parse_json


class MetricsLog:
    """One JSON object per line; a resumed run first drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept).encode()
        if not path.exists() or path.read_bytes() != text:
            from ..models.store import write_atomic

            write_atomic(path, text)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, values: dict[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; what is not an object with a step (a line cut off by a crash) is left out.

    Raises:
        DataError: it is not an ordinary file.
    """
    if not path.exists():
        return []
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = []
    for line in content.split(b"\n"):
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            lines.append(value)
    return lines


class Meter:
    """Progress with loss, samples per second and time left: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str, steps: int, done: int, *, quiet: bool = False, line_seconds: float = 20.0) -> None:
        self.name, self.steps, self.first, self.quiet = name, steps, done, quiet
        self.started = self.last_line = time.monotonic()
        self.line_seconds = line_seconds
        self.bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn(f"[bold]{name}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}  {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=False,
            )
            self.task = self.bar.add_task(name, total=steps, completed=done, note="")
            self.bar.start()

    def rate(self, step: int, batch_size: int) -> float:
        """Samples per second since the run was started or resumed."""
        return (step - self.first) * batch_size / max(time.monotonic() - self.started, 1e-9)

    def update(self, step: int, loss: float, batch_size: int) -> None:
        """Shows where the run is."""
        if self.quiet:
            return
        rate = self.rate(step, batch_size)
        note = f"loss {loss:.4f}  {rate:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
            return
        now = time.monotonic()
        if now - self.last_line >= self.line_seconds or step == self.steps:
            self.last_line = now
            left = (self.steps - step) * batch_size / max(rate, 1e-9)
            print(f"{self.name} {step}/{self.steps}  {note}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
