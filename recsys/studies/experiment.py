"""A paper's experiment as data: what is run, what is tuned, what it is compared with, and the paper's own numbers.

A file of configs/experiments/ is one experiment. Its runs are all combinations of settings, models, methods,
compressions and seeds; `launch.study` makes them, the rest of `recsys.experiment_*` makes tables of them.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from configs.load import ConfigError
from configs.schema import Section
from recsys.data.registry import DATASETS
from recsys.models.registry import MODELS

DIRECTORY = Path(__file__).resolve().parents[2] / "configs" / "experiments"
Layout = Literal["models", "trade", "methods"]
Value = bool | int | float | str | list[int] | list[float]


class Method(Section):
    """A way to store embeddings, at one or more compressions."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    title: str
    """As tables have it."""
    claim: str = ""
    """What the paper says of it."""
    compressions: tuple[float, ...] = Field(min_length=1)
    overrides: dict[str, Value]
    """Keys of a config; embedding.method among them."""

    @field_validator("compressions")
    @classmethod
    def _ascend(cls, compressions: tuple[float, ...]) -> tuple[float, ...]:
        if min(compressions) < 1 or list(compressions) != sorted(set(compressions)):
            raise ValueError(f"{list(compressions)}: must be at least 1, ascending, each once")
        return compressions


class Source(Section):
    """The rows, and what of the runs goes with them."""

    config: str
    """A file under configs/, which all runs share, such as demo/base.toml."""
    overrides: dict[str, Value] = Field(default={})
    """Laid over it for all runs."""
    settings: dict[str, dict[str, Value]] = Field(default={"": {}})
    """Name -> keys laid over it in turn: everything is run under each."""
    rates: tuple[float, ...] = Field(min_length=1)
    """Grid of optimizer.embedding_learning_rate, the same for every method and compression."""
    scaled: dict[str, float] = Field(default={})
    """Keys that --scale multiplies, and the most they can be; 0 = anything."""
    microseconds_per_row: dict[str, float] = Field(default={})
    """Model -> core time of training on a row, for the estimate of the time: measured on 2 cores of an AMD EPYC."""
    shows: str
    """What this data can show, and what it cannot."""


class PaperRow(Section):
    """The paper's figures of one model, each by compression; compression 1 = full tables."""

    method: str = ""
    """The method that they are of."""
    auc: dict[str, float] = Field(default={})
    epochs: dict[str, float | str] = Field(default={})
    seconds: dict[str, float] = Field(default={})
    """Of 1,000 training iterations."""
    relative_time: dict[str, float] = Field(default={})
    target: float | None = None


class Experiment(Section):
    title: str
    reference: str
    """Paper, table or figure, and its setting."""
    layout: Layout
    """models: a row a model (Table 3). trade: a row a figure (Table 4). methods: a row a method (Table 1)."""
    runs: str = ""
    """Another experiment whose runs these are too; empty = its own."""
    architectures: tuple[str, ...] = Field(min_length=1)
    methods: tuple[Method, ...] = Field(min_length=2)
    """The first is the baseline, full tables."""
    seeds: tuple[int, ...] = Field(min_length=1)
    epsilon: float = Field(default=0.001, gt=0)
    """Differences of AUC within ± epsilon are none."""
    data: dict[str, Source] = Field(min_length=1)
    """"generated", or the name of the dataset whose files --data names -> rows."""
    paper: dict[str, PaperRow] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        if unknown := [name for name in self.architectures if name not in MODELS]:
            raise ValueError(f"architectures: unknown: {', '.join(unknown)}; known: {', '.join(sorted(MODELS))}")
        if unknown := self.data.keys() - {"generated", *DATASETS}:
            raise ValueError(f"data.{min(unknown)}: no dataset; known: generated, {', '.join(DATASETS)}")
        if self.methods[0].compressions != (1.0,):
            raise ValueError(
                f"methods: the first is the baseline, at compression 1, not {self.methods[0].compressions}"
            )
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods: a name is given twice: {', '.join(names)}")
        for method in self.methods:
            if "embedding.method" not in method.overrides:
                raise ValueError(f"methods: {method.name}: overrides lack embedding.method")
        return self

    @property
    def baseline(self) -> Method:
        return self.methods[0]

    def find_method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


def find_experiments() -> dict[str, Path]:
    """Name -> file, in alphabetical order."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.toml"))}


def load_experiment(path: Path) -> Experiment:
    """Raises ConfigError naming file, key and value."""
    values = _read_file(path)
    try:
        return parse_experiment(values)
    except ValidationError as error:
        found = [
            f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r:.80})" for e in error.errors()
        ]
        raise ConfigError("\n".join(found)) from None


def _read_file(path: Path) -> dict[str, Any]:
    """With the keys of the file it names as its base, if any, in the same directory: own keys replace them whole."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    base = values.pop("base", None)
    return values if base is None else _read_file(path.with_name(base)) | values


def parse_experiment(values: dict[str, Any]) -> Experiment:
    """Through JSON: strict there still takes an array for a tuple. Raises pydantic's ValidationError."""
    return Experiment.model_validate_json(json.dumps(values))


def as_overrides(values: dict[str, Value]) -> list[str]:
    """{"training.epochs": 2} -> ["training.epochs=2"]"""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
