"""The Triton text unit against its plain twin in float64: in Triton's interpreter, and on a GPU where there is one.

Triton reads TRITON_INTERPRET when it is imported, and any library may have imported it into this process: so the
interpreter runs this very file in a process of its own, which that variable marks.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import TableMatcher, ranks_by_sorting
from torch import Tensor

from dsmip.errors import UserError
from dsmip.evaluation import rank
from dsmip.index import EntityIndex
from dsmip.models.base import Scores
from dsmip.ops import kernels, matching
from dsmip.ops.kernels import cuda
from dsmip.ops.kernels.rows import TokenRows
from dsmip.table import Ragged, Table
from dsmip.text_unit import HalfOverflow, TextUnit, use_backend, use_precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = CPU if INTERPRETED else torch.device("cuda")
ATOL = {torch.float32: 3e-5, torch.float16: 2e-2}  # scores spread by the square root of the width, 10 at most
LENGTHS = [1, 16, 17, 40, 77]

on_device = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU at hand")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="the interpreter's own process, or no Triton")
def test_all_holds_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-rs", __file__],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no GPU at hand" not in run.stdout, run.stdout


def rows(lengths: list[int], width: int, dtype: torch.dtype, generator: torch.Generator) -> TokenRows:
    """Token rows in any order, with rows in between that belong to no item."""
    length_N = torch.tensor(lengths)
    order_N = torch.randperm(len(lengths), generator=generator)
    start_N = torch.empty_like(length_N)
    start_N[order_N] = 3 + (length_N[order_N] + 2).cumsum(0) - (length_N[order_N] + 2)
    values_Rd = torch.randn(int((length_N + 2).sum()) + 3, width, generator=generator)
    return TokenRows(values_Rd.to(dtype), start_N, length_N)


def items(
    mention_lengths: list[int],
    entity_lengths: list[int],
    width: int,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
) -> tuple[TokenRows, TokenRows, TokenRows, Tensor]:
    """scale: of queries and keys; by default logits spread by 1."""
    generator = torch.Generator().manual_seed(sum(mention_lengths) + 7 * width)
    key = rows(mention_lengths, width, dtype, generator)
    value = rows(mention_lengths, width, dtype, generator)
    query = rows(entity_lengths, width, dtype, generator)
    scale = width**-0.25 if scale is None else scale
    key, query = (each._replace(values_Rd=each.values_Rd * scale) for each in (key, query))
    return key, value, query, torch.randn(len(entity_lengths), width, generator=generator)


def twin(key: TokenRows, value: TokenRows, query: TokenRows, direction_Ed: Tensor, eps: float = 1e-5) -> Tensor:
    (k, mask_MT), (v, _), (q, mask_ES) = (Ragged(*each).cast(torch.float64).padded() for each in (key, value, query))
    return matching.local_scores(k, v, mask_MT, q, mask_ES, direction_Ed.double(), eps).float()


def scored(
    key: TokenRows,
    value: TokenRows,
    query: TokenRows,
    direction_Ed: Tensor,
    wanted_ME: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The kernel's scores, on the CPU."""
    on_device = (TokenRows(*(x.to(DEVICE) for x in each)) for each in (key, value, query))
    wanted_ME = None if wanted_ME is None else wanted_ME.to(DEVICE)
    scores_ME = cuda.local_scores(*on_device, direction_Ed.to(DEVICE), eps, wanted_ME)
    assert scores_ME.dtype == torch.float32
    assert scores_ME.device.type == DEVICE.type
    return scores_ME.cpu()


@on_device
@dtypes
@pytest.mark.parametrize("width", [40, 96])
def test_scores_are_those_of_the_plain_twin(width: int, dtype: torch.dtype) -> None:
    """All ways to cut keys, several groups of entities and tiles of rows, channels that leave room in a piece."""
    inputs = items([*LENGTHS, 64, 96], LENGTHS + 12 * [2], width, dtype)
    torch.testing.assert_close(scored(*inputs), twin(*inputs), atol=ATOL[dtype], rtol=0)


