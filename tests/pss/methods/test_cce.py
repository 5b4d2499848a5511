import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pss.method import CompressionRefused, EmbeddingRequest
from pss.methods import cce
from pss.methods.cce import CceEmbeddingBagCollection, cell, find_centroids, find_nearest, lay_out, solve_layout
from tests.pss.jagged import materialise, pooled_by_cell, random_kjt, table


def mixed_tables() -> list[EmbeddingBagConfig]:
    """Dimensions 8, 6 and 4, a shared feature, sum and mean; w and x are small enough to be stored whole."""
    return [
        table("t", 400, 8, ["a", "b"]),
        table("u", 500, 6, ["c"], PoolingType.MEAN),
        table("v", 600, 8, ["c"], PoolingType.MEAN),
        table("w", 5, 8, ["d"]),
        table("x", 6, 4, ["d"]),
    ]


KEYS = ["c", "a", "d", "b"]


def features_of(count: int, max_length: int = 4, weighted: bool = False, seed: int = 0) -> KeyedJaggedTensor:
    """Ids below 400 for every feature, below 5 for d."""
    drawn = random_kjt(KEYS, count, max_id=400, max_length=max_length, weighted=weighted, seed=seed)
    feature = torch.repeat_interleave(torch.arange(4).repeat_interleave(count), drawn.lengths())
    ids = torch.where(feature == 2, drawn.values() % 5, drawn.values())
    return KeyedJaggedTensor(KEYS, ids, weights=drawn.weights_or_none(), lengths=drawn.lengths(), stride=count)


def everything(config: EmbeddingBagConfig) -> KeyedJaggedTensor:
    ids = torch.arange(config.num_embeddings)
    return KeyedJaggedTensor(config.feature_names[:1], ids, lengths=torch.ones_like(ids))


def train(module: CceEmbeddingBagCollection, steps: range, total_steps: int = 12) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        values = module(features_of(8, seed=step)).values()
        (values * torch.linspace(-1, 2, values.shape[1])).square().sum().backward()
        optimizer.step()
        module.end_step(step, total_steps)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("max_length", [4, 0])
@pytest.mark.parametrize("chunks", [None, 1, 2])
def test_lookup_equals_cell_before_and_after_clustering(is_weighted: bool, max_length: int, chunks: int | None):
    module = CceEmbeddingBagCollection(mixed_tables(), is_weighted, compression=3, chunks=chunks, init_scale=1.0)
    features = features_of(5, max_length, is_weighted)
    assert [place.is_whole for place in module.layout.places] == [False, False, False, True, True]
    for clusterings in range(3):
        assert module.clusterings.item() == clusterings
        found = module(features).values().double()
        torch.testing.assert_close(found, pooled_by_cell(module, cell, features), rtol=1e-5, atol=1e-6)
        module.cluster()
        nn.init.normal_(module.memory)


def test_pointers_beyond_the_sign_of_int16_are_read():
    module = CceEmbeddingBagCollection([table("a", 400_000, 2)], compression=1.5, chunks=1)
    assert module.pointers.dtype == torch.int16
    assert module.layout.clusters > 40_000
    assert (module.pointers < 0).any()
    values = module(everything(module.embedding_bag_configs()[0])).values()
    for row in (module.pointers < 0).nonzero().flatten()[:5].tolist():
        assert values[row].tolist() == pytest.approx([cell(module, 0, row, col) for col in range(2)])


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_clustering_is_the_best_of_a_codebook(chunks: int):
    """Every id reads the centroid nearest to what it read before; helper tables are zero and hash anew."""
    module = CceEmbeddingBagCollection([table("a", 900, 8)], compression=6, chunks=chunks, init_scale=1.0)
    before = materialise(module, cell, 0).view(900, chunks, -1)
    hashed = [module.helper_hash.location(0, row, 0, module.layout.helper_rows) for row in range(900)]
    module.cluster()
    after = materialise(module, cell, 0).view(900, chunks, -1)
    for j in range(chunks):
        centroids = after[:, j].unique(dim=0)
        assert len(centroids) <= module.layout.clusters
        distances = torch.cdist(before[:, j], centroids)
        torch.testing.assert_close((before[:, j] - after[:, j]).norm(dim=1), distances.amin(1), rtol=1e-4, atol=1e-5)
        members = torch.stack([before[(after[:, j] == c).all(1), j].mean(0) for c in centroids])
        assert (members - centroids).abs().max() < 0.1  # 25 iterations: close to the means of their members
        error = (before[:, j] - after[:, j]).square().sum()
        shuffled = after[torch.randperm(900, generator=torch.Generator().manual_seed(0)), j]
        assert error < 0.5 * (before[:, j] - shuffled).square().sum()
    _, helpers, _ = module._parts(0)
    assert not helpers.any()
    helpers[0] = torch.arange(module.layout.helper_rows).unsqueeze(1)
    added = materialise(module, cell, 0).view(900, chunks, -1)[:, 0] - after[:, 0]
    assert (added[:, 0].round() == torch.tensor(hashed)).double().mean() < 0.1


