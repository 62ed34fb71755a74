"""Text and cross unit mathematics against direct twins that hold every tensor of the published formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.cross_unit import cross_vector
from dsmip.ops.text_unit import local_scores, with_global


def direct_text_unit(
    global_Mz: Tensor,
    global_Ez: Tensor,
    key_MTd: Tensor,
    value_MTd: Tensor,
    mask_MT: Tensor | None,
    query_ESd: Tensor,
    mask_ES: Tensor | None,
    local_query_Ed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    logits = torch.einsum("esd,mtd->mest", query_ESd, key_MTd)
    if mask_MT is not None:
        logits = logits.masked_fill(~mask_MT[:, None, None], -torch.inf)
    context = torch.einsum("mest,mtd->mesd", logits.softmax(-1), value_MTd)
    if mask_ES is None:
        pooled = context.mean(2)
    else:
        pooled = (context * mask_ES[None, :, :, None]).sum(2) / mask_ES.sum(1)[None, :, None]
    normed = F.layer_norm(pooled, pooled.shape[-1:], norm_weight, norm_bias, eps)
    return (global_Mz @ global_Ez.T + (normed * local_query_Ed).sum(-1)) / 2


def text_unit(
    global_Mz: Tensor,
    global_Ez: Tensor,
    key_MTd: Tensor,
    value_MTd: Tensor,
    mask_MT: Tensor | None,
    query_ESd: Tensor,
    mask_ES: Tensor | None,
    local_query_Ed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    max_elements: int | None = None,
    kept_elements: int = 2**26,
) -> Tensor:
    tokens = key_MTd, value_MTd, mask_MT, query_ESd, mask_ES
    sizes = {"max_elements": max_elements, "kept_elements": kept_elements}
    local_ME = local_scores(*tokens, local_query_Ed * norm_weight, eps, **sizes)  # type: ignore[arg-type]
    return with_global(local_ME, global_Mz, global_Ez, local_query_Ed, norm_bias)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, Tensor, float]


def random_inputs(
    seed: int, num_mentions: int, num_entities: int, t: int = 6, s: int = 5, *, masked: bool = True, scale: float = 1.0
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def mask(num_items: int, num_tokens: int) -> Tensor | None:
        lengths = torch.randint(1, num_tokens + 1, (num_items, 1), generator=generator)
        return torch.arange(num_tokens) < lengths if masked else None

    m, e, d, z = num_mentions, num_entities, 8, 7
    tokens = (normal(m, t, d), normal(m, t, d) + 1, mask(m, t), normal(e, s, d) * scale, mask(e, s))
    return (normal(m, z), normal(e, z), *tokens, normal(e, d), normal(d), normal(d), 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_mentions=st.integers(1, 6),
    num_entities=st.integers(1, 9),
    max_elements=st.sampled_from([1, 40, 300, 2**20]),
    masked=st.booleans(),
)
def test_text_unit_equals_the_direct_form_for_any_blocks(
    seed: int, num_mentions: int, num_entities: int, max_elements: int, masked: bool
) -> None:
    inputs = random_inputs(seed, num_mentions, num_entities, masked=masked)
    with torch.no_grad():
        torch.testing.assert_close(text_unit(*inputs, max_elements=max_elements), direct_text_unit(*inputs))


def test_text_unit_in_float32_is_near_float64() -> None:
    inputs = random_inputs(0, 6, 9, t=30, s=30)
    halves = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    scores = text_unit(*halves)  # type: ignore[arg-type]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), direct_text_unit(*inputs), atol=3e-5, rtol=1e-5)


def test_text_unit_survives_large_logits() -> None:
    inputs = random_inputs(1, 3, 4, scale=500.0)
    scores = text_unit(*inputs)
    assert bool(scores.isfinite().all())
    torch.testing.assert_close(scores, direct_text_unit(*inputs))


def test_what_stands_in_padding_does_not_matter() -> None:
    inputs = random_inputs(2, 5, 6)
    key, value, mask_MT, query, mask_ES = inputs[2:7]
    assert mask_MT is not None
    assert mask_ES is not None
    garbage_MTd, garbage_ESd = 1e3 * ~mask_MT[..., None], 1e3 * ~mask_ES[..., None]
    changed = (*inputs[:2], key + garbage_MTd, value + garbage_MTd, mask_MT, query + garbage_ESd, mask_ES, *inputs[7:])
    torch.testing.assert_close(text_unit(*changed), text_unit(*inputs))


@pytest.mark.parametrize("max_elements", [50, 2**20])
@pytest.mark.parametrize("kept_elements", [0, 2**26])
def test_text_unit_gradients_equal_those_of_the_direct_form(max_elements: int, kept_elements: int) -> None:
    inputs = random_inputs(3, 4, 5)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    weights_ME = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores_ME = text_unit(*inputs, max_elements=max_elements, kept_elements=kept_elements)
    ours = torch.autograd.grad((scores_ME * weights_ME).sum(), leaves)
    twins = torch.autograd.grad((direct_text_unit(*inputs) * weights_ME).sum(), leaves)
    for our, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(our, twin)


@pytest.mark.parametrize(("num_mentions", "num_entities"), [(0, 3), (3, 0)])
def test_no_items_give_no_scores(num_mentions: int, num_entities: int) -> None:
    for masked in (True, False):
        scores = text_unit(*random_inputs(0, num_mentions, num_entities, masked=masked))
        assert scores.shape == (num_mentions, num_entities)


def test_cross_vector_equals_a_loop_over_items() -> None:
    generator = torch.Generator().manual_seed(0)
    text, tokens = torch.randn(4, 6, generator=generator), torch.randn(4, 5, 6, generator=generator)
    gate_weight, gate_bias = torch.randn(1, 6, generator=generator), torch.randn(1, generator=generator)
    norm_weight, norm_bias = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    lengths = [5, 1, 3, 2]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    fused = cross_vector(text, tokens, mask, gate_weight, gate_bias, norm_weight, norm_bias, 1e-5)
    for n, length in enumerate(lengths):
        weights = (tokens[n, :length] @ text[n]).exp()
        context = (weights / weights.sum()) @ tokens[n, :length]
        added = torch.tanh(gate_weight[0] @ text[n] + gate_bias) * text[n] + context
        expected = (added - added.mean()) / (added.var(unbiased=False) + 1e-5).sqrt() * norm_weight + norm_bias
        torch.testing.assert_close(fused[n], expected, atol=1e-5, rtol=1e-5)
