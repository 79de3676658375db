# SPDX-License-Identifier: MIT
"""The demo, as short as it gets; a second call goes on with what is there."""

from __future__ import annotations

import pytest

from dalle_fast.demo import run_demo
from dalle_fast.errors import ConfigError


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_demo_ends_with_a_report_and_repeats(tmp_path, capsys):
    report = run_demo(0.2, tmp_path / "demo")
    out = capsys.readouterr().out
    assert report.stat().st_size > 50_000
    assert str(report) in out
    assert out.count("dalle-fast ") >= 3  # the next commands to try
    logs = {stage: (tmp_path / "demo" / stage / "metrics.jsonl").read_text() for stage in ("dvae", "clip", "dalle")}
    again = run_demo(0.2, tmp_path / "demo", quiet=True)
    assert again == report
    for stage, text in logs.items():
        assert (tmp_path / "demo" / stage / "metrics.jsonl").read_text() == text


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ConfigError, match="minutes: expected a positive number"):
        run_demo(0, tmp_path)
    with pytest.raises(ConfigError, match="data: expected emoji or shapes, got 'paper'"):
        run_demo(1, tmp_path, data="paper")
