"""Keeps the columns of a Criteo file on disk: built once, published whole, memory-mapped by every later run.

A cache is a directory with `labels.npy` (n,) uint8, `dense.npy` (n, 13) float32 and `ids.npy` (n, 26) int32, row by
row, so that a row drawn at random costs one or two page faults an array, and what its owner adds (`recsys.data.criteo`:
`metadata.json`).

Building streams twice and holds neither text nor rows in memory: `write_rows` makes of the text the rows' labels and
dense features and one file of raw 32-bit values per category; `write_ids` counts each category's file, turns it into
ids in place, and interleaves the 26. Memory goes with the distinct values of the largest category: about 1 GiB for 46M
rows with 33M ids. The disk holds 265 bytes a row at most, 157 afterwards.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from rich.console import Console
from rich.progress import Progress

from recsys.data.criteo_tsv import DENSE_NAMES, FEATURE_NAMES, Malformed, read_columns
from recsys.data.ids import Encoder

CHUNK_ROWS = 1 << 25  # rows of one category counted or looked up at a time
INTERLEAVED_ROWS = 1 << 16  # rows of all categories interleaved at a time: they stay in the processor's cache
SETTLED_S = 2.0  # a file changed more recently may change again without a new time stamp


class _NpyFile:
    """Writes an .npy file of rows (width values each, or one if width is ()) whose number is known only at the end."""

    def __init__(self, path: Path, dtype: type[np.generic], width: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype, self._width, self.rows = np.dtype(dtype), width, 0
        self._write_header()
        self._start = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        assert (rows.dtype, rows.shape[1:]) == (self._dtype, self._width)
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._start  # numpy leaves room for the first dimension to grow

    def _write_header(self) -> None:
        shape = (self.rows, *self._width)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


def file_state(file: Path) -> tuple[str, int, int, int, int]:
    """Return what changes when a file's content does: path, inode, size, and both times.

    mtime alone is not enough: it can be reset, and ctime moves even then.
    """
    stat = file.stat()
    return str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hash_content(files: Sequence[Path], cache_dir: Path) -> str:
    """Return blake2b over the bytes of all files in order, whatever they are called, as 40 hexadecimal digits.

    Reads every file once (0.8 GB/s); after that `cache_dir` remembers the digest for as long as `file_state` stays.
    """
    total = hashlib.blake2b(digest_size=20)
    for file in files:
        total.update(_find_digest(file, cache_dir))
    return total.hexdigest()


def publish_once(directory: Path, write: Callable[[Path], None]) -> None:
    """Make sure that `directory` exists, whole: it was there, is made here, or was made by another process meanwhile.

    `write` fills a directory that gets the name only once complete. Processes that share the parent directory take
    turns, and the second finds the first's result. What a killed process left is never taken for a result and is
    removed by the next one to build. Raises what `write` raises, leaving nothing behind.
    """
    if directory.is_dir():
        return
    with _lock(directory.parent):
        if directory.is_dir():
            return
        own_machine = f"criteo-partial-{socket.gethostname()}-"
        for abandoned in directory.parent.glob(own_machine + "*"):
            shutil.rmtree(abandoned)
        partial = directory.with_name(own_machine + str(os.getpid()))
        partial.mkdir()
        try:
            write(partial)
            partial.rename(directory)
        except OSError:
            if not directory.is_dir():  # else a machine that does not see our lock was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_rows(directory: Path, files: Sequence[Path], malformed: Malformed) -> int:
    """Write the text as `labels.npy`, `dense.npy` and, in `raw/`, what `write_ids` needs; return the number of rows.

    Raises ValueError when more lines are malformed than `malformed` allows, or a compressed file is damaged.
    """
    raw = directory / "raw"
    raw.mkdir()
    with show_progress() as progress, ExitStack() as stack:
        labels = stack.enter_context(_NpyFile(directory / "labels.npy", np.uint8))
        dense = stack.enter_context(_NpyFile(directory / "dense.npy", np.float32, (len(DENSE_NAMES),)))
        blanks = stack.enter_context(_NpyFile(raw / "blanks.npy", np.uint32))
        categories = [stack.enter_context(_NpyFile(raw / f"{name}.npy", np.uint32)) for name in FEATURE_NAMES]
        task = progress.add_task("Criteo: reading the text", total=sum(file.stat().st_size for file in files))
        for file in files:
            for columns in read_columns(file, malformed, lambda count: progress.advance(task, count)):
                labels.append(columns.labels)
                dense.append(columns.dense)
                blanks.append(columns.blanks)
                for category, values in zip(categories, columns.categories, strict=True):
                    category.append(values)
    malformed.check()
    return labels.rows


def write_ids(
    directory: Path, num_train: int, build_encoder: Callable[[int, pa.ChunkedArray], Encoder]
) -> tuple[int, ...]:
    """Write what `write_rows` left in `raw/` as `ids.npy`; return the number of ids of each category.

    `build_encoder(f, values)` sees the first `num_train` rows of category f only: uint32, null where blank.
    """
    raw = directory / "raw"
    blanks = np.load(raw / "blanks.npy", mmap_mode="r")
    columns, num_embeddings = [], []
    with show_progress() as progress:
        for f, name in enumerate(progress.track(FEATURE_NAMES, description="Criteo: values to ids")):
            values = np.load(raw / f"{name}.npy", mmap_mode="r+")
            encoder = build_encoder(f, pa.chunked_array(list(_chunks(values[:num_train], blanks[:num_train], f))))
            ids = values.view(np.int32)
            for start, chunk in zip(range(0, len(values), CHUNK_ROWS), _chunks(values, blanks, f), strict=True):
                ids[start : start + len(chunk)] = encoder.encode(chunk)
            columns.append(ids)
            num_embeddings.append(encoder.num_embeddings)
        with _NpyFile(directory / "ids.npy", np.int32, (len(FEATURE_NAMES),)) as out:
            for start in progress.track(range(0, len(blanks), INTERLEAVED_ROWS), description="Criteo: ids to rows"):
                out.append(np.stack([ids[start : start + INTERLEAVED_ROWS] for ids in columns], axis=1))
    shutil.rmtree(raw)
    return tuple(num_embeddings)


def show_progress() -> Progress:
    """Return a progress display on stderr, silent where that is not a terminal."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@contextmanager
def _lock(cache_dir: Path) -> Iterator[None]:
    """Let one process in at a time; the system releases it when the process ends, however it ends."""
    with (cache_dir / "criteo.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_digest(file: Path, cache_dir: Path) -> bytes:
    state = hashlib.blake2b(repr(file_state(file)).encode(), digest_size=8).hexdigest()
    known = cache_dir / f"criteo-content-{state}"
    if known.is_file():
        return known.read_bytes()
    with _lock(cache_dir):
        if known.is_file():
            return known.read_bytes()
        settled = time.time() - file.stat().st_ctime > SETTLED_S
        digest = _hash_file(file)
        if settled:
            partial = known.with_suffix(".partial")
            partial.write_bytes(digest)
            partial.replace(known)
        return digest


def _hash_file(file: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    with file.open("rb") as stream, show_progress() as progress:
        task = progress.add_task(f"Criteo: identifying {file.name}", total=file.stat().st_size)
        while block := stream.read(1 << 22):
            digest.update(block)
            progress.advance(task, len(block))
    return digest.digest()


def _chunks(values: np.ndarray, blanks: np.ndarray, f: int) -> Iterator[pa.Array]:
    for start in range(0, len(values), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        yield pa.array(values[rows], mask=(blanks[rows] & np.uint32(1 << f)).astype(bool))
