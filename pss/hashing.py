"""Hash families: which of `slots` places block i, chunk j of table t starts at.

All are functions of (t, i, j) and a seed alone; nothing is stored but the seed. Constants come out of the
seed through splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").

- `independent` (default): an own hash for every table and chunk,

      x = mix64(i + K_t)        y = x · A_j        location = (y >> 32) · slots >> 32

  in unsigned 64-bit arithmetic, K_t random, A_j random and odd (multiply-shift, Dietzfelbinger et al. 1997, of an
  already mixed word). For slots > 2^31 the last step is (mix64(y) >> 1) mod slots. No slot is favoured by more than
  slots / 2^32. Ids up to 2^63 - 1 are told apart.

- `affine`: the hash of the ROBE paper (Desai et al. 2022, arXiv:2108.02191; the PSS paper's h(i, j) with tables),

      location = ((a · i + b · j + c · t + e) mod P) mod slots,   P = 2038074743 (the authors' prime)

  kept for reproduction. Its trap: `a` is the same for every chunk, so two ids that meet in chunk 0 tend to meet in
  all of them and share their whole embedding: 35 % of 384,615 ids at 1 MB, Z = 16, d = 64 (mean of 100 hashes, 0 to
  99 %), where `independent` has none. It cannot tell i from i + P, nor address more than P slots (ValueError).

- `authors`: the same as the ROBE authors' code has it, which tells tables apart by numbering all their rows through:

      location = (((i + rows of the tables before t) · R3 + j · R2 + R1) mod P) mod slots

`locate` computes locations for tensors; `HashFamily.location` is the same function in plain Python integers, which
cannot overflow: the oracle of the tests. Any int64 is a valid block, negative ones too: ids are not validated here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(x: int) -> int:
    """Apply the finaliser of splitmix64, a bijection of 64-bit words; x is taken mod 2^64."""
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


class HashConstants(NamedTuple):
    """What `locate` needs of a hash for one group of features. Integers are signed 64-bit."""

    family: str
    multiplier: int  # a of the affine family, 0 otherwise
    table_keys: list[int]  # of the table that serves each feature of the group
    chunk_keys: list[int]  # of each chunk of a row


class HashFamily(ABC):
    """A hash h(t, i, j) into [0, slots), given by `seed` (any int, taken mod 2^64)."""

    name: ClassVar[str]
    max_slots: ClassVar[int]

    def __init__(self, seed: int, num_embeddings: Sequence[int] = ()) -> None:
        """num_embeddings: rows of every table, which the `authors` family needs."""
        self.seed = seed
        self.offsets = [0, *accumulate(num_embeddings)]

    def constants(self, tables: list[int], chunks: int) -> HashConstants:
        """Return what `locate` needs for features served by `tables` whose rows have `chunks` chunks."""
        table_keys = [_signed(self._table_key(table)) for table in tables]
        chunk_keys = [_signed(self._chunk_key(chunk)) for chunk in range(chunks)]
        return HashConstants(self.name, self._multiplier(), table_keys, chunk_keys)

    def check_slots(self, slots: int) -> None:
        """Raise ValueError if this family cannot reach `slots` places."""
        if slots > self.max_slots:
            raise ValueError(f"hash_family {self.name!r} reaches {self.max_slots} slots at most, not {slots}")

    @abstractmethod
    def location(self, table: int, block: int, chunk: int, slots: int) -> int:
        """Return h(table, block, chunk) in [0, slots), in plain Python integers."""

    @abstractmethod
    def _multiplier(self) -> int: ...

    @abstractmethod
    def _table_key(self, table: int) -> int: ...

    @abstractmethod
    def _chunk_key(self, chunk: int) -> int: ...

    def _draw(self, stream: int, index: int) -> int:
        """Return the index-th random 64-bit word of a stream of this seed."""
        return mix64(mix64(mix64(self.seed) + stream * _GOLDEN) + (index + 1) * _GOLDEN)


class IndependentHash(HashFamily):
    """An own hash for every table and chunk: the default. See the module's docstring."""

    name = "independent"
    max_slots = 1 << 62

    def location(self, table: int, block: int, chunk: int, slots: int) -> int:
        y = mix64(block + self._table_key(table)) * self._chunk_key(chunk) & _MASK
        return (y >> 32) * slots >> 32 if slots <= 1 << 31 else (mix64(y) >> 1) % slots

    def _multiplier(self) -> int:
        return 0

    def _table_key(self, table: int) -> int:
        return self._draw(1, table)

    def _chunk_key(self, chunk: int) -> int:
        return self._draw(2, chunk) | 1


