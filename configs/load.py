"""TOML file + its `base` files + `section.key=value` overrides -> RunConfig, or an error that says what and where.

A file may name another with `base = "other.toml"` (relative to itself): its keys are laid over the base's, key by key.
The name of the run is not inherited: it is `run.name` of the file itself, or the file's own name where it has none.
Sections that choose something by name keep its own keys in a table of that name:

    [embedding]
    method = "robe"
    [embedding.robe]
    block_size = 16
"""

import difflib
import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from configs.schema import ChecksWorldSize, RunConfig, Section

S = TypeVar("S", bound=Section)
Choices = Mapping[str, tuple[str, Mapping[str, type[BaseModel]]]]
"""section -> (the key that chooses, name -> Options of that choice): what the registries offer."""


class ConfigError(ValueError):
    """A user's mistake in a config file or an override; the message names file, key, value and what is allowed."""


class _Layers:
    """The merged keys, and for each dotted key the file or override that set it."""

    def __init__(self, default_source: str) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.default_source = default_source

    def lay(self, values: Mapping[str, Any], source: str) -> None:
        self._lay(self.values, values, (), source)

    def _lay(self, into: dict[str, Any], values: Mapping[str, Any], path: tuple[str, ...], source: str) -> None:
        for key, value in values.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                if not isinstance(into.setdefault(key, {}), dict):
                    raise ConfigError(f"{source}: {'.'.join(here)} is a table here and a value in a base file")
                self._lay(into[key], value, here, source)
            else:
                into[key] = value
            self.sources[".".join(here)] = source

    def source(self, path: Sequence[str]) -> str:
        """Where the key, or else its nearest enclosing table, was set."""
        for end in range(len(path), 0, -1):
            if (found := self.sources.get(".".join(path[:end]))) is not None:
                return found
        return self.default_source


def _read_file(path: Path, layers: _Layers, seen: tuple[Path, ...] = ()) -> None:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: base files form a circle: {' -> '.join(p.name for p in (*seen, resolved))}")
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        hint = f" (named as base by {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}: cannot be read{hint}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    base = values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base = {base!r}: must be a file name")
        _read_file(path.parent / base, layers, (*seen, resolved))
    if seen and isinstance(values.get("run"), dict):
        values["run"].pop("name", None)  # else two files over one base would write to the same run directory
    layers.lay(values, str(path))


def run_name(path: str | Path) -> str:
    """Return the name of the runs that a config file starts: its own `run.name`, or else the name of the file.

    A file that cannot be read has its own name here; `load_config` says what is wrong with it.
    """
    try:
        name = tomllib.loads(Path(path).read_text())["run"]["name"]
    except (OSError, ValueError, LookupError, TypeError):
        name = ""
    return name if isinstance(name, str) and name else Path(path).stem


