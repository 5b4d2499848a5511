"""The bench within its memory, and what it writes: JSON, tables in words, page."""

import json
import re
from dataclasses import replace

import pytest
import torch
from plotly.offline import get_plotlyjs

from pss.kernels import robe_bags
from recsys.bench.competitors import COMPETITORS, FUSED_SGD, PLAIN_SGD, TBE_SGD
from recsys.bench.kernel_bench import GRIDS, MODELS, PAPER, KernelBench, KernelSettings, choose_rows, to_json
from recsys.bench.kernel_report import (
    bound_figure,
    build_paper_tables,
    build_plots,
    build_rows,
    columns_of,
    describe_context,
    describe_ratios,
    ratio_figures,
    write_kernel_page,
)
from recsys.bench.kernel_sizes import KernelSize, paper_sizes
from recsys.bench.kernel_timing import Timing
from recsys.bench.table2 import PAPER_ROWS, TABLE2
from tests.recsys.bench.made_measurements import made, made_report

SIZE = KernelSize(8, 4, 40_000, 16, features=3, rows=3_000)
needs_kernels = pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no kernels on this machine")


def bench(grid, budget_bytes, **settings):
    report = made_report(grid=grid)
    report.settings = KernelSettings(torch.device("cpu"), (1, 2), rounds=3, **settings)
    return report, KernelBench(report, budget_bytes=budget_bytes, cache_bytes=0)


@needs_kernels
@pytest.mark.parametrize("grid", [MODELS, PAPER], ids=lambda grid: grid.name)
def test_everyone_is_measured_where_there_is_memory(grid):
    report, runner = bench(grid.name, 1e9)
    large = replace(SIZE, memory_bytes=400_000)  # the sparse gradient is for arrays of which a batch reads little
    assert [len(measured) for measured in runner.run([SIZE, large])] == [2, 2]
    assert report.skipped == []
    small, _, last, _ = report.measurements
    assert set(last.timings) == set(grid.competitors)
    assert set(small.timings) == set(grid.competitors) - ({"robe_sparse_sgd"} if grid is MODELS else set())
    for name, operations in last.timings.items():
        shared = COMPETITORS[name].same_forward_as in last.timings
        assert set(operations) == set(grid.operations) - ({"forward"} if shared else set()), name
        assert all(len(timing.ms) == 3 and min(timing.ms) > 0 for timing in operations.values())


@needs_kernels
def test_tables_that_do_not_fit_are_left_out_with_a_line():
    report, runner = bench("models", 80_000 + 50_000)
    huge = replace(SIZE, rows=30_000)
    list(runner.run([huge]))
    (line,) = [line for line in report.skipped if "full tables" in line]
    assert line == "30,000 rows of d = 8: full tables of 0.96 MB beside an array of 0.04 MB do not fit 0.13 MB"
    assert {COMPETITORS[name].storage for name in report.measurements[0].timings} == {"array"}


def test_arrays_that_do_not_fit_are_left_out_with_a_line():
    report, runner = bench("models", 700_000)
    list(runner.run([replace(SIZE, memory_bytes=4_000_000)]))
    assert report.measurements == []  # tables alone have nothing to be compared with
    assert not any("full tables" in line for line in report.skipped)
    assert any(re.match(r"ROBE fused SGD, array of 4 MB, Z = 4: 12\S* MB with gradient", s) for s in report.skipped)


def test_nothing_fits_and_the_bench_goes_on():
    report, runner = bench("models", 10)
    assert list(runner.run([SIZE, SIZE])) == [[], []]
    assert report.measurements == []
    assert len(report.skipped) == len(set(report.skipped)) > 0


def test_what_a_competitor_refuses_is_left_out_with_its_reason():
    report, runner = bench("models", 1e9)
    list(runner.run([replace(SIZE, embedding_dim=6, block_size=2)]))
    assert any("FBGEMM wants embedding_dim to be a multiple of 4, not 6" in line for line in report.skipped)
    assert TBE_SGD not in report.measurements[0].timings


def test_tables_of_several_dimensions_share_one_storage():
    _, runner = bench("models", 1e9)
    sizes = [replace(SIZE, embedding_dim=dim) for dim in (8, 16, 4)]
    places = set()
    for _ in runner.run(sizes):
        assert runner._tables is not None
        places.add(runner._tables.data_ptr())
    assert len(places) == 1


def test_rows_are_fewer_where_memory_is_short():
    assert choose_rows(10_000_000, 128, 1e12, 26) == 10_000_000
    assert choose_rows(10_000_000, 128, 4_096_000, 26) == 4_000
    assert choose_rows(10_000_000, 128, 0, 26) == 26


@pytest.mark.parametrize(
    ("change", "said"),
    [({"threads": (0,)}, "threads must be at least 1, not"), ({"rounds": 2}, "rounds must be at least 3, not 2")],
)
def test_settings_that_cannot_be(change, said):
    with pytest.raises(ValueError, match=said):
        KernelSettings(torch.device("cpu"), **{"threads": (1,)} | change)


