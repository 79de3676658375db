# SPDX-License-Identifier: MIT
"""The command line: `dalle-fast doctor [--json]`."""

from __future__ import annotations

import argparse


def main(argv: list[str] | None = None) -> None:
    """Entry point of `dalle-fast`."""
    parser = argparse.ArgumentParser(prog="dalle-fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is installed, what is missing, what to do")
    doctor.add_argument("--json", action="store_true", help="for bug reports")
    arguments = parser.parse_args(argv)

    from . import doctor as doctor_module  # torch is slow to import: not for --help

    doctor_module.main(as_json=arguments.json)
