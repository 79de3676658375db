# SPDX-License-Identifier: MIT
"""The tables of README.md and docs/benchmarks.md, made from the newest whole result: python -m benchmarks.tables.

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


def newest() -> tuple[Path, dict]:
    """Path and content of the newest result of a CPU that is not of a selection of rows."""
    found = []
    for path in RESULTS.glob("*.json"):
        try:
            report = bench.load(path)
        except bench.BenchError:
            continue
        if report.get("whole", True) and "gpu" not in report["machine"]:
            found.append((report["date"], path, report))
    return max(found)[1:]


def facts(path: Path, report: dict, results: str) -> str:
    """What the figures have to be read with, `results` being the way from the document to the folder."""
    machine, date = report["machine"], report["date"][:10]
    threads = f"{machine['threads']} threads"
    return (
        f"{machine['device']} ({machine['cpu_level']}), {threads}, torch {machine['torch']}, {date}, commit\n"
        f"{machine['commit'][:10]}; all of it: [JSON]({results}/{path.name}), a page with bars beside it."
    )


def documents() -> dict[Path, str]:
    """Document -> what stands between its comments."""
    path, report = newest()
    return {
        ROOT / "README.md": f"{bench.summary(report)}\n\n{facts(path, report, 'benchmarks/results')}",
        ROOT / "docs" / "benchmarks.md": f"{facts(path, report, '../benchmarks/results')}\n\n{bench.markdown(report)}",
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
