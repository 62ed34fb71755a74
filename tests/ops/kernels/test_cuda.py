"""What the Triton text unit has of its own, and its scores (test_text_unit_backends.py) in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and any library may have imported it into this process: so the
interpreter runs both files in a process of its own, which that variable marks.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.errors import UserError
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.evaluation.ranks import Ranking
from dsmip.ops import kernels
from dsmip.ops.kernels import cuda
from dsmip.ops.kernels.rows import TokenRows
from dsmip.units.text_unit import HalfOverflow, TextUnit, use_backend, use_precision
from tests.support.paths import ROOT
from tests.support.scoring.matchers import TextMatcher, ranks_by_sorting
from tests.support.scoring.text_unit_pairs import CPU, INTERPRETED, Way, pairs

TRITON = Way("triton")
DEVICE = TRITON.device

on_device = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU at hand")


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="the interpreter's own process, or no Triton")
@pytest.mark.slow
def test_all_holds_in_the_interpreter() -> None:
    (scores,) = (ROOT / "tests").rglob("test_text_unit_backends.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-rs", __file__, str(scores)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no GPU at hand" not in run.stdout, run.stdout


def test_programs_are_groups_of_wanted_pairs_alone() -> None:
    """Mentions of 5, 77 and 9 tokens want 20, 16 and none of 40 entities: 2 + 1 groups, in two ways to cut keys."""
    programs = dict(cuda.programs(torch.tensor([5, 77, 9]), torch.tensor([20, 16, 0]), 40))
    assert {blocks: each.tolist() for blocks, each in programs.items()} == {
        (16, 16): [[0, 0], [1, 0]],
        (64, 16): [[0, 1]],
    }


def on_card(mention_lengths: list[int], entity_lengths: list[int]) -> tuple[TokenRows, TokenRows, TokenRows, Tensor]:
    *rows, direction_Ed = pairs(TRITON, mention_lengths, entity_lengths).of_kernel()
    key, value, query = (TokenRows(*(x.to(DEVICE) for x in each)) for each in rows)
    return key, value, query, direction_Ed.to(DEVICE)


@on_device
def test_what_the_kernel_cannot_score_is_refused() -> None:
    key, value, query, direction_Ed = on_card([3, 5], [4, 6])
    half = query._replace(values_Rd=query.values_Rd.half())
    for wrong, message in (
        ((key, value, query._replace(start_N=query.start_N + 100), direction_Ed), "outside of the"),
        ((key._replace(values_Rd=key.values_Rd.double()), value, query, direction_Ed), "float32 or float16"),
        ((key, value, half, direction_Ed), "one dtype"),
        ((key, value._replace(length_N=value.length_N - 1), query, direction_Ed), "differ in their numbers"),
        ((key, value, query, direction_Ed.half()), r"float32 \[E, d\]"),
        (on_card([97], [4]), "more than 96 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.local_scores(*wrong, 1e-5)
    with pytest.raises(ValueError, match="wanted pairs"):
        cuda.local_scores(key, value, query, direction_Ed, 1e-5, torch.ones(2, 3, dtype=torch.bool))


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
def test_half_precision_rounds_rows_that_are_scored_and_not_the_tables() -> None:
    unit = text_unit()
    tables = prepared(unit)
    with torch.no_grad():
        plain = unit.score(*tables)
        unit.backend = "triton"
        assert use_precision(unit, "fp16", "triton") == "fp16"
        half = unit.score(*tables)
    torch.testing.assert_close(half, plain, atol=1e-2, rtol=0)
    assert not torch.allclose(half, plain, atol=1e-6)
    assert tables[1].ragged("query").values.dtype == torch.float32  # exact scores are taken from them


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
    model = RankedModel(matcher, mentions, index, gold_M)
    assert rank_unrefined(model, DEVICE).rank_M.tolist() != expected
    assert rank(model, DEVICE).rank_M.tolist() == expected


@on_device
@pytest.mark.parametrize("side", ["value", "query"])
@pytest.mark.parametrize("ranked_by", [rank, rank_unrefined])
def test_rows_too_large_for_half_precision_are_scored_in_single(side: str, ranked_by: Callable[..., Ranking]) -> None:
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
    model = RankedModel(matcher, mentions, EntityIndex([entities]), gold_M)
    ranking = ranked_by(model, DEVICE, notice=notices.append)
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
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        cuda.local_scores(*pairs(TRITON, [3], [4]).of_kernel(), 1e-5)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_what_goes_wrong_at_the_first_call_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
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
