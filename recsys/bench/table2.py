"""Table 2 of the PSS paper, read from table2.toml, to stand beside what is measured."""

import tomllib
from pathlib import Path
from typing import Literal, NamedTuple

from recsys.bench.kernel_sizes import PAPER_BLOCK_SIZE, PAPER_COMPRESSION, PAPER_ROWS, KernelSize

Pass = Literal["forward", "dense", "sparse"]
_TIMED = {"forward": "forward", "dense": "backward, dense gradient", "sparse": "backward, sparse gradient"}


class Block(NamedTuple):
    """Hold one of the six parts of the table.

    ms: compression, or Z where `by_block_size`, -> ms over PAPER_ROWS.
    """

    letter: str
    timed: Pass
    by_block_size: bool
    ms: dict[int, tuple[float, ...]]

    @property
    def title(self) -> str:
        """Return what the part holds: '(a) forward, by compression at Z = 32'."""
        what = f"by Z at {PAPER_COMPRESSION}x" if self.by_block_size else f"by compression at Z = {PAPER_BLOCK_SIZE}"
        return f"({self.letter}) {_TIMED[self.timed]}, {what}"

    def row_label(self, key: int) -> str:
        """Return what a row is called: '1,000x' or 'Z = 4'."""
        return f"Z = {key}" if self.by_block_size else f"{key:,}x"

    def holds(self, size: KernelSize, key: int) -> bool:
        """Return whether a size of the grid belongs in this row."""
        is_compression = round(size.compression) == (PAPER_COMPRESSION if self.by_block_size else key)
        return is_compression and size.block_size == (key if self.by_block_size else PAPER_BLOCK_SIZE)


def _load() -> tuple[tuple[Block, ...], str, str]:
    """Return the parts, the paper's hardware, and what is doubtful about its figures."""
    stored = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    assert tuple(stored["rows"]) == PAPER_ROWS, "table2.toml: its columns are not those of the grid"
    blocks = []
    for block in stored["blocks"]:
        ms = {int(key): tuple(row) for key, row in block.pop("ms").items()}
        assert all(len(row) == len(PAPER_ROWS) for row in ms.values()), f"table2.toml, ({block['letter']}): row lengths"
        blocks.append(Block(**block, ms=ms))
    return tuple(blocks), stored["hardware"], stored["doubts"]


TABLE2, HARDWARE, DOUBTS = _load()