class AffineHash(HashFamily):
    """The hash of the ROBE paper, for reproduction: chunks are correlated. See the module's docstring."""

    name = "affine"
    max_slots = PRIME = 2038074743

    def location(self, table: int, block: int, chunk: int, slots: int) -> int:
        a, b, c, e = (self._coefficient(k) for k in range(4))
        return (a * block + b * chunk + c * table + e) % self.PRIME % slots

    def _coefficient(self, index: int) -> int:
        """Return a, b, c and e for index 0 to 3, in [1, P)."""
        return 1 + self._draw(3, index) % (self.PRIME - 1)

    def _multiplier(self) -> int:
        return self._coefficient(0)

    def _table_key(self, table: int) -> int:
        return (self._coefficient(2) * table + self._coefficient(3)) % self.PRIME

    def _chunk_key(self, chunk: int) -> int:
        return self._coefficient(1) * chunk % self.PRIME


class AuthorsHash(AffineHash):
    """The address map of the ROBE authors' code: all rows in one table. R3, R2, R1 are a, b, e of the affine hash."""

    name = "authors"

    def location(self, table: int, block: int, chunk: int, slots: int) -> int:
        r3, r2, r1 = (self._coefficient(k) for k in (0, 1, 3))
        return ((block + self.offsets[table]) * r3 + chunk * r2 + r1) % self.PRIME % slots

    def _table_key(self, table: int) -> int:
        return (self._coefficient(0) * self.offsets[table] + self._coefficient(3)) % self.PRIME


HASH_FAMILIES: dict[str, type[HashFamily]] = {
    family.name: family for family in (IndependentHash, AffineHash, AuthorsHash)
}
HashFamilyName = Literal["independent", "affine", "authors"]


def build_hash(family: str, seed: int, num_embeddings: Sequence[int] = ()) -> HashFamily:
    """Return the family of that name with that seed; num_embeddings: rows of every table. Raises ValueError for an
    unknown name."""
    if family not in HASH_FAMILIES:
        raise ValueError(f"hash_family {family!r} is unknown: known are {sorted(HASH_FAMILIES)}")
    return HASH_FAMILIES[family](seed, num_embeddings)


def locate(blocks: Tensor, feature: Tensor, constants: HashConstants, slots: int) -> Tensor:
    """Compute h(t, i, j) for every chunk j of every block.

    blocks (...) int64, any value; feature int64, broadcastable to blocks: position of each block's feature in the
    group that `constants` describe. Returns (..., chunks) int64 in [0, slots). TorchScript compiles it.
    """
    device = blocks.device
    table_keys = torch.tensor(constants.table_keys, dtype=torch.int64, device=device)[feature]
    chunk_keys = torch.tensor(constants.chunk_keys, dtype=torch.int64, device=device)
    if constants.family != "independent":
        prime = 2038074743
        base = (blocks.remainder(prime) * constants.multiplier + table_keys) % prime  # below 2^63: factors below 2^31
        return (base.unsqueeze(-1) + chunk_keys).remainder_(prime).remainder_(slots)
    word = _mix64(blocks + table_keys).unsqueeze(-1) * chunk_keys
    if slots > 2147483648:
        return _shift_right(_mix64(word), 1).remainder_(slots)
    return word.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).mul_(slots).bitwise_right_shift_(32)


def _mix64(x: Tensor) -> Tensor:
    """Apply `mix64` on int64, whose sum and product wrap around: the same 64 bits."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 - 2^64
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB - 2^64
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: int64 shifts in copies of the sign, which the mask takes out again."""
    return torch.bitwise_right_shift(x, bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Return the int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word
