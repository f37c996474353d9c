"""What is asked, of gradients above all, before a step changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stac_optimizer._groups import name_of, named_parameters
from stac_optimizer._tensors import are_zero, first_nonfinite
from stac_optimizer.rules import RULES, Group

__all__ = ["check_capture", "check_finite", "check_gradients", "only_make_state"]


def check_capture(groups: Sequence[Group]) -> None:
    """Refuse to be captured in a CUDA graph with counters on the host, which a replay would not move.

    Raises:
        RuntimeError: the present stream is being captured, and a group is not capturable.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError("a CUDA graph captures this step, but capturable is False; build STAC with capturable=True")


def check_gradients(groups: Sequence[Group], all_groups: Sequence[Group], *, rest_may_have_changed: bool) -> None:
    """Refuse gradients that cannot be applied.

    Args:
        groups: those to step.
        all_groups: the optimizer's, which know the names.
        rest_may_have_changed: whether other parameters may have been updated before, in this backward.

    Raises:
        RuntimeError: naming the first.
    """
    unchanged = "It was not changed" if rest_may_have_changed else "Nothing was changed"
    for group in groups:
        refusal = RULES[group["rule"]].refusal
        for param in group["params"]:
            grad = param.grad
            reason = None if grad is None else refusal(param, grad, group)
            if reason is not None:
                raise RuntimeError(f"{name_of(all_groups, param)!r} ({group['stac_role']}) {reason}. {unchanged}")


def check_finite(groups: Sequence[Group]) -> None:
    """Refuse NaN and infinity in the gradients of groups that ask for it.

    Raises:
        RuntimeError: naming the first parameter with one.
    """
    held = [
        (name, group["stac_role"], param, param.grad)
        for name, param, group in named_parameters(groups)
        if group["error_if_nonfinite"] and param.grad is not None
    ]
    found = first_nonfinite([grad for _, _, _, grad in held], [param for _, _, param, _ in held])
    if found is not None:
        name, role, *_ = held[found]
        raise RuntimeError(
            f"the gradient of {name!r} ({role}) holds NaN or infinity. Nothing was changed; skip this batch, lower "
            "the lr or clip gradients, or pass error_if_nonfinite=False to let the weight become NaN"
        )


def only_make_state(groups: Sequence[Group]) -> bool:
    """Whether a first step is the hidden one of torch.distributed.checkpoint, which is after the state alone.

    It has no lr and no gradient but zeros. To count it would change AdamW's bias correction for all later steps.
    """
    if torch.compiler.is_compiling() or any(group["lr"] for group in groups):
        return False
    return are_zero([param.grad for group in groups for param in group["params"] if param.grad is not None])
