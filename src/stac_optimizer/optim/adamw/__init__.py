"""AdamW and AMSGrad, as torch computes them."""

from __future__ import annotations

from stac_optimizer.optim.adamw.adamw import AdamW, AdamWRule

__all__ = ["AdamW", "AdamWRule"]
