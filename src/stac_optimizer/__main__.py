"""How a model would be split: ``python -m stac_optimizer MODEL`` prints the partition, and what its state takes.

    python -m stac_optimizer torchvision.models:resnet50
    python -m stac_optimizer transformers:gpt2 --recipe transformer

No weights are made: the model is built on the device "meta".
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stac_optimizer import recipes
from stac_optimizer.stac import STAC

LR = 1e-3
MODEL_HELP = (
    "module:name of a model, or of a function or class that makes one without arguments; or transformers:TYPE, a model "
    "type such as gpt2, or the folder of a config.json"
)


class NoModelError(ValueError):
    """What was given is no model."""


def find_model(path: str) -> nn.Module:
    """The model at an import path, or of a configuration of transformers. What the user's own code raises, passes.

    Raises:
        NoModelError: there is no such model.
    """
    module, _, name = path.partition(":")
    if not module or module.startswith(".") or not name:
        raise NoModelError(f"MODEL must be {MODEL_HELP}; got {path!r}")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise NoModelError(f"{module!r} of {path!r} cannot be imported: {error}") from error
    with torch.device("meta"):
        if module == "transformers":
            return _of_configuration(found, name)
        for part in name.split("."):
            if not hasattr(found, part):
                raise NoModelError(f"{module!r} has no {name!r}")
            found = getattr(found, part)
        make: Any = found
        if not isinstance(make, nn.Module) and (problem := _call_problem(make)):
            raise NoModelError(f"{path!r} makes no model without arguments: {problem}")
        model = make if isinstance(make, nn.Module) else make()
    if not isinstance(model, nn.Module):
        raise NoModelError(f"{path!r} made a {type(model).__name__}, and no torch.nn.Module")
    return model


def _call_problem(make: Any) -> str | None:
    """Why something cannot be called without arguments, or None."""
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        return str(error)
    except ValueError:  # what is not written in Python may have no signature
        return None
    return None


def _of_configuration(transformers: Any, name: str) -> nn.Module:
    """A model by its type or the folder of its configuration: of the class named there, or with a head for text."""
    known = os.path.isdir(name)
    if not known and name not in transformers.CONFIG_MAPPING:
        raise NoModelError(f"{name!r} is neither a model type of transformers nor a folder with a config.json")
    config = transformers.AutoConfig.from_pretrained(name) if known else transformers.AutoConfig.for_model(name)
    kinds = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    if kinds and kinds[0] is not None:
        model: nn.Module = kinds[0](config)
        return model
    try:
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    except ValueError:  # a type without one
        return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]


def fitting_recipe(model: nn.Module) -> str:
    """The name of the recipe for this kind of model, by its modules."""
    modules = list(model.modules())
    if any(isinstance(module, nn.LSTM | nn.GRU | nn.RNN) for module in modules):
        return "rnn"
    has_images = any(isinstance(module, nn.Conv2d) for module in modules)
    has_tokens = any(isinstance(module, nn.Embedding) and module.num_embeddings > 512 for module in modules)
    if has_images and not has_tokens:
        return "vision"
    attends = any("attention" in type(module).__name__.lower() for module in modules)
    return "transformer" if attends or has_tokens else "mlp"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the partition."""
    parser = argparse.ArgumentParser("python -m stac_optimizer", description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--recipe", choices=[*recipes.__all__, "none"], help="(default: one that fits; none: the last layer as cap)"
    )
    options = parser.parse_args(argv)
    try:
        model = find_model(options.model)
    except NoModelError as error:
        parser.error(str(error))
    chosen = options.recipe or fitting_recipe(model)
    arguments = {"lr": LR} if chosen == "none" else getattr(recipes, chosen)(lr=LR)
    try:
        optimizer = STAC(model, **arguments)
    except ValueError as error:
        parser.error(f"{options.model}: {error}")
    print(optimizer.partition)
    print(f"STAC(model, {f'lr={LR}' if chosen == 'none' else f'**recipes.{chosen}(lr={LR})'})")


if __name__ == "__main__":
    main()
