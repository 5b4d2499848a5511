"""Compare runs: a table on the terminal, in Markdown or JSON, and one self-contained page.

It reads run directories alone. Runs must share data, model, optimizer, training, evaluation, threads in total and
hardware; they may differ in the embeddings, their placement and the seed. Runs that differ in their seed alone are
taken together: mean ± standard deviation.

The baseline of ratios is the first run with compression 1, else the first run. Time to target is to --target-auc, else
to the target_auc all configs share, else to the lowest best AUC of the finished runs with full tables.
"""

import json
import sys
from pathlib import Path

import click

from launch import cli

PAGE = "report.html"


@cli.command(
    "compare",
    __doc__,
    summary="Compare runs: table, JSON, and one page with plots.",
    examples=[
        "runs/demo/demo_sharded runs/demo/demo_robe",
        "runs/full_s* runs/robe_s*       # several seeds: mean ± standard deviation",
        "runs/* --target-auc 0.8025 --output paper",
        "runs/* --json | jq '.arms[] | {label, auc: .figures.test_auc.mean}'",
    ],
    notes="Exit status 2: runs could not be read, or differ in what a fair comparison shares.",
)
@click.argument("runs", nargs=-1, required=True, metavar="runs/<name>...")
@cli.json_option("Print all figures as JSON instead of the table.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@click.option("--target-auc", type=cli.AUC, help="Measure the time to this AUC.")
@cli.output_option(
    text=f"Directory of the page, {PAGE} (default: this one; with --json or --markdown there is none unless asked for)."
)
@click.option("--allow-differences", is_flag=True, help="Compare unlike runs, and say prominently in what they differ.")
def main(
    runs: tuple[str, ...],
    as_json: bool,
    markdown: bool,
    target_auc: float | None,
    output: Path | None,
    allow_differences: bool,
) -> None:
    """Print the comparison, and write its page."""
    from recsys.compare.comparison import compare
    from recsys.compare.output import format_document, print_comparison
    from recsys.compare.page import build_page
    from recsys.report.run import ComparisonError

    if as_json and markdown:
        raise cli.Mistake("--json and --markdown: one of them at a time")
    directories = [run for run in runs if not run.endswith(".html")]  # a page of an earlier comparison, under runs/*
    with cli.mistakes(ComparisonError):
        comparison = compare(directories or runs, target_auc, allow_differences)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
    elif markdown:
        print(format_document(comparison))
    else:
        print_comparison(comparison)
    if output is None and not (as_json or markdown):
        output = Path()
    if output is not None:
        try:
            build_page(comparison).write(output / PAGE)
        except OSError as error:
            raise cli.Mistake(f"{output / PAGE} cannot be written: {error.strerror}") from error
        print(f"page: {output / PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
