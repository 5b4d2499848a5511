"""How many rows k a sketch M = S E needs, E (n, d), S (k, n) random: Theorems 4, 6 and 7 of the PSS paper, in numbers.

The paper (Desai and Shrivastava 2022, section 2.1) gives k up to a constant. Here is a k that suffices, under three
inequalities; each states which S it holds for. Entries of S have mean 0 and variance 1/k and are independent (of the
sparse S: signs 4-wise, places pairwise). |M| = k·d. The map from M back to the table costs a seed where S is hashed.

Lemma. A subspace of R^n of dimension d with orthonormal basis U is embedded within ε if A = UᵀSᵀSU - I has ‖A‖ ≤ ε:
all inner products in it are kept, |⟨Su, Sv⟩ - ⟨u, v⟩| ≤ ε‖u‖‖v‖. This has probability at least 1 - δ for

- `Net`: k ≥ (d ln 9 + ln(2/δ)) / (t²/4 - t³/6), t = c·ε, c = 0.876953125; S Gaussian or Achlioptas.
  ‖Sx‖² of one vector is within t‖x‖² but for probability 2 exp(-k(t²/4 - t³/6)), t ≤ 1 (Dasgupta and Gupta 2003, Lemma
  2.2, for Gaussian entries; Achlioptas 2003, Theorem 1.1, for 0 and ± √(3/k)). The sphere of R^d has a γ-net of
  (1 + 2/γ)^d points (Vershynin 2010, "Introduction to the non-asymptotic analysis of random matrices", Lemma 5.2): 9^d
  for γ = 1/4, the paper's number. Let v be A's eigenvector of eigenvalue ± ‖A‖, and x = v cos θ + z sin θ a net point
  within γ of it, z ⊥ v: |xᵀAx| ≥ ‖A‖ (cos² θ - sin² θ), since vᵀAz = 0. As cos θ ≥ 1 - γ²/2, that is ≥ c‖A‖ with
  c = 2(1 - γ²/2)² - 1. So norms in the net within t = c·ε do, and no pairs are needed. The best γ saves 1 %.

- `SingularValues`: k ≥ ((√d + √(2 ln(2/δ))) / (√(1 + ε) - 1))²; S Gaussian.
  The singular values of SU are within 1 ± η, η = √(d/k) + √(2 ln(2/δ)/k), with probability 1 - δ (Davidson and Szarek
  2001, Theorem II.13; Vershynin 2010, Corollary 5.35), so ‖A‖ ≤ 2η + η².

- `SecondMoment`: k ≥ d(d + 1) / (δε²); every S named here with signs, down to one non-zero a column.
  E(⟨Su, Sv⟩ - ⟨u, v⟩)² ≤ (1 + ⟨u, v⟩²)/k for unit u and v: equal with entries of kurtosis 3 (Gaussian, Achlioptas),
  less with columns of unit length (sparse, hashing). Over all pairs out of U it is E‖A‖²_F ≤ d(d + 1)/k; then Markov.
  For one non-zero a column this is Meng and Mahoney 2013, "Low-distortion subspace embeddings in input-sparsity time",
  Theorem 1. Sparse S with s ~ 1/ε non-zeros need far less (Kane and Nelson 2014), by constants nobody states.

Macro (Theorem 6) is the lemma for the columns of E:

    |⟨Mx, My⟩ - ⟨Ex, Ey⟩| ≤ ε‖Ex‖‖Ey‖ ≤ ε σ_max(E)² ‖x‖‖y‖

Departure: Definition 2 as printed has ε‖x‖‖y‖ on the right, which no k can promise for all E: the left side grows with
the square of E's scale. We read it relative to σ_max(E)².

Micro (Theorem 7) is the lemma for the columns of E and one e_i, of dimension d + 1, within ρε, for each of the m rows
with ρ(i) = ‖E[i]‖/σ_max(E) > ρ at δ/m: |⟨(Se_i)ᵀM, x⟩ - ⟨E[i], x⟩| ≤ ρε‖Ex‖ ≤ ρε σ_max(E)‖x‖ ≤ ε‖E[i]‖‖x‖. The squares
of all importances add up to ‖E‖²_F/σ_max(E)² ≤ d, so m ≤ d/ρ², which replaces the paper's n where it is smaller.
`SecondMoment` needs only ‖Uᵀ(SᵀS - I)e_i‖, whose expected square is ≤ (d + 1)/k: k ≥ m(d + 1)/(δρ²ε²). That is true of
ROBE with signs too, linear in vec(E) though no S: at an address of E[i] each other number lies with probability at most
1/(|M| - Z + 1), under signs that cancel in the mean, so the expected square of the row's error is at most
d‖E‖²_F/(|M| - Z + 1): k = (|M| - Z + 1)/d. Without signs collisions add up, and nothing is promised.

What the theorems do not say: storing the at most d/ρ² important rows as they are takes fewer numbers than Theorem 7
allows, and the d × d factor R of E = QR keeps every ⟨Ex, Ey⟩ exactly. A sketch earns its place by needing neither E nor
a list of which rows matter: it can be learned.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

SMALLEST = 1e-9  # of ε, δ and ρ: their products stay far from the end of float64
_GAMMA = 1 / 4
_NET_POINTS = 1 + 2 / _GAMMA
_NET_LOSS = 2 * (1 - _GAMMA**2 / 2) ** 2 - 1


class Bound(ABC):
    """One inequality, read both ways: k that suffices for ε, and ε that is promised at k. See the module's docstring.

    dim: d; eps: ε and delta: δ and rho: ρ in (0, 1), rho = 1 too; important: m, the number of rows to be kept.
    Arguments out of range raise ValueError with name and value.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    sketches: ClassVar[frozenset[str]]  # whose macro and micro error it bounds
    micro_only: ClassVar[frozenset[str]] = frozenset()  # whose micro error it bounds

    def macro_rows(self, dim: int, eps: float, delta: float) -> int:
        """Return the least k of this inequality for macro (ε, δ)."""
        check_range(dim=dim, eps=eps, delta=delta)
        return math.ceil(self._rows(dim, eps, delta))

    def macro_eps(self, dim: int, rows: float, delta: float) -> float:
        """Return the least ε of this inequality at k = rows; inf where it promises nothing."""
        check_range(dim=dim, rows=rows, delta=delta)
        return self._eps(dim, rows, delta)

    def micro_rows(self, dim: int, eps: float, delta: float, rho: float, important: int) -> int:
        """Return the least k of this inequality for micro (ε, δ, ρ)."""
        check_range(dim=dim, eps=eps, delta=delta, rho=rho, important=important)
        return math.ceil(self._rows(dim + 1, rho * eps, delta / important))

    def micro_eps(self, dim: int, rows: float, delta: float, rho: float, important: int) -> float:
        """Return the least ε of this inequality for the rows above ρ at k = rows; inf where it promises nothing."""
        check_range(dim=dim, rows=rows, delta=delta, rho=rho, important=important)
        return self._eps(dim + 1, rows, delta / important) / rho

    @abstractmethod
    def _rows(self, dim: int, eps: float, delta: float) -> float: ...

    @abstractmethod
    def _eps(self, dim: int, rows: float, delta: float) -> float: ...


