"""Run a function on several gloo ranks of this machine and get back what each returned."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 150


def _run_rank(rank: int, world_size: int, store: str, pipe: Connection, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        pipe.send((True, fn(rank, world_size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` spawned gloo ranks of one thread each -> their results, by rank.

    `fn` must be a module-level function and its results picklable (tensors travel as numpy). Raises AssertionError
    with the traceback of the first rank that failed or timed out.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        pipes, processes = [], []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(rank, world_size, store, send, fn, args), daemon=True)
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            results = []
            for rank, pipe in enumerate(pipes):
                assert pipe.poll(TIMEOUT_S), f"rank {rank} gave no answer within {TIMEOUT_S} s"
                ok, result = pipe.recv()
                assert ok, f"rank {rank} failed:\n{result}"
                results.append(result)
            return results
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
