"""torchx components: the same training job on a laptop, on Slurm and on Kubernetes.

    torchx run -s local_cwd ./launch/components.py:baseline --config configs/criteo_kaggle_sharded.toml \
        data.criteo.path=train.tsv
    torchx run -s local_cwd ./launch/components.py:compressed embedding.compression=1000
    torchx run -s slurm --dryrun ./launch/components.py:baseline --j 4x8

`baseline` and `compressed` differ in their default config only. The config is checked before anything is submitted.
"""

import os
from pathlib import Path

import torchx.specs as specs
from torchx.components import dist

from configs.load import load_config
from recsys.registry import CHOICES

_ROOT = Path(__file__).resolve().parent.parent


def baseline(
    *overrides: str,
    config: str = "configs/criteo_kaggle_sharded.toml",
    j: str = "",
    image: str = "",
    h: str = "",
    gpu: int = 0,
    memMB: int = 16384,
    max_retries: int = 0,
) -> specs.AppDef:
    """DLRM with full tables, sharded over the ranks by TorchRec.

    Args:
        overrides: section.key=value, laid over the config's values
        config: path of the config; its keys are listed by `python -m launch.train --help`
        j: nodes x ranks per node; default: parallelism.world_size ranks on one node
        image: image that holds the project and its packages, for schedulers that use images
        h: a registered named resource, instead of gpu and memMB
        gpu: GPUs per node; default: one a rank where run.device is cuda
        memMB: memory per node in MB
        max_retries: times a failed job is started again; it continues from its newest checkpoint
    """
    return _train_job(overrides, config, j, image, h, gpu, memMB, max_retries)


def compressed(
    *overrides: str,
    config: str = "configs/criteo_kaggle_robe.toml",
    j: str = "",
    image: str = "",
    h: str = "",
    gpu: int = 0,
    memMB: int = 16384,
    max_retries: int = 0,
) -> specs.AppDef:
    """The same DLRM with its tables replaced by a shared array, data-parallel or on one device.

    Args:
        overrides: section.key=value, laid over the config's values
        config: path of the config; its keys are listed by `python -m launch.train --help`
        j: nodes x ranks per node; default: parallelism.world_size ranks on one node
        image: image that holds the project and its packages, for schedulers that use images
        h: a registered named resource, instead of gpu and memMB
        gpu: GPUs per node; default: one a rank where run.device is cuda
        memMB: memory per node in MB
        max_retries: times a failed job is started again; it continues from its newest checkpoint
    """
    return _train_job(overrides, config, j, image, h, gpu, memMB, max_retries)


def _train_job(
    overrides: tuple[str, ...], config: str, j: str, image: str, h: str, gpu: int, memMB: int, max_retries: int
) -> specs.AppDef:
    nodes, ranks_per_node = _layout(j)
    if j:
        overrides = (*overrides, f"parallelism.world_size={nodes * ranks_per_node}")
    checked = load_config(config, overrides, CHOICES)
    if not j:
        ranks_per_node = checked.parallelism.world_size
    threads = checked.parallelism.threads_per_rank
    return dist.ddp(
        config,
        *overrides,
        m="launch.train",
        name=checked.run.name.replace("_", "-").replace(".", "-"),
        image=image or os.environ.get("PSS_BENCH_IMAGE", str(_ROOT)),
        h=h or None,
        cpu=threads * ranks_per_node,
        gpu=gpu or (ranks_per_node if checked.run.device == "cuda" else 0),
        memMB=memMB,
        j=f"{nodes}x{ranks_per_node}",
        max_retries=max_retries,
        env={
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted gloo ranks call stale addresses
        },
    )


def _layout(j: str) -> tuple[int, int]:
    if not j:
        return 1, 1
    nodes, x, ranks = j.partition("x")
    if not x or not nodes.isdecimal() or not ranks.isdecimal() or 0 in (int(nodes), int(ranks)):
        raise ValueError(f"j = {j!r}: must be nodes x ranks per node, such as 1x2")
    return int(nodes), int(ranks)
