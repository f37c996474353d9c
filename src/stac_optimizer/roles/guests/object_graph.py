"""Any graph of objects as a table of plain nodes that ``torch.load(weights_only=True)`` takes, and back.

A node describes one object. Parameters stand as ``{"param": index}`` and other nodes as ``{"node": number}``, so that
what was one object is one object again. Reading fills the living objects in their places, for closures may refer to
them (the factory of a defaultdict to the defaults of its module), and builds anew only what stepping had brought.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["PLAIN", "GraphReader", "GraphWriter", "Node", "package_of", "path_of"]

Node = dict[str, Any]

# What stands in a node as it is.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
CONTAINERS = (dict, list, deque, set, tuple, frozenset)
# Known by name alone; of modules (torch's too) not even that, for what is living stands.
CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, torch.nn.Module)


def package_of(value: Any) -> str:
    """The package in which a class or function was defined, whatever imports it; of other objects that of the class."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).partition(".")[0]


def path_of(code: Any) -> list[Any]:
    """Where a class or function is found again: "module:name", and of a local function the place of its code.

    That is its place among the constants of the function that makes it; None of others, and of closures, which cannot
    be made again.
    """
    outer, is_local, _ = code.__qualname__.rpartition(".<locals>.")
    has_no_closure = getattr(code, "__closure__", ()) is None
    maker = _found(f"{code.__module__}:{outer}") if is_local and has_no_closure else None
    constants = maker.__code__.co_consts if maker is not None else ()
    place = next((index for index, constant in enumerate(constants) if constant is code.__code__), None)
    return [f"{code.__module__}:{code.__qualname__}", place]


def _found(path: str, place: int | None = None) -> Any:
    """The class or function at a path in a module that is imported already, or None. Runs no code."""
    module, _, name = path.partition(":")
    outer, is_local, local = name.rpartition(".<locals>.")
    if is_local:
        maker = _found(f"{module}:{outer}")
        code = maker.__code__.co_consts[place] if maker is not None and place is not None else None
        return types.FunctionType(code, maker.__globals__, local) if isinstance(code, types.CodeType) else None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return inspect.unwrap(found) if isinstance(found, types.FunctionType) else found


