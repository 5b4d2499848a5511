"""Criteo's text, what a row of it is, and how it is read: files -> blocks of whole lines -> columns.

A block is first read as columns by pyarrow, strictly. Only where that fails are its lines looked at one by one, the
faulty ones counted and dropped, and the rest read as columns again: clean data never meets a Python loop over rows, and
every malformed line is accounted for. Both readings accept the same lines: label 0 or 1, then 13 blank or 64-bit
decimal integers, then 26 blank or 1 to 8 hexadecimal digits, tab separated, `\\n` at the end.

Cardinalities are those published with the DLRM reference, of the Criteo Kaggle display-advertising challenge and of the
1TB click logs (all 24 days). Capped at 40 M rows a table, the latter are MLPerf's: 204,184,588 rows in all.
"""

import io
import lzma
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

DENSE_NAMES = tuple(f"I{i}" for i in range(1, 14))
FEATURE_NAMES = tuple(f"C{i}" for i in range(1, 27))

CARDINALITIES: dict[str, tuple[int, ...]] = {
    "criteo_kaggle": (
        1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
        27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
    ),
    "criteo_tb": (
        227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10,
        2209, 11938, 155, 4, 976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
    ),
}  # fmt: skip

BLOCK_BYTES = 1 << 20  # measured: half the time per row of 16 MiB, whose columns leave the cache
LONGEST_LINE_BYTES = 1 << 16
EXAMPLES_SHOWN = 5
COMPRESSED = (".gz", ".xz", ".zst")

_NUM_COLUMNS = 1 + len(DENSE_NAMES) + len(FEATURE_NAMES)
_ALPHABET = b"0123456789abcdefABCDEF-\t\n"  # pyarrow alone would also take " 5", "0x1f" and a byte order mark
_CONTROL = re.compile(rb"[^\t\r\x20-\x7e]")
_INTEGER = re.compile(rb"-?[0-9]+")
_CATEGORY = re.compile(rb"[0-9a-fA-F]{0,8}")
_PLAIN_LINE = re.compile(
    rb"[01](?:\t(?:-?[0-9]{1,18})?){%d}(?:\t[0-9a-fA-F]{0,8}){%d}" % (len(DENSE_NAMES), len(FEATURE_NAMES))
)
_PARSE = csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False, ignore_empty_lines=False)
_CONVERT = csv.ConvertOptions(
    column_types={
        "label": pa.binary(),
        **dict.fromkeys(DENSE_NAMES, pa.int64()),
        **dict.fromkeys(FEATURE_NAMES, pa.binary()),
    },
    null_values=[""],
    strings_can_be_null=False,
    check_utf8=False,
)


@dataclass(frozen=True)
class Columns:
    """n rows as read."""

    labels: np.ndarray
    """(n,) uint8."""
    dense: np.ndarray
    """(n, 13) float32: log(1 + max(x, 0)), 0 where blank."""
    categories: np.ndarray
    """(26, n) uint32, 0 where blank."""
    blanks: np.ndarray
    """(n,) uint32, whose bit f says that category f is blank."""


@dataclass
class Malformed:
    """Counts the lines read so far from `path`, and those dropped by kind; keeps the first few of these in words."""

    path: str
    max_fraction: float
    lines: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, kind: str, detail: str) -> None:
        """Count one more dropped line."""
        self.counts[kind] += 1
        if len(self.examples) < EXAMPLES_SHOWN:
            self.examples.append(f"{where}: {kind}: {detail}")

    def check(self, at_least: float = 0.0) -> None:
        """Raise ValueError when more than `max_fraction` of the lines, or `at_least` if that is more, are malformed."""
        allowed = max(self.max_fraction, at_least)
        if self.counts.total() > allowed * self.lines:
            raise ValueError(f"{self}\n  {allowed:.3%} are allowed (max_malformed_fraction = {self.max_fraction:g})")

    def __str__(self) -> str:
        malformed = self.counts.total()
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        found = f"{malformed:,} of {self.lines:,} lines ({malformed / self.lines:.3%}) are malformed ({kinds})"
        return "\n  ".join([f"Criteo data: {self.path}: {found}", *self.examples])


