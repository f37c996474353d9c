"""A small model under STAC, with a twin beside each parameter: what the rules of ``test_state_machine.py`` act on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from stac_optimizer import STAC, named, vectors
from stac_optimizer.optim import Lion
from tests.runs import has_flattened_without_state
from tests.stack.twins import Alone, Reference, Tally, Twin, assert_hyper
from tests.support import through_file

__all__ = ["NAMES", "Checkpoint", "Config", "World", "halved"]

PATHS: Mapping[str, Mapping[str, Any]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
GUESTS: Mapping[str, Any] = {
    "NAdam": partial(optim.NAdam, momentum_decay=4e-3),
    "Adagrad": partial(optim.Adagrad, initial_accumulator_value=0.125),
    "SGD": partial(optim.SGD, momentum=0.5, nesterov=True),
}
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "5.weight", "5.bias")
MOST_LAYERS = 6
HYPER = ("lr", "initial_lr", "weight_decay", "momentum", "cautious", "maximize", "betas", "eps")


def base_model(dtype: torch.dtype, seed: int) -> nn.Sequential:
    """Layers "0" and "1" are the trunk, "3" the cap; averages of "0.weight" fit into 8-bit codes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def halved(epoch: int) -> float:
    """A schedule whose factors are exact."""
    return float(0.5 ** (epoch % 4))


@functools.cache
def adagrad_takes_groups() -> bool:
    """Whether this torch's Adagrad makes state of groups that are added, as it does of the first."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = optim.Adagrad(params[:1])
    optimizer.add_param_group({"params": params[1:]})
    params[1].grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Config:
    """What an optimizer is built with; combinations that exclude each other are settled by :meth:`settled`."""

    path: str
    dtype: torch.dtype
    lr: float
    is_tensor_lr: bool
    trunk: str
    cap: str
    momentum: float
    cautious: bool
    state_dtype: torch.dtype | None
    weight_decay: float
    maximize: bool
    amsgrad: bool
    error_if_nonfinite: bool
    by_chance: bool
    has_overrides: bool

    def settled(self) -> Config:
        """The same without what the optimizer refuses."""
        by_chance = self.by_chance and self.dtype == torch.bfloat16 and not self.has_guest
        return replace(self, by_chance=by_chance, is_tensor_lr=self.is_tensor_lr and self.path != "foreach")

    @property
    def has_guest(self) -> bool:
        """Whether a foreign optimizer updates one of the roles."""
        return self.trunk in GUESTS or self.cap in GUESTS

    @property
    def shared_lr(self) -> float | Tensor:
        """The argument ``lr``."""
        return torch.tensor(self.lr) if self.is_tensor_lr else self.lr

    def build(self, model: nn.Module) -> STAC:
        """The optimizer."""
        arguments: dict[str, Any] = {
            "lr": self.shared_lr,
            "weight_decay": self.weight_decay,
            "maximize": self.maximize,
            "error_if_nonfinite": self.error_if_nonfinite,
            "stochastic_rounding": self.by_chance,
        }
        if not (self.trunk in GUESTS and self.cap in GUESTS):
            arguments |= PATHS[self.path]
        if self.has_overrides:
            arguments["overrides"] = [(vectors(), {"weight_decay": 0.0}), (named("0"), {"lr_ratio": 0.5})]
        if self.trunk == "signum":
            arguments |= {"trunk_momentum": self.momentum, "trunk_cautious": self.cautious}
            arguments["trunk_state_dtype"] = self.state_dtype
        else:
            arguments["trunk_optimizer"] = self._function(self.trunk)
        if self.cap == "adamw":
            arguments["amsgrad"] = self.amsgrad
        else:
            arguments["cap_optimizer"] = self._function(self.cap)
        return STAC(model, **arguments)

    def _function(self, which: str) -> Any:
        if which == "lion":
            return partial(Lion, cautious=self.cautious, betas=(0.75, 0.9))
        return partial(GUESTS[which], maximize=self.maximize)

    def twin(self, role: str, param: Tensor, lr: float, weight_decay: float) -> Twin:
        """The twin of a parameter in a role."""
        which = self.trunk if role == "trunk" else self.cap
        if which in GUESTS:
            return Alone(self._function(which), param, lr=self._as_given(lr), weight_decay=weight_decay)
        common = {"lr": lr, "weight_decay": weight_decay, "maximize": self.maximize}
        if which == "adamw" and not self.by_chance:
            values = {**common, "amsgrad": self.amsgrad, **PATHS[self.path], "lr": self._as_given(lr)}
            return Alone(optim.AdamW, param, **values)
        own: dict[str, dict[str, Any]] = {
            "signum": {"momentum": self.momentum, "cautious": self.cautious},
            "lion": {"betas": (0.75, 0.9), "cautious": self.cautious},
            "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": self.amsgrad},
        }
        is_coded = which == "signum" and self.state_dtype == torch.int8 and param.ndim > 1 and param.shape[1] >= 64
        return Reference(which, param, {**common, **own[which]}, is_coded, self.by_chance)

    def lr_of(self, role: str, name: str = "") -> float:
        """Where a parameter's learning rate begins; without a name that of groups which are added later."""
        ratio = 0.75 if role == "trunk" and self.trunk == "signum" else 1.0
        return self.lr * ratio * (0.5 if self.has_overrides and name.startswith("0.") else 1.0)

    def _as_given(self, lr: float) -> float | Tensor:
        return torch.tensor(lr) if self.is_tensor_lr else lr


