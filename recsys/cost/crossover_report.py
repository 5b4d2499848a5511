"""Trials over networks in tables, words and plots: who wins where, step times, where they go, the networks."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from recsys.cost.crossover import (
    PARTS,
    ROBE_SIDES,
    Arm,
    CrossoverFile,
    Link,
    Ratio,
    Side,
    Trial,
    batch_sizes_of,
    compressions_of,
    describe_doubts,
    describe_outcome,
    find_crossings,
    links_of,
    ratios_over_batch,
)
from recsys.report.escape import escape_plotly
from recsys.report.numbers import MISSING, format_bytes, format_quartiles, format_ratio, three_digits
from recsys.report.page import Details, Figure, Grid, Lines, Notice, Page, Pairs, Plot, Section
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded
from recsys.report.table import Cell, Column, Table

_COLOURS: dict[Side, Sequence[str]] = {
    "sharded": ("#7a7f87", "#4d5157", "#a9adb3"),
    "data_parallel": ("#56b4e9", "#0072b2", "#08306b"),
    "single": ("#f4b183", "#d55e00", "#7f3800"),
}
_SYMBOLS: dict[Side, str] = {"sharded": "square", "data_parallel": "circle", "single": "diamond"}
_PART_COLOURS = dict(zip(PARTS, ("#0072b2", "#d55e00", "#f4b183", "#a9adb3"), strict=True))
_SCALE = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]
_MOST_DOUBLINGS = 4


def build_page(file: CrossoverFile) -> Page:
    """Return the page of a crossover.json; what a terminal can show of it, `print_page` prints."""
    trials, environment = file.joined(), file.environment
    links, outcome = links_of(trials), describe_outcome(trials)
    steps = [steps_table(link, [trial for trial in trials if trial.link == link]) for link in links]
    sections = [
        Section("", [Notice("Not as requested", describe_doubts(trials)), Lines(outcome), *build_plots(trials)]),
        Section("Steps", [
            "Step, ms, and × the best sharded setup  ★ fastest, ≈ the same within quartiles", *steps
        ]),
        Section("The networks and every figure", [
            Details("The networks, as requested and as measured", [networks_table(trials)]),
            Details("Every figure", [arms_table(trials)]),
        ]),
        Section("How it was measured", [Details("Ranks and networks", [
            "Ranks are processes of this one machine, in network namespaces with links of the rate and delay "
            "requested. Loopback is the machine as it is, measured; every other network is emulated, and its relay "
            "takes some of the same cores. Arms of a network and batch size were measured interleaved.",
            Pairs({key: str(value) for key, value in environment.items()}),
        ])]),
    ]  # fmt: skip
    return Page(
        "Sharded tables against ROBE over EMULATED networks",
        f"{len(links)} networks between {environment['world_size']} hosts, {len(batch_sizes_of(trials))} batch sizes, "
        f"on one machine: {environment['cpu']}, {environment['cpu_cores']} cores; commit "
        f"{(environment['commit'] or 'unknown')[:10]}{' with changes' * environment['uncommitted_changes']}, "
        f"{environment['started'][:10]}.",
        sections,
        "" if file.status == "finished" else f"{file.status}: partial figures",
        "Every step on this page was measured; those over a network other than loopback on an emulated one.",
    )


def steps_table(link: Link, trials: Sequence[Trial]) -> Table:
    """Return the steps over one network: a row an arm, a column a batch size."""

    def cell(trial: Trial, label: str) -> Cell:
        arm = next((arm for arm in trial.arms if arm.label == label), None)
        if arm is None:
            return Cell(MISSING)
        ratio, is_winner = trial.over_sharded(arm), arm in trial.winners
        mark = "★" if arm is trial.fastest else "≈" if is_winner else " "
        text = f"{three_digits(arm.median_ms)} {format_ratio(ratio.median) if ratio else ''} {mark}"
        return Cell(text, value=arm.median_ms, emphasis="bold" if is_winner else "")

    def heading(trial: Trial) -> Column:
        network = trial.network
        measured = (
            f"{network.measured_rate_mbit:,.0f} Mbit/s, {network.measured_round_trip_us:,.0f} µs" if network else ""
        )
        return Column(f"batch {trial.global_batch_size:,}", detail=measured)

    labels = dict.fromkeys(arm.label for trial in trials for arm in trial.arms)
    rows = [[label, *(cell(trial, label) for trial in trials)] for label in labels]
    return Table([link.label, *map(heading, trials)], rows)


def networks_table(trials: Sequence[Trial]) -> Table:
    """Return every network as it was requested and as it was measured before each trial."""

    def asked(value: float | None) -> Cell:
        return Cell.of(value, "{:,g}".format)

    rows = [
        [trial.link.label, trial.global_batch_size, asked(n.rate_mbit), Cell.of(n.measured_rate_mbit, "{:,.0f}".format),
         asked(None if n.delay_us is None else 2 * n.delay_us), Cell.of(n.measured_round_trip_us, "{:,.0f}".format),
         n.dropped_packets, Cell.of(n.relay_cores, "{:.2f}".format), "yes" if n.is_as_asked else "no"]
        for trial in trials if (n := trial.network)
    ]  # fmt: skip
    columns = [
        "network", "batch size", Column("rate requested", unit="Mbit/s"),
        Column("rate measured", "What TCP carries each way while both are used.", unit="Mbit/s"),
        Column("round trip requested", unit="µs"),
        Column("round trip measured", "How long one byte takes there and back.", unit="µs"),
        "packets dropped", Column("relay", "Its share of a core while steps were made.", unit="cores"), "as requested",
    ]  # fmt: skip
    return Table(columns, rows)


def arms_table(trials: Sequence[Trial]) -> Table:
    """Return every arm of every trial."""

    def ratio(pair: tuple[Trial, Arm]) -> Cell:
        over = pair[0].over_sharded(pair[1])
        return Cell.of(over.median, format_ratio, f"{over.low:.2f}–{over.high:.2f}") if over else Cell(MISSING)

    def step(pair: tuple[Trial, Arm]) -> Cell:
        trial, arm = pair
        detail = format_quartiles(arm.step_ms.p25, arm.step_ms.p75)
        return Cell.of(arm.median_ms, three_digits, detail, "bold" if arm in trial.winners else "")

    def part(name: str) -> Column[tuple[Trial, Arm]]:
        return Column(name, cell=lambda pair: Cell.of(pair[1].parts_ms.get(name), three_digits), unit="ms")

    columns: list[Column[tuple[Trial, Arm]]] = [
        Column("setup", cell=lambda pair: pair[1].label),
        Column("network", cell=lambda pair: pair[0].link.label, align="left"),
        Column("batch size", cell=lambda pair: pair[0].global_batch_size),
        Column("step", "Median; small print: first and third quartile. Bold: the fastest of its trial, and the same "
               "within the quartiles.", step, unit="ms"),
        Column("× best sharded", "Small print: what the quartiles of both allow.", ratio),
        *map(part, PARTS),
        Column("sent", "Bytes in collectives, of a rank and step.",
               lambda pair: Cell.of(pair[1].sent_bytes or None, format_bytes)),
    ]  # fmt: skip
    pairs = [(trial, arm) for trial in trials for arm in trial.arms]
    return Table.of(pairs, columns, section=lambda pair: pair[0].label)


def build_plots(trials: Sequence[Trial]) -> list[Grid | Plot]:
    """Return a map for every ROBE arm, the steps over batch sizes, and where they go if that was profiled."""
    maps = [
        Plot(
            f"map-{side}-{compression:g}",
            f"ROBE {compression:g}× {words}: its step over the best sharded one",
            "Blue: ROBE is faster. Red: sharded tables are. Across the black line both are equal, interpolated between "
            "trials in their logarithms. ≈: within the quartiles of both.",
            {"": map_figure(trials, side, compression)},
        )
        for side, words in ROBE_SIDES.items()
        for compression in compressions_of(trials, side)
    ]
    times = {link.label: time_figure([trial for trial in trials if trial.link == link]) for link in links_of(trials)}
    parts = {
        (trial.link.label, f"batch size {trial.global_batch_size:,}"): parts_figure(trial)
        for trial in trials
        if any(arm.parts_ms for arm in trial.arms)
    }
    time_plot = Plot(
        "time",
        "Step over batch size",
        "Medians with first and third quartile, both axes logarithmic. One process has no network: its steps are timed "
        "again beside each, and where they differ the machine has drifted.",
        times,
        460,
        is_wide=True,
        first=list(times)[-1],
    )
    part_plot = Plot(
        "parts",
        "Where a step goes",
        "Shares of a profiled window, means over ranks, laid on the median step that was not profiled. Communication "
        "that computing hides is not shown; waiting is for the slower rank.",
        parts,
        460,
        is_wide=True,
        first=list(parts)[-1] if parts else None,
    )
    return [Grid(maps, 3), time_plot, *([part_plot] if parts else [])]


def map_figure(trials: Sequence[Trial], side: Side, compression: float) -> Figure:
    """Return networks × batch sizes, coloured by the ratio of one ROBE arm to the best sharded one."""
    links, batch_sizes = links_of(trials)[::-1], batch_sizes_of(trials)
    rows = [ratios_over_batch(trials, link, side, compression) for link in links]
    places = {"x": list(range(len(batch_sizes))), "y": list(range(len(links)))}
    heat = {
        "type": "heatmap",
        **places,
        "z": [[rounded(math.log2(row[b].median)) if b in row else None for b in batch_sizes] for row in rows],
        "text": [[_mark(row, b) for b in batch_sizes] for row in rows],
        "texttemplate": "%{text}",
        "hovertemplate": "%{text}",
        "name": "",
        "colorscale": _SCALE,
        "zmin": -_MOST_DOUBLINGS,
        "zmax": _MOST_DOUBLINGS,
        "zmid": 0,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
        "showlegend": False,
    }
    names = [link.label.replace(" (", "<br>(") for link in links]
    x = axis("global batch size", tickvals=places["x"], ticktext=[f"{b:,}" for b in batch_sizes], showgrid=False)
    y = axis("", tickvals=places["y"], ticktext=names, showgrid=False)
    lines = [line for place, row in enumerate(rows) for line in _crossover_lines(place, row, batch_sizes)]
    return figure([heat], x, y, shapes=lines)


def _crossover_lines(place: int, ratios: Mapping[int, Ratio], batch_sizes: Sequence[int]) -> list[Figure]:
    """Return lines across a network's row of the map wherever both sides are equal."""
    where = [crossing.batch_size for crossing in find_crossings({b: ratio.median for b, ratio in ratios.items()})]
    x = np.interp(np.log(where), np.log(batch_sizes), range(len(batch_sizes)))
    line = {"type": "line", "y0": place - 0.5, "y1": place + 0.5, "line": {"color": "#111111", "width": 3}}
    return [line | {"x0": rounded(at), "x1": rounded(at)} for at in x]


