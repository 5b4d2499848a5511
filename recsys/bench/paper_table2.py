"""Table 2 of the PSS paper (Desai and Shrivastava 2022), milliseconds as printed, to stand beside what is measured.

One embedding lookup of n rows, d = 128, batch 10240, loss the sum of what was retrieved, on one GPU. The backward pass
is the gradient of M alone, without an update.
"""

from typing import Literal, NamedTuple

from recsys.bench.kernel_grid import (
    PAPER_BLOCK_SIZE,
    PAPER_BLOCK_SIZES,
    PAPER_COMPRESSION,
    PAPER_COMPRESSIONS,
    PAPER_ROWS,
    KernelSize,
)

HARDWARE = "one GPU, not named for this table (its inference was timed on a Quadro RTX-8000)"
DOUBTS = "its dense backward of 10x at 256M, 14.34 ms, is that of 100x: the array of 10x would be 13 GB"

Pass = Literal["forward", "dense", "sparse"]


class Block(NamedTuple):
    """One of the six parts of the table. rows: compression, or Z where `by_block_size`, -> ms over PAPER_ROWS."""

    letter: str
    timed: Pass
    by_block_size: bool
    rows: dict[int, tuple[float, ...]]

    @property
    def title(self) -> str:
        timed = {"forward": "forward", "dense": "backward, dense gradient", "sparse": "backward, sparse gradient"}
        what = f"by Z at {PAPER_COMPRESSION}x" if self.by_block_size else f"by compression at Z = {PAPER_BLOCK_SIZE}"
        return f"({self.letter}) {timed[self.timed]}, {what}"

    def row_label(self, key: int) -> str:
        return f"Z = {key}" if self.by_block_size else f"{key:,}x"

    def holds(self, size: KernelSize, key: int) -> bool:
        """Whether a size of the grid belongs in this row."""
        is_compression = round(size.compression) == (PAPER_COMPRESSION if self.by_block_size else key)
        return is_compression and size.block_size == (key if self.by_block_size else PAPER_BLOCK_SIZE)


def _block(letter: str, timed: Pass, *rows: tuple[float, ...]) -> Block:
    by_block_size = letter in "def"
    keys = PAPER_BLOCK_SIZES if by_block_size else PAPER_COMPRESSIONS
    assert all(len(row) == len(PAPER_ROWS) for row in rows)
    return Block(letter, timed, by_block_size, dict(zip(keys, rows, strict=True)))


TABLE2 = (
    _block(
        "a",
        "forward",
        (0.40, 0.36, 0.37, 0.37, 0.37, 0.37, 0.36),
        (0.31, 0.32, 0.31, 0.25, 0.37, 0.37, 0.36),
        (0.27, 0.29, 0.30, 0.31, 0.30, 0.32, 0.31),
        (0.27, 0.27, 0.27, 0.26, 0.28, 0.29, 0.30),
    ),
    _block(
        "b",
        "dense",
        (2.55, 4.81, 9.15, 17.81, 35.10, 69.73, 14.34),
        (0.59, 0.83, 1.27, 2.13, 3.85, 7.42, 14.34),
        (0.35, 0.37, 0.41, 0.54, 0.73, 1.08, 1.78),
        (0.35, 0.35, 0.34, 0.35, 0.36, 0.40, 0.47),
    ),
    _block(
        "c",
        "sparse",
        (2.67, 2.53, 2.52, 2.51, 2.51, 2.52, 2.54),
        (2.48, 2.58, 2.68, 2.64, 2.66, 2.65, 2.52),
        (2.56, 2.48, 2.58, 2.56, 2.63, 2.65, 2.53),
        (2.52, 2.53, 2.45, 2.55, 2.60, 2.54, 2.62),
    ),
    _block(
        "d",
        "forward",
        (0.68, 0.75, 0.77, 0.80, 0.92, 0.88, 0.88),
        (0.55, 0.54, 0.54, 0.54, 0.65, 0.65, 0.65),
        (0.31, 0.31, 0.31, 0.24, 0.37, 0.37, 0.36),
        (0.31, 0.31, 0.31, 0.23, 0.37, 0.37, 0.36),
    ),
    _block(
        "e",
        "dense",
        (1.29, 1.56, 2.02, 2.96, 4.69, 8.15, 15.17),
        (0.80, 1.07, 1.54, 2.40, 4.13, 7.70, 14.61),
        (0.58, 0.82, 1.27, 2.12, 3.85, 7.43, 14.34),
        (0.57, 0.80, 1.27, 2.12, 3.85, 7.42, 14.34),
    ),
    _block(
        "f",
        "sparse",
        (3.17, 3.41, 3.56, 3.68, 3.94, 3.98, 4.00),
        (2.61, 2.64, 2.74, 2.73, 2.91, 2.77, 2.74),
        (2.50, 2.66, 2.54, 2.53, 2.52, 2.51, 2.53),
        (2.48, 2.61, 2.62, 2.50, 2.64, 2.60, 2.50),
    ),
)
