"""Trajectories recorded before the redesign for 0.4.0: the trunk's to the bit, the cap's beside torch.optim.AdamW.

Weights and gradients are small integers, hashed and divided by a power of two, so they are the same on every machine;
no random number and no matrix product is among them. The trunk's operations round correctly one by one, so its bits
do not depend on the processor's vectors. Those of torch's AdamW do, hence the comparison with it in the same run.

Where an update is to change, ``python -m tests.test_recorded_trajectories NAME ...`` records these cases anew; those of
codes and of stochastic rounding are of the time since codes are rounded by chance.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stac_optimizer import STAC, last_layers, norms

RECORDED = Path(__file__).with_name("data") / "trajectories.json"
STEPS = 12
LR = 0.03
PATHS: Mapping[str, Mapping[str, bool]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
NO_GRADIENT = {2: {"1.weight", "4.bias"}, 8: {"2.bias", "3.weight", "4.weight"}}
ALL_ZERO = {5: {"1.bias", "4.weight"}, 6: {"1.bias", "2.weight"}}
# All but a few elements are zero: a mask lets so few pass that the floor of its mean binds.
MOSTLY_ZERO, FEW = {8: {"2.weight"}}, 4001
FROZEN, FROZEN_STEPS = "0.weight", range(4, 7)
# Before a step: what the lr of trunk and cap is multiplied by.
LR_FACTORS = {3: {"trunk": 0.5, "cap": 0.75}, 7: {"trunk": 3.0, "cap": 1.25}, 10: {"trunk": 0.0, "cap": 0.0}}
LR_RESTORED = 11
# Kept of each tensor beside its digest, to show what differs.
FIRST_VALUES = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of arguments, stepped on each of some paths.

    Args:
        arguments: what STAC is given, made anew for each run.
        dtype: of the model.
        channels_last: whether the convolution's weight lies so.
        paths: those that are recorded.
    """

    arguments: Callable[[], dict[str, Any]] = field(default=dict)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    paths: tuple[str, ...] = tuple(PATHS)

    @property
    def recorded_roles(self) -> tuple[str, ...]:
        """The cap too where torch has nothing like it; rounded to 8 bits, its steps differ on no processor tried."""
        return ("trunk", "cap") if self.arguments().get("stochastic_rounding") else ("trunk",)

    def optimizer(self, model: nn.Module, path: str) -> STAC:
        """The optimizer of this model."""
        return STAC(model, **{"lr": LR, **self.arguments(), **PATHS[path]})


def _case(dtype: torch.dtype = torch.float32, **arguments: Any) -> Case:
    return Case(arguments=lambda: dict(arguments), dtype=dtype)


BFLOAT16 = torch.bfloat16
ROUNDING: dict[str, Any] = {"stochastic_rounding": True, "rounding_seed": 5, "weight_decay": 0.1}
CASES: Mapping[str, Case] = {
    "default": _case(),
    "weight-decay": _case(weight_decay=0.1),
    "decay-and-lr-of-roles": _case(trunk_lr=0.011, cap_lr=0.017, trunk_weight_decay=0.3, cap_weight_decay=0.2),
    "momentum-0": _case(trunk_momentum=0.0, weight_decay=0.1),
    "momentum-0.5-maximize": _case(trunk_momentum=0.5, maximize=True),
    "cautious": _case(trunk_cautious=True, weight_decay=0.1),
    "cautious-maximize": _case(trunk_cautious=True, maximize=True),
    "cautious-momentum-0": _case(trunk_cautious=True, trunk_momentum=0.0),
    "state-bfloat16": _case(trunk_state_dtype=BFLOAT16),
    "state-int8": _case(trunk_state_dtype=torch.int8, weight_decay=0.1),
    "state-int8-cautious-maximize": _case(trunk_state_dtype="int8", trunk_cautious=True, maximize=True),
    "bfloat16": _case(BFLOAT16, weight_decay=0.1),
    "bfloat16-cautious": _case(BFLOAT16, trunk_cautious=True),
    "bfloat16-rounding": _case(BFLOAT16, **ROUNDING),
    "bfloat16-rounding-int8": _case(BFLOAT16, **ROUNDING, trunk_state_dtype=torch.int8),
    "bfloat16-rounding-cautious": _case(BFLOAT16, **ROUNDING, trunk_cautious=True, amsgrad=True),
    "float16": _case(torch.float16, weight_decay=0.1, eps=1e-3),
    "float64": _case(torch.float64, weight_decay=0.1),
    "amsgrad": _case(amsgrad=True, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    # torch wants capturable for a tensor with foreach, and that wants an accelerator.
    "tensor-lr": Case(arguments=lambda: {"lr": torch.tensor(LR), "weight_decay": 0.1}, paths=("single", "fused")),
    "all-trunk": _case(last_n_layers=0),
    "norms-in-cap": _case(cap=norms() | last_layers(1), weight_decay=0.1),
    "channels-last": Case(channels_last=True),
    "channels-last-rounding-int8": Case(
        arguments=lambda: {**ROUNDING, "trunk_state_dtype": torch.int8}, dtype=BFLOAT16, channels_last=True
    ),
}


def values(shape: torch.Size, salt: int, *, zeros: bool = False) -> Tensor:
    """Hashed float32 numbers of 24 bits and of magnitudes over a range of 2^12 below 1, the same on every machine."""
    numbers = torch.arange(shape.numel()) + 1_000_003 * (salt + 1)
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 12), (0x5BD1E995, 15)):
        numbers = (numbers ^ (numbers >> shift)) * factor & 0xFFFFFFFF
    integers = ((numbers >> 8) - 2**23) >> (numbers % 13)
    if zeros:
        integers[numbers % 11 == 0] = 0
    return integers.float().div(2**23).view(shape)


