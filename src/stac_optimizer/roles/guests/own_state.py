"""Guests that keep state in objects of their own, as torchzero's modules do: saved, loaded, copied without asking them.

Their own ``state_dict`` may hold what no safe checkpoint takes, or put the checkpoint's parameters in place of the
model's; so it is never called.
"""

from __future__ import annotations

import contextlib
import copy
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_optimizer.groups.keys import STRUCTURE_KEYS
from stac_optimizer.roles.guests.guest import SHARED, Guest, dry, step_unseen, without_data
from stac_optimizer.roles.guests.object_graph import PLAIN, GraphReader, GraphWriter, package_of, path_of
from stac_optimizer.validation import mapping

__all__ = ["OwnStateGuest", "guest_of", "keeps_own_state"]

OptimizerFunction = Callable[[list[dict[str, Any]]], Optimizer]


def keeps_own_state(optimizer: Optimizer) -> bool:
    """Whether there is more to it than ``state`` and plain group dicts, so that a host cannot share these."""
    is_overridden = type(optimizer).state_dict is not Optimizer.state_dict
    return is_overridden or any(not isinstance(group, dict) for group in optimizer.param_groups)


class OwnStateGuest(Guest):
    """A foreign optimizer whose state the host cannot share.

    The host shows plain groups in place of its own; what changes in them is handed over before each step. A chain that
    has no ``lr`` shows none, so schedulers cannot serve it: torchzero's have one by a module ``LR``.

    A copy is a new optimizer, built by the function from copies of the parameters, with the state loaded: neither
    torch's ``__getstate__`` nor the closures in the optimizer's objects survive copying.

    Args:
        optimizer: it, over the role's parameters.
        role: the role.
        function: the user's, which built it. To be pickled it must be of a module; a lambda is not.
        given: the groups that the function got.
    """

    shares_state = False

    def __init__(
        self, optimizer: Optimizer, role: str, function: OptimizerFunction, given: Iterable[Mapping[str, Any]]
    ) -> None:
        super().__init__(optimizer, role)
        self._function = function
        self._given = [_without_params(group) for group in given]
        # As built, for what is no more so; and what the host shows, which are dicts of its own.
        self._built = [_plain(group) for group in optimizer.param_groups]
        self._shown = [{**group, "params": list(group["params"])} for group in self._built]
        self._written: list[set[str]] = [set() for _ in self._built]
        written = self._write()
        self._nodes_as_built = len(written.nodes)
        # Its objects in order: another chain differs in these, and a function that returns old ones shares them.
        package = package_of(type(optimizer))
        self._parts = [value for _, value in written.seen.values() if package_of(type(value)) == package]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The dicts that STAC takes for its own."""
        return self._shown

    @property
    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def tie(self, host: Optimizer) -> None:
        """Read the host's groups of the role from now on."""
        self._shown = [group for group in host.param_groups if group["stac_role"] == self.role]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Hand over what has changed in the groups, and let it step."""
        self._hand_over()
        return super().step(closure)

    def _hand_over(self) -> None:
        """Write what is no more as built, and from then on.

        The rest stays unwritten: one key of a group may have different values in several modules.
        """
        for shown, built, target, written in zip(
            self._shown, self._built, self.optimizer.param_groups, self._written, strict=True
        ):
            if "initial_lr" in shown:  # a scheduler wrote lr, though maybe to what it was
                written.add("lr")
            for key in (shown.keys() & built.keys()) - STRUCTURE_KEYS:
                if key not in written and _differs(shown[key], built[key]):
                    written.add(key)
                if key in written:
                    target[key] = shown[key]

    def _take_back(self) -> None:
        """Undo what was handed over: a checkpoint may be from before it."""
        targets: list[Any] = self.optimizer.param_groups
        for given, built, target, written in zip(self._given, self._built, targets, self._written, strict=True):
            is_layered = isinstance(target, ChainMap)
            for key in written & built.keys():
                if is_layered and key not in given:
                    target.pop(key, None)
                else:
                    target[key] = built[key]

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Let it take a group, and complete the group by what it shows."""
        given = {key: value for key, value in group.items() if key not in STRUCTURE_KEYS}
        self.optimizer.add_param_group({**given, "params": list(group["params"])})
        built = _plain(self.optimizer.param_groups[-1])
        self._given.append(given)
        self._built.append(built)
        self._written.append(set())
        group.update({key: value for key, value in built.items() if key not in STRUCTURE_KEYS})

    def state_dict(self) -> dict[str, Any]:
        """Plain data and the guest's own tensors, which ``torch.load(weights_only=True)`` takes."""
        return {**self._identity(), "written": [sorted(keys) for keys in self._written], "nodes": self._write().nodes}

    def prepare_load(self, data: Mapping[str, Any] | None) -> Callable[[], None]:
        """Check what :meth:`state_dict` returned; the result loads it, and shares no tensor with it.

        Raises:
            ValueError: another chain, other shapes, or classes that are neither of the guest's package nor allowed by
                ``torch.serialization.add_safe_globals``. Nothing was changed.
        """
        package = package_of(type(self.optimizer))
        return self._prepared(data, lambda found: package_of(found) == package)

    def _prepared(self, data: Mapping[str, Any] | None, may_build: Callable[[Any], bool]) -> Callable[[], None]:
        what = f"the checkpoint's {self.rule.name} ({self.role})"
        identity = self._identity()
        if data is None or not {"nodes", "written", *identity} <= set(mapping(what, data)):
            raise ValueError(
                f"{what} lacks the state that it keeps in objects of its own: it is in state_dict()['guests'], which "
                "must be saved too; torch.distributed.checkpoint.state_dict leaves it out"
            )
        for key, present in identity.items():
            saved = [tuple(item) if isinstance(item, Sequence) and key == "shapes" else item for item in data[key]]
            if saved != present:
                raise ValueError(f"{what} has other {key}: {saved}, this optimizer's has {present}")
        reader = GraphReader(self._params, copy.deepcopy(data["nodes"]), may_build)
        try:
            written = [set(keys) for keys in data["written"]]
            reader.read({"node": 0}, self.optimizer)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{what} is broken: {type(error).__name__} {error}") from error

        if len(written) != len(self._built):
            raise ValueError(f"{what} has {len(data['written'])} groups, this optimizer's has {len(self._built)}")

        def load() -> None:
            self._take_back()
            reader.commit()
            self._written = written

        return load

    def _identity(self) -> dict[str, list[Any]]:
        return {
            "parts": [path_of(type(part))[0] for part in self._parts],
            "shapes": [tuple(param.shape) for param in self._params],
        }

    def _write(self) -> GraphWriter:
        """The optimizer is node 0. Hooks are left out, as torch leaves them out of copies."""
        writer = GraphWriter(self._params)
        hooks = {key for key in vars(self.optimizer) if key.endswith("_hooks")}
        writer.write(self.optimizer, SHARED | hooks)
        return writer

    def bytes_by_parameter(self, state: Mapping[Tensor, Any]) -> dict[Tensor, int]:
        """As of any guest; what parameters share counts for the first, as torch's LBFGS has it."""
        held = self._held_bytes()
        if len(self._write().nodes) > self._nodes_as_built:
            return held
        with contextlib.suppress(Exception), dry():
            params = without_data(self._params)
            twin = self._twin(params)
            step_unseen(twin.optimizer)
            return dict(zip(self._params, twin._held_bytes().values(), strict=True))
        return held

    def _held_bytes(self) -> dict[Tensor, int]:
        params = self._params
        everything = self._write()
        filed: dict[int, list[Any]] = {id(param): [] for param in params}
        for _, value in everything.seen.values():
            for key in value if isinstance(value, dict) else ():
                if id(key) in filed:
                    filed[id(key)].append(value[key])
        counted: dict[int, Any] = {}  # storages, held so that no other gets their id
        writer = GraphWriter(params)
        result = {}
        for param in params:
            begin = len(writer.nodes)
            writer.write(filed[id(param)])
            result[param] = _new_bytes(writer.nodes[begin:], counted)
        result[params[0]] += _new_bytes(everything.nodes, counted)
        return result

    def _twin(self, params: Sequence[Tensor]) -> OwnStateGuest:
        """The same optimizer anew, over other parameters."""
        before = self.state_dict()
        twin = _built_anew(self.role, self._function, self._dealt(params), self._given)
        if {id(part) for part in twin._parts} & {id(part) for part in self._parts}:
            self._prepared(before, lambda _: True)()  # the twin's parameters are in their tables now
            raise ValueError(
                f"{self.role}_optimizer returns an optimizer of modules that were made outside of it, so a copy would "
                "share them; let the function make them"
            )
        return twin

    def _dealt(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        left = iter(params)
        return [[next(left) for _ in group["params"]] for group in self.optimizer.param_groups]

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnStateGuest:
        twin = self._twin([copy.deepcopy(param, memo) for param in self._params])
        twin._prepared(self.state_dict(), lambda _: True)()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.role, self._function, self._dealt(self._params), self._given, self.state_dict())


