"""A training run as a torchx job: one `torchrun` line, and what it asks of a scheduler."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torchx.specs as specs
from torchx.components import dist

from configs.load import load_config
from recsys.train.registry import CHOICES

DEFAULT_IMAGE = "pss-bench"


@dataclass(frozen=True)
class JobOptions:
    """Say what a job asks of its scheduler, under the names of the components' options (`launch.components`)."""

    image: str = ""
    h: str = ""
    gpu: int = 0
    memMB: int = 16384
    max_retries: int = 0
    mounts: str = ""


def build_train_job(
    config: str, overrides: Sequence[str], options: JobOptions, j: str = "", rdzv_port: int = 29500
) -> specs.AppDef:
    """Return the job that trains a config on its ranks.

    j: nodes x ranks per node, "" = parallelism.world_size ranks on one node. Raises ValueError naming the option.
    """
    check_at_least(0, gpu=options.gpu, max_retries=options.max_retries)
    check_at_least(1, memMB=options.memMB, rdzv_port=rdzv_port)
    nodes, ranks_per_node = _parse_layout(j)
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
        image=choose_image(options.image),
        h=options.h or None,
        cpu=threads * ranks_per_node,
        gpu=options.gpu or (ranks_per_node if checked.run.device == "cuda" else 0),
        memMB=options.memMB,
        j=f"{nodes}x{ranks_per_node}",
        max_retries=options.max_retries,
        rdzv_port=rdzv_port,
        mounts=parse_mounts(options.mounts),
        env={
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted gloo ranks call stale addresses
        },
    )


def choose_image(image: str) -> str:
    """Return the given image, else that of PSS_BENCH_IMAGE, else the default."""
    return image or os.environ.get("PSS_BENCH_IMAGE", DEFAULT_IMAGE)


def parse_mounts(mounts: str) -> list[str]:
    """Return the parts of "type=…,src=…,dst=…". Raises ValueError where they are no mounts."""
    options = mounts.split(",") if mounts else []
    try:
        specs.parse_mounts(options)
    except (KeyError, ValueError) as error:
        raise ValueError(f"mounts = {mounts!r}: must look like type=volume,src=x,dst=/y: {error}") from None
    return options


def check_at_least(least: int, **values: int) -> None:
    """Raise ValueError naming an option that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} = {value}: must be at least {least}")


def _parse_layout(j: str) -> tuple[int, int]:
    if not j:
        return 1, 1
    nodes, x, ranks = j.partition("x")
    if not x or not nodes.isdecimal() or not ranks.isdecimal() or 0 in (int(nodes), int(ranks)):
        raise ValueError(f"j = {j!r}: must be nodes x ranks per node, such as 1x2")
    return int(nodes), int(ranks)
