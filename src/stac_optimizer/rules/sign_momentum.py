"""The trunk's rule: the sign of a gradient average, with decoupled weight decay.

Its arithmetic, on all paths side by side, stands in ``_sign_momentum_kernels.py``.

References: signSGD with Majority Vote (Bernstein et al.), https://arxiv.org/abs/1810.05291; Momentum Ensures
Convergence of SIGNSGD under Weaker Assumptions (Sun et al., ICML 2023); the mask: Cautious Optimizers (Liang et al.),
https://arxiv.org/abs/2411.16085.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer import _codes, _rounding, _shards, _tensors
from stac_optimizer._validation import boolean, one_of, unit_fraction
from stac_optimizer.rules._rule import Group, Hyperparameter, Rule, StateTensor, StepInputs
from stac_optimizer.rules._sign_momentum_foreach import multi_tensor
from stac_optimizer.rules._sign_momentum_fused import fused, has_fused, skips_by_itself
from stac_optimizer.rules._sign_momentum_kernels import Work
from stac_optimizer.rules._sign_momentum_single import single_tensor
from stac_optimizer.rules._sign_momentum_vote import average_state, by_vote
from stac_optimizer.vote import ENCODINGS, Voters

__all__ = ["SignMomentum"]


STATE_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}


def _state_dtype(name: str, value: Any) -> str | None:
    """The name of a dtype: full state dicts of torch.distributed hold plain Python values alone."""
    if value is not None and not isinstance(value, torch.dtype | str):
        raise TypeError(f"{name} must be None or a torch.dtype, got {value!r} of type {type(value).__name__}")
    known: dict[Any, str] = {dtype: dtype_name for dtype_name, dtype in STATE_DTYPES.items()}
    chosen: str | None = one_of(name, known.get(value, value), (None, *STATE_DTYPES))
    return chosen


def _encoding(name: str, value: Any) -> str | None:
    chosen: str | None = one_of(name, value, (None, *ENCODINGS))
    return chosen


class SignMomentum(Rule):
    r"""Moves each weight by exactly lr against the sign of a gradient average.

    For parameter :math:`p`, gradient :math:`g` (negated under ``maximize``), average :math:`m` with :math:`m_0 = 0`, in
    this order:

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow m + (1 - \mu)(g - m) \\
        p &\leftarrow p - \text{lr} \cdot \operatorname{sign}(m)

    ============================ =========================================================
    paper                        here
    ============================ =========================================================
    :math:`\mu`                  ``trunk_momentum``; 0 takes :math:`m = g` and keeps no state
    :math:`m`                    state ``exp_avg``, as the parameter or in ``trunk_state_dtype``
    mask :math:`[m \cdot g > 0]` with ``trunk_cautious``: sign(m) becomes sign(m) · mask / max(mean(mask), 1e-3)
    ============================ =========================================================

    State: ``step`` (0-dim float32, read by stochastic rounding alone) and ``exp_avg``; where that is in 8-bit codes
    also ``exp_avg_scale``, see :mod:`stac_optimizer._codes`. The sign is that of m before it is rounded to be stored.

    With ``trunk_vote``, which :class:`stac_optimizer.MajorityVote` sets, each rank keeps an m of its own gradients, and
    sign(m) becomes the sign of the sum of all ranks' sign(m).
    """

    name = "sign_momentum"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "trunk_momentum": Hyperparameter(default=0.9, check=unit_fraction),
        "trunk_cautious": Hyperparameter(default=False, check=boolean),
        "trunk_state_dtype": Hyperparameter(default=None, check=_state_dtype),
        "trunk_vote": Hyperparameter(default=None, check=_encoding),
    }
    state_keys = frozenset({"step", "exp_avg", "exp_avg_scale"})
    paths = frozenset({"single", "foreach", "fused"})
    votes = True

    def state_tensors(self, group: Group) -> tuple[StateTensor, ...]:
        """The counter; with momentum the average, in codes with its scales."""
        dtype = STATE_DTYPES.get(group["trunk_state_dtype"])
        tensors = [StateTensor(key="step", counter=True)]
        if group["trunk_momentum"]:
            tensors.append(StateTensor(key="exp_avg", dtype=dtype))
            if dtype == torch.int8:
                tensors.append(StateTensor(key="exp_avg_scale", scales=True))
        return tuple(tensors)

    def unfitness(self, param: Tensor, group: Group) -> str | None:
        if group["trunk_vote"] and _shards.is_sharded(param):
            return (
                "is a DTensor, whose gradients FSDP2 averages, and ranks vote on what each has by itself; give "
                "fully_shard the trunk's parameters as ignored_params"
            )
        is_coded = group["trunk_state_dtype"] == "int8" and _codes.can_be_coded(param)
        if is_coded and not _shards.is_sharded_by_row(param):
            return "is sharded within rows, and 8-bit state needs whole ones; use trunk_state_dtype=torch.bfloat16"
        return super().unfitness(param, group)

    def advice(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        """Warn of low-precision weights that the lr cannot move."""
        if group["stochastic_rounding"]:
            return None
        lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
        stuck = [name for name, param in zip(names, params, strict=True) if _is_step_lost(param, lr)]
        if not stuck:
            return None
        return (
            f"an lr of {lr:g} is less than half the spacing between neighbouring values for most weights of "
            f"{', '.join(map(repr, stuck))}, so their steps round to nothing. Use stochastic_rounding=True with "
            "bfloat16, keep float32 weights (and compute under torch.autocast) or raise trunk_lr"
        )

    def path(self, params: Sequence[Tensor], group: Group) -> str:
        path = super().path(params, group)
        if path == "fused" and not has_fused(params):
            path = super().path(params, {**group, "fused": None})
        # Masks, codes and stochastic rounding have no form on lists of tensors.
        is_listed = not (group["trunk_cautious"] or group["stochastic_rounding"])
        return "single" if path == "foreach" and not (is_listed and group["trunk_state_dtype"] != "int8") else path

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        return skips_by_itself(group, states)

    def update(self, inputs: StepInputs) -> None:
        steps = inputs.states[0]
        _tensors.count_step_(steps)
        if inputs.found_inf is not None:
            _tensors.foreach_sub_(steps, [inputs.found_inf.to(step.device) for step in steps])
        work = _work(inputs)
        if inputs.group["stochastic_rounding"]:
            offsets = list(map(_shards.run_offset, inputs.params))
            counts = _rounding.counts(steps)
            salt = _rounding.salts(inputs.group["rounding_seed"], inputs.positions, counts, offsets=offsets)
            work = work.using(work.wholes, work.tensorlists, salt)
        for part in _by_state_kind(work):
            if inputs.voters is not None:
                by_vote(part, inputs.voters)
            else:
                KERNELS[self.path(inputs.params, inputs.group)](part)

    def average_state(
        self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], voters: Voters
    ) -> None:
        for param in params:
            state = states.get(param, {})
            if "exp_avg" in state:
                average_state(state["exp_avg"], state.get("exp_avg_scale"), param, voters)


def _work(inputs: StepInputs) -> Work:
    params = inputs.params
    states = [_shards.real_parts(tensors) for tensors in inputs.states[1:]]
    tensorlists = [_shards.real_parts(params), _shards.real_parts(inputs.grads, params), *states]
    return Work(params, tensorlists, inputs.group, inputs.grad_scale, None, inputs.found_inf)


KERNELS: Mapping[str, Callable[[Work], None]] = {"single": single_tensor, "foreach": multi_tensor, "fused": fused}


def _by_state_kind(work: Work) -> list[Work]:
    """What has averages in codes, with their scales, and what has none, without."""
    if len(work.tensorlists) < 4:
        return [work]
    is_coded = [_codes.is_coded(tensors) for tensors in zip(*work.tensorlists, strict=True)]
    coded, plain = ([i for i, flag in enumerate(is_coded) if flag is kind] for kind in (True, False))
    rest = work.using(work.wholes, work.tensorlists[:3], work.salt)
    return [part.only(chosen) for part, chosen in ((work, coded), (rest, plain)) if chosen]


def _is_step_lost(param: Tensor, lr: float) -> bool:
    if param.dtype not in _tensors.LOW_PRECISION or param.is_meta or not param.numel() or not lr:
        return False
    param = _shards.local_views([param.detach()])[0]
    weights = param.float()
    stays = ((weights - lr).to(param.dtype) == param) & ((weights + lr).to(param.dtype) == param)
    return bool(stays.float().mean() > 0.5)
