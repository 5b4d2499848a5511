"""Every config file loads, says what it claims, and shares with its rivals all but [embedding] and [parallelism]."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from configs.load import ConfigError, load_config, resolved, run_name
from configs.schema import RunConfig
from pss.method import EmbeddingRequest
from recsys.data.criteo_tsv import CARDINALITIES
from recsys.embedding.registry import METHODS
from recsys.embedding.sizes import count_full_parameters, count_parameters
from recsys.embedding.tables import build_tables
from recsys.models.registry import MODELS
from recsys.train.registry import CHOICES

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "configs"
CONFIGS = sorted(path for path in DIRECTORY.rglob("*.toml") if path.parent.name != "experiments")
COMPARED = [path for path in CONFIGS if "base" in tomllib.loads(path.read_text())]
FAMILIES = ("demo", "criteo_sample", "criteo_kaggle", "criteo_tb")
MAY_DIFFER = {"embedding", "parallelism"}


def shown(path: Path) -> str:
    return str(path.relative_to(DIRECTORY).with_suffix(""))


def shared_sections(path: Path) -> dict:
    sections = resolved(load_config(path, ["run.name=any"], CHOICES), CHOICES)
    return {name: value for name, value in sections.items() if name not in MAY_DIFFER}


def header_of(path: Path) -> dict[str, str]:
    """The comment above the first key: "# command:  make demo" -> {"command": "make demo"}."""
    comment = path.read_text().partition("\n\n")[0]
    return dict(re.findall(r"^# (\w+): +(.+)$", comment, re.MULTILINE))


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_it_loads_with_every_model(path):
    """What the file says of another model's layers stays in the file."""
    for architecture, model in MODELS.items():
        config = load_config(path, [f"model.architecture={architecture}"], CHOICES)
        assert isinstance(config.model.options, model.Options)


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_its_header_says_how_it_is_run_on_what_and_what_comes_of_it(path):
    header = header_of(path)
    command = header["command"]
    target = re.match(r"make ([\w-]+)", command)
    if target:
        assert re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert f"configs/{shown(path)}.toml" in command or path.name == "base.toml"
        assert all((ROOT / named).exists() for named in re.findall(r"configs/\S+\.toml", command))
    unmeasured = header.get("measured", "").startswith("not")
    assert unmeasured or re.search("second|minute|hour", header["hardware"]), "hardware: how long it takes"
    if path in COMPARED:
        assert unmeasured or re.search(r"AUC of|AUC within|\.\d{2,3}", header["claim"]), "claim: the AUC to expect"


def test_a_run_is_named_in_the_file_that_starts_it():
    names = {path: tomllib.loads(path.read_text())["run"]["name"] for path in CONFIGS}
    assert len(set(names.values())) == len(CONFIGS)
    for path, name in names.items():
        assert name == shown(path).replace("/base", "").replace("/", "_")
        assert load_config(path, [], CHOICES).run.name == run_name(path) == name


@pytest.mark.parametrize("path", COMPARED, ids=shown)
def test_it_shares_all_but_embedding_and_parallelism_with_its_base(path):
    values = tomllib.loads(path.read_text())
    assert values.keys() - {"base", "run"} <= MAY_DIFFER, "a compared config may set these sections only"
    assert values["run"].keys() == {"name"}
    assert values["base"] == "base.toml"
    assert shared_sections(path) == shared_sections(path.with_name("base.toml"))


@pytest.mark.parametrize("family", FAMILIES)
def test_rivals_use_the_same_threads_in_all(family):
    rivals = [load_config(p, [], CHOICES).parallelism for p in COMPARED if p.parent.name == family]
    assert len(rivals) >= 2
    assert len({p.world_size * p.threads_per_rank for p in rivals}) == 1


@pytest.mark.parametrize(("name", "tables", "parameters"), [("criteo_kaggle", 540e6, 540e3), ("criteo_tb", 26e9, 26e6)])
def test_sizes_are_those_claimed(name, tables, parameters):
    config = load_config(DIRECTORY / name / "robe.toml", [], CHOICES)
    cap = 40_000_000 if name == "criteo_tb" else 10**9
    sizes = [min(rows, cap) for rows in CARDINALITIES[name]]
    configs = build_tables([f"f{i}" for i in range(26)], sizes, config.model.embedding_dim)
    assert count_full_parameters(configs) == pytest.approx(tables, rel=0.01)
    request = EmbeddingRequest(compression=config.embedding.compression)
    embedding = METHODS["robe"].build(configs, config.embedding.options, request)
    assert count_parameters(embedding) == pytest.approx(parameters, rel=0.01)


def test_the_comparison_sees_a_difference(tmp_path):
    """The bug this guards against, planted: a rival that trains longer."""
    base = DIRECTORY / "demo/base.toml"
    rival = tmp_path / "rival.toml"
    rival.write_text(f'base = "{base}"\n[training]\nepochs = 3\n')
    assert json.dumps(shared_sections(rival)) != json.dumps(shared_sections(base))


@pytest.mark.parametrize("method", ["robe", "frequency_robe", "hashed_net"])
def test_an_update_in_the_backward_pass_needs_one_rank_and_a_kernel(method: str):
    config = DIRECTORY / "debug.toml"
    chosen = [f"embedding.method={method}", "embedding.compression=10", f"embedding.{method}.fused_update=true"]
    load_config(config, chosen, CHOICES)
    two = ["parallelism.world_size=2", "training.global_batch_size=64", "evaluation.global_batch_size=64"]
    with pytest.raises(ConfigError, match=rf"embedding.{method}: fused_update: .*parallelism.world_size = 2 ranks"):
        load_config(config, [*chosen, *two], CHOICES)
    with pytest.raises(ConfigError, match="fused_update is done by the kernels"):
        load_config(config, [*chosen, f"embedding.{method}.kernel=plain"], CHOICES)


def test_every_key_says_what_it_means():
    sections = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    options = {f"{s}.{name}": kind for s, (_, kinds) in CHOICES.items() for name, kind in kinds.items()}
    silent = [
        f"{section}.{key}"
        for section, kind in (sections | options).items()
        for key, field in kind.model_fields.items()
        if key != "options" and not field.description
    ]
    assert silent == []
