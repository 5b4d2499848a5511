"""Measure this machine: kernels, and whether time is measured rightly."""

from launch import cli

SECTIONS = {
    "Benchmarks": {
        "kernels": "launch.microbench",
        "figure2": "launch.figure2",
        "timing": "launch.validate_timing",
    },
}


@cli.group("bench", __doc__, summary="Measure this machine: kernels, steps, clocks.", sections=SECTIONS)
def main() -> None:
    """Hold the benchmarks, each a command of its own."""


if __name__ == "__main__":
    main()
