"""Figure 2 of the PSS paper, made from measurements: its table, its plots, and the paper's own figures beside them.

2a: inference of a batch of 16,384, by phase. 2b: training at a batch of 2,048 over compression, with dense and sparse
gradients. Measurements are what `launch.runners.measure_steps` writes; every figure here is of this machine, the
paper's are of eight GPUs for full tables and one for PSS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from recsys.report.page import Figure
from recsys.report.palette import BASELINE_COLOUR
from recsys.report.plots import axis, figure, rounded

Part = Literal["a", "b"]
TEST_SAMPLES = 89_137_319
"""Criteo-TB's test day, which the paper's 203 s and 97 s are for."""
PAPER_INFERENCE_S = {"sharded": 203.0, "robe": 97.0}
PAPER_SPEED_UP = {1e3: 1.7, 1e4: 4.37}
PHASES: Mapping[str, Sequence[str]] = {
    "data distribution + bottom MLP": ("forward/input_distribution", "forward/bottom_mlp"),
    "embedding": ("forward/embedding_lookup", "forward/output_distribution"),
    "interaction": ("forward/interaction",),
    "top MLP + rest": ("forward/top_mlp", "other"),
}
"""The paper's parts of an inference step. The embeddings' all-to-all is with the embedding; the paper's gather of the
results has no counterpart, ranks keep theirs."""
_COLOURS = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Line:
    """One setup of the figure over the repeats of its job. step_ms: median of the repeats' medians."""

    label: str
    found: Sequence[Mapping[str, Any]]

    @property
    def step_ms(self) -> float:
        return median(found["step_ms"]["median"] for found in self.found)

    @property
    def spread_ms(self) -> tuple[float, float]:
        """Smallest first and largest third quartile of a repeat."""
        steps = [found["step_ms"] for found in self.found]
        return min(s["p25"] for s in steps), max(s["p75"] for s in steps)

    @property
    def compression(self) -> float:
        return self.found[0]["compression"]

    @property
    def batch(self) -> int:
        return self.found[0]["global_batch_size"]

    @property
    def where(self) -> str:
        ranks, threads = self.found[0]["world_size"], self.found[0]["threads_per_rank"]
        return f"{ranks} rank{'s' * (ranks > 1)} × {threads} thread{'s' * (threads > 1)}"

    @property
    def exposed_share(self) -> float:
        """Of the profiled step."""
        return median(found["parts"]["exposed_comm_ms"] / found["profiled_step_ms"] for found in self.found)

    def phase_ms(self, phases: Sequence[str]) -> float:
        """Of the step as it is without the profiler: its phases in the proportions of the profiled one."""
        shares = [sum(f["phases_ms"].get(p, 0.0) for p in phases) / f["profiled_step_ms"] for f in self.found]
        return self.step_ms * median(shares)


def headings(part: Part) -> list[str]:
    common = ["setup", "placement", "step, ms", "× sharded", "exposed communication"]
    if part == "a":
        return [*common, *(f"{name}, ms" for name in PHASES), f"{TEST_SAMPLES / 1e6:.0f} M samples, s", "paper, s"]
    return [*common, "compression", "1,000 steps, s", "speed-up", "paper"]


def cells(part: Part, line: Line, baseline: Line) -> list[str]:
    """One row of the table."""
    low, high = line.spread_ms
    common = [
        line.label,
        line.where,
        f"{line.step_ms:.3g} ({low:.3g}–{high:.3g})",
        f"{line.step_ms / baseline.step_ms:.2f}×",
        f"{100 * line.exposed_share:.0f} %",
    ]
    if part == "a":
        paper = PAPER_INFERENCE_S["sharded" if line is baseline else "robe"]
        on_paper = f"{paper:g}" if line is baseline or line.found[0]["world_size"] == 1 else "–"
        total = 1e-3 * line.step_ms * TEST_SAMPLES / line.batch
        return [*common, *(f"{line.phase_ms(p):.3g}" for p in PHASES.values()), f"{total:.0f}", on_paper]
    near = [speed for size, speed in PAPER_SPEED_UP.items() if abs(line.compression / size - 1) < 0.1]
    return [
        *common,
        f"{line.compression:,.0f}×",
        f"{line.step_ms:.1f}",
        f"{baseline.step_ms / line.step_ms:.2f}×",
        f"{near[0]}×" if near and line is not baseline else "–",
    ]


def draw(part: Part, lines: Sequence[Line]) -> Figure:
    return _draw_phases(lines) if part == "a" else _draw_training(lines)


def _draw_phases(lines: Sequence[Line]) -> Figure:
    labels = [line.label for line in lines]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [rounded(line.phase_ms(phases)) for line in lines],
            "marker": {"color": colour},
            "hovertemplate": "%{x:.3g} ms<extra>" + name + "</extra>",
        }
        for (name, phases), colour in zip(PHASES.items(), _COLOURS, strict=True)
    ]
    return figure(
        data,
        axis("ms a batch", rangemode="tozero"),
        {"automargin": True, "autorange": "reversed"},
        barmode="stack",
        legend={"orientation": "h", "y": 1.12, "traceorder": "normal"},
    )


def _draw_training(lines: Sequence[Line]) -> Figure:
    """Seconds for 1,000 steps are the ms of one."""
    groups: dict[str, list[Line]] = {}
    for line in lines[1:]:
        groups.setdefault(line.label.rpartition(" ")[0], []).append(line)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [rounded(line.compression) for line in found],
            "y": [rounded(line.step_ms) for line in found],
            "line": {"color": colour, "dash": "dot" if "sparse" in name else "solid"},
            "hovertemplate": "%{x:,.0f}×: %{y:.3g} s<extra>" + name + "</extra>",
        }
        for (name, found), colour in zip(groups.items(), _COLOURS, strict=False)
    ]
    level = lines[0].step_ms
    return figure(
        data,
        axis("compression", type="log"),
        axis("1,000 training steps, s", rangemode="tozero"),
        legend={"orientation": "h", "y": 1.12, "traceorder": "normal"},
        shapes=[
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "layer": "below"}
            | {"line": {"color": BASELINE_COLOUR, "width": 1.5, "dash": "dash"}}
        ],
        annotations=[
            {"xref": "paper", "x": 0.99, "xanchor": "right", "y": level, "yanchor": "bottom", "showarrow": False}
            | {"text": lines[0].label, "font": {"size": 11}}
        ],
    )
