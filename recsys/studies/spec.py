"""A study as data: what is run, what is tuned, what it is compared with, and the numbers of a paper beside it.

A file of configs/experiments/ is one study. Its runs are all combinations of settings, models, methods, compressions
and seeds; `launch.study` makes them, `recsys.studies.tables` and `recsys.studies.page` show what they measured.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from configs.load import ConfigError
from configs.schema import Section
from recsys.data.registry import DATASETS
from recsys.embedding.registry import METHODS
from recsys.models.registry import MODELS

DIRECTORY = Path(__file__).resolve().parents[2] / "configs" / "experiments"
Layout = Literal["models", "trade", "methods", "grid"]
Value = bool | int | float | str | list[int] | list[float] | list[list[int | float]]


class Method(Section):
    """Describe a way to store embeddings, at one or more compressions."""

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
    """Describe the rows, and what of the runs goes with them."""

    config: str
    """A file of configs/, which all runs share."""
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
    """Hold the paper's figures of one model, each by compression; compression 1 = full tables."""

    method: str = ""
    """The method that they are of."""
    auc: dict[str, float] = Field(default={})
    epochs: dict[str, float | str] = Field(default={})
    seconds: dict[str, float] = Field(default={})
    """Of 1,000 training iterations."""
    relative_time: dict[str, float] = Field(default={})
    target: float | None = None


class Study(Section):
    """Describe methods × compressions × models × settings × seeds, and how their results are laid out."""

    title: str
    reference: str
    """Paper, table or figure, and its setting; empty = no paper's."""
    layout: Layout
    """models: a row a model (Table 3). trade: a row a figure (Table 4). methods: a row a method (Table 1). grid: a row
    a method and compression."""
    runs: str = ""
    """Another study whose runs these are too; empty = its own."""
    unreachable: Literal["problem", "highest"] = "problem"
    """Of a compression that a method cannot reach. problem: it is listed and not run. highest: the same, but a method
    that reaches none of its compressions is run at the highest that it does."""
    architectures: tuple[str, ...] = Field(min_length=1)
    methods: tuple[Method, ...] = Field(min_length=2)
    """The first is the baseline, full tables."""
    seeds: tuple[int, ...] = Field(min_length=1)
    epsilon: float = Field(default=0.001, gt=0)
    """Differences of AUC within ± epsilon are none."""
    data: dict[str, Source] = Field(min_length=1)
    """"generated", or the name of the dataset whose files --data names -> rows; the first is taken without --data."""
    paper: dict[str, PaperRow] = Field(default={})

    @model_validator(mode="after")
    def _check(self) -> "Study":
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
        """Return the method that the others are set against."""
        return self.methods[0]

    def find_method(self, name: str) -> Method:
        """Return the method of a name that the study has."""
        return next(method for method in self.methods if method.name == name)


def find_studies() -> dict[str, Path]:
    """Return the file of every study by its name, in alphabetical order."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.toml"))}


def load_study(path: Path) -> Study:
    """Return the study of a file. Raises ConfigError naming file, key and value."""
    values = _read_file(path)
    try:
        return parse_study(_expand(values))
    except ValidationError as error:
        mistakes = [
            f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r:.80})" for e in error.errors()
        ]
        raise ConfigError("\n".join(mistakes)) from None


def _read_file(path: Path) -> dict[str, Any]:
    """Return the keys of a file, laid over those of the file that it names as its base, if any: whole keys replace."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    base = values.pop("base", None)
    return values if base is None else _read_file(path.with_name(base)) | values


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys with those written once written out: `compressions` and `every_method`.

    compressions: of every method that names none. every_method = true: each registered method that no entry is of
    becomes one, with its default options; methods that only place full tables elsewhere are left out.
    """
    values = dict(values)
    compressions, every_method = values.pop("compressions", None), values.pop("every_method", False)
    methods = values.get("methods")
    if compressions is None or not isinstance(methods, list):
        return values
    entries = [{"compressions": compressions} | method for method in methods]
    if every_method:
        named = {method.get("overrides", {}).get("embedding.method") for method in entries}
        entries += [
            {"name": name, "title": name, "compressions": compressions, "overrides": {"embedding.method": name}}
            for name, method in METHODS.items()
            if name not in named and method.placement != "shard"
        ]
    return values | {"methods": entries}


def parse_study(values: dict[str, Any]) -> Study:
    """Return the study of keys as JSON has them. Raises pydantic's ValidationError."""
    return Study.model_validate_json(json.dumps(values))  # strict mode takes an array for a tuple in JSON alone


def as_overrides(values: dict[str, Value]) -> list[str]:
    """Return {"training.epochs": 2} as ["training.epochs=2"]."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
