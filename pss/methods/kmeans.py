"""k-means: Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007).

In float64, so that what the points decide is not decided by rounding. Takes O(clusters · points · width) for the seeds
and as much for every iteration, blocks of distances at a time.
"""

import torch
from torch import Tensor

_BLOCK_DISTANCES = 1 << 22  # 32 MiB


def find_centroids(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """points (n, width) floating, n ≥ 1 -> centroids (m, width) float64 on the same device, none twice at the start.

    m = clusters, or the number of distinct points where that is less. A cluster that loses all its points keeps its
    centroid. Stops early when no point changes its cluster. generator: of the CPU, draws the seeds.
    """
    points = points.double()
    centroids = _draw_seeds(points, clusters, generator)
    assigned = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        before, assigned = assigned, find_nearest(points, centroids)
        if torch.equal(before, assigned):
            break
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        counts = torch.bincount(assigned, minlength=len(centroids)).unsqueeze(1)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def find_nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid nearest to each point: (n, width), (m, width) -> (n,) int64."""
    centroids = centroids.double()
    half_squares = centroids.square().sum(1) / 2  # |p - c|² / 2 without |p|² / 2, the same for all c
    blocks = points.split(max(1, _BLOCK_DISTANCES // len(centroids)))
    return torch.cat([torch.addmm(half_squares, block.double(), centroids.t(), alpha=-1).argmin(1) for block in blocks])


def _draw_seeds(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Distinct points, each drawn with probability ∝ its squared distance to the nearest of those before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < clusters and bool(distances.any()):
        ends = distances.cumsum(0)
        drawn = torch.rand(1, dtype=torch.float64, generator=generator).to(points.device) * ends[-1]
        chosen.append(int(torch.searchsorted(ends, drawn, right=True).clamp(max=len(points) - 1)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]
