# SPDX-License-Identifier: MIT
"""The tables of README.md and docs/benchmarks.md, made from the newest whole results: python -m benchmarks.tables.

They stand between two comments of each document; a test holds them to the newest result in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dalle_fast import bench

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- from benchmarks/results: python -m benchmarks.tables -->", "<!-- end of table -->"


def newest() -> list[tuple[Path, dict]]:
    """The newest result of each kind of CPU (processor, instructions) that is not of a selection of rows.

    The kind that was measured last comes first. A processor that was limited to older instructions stands for one that
    has no others only where there is no result of such a one.
    """
    found = {}
    for path in RESULTS.glob("*.json"):
        try:
            report = bench.load(path)
        except bench.BenchError:
            continue
        machine = report["machine"]
        if not report.get("whole", True) or "gpu" in machine:
            continue
        kind = machine["cpu_level"]
        rank = ("limited_by" not in machine, report["date"])
        found[kind] = max(found.get(kind, (rank, path, report)), (rank, path, report), key=lambda entry: entry[0])
    return [entry[1:] for entry in sorted(found.values(), key=lambda entry: entry[2]["date"], reverse=True)]


def facts(path: Path, report: dict, results: str) -> str:
    """What the figures have to be read with, `results` being the way from the document to the folder."""
    machine, date = report["machine"], report["date"][:10]
    page = path.with_suffix(".html").name
    limits = " ".join(f"{name}={value}" for name, value in machine.get("limited_by", {}).items())
    return (
        f"- {machine['cpu_level']}: {machine['device']}{f', limited by `{limits}`' if limits else ''}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {date}, commit {machine['commit'][:10]} "
        f"([JSON]({results}/{path.name}), [page]({results}/{page}))"
    )


def documents() -> dict[Path, str]:
    """Document -> what stands between its comments."""
    results = newest()
    reports = [report for _, report in results]

    def machines(folder: str) -> str:
        return "\n".join(facts(path, report, folder) for path, report in results)

    return {
        ROOT / "README.md": f"{bench.summary(reports)}\n\n{machines('benchmarks/results')}",
        ROOT / "docs" / "benchmarks.md": f"{machines('../benchmarks/results')}\n\n{bench.side_by_side(reports)}\n\n"
        f"All peers, of the first of these:\n\n{bench.markdown(reports[0])}",
    }


def with_table(text: str, table: str) -> str:
    """A document with this between its comments."""
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is not up to date")
    check, stale = parser.parse_args().check, 0
    for document, table in documents().items():
        text = document.read_text()
        made = with_table(text, table)
        if made != text:
            stale += 1
            print(f"{document.relative_to(ROOT)}: {'is not of the newest result' if check else 'written'}")
            if not check:
                document.write_text(made)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