def _parse_override(override: str) -> dict[str, Any]:
    """'section.key=value' -> nested tables; a value that is not valid TOML is taken as a string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r}: must look like section.key=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(parts):
        value = {part: value}
    return value


def _similar(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _describe(error: Any, model: type[BaseModel], prefix: tuple[str, ...], layers: _Layers) -> str:
    path = (*prefix, *(str(part) for part in error["loc"]))
    source, key = layers.source(path), ".".join(path)
    match error["type"]:
        case "missing":
            return f"{source}: {key} is missing"
        case "extra_forbidden":
            for part in error["loc"][:-1]:
                model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
            known = sorted(set(model.model_fields) - {"options"})
            return (
                f"{source}: {key} = {error['input']!r}: unknown key{_similar(path[-1], known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
        case "value_error":
            return f"{source}: {key + ': ' if key else ''}{error['ctx']['error']}"
    return f"{source}: {key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _validate(model: type[BaseModel], values: Mapping[str, Any], prefix: tuple[str, ...], layers: _Layers) -> Any:
    try:
        # Through JSON: strict there still takes an array for a tuple, which TOML cannot write otherwise.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        found = [_describe(e, model, prefix, layers) for e in error.errors()]
        raise ConfigError("\n".join(found)) from None


def _take_options(layers: _Layers, choices: Choices) -> dict[str, BaseModel]:
    """Removes the [section.<name>] tables from the layers and returns the chosen one of each section, validated."""
    options = {}
    for section, (selector, registry) in choices.items():
        values = layers.values.get(section)
        if not isinstance(values, dict):
            continue
        tables = {key: values.pop(key) for key in list(values) if isinstance(values[key], dict)}
        for name in tables:
            if name not in registry:
                raise ConfigError(
                    f"{layers.source((section, name))}: [{section}.{name}]: unknown {selector}"
                    f"{_similar(name, list(registry))}; known: {', '.join(sorted(registry))}"
                )
        checked = {n: _validate(registry[n], table, (section, n), layers) for n, table in tables.items()}
        chosen = values.get(selector)
        if isinstance(chosen, str):
            if chosen not in registry:
                raise ConfigError(
                    f"{layers.source((section, selector))}: {section}.{selector} = {chosen!r}: unknown"
                    f"{_similar(chosen, list(registry))}; known: {', '.join(sorted(registry))}"
                )
            if chosen not in checked:
                checked[chosen] = _validate(registry[chosen], {}, (section, chosen), layers)
            options[section] = checked[chosen]
    return options


def load_config(path: str | Path, overrides: Sequence[str], choices: Choices) -> RunConfig:
    """The config of one run. Raises ConfigError, listing every mistake found in a section."""
    path = Path(path)
    layers = _Layers(default_source=str(path))
    _read_file(path, layers)
    for override in overrides:
        layers.lay(_parse_override(override), f"override {override!r}")
    options = _take_options(layers, choices)
    config = _validate(RunConfig, layers.values, (), layers)
    updates: dict[str, Any] = {s: getattr(config, s).model_copy(update={"options": o}) for s, o in options.items()}
    if not config.run.name:
        updates["run"] = config.run.model_copy(update={"name": path.stem})
    config = config.model_copy(update=updates)
    for section, chosen in options.items():
        name = getattr(config, section).model_dump()[choices[section][0]]
        try:
            if isinstance(chosen, ChecksWorldSize):
                chosen.check_world_size(config.parallelism.world_size)
        except ValueError as error:
            raise ConfigError(f"{layers.source((section, name))}: {section}.{name}: {error}") from None
    return config


def override_section(section: S, name: str, overrides: Sequence[str]) -> S:
    """Return the section with every `name.key=value` of the overrides laid over it. Raises ConfigError."""
    layers = _Layers(name)
    layers.lay({name: section.model_dump()}, name)
    for override in overrides:
        values = _parse_override(override)
        if name in values:
            layers.lay(values, f"override {override!r}")
    return _validate(type(section), layers.values[name], (name,), layers)


def resolved(config: RunConfig, choices: Choices) -> dict[str, Any]:
    """The config with every default filled in, as nested tables that `load_config` reads back to the same config."""
    tables = config.model_dump(exclude_none=True, mode="json")
    for section, (selector, _) in choices.items():
        tables[section][tables[section][selector]] = tables[section].pop("options")
    return tables


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: nested tables by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def dump_config(config: RunConfig, choices: Choices) -> str:
    """The resolved config as TOML."""
    return tomli_w.dumps(resolved(config, choices))


def describe_keys(choices: Choices, wanted: str = "") -> str:
    """Describe every key with type, default and meaning, by section.

    wanted: one section ("embedding", with the options of all its choices) or the options of one choice
    ("embedding.robe"); all sections if empty. Raises ConfigError for a section that does not exist.
    """
    sections = _list_sections(choices)
    chosen = [name for name in sections if not wanted or name == wanted or name.startswith(f"{wanted}.")]
    if not chosen:
        raise ConfigError(f"no section {wanted!r}{_similar(wanted, list(sections))}; known: {', '.join(sections)}")
    lines: list[str] = []
    for name in chosen:
        if sections[name].model_fields or name == wanted:
            _describe_section(f"[{name}]", sections[name], lines)
    return "\n".join(lines)


def _list_sections(choices: Choices) -> dict[str, type[BaseModel]]:
    """Return every section by its dotted name; a section's choices, such as embedding.robe, follow it."""
    sections: dict[str, type[BaseModel]] = {}
    for section, info in RunConfig.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        sections[section] = model
        sections |= {f"{section}.{name}": option for name, option in choices.get(section, ("", {}))[1].items()}
    return sections


def _describe_section(title: str, model: type[BaseModel], lines: list[str]) -> None:
    lines.append(title)
    for key, field in model.model_fields.items():
        if key == "options":
            continue
        kind = getattr(field.annotation, "__name__", None) if isinstance(field.annotation, type) else None
        kind = kind or str(field.annotation).replace("typing.", "").replace(" | None", "")
        default = "required" if field.is_required() else f"default {json.dumps(field.default, default=str)}"
        lines.append(f"  {key}  ({kind}, {default})")
        lines += textwrap.wrap(field.description or "", width=112, initial_indent=" " * 6, subsequent_indent=" " * 6)
