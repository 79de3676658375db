# SPDX-License-Identifier: MIT
"""Random right and wrong calls: each has to give what the reference gives, or an error that names the argument.

`make fuzz` runs it at full size, `python tests/fuzz_ops.py` any of it. runner.py knows processes, calls.py what may
come of a call, arguments.py what tensors and numbers may look like, ops.py and optimizer.py how each function is
called rightly, controls.py bugs that have to be noticed.
"""