def fit(module: CceEmbeddingBagCollection, target: Tensor, steps: int) -> float:
    """Mean squared error after regression of all rows on target (n, d)."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    features, loss = everything(module.embedding_bag_configs()[0]), torch.zeros(())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = (module(features).values() - target).square().mean()
        loss.backward()
        optimizer.step()
        module.end_step(step, steps)
    return loss.item()


def test_planted_clusters_are_recovered_without_learning_the_table():
    """300 ids of 4 kinds in random order: the sketch alone cannot tell the kinds apart, clustering it makes it."""
    generator = torch.Generator().manual_seed(1)
    kinds, kind = torch.randn(4, 8, generator=generator), torch.randint(4, (300,), generator=generator)
    errors = []
    for times in (0, 20):
        cluster_at = tuple(float(i) / (times + 1) for i in range(1, times + 1))
        module = CceEmbeddingBagCollection([table("a", 300, 8)], chunks=1, cluster_at=cluster_at)
        assert module.layout.clusters == 32
        errors.append(fit(module, kinds[kind], 315))
    assert errors[0] > 0.4
    assert errors[1] < 0.01
    pointers = module.pointers.long()
    assert all(kind[pointers == p].unique().numel() == 1 for p in pointers.unique())


def test_clusterings_come_when_asked():
    module = CceEmbeddingBagCollection(mixed_tables(), cluster_at=(0.01, 0.5, 1.0))
    at = []
    for step in range(1, 11):
        before = module.clusterings.item()
        module.end_step(step, 10)
        at += [step] * int(module.clusterings.item() - before)
    assert at == [1, 5, 10]


@pytest.mark.parametrize("asked", [1.0, 3.0, 10.0])
def test_all_that_is_stored_is_within_the_budget(asked: float):
    """Before and after clustering; counted from what the state dict holds."""
    module = cce.build(mixed_tables(), cce.Options(), EmbeddingRequest(compression=asked))
    full = 4 * (400 * 8 + 500 * 6 + 600 * 8 + 5 * 8 + 6 * 4)
    stored = sum(value.nbytes for name, value in module.state_dict().items() if name != "_extra_state")
    assert stored == module.stored_bytes() == module.layout.stored_bytes
    assert full / asked - 4 * (8 + 6 + 8 + 8) < stored <= full / asked
    module.cluster()
    assert module.stored_bytes() == stored
    assert [name for name, _ in module.named_parameters()] == ["memory"]


def test_more_than_pointers_allow_is_refused_with_what_can_be_asked():
    tables = [table("a", 6000, 16)]  # 384,000 bytes; at least a byte an id, 4 rows of 64 and the counter: 6264
    with pytest.raises(CompressionRefused, match=r"cce reaches 61.3027 at most") as error:
        cce.build(tables, cce.Options(), EmbeddingRequest(compression=63))
    module = cce.build(tables, cce.Options(), EmbeddingRequest(compression=error.value.nearest))
    assert (module.layout.chunks, module.layout.clusters, module.layout.helper_rows) == (1, 2, 2)
    with pytest.raises(CompressionRefused, match=r"cce reaches 15\.8\d+ at most"):
        cce.build(tables, cce.Options(chunks=4), EmbeddingRequest(compression=16))
    with pytest.raises(ValueError, match="compression must be at least 1"):
        cce.build(tables, cce.Options(), EmbeddingRequest(compression=0.5))


def test_tables_start_with_the_spread_asked_for():
    tables = [table("a", 4000, 16), table("w", 50, 16)]
    module = cce.build(tables, cce.Options(chunks=2), EmbeddingRequest(compression=8, init_scale=0.3, seed=2))
    assert [place.is_whole for place in module.layout.places] == [False, True]
    for index, rows in enumerate((200, 50)):
        started = torch.tensor([[cell(module, index, row, col) for col in range(16)] for row in range(rows)])
        assert started.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.05)
    before = {name: value.clone() for name, value in module.named_buffers()} | {"memory": module.memory.clone()}
    module.cluster()
    module.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if name in before)


def test_pointers_start_as_a_hash_of_chunk_and_id():
    module = CceEmbeddingBagCollection([table("a", 4000, 8)], compression=4, chunks=2)
    pointers = module.pointers.view(4000, 2).long()
    counts = torch.bincount(pointers[:, 0], minlength=module.layout.clusters).double()
    assert counts.std() < 1.3 * counts.mean().sqrt()
    assert (pointers[:, 0] == pointers[:, 1]).double().mean() < 3 / module.layout.clusters


def test_a_state_dict_resumes_between_clusterings():
    arguments: dict[str, Any] = {"compression": 3, "seed": 4}
    straight = CceEmbeddingBagCollection(mixed_tables(), **arguments)
    train(straight, range(1, 8))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed = CceEmbeddingBagCollection(mixed_tables(), **arguments)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for module in (straight, resumed):
        train(module, range(8, 13))
        assert module.clusterings.item() == 3
    for name, value in straight.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(value, resumed.state_dict()[name])
    assert list(straight.state_dict()) == ["memory", "pointers", "clusterings", "_extra_state"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 5}, "seed is 5 here and 0 in the state dict"),
        ({"chunks": 1}, "chunks is 1 here and 2 in the state dict"),
        ({"compression": 5.0}, r"clusters is \d+ here and \d+ in the state dict"),
    ],
)
def test_state_of_another_layout_is_refused(change: dict[str, Any], difference: str):
    arguments: dict[str, Any] = {"compression": 4.0, "chunks": 2}
    saved = CceEmbeddingBagCollection(mixed_tables(), **arguments).state_dict()
    with pytest.raises(ValueError, match=difference):
        CceEmbeddingBagCollection(mixed_tables(), **(arguments | change)).load_state_dict(saved)


@pytest.mark.parametrize(
    "arguments",
    [{"chunks": 0}, {"cluster_at": (0.5, 1.5)}, {"cluster_at": (0.0,)}, {"sample_per_cluster": 0}, {"iterations": 0}],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CceEmbeddingBagCollection([table("a", 10, 4)], **arguments)


def test_cell_knows_the_bounds_of_its_table():
    module = CceEmbeddingBagCollection([table("a", 10, 4)])
    for row, col in [(10, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(IndexError, match=r"outside a: 10 x 4"):
            cell(module, 0, row, col)


@pytest.mark.parametrize("capture", [symbolic_trace, torch.jit.script, copy.deepcopy])  # pyright: ignore[reportPrivateImportUsage]
def test_captured_module_gives_the_same(capture: Any):
    module = CceEmbeddingBagCollection(mixed_tables(), compression=3, gradient="dense")
    module.cluster()
    features = features_of(5)
    torch.testing.assert_close(capture(module)(features).values(), module(features).values())


TABLES = [table("a", 3000, 16), table("b", 500, 6), table("c", 7, 16), table("d", 900, 5)]


def bytes_of(chunks: int, clusters: int, helper_rows: int) -> int:
    """Table by table: whole, or codebooks, helper tables and pointers; and the counter."""
    own_chunks = {16: {1: 1, 2: 2, 3: 2, 4: 4}, 6: {1: 1, 2: 2, 3: 3, 4: 3}, 5: dict.fromkeys((1, 2, 3, 4), 1)}
    pointer = 1 if clusters <= 256 else 2 if clusters <= 65536 else 4
    total, is_any_clustered = 0, False
    for config in TABLES:
        dim, ids = config.embedding_dim, config.num_embeddings
        whole = 4 * dim * ids
        clustered = 4 * dim * (clusters + helper_rows) + ids * own_chunks[dim][chunks] * pointer
        total += min(whole, clustered)
        is_any_clustered |= clustered < whole
    return total + 8 * is_any_clustered


FULL = 4 * (3000 * 16 + 500 * 6 + 7 * 16 + 900 * 5)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("compression", [1, 1.3, 4, 9, 20, 35])
def test_the_most_that_fits_is_found(chunks: int, compression: float):
    budget = int(FULL / compression)
    layout = solve_layout(TABLES, chunks, budget)
    assert layout.stored_bytes == bytes_of(chunks, layout.clusters, layout.helper_rows)
    fitting = [k for k in range(2, 3001) if bytes_of(chunks, k, k) <= budget]
    if not fitting:
        assert (layout.clusters, layout.helper_rows) == (2, 2)
        return
    assert layout.clusters == max(fitting)
    rows = max(h for h in range(layout.clusters, 3001) if bytes_of(chunks, layout.clusters, h) <= budget)
    assert layout.helper_rows == rows
    assert budget - 4 * (16 + 6 + 16 + 5) < layout.stored_bytes <= budget


def test_unset_chunks_leave_half_of_the_budget_to_the_rows():
    chosen = [solve_layout(TABLES, None, int(FULL / compression)).chunks for compression in (2, 6, 8, 16, 25, 45)]
    assert chosen == sorted(chosen, reverse=True)
    assert set(chosen) == {4, 3, 1}
    for compression, chunks in zip((2, 6, 8, 16), chosen, strict=False):
        budget = int(FULL / compression)
        layout = solve_layout(TABLES, None, budget)
        assert layout.pointer_bytes <= budget / 2
        if chunks < 4:
            more = solve_layout(TABLES, chunks + 1, budget)
            assert more.pointer_bytes > budget / 2 or more.clusters == 2


def test_places_do_not_overlap_and_fill_everything():
    layout = lay_out(TABLES, 4, 30, 40)
    elements, pointers = [], []
    for config, place in zip(TABLES, layout.places, strict=True):
        rows = config.num_embeddings if place.is_whole else 30 + 40
        elements += range(place.start, place.start + rows * config.embedding_dim)
        if not place.is_whole:
            pointers += range(place.pointer_start, place.pointer_start + config.num_embeddings * place.chunks)
    assert elements == list(range(layout.memory_size))
    assert pointers == list(range(layout.pointers))
    assert [place.is_whole for place in layout.places] == [False, False, True, False]
    assert [place.chunks for place in layout.places] == [4, 3, 4, 1]


@pytest.mark.parametrize(
    ("clusters", "dtype"), [(256, torch.uint8), (257, torch.int16), (65536, torch.int16), (65537, torch.int32)]
)
def test_a_pointer_is_no_wider_than_needed(clusters: int, dtype: torch.dtype):
    assert lay_out([table("a", 10**7, 4)], 1, clusters, 2).pointer_dtype == dtype


def test_a_table_of_2_to_the_62_rows_is_laid_out():
    layout = solve_layout([table("a", 2**62, 16)], None, 2**30)
    assert layout.stored_bytes == 2**62 + 4 * 16 * 4 + 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(clusters: int, each: int, width: int) -> tuple[Tensor, Tensor]:
    """Points close to far centres, shuffled; and the centres."""
    centres = 10 * torch.randn(clusters, width, generator=seeded(1))
    points = centres.repeat(each, 1) + 0.01 * torch.randn(clusters * each, width, generator=seeded(2))
    return points[torch.randperm(len(points), generator=seeded(3))], centres


def test_nearest_is_scipys(monkeypatch: pytest.MonkeyPatch):
    points, centroids = torch.randn(1000, 3, generator=seeded(0)) + 100, torch.randn(17, 3, generator=seeded(1)) + 100
    expected, _ = vq(points.double().numpy(), centroids.double().numpy())
    np.testing.assert_array_equal(find_nearest(points, centroids), expected)
    monkeypatch.setattr(cce, "_BLOCK_DISTANCES", 17 * 7)
    np.testing.assert_array_equal(find_nearest(points, centroids), expected)


@pytest.mark.parametrize("iterations", [0, 1, 5, 100])
def test_iterations_are_scipys_from_the_same_seeds(iterations: int):
    points = torch.randn(500, 2, generator=seeded(4), dtype=torch.float64)
    seeds = find_centroids(points, 20, 0, seeded())
    found = find_centroids(points, 20, iterations, seeded())
    if iterations == 0:
        assert all((points == seed).all(1).any() for seed in seeds)
        assert seeds.unique(dim=0).shape == (20, 2)
        return
    expected, _ = kmeans2(points.numpy(), seeds.numpy(), iter=iterations, minit="matrix", missing="raise")
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_planted_clusters_are_found():
    points, centres = planted(40, 20, 4)
    found = find_centroids(points, 40, 25, seeded(5))
    distances = torch.cdist(centres.double(), found)
    assert distances.amin(1).max() < 0.05
    assert distances.amin(0).max() < 0.05


def test_no_more_centroids_than_distinct_points():
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
    found = find_centroids(points, 3, 10, seeded())
    assert sorted(found.tolist()) == [[1.0, 2.0], [3.0, 4.0]]
    assert find_centroids(points[:1], 3, 10, seeded()).tolist() == [[1.0, 2.0]]


def test_a_cluster_without_points_keeps_its_centroid(monkeypatch: pytest.MonkeyPatch):
    seeds = torch.tensor([[0.0], [1.0], [50.0]], dtype=torch.float64)
    monkeypatch.setattr(cce, "_draw_seeds", lambda *_: seeds)
    found = find_centroids(torch.tensor([[-1.0], [0.0], [2.0], [4.0]]), 3, 10, seeded())
    assert found.tolist() == [[-0.5], [3.0], [50.0]]
