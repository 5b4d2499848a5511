import pytest
import torch

from pss import chunks
from pss.chunks import read_chunks


def test_reads_runs_of_the_array():
    memory = torch.arange(10.0)
    read = read_chunks(memory, torch.tensor([[0, 7], [3, 3]]), 3)
    assert read.tolist() == [[[0, 1, 2], [7, 8, 9]], [[3, 4, 5], [3, 4, 5]]]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("block_elements", [1, 7, 1 << 16])
def test_gradient_is_that_of_indexing(width: int, block_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_CPU_BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(width)
    memory = torch.randn(20, generator=generator, requires_grad=True)
    locations = torch.randint(0, 20 - width + 1, (5, 6), generator=generator)
    grad = torch.randn(5, 6, width, generator=generator)
    read_chunks(memory, locations, width).backward(grad)
    reference = memory.detach().clone().requires_grad_()
    reference[locations.unsqueeze(-1) + torch.arange(width)].backward(grad)
    assert memory.grad is not None
    torch.testing.assert_close(memory.grad, reference.grad)


def test_differentiable_twice():
    memory = torch.randn(9, dtype=torch.float64, requires_grad=True)
    locations = torch.tensor([0, 4, 4, 6])
    assert torch.autograd.gradcheck(lambda m: read_chunks(m, locations, 3) ** 2, memory)
    assert torch.autograd.gradgradcheck(lambda m: read_chunks(m, locations, 3) ** 2, memory)


def test_reads_nothing_at_no_location():
    memory = torch.randn(9, requires_grad=True)
    read = read_chunks(memory, torch.empty(0, 2, dtype=torch.int64), 3)
    assert read.shape == (0, 2, 3)
    read.sum().backward()
    assert memory.grad is not None
    assert not memory.grad.any()


def test_the_traceable_formula_is_the_same():
    memory, locations = torch.randn(9), torch.tensor([[0, 4], [4, 6]])
    assert torch.equal(chunks._read_addresses(memory, locations, 3), read_chunks(memory, locations, 3))


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_sparse_gradient_is_the_dense_one_coalesced(width: int, aligned: bool):
    """Repeated, overlapping and, if aligned, only repeated runs; every slot once, in order, and no untouched one."""
    generator = torch.Generator().manual_seed(width)
    memory = torch.randn(40, dtype=torch.float64, generator=generator, requires_grad=True)
    locations = torch.randint(0, 4, (5, 6), generator=generator) * (8 if aligned else 3)
    grad = torch.randn(5, 6, width, dtype=torch.float64, generator=generator)
    (dense,) = torch.autograd.grad(read_chunks(memory, locations, width, "dense"), memory, grad)
    (sparse,) = torch.autograd.grad(read_chunks(memory, locations, width, "sparse"), memory, grad)
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    slots = sparse.indices()[0]
    assert slots.tolist() == sorted({location + z for location in locations.flatten().tolist() for z in range(width)})
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_auto_is_sparse_where_few_slots_are_read():
    for size, is_sparse in ((40 * 6, False), (40 * 6 + 1, True)):
        memory = torch.zeros(size, requires_grad=True)
        read_chunks(memory, torch.tensor([0, 9]), 3, "auto").sum().backward()
        assert memory.grad is not None
        assert memory.grad.is_sparse == is_sparse


def test_no_chunk_has_an_empty_sparse_gradient():
    memory = torch.randn(9, requires_grad=True)
    read_chunks(memory, torch.empty(0, dtype=torch.int64), 3, "sparse").sum().backward()
    assert memory.grad is not None
    assert memory.grad._nnz() == 0
