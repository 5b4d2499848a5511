"""How many rows the small tables of a method get, out of a budget over all tables: exact, in Python integers.

`divide_rows` shares a budget out among tables. The other functions lay out one table of quotient-remainder embeddings,
see pss.methods.quotient_remainder for its terms.
"""

import math
import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

PIECES = ("concat", "chunked")
"""Ways to combine in which a row of every partition is a piece of the row, not as long as it."""


class Partitions(NamedTuple):
    """How one table is stored; lists are by partition p."""

    rows: list[int]  # m_p
    starts: list[int]  # where M_p begins in memory
    strides: list[int]  # m_1 · … · m_{p-1}: q_p = i // stride
    is_hashed: list[bool]  # r_p = h_p(i // last stride) mod m_p instead of q_p mod m_p
    is_stored: list[bool]  # otherwise the table is stored whole and M_p stands for a factor 1, a summand 0


def divide_rows(
    weights: Sequence[float], least: Sequence[int], most: Sequence[int], row_sizes: Sequence[int], budget: int
) -> list[int]:
    """How many rows of row_sizes[t] parameters each table t gets out of a budget of parameters.

    rows[t] = ⌊c · weights[t]⌋, at least least[t] and at most most[t], for the greatest c with Σ rows · row_sizes ≤
    budget; what is left goes, a row each, to the greatest remainders of c · weights. So what stays unused is less than
    one row, unless every table has its most. Where `least` is more than the budget, the result is `least`.
    """
    tables = range(len(weights))

    def rows_at(level: float) -> list[int]:
        return [min(max(int(level * weights[t]), least[t]), most[t]) for t in tables]

    def left_of(rows: list[int]) -> int:
        return budget - sum(rows[t] * row_sizes[t] for t in tables)

    low, high = 0.0, 2 * max((most[t] / weights[t] for t in tables), default=0.0)
    if left_of(list(most)) >= 0:
        return list(most)
    if left_of(list(least)) < 0:
        return list(least)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if left_of(rows_at(middle)) >= 0 else (low, middle)
    rows = rows_at(low)
    left = left_of(rows)
    for t in sorted(tables, key=lambda t: (-(low * weights[t] % 1), -most[t])):
        if row_sizes[t] <= left and rows[t] == int(low * weights[t]) < most[t]:
            rows[t] += 1
            left -= row_sizes[t]
    return rows


def split_evenly(total: int, parts: int) -> list[int]:
    """Integers that sum to total, the largest first, the smallest at most one less."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def row_widths(combine: str, partitions: int, embedding_dim: int) -> list[int]:
    """Elements of one row of each partition."""
    return split_evenly(embedding_dim, partitions) if combine in PIECES else [embedding_dim] * partitions


def smallest_radices(partitions: int, num_embeddings: int) -> list[int]:
    """The integers with the smallest sum, the largest first, whose product is num_embeddings or more."""
    low, high = partitions - 1, partitions - 1 + num_embeddings  # sums: too small, large enough
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = math.prod(split_evenly(middle, partitions)) >= num_embeddings
        low, high = (low, middle) if is_enough else (middle, high)
    return split_evenly(high, partitions)


def largest_first(widths: list[int], num_embeddings: int, budget: int) -> list[int]:
    """Radices with a product of num_embeddings or more, the first as large as a budget of parameters allows."""

    def radices(first: int) -> list[int]:
        return [first, *smallest_radices(len(widths) - 1, -(-num_embeddings // first))]

    low, high = smallest_radices(len(widths), num_embeddings)[0], num_embeddings
    while high - low > 1:
        middle = (low + high) // 2
        is_within = count_parameters(radices(middle), widths) <= budget
        low, high = (middle, high) if is_within else (low, middle)
    return radices(low)


def count_parameters(rows: list[int], widths: list[int]) -> int:
    return sum(m * width for m, width in zip(rows, widths, strict=True))


def count_enough_rows(combine: str, widths: list[int], num_embeddings: int) -> int:
    """c_t: the fewest rows of d with which every id has a combination of its own, or is stored by itself."""
    if combine == "chunked":
        return num_embeddings
    row_size = sum(widths) if combine in PIECES else widths[0]
    parameters = count_parameters(smallest_radices(len(widths), num_embeddings), widths)
    return min(num_embeddings, -(-parameters // row_size))


def place_partitions(
    combine: str, widths: list[int], num_embeddings: int, table_rows: int, start: int
) -> tuple[Partitions, int]:
    """How a table is stored in R_t = table_rows rows of d, at most num_embeddings, from `start` on; where it ends."""
    k, is_whole = len(widths), table_rows == num_embeddings
    strides, is_hashed, is_stored = [1] * k, [False] * k, [True] * k
    if combine == "chunked":
        rows, is_hashed = [table_rows] * k, [not is_whole] * k
    elif combine in PIECES and (left := table_rows * sum(widths) - num_embeddings * widths[0]) >= sum(widths[1:]):
        rows = [num_embeddings] + [left // sum(widths[1:])] * (k - 1)
    elif is_whole:
        rows, is_stored = [num_embeddings] + [1] * (k - 1), [True] + [False] * (k - 1)
    else:
        rows = [table_rows] * k if combine in PIECES else split_evenly(table_rows, k)
        is_hashed[-1] = math.prod(rows) < num_embeddings
        if not is_hashed[-1]:
            rows = largest_first(widths, num_embeddings, count_parameters(rows, widths))
        strides = [min(stride, num_embeddings) for stride in accumulate([1, *rows[:-1]], operator.mul)]
    sizes = [m * width if stored else 0 for m, width, stored in zip(rows, widths, is_stored, strict=True)]
    *starts, end = accumulate(sizes, initial=start)
    starts = [at if stored else start for at, stored in zip(starts, is_stored, strict=True)]
    return Partitions(rows, starts, strides, is_hashed, is_stored), end
