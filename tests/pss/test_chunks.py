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
