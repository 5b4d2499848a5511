"""Quantised tables: full tables while they train, then rows of 16 to 2 bits a value.

A row x of d values becomes d codes of `bits` bits, a scale s and a bias b, packed by FBGEMM's row-wise ops:

    E_t[i][j] = s · code[j] + b      code[j] = round((x[j] - b) / s)      b = min x      s = (max x - b) / (2^bits - 1)

with s and b in fp32 (8 bits) or fp16 (4 and 2 bits); 16 bits are plain fp16 values, without scale and bias. It is the
uniform quantisation by range of Guan et al. 2019, "Post-training 4-bit quantization on embedding tables",
arXiv:1911.02079. A value is off by s / 2 at most, and by what rounding s and b to fp16 adds. Codes fill whole units of
4 bytes (8 bits) or 2 bytes: shorter rows are filled up with copies of their last value, which are counted.

When rows are quantised (option `when`):

- "after": training reads and updates the fp32 tables, `eval()` looks up quantised rows.
- "during": training reads the quantised rows too, and the gradient goes to the fp32 rows as if those had been read: the
  straight-through estimator of Jacob et al. 2018, "Quantization and training of neural networks for efficient
  integer-arithmetic-only inference". What trains and is in checkpoints is the fp32 rows: steps smaller than half a
  scale, nearly all of them, would be lost on the codes, and gather there.

Both ways every evaluation is of the model at the promised size, `stored_bytes`: that of the packed rows. And both train
full tables with the optimizer's state for all of them: memory is saved after training only. In eval mode rows have no
gradient.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import fbgemm_gpu  # noqa: F401  (registers the ops)
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from baselines.trained_tables import TrainedTablesEmbeddingBagCollection
from pss.method import CompressionRefused, EmbeddingMethod, EmbeddingRequest, MethodOptions

_BITS = (16, 8, 4, 2)


class Options(MethodOptions):
    """Options of quantisation."""

    bits: Literal[16, 8, 4, 2, "auto"] = "auto"
    """Bits of a value: 16 = fp16, 8, 4 and 2 = codes by row; auto = the most that reach the compression."""
    when: Literal["after", "during"] = "after"
    """after = train in fp32 and evaluate quantised rows, during = read quantised rows in training too
    (quantisation-aware); the tables that train are fp32 either way."""


class QuantizedEmbeddingBagCollection(TrainedTablesEmbeddingBagCollection):
    """A drop-in for TorchRec's `EmbeddingBagCollection` with quantised rows; see the module's docstring.

    Besides what the base class raises: ValueError for bits that make rows larger than in fp32, CompressionRefused where
    the bits do not reach the compression.
    """

    OPTIONS = Options
    DEFAULT_COMPRESSION = 1.0
    options: Options

    def _lay_out(self, compression: float, id_counts: Sequence[np.ndarray] | None) -> None:
        super()._lay_out(compression, id_counts)
        self.parameter_budget(compression)  # checks it
        bits, tables = self.options.bits, self.embedding_bag_configs()
        sizes = {choice: self._packed_bytes(choice) for choice in _BITS if bits in (choice, "auto")}
        reached = Fraction(4 * self._full_parameters, min(sizes.values())) if tables else Fraction(compression)
        if reached < 1:
            raise ValueError(f"bits = {bits}: with scale and bias the rows of these tables are larger than in fp32")
        if reached < Fraction(compression):
            raise CompressionRefused(f"quantized with bits = {bits}", compression, float(reached))
        budget_bytes = 4 * self._full_parameters / Fraction(compression)
        self.bits = next(choice for choice, size in sizes.items() if size <= budget_bytes)

    def stored_bytes(self) -> int:
        """Return the bytes of the packed rows, scales and biases included."""
        return self._packed_bytes(self.bits)

    def _packed_bytes(self, bits: int) -> int:
        tables = self.embedding_bag_configs()
        return sum(table.num_embeddings * row_bytes(table.embedding_dim, bits) for table in tables)

    def _make_smaller(self) -> dict[int, Tensor]:
        return {dim: quantize(self.weight(dim), self.bits) for dim in self.dims}

    def _rows(self, group: int, ids: Tensor, feature: Tensor) -> Tensor:
        dim, stacked = self._groups[group].embedding_dim, self._stacked(group, ids, feature)
        if not self.training:
            return dequantize(self.smaller(dim)[stacked], dim, self.bits)
        rows = F.embedding(stacked, self.weight(dim))
        if self.options.when == "after":
            return rows
        read = dequantize(quantize(rows.detach(), self.bits), dim, self.bits)
        return read + (rows - rows.detach())  # the values of `read`, to the bit, with the gradient of `rows`

    def _identity(self) -> dict[str, int | str | bool]:
        return {"bits": self.bits, "when": self.options.when}


def _filled_columns(dim: int, bits: int) -> int:
    """Return columns that fill whole units of what FBGEMM packs on every device."""
    unit = {8: 4, 4: 4, 2: 8}[bits]
    return -(-dim // unit) * unit


def row_bytes(dim: int, bits: int) -> int:
    """Return the bytes of a packed row: codes, scale and bias."""
    if bits == 16:
        return 2 * dim
    return _filled_columns(dim, bits) * bits // 8 + (8 if bits == 8 else 4)


@torch.fx.wrap
def quantize(rows: Tensor, bits: int) -> Tensor:
    """Pack rows (..., dim) fp32 into (..., row_bytes) uint8."""
    if bits == 16:
        return rows.half().view(torch.uint8)
    filled = _filled_columns(rows.shape[-1], bits)
    flat = rows.flatten(0, -2)
    flat = torch.cat([flat, flat[:, -1:].expand(-1, filled - flat.shape[1])], dim=1) if filled > flat.shape[1] else flat
    if bits == 8:
        packed = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(flat)
    else:
        packed = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(flat, bits)
    return packed.unflatten(0, rows.shape[:-1])


@torch.fx.wrap
def dequantize(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Unpack rows (..., row_bytes) uint8 into (..., dim) fp32."""
    if bits == 16:
        return packed.view(torch.float16).float()
    if bits == 8:
        rows = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(packed.flatten(0, -2))
    else:
        rows = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed.flatten(0, -2), bits)
    return rows[:, :dim].unflatten(0, packed.shape[:-1])


