"""Relatives of Adam, whose steps adapt to averages of gradients and of what is squared of them."""

from __future__ import annotations

from stac_optimizer.optim.adaptive.adabelief import AdaBelief
from stac_optimizer.optim.adaptive.adamp import AdamP
from stac_optimizer.optim.adaptive.adan import Adan
from stac_optimizer.optim.adaptive.ademamix import AdEMAMix
from stac_optimizer.optim.adaptive.tadam import TAdam

__all__ = ["AdEMAMix", "AdaBelief", "AdamP", "Adan", "TAdam"]
