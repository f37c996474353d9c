"""STAC: sign trunk, AdamW cap. One ``torch.optim.Optimizer`` for a whole model."""

from importlib.metadata import PackageNotFoundError, version

from stac_optimizer.partition import STACLayer, STACPartition, partition_trainable_layers
from stac_optimizer.selectors import embeddings, last_layers, named, norms, of_type, where
from stac_optimizer.stac import STAC
from stac_optimizer.vote import MajorityVote

__all__ = [
    "STAC",
    "MajorityVote",
    "STACLayer",
    "STACPartition",
    "__version__",
    "embeddings",
    "last_layers",
    "named",
    "norms",
    "of_type",
    "partition_trainable_layers",
    "where",
]

try:
    __version__ = version("stac-optimizer")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
