"""Definitions and plans: what is run, what is refused before anything is, and what each run needs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines import full
from configs.load import ConfigError
from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import robe
from recsys.embedding.registry import METHODS
from recsys.studies.plan import (
    PROCESS_BYTES,
    PlannedArm,
    available_bytes,
    check_target,
    describe_options,
    find_source,
    measure_initial_std,
    open_datasets,
    plan_arms,
    size_arms,
)
from recsys.studies.spec import DIRECTORY, find_studies, load_study
from recsys.train.registry import CHOICES
from tests.recsys.data.array_rows import ArrayRows, make_rows

SMALL = ["data.synthetic.scale=0.001", "data.synthetic.test_rows=500", "data.synthetic.validation_rows=100"]
TOY = """
title = "Toy"
reference = "none"
layout = "trade"
architectures = ["dlrm"]
seeds = [0, 1, 2]
[[methods]]
name = "full"
title = "full tables"
compressions = [1]
overrides = { "embedding.method" = "sharded" }
[[methods]]
name = "robe"
title = "ROBE"
compressions = [10, 100]
overrides = { "embedding.method" = "robe" }
[data.generated]
config = "demo/base.toml"
rates = [1.0]
shows = "Nothing."
"""


def write_toy(tmp_path, old="", new=""):
    assert old in TOY
    (tmp_path / "toy.toml").write_text(TOY.replace(old, new, 1) if old else TOY)
    return tmp_path / "toy.toml"


TABLE4 = load_study(find_studies()["table4"])


def planned(name="table4", overrides=SMALL, scale=1.0):
    study = load_study(find_studies()[name])
    _, source, _ = find_source(study, None)
    return plan_arms(study, source, overrides, scale)


@pytest.mark.parametrize("name", find_studies())
def test_every_study_loads_and_its_configs_do(name):
    study = load_study(find_studies()[name])
    assert (DIRECTORY / f"{name}.toml").read_text().startswith("#")
    for source in study.data.values():
        scaled = plan_arms(study, source, [], 0.5) if source.scaled else []
        arms = [*plan_arms(study, source, [], 1.0), *scaled]
        # Compared at equal cores, unless the ranks are those of a cluster.
        cores = {(p := arm.load().parallelism).world_size * p.threads_per_rank for arm in arms}
        assert len(cores) == 1 or source.config == "criteo_tb/base.toml"
    assert len(study.seeds) >= 3


def test_groups_are_every_combination_the_baseline_first():
    arms = planned()
    names = [arm.name for arm in arms]
    assert len(names) == len(set(names)) == 2 * (1 + 4 + 3)
    assert names[0] == "fresh_dlrm_full_1x"
    assert names[4] == "fresh_dlrm_robe_100000x"
    config = arms[8 + 2].load()
    assert (config.embedding.method, config.embedding.compression, config.training.epochs) == ("robe", 1000.0, 4)
    assert arms[0].load().embedding.method == "sharded"


def test_scale_multiplies_the_keys_named_for_it():
    small, large = planned(overrides=[], scale=0.1)[0].load(), planned(overrides=[], scale=10)[0].load()
    assert (small.data.options.scale, small.data.options.train_rows) == (pytest.approx(0.04), 100_000)
    assert (large.data.options.scale, large.data.options.train_rows) == (1.0, 10_000_000)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [0, 1, 2]", "seeds = []", "seeds: "),
        ("seeds =", "seedz =", "seedz: Extra inputs are not permitted (given: [0, 1, 2])"),
        ('["dlrm"]', '["dlrn"]', "architectures: unknown: dlrn; known: autoint, dcn, deepfm, dlrm"),
        ("compressions = [1]", "compressions = [2]", "the first is the baseline, at compression 1, not (2.0,)"),
        ("[10, 100]", "[100, 10]", "methods.1.compressions: Value error, [100.0, 10.0]: must be at least 1, ascending"),
        ('name = "robe"', 'name = "full"', "a name is given twice: full, full"),
        ('{ "embedding.method" = "robe" }', "{}", "robe: overrides lack embedding.method"),
        ('"trade"', '"trades"', "layout: Input should be 'models', 'trade', 'methods' or 'grid' (given: 'trades')"),
        ("[data.generated]", "[data.made_up]", "data.made_up: no dataset; known: generated, criteo, movielens"),
        ("rates = [1.0]", "rates = []", "data.generated.rates"),
        ('title = "Toy"', "title = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_definition_is_named(tmp_path, old, new, said):
    path = write_toy(tmp_path, old, new)
    with pytest.raises(ConfigError) as refused:
        load_study(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_definition_may_be_laid_over_another(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "other.toml").write_text('base = "toy.toml"\ntitle = "Other"\nruns = "toy"\n')
    other = load_study(tmp_path / "other.toml")
    assert (other.title, other.runs, other.layout) == ("Other", "toy", "trade")
    (tmp_path / "lost.toml").write_text('base = "nowhere.toml"\n')
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_study(tmp_path / "lost.toml")


def test_data_is_told_by_its_files(tmp_path):
    study = load_study(find_studies()["table3"])
    (tmp_path / "ml").mkdir()
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / "ml" / name).touch()
    (tmp_path / "train.txt").write_text("0\t1\n")
    name, _, overrides = find_source(study, str(tmp_path / "ml"))
    assert name == "movielens"
    assert overrides[0] == f'data.movielens.ratings="{tmp_path / "ml" / "ratings.csv"}"'
    name, _, overrides = find_source(study, str(tmp_path / "train.txt"))
    assert (name, overrides) == ("criteo", [f'data.criteo.path="{tmp_path / "train.txt"}"'])
    with pytest.raises(ConfigError, match="no such file"):
        find_source(study, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="movielens rows; the study is defined for: generated, criteo"):
        find_source(load_study(find_studies()["table4"]), str(tmp_path / "ml"))


@pytest.mark.parametrize(
    ("overrides", "scale", "said"),
    [
        (["training.epoch=1"], 1.0, "unknown key (did you mean epochs?)"),
        ([], 0.0, "--scale 0: must be above 0"),
        ([], float("nan"), "--scale nan"),
    ],
)
def test_a_mistake_in_what_is_asked_is_named(overrides, scale, said):
    with pytest.raises(ConfigError) as refused:
        planned(overrides=overrides, scale=scale)
    assert said in str(refused.value)


def test_files_cannot_be_scaled():
    study = load_study(find_studies()["table3"])
    with pytest.raises(ConfigError, match="come from files"):
        plan_arms(study, study.data["movielens"], [], 2.0)


def test_a_target_above_the_best_possible_is_refused_with_it():
    datasets = open_datasets(planned()[:1])
    best = datasets["fresh"].best_possible().auc
    assert check_target(best - 1e-3, datasets) == {"fresh": best}
    with pytest.raises(ConfigError, match=f"best possible AUC on the test rows of setting 'fresh' is {best:.6f}"):
        check_target(best + 1e-3, datasets)


def test_test_rows_of_one_label_are_refused(monkeypatch):
    monkeypatch.setattr("recsys.studies.plan.build_dataset", lambda _: ArrayRows(test=make_rows(np.zeros(40_000))))
    with pytest.raises(ValueError, match="setting 'fresh': all 40,000 test rows have the same label"):
        open_datasets(planned()[:1])


def test_memory_is_counted_before_anything_is_built():
    arms = planned(overrides=[*SMALL, "optimizer.embedding=sgd"])[:5]
    datasets = open_datasets(arms)
    full, robe = size_arms(TABLE4, arms, datasets, 10**12)[:2]
    tables = sum(datasets["fresh"].num_embeddings) * 16
    assert full.parameters == tables
    assert full.needs_bytes == PROCESS_BYTES + 4 * tables  # fused SGD: neither state nor a gradient of all rows
    assert robe.parameters == pytest.approx(tables / 100, rel=0.01)
    assert robe.needs_bytes == PROCESS_BYTES + 2 * 4 * robe.parameters
    tight = size_arms(TABLE4, arms, datasets, full.needs_bytes - 1)
    assert tight[0].problem.startswith(f"needs {full.needs_bytes:,} bytes of memory, {full.needs_bytes - 1:,} are")
    assert tight[1].problem is None
    adagrad = planned(overrides=[*SMALL, "optimizer.embedding=adagrad"])[:1]
    assert size_arms(TABLE4, adagrad, datasets, 10**12)[0].needs_bytes == PROCESS_BYTES + 2 * 4 * tables
    assert size_arms(TABLE4, arms, datasets, None)[0].problem is None  # a cluster's, not known here


def test_every_rank_holds_what_is_replicated():
    arms = planned("placement", [*SMALL, "optimizer.embedding=sgd"])[:2]
    full, robe = size_arms(TABLE4, arms, open_datasets(arms), 10**12)
    assert full.needs_bytes == 2 * PROCESS_BYTES + 4 * full.parameters
    assert robe.needs_bytes == 2 * PROCESS_BYTES + 2 * 2 * 4 * robe.parameters
    assert (full.held_bytes, robe.held_bytes) == (4 * full.parameters, 16 * robe.parameters)
    (tight, _) = size_arms(TABLE4, [robe, full], open_datasets(arms), robe.needs_bytes - 1)
    assert tight.problem.endswith("× 2 (themselves, optimizer state, gradient) × 2 ranks")


def test_a_compression_that_a_method_cannot_reach_is_its_problem():
    (arm,) = [arm for arm in planned("table1") if arm.method == "mixed_dimension"]
    beyond = PlannedArm(**{**vars(arm), "overrides": (*arm.overrides, "embedding.compression=1e6")})
    (found,) = size_arms(TABLE4, [beyond], open_datasets([beyond]), 10**12)
    assert "mixed" in found.problem
    assert "reaches" in found.problem


def test_available_memory_is_that_of_the_machine():
    assert 10**8 < available_bytes("cpu") < 10**14


def test_what_a_definition_says_reaches_the_config():
    config = planned("table3")[0].load()
    assert (config.model.embedding_dim, config.training.epochs, config.optimizer.dense) == (8, 2, "adam")
    xdeepfm = next(arm for arm in planned("table3") if arm.architecture == "xdeepfm")
    assert xdeepfm.load().model.options.feature_maps == (16, 16)


@pytest.fixture
def methods_of_limits(monkeypatch):
    """A method that reaches 53.14×, and one that reaches 4×, registered beside the others."""

    def reaching(highest):
        def build(tables, options, request):
            if request.compression > highest:
                raise CompressionRefused("limited", request.compression, highest)
            return robe.build(tables, options, request)

        return SimpleNamespace(Options=robe.Options, placement="replicate", build=build)

    for name, highest in (("limited", 53.14), ("low", 4.0)):
        monkeypatch.setitem(METHODS, name, reaching(highest))
        monkeypatch.setitem(CHOICES["embedding"][1], name, robe.Options)


def plan_grid(names, compressions):
    study = load_study(find_studies()["methods"])
    kept = [method for method in study.methods if method.name in names]
    changed = [m if m is study.baseline else m.model_copy(update={"compressions": compressions}) for m in kept]
    study = study.model_copy(update={"methods": tuple(changed)})
    arms = plan_arms(study, study.data["generated"], SMALL)
    return size_arms(study, arms, open_datasets(arms), 10**12)


def test_a_registered_method_is_in_the_study_of_methods_without_an_entry(methods_of_limits):
    names = [method.name for method in load_study(find_studies()["methods"]).methods]
    assert {"limited", "low"} < set(names)
    assert {"robe_tiers", "quantized", "hashed_net"} < set(names)
    assert "sharded" not in names  # full tables, placed differently
    assert len(names) == len(set(names))
    used = {method.overrides["embedding.method"] for method in load_study(find_studies()["methods"]).methods}
    assert used == METHODS.keys() - {"sharded"}


def test_every_method_is_run_where_it_reaches(methods_of_limits):
    arms = plan_grid(("full", "robe", "limited", "low"), (10.0, 53.0, 100.0))
    assert [(arm.method, arm.compression, arm.limit, arm.is_able) for arm in arms] == [
        ("full", 1.0, None, True),
        *(("robe", compression, None, True) for compression in (10.0, 53.0, 100.0)),
        *(("limited", compression, None, True) for compression in (10.0, 53.0)),
        ("limited", 100.0, 53.14, False),
        ("low", 4.0, 4.0, True),
        ("low", 53.0, 4.0, False),
        ("low", 100.0, 4.0, False),
    ]
    assert arms[-3].load().embedding.compression == 4.0
    assert all(arm.problem is None for arm in arms)
    assert all(arm.initial_std == pytest.approx(1, abs=0.1) for arm in arms if arm.is_able)
    assert [arm.initial_std for arm in arms if not arm.is_able] == [None] * 3


def test_a_method_that_cannot_be_built_is_a_problem_of_its_own(methods_of_limits, monkeypatch):
    def build(tables, options, request):
        raise ValueError("embedding.limited.z = 3: no")

    monkeypatch.setattr(METHODS["limited"], "build", build)
    arms = plan_grid(("full", "robe", "limited"), (10.0,))
    assert [(arm.method, arm.problem) for arm in arms] == [
        ("full", None), ("robe", None), ("limited", "embedding.limited.z = 3: no"),
    ]  # fmt: skip


def test_initial_std_is_that_of_the_rows_read():
    tables = [
        EmbeddingBagConfig(name="a", embedding_dim=16, num_embeddings=5000, feature_names=["a"]),
        EmbeddingBagConfig(name="b", embedding_dim=16, num_embeddings=300, feature_names=["b", "c"]),
    ]
    module = full.build(tables, full.Options(), EmbeddingRequest(init_scale=0.3))
    assert measure_initial_std(module, tables) == pytest.approx(0.3 / math.sqrt(3), rel=0.02)
    with torch.no_grad():
        module.embedding_bags["b"].weight.mul_(10)
    assert measure_initial_std(module, tables) == pytest.approx(0.3 / math.sqrt(3) * math.sqrt(201 / 3), rel=0.05)


def test_options_of_every_method_are_told_without_the_compression():
    options = describe_options(planned("table1"))
    assert options["robe"].startswith("method = robe, init_scale = 0.01")
    assert "robe.block_size = 8" in options["robe"]
    assert "compression" not in options["robe"]
