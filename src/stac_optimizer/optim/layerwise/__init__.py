"""Rules whose step each layer scales by the norm of its weights."""

from __future__ import annotations

from stac_optimizer.optim.layerwise.lamb import LAMB
from stac_optimizer.optim.layerwise.lars import LARS
from stac_optimizer.optim.layerwise.ralars import RaLars

__all__ = ["LAMB", "LARS", "RaLars"]