class Net(Bound):
    """A 1/4-net of 9^d points and the tail of one norm: the paper's own argument."""

    name = "net of 9^d points"
    formula = "(d ln 9 + ln(2/δ)) / (t²/4 − t³/6), t = 0.877 ε"
    sketches = frozenset({"gaussian", "achlioptas"})

    def _rows(self, dim: int, eps: float, delta: float) -> float:
        return _net_exponent(dim, delta) / _tail(_NET_LOSS * eps)

    def _eps(self, dim: int, rows: float, delta: float) -> float:
        wanted = _net_exponent(dim, delta) / rows
        if wanted >= _tail(1.0):
            return math.inf
        third = 2 * math.asin(math.sqrt(12 * wanted)) / 3  # t³ - 1.5 t² + 6 · wanted = 0 by the cosine of a third
        return (math.sin(third / 2) ** 2 + math.sqrt(3 / 4) * math.sin(third)) / _NET_LOSS


class SingularValues(Bound):
    """The singular values of a Gaussian matrix."""

    name = "singular values"
    formula = "((√d + √(2 ln(2/δ))) / (√(1+ε) − 1))²"
    sketches = frozenset({"gaussian"})

    def _rows(self, dim: int, eps: float, delta: float) -> float:
        return ((math.sqrt(dim) + math.sqrt(2 * math.log(2 / delta))) / (eps / (math.sqrt(1 + eps) + 1))) ** 2

    def _eps(self, dim: int, rows: float, delta: float) -> float:
        eta = (math.sqrt(dim) + math.sqrt(2 * math.log(2 / delta))) / math.sqrt(rows)
        return eta * (2 + eta)


