"""What the C++ text unit has of its own (its scores: test_text_unit_backends.py), and where it cannot be compiled."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsmip.errors import UserError
from dsmip.ops.kernels import cpu
from dsmip.ops.kernels.rows import TokenRows
from dsmip.units.text_unit import TextUnit, use_backend
from tests.support.text_unit_pairs import Way, pairs

CPU = torch.device("cpu")
CPP = Way("cpp")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if (reason := cpu.why_unavailable()) is not None:
        pytest.skip(reason)


def test_a_score_depends_on_its_pair_alone_to_the_last_bit() -> None:
    key, value, query, direction_Ed = pairs(CPP, [40, 3, 17, 77] * 10, [5, 77, 30] * 40, 96).of_kernel()
    scores_ME = cpu.local_scores(key, value, query, direction_Ed, 1e-5, num_threads=1)
    assert torch.equal(cpu.local_scores(key, value, query, direction_Ed, 1e-5, num_threads=3), scores_ME)
    one_key, one_value = (TokenRows(each.values_Rd, each.start_N[7:8], each.length_N[7:8]) for each in (key, value))
    few = TokenRows(query.values_Rd, query.start_N[11:14], query.length_N[11:14])
    assert torch.equal(cpu.local_scores(one_key, one_value, few, direction_Ed[11:14], 1e-5), scores_ME[7:8, 11:14])
    wanted_ME = torch.rand(scores_ME.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found_ME = cpu.local_scores(key, value, query, direction_Ed, 1e-5, wanted_ME)
    assert torch.equal(found_ME, scores_ME.where(wanted_ME, 0.0))


def test_what_the_kernel_must_not_read_is_refused() -> None:
    key, value, query, direction_Ed = pairs(CPP, [3, 5], [4, 6]).of_kernel()
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
        ('c++ "-O2', 'no C[+][+] compiler named c[+][+] "-O2'),
    ],
)
@pytest.mark.usefixtures("fresh_cache")
def test_without_a_compiler_pytorch_takes_over_and_says_why(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    case = pairs(CPP, [3], [4])
    unit = case.unit
    with pytest.warns(UserWarning, match=f"scoring with PyTorch: {reason}"):
        assert use_backend(unit, "auto", CPU) == unit.backend == "torch"
    case.assert_equal(Way("torch"))
    with pytest.raises(UserError, match=f"backend cpp cannot be built: {reason}.*use torch"):
        use_backend(unit, "cpp", CPU)
    with pytest.raises(RuntimeError, match=reason):
        cpu.local_scores(*case.of_kernel(), 1e-5)


@pytest.mark.usefixtures("fresh_cache")
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsmip").write_text("a file in the folder's place")
    reason = cpu.why_unavailable()
    assert reason is not None
    assert str(tmp_path / "dsmip") in reason


@pytest.mark.usefixtures("fresh_cache")
def test_the_kernel_is_built_once_and_kept(tmp_path: Path) -> None:
    assert cpu.why_unavailable() is None
    built = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dsmip").iterdir()}
    assert {Path(name).suffix for name in built} == {".so", ".sha256"}
    cpu._library.cache_clear()
    assert cpu.why_unavailable() is None
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dsmip").iterdir()} == built


def _replaced(library: Path, content: bytes) -> None:
    library.unlink()  # this process has it loaded
    library.write_bytes(content)
    library.chmod(0o600)


def _empty(library: Path) -> None:
    _replaced(library, b"")


def _cut_off(library: Path) -> None:
    _replaced(library, library.read_bytes()[:5000])


def _planted(library: Path) -> None:
    _replaced(library, library.read_bytes() + b"another's")


def _without_digest(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


def _written_by_others(library: Path) -> None:
    library.chmod(0o666)


def _a_link(library: Path) -> None:
    elsewhere = library.parents[1] / "elsewhere.so"
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [_empty, _cut_off, _planted, _without_digest, _written_by_others, _a_link])
@pytest.mark.usefixtures("fresh_cache")
def test_a_library_that_is_not_as_it_was_built_is_built_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    assert cpu.why_unavailable() is None
    (library,) = (tmp_path / "dsmip").glob("*.so")
    built = library.stat().st_ino
    damage(library)
    cpu._library.cache_clear()
    assert cpu.why_unavailable() is None
    assert library.lstat().st_ino != built
    assert hashlib.sha256(library.read_bytes()).hexdigest() == library.with_suffix(".sha256").read_text("ascii")
    assert library.lstat().st_mode & 0o777 == 0o600
    pairs(CPP, [3], [4]).assert_equal(CPP)


@pytest.mark.usefixtures("fresh_cache")
def test_a_cache_folder_that_is_a_link_is_named_and_nothing_comes_into_it(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "dsmip").symlink_to(tmp_path / "theirs")
    reason = cpu.why_unavailable()
    assert reason is not None
    assert f"{tmp_path / 'dsmip'}: is a link" in reason
    assert "set XDG_CACHE_HOME" in reason
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.parametrize("given", ["", " "])
@pytest.mark.usefixtures("fresh_cache")
def test_an_empty_name_of_a_compiler_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    assert cpu.why_unavailable() is None


def test_a_cpu_takes_it_if_it_can() -> None:
    unit = TextUnit(1, 1, 1)
    assert use_backend(unit, "auto", CPU) == unit.backend == "cpp"


def test_only_a_cpu_has_the_backend() -> None:
    with pytest.raises(UserError, match="backend cpp runs on a CPU, not on cuda"):
        use_backend(TextUnit(1, 1, 1), "cpp", torch.device("cuda"))
