"""Points, totals and crossovers of a projection, its page and its JSON; TorchRec's planner is left out, for time."""

import json
import re
from dataclasses import replace

import pytest

from configs.load import ConfigError
from recsys.cost import published_steps, table_placement
from recsys.cost.machines import MACHINES, MODELS, Assumptions, find, override
from recsys.cost.projection import FULL, Projector, Scenario, batch_grid
from recsys.cost.projection_json import to_json
from recsys.cost.projection_page import write_projection_page
from recsys.cost.projection_plots import build_plots
from recsys.cost.projection_table import (
    TOTAL_HEADINGS,
    ProjectionReport,
    crossover_table,
    describe_caveats,
    describe_cheapest,
    describe_crossover,
    describe_place,
    total_row,
)
from recsys.cost.published_steps import PSS_SECONDS, TORCHREC, check_published


@pytest.fixture(autouse=True)
def _no_planner(monkeypatch):
    monkeypatch.setattr(table_placement, "MAX_PLANNED", 0)


SCENARIO = Scenario(
    machine=MACHINES["a100"],
    assumed=Assumptions(),
    price=4.0,
    models=[MODELS["criteo_tb"]],
    gpus=[8, 16],
    networks=[100, 400],
    compressions=[1000, 10_000],
    batch_sizes=[2048, 16384],
)


def report_of(scenario: Scenario, validation=None) -> ProjectionReport:
    projector = Projector(scenario)
    checks = check_published(scenario.assumed)
    return ProjectionReport(scenario, projector.points(), projector.crossovers(), checks, validation)


def test_every_setup_is_at_every_place():
    points = Projector(SCENARIO).points()
    # a batch size: 2 ROBE on one GPU, and 3 setups at 8 GPUs, 16 at 100 and 16 at 400 Gbit/s
    assert len(points) == 2 * (2 + 3 * 3)
    assert {(p.gpus, p.network_gbit) for p in points} == {(1, None), (8, None), (16, 100), (16, 400)}
    assert all(p.cost and p.cost.step_ms > 0 for p in points)
    assert all(p.stored_bytes <= SCENARIO.usable_bytes for p in points)
    slow, fast = (next(p for p in points if p.network_gbit == n and p.compression == FULL) for n in (100, 400))
    assert slow.cost
    assert fast.cost
    assert slow.cost.exposed_comm_ms > fast.cost.exposed_comm_ms
    assert slow.cost.compute_ms == fast.cost.compute_ms


def test_totals_by_hand():
    point = Projector(SCENARIO).robe(MODELS["criteo_tb"], 1000, 1, None, 16384)
    assert point.cost
    assert point.totals
    hours = 1.90 * 4_195_197_692 / 16384 * point.cost.step_ms / 3.6e6
    assert point.totals.hours == pytest.approx(hours)
    assert point.totals.kwh == pytest.approx(hours * 6.5 / 8)
    assert point.totals.dollars == pytest.approx(hours * 4)
    many = Projector(SCENARIO).robe(MODELS["criteo_tb"], 1000, 16, 400, 16384)
    assert many.cost
    assert many.totals
    assert many.totals.gpu_hours == pytest.approx(16 * many.totals.hours)
    assert many.totals.dollars == pytest.approx(64 * many.totals.hours)
    assert point.samples_per_s == pytest.approx(16384e3 / point.cost.step_ms)


def test_what_is_not_published_has_no_total():
    scenario = replace(SCENARIO, models=[MODELS["1tb"]], gpus=[16], compressions=[1000])
    points = Projector(scenario).points()
    assert all(p.totals is None for p in points)
    assert "not published" in total_row(points[0])
    assert describe_cheapest(points) == []
    assert Projector(SCENARIO).robe(MODELS["criteo_tb"], 50, 1, None, 2048).totals is None


