"""Definitions and plans: what is run, what is refused before anything is, and what each run needs."""

import numpy as np
import pytest

from configs.load import ConfigError
from recsys.studies.experiment import DIRECTORY, find_experiments, load_experiment
from recsys.studies.experiment_plan import (
    PROCESS_BYTES,
    Group,
    available_bytes,
    check_source,
    check_target,
    find_source,
    plan_groups,
    size_groups,
)
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


def planned(name="table4", overrides=SMALL, scale=1.0):
    experiment = load_experiment(find_experiments()[name])
    _, source, _ = find_source(experiment, None)
    return plan_groups(experiment, source, overrides, scale)


@pytest.mark.parametrize("name", find_experiments())
def test_every_experiment_loads_and_its_configs_do(name):
    experiment = load_experiment(find_experiments()[name])
    assert (DIRECTORY / f"{name}.toml").read_text().startswith("#")
    for source in experiment.data.values():
        scaled = plan_groups(experiment, source, [], 0.5) if source.scaled else []
        groups = [*plan_groups(experiment, source, [], 1.0), *scaled]
        # Compared at equal cores, unless the ranks are those of a cluster.
        cores = {(p := group.load().parallelism).world_size * p.threads_per_rank for group in groups}
        assert len(cores) == 1 or source.config == "criteo_tb/base.toml"
    assert len(experiment.seeds) >= 3


def test_groups_are_every_combination_the_baseline_first():
    groups = planned()
    names = [group.name for group in groups]
    assert len(names) == len(set(names)) == 2 * (1 + 4 + 3)
    assert names[0] == "fresh_dlrm_full_1x"
    assert names[4] == "fresh_dlrm_robe_100000x"
    config = groups[8 + 2].load()
    assert (config.embedding.method, config.embedding.compression, config.training.epochs) == ("robe", 1000.0, 4)
    assert groups[0].load().embedding.method == "sharded"


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
        ('"trade"', '"trades"', "layout: Input should be 'models', 'trade' or 'methods' (given: 'trades')"),
        ("[data.generated]", "[data.made_up]", "data.made_up: no dataset; known: generated, criteo, movielens"),
        ("rates = [1.0]", "rates = []", "data.generated.rates"),
        ('title = "Toy"', "title = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_definition_is_named(tmp_path, old, new, said):
    path = write_toy(tmp_path, old, new)
    with pytest.raises(ConfigError) as refused:
        load_experiment(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_definition_may_be_laid_over_another(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "other.toml").write_text('base = "toy.toml"\ntitle = "Other"\nruns = "toy"\n')
    other = load_experiment(tmp_path / "other.toml")
    assert (other.title, other.runs, other.layout) == ("Other", "toy", "trade")
    (tmp_path / "lost.toml").write_text('base = "nowhere.toml"\n')
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read"):
        load_experiment(tmp_path / "lost.toml")


def test_data_is_told_by_its_files(tmp_path):
    experiment = load_experiment(find_experiments()["table3"])
    (tmp_path / "ml").mkdir()
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / "ml" / name).touch()
    (tmp_path / "train.txt").write_text("0\t1\n")
    name, _, overrides = find_source(experiment, str(tmp_path / "ml"))
    assert name == "movielens"
    assert overrides[0] == f'data.movielens.ratings="{tmp_path / "ml" / "ratings.csv"}"'
    name, _, overrides = find_source(experiment, str(tmp_path / "train.txt"))
    assert (name, overrides) == ("criteo", [f'data.criteo.path="{tmp_path / "train.txt"}"'])
    with pytest.raises(ConfigError, match="no such file"):
        find_source(experiment, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="movielens rows; the experiment is defined for: generated, criteo"):
        find_source(load_experiment(find_experiments()["table4"]), str(tmp_path / "ml"))


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
    experiment = load_experiment(find_experiments()["table3"])
    with pytest.raises(ConfigError, match="come from files"):
        plan_groups(experiment, experiment.data["movielens"], [], 2.0)


def test_a_target_above_the_best_possible_is_refused_with_it():
    datasets = check_source(planned()[:1])
    best = datasets["fresh"].best_possible().auc
    assert check_target(best - 1e-3, datasets) == {"fresh": best}
    with pytest.raises(ConfigError, match=f"best possible AUC on the test rows of setting 'fresh' is {best:.6f}"):
        check_target(best + 1e-3, datasets)


def test_test_rows_of_one_label_are_refused(monkeypatch):
    monkeypatch.setattr(
        "recsys.studies.experiment_plan.build_dataset", lambda _: ArrayRows(test=make_rows(np.zeros(40_000)))
    )
    with pytest.raises(ValueError, match="setting 'fresh': all 40,000 test rows have the same label"):
        check_source(planned()[:1])


def test_memory_is_counted_before_anything_is_built():
    groups = planned(overrides=[*SMALL, "optimizer.embedding=sgd"])[:5]
    datasets = check_source(groups)
    full, robe = size_groups(groups, datasets, 10**12)[:2]
    tables = sum(datasets["fresh"].num_embeddings) * 16
    assert full.parameters == tables
    assert full.needs_bytes == PROCESS_BYTES + 4 * tables  # fused SGD: neither state nor a gradient of all rows
    assert robe.parameters == pytest.approx(tables / 100, rel=0.01)
    assert robe.needs_bytes == PROCESS_BYTES + 2 * 4 * robe.parameters
    tight = size_groups(groups, datasets, full.needs_bytes - 1)
    assert tight[0].problem.startswith(f"needs {full.needs_bytes:,} bytes of memory, {full.needs_bytes - 1:,} are")
    assert tight[1].problem is None
    adagrad = planned(overrides=[*SMALL, "optimizer.embedding=adagrad"])[:1]
    assert size_groups(adagrad, datasets, 10**12)[0].needs_bytes == PROCESS_BYTES + 2 * 4 * tables
    assert size_groups(groups, datasets, None)[0].problem is None  # a cluster's, not known here


def test_every_rank_holds_what_is_replicated():
    groups = planned("placement", [*SMALL, "optimizer.embedding=sgd"])[:2]
    full, robe = size_groups(groups, check_source(groups), 10**12)
    assert full.needs_bytes == 2 * PROCESS_BYTES + 4 * full.parameters
    assert robe.needs_bytes == 2 * PROCESS_BYTES + 2 * 2 * 4 * robe.parameters
    assert (full.held_bytes, robe.held_bytes) == (4 * full.parameters, 16 * robe.parameters)
    (tight, _) = size_groups([robe, full], check_source(groups), robe.needs_bytes - 1)
    assert tight.problem.endswith("× 2 (themselves, optimizer state, gradient) × 2 ranks")


def test_a_compression_that_a_method_cannot_reach_is_its_problem():
    (group,) = [group for group in planned("table1") if group.method == "mixed_dimension"]
    beyond = Group(**{**vars(group), "overrides": (*group.overrides, "embedding.compression=1e6")})
    (found,) = size_groups([beyond], check_source([beyond]), 10**12)
    assert "mixed" in found.problem
    assert "reaches" in found.problem


def test_available_memory_is_that_of_the_machine():
    assert 10**8 < available_bytes("cpu") < 10**14


def test_what_a_definition_says_reaches_the_config():
    config = planned("table3")[0].load()
    assert (config.model.embedding_dim, config.training.epochs, config.optimizer.dense) == (8, 2, "adam")
    xdeepfm = next(group for group in planned("table3") if group.architecture == "xdeepfm")
    assert xdeepfm.load().model.options.feature_maps == (16, 16)
