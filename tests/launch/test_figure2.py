"""Figure 2 of the paper: its jobs, its table, and both parts made small."""

import json
from pathlib import Path

import pytest

from configs.load import ConfigError
from launch.figure2 import main
from launch.runners.figure2_runs import plan_jobs
from recsys.cost.figure2 import Line, build_page, build_table, draw_training

SMALL = ["data.synthetic.train_rows=2000", "data.synthetic.scale=0.001"]


def measured(step_ms, compression=1.0, world_size=2, **phases):
    return {
        "step_ms": {"p25": step_ms - 1, "median": step_ms, "p75": step_ms + 2, "n": 9},
        "compression": compression,
        "global_batch_size": 16384,
        "world_size": world_size,
        "threads_per_rank": 2 // world_size,
        "parts": {"exposed_comm_ms": 5.0},
        "profiled_step_ms": 20.0,
        "phases_ms": phases or {"forward/interaction": 15.0, "forward/input_distribution": 5.0},
    }


def row(part, line, baseline):
    table = build_table(part, [baseline, line] if line is not baseline else [baseline])
    return dict(zip((column.heading for column in table.columns), (cell.flat for cell in table.rows[-1]), strict=True))


def test_the_table_of_inference():
    full = Line("full", [measured(10.0), measured(12.0), measured(11.0)])
    robe = Line("ROBE", [measured(5.5, 1000.0, world_size=1)])
    found = row("a", full, full)
    assert found["step, ms"] == "11 (9–14)", "the median repeat, and the quartiles of all"
    assert found["interaction, ms"] == "8.25", "three quarters of the profiled step, of the step as timed"
    assert found["89 M samples, s"] == f"{11e-3 * 89_137_319 / 16384:.0f}"
    assert (found["exposed communication"], found["paper, s"]) == ("25 %", "203")
    assert (row("a", robe, full)["× sharded"], row("a", robe, full)["paper, s"]) == ("0.50×", "97")


def test_the_table_of_training():
    full, robe = Line("full", [measured(12.0)]), Line("ROBE, dense 1000×", [measured(6.0, 1001.0)])
    found = row("b", robe, full)
    assert (found["speed-up"], found["paper"], found["1,000 steps, s"]) == ("2.00×", "1.7×", "6.0")
    assert row("b", full, full)["paper"] == "–"
    assert row("b", Line("ROBE, dense 100×", [measured(6.0, 100.0)]), full)["paper"] == "–"
    drawn = draw_training([full, robe])
    assert drawn["data"][0]["name"] == "ROBE, dense"
    assert drawn["data"][0]["y"] == [6.0]


def test_the_page_says_what_was_measured_where():
    sizes = {"embedding_parameters": 54_000_000, "embedding_dim": 16}
    page = build_page("a", [Line("full <tables>", [measured(12.0) | sizes])], {"cpu": "Some <CPU>"})
    assert page.answer.startswith(
        "DLRM on 54.0 M embedding parameters, d = 16, batches of 16,384; measured on Some <CPU>"
    )
    (plot,) = page.plots
    assert sum(trace["x"][0] for trace in plot.figures[""]["data"]) == pytest.approx(12.0)
    text = page.render()
    assert "Figure 2a of the PSS paper" in text
    assert "Some &lt;CPU&gt;" in text


def test_dense_and_sparse_gradients_over_compression():
    two, one = plan_jobs("b", "demo", 2048, [10, 1000], [])
    assert [s["label"] for s in two] == [
        "full tables, sharded",
        *(f"ROBE data-parallel, {g} {c}×" for g in ("dense", "sparse") for c in (10, 1000)),
    ]
    assert "embedding.robe.gradient=sparse" in one[-1]["overrides"]
    assert all("training.global_batch_size=2048" in s["overrides"] for s in (*two, *one))


def test_a_mistake_is_told_before_anything_runs(capsys):
    with pytest.raises(ConfigError, match=r"training\.global_batch_size = 7"):
        plan_jobs("a", "demo", 7, [1000], [])
    with pytest.raises(SystemExit) as ended:
        main(["a", "model.embeding_dim=8"])
    assert ended.value.code == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_a_small_one(tmp_path, capsys):
    asked = ["a", "--batch", "200", "--compression", "100", "--repeats", "1", "--steps", "2"]
    main([*asked, "--output", str(tmp_path), "--json", *SMALL], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["figure"], len(found["setups"])) == ("2a", 3)
    assert all(setup["step_ms"] > 0 for setup in found["setups"])
    for repeat in (setup["repeats"][0] for setup in found["setups"]):
        assert not any(name.startswith("backward") for name in repeat["phases_ms"]), "inference"
        assert "all_reduce" not in repeat["bytes_per_step"], "nothing to reduce where nothing is learned"
    page = Path(tmp_path / "index.html").read_text()
    assert "ROBE one process" in page
    assert "http" not in page.partition("<script>")[0].replace("http-equiv", "")
