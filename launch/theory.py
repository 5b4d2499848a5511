"""How large a parameter-sharing array must be, and what a sketch really does to a table.

    size (default)   k and |M| that suffice for a macro (ε, δ) or micro (ε, δ, ρ) approximation of a table
    measure          the error of a sketch on a table over its size, beside its bound; writes a page with the plot
    identical        share of ids whose whole embedding equals another id's, for every hash family

The mathematics and its sources are in pss/theory/bounds.py and pss/theory/sketch_error.py.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import click

from launch import cli

_COUNT = {"type": int, "metavar": "N"}


class _SizeByDefault(cli.EndsAlike, click.Group):
    """Options without a command are those of `size`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["size", *args]
        return super().parse_args(ctx, args)


@click.group(
    "theory",
    cls=_SizeByDefault,
    help=cli.keep_lines(__doc__ or ""),
    short_help="Bounds of the papers as sizes, and sketches measured.",
    context_settings=cli.SETTINGS,
)
def main() -> None:
    """Each part of the theory is a command of its own."""


def _check(**options: Any) -> None:
    """Raise a Mistake for a value out of the range that its name has in the theory."""
    from pss.theory.bounds import check_range

    for name, given in options.items():
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None:
                with cli.mistakes():
                    check_range(**{name: value})


@cli.command(
    "theory size",
    "k and |M| that suffice, for every guarantee and inequality, and the compression of a table of --rows × --dim.",
    summary="k and |M| that suffice.",
    examples=["--rows 40000000 --dim 128 --eps 0.5 --delta 0.01"],
)
@click.option("--rows", required=True, help="Rows of the table, n.", **_COUNT)
@click.option("--dim", required=True, help="Its embedding_dim, d.", **_COUNT)
@click.option("--eps", type=float, default=0.5, metavar="E", help="ε, the relative error.")
@click.option("--delta", type=float, default=0.01, metavar="P", help="δ, the risk of more.")
@click.option(
    "--rho",
    type=cli.CommaList(float, "R"),
    default="0.5,0.1,0.02",
    help="ρ, importances ‖E[i]‖/σ_max(E) above which rows are kept.",
)
def size(**asked: Any) -> None:
    """Print the sizes."""
    from pss.theory.commands import run_size

    _check(**asked)
    run_size(Namespace(**asked))


@cli.command(
    "theory measure",
    "The error of a sketch beside its bound: --seeds sketches of every size compress the table, and the error that a "
    "further sketch stays below with probability 1 − δ is printed beside the bound, with the slope of log ε on log k.",
    summary="The error of a sketch beside its bound.",
    examples=[
        "--table power-law --sketch gaussian,sparse,hashing --rho 0.1",
        "--table runs/full/checkpoints/step_800:t_C3 --seeds 99 --delta 0.01",
    ],
)
@click.option(
    "--table",
    default="power-law",
    metavar="TABLE",
    help="random: N(0, 1); power-law: row i has norm i^-exponent; or PATH[:NAME]: a .npy or .pt file, or a checkpoint "
    "directory with full tables, NAME where it holds several.",
)
@click.option("--rows", help="Of a generated table (default: 20000).", **_COUNT)
@click.option("--dim", help="Of a generated table (default: 16).", **_COUNT)
@click.option("--exponent", type=float, metavar="A", help="Of the power law (default: 0.5).")
@click.option("--sketch", type=cli.CommaList(str, "NAME"), default="gaussian,sparse,hashing", help="Sketches.")
@click.option("--nonzeros", default=8, help="Per column of sparse.", **_COUNT)
@click.option("--sizes", type=cli.CommaList(int), default="128,256,512,1024,2048", help="Sizes k.")
@click.option("--seeds", default=20, help="Sketches of a size.", **_COUNT)
@click.option("--delta", type=float, default=0.05, metavar="P", help="δ; needs 1/δ − 1 seeds.")
@click.option("--rho", type=float, default=0.1, metavar="R", help="ρ of the micro error.")
@cli.output_option(".", "Directory of the page, sketch_error.html.")
def measure(output: Path, sketch: tuple[str, ...], **asked: Any) -> None:
    """Measure, print, and write the page."""
    from pss.theory.commands import run_measure
    from pss.theory.sketch_error import SKETCHES

    _check(**{name: value for name, value in asked.items() if name not in ("table", "exponent")})
    _check_names("--sketch", sketch, SKETCHES)
    words = ["theory", *(word for word in sys.argv[1:] if word != "theory")]  # however the command was started
    with cli.mistakes():
        run_measure(Namespace(**asked, sketch=sketch, output=output / "sketch_error.html", words=words))


@cli.command(
    "theory identical",
    "Share of ids whose whole embedding equals another id's, for every hash family and size of the array.",
    summary="Ids with another id's embedding.",
    examples=["--memory-mb 1,10"],
)
@click.option("--rows", default=384_615, help="Ids.", **_COUNT)
@click.option("--dim", default=64, help="Their embedding_dim.", **_COUNT)
@click.option("--block-size", default=16, help="Z of ROBE.", **_COUNT)
@click.option(
    "--memory-mb", type=cli.CommaList(cli.FiniteFloat(1e-5), "MB"), default="1,10", help="fp32 array in 10^6 bytes."
)
@click.option("--hash-family", type=cli.CommaList(str, "NAME"), help="Hash families (default: all).")
@click.option("--seeds", default=20, help="Hashes of a family.", **_COUNT)
def identical(hash_family: tuple[str, ...] | None, **asked: Any) -> None:
    """Count and print."""
    from pss.hashing import HASH_FAMILIES
    from pss.theory.commands import run_identical

    _check(**{name: asked[name] for name in ("rows", "dim", "block_size", "seeds")})
    _check_names("--hash-family", hash_family or (), HASH_FAMILIES)
    with cli.mistakes():
        run_identical(Namespace(**asked, hash_family=hash_family or tuple(sorted(HASH_FAMILIES))))


def _check_names(option: str, names: tuple[str, ...], known: Any) -> None:
    if unknown := [name for name in names if name not in known]:
        raise cli.Mistake(f"{option}: {unknown[0]!r} is unknown; known: {', '.join(known)}")


for _command in (size, measure, identical):
    main.add_command(_command)


if __name__ == "__main__":
    main()