def build(
    tables: list[EmbeddingBagConfig], options: Options, request: EmbeddingRequest
) -> QuantizedEmbeddingBagCollection:
    """Return the module that is asked for. Raises CompressionRefused where rows of these bits are larger than the
    budget."""
    return QuantizedEmbeddingBagCollection.build("quantized", tables, options, request)


def cell(module: QuantizedEmbeddingBagCollection, table: int, row: int, col: int) -> float:
    """Return what the module's mode reads: the trained value, or s · code + b of the packed row.

    Decoded in plain Python. Raises IndexError outside the table."""
    config = module.check_cell(table, row, col)
    row, weight = module.first_rows[table] + row, module.weight(config.embedding_dim).detach()
    if not module.training:
        packed = module.smaller(config.embedding_dim)[row]
    elif module.options.when == "during":
        packed = quantize(weight[row : row + 1], module.bits)[0]
    else:
        return weight[row, col].item()
    return decode(bytes(packed.tolist()), col, module.bits)


def decode(packed: bytes, col: int, bits: int) -> float:
    """Return one value of a packed row, little-endian: the first code in a byte's lowest bits, scale and bias last."""
    if bits == 16:
        return struct.unpack_from("<e", packed, 2 * col)[0]
    if bits == 8:
        scale, bias = struct.unpack("<2f", packed[-8:])
        return scale * packed[col] + bias
    scale, bias = struct.unpack("<2e", packed[-4:])
    return scale * (packed[col * bits // 8] >> col * bits % 8 & (1 << bits) - 1) + bias


METHOD = EmbeddingMethod(Options=Options, build=build, cell=cell, stores_every_row=True)
