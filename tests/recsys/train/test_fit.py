"""What a method makes of trained tables, and which sources are refused."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.method import EmbeddingRequest
from recsys.embedding.hooks import hooks_of
from recsys.embedding.registry import METHODS
from recsys.embedding.tables import build_tables
from recsys.train.fit import start_from_trained
from tests.test_contract import build as build_method

TABLES = build_tables(["a", "b"], [30, 50], 8)
COUNTS = [60 // (1 + np.arange(table.num_embeddings)) for table in TABLES]
IDS = KeyedJaggedTensor(
    ["a", "b"], torch.cat([torch.arange(50) % 30, torch.arange(50)]), lengths=torch.ones(100, dtype=torch.int64)
)


def trained_tables():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(table.num_embeddings, 8, generator=generator) for table in TABLES]


def error(module, full):
    """Share of the table's squared norm that is lost, rows weighed by how often they occur, by the lookup."""
    rows, weights = full[1], torch.from_numpy(COUNTS[1] + 1e-3).unsqueeze(1)
    values = module(IDS).values().detach()[:, 8:]
    return float((weights * (values - rows).square()).sum() / (weights * rows.square()).sum())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_fitted_or_refuses(method):
    module = build_method(method, TABLES)
    full = trained_tables()
    before = module.state_dict()
    try:
        reached = hooks_of(module).fit(full, lambda: COUNTS)
    except ValueError as refused:
        if "cannot be fitted" in str(refused) or "there is no fit" in str(refused):
            return
        raise
    assert 0 <= reached < 1
    assert error(module, full) < 0.98, "no better than zeros"
    assert before.keys() == module.state_dict().keys()


def test_frequent_rows_are_fitted_best():
    options = METHODS["robe"].Options()
    module = METHODS["robe"].build(TABLES, options, EmbeddingRequest(compression=4))
    full = trained_tables()
    hooks_of(module).fit(full, lambda: COUNTS)
    losses = (module(IDS).values()[:, 8:] - full[1]).square().mean(1)
    assert losses[:3].mean() < 0.5 * losses[20:].mean()


def test_a_directory_without_a_kept_evaluation_is_refused(tmp_path):
    module = build_method("robe", TABLES)
    with pytest.raises(ValueError, match=r"train with checkpoint\.keep_best"):
        start_from_trained(tmp_path, {}, module, module, TABLES, lambda: COUNTS)


def test_a_run_on_other_data_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "config.toml").write_text('[data]\ndataset = "criteo"\n[model]\nembedding_dim = 8\n')
    module = build_method("robe", TABLES)
    sections = {"data": {"dataset": "movielens", "cache_dir": "x"}, "model": {"embedding_dim": 8}}
    with pytest.raises(ValueError, match=r"was trained with data.dataset = 'criteo', this run has 'movielens'"):
        start_from_trained(tmp_path, sections, module, module, TABLES, lambda: COUNTS)
