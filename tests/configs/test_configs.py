"""Every config file loads, says what it claims, and shares with its rivals all but [embedding] and [parallelism]."""

import json
import tomllib
from pathlib import Path

import pytest

from configs.load import ConfigError, load_config, resolved
from configs.request import EmbeddingRequest
from recsys.data.criteo_schema import CARDINALITIES
from recsys.embedding.embedding_size import count_full_parameters, count_parameters
from recsys.embedding.embeddings import METHODS, build_tables
from recsys.train.registry import CHOICES

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.toml"))
MAY_DIFFER = {"embedding", "parallelism"}


def base_of(path: Path) -> str | None:
    return tomllib.loads(path.read_text()).get("base")


def shared_sections(path: Path) -> dict:
    sections = resolved(load_config(path, ["run.name=any"], CHOICES), CHOICES)
    return {name: value for name, value in sections.items() if name not in MAY_DIFFER}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_loads_and_its_header_says_what_it_is(path):
    load_config(path, [], CHOICES)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header
    if base_of(path):
        assert any(line.startswith("# claim:") for line in header)


@pytest.mark.parametrize("path", [p for p in CONFIGS if base_of(p)], ids=lambda p: p.stem)
def test_it_shares_all_but_embedding_and_parallelism_with_its_base(path):
    own = set(tomllib.loads(path.read_text())) - {"base"}
    assert own <= MAY_DIFFER, "a compared config may set these sections only"
    base = base_of(path)
    assert base is not None
    assert shared_sections(path) == shared_sections(path.parent / base)


def test_rivals_use_the_same_threads_in_all():
    for family in ("demo", "criteo_sample", "criteo_kaggle", "criteo_tb"):
        rivals = [load_config(p, [], CHOICES).parallelism for p in CONFIGS if base_of(p) == f"{family}.toml"]
        assert len(rivals) >= 2
        assert len({p.world_size * p.threads_per_rank for p in rivals}) == 1, family


@pytest.mark.parametrize(("name", "tables", "parameters"), [("criteo_kaggle", 540e6, 540e3), ("criteo_tb", 26e9, 26e6)])
def test_sizes_are_those_claimed(name, tables, parameters):
    config = load_config(CONFIGS[0].parent / f"{name}_robe.toml", [], CHOICES)
    cap = 40_000_000 if name == "criteo_tb" else 10**9
    sizes = [min(rows, cap) for rows in CARDINALITIES[name]]
    configs = build_tables([f"f{i}" for i in range(26)], sizes, config.model.embedding_dim)
    assert count_full_parameters(configs) == pytest.approx(tables, rel=0.01)
    request = EmbeddingRequest(compression=config.embedding.compression)
    embedding = METHODS["robe"].build(configs, config.embedding.options, request)
    assert count_parameters(embedding) == pytest.approx(parameters, rel=0.01)


def test_the_comparison_sees_a_difference(tmp_path):
    """The bug this guards against, planted: a rival that trains longer."""
    (tmp_path / "demo.toml").write_text((CONFIGS[0].parent / "demo.toml").read_text())
    rival = tmp_path / "demo_rival.toml"
    rival.write_text('base = "demo.toml"\n[training]\nepochs = 3\n')
    assert json.dumps(shared_sections(rival)) != json.dumps(shared_sections(tmp_path / "demo.toml"))


@pytest.mark.parametrize("method", ["robe", "frequency_robe", "hashed_net"])
def test_an_update_in_the_backward_pass_needs_one_rank_and_a_kernel(method: str):
    config = CONFIGS[0].parent / "debug.toml"
    chosen = [f"embedding.method={method}", "embedding.compression=10", f"embedding.{method}.fused_update=true"]
    load_config(config, chosen, CHOICES)
    two = ["parallelism.world_size=2", "training.global_batch_size=64", "evaluation.global_batch_size=64"]
    with pytest.raises(ConfigError, match=rf"embedding.{method}: fused_update: .*parallelism.world_size = 2 ranks"):
        load_config(config, [*chosen, *two], CHOICES)
    with pytest.raises(ConfigError, match="fused_update is done by the kernels"):
        load_config(config, [*chosen, f"embedding.{method}.kernel=plain"], CHOICES)