class GraphWriter:
    """Writes objects as nodes, each once.

    Args:
        params: what stands by its index.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._indices = {id(param): index for index, param in enumerate(params)}
        self._beside = {param.device: index for index, param in reversed(list(enumerate(params)))}
        self.nodes: list[Node] = []
        self.seen: dict[int, tuple[int, Any]] = {}
        """By id the number and the object, which is held so that no other gets its id."""

    def write(self, value: Any, skipped: Iterable[str] = ()) -> Any:
        """Write an object and all that it holds.

        Args:
            value: the object.
            skipped: attributes of it to leave out.

        Returns:
            What stands for it in other nodes.
        """
        if type(value) in PLAIN:
            return value
        if id(value) in self._indices:
            return {"param": self._indices[id(value)]}
        if id(value) not in self.seen:
            node: Node = {}
            # Numbered before it is described, for it may hold itself.
            self.seen[id(value)] = len(self.nodes), value
            self.nodes.append(node)
            node.update(self._leaf(value) or self._code(value) or self._object(value, skipped))
        return {"node": self.seen[id(value)][0]}

    def _leaf(self, value: Any) -> Node | None:
        """What holds data and no other objects."""
        if isinstance(value, Tensor):
            # As it is, without copying, as state dicts show tensors. It goes back beside the parameter it lay beside.
            return {"tensor": value.data, "requires_grad": _is_leaf(value), "beside": self._beside.get(value.device)}
        if isinstance(value, torch.Generator):
            return {"generator": value.get_state(), "device": value.device}
        if isinstance(value, random.Random):
            return {"random": value.getstate()}
        if type(value).__module__ == "numpy":
            return {"array": torch.as_tensor(value).clone(), "scalar": not hasattr(value, "__array_finalize__")}
        return None

    def _code(self, value: Any) -> Node | None:
        if isinstance(value, types.MethodType):
            return {"code": path_of(value), "owner": self.write(value.__self__)}
        if isinstance(value, types.FunctionType | type):
            return {"code": path_of(value)}
        if isinstance(value, CODE):
            return {"code": [f"{type(value).__name__}:", None]}
        if isinstance(value, functools.partial):
            return {"partial": [self.write(part) for part in (value.func, value.args, value.keywords)]}
        return None

    def _object(self, value: Any, skipped: Iterable[str]) -> Node:
        node: Node = {"class": path_of(type(value))[0]}
        if isinstance(value, dict):
            node["pairs"] = [[self.write(key), self.write(item)] for key, item in value.items()]
            node["factory"] = self.write(getattr(value, "default_factory", None))
        elif isinstance(value, CONTAINERS):
            node.update(items=[self.write(item) for item in value], maxlen=getattr(value, "maxlen", None))
        if hasattr(value, "__dict__"):
            node["attributes"] = [[key, self.write(item)] for key, item in vars(value).items() if key not in skipped]
        return node


def _is_leaf(tensor: Tensor) -> bool:
    """Whether gradients are accumulated in it."""
    try:
        return tensor.requires_grad and tensor.is_leaf
    except RuntimeError:  # a view made without gradients, whose base was replaced, has no history to ask for
        return tensor.requires_grad


class GraphReader:
    """Reads nodes into living objects, none of which changes before :meth:`commit`.

    Args:
        params: what stands by its index.
        nodes: the table; its tensors are taken over.
        may_build: which classes and functions may be taken by their name.
    """

    def __init__(self, params: Sequence[Tensor], nodes: Sequence[Node], may_build: Callable[[Any], bool]) -> None:
        self._params, self._nodes, self._may_build = params, nodes, may_build
        self._made: dict[int, Any] = {}
        self._filled: set[int] = set()
        self._jobs: list[Callable[[], Any]] = []

    def commit(self) -> None:
        """Fill the living objects."""
        for job in self._jobs:
            job()

    def read(self, data: Any, living: Any = None) -> Any:
        """The object that something in a node stands for.

        Args:
            data: what :meth:`GraphWriter.write` returned.
            living: what is in its place now; it is filled where it is of the same kind.

        Raises:
            ValueError: a class or function that may not be built.
        """
        if not isinstance(data, dict):
            return data
        if "param" in data:
            return self._params[data["param"]]
        number = data["node"]
        if number not in self._made:
            node = self._nodes[number]
            if "class" in node:
                self._read_object(number, node, living)
            else:
                self._made[number] = self._code(node, living) if "code" in node else self._leaf(node, living)
        return self._made[number]

    def _leaf(self, node: Node, living: Any) -> Any:
        if "tensor" in node:
            tensor: Tensor = node["tensor"]
            device = tensor.device if node["beside"] is None else self._params[node["beside"]].device
            return tensor.to(device).requires_grad_(node["requires_grad"])
        if "generator" in node:
            generator = torch.Generator(node["device"])
            generator.set_state(node["generator"].cpu())
            return generator
        if "random" in node:
            dice = random.Random()
            dice.setstate(node["random"])
            return dice
        if "array" in node:
            array = node["array"].numpy()
            return array[()] if node["scalar"] else array
        return self._partial(node, living)

    def _partial(self, node: Node, living: Any) -> Any:
        before = (living.func, living.args, living.keywords) if isinstance(living, functools.partial) else [None] * 3
        parts = [self.read(part, old) for part, old in zip(node["partial"], before, strict=True)]
        made: Any = functools.partial(parts[0])
        # The very dict of keywords, which is filled later.
        made.__setstate__((*parts, {}))
        return made

    def _code(self, node: Node, living: Any) -> Any:
        owner = self.read(node.get("owner"), getattr(living, "__self__", None))
        if isinstance(living, CODE):
            return living
        method = getattr(type(owner), node["code"][0].rpartition(".")[2], None) if owner is not None else None
        return types.MethodType(method, owner) if method is not None else self._looked_up(*node["code"])

    def _read_object(self, number: int, node: Node, living: Any) -> None:
        if path_of(type(living))[0] != node["class"] or id(living) in self._filled:
            living = None
        kind: Any = type(living) if living is not None else self._looked_up(node["class"])
        if issubclass(kind, tuple | frozenset):  # can't be filled later
            items = self._items(node, living)
            self._made[number] = kind(*items) if hasattr(kind, "_fields") else kind(items)
            return
        made = living if living is not None else _empty(kind, node)
        self._made[number] = made
        self._filled.add(id(made))
        if "pairs" in node:
            if living is None and hasattr(made, "default_factory"):
                made.default_factory = self.read(node["factory"])
            keyed = [(self.read(key), item) for key, item in node["pairs"]]
            content = {key: self.read(item, made.get(key)) for key, item in keyed}
            self._jobs += [made.clear, functools.partial(made.update, content)]
        elif "items" in node:
            fill = made.update if isinstance(made, set) else made.extend
            self._jobs += [made.clear, functools.partial(fill, self._items(node, made))]
        if "attributes" in node:
            attributes = {key: self.read(item, vars(made).get(key)) for key, item in node["attributes"]}
            self._jobs.append(functools.partial(vars(made).update, attributes))

    def _items(self, node: Mapping[str, Any], living: Any) -> list[Any]:
        """What a container holds, read into what it holds now, place by place."""
        old = list(living) if isinstance(living, list | tuple | deque) else []
        old += [None] * (len(node["items"]) - len(old))
        return [self.read(item, before) for item, before in zip(node["items"], old, strict=False)]

    def _looked_up(self, path: str, place: int | None = None) -> Any:
        found = _found(path, place)
        holds_data = isinstance(found, type) and issubclass(found, (*CONTAINERS, ChainMap, Optimizer))
        is_known = holds_data or found in torch.serialization.get_safe_globals()
        if found is None or not (is_known or self._may_build(found)):
            raise ValueError(
                f"the optimizer's state holds {path!r}, which a checkpoint brings only where "
                "torch.serialization.add_safe_globals allows it"
            )
        return found


def _empty(kind: Any, node: Node) -> Any:
    return deque(maxlen=node["maxlen"]) if kind is deque else kind.__new__(kind)
