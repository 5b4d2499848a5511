"""The map of who wins: ratios, ties, crossovers against a law put in, words, and the page."""

import json
import math
import re

import pytest

from recsys.cost.crossover_map import (
    Cell,
    Link,
    LinkAsFound,
    Ratio,
    Setup,
    compare,
    describe_doubts,
    describe_outcome,
    describe_ratios,
    find_crossovers,
    links_of,
    ratios_over_batch,
    read_cells,
)
from recsys.cost.crossover_page import build_plots, map_figure, parts_figure, write_crossover_page

FOUND = LinkAsFound(950.0, 2100.0, True, 0, 0.1)
SLOW, FAST, LOOPBACK = Link(100, 1000), Link(10_000, 50), Link(None, None)


def setup(label, side, median, spread=0.05, compression=1.0):
    return Setup(label, side, compression, median, median * (1 - spread), median * (1 + spread), 20, {}, 0)


def measured(label, side, median, compression=1.0, spread=0.05, profile=True):
    """A setup as crossover.json has it. Its profiled step is 10 ms: 4 computing, 3 + 2 exposed, 1 other."""
    found = {
        "label": label,
        "side": side,
        "asked_compression": compression,
        "step_ms": {"median": median, "p25": median * (1 - spread), "p75": median * (1 + spread), "n": 20},
    }
    parts = {"compute_ms": 4.0, "exposed_comm_ms": 5.0, "exposed_wait_ms": 2.0, "overlap_ms": 7.0, "other_ms": 1.0}
    profiled = {"profiled_step_ms": 10.0, "parts": parts, "bytes_per_step": {"all_to_all": 1e6, "all_reduce": 5e5}}
    return found | (profiled if profile else {})


def network(link, is_as_asked=True, dropped=0):
    return {
        "emulated": link.is_emulated,
        "rate_mbit": link.rate_mbit,
        "delay_us": link.delay_us,
        "measured_rate_mbit": 950.0,
        "measured_round_trip_us": 2100.0,
        "is_as_asked": is_as_asked,
        "dropped_packets": dropped,
        "relay_cores": 0.25,
    }


def document(links=(SLOW, LOOPBACK, FAST), batch_sizes=(2048, 512), **changes):
    """Sharded: 0.02 ms a row. ROBE: 10 ms and 0.01 ms a row. One process: 0.03 ms a row, by FAST twice."""
    cells = []
    for batch_size in batch_sizes:
        for link in links:
            drift = 2 if link == FAST else 1
            single = [measured("one <process>", "single", 0.03 * batch_size * drift, 100)]
            beside = {"rate_mbit": link.rate_mbit, "delay_us": link.delay_us}
            cells.append({"network": None, "beside": beside, "global_batch_size": batch_size, "setups": single})
            ranks = [
                measured("row-wise", "sharded", 0.04 * batch_size),
                measured("table-wise", "sharded", 0.02 * batch_size),
                measured("ROBE 100×", "data_parallel", 10 + 0.01 * batch_size, 100),
            ]
            cells.append({"network": network(link), "global_batch_size": batch_size, "setups": ranks})
    environment = {"world_size": 2, "cpu": "Some <CPU>", "cpu_cores": 2, "commit": "0123456789ab"}
    environment |= {"uncommitted_changes": False, "started": "2026-01-02T03"}
    return {"version": 1, "status": "finished", "environment": environment, "cells": cells} | changes


def test_a_ratio_has_the_range_that_quartiles_allow():
    ratio = compare(setup("a", "data_parallel", 10, 0.1), setup("b", "sharded", 20, 0.25))
    assert ratio == Ratio(0.5, pytest.approx(9 / 25), pytest.approx(11 / 15))
    assert not ratio.is_same
    assert compare(setup("a", "single", 10, 0.1), setup("b", "sharded", 11, 0.1)).is_same
    assert not compare(setup("a", "single", 10, 0.01), setup("b", "sharded", 11, 0.01)).is_same


def test_the_fastest_wins_together_with_what_is_the_same():
    setups = [setup("slow", "sharded", 20), setup("fast", "single", 10), setup("tie", "data_parallel", 10.5)]
    cell = Cell(SLOW, FOUND, 512, setups)
    assert cell.fastest.label == "fast"
    assert [winner.label for winner in cell.winners] == ["fast", "tie"]
    assert cell.over_sharded(setups[1]).median == 0.5
    assert cell.best("data_parallel", 7) is None
    assert Cell(SLOW, FOUND, 512, setups[1:]).over_sharded(setups[1]) is None


def test_cells_are_read_in_order_each_with_the_one_process_measured_beside_it():
    cells = read_cells(document())
    assert links_of(cells) == [LOOPBACK, FAST, SLOW]
    assert [cell.global_batch_size for cell in cells] == [512, 2048] * 3
    for cell in cells:
        assert [s.side for s in cell.setups] == ["sharded", "sharded", "data_parallel", "single"]
        drift = 2 if cell.link == FAST else 1
        assert cell.setups[-1].median_ms == pytest.approx(0.03 * cell.global_batch_size * drift)
        assert cell.best("sharded").label == "table-wise"
    assert cells[0].found == LinkAsFound(950.0, 2100.0, True, 0, 0.25)
    assert cells[0].setups[0].sent_bytes == 1.5e6


def test_parts_are_shares_of_the_step_that_was_not_profiled():
    found = read_cells(document())[0].setups[1]
    assert found.median_ms == pytest.approx(10.24)
    assert list(found.parts_ms.values()) == pytest.approx([4.096, 3.072, 2.048, 1.024])
    bare = measured("a", "sharded", 5.0, profile=False)
    cell = {"network": network(SLOW), "global_batch_size": 8, "setups": [bare]}
    assert read_cells(document(cells=[cell]))[0].setups[0].parts_ms == {}


