"""Signum: the sign of a gradient average, with decoupled weight decay. STAC's trunk.

Its arithmetic, on all paths side by side, stands in ``arithmetic.py``.

References: signSGD with Majority Vote (Bernstein et al.), https://arxiv.org/abs/1810.05291; Momentum Ensures
Convergence of SIGNSGD under Weaker Assumptions (Sun et al., ICML 2023); the mask: Cautious Optimizers (Liang et al.),
https://arxiv.org/abs/2411.16085.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import is_sharded, real_parts, run_offset
from stac_optimizer.distributed.vote import ENCODINGS, MajorityVote, Voters
from stac_optimizer.optim.signum.arithmetic import SignUpdate
from stac_optimizer.optim.signum.foreach import multi_tensor
from stac_optimizer.optim.signum.fused import fused, has_fused, skips_by_itself
from stac_optimizer.optim.signum.single import single_tensor
from stac_optimizer.optim.signum.vote import average_over_ranks, by_vote
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateTensor, StepInputs
from stac_optimizer.rule.averages import (
    AVERAGE_KEYS,
    can_lack_scale,
    coded_problem,
    state_dtype,
    state_of_average,
    warning_of_stuck,
)
from stac_optimizer.rule.common import joined, warning_of_lost_steps
from stac_optimizer.rule.state import count_step_
from stac_optimizer.tensors import rounding
from stac_optimizer.tensors.units.pieces import Lists
from stac_optimizer.validation import boolean, one_of, unit_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Signum", "SignumRule"]


def _encoding(name: str, value: Any) -> str | None:
    chosen: str | None = one_of(name, value, (None, *ENCODINGS))
    return chosen


class SignumRule(Rule):
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
    :math:`\mu`                  ``momentum``; 0 takes :math:`m = g` and keeps no state
    :math:`m`                    state ``exp_avg``, as the parameter or in ``state_dtype``
    mask :math:`[m \cdot g > 0]` with ``cautious``: sign(m) becomes sign(m) · mask / max(mean(mask), 1e-3)
    ============================ =========================================================

    State: ``step`` (0-dim float32, read by what rounds by chance alone) and ``exp_avg``; where that is in 8-bit codes
    also ``exp_avg_scale``, see ``tensors/codes.py``. The sign is that of m before it is rounded to be stored. Codes are
    rounded by chance, with ``stochastic_rounding`` bfloat16 averages too: else they would keep their sign where m
    changes by less than their spacing.

    With ``vote``, which :class:`stac_optimizer.MajorityVote` sets, each rank keeps an m of its own gradients, and
    sign(m) becomes the sign of the sum of all ranks' sign(m).
    """

    name = "signum"
    # Sign steps move every weight by the full lr, so a trunk takes a smaller one than the cap beside it.
    lr_ratio = 0.75
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "momentum": Hyperparameter(default=0.9, check=unit_fraction),
        "cautious": Hyperparameter(default=False, check=boolean),
        "state_dtype": Hyperparameter(default=None, check=state_dtype),
        "vote": Hyperparameter(default=None, check=_encoding),
    }
    # The host waits for the votes of others, and masks and recorded steps know of one rank's gradients alone.
    excluded = (("vote", "cautious"), ("vote", "differentiable"), ("vote", "capturable"))
    state_keys = AVERAGE_KEYS
    paths = frozenset({"single", "foreach", "fused"})
    votes = True

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return state_of_average(param, group)

    def walks_on(self, group: Group) -> bool:
        return bool(group["momentum"]) and not group["cautious"]

    def can_lack(self, key: str, state: Mapping[str, Tensor]) -> bool:
        return can_lack_scale(key, state)

    def parameter_problem(self, param: Tensor, group: Group) -> str | None:
        if group["vote"] and is_sharded(param):
            return (
                "is a DTensor, whose gradients FSDP2 averages, and ranks vote on what each has by itself; give "
                "fully_shard the trunk's parameters as ignored_params"
            )
        return coded_problem(param, group) or super().parameter_problem(param, group)

    def warning(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        return joined(warning_of_lost_steps(names, params, group), warning_of_stuck(names, params, group))

    def path(self, params: Sequence[Tensor], group: Group) -> str:
        path = super().path(params, group)
        if path == "fused" and not has_fused(params):
            path = super().path(params, {**group, "fused": None})
        # Masks, codes and stochastic rounding have no form on lists of tensors.
        is_listed = not (group["cautious"] or group["stochastic_rounding"])
        return "single" if path == "foreach" and not (is_listed and group["state_dtype"] != "int8") else path

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        return skips_by_itself(group, states)

    def step(self, inputs: StepInputs) -> None:
        """Count, then run the path that the flags ask for."""
        steps = inputs.states[COUNTER.key]
        has_noise = inputs.group["stochastic_rounding"] or "exp_avg_scale" in inputs.states
        count_step_(steps, inputs.found_inf, never_stops=has_noise)
        seeds = _noise_seeds(inputs) if has_noise else None
        for work in _by_state_kind(inputs, seeds):
            if inputs.voters is not None:
                by_vote(work, inputs.voters)
            else:
                KERNELS[self.path(work.params, work.group)](work)

    def average_state(
        self, params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], voters: Voters
    ) -> None:
        for param in params:
            state = states.get(param, {})
            if "exp_avg" in state:
                average_over_ranks(state["exp_avg"], state.get("exp_avg_scale"), param, voters)


