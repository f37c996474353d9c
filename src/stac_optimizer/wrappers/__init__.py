"""Around any optimizer: a tuned learning rate, slow weights."""

from __future__ import annotations

from stac_optimizer.wrappers.lookahead import Lookahead
from stac_optimizer.wrappers.mechanic import Mechanic, mechanize
from stac_optimizer.wrappers.scout import Scout

__all__ = ["Lookahead", "Mechanic", "Scout", "mechanize"]