@on_device
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.sampled_from([1, 5, 24]),
    st.integers(0, 100),
)
def test_wanted_pairs_are_scored_and_the_others_are_zero(
    mentions: list[int], entities: list[int], width: int, seed: int
) -> None:
    inputs = items(mentions, entities, width)
    generator = torch.Generator().manual_seed(seed)
    wanted_ME = torch.rand(len(mentions), len(entities), generator=generator) < torch.rand((), generator=generator)
    expected_ME = twin(*inputs, eps=1e-3).where(wanted_ME, 0.0)
    scores_ME = scored(*inputs, wanted_ME, eps=1e-3)
    torch.testing.assert_close(scores_ME, expected_ME, atol=ATOL[torch.float32], rtol=0)
    assert bool((scores_ME[~wanted_ME] == 0).all())


@on_device
@dtypes
@pytest.mark.parametrize("largest", [59.0, 61.0, 1000.0])
def test_large_logits(largest: float, dtype: torch.dtype) -> None:
    """The second mention has one token, with the largest logits and the least: from 60 on exp must not see them."""
    key, value, query, direction_Ed = items([77, 1], [40, 17, 5], 16, dtype)
    key_Rd, query_Rd = key.values_Rd.double(), query.values_Rd.double()
    key_Rd = 8 * key_Rd / key_Rd.norm(dim=1, keepdim=True)
    query_Rd = query_Rd[:, :1].sign() * key_Rd[key.start_N[1]] * (largest / 64)
    inputs = key._replace(values_Rd=key_Rd.to(dtype)), value, query._replace(values_Rd=query_Rd.to(dtype)), direction_Ed
    torch.testing.assert_close(scored(*inputs), twin(*inputs), atol=5 * ATOL[dtype], rtol=0)


@on_device
@dtypes
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["key", "value", "query", "direction"])
def test_nan_reaches_the_scores_of_its_item_only(which: str, broken: float, dtype: torch.dtype) -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6, 70], 16, dtype)
    expected_ME = twin(key, value, query, direction_Ed)
    if which == "direction":
        direction_Ed[1, 2] = torch.nan
    else:
        values_Rd, start_N, _ = {"key": key, "value": value, "query": query}[which]
        values_Rd[start_N[1], 0] = broken
    (expected_ME if which in ("key", "value") else expected_ME.T)[1] = torch.nan
    scores_ME = scored(key, value, query, direction_Ed)
    torch.testing.assert_close(scores_ME, expected_ME, atol=ATOL[dtype], rtol=0, equal_nan=True)


@on_device
def test_a_pair_that_is_not_wanted_is_zero_even_if_its_item_is_broken() -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6], 16)
    query.values_Rd[query.start_N[1]] = torch.nan
    scores_ME = scored(key, value, query, direction_Ed, torch.tensor([[True, False], [True, False]]))
    assert scores_ME[:, 1].tolist() == [0.0, 0.0]
    assert bool((scores_ME[:, 0] != 0).all())


def test_programs_are_groups_of_wanted_pairs_alone() -> None:
    """Mentions of 5, 77 and 9 tokens want 20, 16 and none of 40 entities: 2 + 1 groups, in two ways to cut keys."""
    programs = dict(cuda._programs(torch.tensor([5, 77, 9]), torch.tensor([20, 16, 0]), 40))
    assert {pieces: each.tolist() for pieces, each in programs.items()} == {
        (16, 16): [[0, 0], [1, 0]],
        (64, 16): [[0, 1]],
    }


@on_device
def test_an_item_without_tokens_scores_nan() -> None:
    assert scored(*items([0, 2], [1], 16)).isnan().flatten().tolist() == [True, False]
    assert scored(*items([2], [1, 0], 16)).isnan().flatten().tolist() == [False, True]


@on_device
def test_no_mention_or_no_entity() -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6], 16)
    none = torch.zeros(0, dtype=torch.int64)
    nobody = [TokenRows(torch.zeros(0, 16), none, none) for _ in (key, value)]
    assert scored(*nobody, query, direction_Ed).shape == (0, 2)
    nothing = TokenRows(torch.zeros(0, 16), none, none)
    assert scored(key, value, nothing, direction_Ed[:0]).shape == (2, 0)


