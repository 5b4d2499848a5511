"""Points, totals and crossovers of a projection, its page and its JSON; TorchRec's planner is left out, for time."""

import json
import re
from dataclasses import replace

import pytest

from configs.load import ConfigError, override_section
from recsys.cost import table_placement
from recsys.cost.cost_model import CostModel
from recsys.cost.machines import MACHINES, MODELS, Assumptions, choose
from recsys.cost.projection import FULL, ONE_GPU, Place, Projection, Scenario, batch_grid
from recsys.cost.projection_report import (
    TOTALS,
    build_page,
    crossover_table,
    describe_caveats,
    describe_cheapest,
    describe_crossover,
    points_table,
    steps_table,
    to_json,
    totals_table,
)
from recsys.cost.published_steps import PUBLISHED, check_published, sharded_ms
from recsys.report.table import Table


@pytest.fixture(autouse=True)
def _no_planner(monkeypatch):
    monkeypatch.setattr(table_placement, "MAX_PLANNED", 0)


SCENARIO = Scenario(
    CostModel(MACHINES["a100"], Assumptions()),
    price=4.0,
    models=[MODELS["criteo_tb"]],
    gpus=[8, 16],
    networks=[100, 400],
    compressions=[1000, 10_000],
    batch_sizes=[2048, 16384],
)


CRITEO_TB = MODELS["criteo_tb"]


def totals_of(points) -> list[list[str]]:
    return [[cell.text for cell in row] for row in Table.of(points, TOTALS).rows]


def test_every_setup_is_at_every_place():
    points = SCENARIO.points()
    # a batch size: 2 ROBE on one GPU, and 3 setups at 8 GPUs, 16 at 100 and 16 at 400 Gbit/s
    assert len(points) == 2 * (2 + 3 * 3)
    assert {p.place for p in points} == {ONE_GPU, Place(8), Place(16, 100), Place(16, 400)}
    assert all(p.cost and p.cost.step_ms > 0 for p in points)
    assert all(p.stored_bytes <= SCENARIO.cost_model.usable_bytes for p in points)
    slow, fast = (next(p for p in points if p.place.network_gbit == n and p.compression == FULL) for n in (100, 400))
    assert slow.cost
    assert fast.cost
    assert slow.cost.exposed_comm_ms > fast.cost.exposed_comm_ms
    assert slow.cost.compute_ms == fast.cost.compute_ms


def test_totals_by_hand():
    point = SCENARIO.project_robe(CRITEO_TB, 1000, ONE_GPU, 16384)
    assert point.cost
    assert point.totals
    hours = 1.90 * 4_195_197_692 / 16384 * point.cost.step_ms / 3.6e6
    assert point.totals.hours == pytest.approx(hours)
    assert point.totals.kwh == pytest.approx(hours * 6.5 / 8)
    assert point.totals.dollars == pytest.approx(hours * 4)
    many = SCENARIO.project_robe(CRITEO_TB, 1000, Place(16, 400), 16384)
    assert many.cost
    assert many.totals
    assert many.totals.gpu_hours == pytest.approx(16 * many.totals.hours)
    assert many.totals.dollars == pytest.approx(64 * many.totals.hours)
    assert point.samples_per_s == pytest.approx(16384e3 / point.cost.step_ms)


def test_what_is_not_published_has_no_total():
    scenario = replace(SCENARIO, models=[MODELS["1tb"]], gpus=[16], compressions=[1000])
    points = scenario.points()
    assert all(p.totals is None for p in points)
    assert "not published" in totals_of(points)[0]
    assert describe_cheapest(points) == []
    assert SCENARIO.project_robe(CRITEO_TB, 50, ONE_GPU, 2048).totals is None


def test_what_does_not_fit_says_so_and_how_many_would():
    scenario = replace(SCENARIO, models=[MODELS["50tb"]], compressions=[100, 100_000], batch_sizes=[2048])
    points = scenario.points()
    full = [p for p in points if p.compression == FULL]
    assert all(p.cost is None and "do not fit" in p.refusal and 735 <= (p.devices or 0) < 760 for p in full)
    array = [p for p in points if p.compression == 100]
    assert all(p.cost is None and p.devices is None and "M of" in p.refusal for p in array)
    assert all(p.cost for p in points if p.compression == 100_000)
    refused = {row[3] for row in totals_of([*full, *array])}
    assert refused == {"does not fit"}
    assert scenario.crossovers() == []
    crowded = replace(SCENARIO, batch_sizes=[2**31], gpus=[8])
    crowd = crowded.project_sharded(CRITEO_TB, Place(8), 2**31)
    assert crowd.cost is None
    assert "alone fill a GPU" in crowd.refusal