def find_files(path: str) -> list[Path]:
    """Return a file, every visible file of a directory, or what a glob matches, in natural order.

    day_2 stands before day_10. Raises FileNotFoundError when there is none, ValueError when one of them has no bytes.
    """
    given = Path(path).expanduser()
    if given.is_file():
        files = [given]
    elif given.is_dir():
        files = [file for file in given.iterdir() if file.is_file() and not file.name.startswith(".")]
    else:
        files = [Path(match) for match in glob(str(given)) if Path(match).is_file()]
    if not files:
        raise FileNotFoundError(f"Criteo data: no file at {path!r} (looked at {given.absolute()})")
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"Criteo data: {file} is empty (0 bytes)")
    return sorted(files, key=_natural_order)


def looks_like_criteo(file: Path) -> bool:
    """Return whether a file begins with a line of tab-separated text, or is compressed and cannot be read at all."""
    try:
        with closing(_read_lines(file, lambda _: None)) as blocks:
            first = next(blocks, b"").partition(b"\n")[0]
    except ValueError:  # damaged: the one who reads it says where
        return file.suffix in COMPRESSED
    return b"\t" in first and not _CONTROL.search(first)


def read_columns(file: Path, malformed: Malformed, advance: Callable[[int], Any]) -> Iterator[Columns]:
    """Yield the rows of a file (.gz, .xz, .zst or plain) in blocks of about a MiB of text, malformed lines left out.

    `malformed` is added to; `advance` is called with the bytes of the file consumed since its last call. Raises
    ValueError when a compressed file is cut off or damaged, or as soon as more than half of the very first block is
    malformed: that is something else than Criteo's text, and not worth reading to the end.
    """
    line = 1
    for text in _read_lines(file, advance):
        columns = _parse(text) if text.endswith(b"\n") else None
        num_lines = text.count(b"\n") + (not text.endswith(b"\n"))
        malformed.lines += num_lines
        if columns is None:
            kept = _drop_malformed(text, file, line, malformed)
            columns = _parse(kept) if kept else None
            assert columns is not None or not kept, f"{file}: lines {line} to {line + num_lines - 1} read two ways"
        if malformed.lines == num_lines:
            malformed.check(at_least=0.5)
        line += num_lines
        if columns is not None:
            yield columns


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", str(file))]


@contextmanager
def _open(raw: io.BufferedReader, suffix: str) -> Iterator[Any]:
    if suffix in (".gz", ".zst"):
        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), {".gz": "gzip", ".zst": "zstd"}[suffix]) as stream:
            yield stream
    elif suffix == ".xz":
        with lzma.LZMAFile(raw) as stream:
            yield stream
    else:
        yield raw


def _read_lines(file: Path, advance: Callable[[int], Any]) -> Generator[bytes]:
    """Yield blocks of whole lines; only the last one may lack its newline."""
    with file.open("rb") as raw, _open(raw, file.suffix) as stream:
        consumed, read, rest = 0, 0, b""
        while True:
            try:
                chunk = stream.read(BLOCK_BYTES)
            except (EOFError, OSError, lzma.LZMAError) as error:
                if stream is raw:
                    raise
                raise ValueError(
                    f"{file}: the compressed stream is cut off or damaged after {read:,} bytes of text ({error}); "
                    "fetch the file again"
                ) from error
            if not chunk:
                break
            read += len(chunk)
            advance(raw.tell() - consumed)
            consumed = raw.tell()
            end = chunk.rfind(b"\n") + 1
            if end:
                yield rest + chunk[:end]
                rest = b""
            rest += chunk[end:]
            if len(rest) > LONGEST_LINE_BYTES:
                raise ValueError(f"{file}: no newline in {len(rest):,} bytes, this is not Criteo's text: {_show(rest)}")
        if rest:
            yield rest


def _parse(text: bytes) -> Columns | None:
    """Return the columns of whole lines, or None when any of them is malformed."""
    if text.translate(None, _ALPHABET):
        return None
    names = ["label", *DENSE_NAMES, *FEATURE_NAMES]
    # One block: a column is then one contiguous chunk.
    reading = csv.ReadOptions(column_names=names, block_size=len(text) + 1)
    try:
        table = csv.read_csv(pa.BufferReader(text), reading, _PARSE, _CONVERT)
    except pa.ArrowInvalid:
        return None
    n = table.num_rows
    labels, label_widths = _bytes_of(table["label"].chunk(0))
    if not (label_widths == 1).all() or not np.isin(labels, (ord("0"), ord("1"))).all():
        return None
    dense = np.empty((n, len(DENSE_NAMES)), np.float32)
    for i, name in enumerate(DENSE_NAMES):
        dense[:, i] = np.log1p(np.maximum(table[name].chunk(0).fill_null(0).to_numpy(), 0))
    categories = np.zeros((len(FEATURE_NAMES), n), np.uint32)
    blanks = np.zeros(n, np.uint32)
    for f, name in enumerate(FEATURE_NAMES):
        present = _parse_hexadecimal(*_bytes_of(table[name].chunk(0)), out=categories[f])
        if present is None:
            return None
        blanks |= np.where(present, np.uint32(0), np.uint32(1 << f))
    return Columns(labels - np.uint8(ord("0")), dense, categories, blanks)