def built_model(case: Case) -> nn.Sequential:
    """A model that is never run: rows of less than one block of codes, of two and a rest, and many of those."""
    model = nn.Sequential(nn.Conv2d(8, 5, 3), nn.Linear(300, 4), nn.Linear(300, 64), nn.LayerNorm(5), nn.Linear(5, 3))
    model = model.to(case.dtype)
    if case.channels_last:
        weight = model[0].get_parameter("weight")
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.copy_(values(param.shape, 100 + index))
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    """Hashed gradients, some of them zero; none for what is frozen or named above."""
    for index, (name, param) in enumerate(model.named_parameters()):
        is_frozen = name == FROZEN and step in FROZEN_STEPS
        param.requires_grad_(not is_frozen)
        grad = values(param.shape, 1000 * (step + 1) + index, zeros=True).to(param.dtype)
        if name in ALL_ZERO.get(step, ()):
            grad.zero_()
        if name in MOSTLY_ZERO.get(step, ()):
            grad[torch.arange(grad.numel()).view(grad.shape) % FEW > 0] = 0
        param.grad = None if is_frozen or name in NO_GRADIENT.get(step, ()) else grad


def set_lr(groups: list[dict[str, Any]], first: list[float], step: int) -> None:
    """Change the lr of each group by hand, a tensor in place."""
    for group, start in zip(groups, first, strict=True):
        factor = LR_FACTORS.get(step, {}).get(group["stac_role"])
        new = start if step == LR_RESTORED else None if factor is None else float(group["lr"]) * factor
        if new is not None and isinstance(group["lr"], Tensor):
            group["lr"].fill_(new)
        elif new is not None:
            group["lr"] = new


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).tolist())


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + raw_bytes(tensor)).hexdigest()


