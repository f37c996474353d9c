"""What a row of the table of rules is: a rule under one set of hyper-parameters, and how it is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from stac_optimizer.optimizer import RuleOptimizer
from tests import reference

__all__ = ["DTYPES", "PATHS", "RuleCase"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """One rule under one set of hyper-parameters.

    Args:
        kind: its drop-in class.
        arguments: hyper-parameters besides the defaults.
        reference: the float64 reference.
        role: the role of STAC that it is tested in.
        paths: the class's arguments for each path, by the path's name.
        agrees_by_bits: whether all paths give the same bits; where not, the rule's own tests tell what they must give.
        slack: roundings, in units of the dtype's epsilon, by which a result may differ from the reference.
        dtypes: those on which the reference binds.
        decays_alone: whether weights lose lr · weight_decay of themselves where their gradients are 0.
    """

    name: str
    kind: type[RuleOptimizer]
    arguments: Mapping[str, Any]
    reference: Callable[..., reference.Result]
    role: str = "trunk"
    paths: Mapping[str, Mapping[str, Any]]
    agrees_by_bits: bool = True
    slack: float = 1.5  # decay and step round once each, to at most half an epsilon; measured 1.06
    dtypes: tuple[torch.dtype, ...] = DTYPES
    decays_alone: bool = True

    def optimizer(self, params: Mapping[str, Tensor], path: str, **overrides: Any) -> RuleOptimizer:
        """The class alone, over these parameters in one group."""
        build: Callable[..., RuleOptimizer] = self.kind
        return build(list(params.items()), **{**self.arguments, **self.paths[path], **overrides})

    def taken(self, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that the rule can update."""
        return {name: param for name, param in params.items() if self.kind.rule.takes(param)}

    def in_role(self, params: Mapping[str, Tensor], path: str, **overrides: Any) -> STAC:
        """STAC over these parameters in one group of the case's role, which the class updates."""
        build = partial(self.kind, **{**self.arguments, **self.paths[path], **overrides})
        groups = [{"params": list(params.items()), "stac_role": self.role}]
        roles: dict[str, Any] = {f"{self.role}_optimizer": build}
        return STAC(groups, **roles)


# On the CPU Signum's fused path leaves tensors as small as those here to the single-tensor one.
PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
