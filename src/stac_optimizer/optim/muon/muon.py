"""Muon: the sign of the whole matrix of a gradient average, with decoupled weight decay. A trunk of matrices.

The products stand in ``newton_schulz.py``, what is a matrix in ``matrices.py``.

References: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024),
https://kellerjordan.github.io/posts/muon/; Muon is Scalable for LLM Training (Liu et al.),
https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stac_optimizer.optim.muon.matrices import RATIOS, dtype_of_products, ratio_of, rms_of, signs_of_matrices
from stac_optimizer.optimizer import RuleOptimizer
from stac_optimizer.rule import (
    Flags,
    Group,
    Hyperparameter,
    Rule,
    StateLists,
    StateTensor,
    TensorList,
    Wholes,
)
from stac_optimizer.rule.averages import (
    AVERAGE_KEYS,
    can_lack_scale,
    coded_problem,
    state_dtype,
    state_of_average,
    warning_of_stuck,
)
from stac_optimizer.rule.common import decay_, joined, mask_, warning_of_lost_steps
from stac_optimizer.validation import boolean, count, finite, named_dtype, one_of, unit_fraction

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Muon", "MuonRule"]


def _positive(name: str, value: Any) -> int:
    return count(name, value, least=1)


def _coefficients(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a tuple of three numbers, got {value!r} of type {type(value).__name__}")
    if len(value) != 3:
        raise ValueError(f"{name} must be a tuple of three numbers, got {value!r}")
    return tuple(finite(f"{name}[{place}]", number) for place, number in enumerate(value))


def _ratio(name: str, value: Any) -> str:
    chosen: str = one_of(name, value, tuple(RATIOS))
    return chosen


def _ns_dtype(name: str, value: Any) -> str | None:
    return named_dtype(name, value, {"bfloat16": torch.bfloat16, "float32": torch.float32})


class MuonRule(Rule):
    r"""Moves a matrix by the sign of the matrix of a gradient average.

    For parameter :math:`p`, gradient :math:`g` (negated under ``maximize``), average :math:`m` with :math:`m_0 = 0`, in
    this order:

    .. math::
        p &\leftarrow p \cdot (1 - \text{lr} \cdot \text{weight\_decay}) \\
        m &\leftarrow m + (1 - \mu)(g - m) \\
        d &= g + \mu (m - g) \quad \text{(nesterov; else } d = m) \\
        p &\leftarrow p - \text{lr} \cdot r \cdot \operatorname{msign}(d)

    ============================== ==================================================================================
    paper                          here
    ============================== ==================================================================================
    :math:`\mu`                    ``momentum``; 0 takes :math:`d = g` and keeps no state
    :math:`m`                      state ``exp_avg``, as the parameter or in ``state_dtype``
    :math:`r`                      ``adjust_lr``, of rows and columns
    msign, :math:`U V^\top`        ``newton_schulz.py``: ``ns_steps``, ``ns_coefficients``
    ============================== ==================================================================================

    With ``cautious`` the step becomes step · [step · g > 0] / max(mean of the mask, 1e-3).
    """

    name = "muon"
    needs = "matrix"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "momentum": Hyperparameter(default=0.95, check=unit_fraction),
        "nesterov": Hyperparameter(default=True, check=boolean),
        "ns_steps": Hyperparameter(default=5, check=_positive),
        "ns_coefficients": Hyperparameter(default=(3.4445, -4.775, 2.0315), check=_coefficients),
        "ns_dtype": Hyperparameter(default=None, check=_ns_dtype),
        "adjust_lr": Hyperparameter(default="match_rms_adamw", check=_ratio),
        "cautious": Hyperparameter(default=False, check=boolean),
        "row_blocks": Hyperparameter(default=1, check=_positive),
        "batch_dims": Hyperparameter(default=0, check=count),
        "state_dtype": Hyperparameter(default=None, check=state_dtype),
        "share_work": Hyperparameter(default=False, check=boolean),
    }
    state_keys = AVERAGE_KEYS

    def state(self, param: Tensor, group: Group) -> tuple[StateTensor, ...]:
        return state_of_average(param, group)

    def can_lack(self, key: str, state: Mapping[str, Tensor]) -> bool:
        return can_lack_scale(key, state)

    def parameter_problem(self, param: Tensor, group: Group) -> str | None:
        batch_dims, row_blocks = group["batch_dims"], group["row_blocks"]
        if self.takes(param) and param.ndim < batch_dims + 2:
            return (
                f"has the shape {tuple(param.shape)}, which holds no matrices behind batch_dims={batch_dims} "
                "dimensions; give batch_dims to stacks of matrices alone, by overrides or a group of their own"
            )
        if self.takes(param) and param.shape[batch_dims] % row_blocks:
            return (
                f"has {param.shape[batch_dims]} rows, which row_blocks={row_blocks} does not divide; give row_blocks "
                "to such parameters alone, by overrides or a group of their own"
            )
        return coded_problem(param, group) or super().parameter_problem(param, group)

    def warning(self, names: Sequence[str], params: Sequence[Tensor], group: Group) -> str | None:
        # A step of an element is so long, of lr, in the root mean square.
        lengths = [rms_of(param.shape, group) for param in params]
        return joined(warning_of_lost_steps(names, params, group, lengths), warning_of_stuck(names, params, group))

    def update(self, params: TensorList, grads: TensorList, state: StateLists, group: Group, wholes: Wholes) -> None:
        momentum, directions = group["momentum"], grads
        decay_(params, group)
        if momentum:
            averages = state["exp_avg"]
            torch._foreach_lerp_(averages, grads, 1 - momentum)
            directions = list(torch._foreach_lerp(grads, averages, momentum)) if group["nesterov"] else averages
        signs_of, dtype_of = partial(signs_of_matrices, group=group), partial(dtype_of_products, group=group)
        signs = wholes.apply(signs_of, directions, dtype_of)
        if group["cautious"]:
            signs = [sign.to(param.dtype) for param, sign in zip(params, signs, strict=True)]
            mask_(signs, grads, wholes)
        for param, sign, shape in zip(params, signs, wholes.shapes, strict=True):
            length = group["lr"] * ratio_of(shape, group)
            if isinstance(length, Tensor):
                param.sub_(sign.to(param.dtype) * length)
            else:
                param.add_(sign, alpha=-length)


class Muon(RuleOptimizer):
    r"""The sign of the matrix of a gradient average: one state tensor a weight, all directions of a matrix alike.

    .. math::
        p \leftarrow p (1 - \text{lr} \cdot \text{weight\_decay}), \quad
        m \leftarrow m + (1 - \mu)(g - m), \quad
        p \leftarrow p - \text{lr} \cdot r \cdot \operatorname{msign}(g + \mu (m - g))

    msign(d) is :math:`U V^\top` of :math:`d = U S V^\top`, by Newton-Schulz iterations. A parameter of more than two
    dimensions, as of a convolution, is a matrix of its first dimension by the rest. Vectors are refused: give them, as
    well as embeddings and the last layer, to AdamW, which :class:`stac_optimizer.STAC` does for a whole model.

    Args:
        params: matrices, (name, matrix) pairs, or group dicts with hyper-parameters of their own.
        lr: in [0, inf); a float or a one-element tensor. With ``adjust_lr="match_rms_adamw"`` a step moves a weight by
            0.2 lr in the root mean square, as AdamW's does, so AdamW's lr and decay serve.
        momentum: :math:`\mu`, factor of the gradient average in [0, 1); 0: no average, no state.
        nesterov: take the sign of the average as it would be after the same gradient again; else of m.
        weight_decay: decoupled, multiplied by lr, in [0, inf).
        ns_steps: Newton-Schulz iterations, 1 or more.
        ns_coefficients: a, b and c of their polynomial a s + b s^3 + c s^5 of singular values.
        ns_dtype: of their products, ``torch.bfloat16`` or ``torch.float32``, or the name. None: bfloat16 on CUDA, and
            on CPUs that have instructions for it, from 64 rows and columns on; else the weight's, float32 at least.
        adjust_lr: :math:`r` for a matrix of so many rows and columns. ``"match_rms_adamw"``: 0.2 sqrt(max(rows,
            columns)); ``"original"``: sqrt(max(1, rows / columns)); ``"spectral"``: sqrt(rows / columns).
        cautious: move a weight only where its step agrees with the sign of the present gradient, and divide by the
            share of such weights in the parameter, floored at 1e-3.
        row_blocks: how many equal blocks of rows are matrices by themselves, 1 or more: 3 for fused query, key and
            value, the number of groups for a grouped convolution.
        batch_dims: how many leading dimensions count matrices, 0 or more: 1 for stacked experts. One whose gradients
            stop, as an idle expert's, keeps moving at full speed while its average fades; ``cautious`` holds it.
        state_dtype: what averages are held in. None: the weight's dtype; ``torch.bfloat16``; ``torch.int8``: codes of
            8 bits with a scale for each 128 weights of a row, rounded by chance (``rounding_seed``). Or its name.
        share_work: ranks of the default process group, which hold the same weights and gradients as under DDP, compute
            a share of the matrices each and send each other the results. All must have gradients for the same
            parameters. Of sharded parameters they always do.
        **flags: see :class:`stac_optimizer.rule.Flags`. ``foreach``: matrices of one shape, or of its transpose, in
            batched products.

    State: ``step`` (0-dim float32), ``exp_avg`` (as the weight, or in ``state_dtype``; absent at momentum 0),
    ``exp_avg_scale`` (float32, rows x blocks, with codes).

    Raises:
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: an argument out of range, a misspelt group key, a parameter that is no matrix.
        RuntimeError: from :meth:`step`, before anything has changed: a gradient that cannot be applied.

    Example:
        >>> import torch
        >>> from stac_optimizer.optim import Muon
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> optimizer = Muon([weight], lr=1.0, ns_steps=12, ns_coefficients=(1.5, -0.5, 0.0), ns_dtype=torch.float32)
        >>> weight.grad = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
        >>> optimizer.step()
        >>> [[round(value, 3) for value in row] for row in weight.tolist()]
        [[-0.346, 0.0, 0.0], [0.0, -0.346, 0.0]]

    References:
        Muon: An optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/; Muon is
        Scalable for LLM Training, https://arxiv.org/abs/2502.16982.
    """

    rule = MuonRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        adjust_lr: str = "match_rms_adamw",
        *,
        ns_dtype: torch.dtype | str | None = None,
        cautious: bool = False,
        row_blocks: int = 1,
        batch_dims: int = 0,
        state_dtype: torch.dtype | str | None = None,
        share_work: bool = False,
        **flags: Unpack[Flags],
    ) -> None:
        values = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adjust_lr": adjust_lr,
            "ns_dtype": ns_dtype,
            "cautious": cautious,
            "row_blocks": row_blocks,
            "batch_dims": batch_dims,
            "state_dtype": state_dtype,
            "share_work": share_work,
            **flags,
        }
        super().__init__(params, values)
