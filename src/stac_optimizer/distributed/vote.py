"""Majority votes of ranks on the trunk's steps: what a user gives to STAC, and the collectives behind it.

Knows no rule: what is voted on, the rules put into a :class:`stac_optimizer.distributed.ballots.Ballot`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stac_optimizer.distributed.ballots import Ballot, PackedBallot, SummedBallot
from stac_optimizer.distributed.shards import is_sharded
from stac_optimizer.other_steps import hear
from stac_optimizer.tensors.torch_private import is_joining
from stac_optimizer.validation import one_of

__all__ = ["ENCODINGS", "MajorityVote", "Voters"]

ENCODINGS = ("ternary", "binary", "int8")
# What a sum of so many signs stays within.
MOST_INT8_VOTERS = 127


@dataclass(frozen=True)
class MajorityVote:
    r"""Ranks vote on the trunk's steps instead of averaging its gradients.

    Each rank keeps the gradient average :math:`m_r` of its own data alone, and all move a weight by the sign of the sum
    of votes:

    .. math::
        p \leftarrow p - \text{lr} \cdot \operatorname{sign}\Big(\sum_r \operatorname{sign}(m_r)\Big)

    In place of 32 bits a weight, a rank sends 2 (ternary) or 1 (binary), and hears of as many or of 2. The cap's
    gradients are averaged as usual. It pays where the network limits training: many ranks on slow links, or a step that
    is short beside its all-reduce. On fast links within one machine, averaging costs little and votes cost arithmetic.
    With few ranks the majority of signs is a coarser direction than the sign of the mean.

    Args:
        process_group: the ranks that vote; None: those of the DistributedDataParallel that STAC gets, else all.
        encoding: how votes travel.

            - ``"ternary"``: up, down, or neither where the average is 0. Two bits a weight.
            - ``"binary"``: up or down, and 0 counts as down the gradient: a weight without gradient drifts wherever no
              majority holds it. One bit a weight.
            - ``"int8"``: the votes of ``"ternary"`` as a sum of bytes by one all-reduce, of at most 127 ranks, for
              process groups without all-to-all.

    A weight on which as many ranks vote up as down stays. Give it to STAC on every rank:

    - ``STAC(ddp, vote=MajorityVote())`` with a DistributedDataParallel model puts a communication hook on it, which
      averages the cap's gradients alone; a model has one hook at most, and it must come before the first backward.
      (Given ``ddp.module``, STAC cannot do so: DistributedDataParallel then averages all, and all vote alike.)
      Once the optimizer is gone, the hook averages all. While it lives, another that steps on what was left to votes
      raises.
    - With a plain module, the same weights on every rank, STAC averages the cap's gradients in ``step``, in place. It
      does so too after a backward under ``no_sync``.
    - With FSDP2, give ``fully_shard`` the trunk's parameters as ``ignored_params``, which torch 2.6 does not know yet;
      it averages those of the cap.

    Gradients may be accumulated. One that is absent on some ranks alone counts as zero there, as under
    DistributedDataParallel. NaN or infinity on any rank raises on all of them, before anything has changed. Clip
    the roles apart: ``clip_grad_norm_(optimizer.partition.trunk_parameters, ...)`` changes a rank's own averages alone,
    and gradients of the cap that are averaged by then have the same norm everywhere; a norm over both would differ by
    rank and part their caps. Where STAC averages the cap, in ``step``, each rank clips its own share of the mean. A
    GradScaler, whose scale would differ by rank, and DistributedDataParallel's ``join`` are refused.

    Each rank's averages are its own. To resume exactly, save ``optimizer.state_dict()`` on every rank and load each
    rank's own. To go on with another number of ranks, or from one file for all, call
    :meth:`stac_optimizer.STAC.average_trunk_state` before saving.

    References:
        signSGD, https://arxiv.org/abs/1802.04434; signSGD with Majority Vote, https://arxiv.org/abs/1810.05291;
        Distributed Lion, https://arxiv.org/abs/2404.00438; Lion Cub, https://arxiv.org/abs/2411.16462.
    """

    process_group: dist.ProcessGroup | None = None
    encoding: str = "ternary"

    def __post_init__(self) -> None:
        one_of("encoding", self.encoding, ENCODINGS)
        if self.process_group is not None and not isinstance(self.process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup or None, got {type(self.process_group).__name__}")

    def __deepcopy__(self, memo: dict[int, Any]) -> MajorityVote:
        return self  # process groups cannot be copied, and need not be


class Voters:
    """The ranks that vote for one optimizer, and what they do together.

    Args:
        vote: the user's choice.
        group: the ranks.
        wrapped: the modules whose gradients' averages are to be the cap's alone.
    """

    def __init__(self, vote: MajorityVote, group: Any, wrapped: Sequence[DistributedDataParallel] = ()) -> None:
        self.vote = vote
        self.group = group
        self.size = dist.get_world_size(group)
        if vote.encoding == "int8" and self.size > MOST_INT8_VOTERS:
            raise ValueError(f"encoding='int8' sums at most {MOST_INT8_VOTERS} votes, got {self.size} ranks")
        self._wrapped = wrapped
        # Whether ranks have asked each other if there is anything to vote on; where a hook leaves it to them, there is.
        self.has_compared = self.size == 1 or bool(wrapped)
        self._averaged: set[int] = set()
        self._voted: set[int] = set()
        # What a hook has left to the votes of the next step.
        self._left: set[int] = set()

    @classmethod
    def of(cls, vote: MajorityVote, params: object) -> Voters:
        """Those of an optimizer of these parameters: a module, or whatever else STAC takes."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("vote needs ranks; call torch.distributed.init_process_group first")
        modules = params.modules() if isinstance(params, nn.Module) else ()
        wrapped = [module for module in modules if isinstance(module, DistributedDataParallel)]
        group = vote.process_group or (wrapped[0].process_group if wrapped else dist.group.WORLD)
        ranks = dist.get_process_group_ranks(group)
        for ddp in wrapped:
            theirs = dist.get_process_group_ranks(ddp.process_group)
            if theirs != ranks:
                raise ValueError(
                    f"process_group has the ranks {ranks}, and DistributedDataParallel averages over {theirs}; votes "
                    "and averages must be of the same ranks"
                )
        return cls(vote, group, wrapped)

    # A copy does not hear of the hook, and averages the cap by itself.
    def __deepcopy__(self, memo: dict[int, Any]) -> Voters:
        return Voters(self.vote, self.group)

    def __reduce__(self) -> Any:
        if self.group != dist.group.WORLD:
            raise TypeError("an optimizer whose vote is not among all ranks cannot be pickled; use state_dict()")
        return Voters.of, (self.vote, None)

    def hook(self, voted: Iterable[Tensor]) -> None:
        """Let DistributedDataParallel leave alone the gradients of parameters that are voted on."""
        self.keep(voted)
        # Hooks stay on a module when its optimizer is gone, and then average everything again.
        voters = weakref.ref(self)

        def average(group, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are not types
            alive = voters()
            if alive is None:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: PLC0415

                return allreduce_hook(group, bucket)
            return alive._average_rest_of(bucket)

        def forget(module: DistributedDataParallel, _: object) -> None:
            alive = voters()
            if alive is not None and not module.require_backward_grad_sync:
                alive._averaged.clear()  # what a backward under no_sync adds is of one rank alone

        for ddp in self._wrapped:
            ddp.register_comm_hook(self.group, average)
            ddp.register_forward_pre_hook(forget)
        if self._wrapped:
            hear(self)

    def keep(self, voted: Iterable[Tensor]) -> None:
        """Take parameters to those that are voted on."""
        self._voted.update(map(id, voted))

    def _average_rest_of(self, bucket: Any) -> Any:
        """The hook."""
        self.refuse_join()
        buffer = bucket.buffer()
        if buffer.is_sparse:
            raise RuntimeError(
                "DistributedDataParallel has a sparse gradient; make it dense, for embeddings with sparse=False"
            )
        held = zip(map(id, bucket.parameters()), bucket.gradients(), strict=True)
        rest = {param: grad for param, grad in held if param not in self._voted}
        self._left.update(id(param) for param in bucket.parameters() if id(param) not in rest)
        if not rest:
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(buffer)
            return done
        self._averaged.update(rest)
        grads = list(rest.values())
        flat, work = self._start_mean(grads)

        def finish(_: object) -> Any:
            self._finish_mean(flat, grads)
            return buffer

        return work.get_future().then(finish)

    def problem_of_step(self, other: Optimizer) -> str | None:
        """What is wrong where another optimizer has stepped on gradients that were left to the votes.

        Once the one that votes has stepped, alone or within a wrapper, none are left.
        """
        theirs = getattr(other, "_voters", None)
        left = self._left - theirs._voted if isinstance(theirs, Voters) else self._left
        params = (param for group in other.param_groups for param in group["params"]) if left else ()
        if not any(id(param) in left and param.grad is not None for param in params):
            return None
        return (
            f"{type(other).__name__} has stepped on gradients that DistributedDataParallel has not averaged, and ranks "
            "have different weights and averages now: they were left to the votes of an optimizer that lives on, as "
            "where a scheduler holds it. Drop all references to that optimizer, go back to the weights from before "
            "this step, and build the other one anew"
        )

    def refuse_join(self) -> None:
        """Raise where ranks may end before others: a vote would wait for them for ever."""
        if any(map(is_joining, self._wrapped)):
            raise RuntimeError(
                "vote cannot go on without the ranks that have left: give all ranks as many batches, not join()"
            )

    def average_gradients_(self, params: Iterable[Tensor]) -> None:
        """Average the plain gradients of parameters in place, but for those that a hook has averaged since the last."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            grad = param.grad
            if grad is not None and id(param) not in self._averaged and not is_sharded(grad):
                by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        for some in by_kind.values():
            self.average_(some)
        self._averaged.clear()
        self._left.clear()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors of one device and dtype over ranks, in place, by one all-reduce."""
        flat, work = self._start_mean(tensors)
        work.wait()
        self._finish_mean(flat, tensors)

    def _start_mean(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        # Divided first, as DistributedDataParallel does: a sum of float16 may overflow.
        flat = torch.cat([tensor.flatten() for tensor in tensors]).div_(self.size)
        return flat, dist.all_reduce(flat, group=self.group, async_op=True)

    def _finish_mean(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def on_any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        held = torch.tensor(flags, dtype=torch.uint8, device=device)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in held.tolist()]

    def gather(self, message: str | None) -> list[str | None]:
        """What each rank has to say."""
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message, group=self.group)
        return messages

    def check_same_kinds(self, kinds: str) -> None:
        """Raise on every rank where not all say the same of what state they have."""
        if len(set(self.gather(kinds))) > 1:
            raise RuntimeError(
                "ranks have state for different parameters, or of different dtypes, as when some have loaded a "
                "checkpoint and others have not; nothing was averaged"
            )

    def ballot(self, numel: int, device: torch.device) -> Ballot:
        """An empty ballot for so many votes of each rank, runs of them rounded up to whole words."""
        if self.vote.encoding == "int8":
            return SummedBallot(numel, device, self.group)
        return PackedBallot(numel, device, self.group, planes=1 if self.vote.encoding == "binary" else 2)
