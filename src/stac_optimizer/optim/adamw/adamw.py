"""AdamW and AMSGrad. STAC's cap. The state is declared here, the arithmetic is torch's functional entry.

Decoupled Weight Decay Regularization (Loshchilov and Hutter), https://arxiv.org/abs/1711.05101, and On the Convergence
of Adam and Beyond (Reddi et al.), https://openreview.net/forum?id=ryQu7f-RZ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.distributed.shards import conjugated, local_views, run_offset
from stac_optimizer.optim.adamw.paths import adamw_in_blocks, fused_adamw, is_walkable, rounding_adamw
from stac_optimizer.optim.adamw.update import AdamWUpdate, call_adamw
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import COUNTER, Flags, Group, Hyperparameter, Rule, StateTensor, StepInputs
from stac_optimizer.tensors.torch_private import capturable_devices, fused_devices
from stac_optimizer.validation import boolean, non_negative, pair_of_fractions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdamW", "AdamWRule"]

STATE = (COUNTER, StateTensor(key="exp_avg"), StateTensor(key="exp_avg_sq"))
AMSGRAD_STATE = (*STATE, StateTensor(key="max_exp_avg_sq"))


class AdamWRule(Rule):
    """``torch.optim.AdamW`` to the bit, on each of its paths.

    State: ``step`` (0-dim float32), ``exp_avg`` and ``exp_avg_sq`` (as the parameter), with ``amsgrad`` also
    ``max_exp_avg_sq``. One lr moves a weight by about lr.
    """

    name = "adamw"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "betas": Hyperparameter(default=(0.9, 0.999), check=pair_of_fractions),
        "eps": Hyperparameter(default=1e-8, check=non_negative),
        "amsgrad": Hyperparameter(default=False, check=boolean),
    }
    state_keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    paths = frozenset({"single", "foreach", "fused"})
    counts_at_once = False

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        """The counter and two averages, three tensors under ``amsgrad``."""
        return AMSGRAD_STATE if group["amsgrad"] else STATE

    def gradient_problem(self, param: Tensor, grad: Tensor, group: Group) -> str | None:
        """What torch's AdamW would find out in the middle of its update."""
        problem = super().gradient_problem(param, grad, group)
        if problem is not None:
            return problem
        if grad.dtype != param.dtype:
            return f"is {param.dtype} and its gradient {grad.dtype}; AdamW needs one dtype, so convert the gradient"
        if group["fused"] and not (param.is_floating_point() and (param.is_cpu or _is_on(param, fused_devices))):
            return f"is {param.dtype} on {param.device.type!r}, for which torch has no fused AdamW; use fused=False"
        if group["capturable"] and not (torch.compiler.is_compiling() or _is_on(param, capturable_devices)):
            return f"is on {param.device.type!r}, which cannot be captured; use capturable=False"
        return None

    def takes_plain(self, group: Group) -> bool:
        has_conditions = group["differentiable"] or group["stochastic_rounding"] or group["capturable"]
        return not (has_conditions or group["fused"])

    def skips_by_itself(self, group: Group, states: Mapping[Tensor, Mapping[str, Tensor]]) -> bool:
        if not group["fused"] or group["stochastic_rounding"]:
            return False
        params = local_views(group["params"])
        held = [local_views(list(states.get(whole, {}).values())) for whole in group["params"]]
        return not any(param.is_cpu for param in params) and all(map(is_walkable, params, held))

    def step(self, inputs: StepInputs) -> None:
        """Call torch, on the path that the flags ask for."""
        weights, grads = local_views(inputs.params), conjugated(local_views(inputs.grads, inputs.params))
        steps, *averages = [local_views(tensors) for tensors in inputs.states.values()]
        group = inputs.group
        work = AdamWUpdate(inputs.params, weights, grads, steps, averages, group, inputs.grad_scale, inputs.found_inf)
        path = self.path(inputs.params, group)
        if group["stochastic_rounding"]:
            rounding_adamw(work, inputs.positions, list(map(run_offset, inputs.params)))
        elif path == "fused":
            fused_adamw(work)
        elif path == "foreach" and not weights[0].is_cpu:
            call_adamw(work, foreach=group["foreach"])
        else:
            adamw_in_blocks(work, foreach=path == "foreach")


def _is_on(param: Tensor, devices: Callable[[], Sequence[str]]) -> bool:
    return param.device.type in devices()


class AdamW(RuleOptimizer):
    r"""``torch.optim.AdamW``, to the bit, with the flags and checks of this package.

    .. math::
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay}), \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \text{lr} \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Its step works in blocks of bounded memory where torch's allocates copies of all parameters, and it refuses what it
    cannot apply before anything has changed.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts with hyper-parameters of their own.
        lr: about how far a step moves each weight, in [0, inf); a float or a one-element tensor.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`, in [0, inf).
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        amsgrad: whether to divide by the maximum of all :math:`v` so far.
        **flags: see :class:`stac_optimizer.rule.Flags`. ``fused=True``: torch's fused kernel.

    State: ``step`` (0-dim float32), ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` ``max_exp_avg_sq`` (as the weight).
    Checkpoints of ``torch.optim.AdamW`` load.

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import AdamW
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = AdamW([weight], lr=0.25, weight_decay=0.0)
        >>> weight.grad = torch.tensor([3.0, -0.1])
        >>> optimizer.step()
        >>> [round(value, 4) for value in weight.tolist()]
        [0.75, -0.75]

    References:
        Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101.
    """

    rule = AdamWRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, **flags}
        super().__init__(params, values)
