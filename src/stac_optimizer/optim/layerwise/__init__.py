"""Rules whose step each layer scales by the norm of its weights."""

from __future__ import annotations

from stac_optimizer.optim.layerwise.lamb import LAMB

__all__ = ["LAMB"]
