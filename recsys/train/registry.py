"""What a config may name: the registries of datasets, models and methods as `configs.load` wants them."""

from configs.load import Choices
from recsys.data.registry import DATASETS
from recsys.embedding.registry import METHODS
from recsys.models.registry import MODELS

CHOICES: Choices = {
    "data": ("dataset", {name: kind.Options for name, kind in DATASETS.items()}),
    "model": ("architecture", {name: kind.Options for name, kind in MODELS.items()}),
    "embedding": ("method", {name: method.Options for name, method in METHODS.items()}),
}
