"""Rules in whose steps each weight shares something with its neighbours in the tensor, by a discrete Laplacian."""

from __future__ import annotations

from stac_optimizer.optim.laplacian.advice import laplacian_overrides, suggest_c2
from stac_optimizer.optim.laplacian.ladagrad import LAdaGrad
from stac_optimizer.optim.laplacian.ladam import LAdam, WaveAdam
from stac_optimizer.optim.laplacian.lrmsprop import LRMSProp

__all__ = ["LAdaGrad", "LAdam", "LRMSProp", "WaveAdam", "laplacian_overrides", "suggest_c2"]
