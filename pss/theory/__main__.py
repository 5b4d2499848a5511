"""How large a parameter-sharing array must be, and what a sketch really does to a table.

size (default)   k and |M| that suffice for a macro (ε, δ) or micro (ε, δ, ρ) approximation of a table, with constants
measure          the error of a sketch on a table over its size, beside its bound; writes a page with the plot
identical        share of ids whose whole embedding equals another id's, for every hash family
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pss.hashing import HASH_FAMILIES
from pss.theory.bounds import check_range
from pss.theory.commands import run_identical, run_measure, run_size
from pss.theory.sketch_error import SKETCHES

_COMMANDS = ("size", "measure", "identical")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints; exits with status 2 where an argument is out of range, or a file cannot be read or written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    asked = parse_arguments(words)
    try:
        asked.run(asked)
    except ValueError as error:
        asked.parser.error(str(error))


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pss.theory",
        description=__doc__,
        epilog="examples:\n"
        "  python -m pss.theory --rows 40000000 --dim 128 --eps 0.5 --delta 0.01\n"
        "  python -m pss.theory measure --table power-law --sketch gaussian sparse hashing --rho 0.1\n"
        "  python -m pss.theory measure --table runs/full/checkpoints/step_800:t_C3 --seeds 99 --delta 0.01\n"
        "  python -m pss.theory identical --memory-mb 1 10\n\n"
        "Every command has its own --help. Exit status 2: an argument is out of range, or a table cannot be read.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="{size,measure,identical}", required=True)
    _add_size(_add_command(commands, "size", "k and |M| that suffice", run_size))
    _add_measure(_add_command(commands, "measure", "the error of a sketch beside its bound", run_measure))
    _add_identical(_add_command(commands, "identical", "ids with another id's embedding", run_identical))
    is_default = bool(words) and words[0] not in (*_COMMANDS, "-h", "--help")
    asked = parser.parse_args(["size", *words] if is_default else words)
    asked.words = words
    return asked


def _add_command(
    commands: Any, name: str, purpose: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    description = f"{purpose[0].upper()}{purpose[1:]}. {' '.join((run.__doc__ or '').split())}"
    command = commands.add_parser(name, help=purpose, description=description)
    command.set_defaults(run=run, parser=command)
    return command


def _add_size(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=_number("rows", int), required=True, metavar="N", help="rows of the table, n")
    add("--dim", type=_number("dim", int), required=True, metavar="D", help="its embedding_dim, d")
    add("--eps", type=_number("eps", float), default=0.5, metavar="E", help="ε, the relative error (default: 0.5)")
    add("--delta", type=_number("delta", float), default=0.01, metavar="P", help="δ, the risk of more (default: 0.01)")
    add(
        "--rho",
        type=_number("rho", float),
        nargs="+",
        default=[0.5, 0.1, 0.02],
        metavar="R",
        help="ρ, importances ‖E[i]‖/σ_max(E) above which rows are kept (default: 0.5 0.1 0.02)",
    )


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--table",
        default="power-law",
        metavar="TABLE",
        help="random: N(0, 1); power-law (default): row i has norm i^-exponent; or PATH[:NAME]: a .npy or .pt file, or "
        "a checkpoint directory with full tables, NAME where it holds several",
    )
    add("--rows", type=_number("rows", int), metavar="N", help="of a generated table (default: 20000)")
    add("--dim", type=_number("dim", int), metavar="D", help="of a generated table (default: 16)")
    add("--exponent", type=float, metavar="A", help="of the power law (default: 0.5)")
    add(
        "--sketch",
        nargs="+",
        default=["gaussian", "sparse", "hashing"],
        choices=SKETCHES,
        metavar="S",
        help=f"any of {', '.join(SKETCHES)} (default: gaussian sparse hashing)",
    )
    add("--nonzeros", type=_number("nonzeros", int), default=8, metavar="S", help="per column of sparse (default: 8)")
    sizes = [128, 256, 512, 1024, 2048]
    add("--sizes", type=_number("sizes", int), nargs="+", default=sizes, metavar="K", help="k (default: 128 … 2048)")
    add("--seeds", type=_number("seeds", int), default=20, metavar="N", help="sketches a size (default: 20)")
    add("--delta", type=_number("delta", float), default=0.05, metavar="P", help="needs 1/δ − 1 seeds (default: 0.05)")
    add("--rho", type=_number("rho", float), default=0.1, metavar="R", help="ρ of the micro error (default: 0.1)")
    add("--output", default="sketch_error.html", metavar="PATH", help="the page (default: sketch_error.html)")


def _add_identical(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=_number("rows", int), default=384_615, metavar="N", help="ids (default: 384615)")
    add("--dim", type=_number("dim", int), default=64, metavar="D", help="embedding_dim (default: 64)")
    add("--block-size", type=_number("block-size", int), default=16, metavar="Z", help="Z of ROBE (default: 16)")
    add(
        "--memory-mb",
        type=_number("memory-mb", float, least=1e-5),
        nargs="+",
        default=[1.0, 10.0],
        metavar="MB",
        help="bytes of the fp32 array / 10^6 (default: 1 10)",
    )
    add(
        "--hash-family", nargs="+", default=sorted(HASH_FAMILIES), choices=sorted(HASH_FAMILIES), metavar="H",
        help=f"any of {', '.join(sorted(HASH_FAMILIES))} (default: all)",
    )  # fmt: skip
    add("--seeds", type=_number("seeds", int), default=20, metavar="N", help="hashes of a family (default: 20)")


def _number(name: str, convert: Callable[[str], float], least: float | None = None) -> Callable[[str], float]:
    """A type for argparse: what `check_range` says of values of that name, or at least `least`."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            kind = "an integer" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
        if least is None:
            try:
                check_range(**{name: value})
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        elif not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{name} must be at least {least:g} and finite, not {text}")
        return value

    return parse


if __name__ == "__main__":
    main()
