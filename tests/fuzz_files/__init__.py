# SPDX-License-Identifier: MIT
"""Damaged and hostile files, and random command lines: each ends as it should, or in one line that says what is wrong.

`python tests/fuzz_files` runs them all, `--target NAME` one. guard.py knows what must not happen to the disk and to
other programs, mutate.py how files go wrong; the other modules are a target each, or two that are alike.
"""
