"""HashedNet: every single element of every table is read from a hashed place of one array M, with a hashed sign.

Chen, Wilson, Tyree, Weinberger and Chen 2015, "Compressing Neural Networks with the Hashing Trick", equations 3 and 7:

    E_t[row][col] = ξ(t, row, col) · M[h(t, row, col)],     ξ = ±1 if `signed`, else 1

which the PSS paper (section 2.3) takes for ROBE-Z with Z = 1; here it is that module with one element a block. `key`
says what is hashed: the row by a hash of the column's own (that is ROBE with Z = 1), or the element's place in the
flattened table, row·d + col, by one hash for all columns, as HashedNets does with the index of a weight.

Departure: the table enters the hash, since all tables share M (HashedNets has an array per layer).
"""

from typing import Literal

import torch
from pydantic import Field
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from configs.request import EmbeddingRequest
from pss.hashing import HashFamilyName
from pss.kernel_lookup import KernelOptions
from pss.methods.robe import RobeEmbeddingBagCollection

placement: Literal["replicate", "shard"] = "replicate"


class Options(KernelOptions):
    """Keys of [embedding.hashed_net]."""

    key: Literal["row_and_column", "flattened"] = Field(default="flattened")
    """What is hashed: the row, by a hash of each column's own, or row · embedding_dim + column."""
    signed: bool = True
    """Multiply every element by a hashed sign, as the paper does to keep inner products unbiased."""
    hash_family: HashFamilyName = "independent"
    """See [embedding.robe]."""


class HashedNetEmbeddingBagCollection(RobeEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose elements share the one parameter `memory` (|M|,) fp32.

    Args:
        key: "row_and_column" or "flattened".
        The others are those of `RobeEmbeddingBagCollection`.

    Raises ValueError for another key, and what `RobeEmbeddingBagCollection` raises.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
        *,
        compression: float = 1000.0,
        memory_size: int | None = None,
        key: str = "flattened",
        signed: bool = True,
        hash_family: str = "independent",
        gradient: str = "auto",
        kernel: str = "auto",
        fused_update: bool = False,
        seed: int = 0,
        init_scale: float = 0.01,
    ) -> None:
        if key not in ("row_and_column", "flattened"):
            raise ValueError(f"key {key!r} is unknown: known are ['flattened', 'row_and_column']")
        super().__init__(
            tables,
            is_weighted,
            device,
            compression=compression,
            memory_size=memory_size,
            block_size=1,
            hash_family=hash_family,
            signed=signed,
            flattened=key == "flattened",
            gradient=gradient,
            kernel=kernel,
            fused_update=fused_update,
            seed=seed,
            init_scale=init_scale,
        )


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> HashedNetEmbeddingBagCollection:
    """Any compression down to one parameter in all can be had."""
    module = HashedNetEmbeddingBagCollection(
        tables,
        **request.arguments(),
        **options.model_dump(),
    )
    request.check_reached("hashed_net", module.compression)
    return module


def cell(module: HashedNetEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """E_t[row][col] by the formula above, in plain Python integers. Raises IndexError outside the table."""
    dim = module.check_cell(table, row, col).embedding_dim
    block, chunk = (row * dim + col, 0) if module.flattened else (row, col)
    place = module.location_hash.location(table, block, chunk, module.memory_size)
    sign = 1 - 2 * module.sign_hash.location(table, block, chunk, 2) if module.signed else 1
    return sign * module.memory[place].item()