class Run:
    """A case on a path, and beside it the cap under ``torch.optim.AdamW``, where torch can do what the case asks."""

    def __init__(self, case: Case, path: str) -> None:
        self.model = built_model(case)
        self.optimizer = case.optimizer(self.model, path)
        self.groups: list[dict[str, Any]] = self.optimizer.param_groups
        self.first_lr = [float(group["lr"]) for group in self.groups]
        names = {param: name for name, param in self.model.named_parameters()}
        self.roles = {names[param]: group["stac_role"] for group in self.groups for param in group["params"]}
        self.twins: dict[str, nn.Parameter] = {}
        self.adamw: torch.optim.AdamW | None = None
        self.cap_groups = [group for group in self.groups if group["stac_role"] == "cap"]
        given = case.arguments()
        if self.cap_groups and not given.get("stochastic_rounding"):
            groups = []
            for group in self.cap_groups:
                twins = {names[param]: nn.Parameter(param.detach().clone()) for param in group["params"]}
                self.twins.update(twins)
                groups.append({"params": list(twins.values())})
            same = {key: given[key] for key in ("betas", "eps", "amsgrad", "maximize") if key in given}
            decay = given.get("cap_weight_decay", given.get("weight_decay", 0.0))
            flags: Any = PATHS[path]
            # Of groups it reads the lr alone, which is changed by hand below, and at first is the one that was given.
            assert {float(group["lr"]) for group in self.cap_groups} == {
                float(given.get("cap_lr", given.get("lr", LR)))
            }
            self.adamw = torch.optim.AdamW(groups, weight_decay=decay, **same, **flags)

    def step(self, step: int) -> None:
        """One step of both."""
        set_lr(self.groups, self.first_lr, step)
        set_gradients(self.model, step)
        self.optimizer.step()
        if self.adamw is None:
            return
        for group, twin_group in zip(self.cap_groups, self.adamw.param_groups, strict=True):
            twin_group["lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        for name, twin in self.twins.items():
            grad = self.model.get_parameter(name).grad
            twin.grad = None if grad is None else grad.clone()
        self.adamw.step()

    def tensors(self, *roles: str) -> dict[str, Tensor]:
        """Weights and state of these roles by name; state without elements is none."""
        held: dict[str, Tensor] = {}
        for name, param in self.model.named_parameters():
            if self.roles[name] in roles:
                held[name] = param
                state = self.optimizer.state[param]
                held.update({f"{name} {key}": state[key] for key in sorted(state) if state[key].numel()})
        return held


def run_case(case: Case, path: str) -> tuple[Run, dict[str, Any]]:
    """A case on a path.

    Returns:
        The run; of its trunk, or of all, a short digest after every step, and of each tensor at the end the digest and
        the first values.
    """
    run = Run(case, path)
    after_step = []
    for step in range(STEPS):
        run.step(step)
        held = run.tensors(*case.recorded_roles)
        after_step.append(hashlib.sha256("".join(map(digest_of, held.values())).encode()).hexdigest()[:8])
    ends = {
        name: [digest_of(tensor), *tensor.detach().flatten()[:FIRST_VALUES].double().tolist()]
        for name, tensor in run.tensors(*case.recorded_roles).items()
    }
    return run, {"after_step": after_step, "tensors": ends}


def assert_cap_is_adamw(run: Run) -> None:
    """Weights and state of the cap are those of torch's own optimizer, to the bit."""
    assert run.adamw is not None
    cap = run.tensors("cap")
    expected: dict[str, Tensor] = {}
    for name, twin in run.twins.items():
        expected[name] = twin
        expected.update({f"{name} {key}": value for key, value in run.adamw.state[twin].items()})
    assert cap.keys() == expected.keys()
    differing = [name for name in cap if raw_bytes(cap[name]) != raw_bytes(expected[name])]
    assert not differing, f"{differing[0]}: {cap[differing[0]]} != {expected[differing[0]]}"


def recorded() -> dict[str, Any]:
    """What was recorded, by case."""
    cases: dict[str, Any] = json.loads(RECORDED.read_text())
    return cases


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, case in CASES.items() for path in case.paths])
def test_trunk_is_as_recorded_and_cap_is_adamw(name: str, path: str) -> None:
    run, found = run_case(CASES[name], path)
    expected = recorded()[name]
    same_steps = [one == other for one, other in zip(found["after_step"], expected["after_step"], strict=True)]
    first = same_steps.index(False) + 1 if False in same_steps else None
    assert list(found["tensors"]) == list(expected["tensors"])
    differing = {
        key: f"{old[1:]} was recorded, {new[1:]} found"
        for (key, new), old in zip(found["tensors"].items(), expected["tensors"].values(), strict=True)
        if new[0] != old[0]
    }
    assert not differing, f"from step {first} on; the first values at the end: {differing}"
    assert first is None, f"step {first} differs, and the end does not"
    if run.adamw is not None:
        assert_cap_is_adamw(run)


def test_every_case_is_recorded() -> None:
    assert recorded().keys() == CASES.keys()


def record(names: Sequence[str]) -> None:
    """Write what these cases do now, on the first of their paths, beside what was recorded of the others."""
    cases = {**recorded(), **{name: run_case(CASES[name], CASES[name].paths[0])[1] for name in names}}
    texts = []
    for name, case in cases.items():
        tensors = ",\n".join(f"      {json.dumps(key)}: {json.dumps(end)}" for key, end in case["tensors"].items())
        steps = f'    "after_step": {json.dumps(case["after_step"])},\n'
        texts.append(f'  {json.dumps(name)}: {{\n{steps}    "tensors": {{\n{tensors}\n    }}\n  }}')
    RECORDED.write_text("{\n" + ",\n".join(texts) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
