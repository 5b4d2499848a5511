"""Plots of what a setup costs, as plotly figures: time of a step, memory, and size against time."""

import math
from collections.abc import Callable, Sequence

from recsys.report.comparison import Comparison, Measured, Setup
from recsys.report.curves import Position
from recsys.report.numbers import format_bytes, format_count, format_ratio
from recsys.report.plots import Figure, Plot, Style, axis, escape, figure, label_rows, rounded


def cost_plots(comparison: Comparison, styles: Sequence[Style]) -> list[Plot]:
    """Step time, embedding memory, and Fig. 1 of the PSS paper."""
    return [
        _step_time(comparison, styles),
        _memory(comparison, styles),
        *_size_against_time(comparison, styles),
    ]


def _step_time(comparison: Comparison, styles: Sequence[Style]) -> Plot:
    data = []
    for i, (setup, style) in enumerate(zip(comparison.setups, styles, strict=True)):
        found = setup.figures
        ratio = f"<br>{format_ratio(setup.ratios.step_time)} of the baseline" if setup.ratios.step_time else ""
        data += _bar(found.step_ms_p50, found.step_ms_p95, i, setup.label, style.colour, "step", ratio)
        data += _bar(found.data_ms_p50, found.data_ms_p95, i, setup.label, style.colour, "loading", "")
    rows, height = label_rows([setup.label for setup in comparison.setups])
    return Plot(
        id="step-time",
        title="Time of a step",
        caption="Solid: forward, backward and update, p50 with a whisker to p95. Pale: loading of a batch, beside it.",
        figures={"": figure(data, axis("ms", rangemode="tozero"), rows, bargap=0.3)},
        height=height,
    )


def _bar(
    p50: Measured | None, p95: Measured | None, index: int, label: str, colour: str, what: str, more: str
) -> list[Figure]:
    if p50 is None or p95 is None:
        return []
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"{escape(label)}: {what}",
            "meta": {"setup": index},
            "offsetgroup": what,
            "x": [rounded(p50.mean)],
            "y": [index],
            "error_x": {"type": "data", "symmetric": False, "array": [max(0.0, rounded(p95.mean - p50.mean))]}
            | {"arrayminus": [0], "thickness": 1.2, "width": 4, "color": "#8a8f98"},
            "marker": {"color": colour, "opacity": 1 if what == "step" else 0.35},
            "hovertemplate": f"{what}: p50 {p50.mean:.3g} ms, p95 {p95.mean:.3g} ms{more}",
        }
    ]


def _memory(comparison: Comparison, styles: Sequence[Style]) -> Plot:
    data, values = [], []
    for i, (setup, style) in enumerate(zip(comparison.setups, styles, strict=True)):
        held = setup.summary.bytes_per_rank
        totals = [sum(pair) for pair in zip(held.embedding, held.embedding_optimizer, strict=False)]
        values += totals
        largest = totals.index(max(totals))
        hover = [
            f"rank {rank}: {format_bytes(total)}, of it optimizer {format_bytes(state)}"
            for rank, (total, state) in enumerate(zip(totals, held.embedding_optimizer, strict=False))
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": escape(setup.label),
                "meta": {"setup": i},
                "x": totals,
                "y": [i] * len(totals),
                "text": [format_bytes(total) if rank == largest else "" for rank, total in enumerate(totals)],
                "textposition": "top center",
                "textfont": {"size": 11},
                "cliponaxis": False,
                "marker": {"color": style.colour, "symbol": style.symbol, "size": 10, "opacity": 0.8},
                "customdata": hover,
                "hovertemplate": "%{customdata}",
            }
        )
    rows, height = label_rows([setup.label for setup in comparison.setups])
    return Plot(
        id="memory",
        title="Embedding memory per rank",
        caption="Parameters and optimizer state of the embeddings; one mark a rank, marks of equal ranks coincide.",
        figures={"": figure(data, _bytes_axis(values), rows)},
        height=height,
    )


def _bytes_axis(values: Sequence[int]) -> Figure:
    """Logarithmic where sizes differ by more than 20 times, marked at powers of two either way."""
    low, high = max(1, min(values)), max(1, *values)
    if high / low <= 20:
        step = 2 ** max(0, math.ceil(math.log2(high / 4)))
        ticks = [i * step for i in range(int(high * 1.1 // step) + 1)]
        return axis("bytes per rank", tickvals=ticks, ticktext=[_tick(t) for t in ticks], range=[0, 1.12 * high])
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    ticks = [2**power for power in range(first, last + 1, math.ceil((last - first) / 4))]
    around = 0.1 * (math.log10(high) - math.log10(low))
    shown = [math.log10(low) - around, math.log10(high) + around]
    labels = {"tickvals": ticks, "ticktext": [_tick(t) for t in ticks]}
    return axis("bytes per rank, log scale", type="log", range=shown, **labels)


def _tick(size: int) -> str:
    number, unit = format_bytes(size).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _size_against_time(comparison: Comparison, styles: Sequence[Style]) -> list[Plot]:
    """Fig. 1 of the PSS paper, from measured runs: size against time of a step, epochs and time to the target."""

    def step(setup: Setup) -> tuple[float | None, bool]:
        return (setup.figures.step_ms_p50.mean if setup.figures.step_ms_p50 else None), True

    def epochs(setup: Setup) -> tuple[float | None, bool]:
        place = _arrival(setup)
        return (place.epochs, True) if place else (setup.figures.epochs or None, False)

    def time(setup: Setup) -> tuple[float | None, bool]:
        place, trained = _arrival(setup), setup.figures.train_time_s
        return (place.time_s, True) if place else (trained.mean or None if trained else None, False)

    panels = [("step", "Size against time of a step", "step p50, ms", step)]
    if comparison.target:
        panels += [
            ("epochs", "Size against epochs to target", "epochs to target", epochs),
            ("time", "Size against time to target", "training time to target, s", time),
        ]
    return [
        Plot(
            id=f"size-{name}",
            title=title,
            caption="Open triangles: trained this far without reaching it."
            if name != "step"
            else "By the embedding parameters stored.",
            figures={"": _size_figure(comparison, styles, unit, measure)},
            height=300,
        )
        for name, title, unit, measure in panels
    ]


def _arrival(setup: Setup) -> Position | None:
    return setup.figures.target.observed if setup.figures.target else None


def _size_figure(
    comparison: Comparison, styles: Sequence[Style], unit: str, measure: Callable[[Setup], tuple[float | None, bool]]
) -> Figure:
    """One mark a setup at its embedding parameters. measure: its value, and whether that is it or a lower bound."""
    data = []
    for i, (setup, style) in enumerate(zip(comparison.setups, styles, strict=True)):
        value, reached = measure(setup)
        if value is None:
            continue
        parameters = setup.summary.parameters.embedding
        marker = {"color": style.colour, "symbol": style.symbol if reached else "triangle-up-open", "size": 11}
        more = "" if reached else ", target not reached"
        data.append(
            {"type": "scatter", "mode": "markers", "name": escape(setup.label), "meta": {"setup": i}, "marker": marker}
            | {"x": [parameters], "y": [rounded(value)]}
            | {"hovertemplate": f"{format_count(parameters)} parameters<br>%{{y:.4g}}{more}"}
        )
    x = axis("embedding parameters, log scale", type="log", tickformat="~s", dtick=1)
    return figure(data, x, axis(unit, rangemode="tozero"))
