"""Criteo's text: every malformed line found, counted by kind, and shown with its number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.data.criteo import Criteo, Options
from recsys.data.criteo_tsv import EXAMPLES_SHOWN, Malformed, find_files, read_columns
from tests.recsys.data.criteo_rows import draw_rows, expect_dense, expect_labels, replace_cell, write_rows, write_text

GOOD = draw_rows(1, seed=7)[0]
FAULTS = [
    ("columns", "39 instead of 40", lambda row: row.rsplit("\t", 1)[0]),
    ("columns", "41 instead of 40", lambda row: row + "\t"),
    ("columns", "1 instead of 40: ''", lambda row: ""),
    ("label", "'2' is not 0 or 1", lambda row: replace_cell(row, 0, "2")),
    ("label", "'' is not 0 or 1", lambda row: replace_cell(row, 0, "")),
    ("label", "'01' is not 0 or 1", lambda row: replace_cell(row, 0, "01")),
    ("label", "'1.0' is not 0 or 1", lambda row: replace_cell(row, 0, "1.0")),
    ("integer", "I1 = '1.5'", lambda row: replace_cell(row, 1, "1.5")),
    ("integer", "I4 = ' 5'", lambda row: replace_cell(row, 4, " 5")),
    ("integer", "I5 = '0x1f'", lambda row: replace_cell(row, 5, "0x1f")),
    ("integer", "I6 = 'abc'", lambda row: replace_cell(row, 6, "abc")),
    ("integer", "I7 = '-'", lambda row: replace_cell(row, 7, "-")),
    ("integer", "I13 = '9223372036854775808'", lambda row: replace_cell(row, 13, str(2**63))),
    ("integer", "I2 = '1111", lambda row: replace_cell(row, 2, "1" * 9000)),
    ("category", "C1 = '123456789'", lambda row: replace_cell(row, 14, "123456789")),
    ("category", "C3 = '1234567g'", lambda row: replace_cell(row, 16, "1234567g")),
    ("category", "C4 = '-2345678'", lambda row: replace_cell(row, 17, "-2345678")),
    ("category", "C26 = '12345678\\r'", lambda row: replace_cell(row, 39, "12345678\r")),
    ("category", "C9 = 'Ã©'", lambda row: replace_cell(row, 22, "é")),
]


def read(path: Path) -> tuple[list, Malformed]:
    """All blocks, and what was found malformed."""
    malformed = Malformed(str(path), max_fraction=1.0)
    return list(read_columns(path, malformed, lambda count: None)), malformed


@pytest.fixture(params=[1 << 20, 1000, 100])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of the whole file, of a few lines, and smaller than a line."""
    monkeypatch.setattr("recsys.data.criteo_tsv.BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize(("kind", "detail", "spoil"), FAULTS)
def test_each_fault_is_found_where_it_is(kind: str, detail: str, spoil, tmp_path: Path, block_bytes: int) -> None:
    rows = draw_rows(30)
    spoiled = list(rows)
    for k in (0, 11, 12, 29):
        spoiled[k] = spoil(rows[k])
    path = write_rows(tmp_path / "day.tsv", spoiled)
    blocks, malformed = read(path)
    assert malformed.counts == {kind: 4}
    assert malformed.lines == 30
    assert [example.split(": ", 2)[:2] for example in malformed.examples] == [
        [f"{path}:{line}", kind] for line in (1, 12, 13, 30)
    ]
    assert all(detail in example for example in malformed.examples)
    kept = [row for k, row in enumerate(rows) if k not in (0, 11, 12, 29)]
    np.testing.assert_array_equal(np.concatenate([block.labels for block in blocks]), expect_labels(kept))
    np.testing.assert_allclose(np.concatenate([block.dense for block in blocks]), expect_dense(kept), rtol=1e-6)


def test_kinds_are_counted_apart_and_the_first_few_shown(tmp_path: Path, block_bytes: int) -> None:
    rows = draw_rows(400)
    for k, (_, _, spoil) in enumerate(FAULTS):
        rows[20 * k + 3] = spoil(rows[20 * k + 3])
    _, malformed = read(write_rows(tmp_path / "day.tsv", rows))
    assert malformed.counts == {"columns": 3, "label": 4, "integer": 7, "category": 5}
    assert [int(e.split(":")[1]) for e in malformed.examples] == [20 * k + 4 for k in range(EXAMPLES_SHOWN)]


@pytest.mark.parametrize("cells", [{1: "-00"}, {1: "0" * 6000}, {2: str(2**63 - 1)}, {3: str(-(2**63))}, {14: "A"}])
def test_unusual_but_well_formed_cells(cells: dict[int, str], tmp_path: Path) -> None:
    """The same verdict whether pyarrow alone reads the line or it is looked at because of its neighbour."""
    row = GOOD
    for column, cell in cells.items():
        row = replace_cell(row, column, cell)
    for neighbours in ([], [""]):
        blocks, malformed = read(write_rows(tmp_path / "day.tsv", [row, *neighbours]))
        assert malformed.counts.total() == len(neighbours)
        if 14 in cells:
            assert blocks[0].categories[0] == [10]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), st.text(alphabet='019afAFgx-+. \t\r\0"é', max_size=3)),
        max_size=3,
    )
)
def test_columns_and_lines_are_read_by_the_same_rules(edits: list[tuple[int, int, str]], tmp_path: Path) -> None:
    """A line alone is judged by pyarrow, beside a faulty one by itself: the verdicts agree."""
    row = GOOD
    for at, width, text in edits:
        row = row[:at] + text + row[at + width :]
    alone, alone_malformed = read(write_rows(tmp_path / "alone.tsv", [row]))
    beside, beside_malformed = read(write_rows(tmp_path / "beside.tsv", ["", row]))
    assert alone_malformed.counts.total() + 1 == beside_malformed.counts.total()
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one.categories, other.categories)
        np.testing.assert_array_equal(one.dense, other.dense)