@on_device
def test_what_the_kernel_cannot_score_is_refused() -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6], 16)
    half = query._replace(values_Rd=query.values_Rd.half())
    for wrong, message in (
        ((key, value, query._replace(start_N=query.start_N + 100), direction_Ed), "outside of the"),
        ((key._replace(values_Rd=key.values_Rd.double()), value, query, direction_Ed), "float32 or float16"),
        ((key, value, half, direction_Ed), "one dtype"),
        ((key, value._replace(length_N=value.length_N - 1), query, direction_Ed), "differ in their numbers"),
        ((key, value, query, direction_Ed.half()), r"float32 \[E, d\]"),
        (items([97], [4], 16), "more than 96 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(*wrong)
    with pytest.raises(ValueError, match="wanted pairs"):
        scored(key, value, query, direction_Ed, torch.ones(2, 3, dtype=torch.bool))


def text_unit() -> TextUnit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextUnit(12, 20, 16)


def prepared(unit: TextUnit, longest_mention: int = 9) -> tuple[Table, Table]:
    """Tables of 6 mentions and 11 entities that are slices of larger ones."""
    generator = torch.Generator().manual_seed(0)

    def side(count: int, longest: int) -> tuple[Tensor, Ragged]:
        tokens_NTd = torch.randn(count, longest, 20, generator=generator)
        lengths_N = torch.randint(1, longest + 1, (count,), generator=generator)
        lengths_N[2] = longest
        tokens = Ragged.from_padded(tokens_NTd, torch.arange(longest) < lengths_N[:, None])
        return torch.randn(count, 12, generator=generator).to(DEVICE), tokens.to(DEVICE)

    with torch.no_grad():
        mentions = unit.to(DEVICE).prepare_mentions(*side(8, longest_mention))
        return mentions.rows(slice(1, 7)), unit.prepare_entities(*side(14, 14)).rows(slice(2, 13))


@on_device
def test_the_text_unit_scores_the_same_with_either_backend() -> None:
    unit = text_unit()
    tables = prepared(unit)
    wanted_ME = (torch.rand(6, 11, generator=torch.Generator().manual_seed(1)) < 0.4).to(DEVICE)
    with torch.no_grad():
        plain, plain_wanted = unit.score(*tables), unit.score(*tables, wanted_ME)
        unit.backend = "triton"
        torch.testing.assert_close(unit.score(*tables), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(unit.score(*tables, wanted_ME), plain_wanted, atol=1e-5, rtol=1e-5)
        assert use_precision(unit, "fp16", "triton") == "fp16"
        half = unit.score(*tables)
    torch.testing.assert_close(half, plain, atol=1e-2, rtol=0)
    assert not torch.allclose(half, plain, atol=1e-6)  # rounded it was
    assert tables[1].ragged("query").values.dtype == torch.float32  # but not where exact scores are taken from


@on_device
def test_pytorch_scores_what_the_kernel_does_not_take() -> None:
    """Gradients, double precision (close pairs are scored again in it) and very long mentions."""
    unit = text_unit()
    mentions, entities = prepared(unit)
    long_mentions = prepared(unit, longest_mention=97)[0]
    with torch.no_grad():
        plain = unit.score(mentions, entities), unit.score(long_mentions, entities)
    unit.backend, unit.precision = "triton", "fp16"
    assert unit.score(mentions, entities).requires_grad
    with torch.no_grad():
        assert torch.equal(unit.score(long_mentions, entities), plain[1])
        exact = unit.double().score(mentions.cast(torch.float64), entities.cast(torch.float64))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), plain[0], atol=1e-5, rtol=1e-5)


class TextMatcher(TableMatcher):
    """A text unit alone."""

    def __init__(self, unit: TextUnit) -> None:
        super().__init__(torch.zeros(0))
        self.unit = unit

    def score(
        self, mentions: Table, entities: Table, *, noise: Tensor | None = None, at_least_M: Tensor | None = None
    ) -> Scores:
        return Scores(self.unit.score(mentions, entities))


@on_device
def test_refined_ranks_are_exact_in_half_precision() -> None:
    """Entities that differ in their fifth digits only: half precision alone ranks them otherwise."""
    unit = text_unit()
    mentions, _ = prepared(unit)
    generator = torch.Generator().manual_seed(2)
    tokens_NTd = torch.randn(1, 6, 20, generator=generator) + 1e-4 * torch.randn(30, 6, 20, generator=generator)
    global_Nz = torch.ones(30, 12)
    with torch.no_grad():
        entities = unit.prepare_entities(global_Nz.to(DEVICE), Ragged.from_padded(tokens_NTd.to(DEVICE)))
        matcher = TextMatcher(unit).double()
        exact_ME = matcher.score(mentions.cast(torch.float64), entities.cast(torch.float64)).total_ME.cpu()
    matcher.float()
    unit.backend, unit.precision = "triton", "fp16"
    gold_M, index = torch.arange(6) * 4, EntityIndex([entities])
    expected = ranks_by_sorting(exact_ME, gold_M)
    assert rank(matcher, mentions, index, gold_M, device=DEVICE).rank_M.tolist() != expected
    assert rank(matcher, mentions, index, gold_M, device=DEVICE, refine=True).rank_M.tolist() == expected


@on_device
@pytest.mark.parametrize("side", ["value", "query"])
@pytest.mark.parametrize("refine", [False, True])
def test_rows_too_large_for_half_precision_are_scored_in_single(side: str, refine: bool) -> None:
    """A trained model whose rows exceed 65504 is no broken one."""
    unit = text_unit()
    with torch.no_grad():
        layer = unit.fc_value if side == "value" else unit.fc_query
        layer.weight.mul_(1e6)
        layer.bias.mul_(1e6)
        if side == "query":
            unit.fc_key.weight.mul_(1e-6)
            unit.fc_key.bias.mul_(1e-6)
        mentions, entities = prepared(unit)
        matcher = TextMatcher(unit).double()
        exact_ME = matcher.score(mentions.cast(torch.float64), entities.cast(torch.float64)).total_ME.cpu()
    matcher.float()
    unit.backend, unit.precision = "triton", "fp16"
    with torch.no_grad(), pytest.raises(HalfOverflow, match="too large for half precision"):
        unit.score(mentions, entities)
    gold_M, notices = torch.arange(len(mentions)) % len(entities), list[str]()
    index = EntityIndex([entities])
    ranking = rank(matcher, mentions, index, gold_M, device=DEVICE, refine=refine, notice=notices.append)
    assert ranking.rank_M.tolist() == ranks_by_sorting(exact_ME, gold_M)
    assert [line.split(": ")[1] for line in notices] == ["going on with fp32"]
    assert unit.precision == "fp32"


@pytest.fixture
def forgetful() -> Iterator[None]:
    """`why_unavailable` looks anew, before the test and after it."""
    cuda.why_unavailable.cache_clear()
    yield
    cuda.why_unavailable.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_platform_without_triton_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dsmip.ops.kernels.text_unit_triton", raising=False)
    monkeypatch.delattr(kernels, "text_unit_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    key, value, query, direction_Ed = items([3], [4], 16)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        cuda.local_scores(key, value, query, direction_Ed, 1e-5)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_what_goes_wrong_at_the_first_call_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_device_type", lambda: "cpu")
    monkeypatch.setattr(cuda, "_scores", fail)
    assert cuda.why_unavailable() == "Triton does not work here: no C compiler"


@pytest.mark.usefixtures("forgetful")
@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="the interpreter needs no GPU, or no Triton")
def test_without_a_gpu_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_unavailable() == "PyTorch sees no GPU"


