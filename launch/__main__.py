"""The one entry to all commands: `pss-bench COMMAND`, or `python -m launch COMMAND`."""

import click

from launch import cli

SECTIONS = {
    "Train and compare": {
        "train": "launch.train",
        "compare": "launch.compare",
        "sweep": "launch.sweep",
        "study": "launch.study",
        "compress": "launch.compress",
        "demo": "launch.demo",
    },
    "Measure and project": {
        "bench": "launch.bench",
        "netlab": "launch.netlab.command",
        "project": "launch.project",
        "theory": "launch.theory",
    },
}
HIDDEN = {"experiments": "launch.study", "docs": "launch.docs"}
"""Names of before, which go on working, and what only this project's documents need."""


@cli.group(
    "pss-bench",
    "Sharded embedding tables against parameter sharing (ROBE) for recommendation models: quality, time, memory.",
    sections=SECTIONS,
    hidden=HIDDEN,
)
@click.version_option(package_name="pss-bench")
def main() -> None:
    """Hold every command under one name; it does nothing of its own."""


if __name__ == "__main__":
    main()
