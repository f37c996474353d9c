"""Drop-in optimizers, one class and one rule for each algorithm; each is also a role of STAC."""

from __future__ import annotations

from stac_optimizer.optim.adamw import AdamW
from stac_optimizer.optim.adaptive import AdaBelief, AdamP, Adan, AdEMAMix, TAdam
from stac_optimizer.optim.laplacian import LAdaGrad, LAdam, LRMSProp, WaveAdam
from stac_optimizer.optim.layerwise import LAMB, LARS, RaLars
from stac_optimizer.optim.lion import Lion
from stac_optimizer.optim.muon import Muon
from stac_optimizer.optim.signum import Signum

__all__ = [
    "LAMB",
    "LARS",
    "AdEMAMix",
    "AdaBelief",
    "AdamP",
    "AdamW",
    "Adan",
    "LAdaGrad",
    "LAdam",
    "LRMSProp",
    "Lion",
    "Muon",
    "RaLars",
    "Signum",
    "TAdam",
    "WaveAdam",
]
