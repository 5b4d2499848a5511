"""The datasets by the names that configs choose them by: THE registry. Adding one: its file, and a line in DATASETS."""

import json
from pathlib import Path

from configs.load import ConfigError
from configs.schema import DataSection
from recsys.data.criteo import Criteo
from recsys.data.dataset import Dataset
from recsys.data.movielens import MovieLens
from recsys.data.synthetic import SyntheticCriteo

DATASETS: dict[str, type[Dataset]] = {
    "criteo": Criteo,
    "movielens": MovieLens,
    "synthetic": SyntheticCriteo,
}


def build_dataset(section: DataSection) -> Dataset:
    """Return the dataset that a config chooses. Raises what `Dataset.build` raises."""
    return DATASETS[section.dataset].build(section.options, Path(section.cache_dir))


def find_dataset(path: str | Path) -> tuple[str, list[str]]:
    """Return the name of the dataset whose files lie at a path, and the keys of a config that name them.

    Every registered dataset is asked. Raises ConfigError where nothing lies there, or what no dataset, or more than
    one, takes for its own.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"--data {path}: no such file or directory")
    found = {name: options for name, kind in DATASETS.items() if (options := kind.from_path(path)) is not None}
    if len(found) != 1:
        known = "; ".join(f"{name}: {kind.files}" for name, kind in DATASETS.items() if kind.files)
        said = f"files of {' and '.join(found)}: name one of them" if found else "files of no dataset"
        raise ConfigError(f"--data {path}: {said}. Known are {known}")
    [(name, options)] = found.items()
    return name, [f"data.{name}.{key}={json.dumps(value)}" for key, value in options.items()]