@dataclass(frozen=True)
class Addition:
    """A layer that came later, with its group."""

    layer: str
    role: str
    weight_decay: float | None


@dataclass(frozen=True)
class Checkpoint:
    """What was saved, how, and what must come back.

    Args:
        kind: "memory" and "file" for ``state_dict``; "nested" and "flat" for torch.distributed's state dicts.
        weights: the model's state dict.
        saved: the optimizer's.
        scheduler: its scheduler's, or None.
        twins: as they were.
        additions: likewise.
        is_as_built: likewise.
    """

    kind: str
    weights: dict[str, Any]
    saved: dict[str, Any]
    scheduler: dict[str, Any] | None
    twins: dict[str, Twin]
    additions: tuple[Addition, ...]
    is_as_built: bool


class World:
    """A model, its optimizer, its scheduler, and a twin for each parameter."""

    def __init__(self, config: Config, tally: Tally) -> None:
        self.config, self.tally = config, tally
        self.model: nn.Module = base_model(config.dtype, 0)
        self.optimizer = config.build(self.model)
        self.scheduler: LambdaLR | None = None
        self.release: Any = None
        self.additions: tuple[Addition, ...] = ()
        # torch's flattened state dicts want the keys that the arguments of construction make.
        self.is_as_built = True
        self.twins: dict[str, Twin] = {}
        for name, param in self.model.named_parameters():
            role = "cap" if name.startswith("3.") else "trunk"
            decay = 0.0 if config.has_overrides and param.ndim < 2 else config.weight_decay
            self.twins[name] = config.twin(role, param, config.lr_of(role, name), decay)

    def group_of(self, name: str) -> dict[str, Any]:
        """The group that holds a parameter."""
        (group,) = [group for group in self.optimizer.param_groups if name in group["param_names"]]
        return group

    def check(self) -> None:
        """Compare everything with the twins."""
        params = dict(self.model.named_parameters())
        assert params.keys() == self.twins.keys()
        known = set(params.values())
        assert {key for key in self.optimizer.state if isinstance(key, Tensor)} <= known
        for group in self.optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                assert params[name] is param, name
                try:
                    assert_hyper(group, self.twins[name].hyper, HYPER)
                    self.twins[name].check(param, self.optimizer.state.get(param, {}), self.tally)
                except AssertionError as error:
                    raise AssertionError(f"{name} ({group['rule']}): {error}") from error

    def expect_step(self, grads: Mapping[str, Tensor]) -> None:
        """Let the twins of these parameters step."""
        for name, grad in grads.items():
            twin, lr = self.twins[name], self.group_of(name)["lr"]
            if isinstance(
                twin, Alone
            ):  # the value is the twin's; number or tensor, which differ by bits, as the user has it
                value = float(twin.hyper["lr"])
                twin.hyper["lr"] = torch.tensor(value, dtype=lr.dtype) if isinstance(lr, Tensor) else value
            twin.step(grad)

    def set_hyper(self, names: Iterable[str], **values: Any) -> None:
        """Tell twins what the test has written into groups."""
        for name in names:
            self.twins[name].hyper.update(values)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What requires gradients, by name."""
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    # Layers that come later.

    def can_add(self, role: str) -> bool:
        """Whether the role's optimizer alone can step a group that was added."""
        which = self.config.trunk if role == "trunk" else self.config.cap
        return which != "Adagrad" or adagrad_takes_groups()

    def add(self, addition: Addition) -> None:
        """Add a layer and its group, and give it a twin."""
        self._add_to(self.model, self.optimizer, addition)
        self.additions += (addition,)
        for key, param in self.model.get_submodule(addition.layer).named_parameters():
            config, own = self.config, addition.weight_decay
            decay = config.weight_decay if own is None else own
            twin = config.twin(addition.role, param, config.lr_of(addition.role), decay)
            self.twins[f"{addition.layer}.{key}"] = twin

    def _add_to(self, model: nn.Module, optimizer: STAC, addition: Addition) -> None:
        torch.manual_seed(int(addition.layer))
        layer = nn.Linear(64, 2).to(self.config.dtype)
        model.add_module(addition.layer, layer)
        params = [(f"{addition.layer}.{key}", param) for key, param in layer.named_parameters()]
        own = {} if addition.weight_decay is None else {"weight_decay": addition.weight_decay}
        optimizer.add_param_group({"params": params, "stac_role": addition.role, **own})

    # Schedules.

    def schedule(self) -> None:
        """Begin a schedule at the present learning rates."""
        self.scheduler = LambdaLR(self.optimizer, halved)
        for twin in self.twins.values():
            twin.hyper["initial_lr"] = float(twin.hyper["lr"])
        self._expect_rates()

    def advance(self) -> None:
        """A step of the schedule."""
        assert self.scheduler is not None
        self.scheduler.step()
        self._expect_rates()

    def _expect_rates(self) -> None:
        assert self.scheduler is not None
        for twin in self.twins.values():
            twin.hyper["lr"] = float(twin.hyper["initial_lr"]) * halved(self.scheduler.last_epoch)

    def end_schedule(self) -> None:
        """Keep the present rates."""
        self.scheduler = None
        for group in [*self.optimizer.param_groups, *(twin.hyper for twin in self.twins.values())]:
            group.pop("initial_lr", None)

    # Checkpoints.

    def lacks_averages(self) -> bool:
        """Whether momentum was raised from 0 and no step has made averages yet, with which nothing loads."""
        return any(
            isinstance(twin, Reference) and twin.hyper.get("momentum") and twin.state and "exp_avg" not in twin.state
            for twin in self.twins.values()
        )

    def can_save(self, kind: str) -> bool:
        """Whether torch itself can make and load this kind of checkpoint now."""
        if kind in ("memory", "file"):
            return True
        held = [self.optimizer.state.get(param, {}) for param in self.model.parameters()]
        if not all(held):
            return False
        have_stepped = all(state.get("step", 1) for state in held)
        if kind == "flat":
            return self.is_as_built and (have_stepped or (has_flattened_without_state() and not self.config.has_guest))
        return have_stepped or not self.config.has_guest

    def save(self, kind: str) -> Checkpoint:
        """A checkpoint that later steps must not reach."""
        scheduler = None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict())
        saved: Any = self.optimizer.state_dict()
        if kind in ("nested", "flat"):
            self.model.requires_grad_(True)  # torch passes over what is frozen
            saved = get_optimizer_state_dict(self.model, self.optimizer, options=_options(kind))
        weights, saved = (through_file if kind == "file" else copy.deepcopy)((self.model.state_dict(), saved))
        return Checkpoint(kind, weights, saved, scheduler, copy.deepcopy(self.twins), self.additions, self.is_as_built)

    def restore(self, checkpoint: Checkpoint, *, into_new: bool) -> None:
        """Go on from a checkpoint, in a model and an optimizer of other values, or in these where they fit."""
        # torch loads a flattened state dict into the keys that the target's state has by now, and some Adagrads make
        # state at construction alone, which a checkpoint from before the first step lacks.
        is_bound = self.config.trunk == "Adagrad" and not adagrad_takes_groups()
        if into_new or is_bound or checkpoint.kind == "flat" or checkpoint.additions != self.additions:
            self.release, self.model = None, base_model(self.config.dtype, 1)
            self.optimizer = self.config.build(self.model)
            for addition in checkpoint.additions:
                self._add_to(self.model, self.optimizer, addition)
        self.model.requires_grad_(True)
        self.end_schedule()
        if checkpoint.scheduler is not None:
            self.scheduler = LambdaLR(self.optimizer, halved)
            self.scheduler.load_state_dict(copy.deepcopy(checkpoint.scheduler))
        self.model.load_state_dict(checkpoint.weights)
        if checkpoint.kind in ("nested", "flat"):
            options = _options(checkpoint.kind)
            set_optimizer_state_dict(self.model, self.optimizer, checkpoint.saved, options=options)
        else:
            self.optimizer.load_state_dict(checkpoint.saved)
        self.twins, self.additions = copy.deepcopy(checkpoint.twins), checkpoint.additions
        self.is_as_built = checkpoint.is_as_built
        for twin in self.twins.values():
            twin.loaded()

    def adopt(self, run: Sequence[Any]) -> None:
        """Go on with a copy of model, optimizer and scheduler."""
        self.model, self.optimizer, self.scheduler = run
        self.release = None

    @property
    def run(self) -> tuple[nn.Module, STAC, LambdaLR | None]:
        """What is copied together."""
        return self.model, self.optimizer, self.scheduler


def _options(kind: str) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=kind == "flat")
