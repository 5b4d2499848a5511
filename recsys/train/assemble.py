"""A config put together: embedding, model, placement, optimizers. What training and the measuring of steps share."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.keyed import CombinedOptimizer

from configs.load import resolved
from configs.schema import RunConfig
from recsys.data.batches import TrainingBatches
from recsys.data.dataset import Dataset, count_ids
from recsys.embedding.hooks import find_hooks
from recsys.embedding.registry import METHODS, build_embedding
from recsys.embedding.sizes import count_full_parameters, count_parameters, state_tensors, stored_bytes
from recsys.embedding.tables import build_tables
from recsys.models.registry import MODELS, build_model
from recsys.runs.ranks import Ranks
from recsys.runs.summary import Parameters, RunFacts
from recsys.train.description import ModelSize, count_held_bytes, describe_run
from recsys.train.fit import start_from_trained
from recsys.train.optim import build_optimizers
from recsys.train.parallelism import apply_parallelism, unwrapped
from recsys.train.registry import CHOICES


class Assembly(NamedTuple):
    """model: placed on the ranks. facts: what is known of the run before it trains."""

    model: nn.Module
    optimizer: CombinedOptimizer
    facts: RunFacts


def plan_tables(
    config: RunConfig, dataset: Dataset
) -> tuple[list[EmbeddingBagConfig], Callable[[], Sequence[np.ndarray]]]:
    """The tables that the config's model looks up, and how often each of their ids occurs in training, counted once and
    only when asked for. First-order tables have the ids of the others, in the same order after them."""
    first_order = MODELS[config.model.architecture].FIRST_ORDER
    names, sizes = dataset.feature_names, dataset.num_embeddings
    tables = build_tables(names, sizes, config.model.embedding_dim, first_order=first_order)
    return tables, cache(lambda: count_ids(dataset) * (len(tables) // len(names)))


def assemble(config: RunConfig, dataset: Dataset, ranks: Ranks) -> Assembly:
    """The model of the config on the ranks of the process group, and its optimizers. Collective."""
    method, seed, device = METHODS[config.embedding.method], config.run.seed, ranks.device
    tables, id_counts = plan_tables(config, dataset)
    embedding = build_embedding(config.embedding, tables, seed=seed, device=device, id_counts=id_counts)
    model = build_model(config.model, embedding, num_dense=len(dataset.dense_names), seed=seed, device=device)
    embedding_parameters, embedding_stored_bytes = count_parameters(embedding), stored_bytes(embedding)
    parameters = Parameters(
        dense=count_parameters(model) - embedding_parameters,
        embedding=embedding_parameters,
        embedding_full=count_full_parameters(tables),
    )
    if config.embedding.fit_to:
        source, sections = Path(config.embedding.fit_to), resolved(config, CHOICES)
        error = start_from_trained(source, sections, model, embedding, tables, id_counts)
        if ranks.is_first:
            print(f"tables fitted to those of {source}: relative error {error:.4f}", flush=True)
    prefix = next(name for name, module in model.named_modules() if module is embedding)
    embedding_names = [f"{prefix}.{name}" for name in state_tensors(embedding)]

    model = apply_parallelism(
        model,
        method.placement,
        config.parallelism,
        config.optimizer,
        local_batch_size=config.training.global_batch_size // ranks.world_size,
        init_scale=config.embedding.init_scale,
        seed=seed,
        device=device,
    )
    optimizer = build_optimizers(model, embedding_names, config.optimizer)
    size = ModelSize(parameters, embedding_names, embedding_stored_bytes)
    held = count_held_bytes(model, optimizer, size, ranks)
    return Assembly(model, optimizer, describe_run(config, dataset, method.placement, size, held, ranks))


def build_batches(config: RunConfig, dataset: Dataset, ranks: Ranks) -> TrainingBatches:
    """The training batches of the config, this rank's share of each."""
    return TrainingBatches(
        dataset,
        global_batch_size=config.training.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle_window_rows=config.data.shuffle_window_rows,
        seed=config.run.seed,
        device=ranks.device,
    )


class TrainStep:
    """Forward, backward and update on this rank's share of a global batch; total_steps: of the whole training.

    What is random in a step, dropout, follows from seed, rank and step alone: a run that continues from a checkpoint
    draws what the uninterrupted one would have drawn.
    """

    def __init__(
        self, model: nn.Module, optimizer: CombinedOptimizer, total_steps: int, *, seed: int, ranks: Ranks
    ) -> None:
        self.model, self.optimizer, self.total_steps = model, optimizer, total_steps
        self.seed, self.ranks = seed, ranks
        self.embeddings = list(find_hooks(unwrapped(model)).values())
        self.loss = nn.BCEWithLogitsLoss()

    def __call__(self, batch: Batch, step: int) -> torch.Tensor:
        """step: counted from 1. Returns the mean log loss (), not yet waited for."""
        _seed_generators(self.ranks.device, (self.seed, self.ranks.rank, step))
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(1)
        loss = self.loss(logits, batch.labels)
        loss.backward()
        self.optimizer.step()
        for module in self.embeddings:
            module.end_step(step, self.total_steps)
        return loss.detach()


def _seed_generators(device: torch.device, words: tuple[int, ...]) -> None:
    """Of this process, as torch.manual_seed does, which takes 90 µs since it asks every kind of device."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