def _mark(row: Mapping[int, Ratio], batch_size: int) -> str:
    if batch_size not in row:
        return ""
    return f"{'≈ ' if row[batch_size].is_same else ''}{format_ratio(row[batch_size].median)}"


def _step_axis(trial: Trial, more: str = "", **settings: object) -> Figure:
    kind = "emulated network" if trial.link.is_emulated else "loopback"
    return axis(f"step, ms, {kind}{more}", **settings)


def time_figure(trials: Sequence[Trial]) -> Figure:
    """Return a line an arm over batch sizes, of one network."""
    by_label: dict[str, list[Arm]] = {}
    for arm in (arm for trial in trials for arm in trial.arms):
        by_label.setdefault(arm.label, []).append(arm)
    sides: list[Side] = [arms[0].side for arms in by_label.values()]
    data = []
    for i, (label, arms) in enumerate(by_label.items()):
        side, steps = sides[i], [arm.step_ms for arm in arms]
        colours = _COLOURS[side]
        colour = colours[sides[:i].count(side) % len(colours)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape_plotly(label),
                "x": [arm.global_batch_size for arm in arms],
                "y": [rounded(step.median) for step in steps],
                "error_y": {"type": "data", "symmetric": False, "thickness": 1, "width": 3}
                | {"array": [rounded(step.p75 - step.median) for step in steps]}
                | {"arrayminus": [rounded(step.median - step.p25) for step in steps]},
                "line": {"color": colour, "width": 2, "dash": "dot" if side == "single" else "solid"},
                "marker": {"color": colour, "symbol": _SYMBOLS[side], "size": 8},
                "hovertemplate": "%{y:.3g} ms at %{x}",
            }
        )
    x = axis("global batch size (log)", type="log", tickvals=batch_sizes_of(trials))
    return figure(data, x, _step_axis(trials[0], " (log)", type="log", dtick="D2"))


def parts_figure(trial: Trial) -> Figure:
    """Return a bar an arm, the first on top, in parts that sum to its step."""
    arms = [arm for arm in trial.arms if arm.parts_ms][::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": [escape_plotly(arm.label) for arm in arms],
            "x": [rounded(arm.parts_ms[part]) for arm in arms],
            "marker": {"color": colour},
            "hovertemplate": f"{part}: %{{x:.3g}} ms",
        }
        for part, colour in _PART_COLOURS.items()
    ]
    ends = [
        {"x": arm.median_ms, "y": escape_plotly(arm.label), "text": f"{three_digits(arm.median_ms)} ms"}
        | {"showarrow": False, "xanchor": "left", "xshift": 6, "font": {"size": 11.5, "color": BASELINE_COLOUR}}
        for arm in arms
    ]
    x = _step_axis(trial, range=[0, 1.12 * max(arm.median_ms for arm in arms)])
    return figure(data, x, axis(""), barmode="stack", bargap=0.35, annotations=ends, legend={"traceorder": "normal"})
