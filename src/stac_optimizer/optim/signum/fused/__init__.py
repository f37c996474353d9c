"""The trunk's update in one pass over memory, by kernels for each device: what ``fused=True`` runs."""

from __future__ import annotations

from stac_optimizer.optim.signum.fused.devices import fused, has_fused, skips_by_itself

__all__ = ["fused", "has_fused", "skips_by_itself"]
