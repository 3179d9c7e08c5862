"""Memory that is used again must never be that of a tensor still alive, nor grow without bound."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import torch

from xception_pl.kernels.memory import LARGE, Lender

COUNT = LARGE // 4
BYTES = LARGE


def test_freed_memory_is_lent_again() -> None:
    lender = Lender()
    first = lender.floats(COUNT)
    place = first.data_ptr()
    view = first[1:].view(3, -1)
    del first
    gc.collect()
    assert (lender.lent, lender.kept) == (BYTES, 0)  # a view keeps it
    other = lender.floats(COUNT)
    assert other.data_ptr() != place
    del view
    assert lender.lent == BYTES
    again = lender.floats(COUNT)
    assert again.data_ptr() == place


def test_what_is_alive_is_never_lent_again() -> None:
    lender, rng = Lender(), random.Random(0)
    alive: dict[int, torch.Tensor] = {}
    for i in range(300):
        if len(alive) > 8:
            del alive[rng.choice(list(alive))]
        alive[i] = lender.floats(COUNT * rng.randint(1, 5) + rng.randint(0, 9)).fill_(i)
        if i % 20 == 0:
            assert all(bool((tensor == name).all()) for name, tensor in alive.items())
    expected = sum(-(-4 * tensor.numel() // (1 << 16)) << 16 for tensor in alive.values())
    assert lender.lent == expected
    alive.clear()
    assert lender.lent == 0


def test_autograd_s_saved_tensors_keep_their_memory() -> None:
    lender = Lender()
    x = torch.ones(COUNT, requires_grad=True)
    y = lender.floats(COUNT).fill_(3)
    product = (x * y).sum()
    del y
    assert lender.lent == BYTES
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((COUNT,), 3.0))
    del product
    assert lender.lent == 0


def test_steps_of_the_same_maps_settle_on_one_region_with_room_for_all() -> None:
    lender = Lender()

    def step() -> set[int]:
        alive = [lender.floats(COUNT * n) for n in (3, 1, 4)]
        del alive[1]
        alive += [lender.floats(COUNT * n) for n in (2, 5)]
        return {tensor.data_ptr() for tensor in alive}

    step(), step()
    assert step() == step()
    assert lender.kept <= (3 + 1 + 4 + 2 + 5) * BYTES


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    lender = Lender()
    for n in range(1, 40):
        lender.floats(n * COUNT)
        assert lender.lent + lender.kept == n * BYTES


def test_gaps_side_by_side_become_one() -> None:
    lender = Lender()
    lender.floats(4 * COUNT)
    parts = [lender.floats(COUNT) for _ in range(4)]
    place = parts[0].data_ptr()
    while parts:
        parts.pop(len(parts) // 2)
    assert lender.floats(4 * COUNT).data_ptr() == place
    assert lender.lent + lender.kept == 4 * BYTES


def test_threads_may_share_a_lender() -> None:
    lender = Lender()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(40):
            tensor = lender.floats(COUNT * rng.randint(1, 3)).fill_(seed * 1000 + i)
            other = lender.floats(COUNT).fill_(-1)
            assert bool((tensor == seed * 1000 + i).all())
            assert bool((other == -1).all())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert lender.lent == 0


def test_small_tensors_are_torch_s_own() -> None:
    lender = Lender()
    assert lender.floats(1000).shape == (1000,)
    assert lender.lent == lender.kept == 0
