"""Gates of a mixture against twins that go through tokens and experts one by one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.ops.mixture import gates_as_published, gates_per_token


def random_logits(num_items: int, num_places: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_items, num_places, num_experts, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_token_keeps_its_best_experts(num_items: int, num_places: int, num_experts: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, num_experts))
    logits = random_logits(num_items, num_places, num_experts, data.draw(st.integers(0, 99)))
    found = gates_per_token(logits, kept)
    for item in range(num_items):
        for place in range(num_places):
            share = logits[item, place].exp()
            best = sorted(range(num_experts), key=lambda expert: -float(share[expert]))[:kept]
            total = sum(float(share[expert]) for expert in best)
            expected = [float(share[e]) / total if e in best else 0.0 for e in range(num_experts)]
            torch.testing.assert_close(found[item, place], torch.tensor(expected, dtype=torch.float64))


def test_the_published_gate_takes_experts_for_places() -> None:
    logits, kept, (num_items, num_places, num_experts) = random_logits(3, 6, 4), 2, (3, 6, 4)
    found = gates_as_published(logits, kept)
    alive = torch.zeros(num_items, num_places, num_experts, dtype=torch.float64)
    share = logits.softmax(dim=-1)
    for item in range(num_items):
        for place in range(num_places):
            best = sorted(range(num_experts), key=lambda expert: -float(share[item, place, expert]))[:kept]
            for slot, expert in enumerate(best):
                alive[item, expert, slot] = share[item, expert, slot]
    expected = alive / (alive.sum(dim=0) + 1e-6) * num_items
    torch.testing.assert_close(found, expected)
    assert not found[:, num_experts:].any()
    assert not found[..., kept:].any()
    alone = torch.cat([gates_as_published(logits[n : n + 1], kept) for n in range(num_items)])
    assert not torch.allclose(alone, found, atol=0.1)  # the batch decides


def test_gradients_equal_finite_differences() -> None:
    logits = random_logits(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gates_per_token(x, 3), [logits], fast_mode=True)
