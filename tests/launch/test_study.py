"""The command of the studies: what it makes, tunes and refuses, and that it goes on where it stopped."""

import json

import pytest

from launch.runners import study
from launch.runners.local import RunnerOptions
from launch.runners.study import (
    StudyRequest,
    change_study,
    choose_next_rate,
    choose_rate,
    make_plan,
    make_runs,
    merge_environments,
)
from launch.runners.trial import Outcome
from launch.study import main
from recsys.runs.run_directory import RunDir
from recsys.studies.records import load_results
from recsys.studies.spec import load_study
from tests.recsys.report.fake_runs import write_run
from tests.recsys.studies.test_plan import TOY, write_toy

SMALL = [
    "data.synthetic.scale=0.001",
    "data.synthetic.train_rows=4000",
    "data.synthetic.validation_rows=500",
    "data.synthetic.test_rows=1000",
    "training.global_batch_size=200",
    "training.epochs=1",
    "evaluation.every_epochs=0.5",
    "profile.every_steps=0",
    "logging.tensorboard=false",
    "logging.every_steps=5",
]


@pytest.fixture(autouse=True)
def _toy(tmp_path, monkeypatch):
    """One study, `toy`, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    path = write_toy(tmp_path, "rates = [1.0]", "rates = [1.0, 3.0, 10.0]")
    monkeypatch.setattr(study, "find_studies", lambda: {"toy": path})


def run(*arguments):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


@pytest.mark.parametrize(
    ("losses", "best", "following"),
    [
        ({1: 0.5, 3: 0.4, 10: 0.6}, 3, None),
        ({1: 0.5, 3: 0.4, 10: 0.3}, 10, 30.0),
        ({10: 0.3, 1: 0.5, 3: 0.4}, 10, 30.0),
        ({1: 0.3, 3: 0.4, 10: 0.5}, 1, 0.3),
        ({0.1: 0.3, 0.2: 0.4, 0.4: 0.5}, 0.1, 0.05),
        ({1: 0.3, 3: None, 10: None}, 1, 0.3),
        ({1: None, 3: None, 10: None}, None, 0.3),
        ({3: 0.4}, 3, None),
    ],
)
def test_the_rate_of_lowest_loss_and_one_step_beyond_the_end(losses, best, following):
    assert choose_rate(losses) == best
    assert choose_next_rate(losses) == following


def test_a_study_is_narrowed_to_methods_compressions_and_seeds(tmp_path):
    toy = load_study(tmp_path / "toy.toml")
    changed = change_study(toy, StudyRequest(items=["toy"], methods=["robe"], compressions=[50, 5], seeds=[7]))
    assert [(method.name, method.compressions) for method in changed.methods] == [("full", (1.0,)), ("robe", (5, 50))]
    assert (changed.seeds, changed.epsilon) == ((7,), toy.epsilon)
    plan = make_plan(StudyRequest(items=["toy", *SMALL], rates=[2.0]), RunnerOptions())
    assert (plan.source.rates, plan.facts["rates"], plan.runs_per_arm) == ((2.0,), [2.0], 3)


class FakeRuns:
    """Stands for `run_trials`: log loss is lowest at the best rate; named trials fail."""

    def __init__(self, root, best, failing=()):
        self.root, self.best, self.failing, self.asked = root, best, failing, []

    def __call__(self, trials, runner, title):
        self.asked.append((title, [trial.name for trial in trials]))
        return [self.make(trial) for trial in trials]

    def make(self, trial):
        values = dict(override.split("=", 1) for override in trial.overrides)
        rate, seed = float(values["optimizer.embedding_learning_rate"]), int(values["run.seed"])
        if any(part in trial.name for part in self.failing):
            return Outcome(trial, RunDir(self.root / trial.name), "FloatingPointError: nan at step 9, batch 9", 2.0)
        auc = 0.78 - 0.001 * abs(rate - self.best[values["embedding.compression"]]) + 0.0001 * seed
        path = write_run(self.root, trial.name, seed=seed, ranks=1, evaluations=[(5.0, 400_000, 1.0, auc)])
        return Outcome(trial, RunDir(path), None, 9.0)


def make_faked(monkeypatch, tmp_path, best, failing=()):
    runs = FakeRuns(tmp_path / "faked", best, failing)
    (tmp_path / "faked").mkdir()
    monkeypatch.setattr(study, "run_trials", runs)
    return runs, make_runs(make_plan(StudyRequest(items=["toy", *SMALL]), RunnerOptions()), runner=None)


def test_each_compression_is_tuned_on_the_first_seed(monkeypatch, tmp_path):
    runs, made = make_faked(monkeypatch, tmp_path, {"1.0": 3, "10.0": 1, "100.0": 10})
    (tuning, tuned), beyond, (others, later) = runs.asked
    assert (tuning, len(tuned), others) == ("learning rates", 9, "other seeds")
    assert beyond == ("beyond the grid", ["dlrm_robe_10x_lr0.3_s0", "dlrm_robe_100x_lr30_s0"])
    assert tuned[:3] == ["dlrm_full_1x_lr1_s0", "dlrm_full_1x_lr3_s0", "dlrm_full_1x_lr10_s0"]
    assert later == [
        *(f"dlrm_full_1x_lr3_s{s}" for s in (1, 2)),
        *(f"dlrm_robe_10x_lr1_s{s}" for s in (1, 2)),
        *(f"dlrm_robe_100x_lr10_s{s}" for s in (1, 2)),
    ]
    assert [(m.learning_rate, m.seed) for m in made if m.is_result][:3] == [(3.0, 0), (3.0, 1), (3.0, 2)]
    assert [m.arm.name for m in made] == sorted((m.arm.name for m in made), key=lambda n: (n[5:] != "full_1x", len(n)))
    assert sum(m.is_trial for m in made) == 11


def test_a_rate_that_fails_is_not_chosen_and_an_arm_of_failures_makes_no_others(monkeypatch, tmp_path):
    runs, made = make_faked(monkeypatch, tmp_path, {"1.0": 3, "10.0": 3, "100.0": 3}, ["10x_lr3", "100x"])
    assert runs.asked[1] == ("beyond the grid", ["dlrm_robe_10x_lr0.3_s0", "dlrm_robe_100x_lr0.3_s0"])
    later = runs.asked[2][1]
    assert [name for name in later if "10x" in name] == ["dlrm_robe_10x_lr1_s1", "dlrm_robe_10x_lr1_s2"]
    assert not [name for name in later if "100x" in name]
    failed = [m for m in made if m.failure]
    assert len(failed) == 5
    assert "FloatingPointError: nan at step 9, batch 9 (log: " in failed[0].failure


def test_an_environment_is_that_of_all_runs(tmp_path):
    assert merge_environments([]) == {}
    starts = ["2026-01-03T10:00:00+00:00", "2026-01-03T09:00:00+00:00"]
    runs = [
        RunDir(write_run(tmp_path, f"run{ranks}", ranks=ranks, environment={"started": start, "command": [start]}))
        for ranks, start in zip((2, 1), starts, strict=True)
    ]
    (one, both) = merge_environments(runs[:1]), merge_environments(runs)
    assert (one["world_size"], one["started"]) == (2, starts[0])
    assert (both["world_size"], both["started"]) == ("1, 2", f"{starts[1]} to {starts[0]}")
    assert both["packages.torch"] == one["packages.torch"]
    assert "command" not in both


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "study: one of toy is needed, given: none"),
        (["tabel4"], "one of toy is needed, given: tabel4"),
        (["toy", "training.epoch=1"], "unknown key (did you mean epochs?)"),
        (["toy", "--seeds", "1,1"], "'--seeds': 1,1: a value is given twice"),
        (["toy", "--scale", "2"], "cannot be scaled"),
        (["toy", "--epsilon", "0"], "'--epsilon': 0.0 is not in the range x>0"),
        (["toy", "--target", "80"], "'--target': 80.0 is not in the range 0.5<x<1.0"),
        (["toy", "--target", "0.95", *SMALL], "--target 0.95: the best possible AUC on the test rows is 0.7998"),
        (["toy", "--data", "nowhere"], "--data nowhere: no such file"),
        (["toy", "--jobs", "0", *SMALL], "jobs = 0"),
        (["toy", "--methods", "rob"], "--methods: the study has no rob; it has full, robe"),
        (["toy", "--methods", "full"], "--methods: one besides the baseline is needed"),
        (["toy", "--compressions", "0.5"], "--compressions 0.5: must be at least 1"),
        (["--show", "nowhere.parquet"], "nowhere.parquet"),
        (["toy", "--json", "--latex"], "--json, --markdown, --latex: one of them at a time"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments, said, capsys, tmp_path):
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tells_bytes_and_what_does_not_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "available_bytes", lambda _: 850 * 2**20)
    assert run("toy", "--dry-run", *SMALL, "data.synthetic.scale=0.1") == 0
    said = capsys.readouterr().out
    assert "1006 MiB" in said
    assert "are available" in said
    assert "10 runs, 1 at a time" in said
    assert not (tmp_path / "runs").exists()


def test_when_nothing_fits_the_bytes_are_told(capsys, monkeypatch):
    monkeypatch.setattr(study, "available_bytes", lambda _: 2**20)
    assert run("toy", *SMALL) == 2
    assert "nothing can be run:\n  dlrm_full_1x: needs 8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_from_runs_to_tables(tmp_path, capsys):
    """A grid whose last rate diverges; then the same again, which makes nothing; then the tables from the file."""
    toy = TOY.replace("rates = [1.0]", "rates = [1.0, 1e30]").replace("[10, 100]", "[10]")
    (tmp_path / "toy.toml").write_text(toy)
    arguments = ["toy", "--seeds", "0,1", "--jobs", "1", "--output", "out", *SMALL]
    assert run(*arguments) == 1
    shown = capsys.readouterr()
    assert "dlrm_full_1x_lr1e30_s0: " in shown.out
    assert "FloatingPointError" in shown.out
    results = load_results(tmp_path / "out" / "results.parquet")
    runs = results.frame.runs.to_dicts()
    assert {run["learning_rate"] == 1e30 for run in runs if run["failure"]} == {True}
    assert {run["failure"] is None for run in runs if run["learning_rate"] != 1e30} == {True}
    chosen = [(run["arm"], run["seed"]) for run in runs if run["is_result"]]
    assert chosen == [("dlrm_full_1x", 0), ("dlrm_full_1x", 1), ("dlrm_robe_10x", 0), ("dlrm_robe_10x", 1)]
    assert [arm["difference"] is not None for arm in results.arms] == [False, True]
    assert all(run["interleaved_step_ms"] > 0 for run in runs)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/summary.json")}
    for name in ("index.html", "tables.md", "tables.tex"):
        (tmp_path / "out" / name).unlink()
    assert run(*arguments, "--json") == 1
    numbers = json.loads(capsys.readouterr().out)
    assert [arm["runs"] for arm in numbers["arms"]] == [2, 2]
    assert {path: path.stat().st_mtime_ns for path in made if "1e30" not in str(path)} == {
        path: time for path, time in made.items() if "1e30" not in str(path)
    }
    assert run("--show", str(tmp_path / "out" / "results.parquet"), "--latex") == 1
    assert r"\begin{tabular}{lrr}" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").exists()
