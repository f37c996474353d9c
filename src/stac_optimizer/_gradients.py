"""What is asked, of gradients above all, before a step changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stac_optimizer._groups import name_of, named_parameters
from stac_optimizer._shards import are_zero, first_nonfinite, local_views
from stac_optimizer.rules import RULES, Group
from stac_optimizer.vote import Voters

__all__ = ["check_capture", "check_scaler", "check_step"]


def check_capture(groups: Sequence[Group]) -> None:
    """Refuse to be captured in a CUDA graph with counters on the host, which a replay would not move.

    Raises:
        RuntimeError: the present stream is being captured, and a group is not capturable.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return
    if torch.cuda.is_current_stream_capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError("a CUDA graph captures this step, but capturable is False; build STAC with capturable=True")


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


def check_finite(groups: Sequence[Group], *, here: bool = False) -> None:
    """Refuse NaN and infinity in the gradients of groups that ask for it; a collective where they are sharded.

    Args:
        groups: those to step.
        here: whether to look at what this rank holds alone, and call no others.

    Raises:
        RuntimeError: naming the first parameter with one.
    """
    held = [
        (name, group["stac_role"], param)
        for name, param, group in named_parameters(groups)
        if group["error_if_nonfinite"] or group["trunk_vote"]
    ]
    # Absent gradients too, for they may be absent on some ranks alone.
    params = [param for _, _, param in held]
    found = first_nonfinite([param.grad for param in params], params, here=here)
    if found is not None:
        name, role, _ = held[found]
        raise RuntimeError(
            f"the gradient of {name!r} ({role}) holds NaN or infinity. Nothing was changed; skip this batch, lower "
            "the lr or clip gradients, or (without vote) pass error_if_nonfinite=False to let the weight become NaN"
        )


def _agree(voters: Voters, groups: Sequence[Group], *, is_first: bool) -> bool:
    """The checks of :func:`check_step` on all ranks, after which the rules of each find the same gradients to act on.

    Those that only some ranks have become zeros on the others; those that are not voted on, the mean over ranks.
    """
    voters.refuse_join()
    error: RuntimeError | None = None
    makes_state = False
    try:
        check_gradients(groups, groups, rest_may_have_changed=False)
        check_finite(groups, here=True)
        makes_state = is_first and only_make_state(groups, here=True)
    except RuntimeError as raised:
        error = raised
    params = [param for group in groups for param in group["params"]]
    flags = [error is not None, not makes_state, *(param.grad is not None for param in params)]
    has_failed, moves, *has_gradient = voters.on_any(flags, local_views(params[:1])[0].device)
    if has_failed:
        messages = enumerate(voters.gather(None if error is None else str(error)))
        found = "; ".join(f"rank {rank}: {message}" for rank, message in messages if message is not None)
        raise RuntimeError(f"no rank can step: {found}") from error
    for param, is_wanted in zip(params, has_gradient, strict=True):
        if is_wanted and param.grad is None:
            param.grad = torch.zeros_like(param)
    if moves:
        voters.average_gradients_(
            param for group in groups if not RULES[group["rule"]].votes for param in group["params"]
        )
    return not moves


def check_step(
    groups: Sequence[Group],
    all_groups: Sequence[Group],
    *,
    voters: Voters | None,
    is_scaled: bool,
    is_first: bool,
    rest_may_have_changed: bool,
) -> bool:
    """All checks of gradients; a collective where ranks vote.

    Args:
        groups: those to step.
        all_groups: the optimizer's, which know the names.
        voters: the ranks that vote, or None.
        is_scaled: whether a GradScaler has multiplied the gradients, and looked for NaN and infinity.
        is_first: whether this may be the hidden step that makes state.
        rest_may_have_changed: as for :func:`check_gradients`.

    Returns:
        Whether the step is only to make state.

    Raises:
        RuntimeError: what is wrong; where ranks vote on every rank, what is wrong on any.
    """
    if voters is not None:
        return _agree(voters, groups, is_first=is_first)
    check_gradients(groups, all_groups, rest_may_have_changed=rest_may_have_changed)
    if not is_scaled and any(group["error_if_nonfinite"] for group in groups):
        check_finite(groups)
    return is_first and only_make_state(groups)


def only_make_state(groups: Sequence[Group], *, here: bool = False) -> bool:
    """Whether a first step is the hidden one of torch.distributed.checkpoint, which is after the state alone.

    It has no lr and no gradient but zeros. To count it would change AdamW's bias correction for all later steps.
    """
    if torch.compiler.is_compiling() or any(group["lr"] for group in groups):
        return False
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return are_zero(grads, here=here)
