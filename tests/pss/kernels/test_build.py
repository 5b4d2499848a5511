"""The C++ kernels are built once, whoever asks first, and missed by nobody who cannot build them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pss.kernels import robe_bags

ROOT = Path(__file__).parents[3]

SCRIPT = """
import warnings
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from pss.kernels import robe_bags
from pss.methods.robe import RobeEmbeddingBagCollection
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        module = RobeEmbeddingBagCollection([EmbeddingBagConfig(name="a", num_embeddings=9, embedding_dim=4,
                                             feature_names=["a"])], memory_size=20, block_size=2)
    module(KeyedJaggedTensor(["a"], torch.tensor([1, 2]), lengths=torch.tensor([2, 0]))).values().sum().backward()
print(robe_bags.is_available("cpu"), [str(w.message) for w in caught if "kernels" in str(w.message)])
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PSS_BENCH_KERNELS": "off"}, "False []"),
        ({"CXX": "no-such-compiler"}, "could not be built ([Errno 2] No such file or directory: 'no-such-compiler')"),
        ({"CXX": "false"}, "could not be built (false ended with 1"),
    ],
)
def test_without_kernels_it_is_plain_pytorch_with_one_warning(environment: dict, expected: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PSS_BENCH_CACHE": str(tmp_path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert done.stdout.count("several times slower") == (0 if "off" in environment.values() else 1)
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(not robe_bags.is_available("cpu"), reason="no C++ compiler")
def test_of_two_processes_one_builds(tmp_path: Path):
    """The other waits, and loads what it finds."""
    environment = {**os.environ, "PSS_BENCH_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in ended] == ["True []"] * 2
    assert sum(errors.count("built the C++ kernels in") for _, errors in ended) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1
