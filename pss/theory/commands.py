"""What a command line of the theory does once its arguments are read: computes, prints, writes."""

import argparse
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pss.theory.bounds import BOUNDS, count_important, pairwise_eps
from pss.theory.identical import identical_share
from pss.theory.page import HEADINGS, format_point, write_page
from pss.theory.sketch_error import Point, Reference, find_slope, sweep
from pss.theory.tables import load_table, power_law_table, random_table

_BYTES = 4  # fp32
_PIPE_WIDTH = 150


def run_size(asked: argparse.Namespace) -> None:
    """A line for every guarantee and inequality: what S it holds for, k, |M| = k·d, and the compression of a table of
    --rows × --dim. The mathematics and its sources are in pss/theory/bounds.py."""
    n, dim, eps, delta = asked.rows, asked.dim, asked.eps, asked.delta
    headings = ("guarantee", "inequality", "holds for", "m, at most", "k", "|M|", "fp32", "compression")
    table = _table(f"M = S E that suffices for a table of {n:,} × {dim}: ε = {eps:g}, δ = {delta:g}", headings, left=3)
    for bound in BOUNDS:
        size = _describe_size(bound.macro_rows(dim, eps, delta), n, dim)
        table.add_row("macro", bound.name, _join(bound.sketches), "", *size)
    for rho in asked.rho:
        table.add_section()
        important = count_important(n, dim, rho)
        for bound in BOUNDS:
            size = _describe_size(bound.micro_rows(dim, eps, delta, rho, important), n, dim)
            holds_for = _join(bound.sketches | bound.micro_only)
            table.add_row(f"micro, ρ = {rho:g}", bound.name, holds_for, f"{important:,}", *size)
    _print(table)
    _explain(
        "macro: |⟨Mx, My⟩ − ⟨Ex, Ey⟩| ≤ ε σ_max(E)² ‖x‖‖y‖ for all x and y, with probability 1 − δ.",
        "micro: |⟨row i as read back − E[i], x⟩| ≤ ε ‖E[i]‖‖x‖ for all x and the m rows with ‖E[i]‖ > ρ σ_max(E), with "
        f"probability 1 − δ. Inner products of two such rows are then within (ε² + 2ε) = {pairwise_eps(eps):.4g} times "
        "‖E[i]‖‖E[j]‖ (Theorem 4).",
        "Storing the m rows as they are takes m·d numbers: a sketch is for not having to know which they are.",
        *(f"{bound.name}: k = {bound.formula}" for bound in BOUNDS),
        "of micro: with d + 1 for d, ρε for ε, δ/m for δ; the second moment m(d+1) / (δρ²ε²).",
    )


def _describe_size(k: int, num_embeddings: int, dim: int) -> tuple[str, str, str, str]:
    """k, |M|, bytes and compression."""
    compression = f"{num_embeddings / k:,.4g}×" if k < num_embeddings else "none: k ≥ rows"
    return _format_count(k), _format_count(k * dim), _format_bytes(_BYTES * k * dim), compression


def _format_count(count: int) -> str:
    return f"{count:,}" if count < 10**12 else f"{count:.3g}"


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def run_measure(asked: argparse.Namespace) -> None:
    """Draw --seeds sketches of every size, compresses the table with each, and takes the error that a further sketch
    stays below with probability 1 − δ. Prints it beside the bound, with the slope of log ε on log k, and writes the
    plot. Definitions are in pss/theory/sketch_error.py."""
    embeddings, described = _find_table(asked)
    reference = Reference(embeddings, asked.rho)
    points = _sweep(reference, asked)
    table = _table("Measured ε beside the bound", HEADINGS, left=1)
    for point in points:
        table.add_row(*format_point(point), end_section=point.rows == max(asked.sizes))
    _print(table)
    (n, dim), important = embeddings.shape, len(reference.important)
    subject = (
        f"{described}, {n:,} rows × {dim}; ε at confidence {100 * (1 - asked.delta):g} % over {asked.seeds} "
        f"independent sketches. Rows of importance above ρ = {asked.rho:g}: {important:,}, the highest "
        f"{reference.importance.max():.3g}."
    )
    _explain(subject, *_describe_slopes(points))
    _write(points, subject, asked)


