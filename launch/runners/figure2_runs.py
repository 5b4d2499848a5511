"""The jobs of Figure 2 of the PSS paper, and what is measured of them."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from launch.runners.step_jobs import measure, setup
from recsys.cost.figure2 import Line, Part

BATCH = {"a": 16384, "b": 2048}
COMPRESSIONS = {"a": (1000.0,), "b": (10.0, 100.0, 1000.0, 10000.0)}


def plan_jobs(
    part: Part, family: str, batch: int, compressions: Sequence[float], overrides: Sequence[str]
) -> list[list]:
    """Return the setups of each job, the baseline first. Raises ConfigError."""
    common = [f"training.global_batch_size={batch}", *overrides]

    def robe(label: str, config: str, compression: float, *more: str) -> dict[str, Any]:
        """Return a setup of ROBE at a compression."""
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
    """Measure every job `repeats` times, jobs of different ranks interleaved. Raises MeasuringFailed."""
    by_label: dict[str, list[dict[str, Any]]] = {s["label"]: [] for job in jobs for s in job}
    mode = "inference" if part == "a" else "train"
    console = Console(stderr=True)
    with console.status("") as status:
        for repeat, (number, setups) in itertools.product(range(1, repeats + 1), enumerate(jobs, 1)):
            doing = f"repeat {repeat} of {repeats}, job {number} of {len(jobs)}: {len(setups)} setups"
            status.update(doing)
            if not console.is_terminal:
                console.print(doing)
            for measured in measure(setups, mode=mode, rounds=3, steps=steps, warm_up=3, profile_steps=5):
                by_label[measured["label"]].append(measured)
    return [Line(label, measurements) for label, measurements in by_label.items()]