class SecondMoment(Bound):
    """Markov's inequality on the squared error: weak in δ, and true of the sparsest sketches."""

    name = "second moment"
    formula = "d(d+1) / (δε²)"
    sketches = frozenset({"gaussian", "achlioptas", "sparse", "hashing"})
    micro_only = frozenset({"robe"})

    def micro_rows(self, dim: int, eps: float, delta: float, rho: float, important: int) -> int:
        check_range(dim=dim, eps=eps, delta=delta, rho=rho, important=important)
        return math.ceil(important * (dim + 1) / (delta * (rho * eps) ** 2))

    def micro_eps(self, dim: int, rows: float, delta: float, rho: float, important: int) -> float:
        check_range(dim=dim, rows=rows, delta=delta, rho=rho, important=important)
        return math.sqrt(important * (dim + 1) / (delta * rows)) / rho

    def _rows(self, dim: int, eps: float, delta: float) -> float:
        return dim * (dim + 1) / (delta * eps**2)

    def _eps(self, dim: int, rows: float, delta: float) -> float:
        return math.sqrt(dim * (dim + 1) / (delta * rows))


BOUNDS: tuple[Bound, ...] = (SingularValues(), Net(), SecondMoment())


def pairwise_eps(eps: float) -> float:
    """Return ε² + 2ε: a micro (ε, δ, ρ) PSS keeps ⟨E[i], E[j]⟩ of important rows within that of ‖E[i]‖‖E[j]‖
    (Theorem 4)."""
    check_range(eps=eps)
    return eps * (eps + 2)


def importance(table: np.ndarray) -> np.ndarray:
    """Return ρ(i) = ‖E[i]‖/σ_max(E) of every row of a table (n, d): (n,) float64. Raises ValueError for a table of
    zeros."""
    spectral = np.linalg.norm(table.astype(np.float64), 2)
    if spectral == 0:
        raise ValueError("a table of zeros has no important rows")
    return np.linalg.norm(table.astype(np.float64), axis=1) / spectral


def count_important(num_embeddings: int, dim: int, rho: float) -> int:
    """Return the most rows of importance above ρ that any table of that size can have: min(n, d/ρ²)."""
    check_range(num_embeddings=num_embeddings, dim=dim, rho=rho)
    return min(num_embeddings, math.floor(dim / rho**2 * (1 + 1e-12)))  # 0.1² in binary is above 0.01


def check_range(**values: float) -> None:
    """Raise ValueError with the name of a value out of range: eps and delta in (0, 1), rho in (0, 1], others ≥ 1.

    Names are those of the arguments here and on the command line."""
    for name, value in values.items():
        if name in ("eps", "delta", "rho"):
            if not SMALLEST <= value <= 1 or (value == 1 and name != "rho"):
                end = "1]" if name == "rho" else "1)"
                raise ValueError(f"{name} must be in (0, {end} and at least {SMALLEST:g}, not {value:g}")
        elif not 1 <= value < 2**63:
            raise ValueError(f"{name} must be at least 1 and below 2^63, not {value}")


def _net_exponent(dim: int, delta: float) -> float:
    """ln(2 · 9^d / δ)."""
    return dim * math.log(_NET_POINTS) + math.log(2 / delta)


def _tail(t: float) -> float:
    """Exponent of the norm's tail per row of S; increasing on [0, 1]."""
    return t**2 * (1 / 4 - t / 6)
