"""Run a study: what the papers claim, or every method, on generated rows or on yours.

A study is a file of configs/experiments/: methods x compressions x models x settings x seeds. The embeddings' learning
rate is tuned for each method and compression on the first seed, from one grid and one step beyond it where the best
lies at its end; the other seeds follow at the best. Several runs are made at a time, here or as jobs of a cluster;
finished ones are never made again, an interrupted one goes on from its checkpoint if it has one, one that fails is
listed and the rest goes on. Last, the time of a step of every arm is measured, all interleaved and nothing beside them.
Writes <output>/results.parquet, and from it alone index.html, tables.md and tables.tex.
"""

import json
from pathlib import Path
from typing import Any

import click

from launch import cli


@cli.command(
    "study",
    __doc__,
    summary="Run a paper's table, or all methods: tuned, over seeds, judged.",
    when_interrupted=cli.GOES_ON,
    examples=[
        "--list",
        "table4 --dry-run",
        "table4 --scale 0.02 --seeds 0,1  # minutes become seconds",
        "table3 --data ~/ml-25m  # MovieLens: ratings and movies",
        "table3 --data train.txt model.embedding_dim=16",
        "methods --data ~/ml-25m --methods robe,cafe --compressions 10,100",
        "--show runs/experiments/table4/results.parquet --latex",
    ],
    notes="Exit status: 1 = some runs failed, 2 = a mistake was found before any was made, 130 = interrupted.",
)
@cli.items_argument("study")
@click.option("--list", "is_listing", is_flag=True, help="List the studies.")
@click.option("--dry-run", is_flag=True, help="Print what would be run, with bytes and an estimate of time.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    metavar="results.parquet",
    help="Make tables and page of these results anew, run nothing.",
)
@click.option("--data", metavar="PATH", help="Criteo's file or directory, or MovieLens' (default: generated rows).")
@click.option("--scale", type=cli.FiniteFloat(0, min_open=True), default=1.0, help="Factor on generated rows, tables.")
@click.option("--methods", type=cli.CommaList(str, "NAME"), help="Methods beside the baseline (default: the study's).")
@click.option(
    "--compressions", type=cli.CommaList(float, "X"), help="Of every method but the baseline (default: the study's)."
)
@click.option(
    "--rates", type=cli.CommaList(float, "X"), help="Grid of the embeddings' learning rate (default: the study's)."
)
@cli.seeds_option(None, "Seeds (default: the study's, three).")
@click.option("--target", type=cli.AUC, help="Target AUC (default: what all seeds of full tables reach).")
@click.option("--epsilon", type=cli.FiniteFloat(0, min_open=True), help="AUCs within it are the same (default: 0.001).")
@cli.output_option(None, "Directory of what is written (default: runs/experiments/<study>).")
@cli.json_option("Print JSON instead of the tables.")
@click.option("--markdown", is_flag=True, help="Print Markdown instead of the tables.")
@click.option("--latex", is_flag=True, help="Print LaTeX instead of the tables.")
@cli.runner_options
def main(
    is_listing: bool,
    dry_run: bool,
    show: Path | None,
    as_json: bool,
    markdown: bool,
    latex: bool,
    runner: dict[str, Any],
    **options: Any,
) -> int | None:
    """Plan, run, judge and print a study."""
    from launch.runners import study_output
    from launch.runners.local import RunnerOptions
    from launch.runners.study import StudyRequest, make_plan, run_study
    from recsys.studies.records import load_results
    from recsys.studies.tables import build_tables

    if as_json + markdown + latex > 1:
        raise cli.Mistake("--json, --markdown, --latex: one of them at a time")
    if is_listing:
        return study_output.list_studies()
    with cli.mistakes(ValueError, OSError):
        path = show
        if path is None:
            plan = make_plan(StudyRequest(**options), RunnerOptions(**runner))
            if dry_run:
                return study_output.print_plan(plan)
            path = run_study(plan)
        tables = build_tables(load_results(path))
        study_output.write_tables(tables, path.parent)
    if as_json:
        print(json.dumps(tables.to_json(), indent=2, allow_nan=False))
    elif markdown or latex:
        print(tables.to_markdown() if markdown else tables.to_latex())
    else:
        study_output.print_tables(tables)
        print(f"page: {path.parent / 'index.html'}; also tables.md, tables.tex and {path.name}")
    return cli.EXIT_FAILED if tables.failures else 0


if __name__ == "__main__":
    main()