def _bytes_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return all bytes of a binary column of n cells in one array, uint8, and the cells' widths (n,)."""
    _, offset_buffer, data = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, np.uint8)
    return text, np.diff(offsets)


def _pair_table() -> np.ndarray:
    """Return (65536,) uint16: two hexadecimal digits, read as one native 16-bit number -> 0 to 255, else 256."""
    digits = np.full(256, 256, np.uint16)
    for value, digit in enumerate("0123456789abcdef"):
        digits[[ord(digit), ord(digit.upper())]] = value
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    return np.minimum(digits[pairs[:, 0]] * 16 + digits[pairs[:, 1]], 256).astype(np.uint16)


_PAIRS = _pair_table()


def _parse_hexadecimal(text: np.ndarray, widths: np.ndarray, out: np.ndarray) -> np.ndarray | None:
    """Write the values of a column's concatenated cells to `out` (n,) uint32; return (n,) bool, False where blank.

    Returns None when a cell is wider than 8 digits or holds anything else.
    """
    if widths.max(initial=0) > 8:
        return None
    present = widths > 0
    num_present = np.count_nonzero(present)
    if text.size != 8 * num_present:
        text = _pad_to_8(text, widths[present])
    codes = _PAIRS[text.view(np.uint16)]
    if codes.max(initial=0) > 255:
        return None
    out[present] = codes.astype(np.uint8).view(">u4")
    return present


def _pad_to_8(text: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return concatenated cells of 1 to 8 bytes with zeros written before each, 8 bytes a cell."""
    padded = np.full((len(widths), 8), ord("0"), np.uint8)
    padded[np.arange(8) >= 8 - widths[:, None]] = text
    return padded.reshape(-1)


def _drop_malformed(text: bytes, file: Path, first_line: int, malformed: Malformed) -> bytes:
    """Return the well-formed lines of `text`; the others are added to `malformed` with their line numbers."""
    lines = text.split(b"\n")
    unfinished = lines.pop()  # b"" after a final newline
    kept = []
    for number, line in enumerate(lines, first_line):
        fault = None if _PLAIN_LINE.fullmatch(line) else _find_fault(line)
        if fault is None:
            kept.append(line)
        else:
            malformed.add(f"{file}:{number}", *fault)
    if unfinished:
        # Without its newline a line is trusted only when its last category is whole.
        if _find_fault(unfinished) is None and len(unfinished.rpartition(b"\t")[2]) == 8:
            kept.append(unfinished)
        else:
            malformed.add(f"{file}:{first_line + len(lines)}", "cut short", f"the file ends in {_show(unfinished)}")
    return b"".join(line + b"\n" for line in kept)


def _find_fault(line: bytes) -> tuple[str, str] | None:
    """Return (kind, what is wrong) of one line without its newline, or None."""
    cells = line.split(b"\t")
    if len(cells) != _NUM_COLUMNS:
        return "columns", f"{len(cells)} instead of {_NUM_COLUMNS}: {_show(line)}"
    if cells[0] not in (b"0", b"1"):
        return "label", f"{_show(cells[0])} is not 0 or 1"
    for name, cell in zip(DENSE_NAMES, cells[1:], strict=False):
        if cell and not _is_int64(cell):
            return "integer", f"{name} = {_show(cell)} is not a 64-bit integer"
    for name, cell in zip(FEATURE_NAMES, cells[1 + len(DENSE_NAMES) :], strict=True):
        if not _CATEGORY.fullmatch(cell):
            return "category", f"{name} = {_show(cell)} is not 1 to 8 hexadecimal digits"
    return None


def _is_int64(cell: bytes) -> bool:
    digits = cell.lstrip(b"-0")
    if not _INTEGER.fullmatch(cell) or len(digits) > 19:  # int() itself refuses thousands of digits
        return False
    return int(digits or b"0") <= (1 << 63) - (not cell.startswith(b"-"))


def _show(text: bytes) -> str:
    return repr(text[:80].decode("latin-1")) + ("…" if len(text) > 80 else "")
