# SPDX-License-Identifier: MIT
"""Shared by all tests: threads, seeds, and the reason when there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    # Two xdist workers on two cores: one thread each, or they fight.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cuda_skip_reason()
    if reason is None:
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def cuda_skip_reason() -> str | None:
    """Why the CUDA tests cannot run here, or None."""
    from dalle_fast.ops import _backend

    if not torch.cuda.is_available():
        return "no CUDA device"
    if _backend._C is None or not _backend._C.cuda_archs:
        return "the extension was built without CUDA"
    return None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Four processes of a gloo group, for the tests of one file."""
    pool = Ranks(4)
    yield pool
    pool.close()