def _noise_seeds(inputs: StepInputs) -> Tensor:
    """A number for each parameter.

    Codes alone get the same ones in all parameters: they are then the same wherever parameters are dealt out over
    ranks, each of which counts its own.
    """
    positions = inputs.positions if inputs.group["stochastic_rounding"] else [0] * len(inputs.params)
    offsets = list(map(run_offset, inputs.params))
    counts = rounding.counts(inputs.states[COUNTER.key])
    return rounding.noise_seeds(inputs.group["rounding_seed"], positions, counts, offsets=offsets)


KERNELS: Mapping[str, Callable[[SignUpdate], None]] = {
    "single": single_tensor,
    "foreach": multi_tensor,
    "fused": fused,
}


def _by_state_kind(inputs: StepInputs, seeds: Tensor | None) -> list[SignUpdate]:
    """The update of what has averages in codes, with their scales, and of what has none.

    A checkpoint may have brought floating-point averages where new ones would be in codes.
    """
    averages = inputs.states.get("exp_avg")
    lists = Lists(
        real_parts(inputs.params),
        real_parts(inputs.grads, inputs.params),
        [] if averages is None else [real_parts(averages)],
        real_parts(inputs.states["exp_avg_scale"]) if "exp_avg_scale" in inputs.states else None,
    )
    work = SignUpdate(inputs.params, lists, inputs.group, inputs.grad_scale, seeds, inputs.found_inf)
    if lists.scales is None:
        return [work]
    are_coded = [average.dtype == torch.int8 for average in lists.states[0]]
    coded, plain = ([i for i, flag in enumerate(are_coded) if flag is kind] for kind in (True, False))
    plain_seeds = seeds if inputs.group["stochastic_rounding"] else None
    rest = work.using(work.params, Lists(lists.params, lists.grads, lists.states), plain_seeds)
    return [part.only(chosen) for part, chosen in ((work, coded), (rest, plain)) if chosen]


class Signum(RuleOptimizer):
    r"""The sign of a gradient average: one state tensor a weight, every step exactly lr long.

    .. math::
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay}), \quad
        m \leftarrow m + (1 - \mu)(g - m), \quad
        p \leftarrow p - \text{lr} \cdot \operatorname{sign}(m)

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: how far a step moves each weight, in [0, inf); a float or a one-element tensor.
        momentum: :math:`\mu`, factor of the gradient average in [0, 1); 0: plain signSGD without averages.
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        cautious: move a weight only where sign(m) agrees with the sign of the present gradient, and divide the step by
            the share of such weights in the tensor, floored at 1e-3.
        state_dtype: what averages are held in. None: the weight's dtype; ``torch.bfloat16``; ``torch.int8``: codes of
            8 bits with a scale for each 128 weights of a row, rounded by chance (``rounding_seed``), which above a
            momentum of 0.99 is a noise that may turn the sign of averages below a hundredth of their block's largest.
            Or its name, ``"bfloat16"`` or ``"int8"``.
        vote: a :class:`stac_optimizer.MajorityVote`: ranks vote on steps instead of averaging gradients. Excludes
            ``cautious``, ``capturable`` and ``differentiable``.
        **flags: see :class:`stac_optimizer.rule.Flags`. ``fused=True``: one pass over memory, on the CPU by a kernel
            that a C++ compiler makes at the first step, on CUDA by one Triton launch.

    State: ``step`` (0-dim float32), ``exp_avg`` (as the weight, or in ``state_dtype``; absent at momentum 0),
    ``exp_avg_scale`` (float32, rows x blocks, with codes).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import Signum
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
        >>> optimizer = Signum([weight], lr=0.25)
        >>> weight.grad = torch.tensor([3.0, -0.1, 0.0])
        >>> optimizer.step()
        >>> weight.tolist()
        [0.75, -0.75, 0.5]

    References:
        signSGD with Majority Vote, https://arxiv.org/abs/1810.05291; Cautious Optimizers,
        https://arxiv.org/abs/2411.16085.
    """

    rule = SignumRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        state_dtype: torch.dtype | str | None = None,
        vote: MajorityVote | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        values = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "vote": None if vote is None else getattr(vote, "encoding", vote),
            **flags,
        }
        super().__init__(params, values, vote=vote)
