"""The exact functions against `math`, and their bits against another processor's."""

import math
import os
import subprocess
import sys

import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__

from recsys.data import exact

PRINT_DIGEST = """
import hashlib, numpy as np
from recsys.data import exact, synthetic_columns, synthetic_teacher
columns = synthetic_columns.Columns(synthetic_columns.KAGGLE_ID_COLUMNS, [5000 + 7 * f for f in range(26)], 1)
integers, ids = columns.draw(exact.mix(np.arange(20000), exact.random_keys(1, "rows", 1)))
terms = synthetic_teacher.Effects(columns, 1000.0, 1).terms(integers, ids)
quantiles = np.stack([c.quantiles(10**7) for c in columns.columns])
everything = integers, ids, quantiles, terms, exact.sigmoid(terms.astype(float)), exact.log(1.5 + ids)
print(hashlib.sha256(b"".join(x.tobytes() for x in everything)).hexdigest())
"""


def test_bits_do_not_depend_on_the_processor():
    """numpy's own exp and power fail this: without its AVX code they take another path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST],
            env={**environment, "NPY_DISABLE_CPU_FEATURES": disabled},
            capture_output=True,
            check=True,
        ).stdout
        for disabled in ("", " ".join(__cpu_dispatch__))
    }
    assert len(digests) == 1


def test_exact_functions_agree_with_math():
    x = np.concatenate([np.geomspace(1e-9, 1e9, 5001), [1.0, 0.5, 2.0]])
    np.testing.assert_allclose(exact.log(x), [math.log(v) for v in x], rtol=1e-14, atol=1e-16)
    for a in (-4.9, -0.04, 0.08, 1.2, 25.0):
        np.testing.assert_allclose(exact.power(x, a), [v**a for v in x], rtol=3e-13)
    z = np.linspace(-29, 29, 1001)
    np.testing.assert_allclose(exact.sigmoid(z), [1 / (1 + math.exp(-v)) for v in z], rtol=1e-14)
    assert 0 < exact.sigmoid(np.array([-1e9]))[0] < exact.sigmoid(np.array([1e9]))[0] < 1
