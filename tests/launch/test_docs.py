"""README and docs say what the stored results say."""

import json

import pytest

from launch.docs import ROOT, fill_document, find_documents, main, render_result

RESULT = {
    "measured": {
        "date": "2026-11-22",
        "commit": "abc1234",
        "command": "make table1",
        "hardware": "2 cores",
        "packages": "torch 2.13.0",
    },
    "table": {"title": "", "headings": ["method", "AUC"], "rows": [["full", ".75"], ["a|b", "–"]]},
}
DOCUMENT = "before\n\n<!-- result: one -->\nold\n<!-- end of result -->\nafter\n"


@pytest.mark.parametrize("path", find_documents(ROOT), ids=lambda path: path.name)
def test_documents_and_results_agree(path):
    text = path.read_text()
    assert fill_document(text, ROOT / "docs" / "results") == text, "run `make docs`"


def test_every_stored_result_is_shown():
    text = "".join(path.read_text() for path in find_documents(ROOT))
    for path in (ROOT / "docs" / "results").glob("*.json"):
        assert f"<!-- result: {path.stem} -->" in text, path


def test_every_table_of_figures_is_generated():
    """A table typed by hand has no place outside the marks, but for those that explain: their first heading says so."""
    for path in find_documents(ROOT):
        lines, generated = path.read_text().splitlines(), False
        for number, line in enumerate(lines):
            generated = line.startswith("<!-- result") or (generated and not line.startswith("<!-- end"))
            if line.startswith("| ---") and not generated:
                assert lines[number - 1].split("|")[1].strip() in ("read", "method", "what"), f"{path.name}:{number}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_a_result_is_its_table_and_how_it_was_measured():
    assert render_result(RESULT) == (
        "| method | AUC |\n| --- | ---: |\n| full | .75 |\n| a\\|b | – |\n\n"
        "Measured on 2026-11-22, on 2 cores, torch 2.13.0, commit abc1234, by `make table1`.\n"
    )


def test_a_place_is_filled_and_the_rest_left(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RESULT))
    filled = fill_document(DOCUMENT, tmp_path)
    assert filled.startswith("before\n\n<!-- result: one -->\n| method | AUC |")
    assert filled.endswith("by `make table1`.\n<!-- end of result -->\nafter\n")
    assert fill_document(filled, tmp_path) == filled


def test_a_result_that_is_not_stored_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"result: one: there is no one\.json"):
        fill_document(DOCUMENT, tmp_path)


def test_check_fails_where_a_document_differs(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "one.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text(DOCUMENT)
    monkeypatch.setattr("launch.docs.ROOT", tmp_path)
    for arguments, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
    assert "README.md differs" in capsys.readouterr().out
