"""The jobs of Figure 2 of the PSS paper, what was measured, and what is written and printed of it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from launch.runners.step_jobs import measure, setup
from recsys.cost.figure2 import Line, Part, cells, draw, headings
from recsys.report.page import as_script_data, write_page
from recsys.runs.run_dir import describe_environment, write_atomically

BATCH = {"a": 16384, "b": 2048}
HEADINGS = {
    "a": "Inference by phase: sharded full tables and ROBE",
    "b": "Training time over compression: sharded full tables and ROBE",
}
COMPRESSIONS = {"a": (1000.0,), "b": (10.0, 100.0, 1000.0, 10000.0)}


def plan_jobs(
    part: Part, family: str, batch: int, compressions: Sequence[float], overrides: Sequence[str]
) -> list[list]:
    """The setups of each job, the baseline first. Raises ConfigError."""
    common = [f"training.global_batch_size={batch}", *overrides]

    def robe(label: str, config: str, compression: float, *more: str) -> dict[str, Any]:
        return setup(label, config, [*common, f"embedding.compression={compression:g}", *more])

    sharded = setup("full tables, sharded", f"{family}/sharded", common)
    if part == "a":
        return [
            [sharded, *(robe(f"ROBE data-parallel {c:g}×", f"{family}/robe", c) for c in compressions)],
            [robe(f"ROBE one process {c:g}×", f"{family}/robe_single", c) for c in compressions],
        ]
    jobs = []
    for name, config in (("data-parallel", "robe"), ("one process", "robe_single")):
        jobs.append(
            [
                robe(f"ROBE {name}, {gradient} {c:g}×", f"{family}/{config}", c, f"embedding.robe.gradient={gradient}")
                for gradient in ("dense", "sparse")
                for c in compressions
            ]
        )
    return [[sharded, *jobs[0]], jobs[1]]


def measure_lines(part: Part, jobs: Sequence[Sequence[dict]], repeats: int, steps: int) -> list[Line]:
    """Measure every job as often as asked, in turn. Raises MeasuringFailed."""
    found: dict[str, list[dict[str, Any]]] = {s["label"]: [] for job in jobs for s in job}
    mode = "inference" if part == "a" else "train"
    console = Console(stderr=True)
    with console.status("") as status:
        for turn in range(repeats):
            for number, setups in enumerate(jobs):
                said = f"repeat {turn + 1} of {repeats}, job {number + 1} of {len(jobs)}: {len(setups)} setups"
                status.update(said)
                if not console.is_terminal:
                    console.print(said)
                for measured in measure(setups, mode=mode, rounds=3, steps=steps, warm_up=3, profile_steps=5):
                    found[measured["label"]].append(measured)
    return [Line(label, repeats_of) for label, repeats_of in found.items()]


def write_results(part: Part, lines: Sequence[Line], output: Path) -> dict[str, Any]:
    """Write the figures and the page, and return the figures."""
    environment = describe_environment(torch.device("cpu"), lines[0].found[0]["world_size"])
    output.mkdir(parents=True, exist_ok=True)
    figures = [{"label": line.label, "step_ms": line.step_ms, "repeats": line.found} for line in lines]
    found = {"version": 1, "figure": f"2{part}", "environment": environment, "setups": figures}
    write_atomically(output / "results.json", json.dumps(found, indent=2))
    write_page(
        output / "index.html",
        "figure2_page.html.j2",
        part=part,
        heading=HEADINGS[part],
        subject=_describe_subject(lines, environment),
        headings=headings(part),
        rows=[cells(part, line, lines[0]) for line in lines],
        environment=environment,
        figures=as_script_data(draw(part, lines)),
    )
    return found


def _describe_subject(lines: Sequence[Line], environment: dict[str, Any]) -> str:
    first = lines[0].found[0]
    full = first["embedding_parameters"] / 1e6
    return (
        f"DLRM on {full:.1f} M embedding parameters, d = {first['embedding_dim']}, batches of {lines[0].batch:,}; "
        f"measured on {environment['cpu']}, ranks on one machine."
    )


def print_table(part: Part, lines: Sequence[Line]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings(part)):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for line in lines:
        table.add_row(*cells(part, line, lines[0]))
    Console(width=None if sys.stdout.isatty() else 190).print(table)