@pytest.mark.parametrize(("end", "cut_short"), [("\n", 0), ("", 0), ("\n\n", 0), ("0", 1), ("\t", 1)], ids=repr)
def test_last_line(end: str, cut_short: int, tmp_path: Path, block_bytes: int) -> None:
    """Without a newline it counts if its last category is whole."""
    rows = [replace_cell(row, 39, "0123abcd") for row in draw_rows(20)]
    path = write_text(tmp_path / "day.tsv", "\n".join(rows) + end)
    _, malformed = read(path)
    assert malformed.counts["cut short"] == cut_short
    assert malformed.counts["columns"] == (end == "\n\n")
    assert malformed.lines == 20 + (end == "\n\n")


@pytest.mark.parametrize("lost", [1, 3, 8, 9, 60, 200])
def test_a_plain_file_cut_off_within_a_line(lost: int, tmp_path: Path, block_bytes: int) -> None:
    text = "".join(f"{replace_cell(row, 39, '0123abcd')}\n" for row in draw_rows(20))
    path = write_text(tmp_path / "day.tsv", text[: -1 - lost])
    blocks, malformed = read(path)
    [example] = malformed.examples
    assert malformed.counts == {"cut short": 1}
    assert example.startswith(f"{path}:20: cut short: the file ends in '")
    assert sum(len(block.labels) for block in blocks) == 19


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_compressed_file_cut_off_is_refused(suffix: str, tmp_path: Path) -> None:
    whole = write_rows(tmp_path / f"whole{suffix}", draw_rows(3000)).read_bytes()
    cut = tmp_path / f"cut.tsv{suffix}"
    for length in (5, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"cut.tsv{suffix}: the compressed stream is cut off or damaged"):
            Criteo.build(Options(path=str(cut), max_malformed_fraction=1.0), tmp_path)
    cut.write_bytes(whole[: len(whole) // 2] + b"garbage" + whole[len(whole) // 2 + 7 :])
    with pytest.raises(ValueError, match=rf"cut.tsv{suffix}: the compressed stream is cut off or damaged"):
        Criteo.build(Options(path=str(cut), max_malformed_fraction=1.0), tmp_path)
    assert not list(tmp_path.glob("criteo-*/metadata.json"))


def test_the_build_stops_above_the_allowed_fraction_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = draw_rows(200)
    rows[41] = replace_cell(rows[41], 20, "zz")
    rows[90] = "only\tthree\tcells"
    path = str(write_rows(tmp_path / "day.tsv", rows))
    with pytest.raises(ValueError, match=r"2 of 200 lines \(1.000%\) are malformed \(1 category, 1 columns\)") as error:
        Criteo.build(Options(path=path, max_malformed_fraction=0.009), tmp_path)
    assert "day.tsv:42: category: C7 = 'zz' is not 1 to 8 hexadecimal digits" in str(error.value)
    assert "max_malformed_fraction = 0.009" in str(error.value)
    dataset = Criteo.build(Options(path=path, max_malformed_fraction=0.01), tmp_path)
    assert dataset.metadata["rows"] == 198
    assert dataset.metadata["malformed"] == {"category": 1, "columns": 1}
    assert "day.tsv:91: columns: 3 instead of 40" in caplog.text
    with pytest.raises(ValueError, match="2 of 200 lines"):  # the cache is there now, and still not good enough
        Criteo.build(Options(path=path, max_malformed_fraction=0.009), tmp_path)


def test_other_text_is_refused_at_its_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.criteo_tsv.BLOCK_BYTES", 1000)
    with pytest.raises(ValueError, match=r"62 of 62 lines[^']*prose.txt:1: columns: 1 instead of 40: 'It"):
        Criteo.build(Options(path=str(write_text(tmp_path / "prose.txt", "It was a night.\n" * 9000))), tmp_path)
    with pytest.raises(ValueError, match=r"one_line: no newline in .* bytes, this is not Criteo's text: '0000"):
        Criteo.build(Options(path=str(write_text(tmp_path / "one_line", "0" * 100_000))), tmp_path)


def test_line_numbers_count_in_each_file(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    write_rows(days / "day_0", draw_rows(50))
    write_rows(days / "day_1", [*draw_rows(9), "faulty", *draw_rows(50)])
    assert [file.name for file in find_files(str(days))] == ["day_0", "day_1"]
    dataset = Criteo.build(Options(path=str(days), max_malformed_fraction=0.1), tmp_path)
    assert dataset.metadata["malformed_examples"] == [f"{days}/day_1:10: columns: 1 instead of 40: 'faulty'"]
