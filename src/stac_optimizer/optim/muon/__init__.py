"""Muon: the sign of a matrix, a trunk of whole matrices."""

from __future__ import annotations

from stac_optimizer.optim.muon.muon import Muon, MuonRule

__all__ = ["Muon", "MuonRule"]
