"""Collectives against a simulation of their messages, placements that lose nothing, steps and memory by hand."""

import heapq
from dataclasses import replace

import numpy as np
import pytest

from recsys.cost.cost_model import Cluster, CostModel, Link, array_size, lookup_bytes
from recsys.cost.machines import MACHINES, MODELS, Assumptions, Model
from recsys.cost.table_placement import DoesNotFit, Placement, place_tables, plan_tables, spread_tables

LINK = Link(3e-6, 2e-9)
SMALL = Model(name="small", rows=(1000, 10, 500, 300, 2000), embedding_dim=64, source="")
GB = 1e9
A100 = CostModel(MACHINES["a100"], Assumptions())


class Simulation:
    """Messages over full-duplex ports: a port sends one and receives one at a time, each for α + bytes·β."""

    def __init__(self) -> None:
        self.sending: dict[object, float] = {}
        self.receiving: dict[object, float] = {}
        self.end = 0.0
        self.sent: dict[object, float] = {}
        self.busy: dict[object, float] = {}

    def send(self, source, target, size, ready, link=LINK):
        """Return when it is there."""
        start = max(ready, self.sending.get(source, 0.0), self.receiving.get(target, 0.0))
        done = start + link.alpha_s + size * link.beta_s
        self.sending[source] = self.receiving[target] = done
        self.end = max(self.end, done)
        self.sent[source] = self.sent.get(source, 0.0) + size
        self.busy[source] = self.busy.get(source, 0.0) + link.alpha_s + size * link.beta_s
        return done

    @property
    def busiest(self) -> float:
        return max(self.busy.values(), default=0.0)


def simulate_ring(p, size, simulation, ready=0.0, port=lambda rank: rank, link=LINK):
    """p − 1 rounds of what p ranks pass on, with the numbers themselves: rank r ends with the sum of block r + 1."""
    values = np.random.default_rng(0).normal(size=(p, p))
    held, times = values.copy(), [ready] * p
    for step in range(p - 1):
        blocks = [(rank - step) % p for rank in range(p)]
        passed = [held[rank, blocks[rank]] for rank in range(p)]
        ends = [simulation.send(port(r), port((r + 1) % p), size / p, times[r], link) for r in range(p)]
        for rank in range(p):
            held[(rank + 1) % p, blocks[rank]] += passed[rank]
        times = [max(times[rank], ends[(rank - 1) % p]) for rank in range(p)]
    np.testing.assert_allclose(
        [held[r, (r + 1) % p] for r in range(p)], [values[:, (r + 1) % p].sum() for r in range(p)]
    )
    return max(times)


def simulate_pairwise(p, size, simulation):
    """In round k every rank sends its block to the rank k further on."""
    done = 0.0
    for k in range(1, p):
        done = max(simulation.send(rank, (rank + k) % p, size / p, done) for rank in range(p))
    return done


@pytest.mark.parametrize("p", range(1, 9))
def test_collectives_take_what_their_messages_take(p):
    size = 8e5
    for simulate in (simulate_ring, simulate_pairwise):
        simulation = Simulation()
        simulate(p, size, simulation)
        assert LINK.exchange_s(size, p) == pytest.approx(simulation.end)
        assert all(sent == pytest.approx(size * (p - 1) / p) for sent in simulation.sent.values())


