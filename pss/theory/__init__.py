"""The theory of parameter sharing as code: how large M must be, and what a sketch really does to a table.

`bounds` has the theorems of the PSS paper with their constants, `sketch_error` measures what they bound, `identical`
counts ids that a hash gives the same embedding. `commands` prints and plots them for a command line.
"""

from pss.theory.bounds import BOUNDS, Bound, count_important, importance, pairwise_eps
from pss.theory.sketch_error import sweep

__all__ = ["BOUNDS", "Bound", "count_important", "importance", "pairwise_eps", "sweep"]
