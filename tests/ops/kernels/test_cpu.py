"""What the C++ text unit has of its own; its scores: tests/units/test_text_unit_backends.py."""

import ctypes

import pytest
import torch

from dsmip.ops.kernels import cpu
from dsmip.ops.kernels.rows import TokenRows
from dsmip.units.text_unit_library import library_or_reason
from tests.support.scoring.text_unit_pairs import Way, pairs

CPP = Way("cpp")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = library_or_reason()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_a_score_depends_on_its_pair_alone_to_the_last_bit(library: ctypes.CDLL) -> None:
    key, value, query, direction_Ed = pairs(CPP, [40, 3, 17, 77] * 10, [5, 77, 30] * 40, 96).of_kernel()
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
