"""The C++ text unit against its plain twin in float64, and what happens where it cannot be compiled."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmip.errors import UserError
from dsmip.ops import matching
from dsmip.ops.kernels import cpu
from dsmip.ops.kernels.cpu import TokenRows
from dsmip.table import Ragged
from dsmip.text_unit import TextUnit, use_backend

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if (reason := cpu.why_unavailable()) is not None:
        pytest.skip(reason)


def rows(lengths: list[int], width: int, generator: torch.Generator, scale: float = 1.0) -> TokenRows:
    """Token rows in any order, with rows in between that belong to no item."""
    length_N = torch.tensor(lengths)
    order_N = torch.randperm(len(lengths), generator=generator)
    start_N = torch.empty_like(length_N)
    start_N[order_N] = 3 + (length_N[order_N] + 2).cumsum(0) - (length_N[order_N] + 2)
    values_Rd = scale * torch.randn(int((length_N + 2).sum()) + 3, width, generator=generator)
    return TokenRows(values_Rd, start_N, length_N)


def items(
    mention_lengths: list[int], entity_lengths: list[int], width: int, scale: float = 1.0
) -> tuple[TokenRows, TokenRows, TokenRows, Tensor]:
    generator = torch.Generator().manual_seed(sum(mention_lengths) + 7 * width)
    key, query = (rows(each, width, generator, scale) for each in (mention_lengths, entity_lengths))
    value = rows(mention_lengths, width, generator)
    return key, value, query, torch.randn(len(entity_lengths), width, generator=generator)


def twin(key: TokenRows, value: TokenRows, query: TokenRows, direction_Ed: Tensor, eps: float) -> Tensor:
    (k, mask_MT), (v, _), (q, mask_ES) = (Ragged(*each).cast(torch.float64).padded() for each in (key, value, query))
    return matching.local_scores(k, v, mask_MT, q, mask_ES, direction_Ed.double(), eps)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS, st.sampled_from([1, 5, 16, 24, 96, 100]))
def test_scores_are_those_of_the_plain_twin(mentions: list[int], entities: list[int], width: int) -> None:
    inputs = items(mentions, entities, width, scale=width**-0.25)
    expected_ME = twin(*inputs, 1e-3)
    torch.testing.assert_close(cpu.local_scores(*inputs, 1e-3).double(), expected_ME, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scale", [1e-4, 3.0, 100.0])
def test_attention_may_be_flat_or_all_on_one_token(scale: float) -> None:
    inputs = items([40, 7], [77, 3, 12], 96, scale)
    naive_ME = twin(*inputs, 1e-5).float()
    torch.testing.assert_close(cpu.local_scores(*inputs, 1e-5), naive_ME, atol=2e-3, rtol=2e-3)


def test_a_score_depends_on_its_pair_alone_to_the_last_bit() -> None:
    key, value, query, direction_Ed = items([40, 3, 17, 77] * 10, [5, 77, 30] * 40, 96)
    scores_ME = cpu.local_scores(key, value, query, direction_Ed, 1e-5, num_threads=1)
    assert torch.equal(cpu.local_scores(key, value, query, direction_Ed, 1e-5, num_threads=3), scores_ME)
    one = [TokenRows(each.values_Rd, each.start_N[7:8], each.length_N[7:8]) for each in (key, value)]
    few = TokenRows(query.values_Rd, query.start_N[11:14], query.length_N[11:14])
    assert torch.equal(cpu.local_scores(*one, few, direction_Ed[11:14], 1e-5), scores_ME[7:8, 11:14])


def test_pairs_that_are_not_wanted_are_zero_and_the_others_as_before() -> None:
    inputs = items([4, 9, 1], [6, 2, 30, 7], 24)
    wanted_ME = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    scores_ME = cpu.local_scores(*inputs, 1e-5)
    expected_ME = scores_ME.where(wanted_ME, 0.0)
    assert torch.equal(cpu.local_scores(*inputs, 1e-5, wanted_ME), expected_ME)
    assert torch.equal(cpu.local_scores(*inputs, 1e-5, wanted_ME.T.contiguous().T), expected_ME)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_nan_reaches_the_scores_of_its_item_only(which: int) -> None:
    inputs = items([3, 5], [4, 6], 16)
    if which == 3:
        inputs[3][1, 2] = torch.nan
    else:
        inputs[which].values_Rd[inputs[which].start_N[1], 0] = torch.nan
    nan_ME = cpu.local_scores(*inputs, 1e-5).isnan()
    expected_ME = torch.zeros(2, 2, dtype=torch.bool)
    (expected_ME if which < 2 else expected_ME.T)[1] = True
    assert torch.equal(nan_ME, expected_ME)


def test_an_item_without_tokens_scores_nan() -> None:
    assert cpu.local_scores(*items([0, 2], [1], 8), 1e-5).isnan().flatten().tolist() == [True, False]
    assert cpu.local_scores(*items([2], [1, 0], 8), 1e-5).isnan().flatten().tolist() == [False, True]


def test_no_mention_or_no_entity() -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6], 16)
    none = torch.zeros(0, dtype=torch.int64)
    nobody = [TokenRows(each.values_Rd, none, none) for each in (key, value)]
    assert cpu.local_scores(*nobody, query, direction_Ed, 1e-5).shape == (0, 2)
    nothing = TokenRows(query.values_Rd, none, none)
    assert cpu.local_scores(key, value, nothing, direction_Ed[:0], 1e-5).shape == (2, 0)


def test_what_the_kernel_must_not_read_is_refused() -> None:
    key, value, query, direction_Ed = items([3, 5], [4, 6], 16)
    beyond = key._replace(start_N=key.start_N + 100)
    for wrong, message in (
        ((beyond, value, query, direction_Ed), "outside of the"),
        ((key._replace(values_Rd=key.values_Rd.double()), value, query, direction_Ed), "float32"),
        ((key, value._replace(length_N=value.length_N - 1), query, direction_Ed), "differ in their numbers"),
        ((key, value, query, direction_Ed[:1]), r"float32 \[E, d\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.local_scores(*wrong, 1e-5)
    with pytest.raises(ValueError, match="wanted pairs"):
        cpu.local_scores(key, value, query, direction_Ed, 1e-5, torch.ones(2, 3, dtype=torch.bool))


def text_unit_scores(unit: TextUnit, wanted_ME: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def side(count: int, longest: int) -> tuple[Tensor, Ragged]:
        tokens_NTd = torch.randn(count, longest, 20, generator=generator)
        lengths_N = torch.randint(1, longest + 1, (count,), generator=generator)
        return torch.randn(count, 12, generator=generator), Ragged.from_padded(
            tokens_NTd, torch.arange(longest) < lengths_N[:, None]
        )

    with torch.no_grad():
        return unit.score(unit.prepare_mentions(*side(6, 9)), unit.prepare_entities(*side(11, 14)), wanted_ME)


def text_unit() -> TextUnit:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TextUnit(12, 20, 16)


def test_the_text_unit_scores_the_same_with_either_backend() -> None:
    unit = text_unit()
    wanted_ME = torch.rand(6, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    assert use_backend(unit, "torch", CPU) == "torch"
    plain, plain_wanted = text_unit_scores(unit), text_unit_scores(unit, wanted_ME)
    torch.testing.assert_close(plain_wanted[wanted_ME], plain[wanted_ME])
    assert use_backend(unit, "auto", CPU) == "cpp"
    torch.testing.assert_close(text_unit_scores(unit), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text_unit_scores(unit, wanted_ME), plain_wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a machine that has not built the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -O2", "no C[+][+] compiler named no-such-compiler"),
        ("false", "false failed: it said nothing"),
    ],
)
@pytest.mark.usefixtures("fresh_cache")
def test_without_a_compiler_pytorch_takes_over_and_says_why(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    unit = text_unit()
    with pytest.warns(UserWarning, match=f"scoring with PyTorch: {reason}"):
        assert use_backend(unit, "auto", CPU) == "torch"
    assert text_unit_scores(unit).isfinite().all()
    with pytest.raises(UserError, match=f"backend cpp cannot be built: {reason}.*use torch"):
        use_backend(unit, "cpp", CPU)
    with pytest.raises(RuntimeError, match=reason):
        cpu.local_scores(*items([1], [1], 4), 1e-5)


@pytest.mark.usefixtures("fresh_cache")
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsmip").write_text("a file in the folder's place")
    reason = cpu.why_unavailable()
    assert reason is not None
    assert str(tmp_path / "dsmip") in reason


@pytest.mark.usefixtures("fresh_cache")
def test_the_kernel_is_built_once_and_kept(tmp_path: Path) -> None:
    assert cpu.why_unavailable() is None
    (library,) = (tmp_path / "dsmip").iterdir()
    built = library.stat().st_mtime_ns
    cpu._library.cache_clear()
    assert cpu.why_unavailable() is None
    assert (
        [library.stat().st_mtime_ns] == [each.stat().st_mtime_ns for each in (tmp_path / "dsmip").iterdir()] == [built]
    )


def test_only_a_cpu_has_the_backend() -> None:
    with pytest.raises(UserError, match="backend cpp runs on a CPU, not on cuda"):
        use_backend(text_unit(), "cpp", torch.device("cuda"))
