"""Models around a few small tables, and batches for them."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from configs.schema import ModelSection
from pss.method import EmbeddingRequest
from recsys.embedding.registry import METHODS
from recsys.embedding.tables import build_tables
from recsys.models.registry import MODELS, build_model

CPU = torch.device("cpu")
FEATURES, SIZES, DIM, NUM_DENSE = ("a", "b", "c", "d"), (5, 40, 9, 300), 3, 2

VARIANTS = {name: (name, {}) for name in MODELS} | {
    "dlrm": ("dlrm", {"bottom_mlp": (5,), "top_mlp": (4, 3)}),
    "dlrm_projection": ("dlrm", {"interaction": "projection", "projection_mlp": (5,), "projection_rows": (2, 3)}),
    "dlrm_dcn": ("dlrm", {"interaction": "dcn", "cross_layers": 2, "cross_rank": 2}),
    "dcn": ("dcn", {"cross_layers": 2, "top_mlp": (4, 3)}),
    "autoint": ("autoint", {"attention_layers": 2, "heads": 2, "head_dim": 5, "top_mlp": (4,)}),
    "autoint_alone": ("autoint", {"top_mlp": ()}),
    "deepfm": ("deepfm", {"top_mlp": (4, 3)}),
    "xdeepfm": ("xdeepfm", {"feature_maps": (3, 2), "top_mlp": (4,)}),
    "fibinet": ("fibinet", {"reduction_ratio": 2, "top_mlp": (4,)}),
    "fibinet_each": ("fibinet", {"bilinear": "each"}),
    "fibinet_all": ("fibinet", {"bilinear": "all"}),
}
"""Every registered architecture, by its defaults where nothing else is given, and every form an option gives it."""


def tables_of(architecture, dim=DIM):
    return build_tables(FEATURES, SIZES, dim, first_order=MODELS[architecture].FIRST_ORDER)


def build_around(embedding, variant, *, dim=DIM, num_dense=NUM_DENSE, seed=0):
    architecture, options = VARIANTS[variant]
    section = ModelSection(
        architecture=architecture, embedding_dim=dim, options=MODELS[architecture].Options(**options)
    )
    return build_model(section, embedding, num_dense=num_dense, seed=seed, device=CPU)


def build_toy(variant, method="full", *, num_dense=NUM_DENSE, seed=0, init_scale=0.8):
    embedding = METHODS[method].build(
        tables_of(VARIANTS[variant][0]), METHODS[method].Options(), EmbeddingRequest(init_scale=init_scale, seed=seed)
    )
    return build_around(embedding, variant, num_dense=num_dense, seed=seed)


def dense_parameters(model):
    return {name: p for name, p in model.named_parameters() if "embedding_bag_collection" not in name}


def random_batch(batch_size, *, seed=0, num_dense=NUM_DENSE):
    """(dense (B, S), ids (F, B), labels (B,)): one id a bag."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch_size, num_dense, generator=generator)
    ids = torch.stack([torch.randint(0, rows, (batch_size,), generator=generator) for rows in SIZES])
    return dense, ids, torch.randint(0, 2, (batch_size,), generator=generator).float()


def one_id_a_bag(ids):
    """(F, B) int64 -> KeyedJaggedTensor."""
    return KeyedJaggedTensor(list(FEATURES), ids.reshape(-1), lengths=torch.ones(ids.numel(), dtype=torch.int64))
