"""Every backend of the text unit under the same tests: its scores are those of a slow twin in float64.

Triton runs here on a GPU; `tests/ops/kernels/test_cuda.py` runs this file once more in Triton's interpreter, where no
other backend is asked again.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmip.data.table import Ragged, Table
from dsmip.units import text_unit_library
from tests.support.scoring.text_unit_pairs import INTERPRETED, Pairs, Way, as_seen, changed, pairs

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@pytest.fixture(
    scope="module",
    params=[Way("torch"), Way("cpp"), Way("cpp", dtype=torch.float64), Way("triton"), Way("triton", "fp16")],
    ids=lambda way: f"{way.backend}-{way.precision}-{way.dtype}".replace("torch.", ""),
)
def way(request: pytest.FixtureRequest) -> Way:
    asked: Way = request.param
    if INTERPRETED and asked.backend != "triton":
        pytest.skip("asked in the process without the interpreter")
    if asked.backend == "triton" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU at hand")
    if asked.backend == "cpp" and (reason := text_unit_library.why_unavailable()) is not None:
        pytest.skip(reason)
    return asked


@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(
    lengths,
    lengths,
    st.sampled_from([1, 5, 16, 24, 96, 100]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_scores_of_wanted_pairs_are_the_twins(
    way: Way, mentions: list[int], entities: list[int], width: int, share: float, seed: int
) -> None:
    case = pairs(way, mentions, entities, width)
    wanted_ME = torch.rand(len(mentions), len(entities), generator=torch.Generator().manual_seed(seed)) < share
    case.assert_equal(way, None if share == 1.0 else wanted_ME)


def test_texts_of_all_lengths(way: Way) -> None:
    """Up to more tokens than Triton takes (PyTorch does), several groups of entities and tiles of rows."""
    pairs(way, [1, 16, 17, 40, 64, 77, 96], [1, 16, 17, 40, 77] + 12 * [2], 40).assert_equal(way)
    pairs(way, [97, 3], [5, 1], 40).assert_equal(way)


def test_one_token_each(way: Way) -> None:
    pairs(way, [1] * 3, [1] * 20).assert_equal(way)


def test_padding_that_is_not_hidden(way: Way) -> None:
    """All token places are real then, and the twin is the same."""
    case = pairs(way, [9] * 4, [13] * 5)
    case.unit.mask_padding = False
    case.assert_equal(way)
    case.assert_equal(way, torch.eye(4, 5, dtype=torch.bool))


def sharing(column: Ragged) -> Ragged:
    """The last item has the first one's rows, the one before it all of them but the last."""
    starts, lengths = column.starts.clone(), column.lengths.clone()
    starts[-2:], lengths[-2:] = starts[0], lengths[0] - torch.tensor([1, 0])
    return Ragged(column.values, starts, lengths)


def strided(column: Ragged) -> Ragged:
    """The same numbers, no two of them side by side in memory."""
    spread = (torch.stack([x, x + 1], dim=-1)[..., 0] for x in (column.values, column.starts, column.lengths))
    return Ragged(*spread)


@pytest.mark.parametrize("change", [sharing, strided])
def test_how_rows_lie_in_memory(way: Way, change: Callable[[Ragged], Ragged]) -> None:
    case = changed(pairs(way, [7, 3, 9, 5], [4, 20, 3, 6, 5]), change)
    case.assert_equal(way)
    case.assert_equal(way, torch.tensor([[True, False, True, True]] * 5).T)


@pytest.mark.parametrize("scale", [1e-4, 3.0, 100.0])
def test_attention_may_be_flat_or_all_on_one_token(way: Way, scale: float) -> None:
    """At 100 logits are some ten thousands: their last bits move the attention itself."""
    if way.precision == "fp16" and scale < 1:
        pytest.skip("half precision has no such small numbers")
    pairs(way, [40, 7], [77, 3, 12], 96, scale).assert_equal(way, atol=way.atol + 100 * min(way.atol, Way("cpp").atol))


@pytest.mark.parametrize("largest", [59.0, 61.0, 1000.0])
def test_large_logits(way: Way, largest: float) -> None:
    """The second mention has one token, with the largest logits and the least: from 60 on exp must not see them."""
    case = pairs(way, [77, 1], [40, 17, 5])
    key, query = case.mentions.ragged("key"), case.entities.ragged("query")
    key_Rd, query_Rd = key.values.double(), query.values.double()
    key_Rd = 8 * key_Rd / key_Rd.norm(dim=1, keepdim=True)
    query_Rd = query_Rd[:, :1].sign() * key_Rd[key.starts[1]] * (largest / 64)
    mentions = case.mentions.merged(Table({"key": replace(key, values=key_Rd.float())}))
    entities = case.entities.merged(Table({"query": replace(query, values=query_Rd.float())}))
    as_seen(way, Pairs(case.unit, mentions, entities)).assert_equal(way, atol=5 * way.atol)


@pytest.mark.parametrize(
    ("name", "broken"), [*itertools.product(("key", "value", "query"), (torch.nan, torch.inf)), ("local", torch.nan)]
)
def test_what_is_not_finite_reaches_the_scores_of_its_item_only(way: Way, name: str, broken: float) -> None:
    case = pairs(way, [3, 5], [4, 6, 70])
    expected_ME = case.twin()
    side = case.entities if name in ("query", "local") else case.mentions
    if name == "local":
        side.dense(name)[1, 2] = broken
    else:
        side.ragged(name).values[side.ragged(name).starts[1], 0] = broken
    (expected_ME.T if side is case.entities else expected_ME)[1] = torch.nan
    torch.testing.assert_close(case.scores(way), expected_ME, atol=way.atol, rtol=0, equal_nan=True)
    wanted_ME = torch.ones_like(expected_ME, dtype=torch.bool)
    (wanted_ME.T if side is case.entities else wanted_ME)[1] = False
    if name != "local":  # which is in every pair's score
        assert bool(case.scores(way, wanted_ME).isfinite().all())


def test_an_item_without_tokens_scores_nan(way: Way) -> None:
    assert pairs(way, [0, 2], [1, 3]).scores(way).isnan().tolist() == [[True, True], [False, False]]
    assert pairs(way, [2, 5], [1, 0]).scores(way).isnan().tolist() == [[False, True], [False, True]]


def test_no_mention_or_no_entity(way: Way) -> None:
    case, none = pairs(way, [3, 5], [4, 6]), slice(0, 0)
    assert replace(case, mentions=case.mentions.rows(none)).scores(way).shape == (0, 2)
    assert replace(case, entities=case.entities.rows(none)).scores(way).shape == (2, 0)
