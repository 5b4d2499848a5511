"""Our definitions against HolisticTraceAnalysis, which reads traces of GPUs: made ones, and a real one where there is
a GPU."""

import json
import random

import pytest
import torch
from torch import nn

from recsys.profile.intervals import length
from recsys.profile.timing import collectives_by_step, join, time_rank
from recsys.profile.trace import read_trace
from recsys.profile.window import profile_steps
from recsys.runs.ranks import Ranks
from tests.recsys.profile.made_traces import annotation, event, launch, operator

hta = pytest.importorskip("hta.trace_analysis", reason="HolisticTraceAnalysis is not installed")
STREAMS = (("gemm", 7, 60, 200, 100), ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 20, 15, 500, 400))
"""Kernel, stream, how many, largest gap and largest duration in µs."""


def made_rank(rank, seed, path):
    """A step of kernels on two streams that overlap at random."""
    rng = random.Random(seed)
    events = [annotation("ProfilerStep#1", 0, 20_000), annotation("phase:step", 0, 20_000)]
    for name, stream, count, gap, longest in STREAMS:
        time = 100
        for _ in range(count):
            time += rng.randint(5, gap)
            end = time + rng.randint(5, longest)
            events.append(operator("aten::addmm", time - 60, time - 55))
            call, kernel = launch(name, time, end, launched_at=time - 58)
            kernel["args"] |= {"stream": stream, "device": rank, "context": 1}
            kernel |= {"pid": rank, "tid": stream}
            events += [call, kernel]
            time = end
    copy = event("Memcpy HtoD (Pageable -> Device)", 18_000, 18_100, 7, "gpu_memcpy")
    copy["args"] = {"stream": 7, "correlation": 999_999, "device": rank}
    header = {"schemaVersion": 1, "baseTimeNanoseconds": 0, "deviceProperties": [{"id": 0, "name": "made"}]}
    header["distributedInfo"] = {"rank": rank, "world_size": 2, "backend": "nccl"}
    path.write_text(json.dumps({**header, "traceEvents": [*events, copy]}))
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_computing_and_overlap_are_its(tmp_path, seed):
    for rank in range(2):
        made_rank(rank, 10 * seed + rank, tmp_path / f"rank_{rank}.json")
    analysis = hta.TraceAnalysis(trace_dir=str(tmp_path))
    breakdown = analysis.get_temporal_breakdown(visualize=False).set_index("rank")
    overlap = analysis.get_comm_comp_overlap(visualize=False).set_index("rank")
    for rank in range(2):
        trace = read_trace(tmp_path / f"rank_{rank}.json")
        timing = time_rank(trace, *join([collectives_by_step(trace)])[0])
        assert 1e3 * timing.compute_ms == pytest.approx(breakdown.loc[rank, "compute_time(us)"], rel=0.02)
        share = 100 * timing.overlap_ms / timing.comm_ms
        assert share == pytest.approx(overlap.loc[rank, "comp_comm_overlap_pctg"], rel=0.02)
        assert 0.1 < timing.overlap_ms / timing.comm_ms < 0.9, "there is something to tell apart"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_trace_of_a_gpu(tmp_path):
    device = torch.device("cuda", 0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(batch):
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()

    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        path = tmp_path / "rank_0.json"
        profile_steps(
            model, {"0": "bottom_mlp", "2": "top_mlp"}, Ranks(0, 1, device),
            load=lambda: torch.ones(4096, 512).to(device), train=train, num_steps=5, trace=path,
        )  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()
    found = hta.TraceAnalysis(trace_dir=str(tmp_path)).get_temporal_breakdown(visualize=False)
    assert length(read_trace(path).compute) == pytest.approx(found["compute_time(us)"][0], rel=0.02)
