"""Compressing a trained table: the whole way, from the run that trains it to the table of four rows."""

import json
import re
from pathlib import Path

import pytest

from launch.compress import main
from launch.runners.compress_runs import ROWS
from recsys.runs.run_directory import RunDir
from tests.launch.test_sweep import DEBUG, SMALL

SHARED = (*SMALL, "optimizer.embedding=adagrad", "optimizer.embedding_learning_rate=0.05", "training.epochs=2")


def configs(tmp_path: Path, method: str = "full") -> tuple[str, str]:
    """Full tables by a method, and a method that at 1× stores every table whole: what it is fitted to it must equal."""
    full, compressed = tmp_path / "full.toml", tmp_path / "hashed.toml"
    full.write_text(f'base = "{DEBUG}"\n[embedding]\nmethod = "{method}"\ncompression = 1\n')
    compressed.write_text(
        f'base = "{DEBUG}"\n[embedding]\nmethod = "hashing_trick"\ncompression = 1\n'
        '[embedding.hashing_trick]\nrows = "equal"\n'
    )
    return str(full), str(compressed)


# Sharded, DeepFM's first-order tables of one column are stored wider.
@pytest.mark.parametrize(("method", "model"), [("full", "dlrm"), ("sharded", "deepfm")])
def test_a_method_that_loses_nothing_starts_where_the_full_tables_were_best(tmp_path, capsys, method, model):
    shared = [*SHARED, f"model.architecture={model}"]
    arguments = [*configs(tmp_path, method), *shared, "--output", str(tmp_path / "runs"), "--jobs", "1"]
    assert main(arguments, standalone_mode=False) is None
    table = capsys.readouterr().out
    lines = {name: next(line for line in table.splitlines() if name in line) for name in ROWS}
    numbers = {name: re.findall(r"\d\.\d+", line) for name, line in lines.items()}
    assert numbers["compressed after training"][:2] == numbers["full tables"][:2]
    assert numbers["trained compressed"][:2] != numbers["full tables"][:2]

    full, fitted = (RunDir(tmp_path / "runs" / name) for name in ("full_s0", "hashed_fitted_s0"))
    assert (full.checkpoints / "best").is_dir()
    best = full.read_summary().best
    records = [json.loads(line) for line in (fitted.path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 0
    assert records[0]["quality/test_log_loss"] == pytest.approx(best["test_log_loss"], abs=1e-6)
    assert fitted.read_summary().best["validation_log_loss"] <= best["validation_log_loss"] + 1e-6


def test_a_source_that_is_no_trained_run_is_refused(tmp_path, capsys):
    _, compressed = configs(tmp_path)
    with pytest.raises(SystemExit):
        main([compressed, compressed, *SHARED, "--output", str(tmp_path / "runs"), "--jobs", "1"])
    assert "holds no full tables" in capsys.readouterr().err