def test_what_does_not_fit_says_so_and_how_many_would():
    scenario = replace(SCENARIO, models=[MODELS["50tb"]], compressions=[100, 100_000], batch_sizes=[2048])
    points = Projector(scenario).points()
    full = [p for p in points if p.compression == FULL]
    assert all(p.cost is None and "do not fit" in p.refusal and 735 <= (p.devices or 0) < 760 for p in full)
    array = [p for p in points if p.compression == 100]
    assert all(p.cost is None and p.devices is None and "M of" in p.refusal for p in array)
    assert all(p.cost for p in points if p.compression == 100_000)
    assert all(len(total_row(p)) == len(TOTAL_HEADINGS) for p in points)
    assert Projector(scenario).crossovers() == []
    crowded = replace(SCENARIO, batch_sizes=[2**31], gpus=[8])
    refused = Projector(crowded).sharded(MODELS["criteo_tb"], 8, None, 2**31)
    assert refused.cost is None
    assert "alone fill a GPU" in refused.refusal


def test_adagrad_needs_more_memory_and_time():
    sgd, adagrad = (
        Projector(replace(SCENARIO, optimizer=name)).sharded(MODELS["criteo_tb"], 8, None, 16384)
        for name in ("sgd", "adagrad")
    )
    assert sgd.cost
    assert adagrad.cost
    assert (sgd.devices, adagrad.devices) == (2, 4)
    assert adagrad.cost.compute_ms["lookups"] > 1.3 * sgd.cost.compute_ms["lookups"]
    assert adagrad.stored_bytes == pytest.approx(2 * sgd.stored_bytes)


def test_crossovers_are_where_the_steps_are_equal():
    projector = Projector(SCENARIO)
    found = [c for c in projector.crossovers() if c.changes]
    assert found
    for crossover in found:
        compression = float(crossover.setup.split()[1].rstrip("×,").replace(",", ""))
        owner = 1 if "one GPU" in crossover.setup else crossover.gpus
        place = (crossover.gpus, crossover.network_gbit)
        sharded = projector.step_over_batch(crossover.model, FULL, *place, crossover.gpus)
        robe = projector.step_over_batch(crossover.model, compression, *place, owner)
        for size, sharded_above in crossover.changes:
            assert sharded(size) == pytest.approx(robe(size), rel=1e-2)
            assert ((sharded(1.3 * size) or 0) < (robe(1.3 * size) or 0)) == sharded_above
    alone = next(c for c in found if c.setup == "ROBE 1,000×, one GPU" and c.gpus == 8)
    assert not alone.sharded_first
    assert re.fullmatch(r"ROBE < [\d,]+ < sharded", describe_crossover(alone))
    assert describe_crossover(replace(alone, changes=[])) == "ROBE"


def test_the_grid_of_batch_sizes_rises_by_a_quarter_of_a_doubling():
    grid = batch_grid()
    assert (grid[0], grid[4], grid[-1]) == (256, 512, 1 << 22)


def test_published_steps_stand_beside_the_models():
    checks = check_published(Assumptions())
    assert len(checks) == len(TORCHREC) + len(PSS_SECONDS)
    assert checks[0].published == pytest.approx(7.196, abs=1e-3)
    assert [c.is_calibration for c in checks] == [True] + [False] * (len(checks) - 1)
    assert all(c.projected > 0 for c in checks)
    eight = [c for c in checks if c.label.startswith("8 GPUs") and not c.is_calibration]
    assert all(0.7 < c.ratio < 1.2 for c in eight)  # one node: within 30 % of what was published
    assert check_published(Assumptions(fixed_ms=0))[0].ratio < 0.1


def test_the_planners_placement_of_the_calibration_step_gives_its_fixed_time(monkeypatch):
    """The assumption is what the published step leaves over."""
    monkeypatch.setattr(table_placement, "MAX_PLANNED", 64)
    step = TORCHREC[0]
    ms = published_steps._sharded_ms(step.rows, step.gpus, step.local_batch_size, Assumptions())
    assert ms == pytest.approx(step.step_ms, rel=0.01)


