"""How many ids a hash gives the same embedding: the share of a table's ids whose every chunk is read from the same
places as another id's. The affine hash of the ROBE paper has one multiplier for all chunks, so two ids that meet in
one chunk tend to meet in all (pss.hashing); how many do is a lottery of its constants, hence a distribution over seeds.
"""

import numpy as np
import torch

from pss.hashing import build_hash, locate

_BLOCK_IDS = 1 << 16


def identical_share(
    num_embeddings: int, embedding_dim: int, memory_size: int, block_size: int, hash_family: str, seed: int
) -> float:
    """Return the share of ids 0 to num_embeddings - 1 of a ROBE table (unsigned) whose whole row is another's too,
    exactly.

    Raises ValueError where block_size is above embedding_dim, whose rows do not start at a block, or memory_size.
    """
    if not 1 <= block_size <= min(embedding_dim, memory_size):
        limits = f"embedding_dim = {embedding_dim} and memory_size = {memory_size}"
        raise ValueError(f"block_size must be at least 1 and at most {limits}, not {block_size}")
    slots, chunks = memory_size - block_size + 1, -(-embedding_dim // block_size)
    location_hash = build_hash(hash_family, seed)
    location_hash.check_slots(slots)
    constants = location_hash.constants([0], chunks)
    blocks = torch.arange(num_embeddings).split(_BLOCK_IDS)
    locations = torch.cat([locate(ids, torch.tensor(0), constants, slots) for ids in blocks]).numpy()
    group = np.zeros(num_embeddings, dtype=np.int64)  # ids of one group agree in all chunks so far
    for chunk in locations.T:
        agreeing = np.unique(chunk, return_inverse=True)[1]
        group = np.unique(group * num_embeddings + agreeing, return_inverse=True)[1]  # both below num_embeddings
    return float((np.bincount(group)[group] > 1).mean())