@pytest.mark.parametrize("p", [1, 3, 5, 6, 7])
def test_all_reduce_is_two_rings(p):
    simulation = Simulation()
    simulate_ring(p, 8e5, simulation, ready=simulate_ring(p, 8e5, simulation))
    assert LINK.all_reduce_s(8e5, p) == pytest.approx(simulation.end)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_all_reduce_by_halving_and_doubling(p):
    """Partners 1, 2, 4 … apart exchange half of what they have left, then give it back in the opposite order."""
    simulation, done, size = Simulation(), 0.0, 8e5
    distances = [2**i for i in range(p.bit_length() - 1)]
    shares = [size / 2 ** (i + 1) for i in range(len(distances))]
    for distance, share in [*zip(distances, shares, strict=True), *zip(distances[::-1], shares[::-1], strict=True)]:
        done = max(simulation.send(rank, rank ^ distance, share, done) for rank in range(p))
    assert LINK.all_reduce_s(size, p) == pytest.approx(simulation.end)
    assert LINK.all_reduce_s(size, p) <= 2 * LINK.exchange_s(size, p) + 1e-15


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (6, 2), (6, 3), (8, 4), (4, 4), (8, 1)])
def test_collectives_of_a_cluster(ranks, per_node):
    cluster = Cluster(ranks, per_node, Link(1e-6, 1e-10), Link(5e-6, 1e-8))
    inside, between, size = Simulation(), Simulation(), 1.2e6
    times = {rank: [0.0, 0.0] for rank in range(ranks)}
    for k in range(1, ranks):
        for rank in range(ranks):
            target = (rank + k) % ranks
            is_inside = rank // per_node == target // per_node
            simulation, link = (inside, cluster.inside) if is_inside else (between, cluster.between)
            times[rank][is_inside] = simulation.send(rank, target, size / ranks, times[rank][is_inside], link)
    # The formula is the time that the busiest port is busy; the simulation's ports also wait for one another.
    busy = max(inside.busiest, between.busiest)
    assert cluster.all_to_all_s(size) == pytest.approx(busy)
    assert busy <= max(inside.end, between.end) * (1 + 1e-9)
    sent = sum(inside.sent.values()) + sum(between.sent.values())
    assert sent == pytest.approx(size * (ranks - 1))

    simulation, g = Simulation(), min(ranks, per_node)
    first = max(
        simulate_ring(g, size, simulation, port=lambda r, n=n: (n, r), link=cluster.inside) for n in range(ranks // g)
    )
    last = max(
        simulate_ring(ranks // g, size / g, simulation, first, lambda n, r=r: ("net", n, r), cluster.between)
        for r in range(g)
    )
    assert cluster.reduce_scatter_s(size) == pytest.approx(last)


def test_a_cluster_of_one_node_is_a_node_and_one_of_single_ranks_a_network():
    cluster = Cluster(8, 8, LINK, Link(1.0, 1.0))
    assert cluster.all_to_all_s(1e6) == pytest.approx(LINK.exchange_s(1e6, 8))
    assert cluster.all_reduce_s(1e6) == pytest.approx(2 * LINK.exchange_s(1e6, 8))
    for formula in (Cluster.all_to_all_s, Cluster.all_reduce_s, Cluster.reduce_scatter_s):
        assert formula(replace(cluster, ranks=1), 1e6) == 0
    network = Cluster(8, 1, Link(1.0, 1.0), LINK)
    assert network.all_to_all_s(1e6) == network.reduce_scatter_s(1e6) == pytest.approx(LINK.exchange_s(1e6, 8))
    assert network.all_reduce_s(1e6) == pytest.approx(LINK.all_reduce_s(1e6, 8))


def test_ranks_must_fill_their_nodes():
    with pytest.raises(ValueError, match="12 ranks do not fill nodes of 8"):
        Cluster(12, 8, LINK, LINK)
    with pytest.raises(ValueError, match="0 ranks"):
        Cluster(0, 8, LINK, LINK)


def check_conserved(placement: Placement, model: Model, copies_of: int = 4):
    assert placement.columns == pytest.approx(len(model.rows) * model.embedding_dim)
    assert placement.columns_per_rank.sum() == pytest.approx(len(model.rows) * model.embedding_dim)
    once = copies_of * (model.table_parameters - placement.replicated_parameters)
    copies = copies_of * placement.replicated_parameters * len(placement.whole)
    assert placement.bytes_per_rank.sum() == pytest.approx(once + copies)
    assert placement.imbalance >= 1 - 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("local_batch_size", [1, 400, 5000])
def test_nothing_is_lost_in_placing_tables(ranks, local_batch_size):
    placement = spread_tables(SMALL, ranks, min(4, ranks), 1e6, local_batch_size)
    check_conserved(placement, SMALL)
    assert placement.bytes_per_rank.max() <= 1e6
    assert placement.replicated == 64 * sum(rows < local_batch_size for rows in SMALL.rows)


def test_a_table_larger_than_a_rank_is_cut():
    model = Model(name="one", rows=(1_000_000,), embedding_dim=128, source="")
    placement = spread_tables(model, 16, 4, 60e6, 1)
    check_conserved(placement, model)
    assert placement.bytes_per_rank.max() <= 60e6
    narrow = Model(name="narrow", rows=(1_000_000,), embedding_dim=4, source="")
    placement = spread_tables(narrow, 16, 4, 2e6, 1)
    check_conserved(placement, narrow)
    assert placement.by_row == 4


def test_what_does_not_fit_tells_how_many_devices_would_do():
    with pytest.raises(DoesNotFit, match="tables of 105 GB do not fit 8 GPUs of 10 GB usable") as refused:
        place_tables(MODELS["criteo_tb"], 8, 8, rank_bytes=10 * GB, local_batch_size=2048)
    assert refused.value.devices == 11
    with pytest.raises(DoesNotFit) as refused:
        place_tables(MODELS["criteo_tb"], 8, 8, rank_bytes=20 * GB, local_batch_size=2048, state=1.0)
    assert refused.value.devices == 11
    assert A100.devices_needed(MODELS["criteo_tb"]) == 2
    assert A100.devices_needed(MODELS["50tb"]) == 735
    assert replace(A100, optimizer="adagrad").devices_needed(MODELS["50tb"]) == 1470
    assert A100.devices_needed(SMALL) == 1


def test_torchrecs_planner_places_big_tables_without_allocating_them():
    model = MODELS["criteo_tb"]
    planned = place_tables(model, 8, 8, rank_bytes=68 * GB, local_batch_size=2048)
    assert planned.source == "TorchRec's planner"
    check_conserved(planned, model)
    assert planned.bytes_per_rank.max() <= 68 * GB
    with_state = place_tables(model, 8, 8, rank_bytes=136 * GB, local_batch_size=2048, state=1.0)
    assert with_state.bytes_per_rank == pytest.approx(2 * planned.bytes_per_rank)
    big = Model(name="big", rows=(200_000_000, 100_000_000, 50, 9000), source="")
    two_nodes = place_tables(big, 4, 2, rank_bytes=50 * GB, local_batch_size=1024)
    check_conserved(two_nodes, big)
    assert two_nodes.by_node.sum() + two_nodes.by_row > 0
    assert plan_tables(big, 2, 2, 60 * 10**9, 1024) is None  # only with tables in the host's memory


def test_lookup_bytes_by_hand():
    # 10 rows of 4: an index read twice, the row read, read and written again; 6 numbers of output written and read
    assert lookup_bytes(10, 6, 4, 0.0) == 10 * (16 + 16 + 32) + 48
    assert lookup_bytes(10, 6, 4, 1.0) == 10 * (16 + 16 + 64) + 48
    assert lookup_bytes(10, 6, 4, 1.0, reads=False) == 10 * (16 + 64) + 48
    assert lookup_bytes(10, 6, 4, 1.0, reads=False, writes=False) == 10 * 16 + 48


@pytest.mark.parametrize(("optimizer", "gpus", "compression", "per_lookup"), [
    ("adagrad", 1, 10, 16 + 4 * 64 * 5),     # M and its state fit no cache of 1 MB
    ("adagrad", 1, 400, 16 + 4 * 64 * 4),    # M fits, with its state it does not
    ("adagrad", 1, 1000, 16),                # both fit
    ("adagrad", 8, 400, 16),                 # the gradient is an array without state, and fits
    ("sgd", 8, 10, 16 + 4 * 64 * 3),
])  # fmt: skip
def test_an_array_in_the_cache_does_not_move(optimizer, gpus, compression, per_lookup):
    model = Model(name="tables of 256 MB", rows=(10**6,), embedding_dim=64, source="")
    machine = MACHINES["a100"].model_copy(update={"cache_mb": 1.0})
    cost_model = CostModel(machine, Assumptions(memory_efficiency=1), optimizer)
    step = cost_model.robe_step(model, cost_model.cluster(gpus), compression, 8 * gpus)
    assert step.compute_ms["lookups"] == pytest.approx(1e-6 * (8 * per_lookup + 8 * 8 * 64) / machine.memory_gb_per_s)


def test_the_models_are_what_they_are_called():
    model = MODELS["criteo_tb"]
    assert sum(model.rows) == 204_184_588
    assert 4 * model.table_parameters / 2**30 == pytest.approx(97.4, abs=0.05)
    assert 4 * model.layer_parameters / 1e6 == pytest.approx(9.5, abs=0.05)  # "10 MB" in the paper
    assert model.layer_sizes[0] == (13, 512)
    assert model.layer_sizes[3] == (479, 1024)
    assert 4 * MODELS["1tb"].table_parameters / 1e12 == pytest.approx(1.05, abs=0.01)
    assert 4 * MODELS["50tb"].table_parameters / 1e12 == pytest.approx(50, abs=0.1)
    assert model.epochs(10_000) == 4.55
    assert model.epochs(1) == 1
    assert model.epochs(50) is None
    assert MODELS["1tb"].epochs(1000) is None


def whole_tables(ranks: int, busiest: float) -> Placement:
    columns = 5.0 * 64
    rest = (columns - busiest) / (ranks - 1)
    return Placement("test", np.array([busiest, *[rest] * (ranks - 1)]), np.zeros(1), 0, 0, 0, np.zeros(ranks))


def step_of(placement: Placement, batch: int = 4096, **assumed):
    cost_model = CostModel(MACHINES["a100"], Assumptions(fixed_ms=1.0, **assumed))
    return cost_model.sharded_step(SMALL, cost_model.cluster(len(placement.whole)), placement, batch)


def test_a_sharded_step_by_hand():
    cost = step_of(whole_tables(4, 80.0), inside_latency_us=0, input_overlap=0, link_efficiency=1)
    per_rank = 4096 * 80 * 4
    assert cost.comm_ms["embeddings"] == pytest.approx(1e3 * 2 * per_rank * 3 / 4 / 300e9)
    assert cost.comm_ms["ids"] == pytest.approx(1e3 * 1024 * 5 * 16 * 3 / 4 / 300e9)
    assert cost.comm_ms["gradients"] == pytest.approx(1e3 * 2 * 4 * SMALL.layer_parameters * 3 / 4 / 300e9)
    assert cost.sent_bytes == 1024 * 5 * 16 + 2 * per_rank + 4 * SMALL.layer_parameters
    moved = lookup_bytes(4096 * 80 / 64, 4096 * 80, 64, 0)
    assert cost.compute_ms["lookups"] == pytest.approx(1e3 * moved / (2039e9 * 0.7))
    assert cost.compute_ms["fixed"] == 1
    assert cost.step_ms == pytest.approx(sum(cost.compute_ms.values()) + sum(cost.comm_ms.values()))


def test_an_imbalanced_placement_costs_the_busiest_rank():
    even, uneven = (step_of(whole_tables(4, columns), inside_latency_us=0) for columns in (80.0, 160.0))
    assert uneven.compute_ms["lookups"] == pytest.approx(2 * even.compute_ms["lookups"])
    assert uneven.comm_ms["embeddings"] == pytest.approx(2 * even.comm_ms["embeddings"])


def test_overlap_hides_its_share():
    shown, hidden = (step_of(whole_tables(4, 80.0), gradient_overlap=share) for share in (0.0, 0.75))
    assert hidden.comm_ms["gradients"] == pytest.approx(shown.comm_ms["gradients"] / 4)
    assert shown.comm_ms["ids"] == 0


def test_robe_under_ddp_pays_for_its_array_and_alone_for_nothing():
    model = MODELS["criteo_tb"]

    def robe(gpus, compression, batch=16384):
        return A100.robe_step(model, A100.cluster(gpus), compression, batch)

    assert robe(1, 1000).comm_ms == {}
    assert robe(1, 1000).exposed_comm_ms == 0
    dense = robe(8, 1000).comm_ms["gradient of M"]
    size, link = 4 * model.table_parameters / 1000, A100.cluster(8).inside
    assert dense == pytest.approx(1e3 * 2 * link.exchange_s(size, 8))
    assert robe(8, 1000, 65536).comm_ms["gradient of M"] == pytest.approx(dense)  # whatever the batch
    sparse = robe(8, 10, 2048)  # M of 10 GB: gathering what was touched is cheaper
    assert sparse.comm_ms["gradient of M"] < 0.1 * 1e3 * 2 * link.exchange_s(100 * size, 8)
    assert robe(8, 10_000).step_ms < robe(8, 1000).step_ms < robe(8, 100).step_ms


def test_memory_and_sizes_of_an_array():
    model, adagrad = MODELS["criteo_tb"], replace(A100, optimizer="adagrad")
    assert array_size(model, 1000) == pytest.approx(204_184_588 * 128 / 1000)
    with pytest.raises(ValueError, match=r"compression 0.5: must be at least 1"):
        array_size(model, 0.5)
    small, large = (A100.robe_rank_bytes(model, compression, 1, fused=False) for compression in (10_000, 1000))
    assert large - small == pytest.approx(2 * 4 * (array_size(model, 1000) - array_size(model, 10_000)))
    assert adagrad.robe_rank_bytes(model, 1000, 1, fused=False) > 1.4 * large
    assert large - A100.robe_rank_bytes(model, 1000, 1, fused=True) == pytest.approx(4 * array_size(model, 1000))


def test_torchrecs_estimator_agrees_within_a_node():
    """Eight equal tables, one a GPU, at bandwidths as we assume them: what a rank looks up and exchanges."""
    import torch
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import Topology
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    gpus, local, model = 8, 8192, Model(name="eight", rows=(1_000_000,) * 8, source="")
    placement = Placement("test", np.full(gpus, 128.0), np.zeros(1), 0, 0, 0, np.zeros(gpus))
    ours = A100.sharded_step(model, A100.cluster(gpus), placement, gpus * local)

    topology = Topology(
        gpus, "cuda", local_world_size=gpus, hbm_mem_bw=2039e6 * 0.7, intra_host_bw=300e6 * 0.7
    )  # bytes a ms
    table = EmbeddingBagConfig(name="t", embedding_dim=128, num_embeddings=1_000_000, feature_names=["f"])
    module = torch.nn.ModuleDict({"tables": EmbeddingBagCollection(tables=[table], device=torch.device("meta"))})
    options = EmbeddingEnumerator(topology, local).enumerate(module, [EmbeddingBagCollectionSharder()])
    (perf,) = (o.shards[0].perf for o in options if (o.sharding_type, o.compute_kernel) == ("table_wise", "fused"))
    assert ours.compute_ms["lookups"] == pytest.approx(perf.fwd_compute + perf.bwd_compute, rel=0.5)
    assert ours.comm_ms["embeddings"] == pytest.approx(perf.fwd_comms + perf.bwd_comms, rel=0.25)


def test_ports_of_the_simulation_are_busy_one_at_a_time():
    simulation, ends = Simulation(), []
    for target in (1, 2, 3):
        heapq.heappush(ends, simulation.send(0, target, 1e6, 0.0))
    one = LINK.alpha_s + 1e6 * LINK.beta_s
    assert [heapq.heappop(ends) for _ in range(3)] == pytest.approx([one, 2 * one, 3 * one])
