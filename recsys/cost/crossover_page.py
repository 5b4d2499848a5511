"""The sweep over networks as one self-contained page: who wins where, step times, where they go, the networks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.cost.crossover_map import (
    PARTS,
    ROBE_SIDES,
    Cell,
    Link,
    Ratio,
    Side,
    batch_sizes_of,
    compressions_of,
    describe_doubts,
    describe_outcome,
    find_crossovers,
    links_of,
    ratios_over_batch,
    read_cells,
)
from recsys.report.escape import escape_plotly
from recsys.report.numbers import format_bytes, format_ratio, three_digits
from recsys.report.page import Figure, as_script_data, write_page
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded

_TEMPLATE = "crossover_page.html.j2"
_COLOURS: dict[Side, Sequence[str]] = {
    "sharded": ("#7a7f87", "#4d5157", "#a9adb3"),
    "data_parallel": ("#56b4e9", "#0072b2", "#08306b"),
    "single": ("#f4b183", "#d55e00", "#7f3800"),
}
_SYMBOLS: dict[Side, str] = {"sharded": "square", "data_parallel": "circle", "single": "diamond"}
_DASHES: dict[Side, str] = {"sharded": "solid", "data_parallel": "solid", "single": "dot"}
_PART_COLOURS = dict(zip(PARTS, ("#0072b2", "#d55e00", "#f4b183", "#a9adb3"), strict=True))
_SCALE = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]
_MOST_DOUBLINGS = 4


def write_crossover_page(document: Mapping[str, Any], path: Path) -> None:
    """The page of a crossover.json, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    cells = read_cells(document)
    write_page(
        path,
        _TEMPLATE,
        status=document["status"],
        cells=cells,
        outcome=describe_outcome(cells),
        doubts=describe_doubts(cells),
        subject=describe_subject(document, cells),
        three_digits=three_digits,
        format_ratio=format_ratio,
        format_bytes=format_bytes,
        parts=PARTS,
        environment=document["environment"],
        figures=as_script_data(build_plots(cells)),
    )


