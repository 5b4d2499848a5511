"""What is known of a run before it trains: its facts for the summary, its plan as a table, its identity."""

import io
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from configs.load import resolved
from configs.schema import RunConfig
from pss.method import MethodOptions
from recsys.data.dataset import Dataset
from recsys.runs.ranks import Ranks, gather
from recsys.runs.summary import BestPossible, BytesPerRank, Compression, Parameters, RunFacts
from recsys.train.optim import embedding_state_bytes, local_bytes
from recsys.train.parallelism import unwrapped
from recsys.train.registry import CHOICES


@dataclass(frozen=True)
class ModelSize:
    """What the model as built holds. embedding_names: of its embedding's parameters and persistent buffers.

    embedding_stored_bytes: of all that must be kept to look up; the actual compression is over it.
    """

    parameters: Parameters
    embedding_names: Sequence[str]
    embedding_stored_bytes: int


def describe_run(
    config: RunConfig, dataset: Dataset, placement: str, size: ModelSize, held: BytesPerRank, ranks: Ranks
) -> RunFacts:
    """Return what was chosen and built: the constant part of summary.json. held: see `count_held_bytes`."""
    best = dataset.best_possible()
    return RunFacts(
        name=config.run.name,
        architecture=config.model.architecture,
        method=config.embedding.method,
        placement=placement,
        sharding=config.parallelism.sharding if placement == "shard" else None,
        dataset=config.data.dataset,
        data_fingerprint=dataset.fingerprint(),
        seed=config.run.seed,
        device=ranks.device.type,
        world_size=ranks.world_size,
        threads_per_rank=config.parallelism.threads_per_rank,
        global_batch_size=config.training.global_batch_size,
        train_rows=dataset.num_rows("train"),
        test_rows=dataset.num_rows("test"),
        best_possible=best and BestPossible(auc=best.auc, log_loss=best.log_loss, base_rate=best.base_rate),
        parameters=size.parameters,
        compression=Compression(
            target=config.embedding.compression,
            actual=4 * size.parameters.embedding_full / size.embedding_stored_bytes,
        ),
        embedding_stored_bytes=size.embedding_stored_bytes,
        bytes_per_rank=held,
    )


def count_held_bytes(model: nn.Module, optimizer: CombinedOptimizer, size: ModelSize, ranks: Ranks) -> BytesPerRank:
    """Return the bytes that each rank really holds of a placed model and its optimizer's state. Collective."""
    return BytesPerRank(
        embedding=gather(embedding_bytes(model, size.embedding_names), ranks),
        embedding_optimizer=gather(embedding_state_bytes(optimizer, size.embedding_names), ranks),
        dense=4 * size.parameters.dense,
    )


def embedding_bytes(model: nn.Module, embedding_names: Iterable[str]) -> int:
    """Bytes this rank holds of the named parameters and buffers."""
    state = unwrapped(model).state_dict()
    return local_bytes(state[name] for name in embedding_names)


def identity(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """Return all that must agree for a checkpoint to be continued.

    World size and sharding need not, nor where the data lie, nor options of a method that say how and not what it
    computes (`EXECUTION_ONLY` of its Options): none of them changes what a stored parameter means.
    """
    tables = resolved(config, CHOICES)
    options = config.embedding.options
    if isinstance(options, MethodOptions):
        _drop_keys(tables["embedding"][config.embedding.method], options.EXECUTION_ONLY)
    data = tables["data"]
    _drop_keys(data, _PLACES)
    _drop_keys(data[config.data.dataset], _PLACES)
    return {
        "data": data | {"fingerprint": dataset.fingerprint()},
        **{section: tables[section] for section in ("model", "embedding", "optimizer")},
        "run": {"seed": config.run.seed},
        "training": {"global_batch_size": config.training.global_batch_size},
    }


_PLACES = {"cache_dir", "path"}
"""Keys of [data] and of a dataset that say where files lie; what is in them has a fingerprint."""


def _drop_keys(table: dict[str, Any], keys: Set[str]) -> None:
    for key in keys & table.keys():
        del table[key]


def format_plan(rows: Sequence[Mapping[str, Any]], ranks: Ranks) -> str:
    """Table -> sharding, kernel, and bytes on every rank, as text."""
    table = Table(title="Placement of the embeddings", title_justify="left")
    for column in ("table", "sharding", "kernel"):
        table.add_column(column)
    for rank in range(ranks.world_size):
        table.add_column(f"rank {rank} bytes", justify="right")
    for row in rows:
        held = row["bytes_per_rank"]
        cells = (f"{held[rank]:,}" if rank in held else "" for rank in range(ranks.world_size))
        table.add_row(row["table"], row["sharding"], row["kernel"], *cells)
    table.add_section()
    totals = [sum(row["bytes_per_rank"].get(rank, 0) for row in rows) for rank in range(ranks.world_size)]
    table.add_row("total", "", "", *(f"{total:,}" for total in totals))
    text = io.StringIO()
    Console(file=text, width=60 + 22 * ranks.world_size).print(table)
    return text.getvalue()
