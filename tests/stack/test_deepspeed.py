"""What DeepSpeed's ZeRO stages 1 and 2 do to an optimizer: a flat float32 partition in place of a group's parameters.

It flattens the weights of each group, pads them, cuts them into one part for each rank, and puts a float32 copy of the
rank's part into ``group["params"]``, which keeps everything else. It steps one group at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC
from tests.support import assert_same_bits, set_gradients, small_model, through_file, wide_model

ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum-0": {"trunk_momentum": 0.0},
    "amsgrad-decay-maximize": {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    "bfloat16-state": {"trunk_state_dtype": torch.bfloat16},
    "foreach": {"foreach": True},
    "all-cap": {"last_n_layers": 9},
    "error-if-nonfinite": {"error_if_nonfinite": True},
}


class Partitioned:
    """A rank's optimizer as DeepSpeed leaves it; ``members`` are the parameters that each group had."""

    def __init__(self, model: nn.Module, rank: int, world_size: int, **arguments: Any) -> None:
        self.optimizer = STAC(model, **{"lr": 1e-2, **arguments})
        self.members: list[list[Tensor]] = [list(group["params"]) for group in self.optimizer.param_groups]
        self.rank, self.world_size = rank, world_size
        for group, members in zip(self.optimizer.param_groups, self.members, strict=True):
            group["params"] = [self._part([param.detach() for param in members]).clone().requires_grad_()]

    def _part(self, tensors: list[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in tensors]).float()
        padding = -len(flat) % (4 * self.world_size)
        return nn.functional.pad(flat, (0, padding)).chunk(self.world_size)[self.rank]

    def step(self) -> None:
        """With the gradients of the members, group by group."""
        groups = self.optimizer.param_groups
        for group, members in zip(groups, self.members, strict=True):
            grads = [param.grad for param in members if param.grad is not None]
            group["params"][0].grad = self._part(grads)
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups = groups

    def tensor(self, index: int, key: str | None) -> Tensor:
        """The rank's part of a group's weights, or of its state of this key."""
        (flat,) = self.optimizer.param_groups[index]["params"]
        tensor: Tensor = flat.detach() if key is None else self.optimizer.state[flat][key]
        return tensor


def _ranks(model: nn.Module, world_size: int, arguments: dict[str, Any]) -> list[Partitioned]:
    return [Partitioned(model, rank, world_size, **arguments) for rank in range(world_size)]


def _step(model: nn.Module, optimizers: Sequence[STAC | Partitioned], seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        for optimizer in optimizers:
            optimizer.step()


def _assert_equal(ranks: list[Partitioned], optimizer: STAC) -> None:
    """Put together, the parts are what the whole optimizer has, and their padding is still zero."""
    for index, group in enumerate(optimizer.param_groups):
        states = [optimizer.state[param] for param in group["params"]]
        for key in (None, *(key for key in states[0] if key != "step")):
            held = [state[key] if key else param.detach() for state, param in zip(states, group["params"], strict=True)]
            expected = torch.cat([tensor.flatten() for tensor in held])
            parts = torch.cat([rank.tensor(index, key) for rank in ranks])
            assert_same_bits(parts[: len(expected)], expected, f"group {index}, {key or 'weights'}")
            assert not parts[len(expected) :].any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_flat_partitions_step_and_resume_as_whole_parameters(arguments: dict[str, Any], world_size: int) -> None:
    model = small_model()
    ranks = _ranks(model, world_size, arguments)
    optimizer = STAC(model, **{"lr": 1e-2, **arguments})
    _step(model, [*ranks, optimizer], range(3))
    _assert_equal(ranks, optimizer)
    resumed = _ranks(model, world_size, {**arguments, "lr": 0.5})
    for rank, fresh in zip(ranks, resumed, strict=True):
        for index in range(len(optimizer.param_groups)):
            fresh.tensor(index, None).copy_(rank.tensor(index, None))
        fresh.optimizer.load_state_dict(through_file(rank.optimizer.state_dict()))
    _step(model, [*resumed, optimizer], range(3, 6))
    _assert_equal(resumed, optimizer)


def test_partitions_are_called_by_their_group() -> None:
    model = small_model()
    rank = Partitioned(model, 0, 1, error_if_nonfinite=True)
    _step(model, [rank], range(1))
    optimizer = rank.optimizer
    assert optimizer.state_bytes() == sum(
        value.nbytes for state in optimizer.state.values() for value in state.values()
    )
    assert optimizer.partition.trunk_layer_names == ("<group 0>",)
    assert "<group 1>" in str(optimizer.partition)
    optimizer.param_groups[1]["params"][0].grad[2] = torch.inf
    with pytest.raises(RuntimeError, match=r"'<group 1>.0' \(cap\) holds NaN or infinity"):
        optimizer.step()


def test_flat_partitions_have_no_rows_for_8_bit_codes() -> None:
    model = wide_model()
    rank = Partitioned(model, 0, 2, trunk_state_dtype=torch.int8)
    _step(model, [rank], range(2))
    assert rank.tensor(0, "exp_avg").dtype == torch.float32


def test_flat_partitions_refuse_stochastic_rounding() -> None:
    model = small_model(dtype=torch.bfloat16)
    rank = Partitioned(model, 0, 2, stochastic_rounding=True)
    with pytest.raises(RuntimeError, match=r"is torch.float32, and stochastic_rounding"):
        _step(model, [rank], range(1))
