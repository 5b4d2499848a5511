"""The one entry to all commands: `pss-bench COMMAND`, or `python -m launch COMMAND`."""

import click

from launch import cli

SECTIONS = {
    "Train and compare": {
        "train": "launch.train",
        "compare": "launch.compare",
    },
    "Measure and project": {
        "bench": "launch.bench",
        "project": "launch.project",
    },
}
HIDDEN: dict[str, str] = {}


@cli.group(
    "pss-bench",
    "Sharded embedding tables against parameter sharing (ROBE) for recommendation models: quality, time, memory.",
    sections=SECTIONS,
    hidden=HIDDEN,
)
@click.version_option(package_name="pss-bench")
def main() -> None:
    pass


if __name__ == "__main__":
    main()