def describe_subject(document: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    environment = document["environment"]
    networks, batch_sizes = len(links_of(cells)), len(batch_sizes_of(cells))
    return (
        f"{networks} networks between {environment['world_size']} hosts, {batch_sizes} batch sizes, on one machine: "
        f"{environment['cpu']}, {environment['cpu_cores']} cores; commit {(environment['commit'] or 'unknown')[:10]}"
        f"{' with changes' * environment['uncommitted_changes']}, {environment['started'][:10]}."
    )


def build_plots(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Sections: id, title, caption, panels of id, title and figures by the name of the choice that shows them."""
    maps = [
        {"title": f"ROBE {compression:g}× {words}", "figures": {"": map_figure(cells, side, compression)}}
        for side, words in ROBE_SIDES.items()
        for compression in compressions_of(cells, side)
    ]
    times = {link.label: time_figure([cell for cell in cells if cell.link == link]) for link in links_of(cells)}
    bars = {
        f"{cell.link.label}, batch size {cell.global_batch_size:,}": parts_figure(cell)
        for cell in cells
        if any(setup.parts_ms for setup in cell.setups)
    }
    sections = [
        {
            "id": "map",
            "title": "Who wins where: ROBE's step over the best sharded one",
            "caption": "Blue: ROBE is faster. Red: sharded tables are. Across the black line both are "
            "equal, interpolated between cells in their logarithms. ≈: within the quartiles of both.",
            "panels": maps,
        },
        {
            "id": "time",
            "title": "Step over batch size",
            "caption": "Medians with first and third quartile, both axes logarithmic. One process has no network: its "
            "steps are timed again beside each, and where they differ the machine has drifted.",
            "panels": [{"title": "", "figures": times}],
        },
        {
            "id": "parts",
            "title": "Where a step goes",
            "caption": "Shares of a profiled window, means over ranks, laid on the median step that was not profiled. "
            "Communication that computing hides is not shown; waiting is for the slower rank.",
            "panels": [{"title": "", "figures": bars}],
        },
    ]
    return [section for section in sections if any(panel["figures"] for panel in section["panels"])]


def map_figure(cells: Sequence[Cell], side: Side, compression: float) -> Figure:
    """Networks × batch sizes, coloured by the ratio of one ROBE setup to the best sharded one."""
    links, batch_sizes = links_of(cells)[::-1], batch_sizes_of(cells)
    found = [ratios_over_batch(cells, link, side, compression) for link in links]
    doublings = [[rounded(math.log2(row[b].median)) if b in row else None for b in batch_sizes] for row in found]
    marks = [[_mark(row, b) for b in batch_sizes] for row in found]
    places = {"x": list(range(len(batch_sizes))), "y": list(range(len(links)))}
    heat = {
        "type": "heatmap",
        **places,
        "z": doublings,
        "text": marks,
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
    x = axis("global batch size", tickvals=places["x"], ticktext=[f"{b:,}" for b in batch_sizes], showgrid=False)
    y = axis("", tickvals=places["y"], ticktext=[_break(link) for link in links], showgrid=False)
    return figure(
        [heat], x, y, shapes=[line for row in enumerate(found) for line in _crossover_lines(*row, batch_sizes)]
    )


def _crossover_lines(place: int, ratios: Mapping[int, Ratio], batch_sizes: Sequence[int]) -> list[Figure]:
    """Across a network's row of the map wherever both sides are equal, between the cells in their logarithms."""
    where = [crossover.global_batch_size for crossover in find_crossovers(ratios)]
    x = np.interp(np.log(where), np.log(batch_sizes), range(len(batch_sizes)))
    line = {"type": "line", "y0": place - 0.5, "y1": place + 0.5, "line": {"color": "#111111", "width": 3}}
    return [line | {"x0": rounded(at), "x1": rounded(at)} for at in x]


def _mark(row: Mapping[int, Ratio], batch_size: int) -> str:
    if batch_size not in row:
        return ""
    return f"{'≈ ' if row[batch_size].is_same else ''}{format_ratio(row[batch_size].median)}"


def _break(link: Link) -> str:
    """The label on two lines, the kind below."""
    return link.label.replace(" (", "<br>(")


def time_figure(cells: Sequence[Cell]) -> Figure:
    """Of one network: a line a setup over batch sizes."""
    data = []
    for label, (side, colour) in _coloured(cells).items():
        points = [(cell.global_batch_size, s) for cell in cells for s in cell.setups if s.label == label]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape_plotly(label),
                "x": [batch_size for batch_size, _ in points],
                "y": [rounded(s.median_ms) for _, s in points],
                "error_y": {"type": "data", "symmetric": False, "thickness": 1, "width": 3}
                | {"array": [rounded(s.p75_ms - s.median_ms) for _, s in points]}
                | {"arrayminus": [rounded(s.median_ms - s.p25_ms) for _, s in points]},
                "line": {"color": colour, "width": 2, "dash": _DASHES[side]},
                "marker": {"color": colour, "symbol": _SYMBOLS[side], "size": 8},
                "hovertemplate": "%{y:.3g} ms at %{x}",
            }
        )
    x = axis("global batch size (log)", type="log", tickvals=batch_sizes_of(cells))
    kind = "emulated network" if cells[0].link.is_emulated else "loopback"
    return figure(data, x, axis(f"step, ms, {kind} (log)", type="log", dtick="D2"))


def _coloured(cells: Sequence[Cell]) -> dict[str, tuple[Side, str]]:
    """Label -> side and colour, the side's, by its place in it."""
    sides = {setup.label: setup.side for cell in cells for setup in cell.setups}
    coloured = {}
    for side, colours in _COLOURS.items():
        labels = [label for label, its_side in sides.items() if its_side == side]
        coloured |= {label: (side, colours[place % len(colours)]) for place, label in enumerate(labels)}
    return coloured


def parts_figure(cell: Cell) -> Figure:
    """Of one cell: a bar a setup, the first on top, in parts that sum to its step."""
    setups = [setup for setup in cell.setups if setup.parts_ms][::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": [escape_plotly(setup.label) for setup in setups],
            "x": [rounded(setup.parts_ms[part]) for setup in setups],
            "marker": {"color": colour},
            "hovertemplate": f"{part}: %{{x:.3g}} ms",
        }
        for part, colour in _PART_COLOURS.items()
    ]
    ends = [
        {
            "x": setup.median_ms,
            "y": escape_plotly(setup.label),
            "text": f"{three_digits(setup.median_ms)} ms",
            "showarrow": False,
        }
        | {"xanchor": "left", "xshift": 6, "font": {"size": 11.5, "color": BASELINE_COLOUR}}
        for setup in setups
    ]
    kind = "emulated network" if cell.link.is_emulated else "loopback"
    most = max((setup.median_ms for setup in setups), default=1)
    x = axis(f"step, ms, {kind}", range=[0, 1.12 * most])
    return figure(data, x, axis(""), barmode="stack", bargap=0.35, annotations=ends, legend={"traceorder": "normal"})
