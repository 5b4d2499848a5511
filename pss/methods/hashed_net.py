"""HashedNet: every single element of every table is read from a hashed place of one array M, with a hashed sign.

Chen, Wilson, Tyree, Weinberger and Chen 2015, "Compressing Neural Networks with the Hashing Trick", equations 3 and 7:

    E_t[row][col] = ξ(t, row, col) · M[h(t, row, col)],     ξ = ±1 if `signed`, else 1

which the PSS paper (section 2.3) takes for ROBE-Z with Z = 1; here it is that module with one element a block. `key`
says what is hashed: the row by a hash of the column's own (that is ROBE with Z = 1), or the element's place in the
flattened table, row·d + col, by one hash for all columns, as HashedNets does with the index of a weight.

Departure: the table enters the hash, since all tables share M (HashedNets has an array per layer).
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from pss.hashing import HashFamilyName
from pss.kernels.collection import KernelOptions
from pss.method import EmbeddingMethod, EmbeddingRequest, parse_options
from pss.methods.robe import MemorySize, RobeArguments, RobeEmbeddingBagCollection


class Options(KernelOptions):
    """Options of HashedNet."""

    key: Literal["row_and_column", "flattened"] = Field(default="flattened")
    """What is hashed: the row, by a hash of each column's own, or row · embedding_dim + column."""
    signed: bool = True
    """Multiply every element by a hashed sign, as the paper does to keep inner products unbiased."""
    hash_family: HashFamilyName = "independent"
    """See [embedding.robe]."""


class HashedNetArguments(Options, MemorySize):
    """Options of the class."""


class HashedNetEmbeddingBagCollection(RobeEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` whose elements share the one parameter `memory` (|M|,) fp32.

    Raises what `RobeEmbeddingBagCollection` raises.
    """

    OPTIONS = HashedNetArguments

    @classmethod
    def _parse_options(cls, values: Mapping[str, Any]) -> RobeArguments:
        own = parse_options(HashedNetArguments, values)
        same = {name: value for name, value in own if name != "key"}
        return RobeArguments(block_size=1, flattened=own.key == "flattened", **same)


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> HashedNetEmbeddingBagCollection:
    """Return the module that is asked for: any compression down to one parameter in all can be had."""
    return HashedNetEmbeddingBagCollection.build("hashed_net", tables, options, request)


def cell(module: HashedNetEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return E_t[row][col] by the formula above, in plain Python integers. Raises IndexError outside the table."""
    dim, options = module.check_cell(table, row, col).embedding_dim, module.options
    block, chunk = (row * dim + col, 0) if options.flattened else (row, col)
    place = module.location_hash.location(table, block, chunk, module.memory_size)
    sign = 1 - 2 * module.sign_hash.location(table, block, chunk, 2) if options.signed else 1
    return sign * module.memory[place].item()


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell)
