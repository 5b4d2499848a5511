"""torchx components: the same jobs on a laptop, on Slurm and on Kubernetes (Volcano).

    torchx run -s local_cwd ./launch/components.py:baseline data.criteo.path=train.tsv
    torchx run -s slurm ./launch/components.py:compressed --j 2x8 --gpu 8 embedding.compression=1000
    torchx run -s kubernetes ./launch/components.py:compressed --image registry/pss-bench:1 \
        --mounts type=volume,src=claim,dst=/runs run.dir=/runs
    torchx run -s local_cwd ./launch/components.py:compare --runs runs/criteo_kaggle_sharded,runs/criteo_kaggle_robe

`baseline` and `compressed` differ in their default config only; `--dryrun` prints what would be submitted. The config
is checked before anything is. Each is one `torchrun` line, which runs as well without torchx:

    torchrun --nproc-per-node 2 -m launch.train configs/criteo_kaggle/sharded.toml data.criteo.path=train.tsv

`compare` is a job of its own, since torchx starts one job at a time and knows no order among jobs: submit it when the
runs have ended. A shell that stays open does that on every scheduler, a dependency without one on Slurm:

    torchx run -s slurm --wait ./launch/components.py:baseline &
    torchx run -s slurm --wait ./launch/components.py:compressed && wait $! && torchx run ... :compare --runs ...

    a=$(torchx run -s slurm ./launch/components.py:baseline)      # prints slurm://torchx/<job>
    b=$(torchx run -s slurm ./launch/components.py:compressed)
    sbatch --dependency=afterok:${a##*/}:${b##*/} --wrap "python -m launch.compare runs/..._sharded runs/..._robe"

Logs: of local_cwd under log_dir of .torchxconfig; of Slurm slurm-<job>-<role>-<node>.out and .err where the job was
submitted; of Kubernetes those of the pods. Slurm starts a failed job again after two minutes (--max_retries). What a
run leaves is in run.dir, which must be on a file system that all nodes share, and in Kubernetes on a volume
(--mounts).
"""

import torchx.specs as specs

from launch.runners.train_job import JobOptions, build_train_job, check_at_least, choose_image, parse_mounts


def baseline(
    *overrides: str,
    config: str = "configs/criteo_kaggle/sharded.toml",
    j: str = "",
    image: str = "",
    h: str = "",
    gpu: int = 0,
    memMB: int = 16384,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: str = "",
) -> specs.AppDef:
    """Train a DLRM with full tables, sharded over the ranks by TorchRec.

    Args:
        overrides: section.key=value, laid over the config's values
        config: path of the config; its keys are listed by `python -m launch.train --help`
        j: nodes x ranks per node; default: parallelism.world_size ranks on one node
        image: image that holds the project and its packages, for schedulers that use images
        h: a registered named resource, instead of gpu and memMB
        gpu: GPUs per node; default: one a rank where run.device is cuda
        memMB: memory per node in MB
        max_retries: times a failed job is started again; it continues from its newest checkpoint
        rdzv_port: port where several nodes meet; jobs that may share a node need different ones
        mounts: type=volume,src=<claim>,dst=<path> and the like, for schedulers that use images
    """
    options = JobOptions(image, h, gpu, memMB, max_retries, mounts)
    return build_train_job(config, overrides, options, j, rdzv_port)


def compressed(
    *overrides: str,
    config: str = "configs/criteo_kaggle/robe.toml",
    j: str = "",
    image: str = "",
    h: str = "",
    gpu: int = 0,
    memMB: int = 16384,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: str = "",
) -> specs.AppDef:
    """Train the same DLRM with its tables replaced by a shared array, data-parallel or on one device.

    Args:
        overrides: section.key=value, laid over the config's values
        config: path of the config; its keys are listed by `python -m launch.train --help`
        j: nodes x ranks per node; default: parallelism.world_size ranks on one node
        image: image that holds the project and its packages, for schedulers that use images
        h: a registered named resource, instead of gpu and memMB
        gpu: GPUs per node; default: one a rank where run.device is cuda
        memMB: memory per node in MB
        max_retries: times a failed job is started again; it continues from its newest checkpoint
        rdzv_port: port where several nodes meet; jobs that may share a node need different ones
        mounts: type=volume,src=<claim>,dst=<path> and the like, for schedulers that use images
    """
    options = JobOptions(image, h, gpu, memMB, max_retries, mounts)
    return build_train_job(config, overrides, options, j, rdzv_port)


def compare(
    runs: str,
    output: str = ".",
    image: str = "",
    memMB: int = 2048,
    mounts: str = "",
) -> specs.AppDef:
    """Compare finished runs, from their directories: a table and a report page.

    Args:
        runs: run directories, separated by commas, such as runs/a,runs/b
        output: directory of the page, report.html
        image: image that holds the project and its packages, for schedulers that use images
        memMB: memory in MB
        mounts: type=volume,src=<claim>,dst=<path> and the like, for schedulers that use images
    """
    directories = runs.split(",")
    if not all(directories):
        raise ValueError(f"runs = {runs!r}: must be run directories, separated by commas")
    check_at_least(1, memMB=memMB)
    role = specs.Role(
        name="compare",
        image=choose_image(image),
        entrypoint="python",
        args=["-m", "launch.compare", *directories, "--output", output],
        env={"OMP_NUM_THREADS": "1"},
        resource=specs.resource(cpu=1, gpu=0, memMB=memMB),
        mounts=specs.parse_mounts(parse_mounts(mounts)),
    )
    return specs.AppDef(name="compare", roles=[role])
