# SPDX-License-Identifier: MIT
"""The models of the paper: dVAE, transformer, and the contrastive model that ranks."""

from __future__ import annotations

from .clip import CLIP, CLIPConfig
from .dalle import DALLE, DALLEConfig, DALLELoss, DecodeCache
from .dvae import DVAE, DVAEConfig, DVAELoss

__all__ = ["CLIP", "DALLE", "DVAE", "CLIPConfig", "DALLEConfig", "DALLELoss", "DVAEConfig", "DVAELoss", "DecodeCache"]
