# SPDX-License-Identifier: MIT
"""Numbers and a report about a trained system."""

from __future__ import annotations

from .frechet import frechet_distance
from .judge import Judge, Judgement, judge_for
from .metrics import Evaluation, EvaluationOptions, run_evaluation
from .report import judge_lines, judge_table, sample_sheet, write_report

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "Judge",
    "Judgement",
    "frechet_distance",
    "judge_for",
    "judge_lines",
    "judge_table",
    "run_evaluation",
    "sample_sheet",
    "write_report",
]
