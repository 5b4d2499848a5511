"""How long a collective takes: α seconds a message and β seconds a byte, p ranks, n bytes.

n is what one rank puts in, its own share included, as the profile counts it (`recsys.profile.timing`).

    all-to-all          (p − 1)·α + n·(p − 1)/p·β          pairwise exchange
    reduce-scatter      (p − 1)·α + n·(p − 1)/p·β          ring
    all-gather          the same, n = all that is gathered
    all-reduce          2·(p − 1)·α + 2·n·(p − 1)/p·β      ring: reduce-scatter, then all-gather
                        2·log₂p·α  + 2·n·(p − 1)/p·β       halving and doubling, p a power of two

Sources: Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005, section 4;
Rabenseifner, Optimization of Collective Reduction Operations, 2004. Adding numbers up counts as computing.

In a cluster of nodes of g ranks each, every rank has a link to its node and a share of its node's network:

    all-to-all          the slower of (g − 1) messages inside and (p − g) between nodes, which go on at the same time
    reduce-scatter      within the node, then of n/g between the ranks of equal place in all nodes
    all-reduce          reduce-scatter within the node, all-reduce of n/g between nodes, all-gather within the node
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """α and β of one rank's way to others: seconds a message, seconds a byte."""

    alpha_s: float
    beta_s: float


@dataclass(frozen=True)
class Cluster:
    """inside: within a node; between: of one rank to other nodes, its share of the node's network.

    Raises ValueError where the ranks do not fill their nodes.
    """

    ranks: int
    ranks_per_node: int
    inside: Link
    between: Link

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"a cluster of {self.ranks} ranks: there must be at least one")
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise ValueError(f"{self.ranks} ranks do not fill nodes of {self.ranks_per_node}")

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)

    @property
    def local_ranks(self) -> int:
        """g: the ranks of one node."""
        return min(self.ranks, self.ranks_per_node)


def all_to_all_s(size: float, ranks: int, link: Link) -> float:
    return (ranks - 1) * link.alpha_s + size * (ranks - 1) / ranks * link.beta_s


def reduce_scatter_s(size: float, ranks: int, link: Link) -> float:
    return (ranks - 1) * link.alpha_s + size * (ranks - 1) / ranks * link.beta_s


def all_gather_s(size: float, ranks: int, link: Link) -> float:
    """size: of what every rank has in the end."""
    return reduce_scatter_s(size, ranks, link)


def all_reduce_s(size: float, ranks: int, link: Link) -> float:
    """The ring, or halving and doubling where there are as many ranks as it needs: the same bytes in fewer messages."""
    ring = 2 * (ranks - 1)
    messages = 2 * math.log2(ranks) if ranks & (ranks - 1) == 0 else ring
    return messages * link.alpha_s + 2 * size * (ranks - 1) / ranks * link.beta_s


def cluster_all_to_all_s(size: float, cluster: Cluster) -> float:
    p, g = cluster.ranks, cluster.local_ranks
    inside = (g - 1) * cluster.inside.alpha_s + size * (g - 1) / p * cluster.inside.beta_s
    between = (p - g) * cluster.between.alpha_s + size * (p - g) / p * cluster.between.beta_s
    return max(inside, between)


def cluster_reduce_scatter_s(size: float, cluster: Cluster) -> float:
    g = cluster.local_ranks
    inside = reduce_scatter_s(size, g, cluster.inside)
    return inside + reduce_scatter_s(size / g, cluster.nodes, cluster.between)


def cluster_all_gather_s(size: float, cluster: Cluster) -> float:
    return cluster_reduce_scatter_s(size, cluster)


def cluster_all_reduce_s(size: float, cluster: Cluster) -> float:
    g = cluster.local_ranks
    inside = reduce_scatter_s(size, g, cluster.inside) + all_gather_s(size, g, cluster.inside)
    return inside + all_reduce_s(size / g, cluster.nodes, cluster.between)
