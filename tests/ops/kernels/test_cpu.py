"""What the C++ text unit has of its own; its scores: tests/units/test_text_unit_backends.py."""

import ctypes
from dataclasses import replace

import pytest
import torch

from dsmip.data.table import Ragged, Table
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank, rank_unrefined
from dsmip.ops import text_unit as ops
from dsmip.ops.kernels import cpu
from dsmip.ops.kernels.rows import TokenRows
from dsmip.units.text_unit_library import library_or_reason
from tests.support.scoring.matchers import TextMatcher, ranks_by_sorting
from tests.support.scoring.text_unit_pairs import CPU, Way, pairs

CPP = Way("cpp")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = library_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_depends_on_its_pair_alone_to_the_last_bit(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    *sides, direction_Ed = pairs(CPP, [40, 3, 17, 77] * 10, [5, 77, 30] * 40, 96).of_kernel()
    key, value, query = (each._replace(values_Rd=each.values_Rd.to(dtype)) for each in sides)
    direction_Ed = direction_Ed.to(dtype)
    scores_ME = cpu.local_scores(library, key, value, query, direction_Ed, 1e-5, num_threads=1)
    assert torch.equal(cpu.local_scores(library, key, value, query, direction_Ed, 1e-5, num_threads=3), scores_ME)
    one_key, one_value = (TokenRows(each.values_Rd, each.start_N[7:8], each.length_N[7:8]) for each in (key, value))
    few = TokenRows(query.values_Rd, query.start_N[11:14], query.length_N[11:14])
    assert torch.equal(
        cpu.local_scores(library, one_key, one_value, few, direction_Ed[11:14], 1e-5), scores_ME[7:8, 11:14]
    )
    wanted_ME = torch.rand(scores_ME.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found_ME = cpu.local_scores(library, key, value, query, direction_Ed, 1e-5, wanted_ME)
    assert torch.equal(found_ME, scores_ME.where(wanted_ME, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_takes_it_for_single_and_double_precision(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = pairs(CPP, [40, 7], [77, 3, 12], 96)
    unit, (mentions, entities) = case.unit.to(dtype), (each.cast(dtype) for each in (case.mentions, case.entities))
    unit.backend = "cpp"
    with torch.no_grad():
        found_ME = unit.score(mentions, entities)
        local_Ed = entities.dense("local")
        key, value, query, _ = replace(case, mentions=mentions, entities=entities).of_kernel()
        direction_Ed = local_Ed * unit.layer_norm.weight
        local_ME = cpu.local_scores(library, key, value, query, direction_Ed, unit.layer_norm.eps)
        globals_ = mentions.dense("global"), entities.dense("global")
        assert torch.equal(found_ME, ops.with_global(local_ME, *globals_, local_Ed, unit.layer_norm.bias))
    assert found_ME.dtype == dtype


def test_refined_ranks_are_pytorchs_in_double_precision(library: ctypes.CDLL) -> None:
    """Entities that differ in their seventh digits only: single precision alone ranks them otherwise."""
    case, generator = pairs(CPP, [9, 4, 17, 1, 30, 8], [6] * 40), torch.Generator().manual_seed(2)
    one = torch.randn(1, 6, 16, generator=generator)
    queries = Ragged.from_padded(one + 1e-7 * torch.randn(40, 6, 16, generator=generator))
    columns = {name: case.entities.dense(name)[:1].expand(40, -1).clone() for name in ("global", "local")}
    entities, matcher = Table({**columns, "query": queries}), TextMatcher(case.unit)
    case.unit.backend = "torch"
    with torch.no_grad():
        doubled = case.mentions.cast(torch.float64), entities.cast(torch.float64)
        exact_ME = matcher.double().score(*doubled).total_ME
    matcher.float()
    case.unit.backend = "cpp"
    gold_M = torch.arange(6) * 4
    model = RankedModel(matcher, case.mentions, EntityIndex([entities]), gold_M)
    expected = ranks_by_sorting(exact_ME, gold_M)
    assert rank_unrefined(model, CPU).rank_M.tolist() != expected
    assert rank(model, CPU).rank_M.tolist() == expected


def test_what_the_kernel_must_not_read_is_refused(library: ctypes.CDLL) -> None:
    key, value, query, direction_Ed = pairs(CPP, [3, 5], [4, 6]).of_kernel()
    beyond = key._replace(start_N=key.start_N + 100)
    for wrong, message in (
        ((beyond, value, query, direction_Ed), "outside of the"),
        ((key._replace(values_Rd=key.values_Rd.half()), value, query, direction_Ed), "float32 or float64"),
        ((key._replace(values_Rd=key.values_Rd.double()), value, query, direction_Ed), "of one dtype"),
        ((key, value, query, direction_Ed.double()), r"float32 \[E, d\]"),
        ((key, value._replace(length_N=value.length_N - 1), query, direction_Ed), "differ in their numbers"),
        ((key, value, query, direction_Ed[:1]), r"float32 \[E, d\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.local_scores(library, *wrong, 1e-5)
    with pytest.raises(ValueError, match="wanted pairs"):
        cpu.local_scores(library, key, value, query, direction_Ed, 1e-5, torch.ones(2, 3, dtype=torch.bool))
