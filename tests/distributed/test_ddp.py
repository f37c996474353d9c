"""DDP: wrappers leave no trace in names and checkpoints, and ranks stay bit-identical over real training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from stac_optimizer import STAC
from tests.ranks import run_ranks
from tests.runs import process_group
from tests.support import assert_same_bits, take_steps, through_file

Wrap = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    """A linear map whose user called it "module"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.module = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.norm(self.module(inputs)).tanh()
        return outputs


class Net(nn.Module):
    """Two blocks, of which a batch may use one alone, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = Block(6)
        self.other = Block(6)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor, *, skips: bool = False) -> Tensor:
        hidden = self.module(inputs)
        outputs: Tensor = self.head(hidden if skips else self.other(hidden))
        return outputs


LAYERS = ("module.module", "module.norm", "other.module", "other.norm", "head")


def _with_children(model: nn.Module, wrap: Wrap) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, wrap(child))
    return model


def _compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module)
    assert isinstance(wrapper, nn.Module)
    return wrapper


WRAPS: dict[str, Wrap] = {
    "ddp": DistributedDataParallel,
    "compile-of-ddp": lambda model: _compiled(DistributedDataParallel(model)),
    "ddp-of-compile": lambda model: DistributedDataParallel(_compiled(model)),
    "ddp-of-checkpointed": lambda model: DistributedDataParallel(_with_children(model, checkpoint_wrapper)),
    "ddp-of-checkpointed-and-compiled": lambda model: DistributedDataParallel(
        _compiled(_with_children(model, lambda child: checkpoint_wrapper(_compiled(child))))
    ),
    "children-in-ddp": lambda model: _with_children(model, DistributedDataParallel),
    "ddp-of-ddp": lambda model: DistributedDataParallel(DistributedDataParallel(model)),
}


def _run(wrap: Wrap, seed: int = 0) -> tuple[nn.Module, STAC]:
    """A bare model and the optimizer of what it was wrapped in."""
    model = Net(seed)
    return model, STAC(wrap(model), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
def test_names_and_checkpoints_are_those_of_the_bare_model(wrap: Wrap, tmp_path: Path) -> None:
    with process_group(tmp_path):
        wrapped = _run(wrap)
        bare = _run(lambda model: model)
        for _, optimizer in (wrapped, bare):
            partition = optimizer.partition
            assert (*partition.trunk_layer_names, *partition.cap_layer_names) == LAYERS
        for model, optimizer in (wrapped, bare):
            take_steps(model, optimizer, range(3))
        assert_same_bits(wrapped[1].state_dict(), bare[1].state_dict())
        for source, build in ((wrapped, lambda model: model), (bare, wrap)):
            target = _run(build, seed=1)
            for param, value in zip(target[0].parameters(), source[0].parameters(), strict=True):
                param.data.copy_(value)
            target[1].load_state_dict(through_file(source[1].state_dict()))
            take_steps(*target, range(3, 5))
            take_steps(*source, range(3, 5))
            assert_same_bits(list(target[0].parameters()), list(source[0].parameters()))
            assert_same_bits(target[1].state_dict(), source[1].state_dict())


def _train(case: str) -> list[list[bytes]]:
    """What this rank ends with, as bytes: of the weights, and of the state."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    ddp = DistributedDataParallel(Net(), find_unused_parameters=case == "unused")
    optimizer = STAC(ddp, lr=1e-2, weight_decay=0.1, trunk_cautious=case == "accumulation")
    for step in range(10):
        optimizer.zero_grad()
        for part in range(3):
            is_last = part == 2
            with nullcontext() if is_last or case != "accumulation" else ddp.no_sync():
                # Ranks see other data and, where some are unused, other parameters.
                ddp(torch.randn(4, 6), skips=case == "unused" and (step + rank) % 2 == 0).square().mean().backward()
        optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values()]
    return [[value.detach().numpy().tobytes() for value in values] for values in ([*ddp.parameters()], state)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", ["plain", "accumulation", "unused"])
def test_ranks_stay_bit_identical(case: str, world_size: int) -> None:
    first, *others = run_ranks(_train, world_size, case)
    assert any(any(weight) for weight in first[0])
    assert all(other == first for other in others)


def test_own_name_module_stays_where_names_alone_are_given(tmp_path: Path) -> None:
    with process_group(tmp_path):
        ddp = DistributedDataParallel(Net())
        of_names, of_module = STAC(ddp.named_parameters()), STAC(ddp)
        assert of_names.partition.trunk_layer_names == tuple(f"module.{name}" for name in LAYERS[:-1])
        with pytest.raises(ValueError, match=r"layer_names\[0\] is 'module.module' in the checkpoint"):
            of_names.load_state_dict(of_module.state_dict())
