# SPDX-License-Identifier: MIT
"""Everything a GPU has to confirm, in one call: `make gpu`."""