def _built_anew(
    role: str, function: OptimizerFunction, params: Sequence[list[Tensor]], given: Sequence[Mapping[str, Any]]
) -> OwnStateGuest:
    groups = [{**copy.deepcopy(group), "params": some} for some, group in zip(params, given, strict=True)]
    return OwnStateGuest(function([dict(group) for group in groups]), role, function, groups)


def _unpickled(
    role: str,
    function: OptimizerFunction,
    params: Sequence[list[Tensor]],
    given: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
) -> OwnStateGuest:
    guest = _built_anew(role, function, params, given)
    guest._prepared(data, lambda _: True)()
    return guest


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """What of a group a host can show and save; a ChainMap's layers are one."""
    return {key: value for key, value in group.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return (
        type(value) in PLAIN
        or isinstance(value, Tensor)
        or (type(value) in (tuple, list) and all(map(_is_plain, value)))
    )


def _differs(value: Any, built: Any) -> bool:
    """Whether a value is no more as built. A tensor is not compared, which might wait for a device."""
    return value is not built and (isinstance(value, Tensor) or isinstance(built, Tensor) or value != built)


def _new_bytes(nodes: Iterable[Mapping[str, Any]], counted: dict[int, Any]) -> int:
    """Bytes of the tensors in nodes, of each storage once."""
    total = 0
    for node in nodes:
        if "tensor" in node:
            storage: torch.UntypedStorage = node["tensor"].untyped_storage()
            total += 0 if id(storage) in counted else storage.nbytes()
            counted[id(storage)] = storage
    return total


def guest_of(
    optimizer: Optimizer, role: str, function: Callable[[Any], Optimizer], given: Iterable[Mapping[str, Any]]
) -> Guest:
    """The guest that an optimizer makes: one that shares, or one that keeps state of its own.

    Args:
        optimizer: it.
        role: its role.
        function: what returned it.
        given: the groups that the function got, as they were.
    """
    if keeps_own_state(optimizer):
        return OwnStateGuest(optimizer, role, function, given)
    optimizer.param_groups = list(map(dict, optimizer.param_groups))
    return Guest(optimizer, role)
