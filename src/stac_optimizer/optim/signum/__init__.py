"""The sign of a gradient average, on every path."""

from __future__ import annotations

from stac_optimizer.optim.signum.signum import Signum, SignumRule

__all__ = ["Signum", "SignumRule"]