def test_a_crossover_is_found_where_the_law_has_it():
    def at(batch_size, spread=0.0):
        ours = setup("r", "data_parallel", 3 * batch_size**0.5, spread)
        return compare(ours, setup("s", "sharded", 0.1 * batch_size, spread))

    (crossover,) = find_crossovers({b: at(b) for b in (128, 512, 2048, 8192)})
    assert crossover.global_batch_size == pytest.approx(900)
    assert crossover.robe_is_faster_above
    assert crossover.is_clear
    (crossover,) = find_crossovers({b: at(b, 0.3) for b in (128, 512, 2048, 8192)})
    assert not crossover.is_clear
    falling = {b: Ratio(1 / at(b).median, 0, 0) for b in (512, 2048)}
    (crossover,) = find_crossovers(falling)
    assert crossover.global_batch_size == pytest.approx(900)
    assert not crossover.robe_is_faster_above
    assert find_crossovers({b: at(b) for b in (128, 512)}) == []


@pytest.mark.parametrize(
    ("medians", "said"),
    [
        ((0.5, 0.25), "faster, 0.25 to 0.50×"),
        ((2.0,), "slower, 2.00×"),
        ((2.0, 0.5), "slower up to a batch of about 200, faster above, 0.50 to 2.00×"),
        ((0.5, 2.0, 0.5), "faster up to a batch of about 200, slower up to a batch of about 800, faster above, "),
    ],
)
def test_ratios_in_words(medians, said):
    ratios = {100 * 4**i: Ratio(m, m * 0.9, m * 1.1) for i, m in enumerate(medians)}
    assert describe_ratios(ratios).startswith(said)


def test_words_say_what_is_within_the_spread():
    assert describe_ratios({8: Ratio(0.9, 0.8, 1.1), 16: Ratio(0.5, 0.4, 0.6)}) == (
        "faster, 0.50 to 0.90× (within the spread at 8)"
    )
    said = describe_ratios({8: Ratio(0.9, 0.8, 1.1), 32: Ratio(1.8, 1.7, 1.9)})
    assert said.startswith("faster up to a batch of about 10 (within the spread), slower above")


def test_outcome_is_a_line_for_each_network_and_side():
    lines = describe_outcome(read_cells(document()))
    assert len(lines) == 6
    assert lines[0] == (
        "loopback (measured), ROBE data-parallel: 100× slower up to a batch of about 1,100, faster above, 0.74 to 1.48×"
    )
    assert lines[5] == "100 Mbit/s, 1 ms (emulated), ROBE in one process: 100× slower, 1.50×"


def test_doubts_name_networks_that_are_not_as_asked():
    cells = document(links=[SLOW], batch_sizes=[512])["cells"]
    assert describe_doubts(read_cells(document(cells=cells))) == []
    cells[1]["network"] = network(SLOW, is_as_asked=False, dropped=12)
    off, lost = describe_doubts(read_cells(document(cells=cells)))
    assert off.startswith("100 Mbit/s, 1 ms (emulated), batch size 512: the network carried 950 Mbit/s each way")
    assert lost.endswith("12 packets were dropped by a full queue")


def test_the_map_is_drawn_slowest_network_first_with_a_line_at_the_crossover():
    cells = read_cells(document())
    drawn = map_figure(cells, "data_parallel", 100)
    assert drawn["layout"]["yaxis"]["ticktext"][0] == "100 Mbit/s, 1 ms<br>(emulated)"
    assert drawn["data"][0]["text"] == [["1.48×", "0.74×"]] * 3
    assert drawn["data"][0]["z"][0] == pytest.approx([math.log2(15.12 / 10.24), math.log2(30.48 / 40.96)], abs=1e-5)
    lines = drawn["layout"]["shapes"]
    assert [line["y0"] for line in lines] == [-0.5, 0.5, 1.5]
    place = math.log(15.12 / 10.24) / math.log(15.12 / 10.24 / (30.48 / 40.96))
    assert all(line["x0"] == line["x1"] == pytest.approx(place, abs=1e-5) for line in lines)
    assert ratios_over_batch(cells, SLOW, "data_parallel", 10) == {}


def test_bars_sum_to_the_step():
    drawn = parts_figure(read_cells(document())[0])
    steps = [sum(values) for values in zip(*(trace["x"] for trace in drawn["data"]), strict=True)]
    assert steps[::-1] == pytest.approx([20.48, 10.24, 15.12, 15.36])
    assert drawn["data"][0]["y"][0] == "one &lt;process&gt;"


def test_the_page_stands_alone_and_says_emulated(tmp_path):
    write_crossover_page(document(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<title>Sharded tables against ROBE over EMULATED networks · pss-bench</title>" in page
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", own)
    assert "one <process>" not in own
    assert "Some &lt;CPU&gt;" in own
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [section["id"] for section in data] == ["map", "time", "parts"]
    assert data == json.loads(json.dumps(build_plots(read_cells(document()))))
    for figures in [panel["figures"] for section in data[1:] for panel in section["panels"]]:
        for name, drawn in figures.items():
            axis = json.dumps(drawn["layout"]["xaxis"]) + json.dumps(drawn["layout"]["yaxis"])
            assert ("emulated" in axis) == ("(emulated)" in name) == ("loopback" not in name)


def test_a_partial_sweep_says_so_and_one_cell_is_enough(tmp_path):
    partial = document(links=[SLOW], batch_sizes=[512], status="2 of 9 cells")
    write_crossover_page(partial, tmp_path / "page.html")
    assert "2 of 9 cells: partial figures" in (tmp_path / "page.html").read_text()
