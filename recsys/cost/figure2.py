"""Figure 2 of the PSS paper, made from measurements: its table, its plots, and the paper's own figures beside them.

2a: inference of a batch of 16,384, by phase. 2b: training at a batch of 2,048 over compression, with dense and sparse
gradients. Measurements are what `launch.runners.measure_steps` writes; every figure here is of this machine, the
paper's (`figure2.toml`) are of eight GPUs for full tables and one for PSS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from configs.schema import Section as Record
from recsys.cost.machines import read_data
from recsys.report.numbers import plural
from recsys.report.page import Figure, Page, Pairs, Plot, Section
from recsys.report.palette import BASELINE_COLOUR, COLOURS
from recsys.report.plots import axis, figure, rounded
from recsys.report.table import Cell, Column, Table

Part = Literal["a", "b"]
PHASES: Mapping[str, Sequence[str]] = {
    "data distribution + bottom MLP": ("forward/input_distribution", "forward/bottom_mlp"),
    "embedding": ("forward/embedding_lookup", "forward/output_distribution"),
    "interaction": ("forward/interaction",),
    "top MLP + rest": ("forward/top_mlp", "other"),
}
"""The paper's parts of an inference step. The embeddings' all-to-all is with the embedding; the paper's gather of the
results has no counterpart, ranks keep theirs."""
_TITLES = {
    "a": "Inference by phase: sharded full tables and ROBE",
    "b": "Training time over compression: sharded full tables and ROBE",
}
_LEGEND = {"orientation": "h", "y": 1.12, "traceorder": "normal"}


class Paper(Record):
    """The paper's figures. inference_s: on its test samples; speed_up: (compression, over full tables)."""

    test_samples: int
    inference_s: dict[Literal["sharded", "robe"], float]
    speed_up: tuple[tuple[float, float], ...]


PAPER = read_data(Paper, "figure2.toml")


@dataclass(frozen=True)
class Line:
    """One setup of the figure over the repeats of its job."""

    label: str
    repeats: Sequence[Mapping[str, Any]]

    @property
    def step_ms(self) -> float:
        """Return the median of the repeats' medians."""
        return median(repeat["step_ms"]["median"] for repeat in self.repeats)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """Return the smallest first and the largest third quartile of a repeat."""
        steps = [repeat["step_ms"] for repeat in self.repeats]
        return min(s["p25"] for s in steps), max(s["p75"] for s in steps)

    @property
    def compression(self) -> float:
        """Return the compression that was reached."""
        return self.repeats[0]["compression"]

    @property
    def batch(self) -> int:
        """Return the rows of a step over all ranks."""
        return self.repeats[0]["global_batch_size"]

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.repeats[0]["world_size"]

    @property
    def exposed_share(self) -> float:
        """Return the share of the profiled step in which nothing is computed."""
        return median(repeat["parts"]["exposed_comm_ms"] / repeat["profiled_step_ms"] for repeat in self.repeats)

    def phase_ms(self, phases: Sequence[str]) -> float:
        """Return what phases take of the step without the profiler, in the proportions of the profiled one."""
        shares = [sum(r["phases_ms"].get(p, 0.0) for p in phases) / r["profiled_step_ms"] for r in self.repeats]
        return self.step_ms * median(shares)


def build_table(part: Part, lines: Sequence[Line]) -> Table:
    """Return the lines, the baseline first, with the paper's figures where it has them."""
    baseline = lines[0]

    def step(line: Line) -> Cell:
        low, high = line.spread_ms
        return Cell(f"{line.step_ms:.3g}", f"{low:.3g}–{high:.3g}", line.step_ms)

    def paper(line: Line) -> Cell:
        if part == "a":
            known = PAPER.inference_s["sharded" if line is baseline else "robe"]
            return Cell.of(known if line is baseline or line.ranks == 1 else None, "{:g}".format)
        near = [speed for size, speed in PAPER.speed_up if abs(line.compression / size - 1) < 0.1]
        return Cell.of(near[0] if near and line is not baseline else None, "{:g}×".format)

    def total_s(line: Line) -> Cell:
        return Cell.of(1e-3 * line.step_ms * PAPER.test_samples / line.batch, "{:.0f}".format)

    columns: list[Column[Line]] = [
        Column("setup", cell=lambda line: line.label),
        Column("placement", cell=lambda line: f"{plural(line.ranks, 'rank')} × "
               f"{plural(line.repeats[0]['threads_per_rank'], 'thread')}", align="left"),
        Column("step", "Median over repeats; small print: the smallest first and the largest third quartile of one.",
               step, unit="ms"),
        Column("× sharded", cell=lambda line: Cell.of(line.step_ms / baseline.step_ms, "{:.2f}×".format)),
        Column("exposed communication", "Share of the profiled step in which nothing is computed.",
               lambda line: Cell.of(100 * line.exposed_share, "{:.0f} %".format)),
    ]  # fmt: skip
    of_part: list[Column[Line]]
    if part == "a":
        of_part = [
            *(_phase_column(name, phases) for name, phases in PHASES.items()),
            Column(f"{PAPER.test_samples / 1e6:.0f} M samples", cell=total_s, unit="s"),
            Column("paper", "Full tables on eight GPUs, PSS on one.", paper, unit="s"),
        ]
    else:
        of_part = [
            Column("compression", cell=lambda line: Cell.of(line.compression, "{:,.0f}×".format)),
            Column("1,000 steps", cell=lambda line: Cell.of(line.step_ms, "{:.1f}".format), unit="s"),
            Column("speed-up", cell=lambda line: Cell.of(baseline.step_ms / line.step_ms, "{:.2f}×".format)),
            Column("paper", "Full tables on eight GPUs, PSS on one.", paper),
        ]
    return Table.of(lines, [*columns, *of_part], is_compact=True)


