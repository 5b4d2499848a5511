"""Jagged arithmetic between a KeyedJaggedTensor and pooled rows, for any parameter-shared method.

Everything here compiles under TorchScript and, being wrapped, is one node of a torch.fx graph. A module that calls a
wrapped function must wrap its name again: torch.fx looks in the caller's globals.
"""

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@torch.fx.wrap
def select_bags(
    features: KeyedJaggedTensor, names: list[str], is_weighted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """The bags of the named features, one feature after the other.

    Returns ids (V,) int64; lengths (bags,) int64; weights (V,), empty if not weighted; the inverse indices of a
    variable batch (features, B) int64, empty if there are none; the number of bags of each feature.
    """
    inverse = reorder_inverse_indices(features.inverse_indices_or_none(), names)
    weights = torch.empty(0)
    if features.keys() == names:
        lengths = features.lengths()
        if is_weighted:
            weights = features.weights()
        bags_per_feature = [lengths.numel() // len(names)] * len(names)
        if features.variable_stride_per_key():
            bags_per_feature = features.stride_per_key()
        return features.values().long(), lengths.long(), weights, inverse, bags_per_feature
    by_name = features.to_dict()
    ids_of: list[Tensor] = []
    lengths_of: list[Tensor] = []
    weights_of: list[Tensor] = []
    for name in names:
        if name not in by_name:
            raise KeyError(f"feature {name} is not in the batch, which has {features.keys()}")
        ids_of.append(by_name[name].values())
        lengths_of.append(by_name[name].lengths())
        if is_weighted:
            weights_of.append(by_name[name].weights())
    if is_weighted:
        weights = torch.cat(weights_of)
    bags_per_feature = [part.numel() for part in lengths_of]
    return torch.cat(ids_of).long(), torch.cat(lengths_of).long(), weights, inverse, bags_per_feature


def has_one_id_per_bag(ids: Tensor, lengths: Tensor, inverse: Tensor, bags_per_feature: list[int]) -> bool:
    """Whether every bag holds exactly one id and every feature has as many bags. Asked of plain CPU tensors only:
    elsewhere the answer would force a synchronisation or be baked into a graph, so it is False."""
    if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        return False
    else:  # not compiled by TorchScript
        if torch.compiler.is_compiling() or type(lengths) is not Tensor:
            return False
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return False
        if lengths.device.type != "cpu" or ids.numel() != lengths.numel() or inverse.numel() > 0:
            return False
        return have_equal_batches(bags_per_feature) and bool((lengths == 1).all())


@torch.fx.wrap
def locate_bags(lengths: Tensor, bags_per_feature: list[int], ids: Tensor) -> tuple[Tensor, Tensor]:
    """For every id (V,): the index of its bag and the position of its feature, both (V,) int64."""
    bag = torch.repeat_interleave(lengths, output_size=ids.numel())
    if have_equal_batches(bags_per_feature):
        return bag, torch.div(bag, max(bags_per_feature[0], 1), rounding_mode="floor")
    bags = torch.tensor(bags_per_feature, dtype=torch.int64, device=lengths.device)
    return bag, torch.repeat_interleave(bags, output_size=lengths.numel())[bag]


def have_equal_batches(bags_per_feature: list[int]) -> bool:
    """Whether all features have the same number of bags."""
    return bags_per_feature == [bags_per_feature[0]] * len(bags_per_feature)


@torch.fx.wrap
def order_by_batch(pooled: Tensor, bags_per_feature: list[int], inverse: Tensor) -> Tensor:
    """Bags of one feature after the other (bags, D) -> (B, features · D), expanding a variable batch."""
    features, dim = len(bags_per_feature), pooled.size(1)
    if inverse.numel() > 0:
        starts = torch.tensor(bags_per_feature, dtype=torch.int64, device=inverse.device).cumsum(0)
        starts = starts - torch.tensor(bags_per_feature, dtype=torch.int64, device=inverse.device)
        bag = (inverse + starts.unsqueeze(1)).t().reshape(-1)
        return pooled.index_select(0, bag).view(inverse.size(1), features * dim)
    if not have_equal_batches(bags_per_feature):
        raise ValueError(f"batch sizes {bags_per_feature} differ between features: inverse_indices are needed")
    batch = bags_per_feature[0]
    return pooled.view(features, batch, dim).transpose(0, 1).reshape(batch, features * dim)