def _sweep(reference: Reference, asked: argparse.Namespace) -> list[Point]:
    """All sketches and sizes that were asked for, each once, with a progress bar."""
    sketches, sizes = list(dict.fromkeys(asked.sketch)), sorted(set(asked.sizes))
    with _progress() as progress:
        task = progress.add_task("measuring", total=len(sketches) * len(sizes) * asked.seeds)
        return sweep(
            reference,
            sketches,
            sizes,
            seeds=asked.seeds,
            delta=asked.delta,
            nonzeros=asked.nonzeros,
            advance=lambda: progress.advance(task),
        )


def _find_table(asked: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Return the table to measure and what it is. Raises ValueError for what cannot be read or does not fit
    together."""
    generated = {"rows": asked.rows, "dim": asked.dim, "exponent": asked.exponent}
    if asked.table not in ("random", "power-law"):
        given = [name for name, value in generated.items() if value is not None]
        if given:
            raise ValueError(f"--{given[0]} is of a generated table; --table {asked.table} has its own")
        return load_table(asked.table), f"Table {asked.table}"
    rows, dim = asked.rows or 20_000, asked.dim or 16
    if asked.table == "random":
        if asked.exponent is not None:
            raise ValueError(f"--exponent {asked.exponent:g} is of --table power-law, not random")
        return random_table(rows, dim, seed=0), "Random table of independent N(0, 1)"
    exponent = 0.5 if asked.exponent is None else asked.exponent
    if not 0 <= exponent <= 5:
        raise ValueError(f"--exponent must be between 0 and 5, not {exponent:g}")
    return power_law_table(rows, dim, exponent, seed=0), f"Row norms i^−{exponent:g} in random directions"


def _describe_slopes(points: Sequence[Point]) -> list[str]:
    lines = []
    for sketch in dict.fromkeys(point.sketch for point in points):
        own = [point for point in points if point.sketch == sketch]
        rows = [point.rows for point in own]
        slopes = {
            kind: find_slope(rows, [getattr(point.measured, kind) for point in own]) for kind in ("macro", "micro")
        }
        said = [f"{kind} {slope:.3f}" for kind, slope in slopes.items() if math.isfinite(slope)]
        lines.append(f"slope of log ε on log k, {sketch}: {', '.join(said) or 'not defined'} (theory: −0.5)")
    return lines


def _write(points: Sequence[Point], subject: str, asked: argparse.Namespace) -> None:
    command = shlex.join(["pss-bench", *asked.words])
    try:
        write_page(points, Path(asked.output), subject=subject, rho=asked.rho, delta=asked.delta, command=command)
    except OSError as error:
        raise ValueError(f"--output {asked.output} cannot be written: {error.strerror}") from error
    print(f"page: {asked.output}", file=sys.stderr)


def run_identical(asked: argparse.Namespace) -> None:
    """Hash every id of a ROBE table of --rows × --dim by every family, and counts the ids all of whose chunks are
    read from the same places as another id's: no training can tell them apart. Exact; over --seeds hashes."""
    cases = [(family, megabytes) for megabytes in asked.memory_mb for family in asked.hash_family]
    title = f"Ids with the whole embedding of another: {asked.rows:,} ids, d = {asked.dim}, Z = {asked.block_size}"
    headings = ("hash family", "array", "|M|", "mean share", "least", "most", "hashes with any")
    table = _table(title, headings, left=1)
    with _progress() as progress:
        task = progress.add_task("hashing", total=len(cases) * asked.seeds)
        for family, megabytes in cases:
            size, shares = int(megabytes * 1e6 / _BYTES), []
            for seed in range(asked.seeds):
                shares.append(identical_share(asked.rows, asked.dim, size, asked.block_size, family, seed))
                progress.advance(task)
            texts = [f"{100 * share:.3f} %" for share in (float(np.mean(shares)), min(shares), max(shares))]
            some = f"{sum(share > 0 for share in shares)} of {asked.seeds}"
            table.add_row(family, f"{megabytes:g} MB", f"{size:,}", *texts, some)
    _print(table)
    _explain(
        "A hash with one multiplier for all chunks (affine) lets the same ids meet in all of them: how many hangs on "
        "its constants, hence on the seed. independent hashes every chunk anew."
    )


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _table(title: str, headings: Sequence[str], left: int) -> Table:
    """left: how many columns, from the first, are words."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    return table


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def _print(table: Table) -> None:
    _console().print(table)


def _explain(*lines: str) -> None:
    console = _console()
    for line in lines:
        console.print(Padding(escape(line), (0, 0, 0, 1)), style="dim")


def _format_bytes(size: int) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