def _phase_column(name: str, phases: Sequence[str]) -> Column[Line]:
    meaning = "Of the step as timed, in the proportions of the profiled one."
    return Column(name, meaning, lambda line: Cell.of(line.phase_ms(phases), "{:.3g}".format), unit="ms")


def build_page(part: Part, lines: Sequence[Line], environment: Mapping[str, Any]) -> Page:
    """Return the page of one part of the figure."""
    first = lines[0].repeats[0]
    answer = (
        f"DLRM on {first['embedding_parameters'] / 1e6:.1f} M embedding parameters, d = {first['embedding_dim']}, "
        f"batches of {lines[0].batch:,}; measured on {environment['cpu']}, ranks on one machine."
    )
    drawn = draw_phases(lines) if part == "a" else draw_training(lines)
    sections = [
        Section("", [Plot("figure2", "", "", {"": drawn}, height=460, is_wide=True)]),
        Section("Every figure", [build_table(part, lines)]),
        Section("Environment", [Pairs({key: str(value) for key, value in environment.items()})]),
    ]
    origin = "Every figure on this page was measured on this machine, but those marked as the paper's."
    return Page(_TITLES[part], answer, sections, f"Figure 2{part} of the PSS paper", origin)


def to_json(part: Part, lines: Sequence[Line], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return every measurement."""
    setups = [{"label": line.label, "step_ms": line.step_ms, "repeats": line.repeats} for line in lines]
    return {"version": 1, "figure": f"2{part}", "environment": environment, "setups": setups}


def draw_phases(lines: Sequence[Line]) -> Figure:
    """Return a bar a setup, in the paper's phases."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [line.label for line in lines],
            "x": [rounded(line.phase_ms(phases)) for line in lines],
            "marker": {"color": colour},
            "hovertemplate": "%{x:.3g} ms<extra>" + name + "</extra>",
        }
        for (name, phases), colour in zip(PHASES.items(), COLOURS, strict=False)
    ]
    rows = {"automargin": True, "autorange": "reversed"}
    return figure(data, axis("ms a batch", rangemode="tozero"), rows, barmode="stack", legend=_LEGEND)


def draw_training(lines: Sequence[Line]) -> Figure:
    """Return seconds for 1,000 steps, which are the ms of one, over compression; full tables are a level."""
    by_setup: dict[str, list[Line]] = {}
    for line in lines[1:]:
        by_setup.setdefault(line.label.rpartition(" ")[0], []).append(line)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [rounded(line.compression) for line in of_setup],
            "y": [rounded(line.step_ms) for line in of_setup],
            "line": {"color": colour, "dash": "dot" if "sparse" in name else "solid"},
            "hovertemplate": "%{x:,.0f}×: %{y:.3g} s<extra>" + name + "</extra>",
        }
        for (name, of_setup), colour in zip(by_setup.items(), COLOURS, strict=False)
    ]
    level = {"xref": "paper", "y0": lines[0].step_ms, "y1": lines[0].step_ms, "x0": 0, "x1": 1, "layer": "below"}
    note = {"xref": "paper", "x": 0.99, "xanchor": "right", "y": lines[0].step_ms, "yanchor": "bottom"}
    return figure(
        data,
        axis("compression", type="log"),
        axis("1,000 training steps, s", rangemode="tozero"),
        legend=_LEGEND,
        shapes=[{"type": "line", **level, "line": {"color": BASELINE_COLOUR, "width": 1.5, "dash": "dash"}}],
        annotations=[{**note, "showarrow": False, "text": lines[0].label, "font": {"size": 11}}],
    )
