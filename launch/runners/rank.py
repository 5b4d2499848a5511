"""One rank of a training run, from config to summary: data, model (`recsys.train.assemble`), trainer.

`launch.train` runs it in its process, `launch.runners.processes` in processes that stay for several runs.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from configs.load import dump_config, resolved
from configs.schema import RunConfig
from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED
from launch.runners.tracking import track_end, track_start
from recsys.data.dataset import Dataset
from recsys.data.registry import build_dataset
from recsys.runs.environment import describe_environment
from recsys.runs.ranks import Ranks, choose_device, process_group
from recsys.runs.run_directory import RunDir
from recsys.runs.summary import Failure
from recsys.train.assemble import assemble
from recsys.train.checkpoint import Checkpoints
from recsys.train.description import format_plan, identity
from recsys.train.heap import keep_freed_memory
from recsys.train.parallelism import describe_placement
from recsys.train.recorder import Recorder
from recsys.train.registry import CHOICES
from recsys.train.trainer import Trainer


class Interrupted(BaseException):
    """Raised where Ctrl-C is pressed or the launcher asks this rank to end."""


def train(config: RunConfig, dataset: Dataset, run_dir: RunDir, ranks: Ranks) -> str:
    """Build and train the model of the config on the ranks of the process group, and return why training ended."""
    assembly = assemble(config, dataset, ranks)
    facts = assembly.facts
    if ranks.is_first:
        plan = describe_placement(assembly.model, facts.placement, facts.bytes_per_rank.embedding[0])
        run_dir.write_plan(text := format_plan(plan, ranks))
        counts = facts.parameters
        print(f"{text}parameters: {counts.dense:,} dense, {counts.embedding:,} embedding", flush=True)
    checkpoints = Checkpoints(run_dir.checkpoints, identity(config, dataset), config.checkpoint.keep_last, ranks)
    recorder = Recorder(run_dir, enabled=ranks.is_first, tensorboard=config.logging.tensorboard)
    try:
        return Trainer(config, dataset, assembly, checkpoints, recorder, ranks).run()
    finally:
        recorder.close()


@record
def run_rank(config: RunConfig) -> None:
    """Run this rank from config to summary.

    The rank where something goes wrong leaves the failure in the run directory, and the exception passes on.
    """
    rank = int(os.environ.get("RANK", "0"))
    run_dir = RunDir(Path(config.run.dir) / config.run.name)
    device = choose_device(config.run.device)
    resume = config.checkpoint.resume == "auto"
    if device.type == "cpu":
        keep_freed_memory()
    held = run_dir.open_for_writing(overwrite=config.run.overwrite, resume=resume) if rank == 0 else nullcontext()
    with held, _record_failure(run_dir, rank):
        # Before the process group: building a cache may take longer than a collective may wait.
        dataset = build_dataset(config.data)
        dataset.check(config.training.target_auc)
        with process_group(config.parallelism, device) as ranks, _record_failure(run_dir, rank):
            if ranks.is_first:
                environment = describe_environment(device, ranks.world_size)
                run_dir.start(dump_config(config, CHOICES), environment, resume=resume)
                track_start(run_dir, resolved(config, CHOICES))
            reason = train(config, dataset, run_dir, ranks)
    if rank == 0:
        track_end(run_dir)
        print(f"{run_dir.path}: training ended ({reason})", flush=True)


@contextmanager
def _record_failure(run_dir: RunDir, rank: int) -> Iterator[None]:
    """Write a failure into the run's summary, and pass it on.

    It stands around the process group and within it: leaving the group may wait for ranks that no longer answer.
    """
    try:
        yield
    except Interrupted:
        run_dir.mark_ended("interrupted", Failure(rank=rank, message="interrupted"))
        raise
    except Exception as error:
        run_dir.mark_ended("failed", Failure(rank=rank, message=f"{type(error).__name__}: {error}"))
        raise


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Raise Interrupted, once: the handler of signals in processes that run a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: what follows must not be cut short
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def run_process(config: RunConfig) -> NoReturn:
    """Run this process's rank and end the process, whatever happens: with status 0, 1 or 130."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run_rank(config)
        _leave(0)
    except Interrupted:
        _leave(EXIT_INTERRUPTED)
    except Exception:
        traceback.print_exc()
        _leave(EXIT_FAILED)


def _leave(status: int) -> NoReturn:
    """End this process at once: all is written and closed.

    Taking the interpreter down, or only the exception and with it the model, could abort or wait for ever: libraries
    below keep threads beyond the process group, and a DistributedDataParallel that is the last to hold it joins its
    thread while both want the interpreter's lock (torch 2.13; both have been seen).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
