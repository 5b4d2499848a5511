"""Computes what generated rows are made of with the same bits on every machine.

Integers, and the IEEE 754 operations + - * / sqrt, round the same way everywhere. log, exp and power do not: numpy
picks an implementation by processor, and they differ in the last bit. So the few that generating needs are written here
with the exact operations only, accurate to about 1e-13 (relative), applied element by element and in a fixed order.
"""

import hashlib

import numpy as np

_LN2 = 0.6931471805599453
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads consecutive integers
_MIX = np.uint64(0xD6E8FEB86659FD93)
_ROUND = np.uint64(0x9FB21C651E98DF25)
_LOW_32 = np.uint64(0xFFFFFFFF)


def random_keys(seed: int, purpose: str, count: int) -> np.ndarray:
    """Return `count` 64-bit keys, (count,) uint64, for one named purpose of one seed: SHAKE-256 of both."""
    digest = hashlib.shake_256(f"{seed}/{purpose}".encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def unit_interval(keys: np.ndarray) -> np.ndarray:
    """Return 64-bit keys as float64 in [0, 1), by their top 53 bits."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(values: np.ndarray, keys: np.ndarray | np.uint64) -> np.ndarray:
    """Return 64 well-mixed bits, uint64, for each of the integers (any shape); a bijection per key.

    Keys are broadcast against the integers. x = v·φ + key, then three rounds of x ^= x >> 32 with an odd multiplication
    between them.
    """
    x = values.view(np.uint64) * _GOLDEN + keys
    shifted = np.empty_like(x)
    for _ in range(2):
        x ^= np.right_shift(x, 32, out=shifted)
        x *= _MIX
    x ^= np.right_shift(x, 32, out=shifted)
    return x


def draw(mixed: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return (K, n) uint64, an independent draw per key, of (n,) mixed uint64 and (K,) keys; a bijection per key."""
    x = mixed ^ keys[:, None]
    x *= _ROUND
    x ^= x >> np.uint64(29)
    x *= _ROUND
    x ^= x >> np.uint64(32)
    return x


def halves(draws: np.ndarray) -> np.ndarray:
    """Return the halves of (K, n) uint64 as 32-bit uniforms (2K, n) int64: the high ones, then the low ones."""
    num_draws, n = draws.shape
    out = np.empty((2 * num_draws, n), np.uint64)
    np.right_shift(draws, np.uint64(32), out=out[:num_draws])
    np.bitwise_and(draws, _LOW_32, out=out[num_draws:])
    return out.view(np.int64)


def log(x: np.ndarray) -> np.ndarray:
    """Return ln x of positive float64.

    x = m·2^e with m in [√½, √2), and ln m = 2·atanh((m − 1) / (m + 1)) by its series.
    """
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2 * mantissa, mantissa)
    t = (mantissa - 1) / (mantissa + 1)
    square, series = t * t, np.zeros_like(t)
    for odd in range(25, 0, -2):
        series = series * square + 1 / odd
    return 2 * t * series + (exponent - low) * _LN2


def exp(x: np.ndarray) -> np.ndarray:
    """Return e^x of float64: x = k·ln 2 + r, e^r by its Taylor series, times 2^k."""
    k = np.rint(x / _LN2)
    rest, series = x - k * _LN2, np.ones_like(x)
    for i in range(14, 0, -1):
        series *= rest / i
        series += 1
    return np.ldexp(series, k.astype(np.int32))


def power(x: np.ndarray, a: float) -> np.ndarray:
    """Return x^a of positive float64."""
    return exp(a * log(x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + e^−x) of float64; beyond ±30 as at ±30, so that no probability is exactly 0 or 1."""
    return 1 / (1 + exp(-np.clip(x, -30, 30)))
