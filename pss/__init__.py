"""Parameter-shared embeddings (parameter sharing setups, PSS) as drop-ins for TorchRec's EmbeddingBagCollection."""

from pss.least_squares import compress
from pss.methods.robe import RobeEmbeddingBagCollection

__all__ = ["RobeEmbeddingBagCollection", "compress"]