def test_overrides_change_what_they_name():
    machine = override(MACHINES["a100"], "machine", ["machine.memory_gb=40", "assumed.fixed_ms=1"])
    assert (machine.memory_gb, machine.cache_mb) == (40, 40)
    assert override(Assumptions(), "assumed", ["machine.memory_gb=40", "assumed.fixed_ms=1"]).fixed_ms == 1
    assert override(machine, "machine", ["machine.gpus_per_node=4"]).gpus_per_node == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("machine.memory=40", "machine.memory=40: unknown key; known: machine.name"),
        ("machine.memory_gb=lots", "machine.memory_gb=lots: 'lots' is not a number"),
        ("machine.memory_gb=-1", "machine.memory_gb=-1.0: Input should be greater than 0"),
        ("machine.memory_gb=inf", "machine.memory_gb=inf: must be finite"),
        ("machine.gpus_per_node=2.5", "machine.gpus_per_node=2.5: must be a whole number"),
    ],
)
def test_a_bad_override_is_named(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        override(MACHINES["a100"], "machine", [text])
    with pytest.raises(ConfigError, match=r"model.rows=5: only numbers and text"):
        override(MODELS["1tb"], "model", ["model.rows=5"])
    with pytest.raises(ConfigError, match=r"--machine v100: unknown; known: a100, h100"):
        find("--machine", MACHINES, "v100")


def test_caveats_say_what_was_not_measured():
    lines = " ".join(describe_caveats(report_of(SCENARIO)))
    assert "none of these steps has been run" in lines
    assert "No measurements were given" in lines
    assert "at another batch size take for granted" in lines
    only = replace(SCENARIO, batch_sizes=[2048])
    assert "take for granted" not in " ".join(describe_caveats(report_of(only)))


def test_words_and_tables():
    assert describe_place(1, None) == "1 GPU"
    assert describe_place(1024, 200) == "1,024 GPUs, 200 Gbit/s"
    report = report_of(SCENARIO)
    headings, rows = crossover_table(report, SCENARIO.models[0])
    assert headings[1:] == ["1,000×, one GPU", "1,000×, data-parallel", "10,000×, one GPU", "10,000×, data-parallel"]
    assert [row[0] for row in rows] == ["8 GPUs", "16 GPUs, 100 Gbit/s", "16 GPUs, 400 Gbit/s"]
    (first, second) = describe_cheapest(report.points)
    assert first.startswith("Criteo-TB, 97 GiB, batch 2,048: fewest hours: sharded")
    assert "fewest US $" in second


def test_json_has_an_origin_for_every_figure():
    document = to_json(report_of(SCENARIO))
    json.dumps(document, allow_nan=False)
    assert {point["origin"] for point in document["points"]} == {"projected"}
    assert all(point["step_ms"] == pytest.approx(point["computing_ms"] + point["exposed_comm_ms"])
               for point in document["points"])  # fmt: skip
    assert document["assumed"]["fixed_ms"] == 6.9
    assert document["validation"] is None


def test_the_page_fetches_nothing_and_marks_everything(tmp_path):
    report = report_of(SCENARIO)
    plots = build_plots(report)
    assert [plot["id"] for plot in plots] == ["gpus", "parts", "batch", "totals", "published"]
    assert all(
        set(plot["origin"].split(" and ")) <= {"measured", "emulated", "published", "projected"} for plot in plots
    )
    for plot in plots:
        for figure in plot["figures"].values():
            assert figure["data"]
            title = figure["layout"]["yaxis"]["title"]["text"]
            assert title.startswith("projected")
    write_projection_page(report, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    page = text[: text.index("<script>")] + text[text.index('id="data"') :]
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"|@import|url\(', page)
    assert "default-src 'none'" in page
    assert "none of these steps has been run" in page
    for origin in ("published", "projected"):
        assert f'class="origin {origin}"' in page


def test_stacked_parts_add_up_to_the_steps():
    report = report_of(replace(SCENARIO, batch_sizes=[16384], networks=[400]))
    (figure,) = next(plot for plot in build_plots(report) if plot["id"] == "parts")["figures"].values()
    sums = [sum(values) for values in zip(*(trace["y"] for trace in figure["data"]), strict=True)]
    assert sums == pytest.approx([p.cost.step_ms for p in report.points if p.cost], rel=1e-4)
