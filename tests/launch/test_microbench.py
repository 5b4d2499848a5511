"""The command: what it measures when asked how, what it refuses, and the whole at tiny sizes."""

import json
import signal
from dataclasses import replace

import pytest

from launch.cli import EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.microbench import main as command
from pss.kernels import robe_bags
from recsys.bench import kernel_run
from recsys.bench.kernel_bench import GRIDS
from recsys.bench.kernel_run import KernelRequest, choose_sizes
from recsys.bench.kernel_sizes import KernelSize, paper_sizes, reduced_sizes
from recsys.runs.environment import huge_page_share

TINY = ["--d", "8", "--z", "4", "--m", "0.004", "--batch", "16", "--rows", "600", "--features", "3", "--rounds", "3"]
needs_kernels = pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no kernels on this machine")


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_is(monkeypatch):
    """The heap is set for the rest of a process."""
    monkeypatch.setattr(kernel_run, "keep_freed_memory", lambda: True)


def main(arguments):
    assert command(arguments, standalone_mode=False) is None


def sizes(*arguments, budget_bytes=1e12):
    asked = command.make_context("kernels", list(arguments)).params
    del asked["as_json"], asked["output"]
    return choose_sizes(KernelRequest(**asked), budget_bytes)


def test_sizes_by_default_are_the_selection():
    assert sizes() == reduced_sizes(10_000_000)


def test_what_is_chosen_is_measured_in_every_combination():
    found = sizes("--z", "8,64", "--m", "1,2.5", "--d", "32")
    assert found == [KernelSize(32, z, m, 10_240) for z in (8, 64) for m in (1_000_000, 2_500_000)]
    assert sizes("--ids", "zipf", "--ids-per-bag", "10") == [KernelSize(64, 16, 10_000_000, 10_240, 10, "zipf")]


def test_full_takes_every_value_that_is_not_chosen():
    assert len(sizes("--full")) == 3 * 4 * 3 * 2 * 2 * 2
    assert len(sizes("--full", "--d", "64", "--ids", "uniform")) == 4 * 3 * 2 * 2


def test_rows_follow_from_memory():
    assert {size.rows for size in sizes(budget_bytes=1e9)} == {10**9 // 2 // 4 // 128}
    assert {size.rows for size in sizes("--d", "16", "--rows", "1000", budget_bytes=1e9)} == {1000}


def test_the_paper_grid_is_table_2():
    assert sizes("--grid", "paper") == paper_sizes()
    assert {size.rows for size in sizes("--grid", "paper", "--n", "4,0.5")} == {4_000_000, 500_000}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--m", "0.00001"], "M of 1e-05 MB is 2 elements, fewer than one block of Z = 16"),
        (["--z", "0"], "block_size must be at least 1, not 0"),
        (["--ids", "normal"], "ids 'normal' are unknown"),
        (["--features", "0"], "features must be at least 1, not 0"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--rounds", "1"], "rounds must be at least 3, not 1"),
        (["--grid", "paper", "--d", "16"], "--d: the grid paper is that of the paper"),
        (["--grid", "paper", "--full"], "--full: the grid paper is that of the paper"),
        (["--n", "4"], "--n is of the grid paper"),
        (["--grid", "papers"], "'papers' is not one of 'models', 'paper'"),
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
    ],
)
def test_mistakes_end_before_anything_runs(arguments, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        command([*arguments, "--output", str(tmp_path / "out")])
    assert ended.value.code == EXIT_MISTAKE
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_a_mistake(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        command(["--device", "cuda", "--output", str(tmp_path / "out")])
    assert ended.value.code == EXIT_MISTAKE
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


@needs_kernels
def test_the_whole_at_tiny_sizes(tmp_path, capsys):
    main([*TINY, "--z", "4,32", "--threads", "2,1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    tables, said = out.split("Every competitor is timed")
    assert max(map(len, tables.splitlines())) <= 120
    assert "…" not in tables
    for heading in (
        "step ms",
        "step/bound",
        "step/TBE",
        "ROBE fused SGD",
        "TBE rowwise Adagrad",
        "TorchRec EBC",
        "2 threads",
    ):
        assert heading in tables
    assert "A step of ROBE fused SGD takes " in said
    assert "Freed memory stays in the heap" in said
    assert ("of the memory is in huge pages" in said) == (huge_page_share() is not None)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["settings"]["threads"] == [1, 2]
    assert [(m["size"]["block_size"], m["threads"]) for m in results["measurements"]] == [
        (4, 1),
        (4, 2),
        (32, 1),
        (32, 2),
    ]
    assert all(
        set(m["timings"]) == set(GRIDS["models"].competitors) - {"robe_sparse_sgd"} for m in results["measurements"]
    )
    assert {"cpu", "cpu_cores", "caches", "packages", "commit", "started", "command"} <= set(results["environment"])
    assert (
        "step against" in (tmp_path / "index.html").read_text() or "byte bound" in (tmp_path / "index.html").read_text()
    )


@needs_kernels
def test_json_is_alone_on_stdout(tmp_path, capsys):
    main([*TINY, "--threads", "1", "--output", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "results.json").read_text())


@needs_kernels
def test_the_paper_grid_at_tiny_sizes(tmp_path, capsys, monkeypatch):
    few = [replace(size, batch_size=64) for size in paper_sizes([20_000])]
    monkeypatch.setattr(kernel_run, "paper_sizes", lambda _: few)
    main(["--grid", "paper", "--rounds", "3", "--threads", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "(e) backward, dense gradient, by Z at 100x, ms, 1 thread" in out
    assert "69.73" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["measurements"]) == 7
    assert set(results["measurements"][0]["timings"]["robe_dense_sgd"]) == {"backward"}


@needs_kernels
def test_what_does_not_fit_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernel_run, "available_bytes", lambda _: 500_000)
    main([*TINY, "--rows", "100000", "--m", "0.004,4", "--threads", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "fewer than the 100,000 asked for" in out
    assert "Skipped: ROBE fused SGD, array of 4 MB, Z = 4: " in out
    assert len(json.loads((tmp_path / "results.json").read_text())["measurements"]) == 1


@needs_kernels
def test_an_interruption_keeps_what_there_is(tmp_path, capsys, monkeypatch):
    run = kernel_run.KernelBench.run

    def interrupted(self, sizes):
        for number, measured in enumerate(run(self, sizes)):
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            yield measured

    monkeypatch.setattr(kernel_run.KernelBench, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        command([*TINY, "--m", "0.004,0.008,0.016", "--threads", "1", "--output", str(tmp_path)])
    assert ended.value.code == EXIT_INTERRUPTED
    assert "partial results" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert len(results["measurements"]) == 2
    assert "interrupted: partial figures" in (tmp_path / "index.html").read_text()


def test_help_names_every_grid():
    (grid,) = (option for option in command.params if option.name == "grid")
    assert list(grid.type.choices) == list(GRIDS)
