"""Reading profiles made by hand: every part of them is known."""

import pytest

from recsys.profile.intervals import length
from recsys.profile.trace import read_trace
from tests.recsys.profile.made_traces import annotation, event, gloo, launch, node, operator, write


def spans(found):
    return [tuple(span) for span in found.tolist()]


def test_a_profile_of_something_else_is_refused(tmp_path):
    path = write(tmp_path / "other.json", operator("aten::add", 0, 5))
    with pytest.raises(ValueError, match=r"other\.json holds no step"):
        read_trace(path)


def test_computing_is_operators_that_neither_are_nor_enclose_communication(tmp_path):
    path = write(
        tmp_path / "t.json",
        annotation("phase:step", 0, 100),
        operator("aten::linear", 0, 10),
        operator("aten::addmm", 2, 8),
        operator("All2All_Pooled_Req", 10, 30),  # starts a collective, and computes for a while
        operator("aten::cat", 12, 15),
        operator("c10d::alltoall_base_", 15, 28),
        operator("All2All_Pooled_Wait", 30, 60),  # waits for it, no operator inside says so
        operator("aten::split", 55, 58),
        node("MyFunctionBackward", 60, 90),
        operator("c10d::allreduce_", 70, 75),
        operator("aten::mul", 80, 85),
        event("aten::add", 0, 100, thread=99),  # not a thread of the step
    )
    assert spans(read_trace(path).compute) == [(0, 10), (12, 15), (55, 58), (80, 85)]


def test_collectives_have_their_bytes(tmp_path):
    path = write(
        tmp_path / "t.json",
        annotation("phase:step", 0, 100),
        gloo("all_to_all", 20, 40, dims=(6,), item="long int"),
        gloo("all_reduce", 5, 10, dims=(1024, 416)),
        event("gloo:all_gather", 50, 60, 2, "user_annotation", Input_Dims=[[[3], [4]]], Input_type=["c10::Half"]),
    )
    found = read_trace(path).collectives
    assert [(c.kind, c.start, c.bytes) for c in found] == [
        ("all_reduce", 5, 4 * 1024 * 416),
        ("all_to_all", 20, 48),
        ("all_gather", 50, 14),
    ]


def test_phases_fill_the_step(tmp_path):
    path = write(
        tmp_path / "t.json",
        annotation("phase:data_loading", -20, -5),
        annotation("phase:step", 0, 200),
        annotation("phase:bottom_mlp", 10, 20),
        operator("aten::addmm", 11, 19, sequence=5),
        annotation("phase:embedding_lookup", 20, 60),
        annotation("[output_dist]_[ebc]_[table_wise]", 40, 55),
        operator("aten::view", 41, 42, sequence=6),
        operator("aten::addmm", 43, 50, sequence=6),  # the last to show 6 makes node 6
        operator("aten::embedding_bag", 56, 58, sequence=7),
        annotation("phase:top_mlp", 60, 70),
        operator("aten::addmm", 61, 69, sequence=8),
        node("AddmmBackward0", 80, 90, sequence=8),
        node("torch::autograd::AccumulateGrad", 92, 95),
        node("EmbeddingBagBackward0", 95, 100, sequence=7),
        node("AddmmBackward0", 100, 110, sequence=6),
        node("AddmmBackward0", 112, 120, sequence=5),
        node("torch::autograd::AccumulateGrad", 120, 130),
        operator("c10d::allreduce_", 125, 128),
        gloo("all_reduce", 126, 150),
        annotation("Optimizer.step#SGD.step", 160, 190),
    )
    trace = read_trace(path)
    found = {name: spans(value) for name, value in trace.phases.items()}
    assert found == {
        "forward/bottom_mlp": [(10, 20)],
        "forward/embedding_lookup": [(20, 40), (55, 60)],
        "forward/output_distribution": [(40, 55)],
        "forward/top_mlp": [(60, 70)],
        "backward/top_mlp": [(80, 95)],
        "backward/embedding_lookup": [(95, 100)],
        "backward/output_distribution": [(100, 112)],
        "backward/bottom_mlp": [(112, 120)],
        "gradient_all_reduce": [(120, 160)],
        "optimizer": [(160, 190)],
        "other": [(0, 10), (70, 80), (190, 200)],
    }
    assert sum(length(value) for value in trace.phases.values()) == 200
    assert spans(trace.data_loading) == [(-20, -5)]


def test_without_a_collective_the_tail_of_the_backward_pass_stays_its_own(tmp_path):
    path = write(
        tmp_path / "t.json",
        annotation("phase:step", 0, 100),
        annotation("phase:top_mlp", 0, 10),
        operator("aten::addmm", 1, 9, sequence=1),
        node("AddmmBackward0", 20, 30, sequence=1),
        annotation("Optimizer.step#SGD.step", 40, 60),
    )
    assert spans(read_trace(path).phases["backward/top_mlp"]) == [(20, 40)]


def test_on_a_device_kernels_count_and_belong_to_the_phase_that_launched_them(tmp_path):
    nccl = {"Collective name": "allreduce", "In msg nelems": 1000, "dtype": "Float", "Process Group Name": "0"}
    exchange = {"Collective name": "all_to_allv", "In msg nelems": 10, "dtype": "Long"}
    path = write(
        tmp_path / "t.json",
        annotation("phase:step", 0, 100),
        annotation("phase:top_mlp", 0, 10),
        operator("aten::addmm", 1, 9, sequence=1),
        *launch("gemm", 5, 25, launched_at=2),
        *launch("relu", 30, 34, launched_at=5),  # while the exchange after it is on its way
        annotation("phase:output_distribution", 10, 15),
        *launch("ncclDevKernel_SendRecv(int)", 20, 40, launched_at=12, **exchange),
        node("AddmmBackward0", 20, 30, sequence=1),
        *launch("gemm", 45, 60, launched_at=22),
        *launch("ncclDevKernel_AllReduce_Sum_f32_RING_LL(int)", 50, 80, launched_at=25, **nccl),
        annotation("Optimizer.step#SGD.step", 31, 40),
        *launch("sgd", 85, 90, launched_at=33),
        event("Memcpy HtoD", 90, 99, 7, "gpu_memcpy"),
    )
    trace = read_trace(path)
    assert spans(trace.compute) == [(5, 25), (30, 34), (45, 60), (85, 90)]
    assert [(c.kind, c.group, c.bytes) for c in trace.collectives] == [
        ("all_to_all", "", 80),
        ("all_reduce", "0", 4000),
    ]
    assert {name: spans(value) for name, value in trace.phases.items()} == {
        "forward/top_mlp": [(0, 25), (30, 34)],
        "forward/output_distribution": [(25, 30), (34, 40)],
        "backward/top_mlp": [(40, 60)],
        "gradient_all_reduce": [(60, 80)],
        "optimizer": [(80, 90)],
        "other": [(90, 100)],
    }
