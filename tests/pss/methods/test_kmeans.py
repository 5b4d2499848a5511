import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from pss.methods import kmeans
from pss.methods.kmeans import find_centroids, find_nearest


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
    monkeypatch.setattr(kmeans, "_BLOCK_DISTANCES", 17 * 7)
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
    monkeypatch.setattr(kmeans, "_draw_seeds", lambda *_: seeds)
    found = find_centroids(torch.tensor([[-1.0], [0.0], [2.0], [4.0]]), 3, 10, seeded())
    assert found.tolist() == [[-0.5], [3.0], [50.0]]
