# SPDX-License-Identifier: MIT
"""Known answers of Random123 and the layout of the uniform numbers."""

from __future__ import annotations

import pytest
import torch

from dalle_fast.ops.philox import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_published_known_answers(counter, key, expected):
    assert philox4x32(torch.tensor(counter), key).tolist() == expected


def test_uniform_is_open_and_flat():
    u = uniform(seed=3, offset=0, num_rows=256, num_columns=1001)
    assert u.min() > 0
    assert u.max() < 1
    # standard error of the mean of 256,256 draws: 0.289 / 506 = 0.0006
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.var() - 1 / 12) < 0.002


def test_rows_columns_and_offsets_are_addressed_not_drawn_in_turn():
    u = uniform(7, 2**33 + 5, 6, 10)
    assert torch.equal(uniform(7, 2**33 + 5, 2, 10, row_offset=4), u[4:])
    assert torch.equal(uniform(7, 2**33 + 5, 6, 3), u[:, :3])
    assert not torch.equal(uniform(7, 5, 6, 10), u)
    assert not torch.equal(uniform(7 + 2**32, 2**33 + 5, 6, 10), u)


def test_wrong_counter_is_named():
    with pytest.raises(ValueError, match=r"^counter: expected shape \[\.\.\., 4\]"):
        philox4x32(torch.zeros(3, dtype=torch.int64), (0, 0))
