"""Rounds: who is timed how often, on what, at how many threads."""

from types import SimpleNamespace

import pytest
import torch

from recsys.bench.kernel_timing import LEAST_ROUNDS, Clock, Task, Timing, build_task, run_rounds
from tests.recsys.bench.made_measurements import made

BATCHES = [SimpleNamespace(name=i) for i in range(4)]
CPU = torch.device("cpu")


def rounds_of(count, tasks=("a", "b", "c"), threads=(1, 2), rounds=6, seconds=1e9):
    calls = []

    def build(name):
        def run(batch):
            calls.append((name, torch.get_num_threads(), batch.name))
            return float(len(calls))

        return Task(name, "step", run)

    samples = run_rounds([build(n) for n in tasks], BATCHES, threads=threads, rounds=rounds, seconds=seconds, **count)
    return calls, samples


def test_everyone_is_timed_once_a_round_after_a_pass_that_is_not():
    calls, samples = rounds_of({})
    assert {threads: [len(ms) for ms in of] for threads, of in samples.items()} == {1: [6] * 3, 2: [6] * 3}
    assert len(calls) == (6 + 1) * 2 * 3 * 2  # a round of warming up; two thread counts, three tasks, two passes
    for (first, threads, batch), (second, threads_then, batch_then) in zip(calls[::2], calls[1::2], strict=True):
        assert (first, threads) == (second, threads_then)
        assert batch != batch_then
    timed = {ms for of in samples.values() for list_ in of for ms in list_}
    assert all(ms % 2 == 0 for ms in timed)  # the second passes
    assert min(timed) > 12  # none of the warming up


def test_a_round_is_on_one_batch_for_all_and_orders_differ():
    calls, _ = rounds_of({})
    by_round = [calls[i : i + 12] for i in range(0, len(calls), 12)]
    assert [{batch for _, _, batch in timed[1::2]} for timed in by_round] == [{3}, {0}, {1}, {2}, {3}, {0}, {1}]
    orders = {tuple(name for name, _, _ in timed[1:6:2]) for timed in by_round}
    assert len(orders) > 1


def test_threads_are_set_and_given_back():
    before = torch.get_num_threads()
    calls, _ = rounds_of({})
    assert [threads for _, threads, _ in calls[:12]] == [1] * 6 + [2] * 6
    assert torch.get_num_threads() == before


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds([Task("a", "step", fail)], BATCHES, threads=[before + 1], rounds=3, seconds=1)
    assert torch.get_num_threads() == before


def test_time_that_is_up_ends_the_rounds_but_not_before_the_least():
    _, samples = rounds_of({}, seconds=0)
    assert [len(ms) for ms in samples[1]] == [LEAST_ROUNDS] * 3


def test_medians_and_quartiles():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))


def test_figures_of_a_measurement():
    measurement = made(30.0)
    assert measurement.copy_gb_per_s == pytest.approx(2.0)  # a megabyte read and written in a millisecond
    assert measurement.ratio("robe_fused_sgd", "step", "tbe_sgd") == 0.3
    assert measurement.ratio("robe_fused_sgd", "forward", "tbe_sgd") is None
    assert measurement.ratio("robe_fused_sgd", "step", "collection_sgd") is None
    moved = 2 * (8 * 266_240 + 8 * (26 * 10_240 + 1) + 4 * 10_240 * 26 * 64) + 3 * 4 * 250_000 * 64
    assert measurement.bound_ms("tbe_sgd", "step") == pytest.approx(1e-6 * moved / 2)
    assert measurement.over_bound("tbe_sgd", "step") == pytest.approx(100 / (1e-6 * moved / 2))


def test_each_operation_times_what_it_says():
    calls = []
    weight = torch.ones(4, requires_grad=True)

    def clear():
        calls.append("clear")
        weight.grad = None

    lookup = SimpleNamespace(
        forward=lambda batch: calls.append(("forward", torch.is_grad_enabled())) or weight * 2,
        update=lambda: calls.append(("update", weight.grad.clone())),
        clear=clear,
    )
    for operation in ("forward", "backward", "step"):
        assert build_task("x", lookup, operation, torch.tensor([[1.0, 2, 3, 4]]), Clock(CPU)).run(None) > 0
    assert calls[:3] == [("forward", False), ("forward", True), "clear"]
    assert calls[3] == ("forward", True)
    assert calls[4][1].tolist() == [2, 4, 6, 8]