def test_the_json_holds_everything():
    report = made_report(made(20.0), made(22.0, threads=2))
    report.skip("too large")
    written = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert written["environment"]["cpu"] == "Some <CPU>"
    assert (written["grid"], written["status"], written["notes"]) == ("models", "running", ["a note"])
    assert written["skipped"] == ["too large"]
    first, second = written["measurements"]
    assert (first["threads"], second["threads"]) == (1, 2)
    assert first["size"]["memory_size"] == 2_500_000
    assert first["size"]["compression"] == pytest.approx(256, rel=1e-3)
    step = first["timings"][FUSED_SGD]["step"]
    assert (step["median_ms"], step["quartiles_ms"], step["ms"]) == (20.0, [20.0, 20.0], [20.0])
    assert step["bound_ms"] > 0


def shown(report, name, measurement):
    (row,) = [r for r in build_rows(report, report.measurements) if r.name == name and r.measurement is measurement]
    return {column.heading: column.cell(row).text for column in columns_of(report.grid)}


def test_columns_by_hand():
    one, two = made(20.0), made(12.0, threads=2)
    report = made_report(one, two)
    ours = shown(report, FUSED_SGD, one)
    assert (ours["step ms"], ours["step/TBE"], ours["step/bag"], ours["step/plain"]) == (
        "20.0",
        "0.20",
        "0.10",
        "0.07",
    )
    assert (ours["step/least"], shown(report, FUSED_SGD, two)["step/least"]) == ("–", "0.60")
    assert ours["forward ms"] == ours["fwd/fill"] == "–"


def test_what_came_out_in_words():
    report = made_report(made(22.0), made(12.0, threads=2))
    lines = describe_ratios(report)
    assert lines[0] == (
        "A step of ROBE fused SGD takes 0.12 to 0.22 of one of TBE fused SGD, 0.17 in the median over 2 measurements."
    )
    others = [line.split(" of one of ")[1].split(",")[0] for line in lines[1:3]]
    assert others == ["nn.EmbeddingBag", "ROBE plain PyTorch"]
    assert lines[3].startswith(
        "2 threads over 1, step, median over sizes: ROBE fused SGD 0.55, ROBE plain PyTorch 1.00"
    )


def test_table_2_stands_beside_what_was_measured():
    (size,) = [s for s in paper_sizes([4_000_000]) if round(s.compression) == 1_000]
    timings = {FUSED_SGD: {"forward": Timing((1.5,))}, "robe_plain_dense": {"forward": Timing((3.0,))}}
    report = made_report(replace(made(1.0), size=size, timings=timings), grid="paper")
    (block,) = [block for block in TABLE2 if block.letter == "a"]
    (table,) = [table for table in build_paper_tables(report) if table.title.startswith(block.title)]
    assert table.title == "(a) forward, by compression at Z = 32, ms, 1 thread"
    lines = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert lines["1,000x ours"] == ["1.50"] + ["–"] * 6
    assert lines["1,000x plain"] == ["3.00"] + ["–"] * 6
    assert lines["1,000x paper"] == ["0.27", "0.29", "0.30", "0.31", "0.30", "0.32", "0.31"]
    assert "10x ours" not in lines
    assert len(lines["10x paper"]) == len(PAPER_ROWS)
    assert any("14.34" in line for line in describe_context(report))


def test_ratios_are_drawn_over_the_array_with_a_line_for_each_block_size():
    measurements = [made(m, memory_bytes=m * 1_000_000, block_size=z) for z in (16, 32) for m in (10, 1)]
    ((name, drawn),) = ratio_figures(made_report(*measurements)).items()
    assert name == "1 thread, d 64, B 10,240, uniform"
    (fused,) = [trace for trace in drawn["data"] if trace["name"] == "Z = 16"]
    assert (fused["x"], fused["y"]) == ([1.0, 10.0], [0.01, 0.1])
    assert [note["text"] for note in drawn["layout"]["annotations"]] == ["TBE"]
    assert ratio_figures(made_report(made(1.0))) == {}  # one size of the array is no line


def test_the_bound_figure_has_a_mark_for_every_size_and_the_bound_itself():
    report = made_report(made(20.0), made(30.0, block_size=8))
    drawn = {trace["name"]: trace for trace in bound_figure(report, "step", 1)["data"]}
    assert drawn["ROBE fused SGD"]["y"] == [20.0, 30.0]
    assert drawn["byte bound"]["x"] == drawn["byte bound"]["y"]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_page_is_in_one_piece_and_holds_the_figures(tmp_path, grid):
    report = made_report(made(20.0), made(30.0, memory_bytes=1_000_000), made(21.5, threads=2), grid=grid)
    write_kernel_page(report, tmp_path / "a" / "index.html")
    page = (tmp_path / "a" / "index.html").read_text()
    own = page.replace(get_plotlyjs(), "")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#|\")", own)
    assert "Some &lt;CPU&gt;" in own
    assert "ROBE fused SGD" in own
    assert "partial figures" in own
    if grid == "models":
        assert "21.5" in own
        assert [plot.id for plot in build_plots(report)] == ["ratio", "bound"]
    assert PLAIN_SGD not in own.replace(f'data-sort="{PLAIN_SGD}"', "")
