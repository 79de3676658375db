# SPDX-License-Identifier: MIT
from __future__ import annotations

import json

import pytest

from dalle_fast import doctor
from dalle_fast.cli import main


def test_json_names_every_fact(capsys):
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"]
    assert facts["extension"] is (facts["extension_error"] is None)


def test_advice_says_what_to_do():
    facts = doctor.report()
    assert "Install a C++ compiler" in doctor.advice({**facts, "extension": False})[0]
    there = {**facts, "extension": True}
    assert "nvcc" in doctor.advice({**there, "cuda_archs": ""})[0]
    assert "no driver" in doctor.advice({**there, "cuda_archs": "8.0", "cuda_status": "no driver"})[0]
    assert doctor.advice({**there, "cuda_archs": "8.0", "cuda_status": "ok"}) == ["All is there."]


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["paint"])
    assert stop.value.code == 2
    assert "paint" in capsys.readouterr().err
