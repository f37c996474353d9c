"""What is asked, of gradients above all, before a step changes anything. Changes nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from stac_optimizer.distributed.scans import are_zero, first_nonfinite
from stac_optimizer.model.names import name_of, named_parameters
from stac_optimizer.rule import Group, Rule
from stac_optimizer.rule.contract import REAL_DTYPES

__all__ = ["check_capture", "check_finite", "check_gradients", "check_scaler", "check_step", "only_makes_state"]

STRIDED = torch.strided


def check_capture(groups: Sequence[Group]) -> None:
    """Refuse to be captured in a CUDA graph with counters on the host, which a replay would not move.

    Raises:
        RuntimeError: the present stream is being captured, and a group is not capturable.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing() and not all(group.get("capturable") for group in groups):
        raise RuntimeError(
            "a CUDA graph captures this step, but capturable is False; build the optimizer with capturable=True"
        )


def check_scaler(*, is_scaled: bool, votes: bool) -> None:
    """Refuse what would part ranks that vote.

    Raises:
        RuntimeError: a GradScaler steps, and ranks vote.
    """
    if is_scaled and votes:
        raise RuntimeError(
            "a GradScaler's scale follows the gradients of its own rank, and so would part ranks that vote; train in "
            "bfloat16 without a scaler (or with enabled=False)"
        )


def check_gradients(
    groups: Sequence[Group], all_groups: Sequence[Group], rules: Mapping[str, Rule], *, rest_may_have_changed: bool
) -> None:
    """Refuse gradients that cannot be applied.

    Args:
        groups: those to step.
        all_groups: the optimizer's, which know the names.
        rules: by the name that groups hold.
        rest_may_have_changed: whether other parameters may have been updated before, in this backward.

    Raises:
        RuntimeError: naming the first.
    """
    unchanged = "It was not changed" if rest_may_have_changed else "Nothing was changed"
    for group in groups:
        rule = rules[group["rule"]]
        takes_plain = rule.takes_plain(group)
        for param in group["params"]:
            grad = param.grad
            # At one look, for there may be thousands.
            if takes_plain and type(grad) is Tensor and type(param) is Parameter:
                dtype = grad.dtype
                if dtype in REAL_DTYPES and dtype is param.dtype and grad.layout is STRIDED:
                    continue
            reason = None if grad is None else rule.gradient_problem(param, grad, group)
            if reason is not None:
                role = group.get("stac_role", group["rule"])
                raise RuntimeError(f"{name_of(all_groups, param)!r} ({role}) {reason}. {unchanged}")


def check_finite(groups: Sequence[Group], *, here: bool = False, unchanged: str = "Nothing was changed") -> None:
    """Refuse NaN and infinity in the gradients of groups that ask for it; a collective where they are sharded.

    Args:
        groups: those to step.
        here: whether to look at what this rank holds alone, and call no others.
        unchanged: what the message says of the parameters.

    Raises:
        RuntimeError: naming the first parameter with one.
    """
    held = [
        (name, group.get("stac_role", group["rule"]), param)
        for name, param, group in named_parameters(groups)
        if group["error_if_nonfinite"] or group.get("vote")
    ]
    # Absent gradients too, for they may be absent on some ranks alone.
    params = [param for _, _, param in held]
    found = first_nonfinite([param.grad for param in params], params, here=here)
    if found is not None:
        name, role, _ = held[found]
        raise RuntimeError(
            f"non-finite gradients: that of {name!r} ({role}) holds NaN or infinity. {unchanged}; skip "
            "this batch, lower the lr or clip gradients, or (without vote) pass error_if_nonfinite=False to let the "
            "weight become NaN"
        )


def check_step(
    groups: Sequence[Group],
    all_groups: Sequence[Group],
    rules: Mapping[str, Rule],
    *,
    is_scaled: bool,
    rest_may_have_changed: bool,
) -> None:
    """All checks of gradients, where ranks do not vote; see ``voting.py`` for where they do.

    Args:
        groups: those to step.
        all_groups: the optimizer's, which know the names.
        rules: by the name that groups hold.
        is_scaled: whether a GradScaler has multiplied the gradients, and looked for NaN and infinity.
        rest_may_have_changed: as for :func:`check_gradients`.

    Raises:
        RuntimeError: what is wrong.
    """
    check_gradients(groups, all_groups, rules, rest_may_have_changed=rest_may_have_changed)
    if not is_scaled and any(group["error_if_nonfinite"] for group in groups):
        check_finite(groups)


def only_makes_state(groups: Sequence[Group], *, here: bool = False) -> bool:
    """Whether a first step is the hidden one of torch.distributed.checkpoint, which is after the state alone.

    It has no lr and no gradient but zeros. To count it would change AdamW's bias correction for all later steps.
    """
    if torch.compiler.is_compiling() or any(group.get("lr") for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return are_zero(grads, here=here)
