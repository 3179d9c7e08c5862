"""Memory that is used again must never be that of a tensor still alive, nor grow without bound."""

import gc

import torch

from xception_pl.kernels.memory import PAGE, Lender

COUNT = PAGE // 4 + 1
"""Floats that need two large pages."""


def test_freed_memory_is_lent_again() -> None:
    lender = Lender()
    first = lender.floats(COUNT)
    place = first.data_ptr()
    view = first[1:].view(2, -1)
    del first
    gc.collect()
    assert (lender.lent, lender.kept) == (2 * PAGE, 0)  # a view keeps it
    assert lender.floats(COUNT).data_ptr() != place
    del view
    assert lender.lent == 0
    again = [lender.floats(COUNT), lender.floats(COUNT)]
    assert place in {t.data_ptr() for t in again}


def test_what_is_alive_is_never_lent_again() -> None:
    lender = Lender()
    tensors = [lender.floats(COUNT).fill_(i) for i in range(4)]
    del tensors[1]
    tensors.append(lender.floats(COUNT).fill_(9))
    assert [t.unique().tolist() for t in tensors] == [[0], [2], [3], [9]]
    assert len({t.data_ptr() for t in tensors}) == 4


def test_autograd_s_saved_tensors_keep_their_memory() -> None:
    lender = Lender()
    x = torch.ones(COUNT, requires_grad=True)
    y = lender.floats(COUNT).fill_(3)
    product = (x * y).sum()
    del y
    assert lender.lent == 2 * PAGE
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((COUNT,), 3.0))
    del product
    assert lender.lent == 0


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    lender = Lender()
    for pages in range(2, 40):
        lender.floats(pages * PAGE // 4)
        assert lender.lent + lender.kept <= lender.most == pages * PAGE


def test_small_tensors_are_torch_s_own() -> None:
    lender = Lender()
    assert lender.floats(1000).shape == (1000,)
    assert lender.lent == lender.kept == 0