def test_adagrad_needs_more_memory_and_time():
    sgd, adagrad = (
        replace(SCENARIO, cost_model=replace(SCENARIO.cost_model, optimizer=name)).project_sharded(
            CRITEO_TB, Place(8), 16384
        )
        for name in ("sgd", "adagrad")
    )
    assert sgd.cost
    assert adagrad.cost
    assert (sgd.devices, adagrad.devices) == (2, 4)
    assert adagrad.cost.compute_ms["lookups"] > 1.3 * sgd.cost.compute_ms["lookups"]
    working = SCENARIO.cost_model.working_bytes(CRITEO_TB, 2048)
    assert adagrad.stored_bytes - working == pytest.approx(2 * (sgd.stored_bytes - working), rel=0.01)


def test_crossovers_are_where_the_steps_are_equal():
    found = [c for c in SCENARIO.crossovers() if c.changes]
    assert found
    for crossover in found:
        compression = float(crossover.setup.split()[1].rstrip("×,").replace(",", ""))
        owner = ONE_GPU if "one GPU" in crossover.setup else crossover.place
        sharded = SCENARIO.steps_over_batch(CRITEO_TB, FULL, crossover.place)
        robe = SCENARIO.steps_over_batch(CRITEO_TB, compression, owner)
        for batch, sharded_above in crossover.changes:
            points = [SCENARIO.project_robe(CRITEO_TB, compression, owner, int(batch))]
            cluster = SCENARIO.cost_model.cluster(crossover.place.gpus, crossover.place.network_gbit)
            placement = SCENARIO._place_tables(CRITEO_TB, crossover.place.gpus, SCENARIO.batch_sizes[0])
            step = SCENARIO.cost_model.sharded_step(CRITEO_TB, cluster, placement, int(batch))
            assert step.step_ms == pytest.approx(points[0].step_ms, rel=1e-2)
            above = next(size for size in sharded if size > batch)
            assert (sharded[above] < robe[above]) == sharded_above
    alone = next(c for c in found if c.setup == "ROBE 1,000×, one GPU" and c.place == Place(8))
    assert not alone.sharded_first
    assert re.fullmatch(r"ROBE < [\d,]+ < sharded", describe_crossover(alone))
    assert describe_crossover(replace(alone, changes=[])) == "ROBE"


def test_no_step_has_fewer_rows_than_gpus():
    scenario = replace(SCENARIO, gpus=[1024], networks=[400])
    assert min(scenario.steps_over_batch(CRITEO_TB, 1000, Place(1024, 400))) == 1024
    assert {c.lowest for c in scenario.crossovers()} == {1024}


def test_the_grid_of_batch_sizes_rises_by_a_quarter_of_a_doubling():
    grid = batch_grid()
    assert (grid[0], grid[4], grid[-1]) == (256, 512, 1 << 22)


def test_published_steps_stand_beside_the_models():
    checks = check_published(Assumptions())
    assert len(checks) == len(PUBLISHED.torchrec) + len(PUBLISHED.pss.seconds) == 11
    assert checks[0].published == pytest.approx(7.196, abs=1e-3)
    assert [c.is_calibration for c in checks] == [True] + [False] * (len(checks) - 1)
    assert all(c.projected > 0 for c in checks)
    eight = [c for c in checks if c.label.startswith("8 GPUs") and not c.is_calibration]
    assert all(0.7 < c.ratio < 1.2 for c in eight)  # one node: within 30 % of what was published
    assert check_published(Assumptions(fixed_ms=0))[0].ratio < 0.1


def test_the_planners_placement_of_the_calibration_step_gives_its_fixed_time(monkeypatch):
    """The assumption is what the published step leaves over."""
    monkeypatch.setattr(table_placement, "MAX_PLANNED", 64)
    step = PUBLISHED.torchrec[0]
    ms = sharded_ms(PUBLISHED.model(step.tables), step.gpus, step.local_batch_size, Assumptions())
    assert ms == pytest.approx(step.step_ms, rel=0.01)


def test_overrides_change_what_they_name():
    machine = override_section(MACHINES["a100"], "machine", ["machine.memory_gb=40", "assumed.fixed_ms=1"])
    assert (machine.memory_gb, machine.cache_mb) == (40, 40)
    assert override_section(Assumptions(), "assumed", ["machine.memory_gb=40", "assumed.fixed_ms=1"]).fixed_ms == 1
    assert override_section(machine, "machine", ["machine.gpus_per_node=4"]).gpus_per_node == 4
    assert override_section(MODELS["1tb"], "model", ["model.rows=[5, 6]"]).rows == (5, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("machine.memory=40", "machine.memory = 40: unknown key (did you mean memory_gb?); known: cache_mb"),
        ("machine.memory_gb=lots", "machine.memory_gb = 'lots': input should be a valid number"),
        ("machine.memory_gb=-1", "machine.memory_gb = -1: input should be greater than 0"),
        ("machine.memory_gb=inf", "machine.memory_gb = inf: input should be a finite number"),
        ("machine.gpus_per_node=2.5", "machine.gpus_per_node = 2.5: input should be a valid integer"),
    ],
)
def test_a_bad_override_is_named(text, said):
    with pytest.raises(ConfigError, match=re.escape(f"override {text!r}: {said}")):
        override_section(MACHINES["a100"], "machine", [text])