def test_a_gpu_takes_triton_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, gpu = text_unit(), torch.device("cuda")
    monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
    assert use_backend(unit, "auto", gpu) == use_backend(unit, "triton", gpu) == unit.backend == "triton"
    assert use_backend(unit, "torch", gpu) == unit.backend == "torch"
    monkeypatch.setattr(cuda, "why_unavailable", lambda: "its compiler is gone")
    with pytest.warns(UserWarning, match="scoring with PyTorch: its compiler is gone"):
        assert use_backend(unit, "auto", gpu) == unit.backend == "torch"
    with pytest.raises(UserError, match="triton cannot be built: its compiler is gone"):
        use_backend(unit, "triton", gpu)
    with pytest.raises(UserError, match="backend triton runs on a GPU, not on cpu"):
        use_backend(unit, "triton", CPU)


def test_half_precision_goes_with_triton_alone() -> None:
    unit = text_unit()
    assert use_precision(unit, "auto", "triton") == unit.precision == "fp16"
    assert use_precision(unit, "fp32", "triton") == unit.precision == "fp32"
    assert use_precision(unit, "fp16", "triton") == unit.precision == "fp16"
    assert use_precision(unit, "auto", "cpp") == unit.precision == "fp32"
    with pytest.raises(UserError, match="fp16 needs a GPU and backend triton, and this is cpp"):
        use_precision(unit, "fp16", "cpp")
