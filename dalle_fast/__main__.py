# SPDX-License-Identifier: MIT
"""`python -m dalle_fast` is `dalle-fast`."""

from .cli import main

main()
