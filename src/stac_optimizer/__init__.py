"""STAC: sign trunk, AdamW cap. One ``torch.optim.Optimizer`` for a whole model."""

from importlib.metadata import PackageNotFoundError, version

from stac_optimizer import optim, recipes, wrappers
from stac_optimizer.distributed.vote import MajorityVote
from stac_optimizer.model.layers import STACLayer
from stac_optimizer.model.partition import STACPartition, partition_trainable_layers
from stac_optimizer.model.selectors import (
    biases,
    embeddings,
    last_layers,
    named,
    norms,
    of_type,
    parameters_where,
    vectors,
    where,
)
from stac_optimizer.roles.layerwise import layerwise_lr_decay
from stac_optimizer.stac import STAC

__all__ = [
    "STAC",
    "MajorityVote",
    "STACLayer",
    "STACPartition",
    "__version__",
    "biases",
    "embeddings",
    "last_layers",
    "layerwise_lr_decay",
    "named",
    "norms",
    "of_type",
    "optim",
    "parameters_where",
    "partition_trainable_layers",
    "recipes",
    "vectors",
    "where",
    "wrappers",
]

try:
    __version__ = version("stac-optimizer")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
