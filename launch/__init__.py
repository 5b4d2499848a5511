"""Entries: what one starts. Importing this package settles what must be settled before torch loads."""

import logging
import os
import warnings

# Threads of one rank that spin while they wait starve the other ranks of a shared machine (measured: 45x a step).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large tensors in huge pages, where the system gives them on demand; PyTorch reads this as it is imported (measured:
# a fifth to a quarter less time for lookups in full tables of gigabytes).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Deprecations inside torch, torchrec, torchx and fbgemm are not the user's concern. Our own warnings are shown.
for _package in ("torch", "fbgemm_gpu", "tensordict"):
    warnings.filterwarnings("ignore", module=_package)
logging.basicConfig(level=logging.ERROR, format="%(message)s")
logging.getLogger("recsys").setLevel(logging.WARNING)
logging.getLogger("torch.fx").setLevel(logging.ERROR)
