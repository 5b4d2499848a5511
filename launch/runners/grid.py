"""The trials of a sweep: configs x swept values x seeds, each with a name that tells it apart."""

import itertools
import re
from collections.abc import Sequence

from configs.load import ConfigError, run_name
from launch.runners.trial import Trial


def build_trials(
    configs: Sequence[str], overrides: Sequence[str], swept: Sequence[str], seeds: Sequence[int]
) -> list[Trial]:
    """Return every config with every combination of the swept values ("section.key=A,B") and every seed."""
    axes = [_parse_swept(text) for text in swept]
    last = [key.rpartition(".")[2] for key, _ in axes]
    short = [name if last.count(name) == 1 else key for name, (key, _) in zip(last, axes, strict=True)]
    trials = []
    for config, values, seed in itertools.product(configs, itertools.product(*(v for _, v in axes)), seeds):
        settings = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
        named = [f"{name}{_plain(value)}" for name, value in zip(short, values, strict=True)]
        name = "_".join([run_name(config), *named, f"s{seed}"])
        trials.append(Trial(config, (*overrides, *settings, f"run.seed={seed}"), name))
    return trials


def _parse_swept(text: str) -> tuple[str, list[str]]:
    """Return 'a.b=1e9,[2,3]' as ('a.b', ['1e9', '[2,3]']): commas within brackets do not part values."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--set {text}: must look like section.key=A,B")
    return key.strip(), re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", values)


def _plain(value: str) -> str:
    """Return a value with what a directory's name should not hold replaced by dashes."""
    return re.sub(r"[^\w.]+", "-", value).strip("-")
