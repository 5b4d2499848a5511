"""The map of who wins: ratios, ties, crossovers against a law put in, words, and the page."""

import json
import math
import re

import pytest

from recsys.cost.crossover import (
    Arm,
    CrossoverFile,
    Link,
    Network,
    Ratio,
    Trial,
    compare,
    describe_doubts,
    describe_outcome,
    describe_ratios,
    find_crossings,
    links_of,
    ratios_over_batch,
)
from recsys.cost.crossover_report import build_page, map_figure, parts_figure, steps_table
from tests.recsys.cost.fake_crossover import make_arm, make_document

SLOW, FAST, LOOPBACK = (
    Link(rate_mbit=rate, delay_us=delay) for rate, delay in ((100, 1000), (10_000, 50), (None, None))
)
PARTS = {"compute_ms": 4.0, "exposed_comm_ms": 5.0, "exposed_wait_ms": 2.0, "overlap_ms": 7.0, "other_ms": 1.0}


def measured(label, side, median, compression=1.0, spread=0.05, batch=512, **changes):
    """An arm as crossover.json has it. Its profiled step is 10 ms: 4 computing, 3 + 2 exposed, 1 other."""
    kind = "table_wise" if side == "sharded" else side
    step = {"median": median, "p25": median * (1 - spread), "p75": median * (1 + spread), "n": 20}
    sent = {"bytes_per_step": {"all_to_all": 1e6, "all_reduce": 5e5}}
    made = make_arm(kind, compression, batch, 1000, 50) | {"label": label, "step_ms": step, "parts": PARTS} | sent
    return made | changes


def arm(*arguments, **more):
    return Arm(**measured(*arguments, **more))


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


def trial(*arms):
    return Trial(global_batch_size=512, network=Network(**network(SLOW)), setups=arms)


def document(links=(SLOW, LOOPBACK, FAST), batch_sizes=(2048, 512), **changes):
    """Sharded: 0.02 ms a row. ROBE: 10 ms and 0.01 ms a row. One process: 0.03 ms a row, by FAST twice."""
    trials = []
    for batch in batch_sizes:
        for link in links:
            drift = 2 if link == FAST else 1
            single = [measured("one <process>", "single", 0.03 * batch * drift, 100, batch=batch)]
            beside = {"rate_mbit": link.rate_mbit, "delay_us": link.delay_us}
            trials.append({"network": None, "beside": beside, "global_batch_size": batch, "setups": single})
            ranks = [
                measured("row-wise", "sharded", 0.04 * batch, batch=batch),
                measured("table-wise", "sharded", 0.02 * batch, batch=batch),
                measured("ROBE 100×", "data_parallel", 10 + 0.01 * batch, 100, batch=batch),
            ]
            trials.append({"network": network(link), "global_batch_size": batch, "setups": ranks})
    return make_document() | {"cells": trials} | changes


def load(*arguments, **more):
    return CrossoverFile.model_validate(document(*arguments, **more))


def joined(*arguments, **more):
    return load(*arguments, **more).joined()


def test_a_ratio_has_the_range_that_quartiles_allow():
    ratio = compare(arm("a", "data_parallel", 10, spread=0.1), arm("b", "sharded", 20, spread=0.25))
    assert ratio == Ratio(0.5, pytest.approx(9 / 25), pytest.approx(11 / 15))
    assert not ratio.is_same
    assert compare(arm("a", "single", 10, spread=0.1), arm("b", "sharded", 11, spread=0.1)).is_same
    assert not compare(arm("a", "single", 10, spread=0.01), arm("b", "sharded", 11, spread=0.01)).is_same


def test_the_fastest_wins_together_with_what_is_the_same():
    arms = [arm("slow", "sharded", 20), arm("fast", "single", 10), arm("tie", "data_parallel", 10.5)]
    whole = trial(*arms)
    assert whole.fastest.label == "fast"
    assert [winner.label for winner in whole.winners] == ["fast", "tie"]
    assert whole.over_sharded(arms[1]).median == 0.5
    assert whole.best("data_parallel", 7) is None
    assert trial(*arms[1:]).over_sharded(arms[1]) is None


def test_trials_are_in_order_each_with_the_one_process_measured_beside_it():
    trials = joined()
    assert links_of(trials) == [LOOPBACK, FAST, SLOW]
    assert [trial.global_batch_size for trial in trials] == [512, 2048] * 3
    for each in trials:
        assert [arm.side for arm in each.arms] == ["sharded", "sharded", "data_parallel", "single"]
        drift = 2 if each.link == FAST else 1
        assert each.arms[-1].median_ms == pytest.approx(0.03 * each.global_batch_size * drift)
        assert each.best("sharded").label == "table-wise"
    assert trials[0].network == Network(**network(LOOPBACK))
    assert trials[0].arms[0].sent_bytes == 1.5e6


