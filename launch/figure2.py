"""Figure 2 of the PSS paper on this machine: what a step takes sharded, and with ROBE.

`a`: inference of batches of 16,384, by phase: full tables sharded over two ranks, ROBE data-parallel, ROBE in one
process. `b`: training at a batch of 2,048 over compression, dense and sparse gradients. Jobs of different ranks take
turns, setups of one job too. Writes <output>/results.json and index.html, and prints the table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.load import ConfigError
from launch.runners.step_jobs import MeasuringFailed, measure, setup
from recsys.cost.figure2 import Line, Part, cells, draw, headings
from recsys.report.page import as_script_data, write_page
from recsys.runs.run_dir import describe_environment, write_atomically

BATCH = {"a": 16384, "b": 2048}
HEADINGS = {
    "a": "Inference by phase: sharded full tables and ROBE",
    "b": "Training time over compression: sharded full tables and ROBE",
}


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.figure2",
        description=__doc__,
        epilog="examples:\n  python -m launch.figure2 a\n  python -m launch.figure2 b --compression 10 100 1000 10000\n"
        "  python -m launch.figure2 b model.embedding_dim=64 data.synthetic.scale=0.5\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("a", "b"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over all setups")
    parser.add_argument("--batch", type=int, help="rows of a step over all ranks (default: the paper's)")
    parser.add_argument("--compression", type=float, nargs="+", metavar="X", help="default: 1000 (a), 10 to 10000 (b)")
    parser.add_argument("--family", default="demo", help="configs/<family>/sharded.toml and so on (default: demo)")
    parser.add_argument("--repeats", type=int, default=3, help="of every job (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of every setup in a round (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: runs/fig2a or runs/fig2b")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of the table")
    asked = parser.parse_intermixed_args(arguments)
    if min(asked.repeats, asked.steps) < 1:
        parser.error("--repeats and --steps: at least 1")
    compressions = asked.compression or ([1000.0] if asked.part == "a" else [10.0, 100.0, 1000.0, 10000.0])
    batch = asked.batch or BATCH[asked.part]
    try:
        jobs = plan_jobs(asked.part, asked.family, batch, compressions, asked.overrides)
        lines = _measure(asked.part, jobs, asked.repeats, asked.steps)
    except (ConfigError, MeasuringFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    output = asked.output or Path("runs") / f"fig2{asked.part}"
    _write(asked.part, lines, output)
    if asked.json:
        print((output / "results.json").read_text())
    else:
        _print(asked.part, lines)
        print(f"page: {output / 'index.html'}, figures: {output / 'results.json'}")


def _measure(part: Part, jobs: Sequence[Sequence[dict]], repeats: int, steps: int) -> list[Line]:
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


def _write(part: Part, lines: Sequence[Line], output: Path) -> None:
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


def _describe_subject(lines: Sequence[Line], environment: dict[str, Any]) -> str:
    first = lines[0].found[0]
    full = first["embedding_parameters"] / 1e6
    return (
        f"DLRM on {full:.1f} M embedding parameters, d = {first['embedding_dim']}, batches of {lines[0].batch:,}; "
        f"measured on {environment['cpu']}, ranks on one machine."
    )


def _print(part: Part, lines: Sequence[Line]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings(part)):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for line in lines:
        table.add_row(*cells(part, line, lines[0]))
    Console(width=None if sys.stdout.isatty() else 190).print(table)


if __name__ == "__main__":
    main()