def test_what_is_not_known_is_named():
    with pytest.raises(ConfigError, match=r"model.rows = 5: input should be a valid array"):
        override_section(MODELS["1tb"], "model", ["model.rows=5"])
    with pytest.raises(ConfigError, match=r"--machine v100: unknown; known: a100, h100"):
        choose("--machine", MACHINES, "v100")


def test_caveats_say_what_was_not_measured():
    lines = " ".join(describe_caveats(Projection.of(SCENARIO)))
    assert "none of these steps has been run" in lines
    assert "No measurements were given" in lines
    assert "at another batch size take for granted" in lines
    only = replace(SCENARIO, batch_sizes=[2048])
    assert "take for granted" not in " ".join(describe_caveats(Projection.of(only)))


def test_words_and_tables():
    assert str(ONE_GPU) == "1 GPU"
    assert str(Place(1024, 200)) == "1,024 GPUs, 200 Gbit/s"
    projection = Projection.of(SCENARIO)
    table = crossover_table(projection, CRITEO_TB)
    assert [column.heading for column in table.columns[1:]] == [
        "1,000×, one GPU", "1,000×, data-parallel", "10,000×, one GPU", "10,000×, data-parallel",
    ]  # fmt: skip
    assert [row[0].text for row in table.rows] == ["8 GPUs", "16 GPUs, 100 Gbit/s", "16 GPUs, 400 Gbit/s"]
    (first, second) = describe_cheapest(projection.points)
    assert first.startswith("Criteo-TB, 97 GiB, batch 2,048: fewest hours: sharded")
    assert "fewest US $" in second


def test_steps_stand_beside_those_of_sharded_tables():
    projection = Projection.of(SCENARIO)
    points = [point for point in projection.points if point.global_batch_size == 16384]
    table = steps_table(projection, points)
    assert [row[0].text for row in table.rows] == ["1 GPU", "8 GPUs", "16 GPUs, 100 Gbit/s", "16 GPUs, 400 Gbit/s"]
    sharded, robe = table.rows[1][2], table.rows[1][3]
    assert robe.text.split() == [f"{robe.value:.2f}", f"{robe.value / sharded.value:.2f}×"]
    assert all(robe.detail.split(" + ")), "computing + exposed communication"
    ends = [(row[0].text, row[1].text) for row in totals_table(points).rows]
    assert ("sharded", "8 GPUs") in ends, "the fewest are the fastest"
    assert [place for setup, place in ends if setup == "ROBE 10,000×, data-parallel"] == [
        "8 GPUs", "16 GPUs, 400 Gbit/s",
    ]  # fmt: skip
    every = points_table(projection, points)
    assert len(every.rows) == len(points)
    assert every.rows[0][6].text == "–", "no sharded tables on one GPU"


def test_json_has_an_origin_for_every_figure():
    document = to_json(Projection.of(SCENARIO))
    json.dumps(document, allow_nan=False)
    assert {point["origin"] for point in document["points"]} == {"projected"}
    assert all(point["step_ms"] == pytest.approx(point["computing_ms"] + point["exposed_comm_ms"])
               for point in document["points"])  # fmt: skip
    assert document["assumed"]["fixed_ms"] == 6.9
    assert document["validation"] is None


def test_the_page_fetches_nothing_and_marks_everything():
    page = build_page(Projection.of(SCENARIO))
    assert [plot.id for plot in page.plots] == ["gpus", "parts", "batch", "totals", "published"]
    for plot in page.plots:
        assert set(plot.tags) <= {"measured", "emulated", "published", "projected"}
        assert plot.tags
        for figure in plot.figures.values():
            assert figure["data"]
            assert figure["layout"]["yaxis"]["title"]["text"].startswith("projected")
    text = page.render()
    own = text[: text.index("<script>")] + text[text.index('id="figures"') :]
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|@import|url\(', own)
    assert "default-src 'none'" in text
    assert "none of these steps has been run" in own
    assert {tag for section in page.sections for tag in section.tags} == {"published", "projected"}


def test_stacked_parts_add_up_to_the_steps():
    projection = Projection.of(replace(SCENARIO, batch_sizes=[16384], networks=[400]))
    (figure,) = next(plot for plot in build_page(projection).plots if plot.id == "parts").figures.values()
    sums = [sum(values) for values in zip(*(trace["y"] for trace in figure["data"]), strict=True)]
    assert sums == pytest.approx([p.cost.step_ms for p in projection.points if p.cost], rel=1e-4)


def test_stored_bytes_count_layers_and_activations_on_both_sides():
    working = SCENARIO.cost_model.working_bytes(CRITEO_TB, 2048)
    sharded = SCENARIO.project_sharded(CRITEO_TB, Place(8), 16384)
    placement = SCENARIO._place_tables(CRITEO_TB, 8, 16384)
    assert sharded.stored_bytes == pytest.approx(placement.bytes_per_rank.max() + working)
    robe = SCENARIO.project_robe(CRITEO_TB, 1000, Place(8), 16384)
    assert robe.stored_bytes == pytest.approx(2 * 4 * CRITEO_TB.table_parameters / 1000 + working)
