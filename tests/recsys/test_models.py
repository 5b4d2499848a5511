import pytest
import torch

from configs.request import EmbeddingRequest
from configs.schema import ModelSection
from recsys.embeddings import METHODS, build_tables
from recsys.models import MODELS, build_model

CPU = torch.device("cpu")


def build(architecture, method="full", seed=0):
    options = METHODS[method].Options()
    request = EmbeddingRequest(init_scale=0.1, seed=seed)
    embedding = METHODS[method].build(build_tables(["a", "b"], [7, 9], 4), options, request)
    section = ModelSection(architecture=architecture, embedding_dim=4, options=MODELS[architecture].Options())
    return build_model(section, embedding, num_dense=3, seed=seed, device=CPU)


def dense_weights(model):
    return {name: p for name, p in model.named_parameters() if "embedding_bag_collection" not in name}


@pytest.mark.parametrize("architecture", MODELS)
def test_dense_weights_depend_on_the_seed_alone(architecture):
    """The same on all ranks and for all methods, whatever was drawn before; and drawing them disturbs nobody."""
    torch.manual_seed(1)
    first = dense_weights(build(architecture, "full"))
    state = torch.get_rng_state()
    second = dense_weights(build(architecture, "robe"))
    assert torch.equal(state, torch.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = dense_weights(build(architecture, "full", seed=1))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dlrm_equals_a_plain_loop():
    """Bottom MLP, pairwise dots in the order (i < j), top MLP, written out (Naumov et al. 2019, section 2)."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    model = build("dlrm")
    dense, ids = torch.randn(5, 3), torch.tensor([[1, 2, 3, 4, 5], [8, 7, 6, 5, 4]])
    features = KeyedJaggedTensor(["a", "b"], ids.reshape(-1), lengths=torch.ones(10, dtype=torch.int64))
    found = model(dense, features)

    weights = dict(model.named_parameters())
    tables = [w for name, w in weights.items() if "embedding_bags" in name]
    bottom, top = ([w for n, w in weights.items() if n.startswith(part)] for part in ("dense_arch", "over_arch"))
    for row in range(5):
        x = dense[row]
        for weight, bias in zip(bottom[::2], bottom[1::2], strict=True):
            x = torch.relu(weight @ x + bias)
        vectors = [x, tables[0][ids[0, row]], tables[1][ids[1, row]]]
        dots = [vectors[i] @ vectors[j] for i in range(3) for j in range(i + 1, 3)]
        x = torch.cat([vectors[0], torch.stack(dots)])
        layers = list(zip(top[::2], top[1::2], strict=True))
        for index, (weight, bias) in enumerate(layers):
            x = weight @ x + bias
            if index < len(layers) - 1:
                x = torch.relu(x)
        torch.testing.assert_close(found[row], x)