def test_parts_are_shares_of_the_step_that_was_not_profiled():
    profiled = joined()[0].arms[1]
    assert profiled.median_ms == pytest.approx(10.24)
    assert list(profiled.parts_ms.values()) == pytest.approx([4.096, 3.072, 2.048, 1.024])
    assert arm("a", "sharded", 5.0, parts=None).parts_ms == {}


def test_a_crossover_is_found_where_the_law_has_it():
    ratios = {batch: 30 / batch**0.5 for batch in (128, 512, 2048, 8192)}
    (crossing,) = find_crossings(ratios)
    assert crossing.batch_size == pytest.approx(900)
    assert crossing.is_below_after
    assert crossing.between == (512, 2048)
    (crossing,) = find_crossings({batch: 1 / ratio for batch, ratio in ratios.items()})
    assert crossing.batch_size == pytest.approx(900)
    assert not crossing.is_below_after
    assert find_crossings({batch: ratios[batch] for batch in (128, 512)}) == []


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
    lines = describe_outcome(joined())
    assert len(lines) == 6
    assert lines[0] == (
        "loopback (measured), ROBE data-parallel: 100× slower up to a batch of about 1,100, faster above, 0.74 to 1.48×"
    )
    assert lines[5] == "100 Mbit/s, 1 ms (emulated), ROBE in one process: 100× slower, 1.50×"


def test_doubts_name_networks_that_are_not_as_requested():
    cells = document(links=[SLOW], batch_sizes=[512])["cells"]
    assert describe_doubts(joined(cells=cells)) == []
    cells[1]["network"] = network(SLOW, is_as_asked=False, dropped=12)
    off, lost = describe_doubts(joined(cells=cells))
    assert off.startswith("100 Mbit/s, 1 ms (emulated), batch size 512: the network carried 950 Mbit/s each way")
    assert lost.endswith("12 packets were dropped by a full queue")


def test_the_map_is_drawn_slowest_network_first_with_a_line_at_the_crossover():
    trials = joined()
    drawn = map_figure(trials, "data_parallel", 100)
    assert drawn["layout"]["yaxis"]["ticktext"][0] == "100 Mbit/s, 1 ms<br>(emulated)"
    assert drawn["data"][0]["text"] == [["1.48×", "0.74×"]] * 3
    assert drawn["data"][0]["z"][0] == pytest.approx([math.log2(15.12 / 10.24), math.log2(30.48 / 40.96)], abs=1e-5)
    lines = drawn["layout"]["shapes"]
    assert [line["y0"] for line in lines] == [-0.5, 0.5, 1.5]
    place = math.log(15.12 / 10.24) / math.log(15.12 / 10.24 / (30.48 / 40.96))
    assert all(line["x0"] == line["x1"] == pytest.approx(place, abs=1e-5) for line in lines)
    assert ratios_over_batch(trials, SLOW, "data_parallel", 10) == {}


def test_bars_sum_to_the_step():
    drawn = parts_figure(joined()[0])
    steps = [sum(values) for values in zip(*(trace["x"] for trace in drawn["data"]), strict=True)]
    assert steps[::-1] == pytest.approx([20.48, 10.24, 15.12, 15.36])
    assert drawn["data"][0]["y"][0] == "one &lt;process&gt;"


def test_a_table_marks_the_fastest_and_shows_the_network_as_measured():
    trials = [trial for trial in joined() if trial.link == SLOW]
    table = steps_table(SLOW, trials)
    assert [column.heading for column in table.columns] == ["100 Mbit/s, 1 ms (emulated)", "batch 512", "batch 2,048"]
    assert table.columns[1].detail == "950 Mbit/s, 2,100 µs"
    assert [row[1].text for row in table.rows] == ["20.5 2.00×  ", "10.2 1.00× ★", "15.1 1.48×  ", "15.4 1.50×  "]
    assert [row[1].emphasis for row in table.rows] == ["", "bold", "", ""]


def test_the_page_stands_alone_and_says_emulated():
    page = build_page(load())
    text = page.render()
    assert "<title>Sharded tables against ROBE over EMULATED networks · pss-bench</title>" in text
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", own)
    assert "one <process>" not in own
    assert "Some &lt;CPU&gt;" in own
    assert [plot.id for plot in page.plots] == ["map-data_parallel-100", "map-single-100", "time", "parts"]
    for plot in page.plots[2:]:
        for name, drawn in plot.figures.items():
            axis = json.dumps(drawn["layout"]["xaxis"]) + json.dumps(drawn["layout"]["yaxis"])
            assert ("emulated" in axis) == ("(emulated)" in str(name)) == ("loopback" not in str(name))


def test_a_partial_sweep_says_so_and_one_trial_is_enough():
    assert "2 of 9 trials: partial figures" in build_page(load([SLOW], [512], status="2 of 9 trials")).render()
