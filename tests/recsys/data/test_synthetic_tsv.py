"""Written files, parsed by plain Python, against the rows as read."""

import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data import synthetic_tsv
from recsys.data.synthetic import Options, build

N = 20_000


@pytest.fixture(scope="module")
def small():
    return build(Options(scale=0.01), Path())


def test_text_equals_what_is_read(tmp_path):
    dataset = build(Options(), Path())
    dataset.write_tsv(tmp_path / "train.tsv", "train", 0, N)
    lines = [line.split("\t") for line in (tmp_path / "train.tsv").read_text().split("\n")[:-1]]
    rows = dataset.read("train", np.arange(N))
    assert {len(line) for line in lines} == {40}
    assert [float(line[0]) for line in lines] == rows.labels.tolist()
    dense = [[math.log1p(int(cell)) if cell else 0.0 for cell in line[1:14]] for line in lines]
    np.testing.assert_array_max_ulp(rows.dense, np.array(dense, np.float32), maxulp=1)
    for f in range(26):
        pairs = Counter(zip((line[14 + f] for line in lines), rows.ids[:, f].tolist(), strict=True))
        assert len({text for text, _ in pairs}) == len({id_ for _, id_ in pairs}) == len(pairs)
        assert all((text == "") == (id_ == 0) for text, id_ in pairs)
        assert all(len(text) in (0, 8) and text == text.lower() for text, _ in pairs)


def test_category_codes_undo():
    """Every step inverted: two ids never share a code, whatever the size of the table."""
    ids = np.concatenate([np.arange(100_000), 2**32 - 1 - np.arange(100_000)])
    key = 0x123456789ABCDEF0
    codes = synthetic_tsv.category_codes(ids, key).astype(np.uint64).tolist()
    undone = []
    for x in codes:
        x ^= (x >> 13) ^ (x >> 26)
        x = x * pow(0x85EBCA6B, -1, 2**32) % 2**32
        x ^= (x >> 15) ^ (x >> 30)
        undone.append((x * pow(0x9E3779B1, -1, 2**32) % 2**32) ^ (key & 0xFFFFFFFF))
    assert undone == ids.tolist()


def test_files_are_compressed_by_suffix_and_cut_by_rows(small, tmp_path):
    small.write_tsv(tmp_path / "day_0", "validation", 100, 40_000)
    text = (tmp_path / "day_0").read_bytes()
    assert text.count(b"\n") == 39_900
    for suffix in (".gz", ".zst", ".xz"):
        small.write_tsv(tmp_path / f"day_0{suffix}", "validation", 100, 40_000)
    assert gzip.decompress((tmp_path / "day_0.gz").read_bytes()) == text
    assert lzma.decompress((tmp_path / "day_0.xz").read_bytes()) == text
    with pa.input_stream(str(tmp_path / "day_0.zst"), compression="zstd") as stream:
        assert stream.read() == text
    small.write_tsv(tmp_path / "part", "validation", 35_000, 36_000)
    assert (tmp_path / "part").read_bytes() == b"".join(text.splitlines(keepends=True)[34_900:35_900])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["day_0", "day_0.gz", "day_0.xz", "day_0.zst", "part"]


@pytest.mark.parametrize(("start", "stop"), [(0, 100_001), (-1, 5), (5, 5), (6, 5)])
def test_rows_outside_a_split_are_refused_before_writing(small, tmp_path, monkeypatch, start, stop):
    monkeypatch.setattr(synthetic_tsv, "write", lambda *_: pytest.fail("began to write"))
    with pytest.raises(IndexError, match=f"rows {start} to {stop - 1} of 'validation', which has 100000"):
        small.write_tsv(tmp_path / "beyond", "validation", start, stop)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(small, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("old")

    def fail_later():
        yield next(small._blocks("train", np.arange(3)))[1]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        synthetic_tsv.write(path, ((b.integers, b.ids, b.labels) for b in fail_later()), 1)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("train.tsv", "old")]
