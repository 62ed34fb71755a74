"""The C++ kernel's library: compiled once, kept, not trusted when it is not as it was built; without a compiler."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsmip.errors import UserError
from dsmip.units.text_unit import TextUnit, use_backend
from dsmip.units.text_unit_library import library, library_or_reason, why_unavailable
from tests.support.scoring.text_unit_pairs import Way, pairs

CPU = torch.device("cpu")
CPP = Way("cpp")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a machine that has not built the kernel yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library_or_reason.cache_clear()
    yield
    library_or_reason.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler -O2", "no C[+][+] compiler named no-such-compiler"),
        ("false", "false failed: it said nothing"),
        ("true", r"\[Errno 2\] No such file or directory: .*text_unit-"),  # it runs, and makes nothing
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
        library()


@pytest.mark.usefixtures("fresh_cache")
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsmip").write_text("a file in the folder's place")
    reason = why_unavailable()
    assert reason is not None
    assert str(tmp_path / "dsmip") in reason


@pytest.mark.usefixtures("fresh_cache")
def test_the_kernel_is_built_once_and_kept(tmp_path: Path) -> None:
    assert why_unavailable() is None
    built = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dsmip").iterdir()}
    assert {Path(name).suffix for name in built} == {".so", ".sha256"}
    library_or_reason.cache_clear()
    assert why_unavailable() is None
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dsmip").iterdir()} == built


def _replaced(file: Path, content: bytes) -> None:
    file.unlink()  # this process has it loaded
    file.write_bytes(content)
    file.chmod(0o600)


def _empty(file: Path) -> None:
    _replaced(file, b"")


def _cut_off(file: Path) -> None:
    _replaced(file, file.read_bytes()[:5000])


def _planted(file: Path) -> None:
    _replaced(file, file.read_bytes() + b"another's")


def _without_digest(file: Path) -> None:
    file.with_suffix(".sha256").unlink()


def _written_by_others(file: Path) -> None:
    file.chmod(0o666)


def _a_link(file: Path) -> None:
    elsewhere = file.parents[1] / "elsewhere.so"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_cut_off, marks=pytest.mark.slow),
        _planted,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (_empty, _without_digest, _written_by_others)),
        pytest.param(_a_link, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fresh_cache")
def test_a_library_that_is_not_as_it_was_built_is_built_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    assert why_unavailable() is None
    (file,) = (tmp_path / "dsmip").glob("*.so")
    built = file.stat().st_ino
    damage(file)
    library_or_reason.cache_clear()
    assert why_unavailable() is None
    assert file.lstat().st_ino != built
    assert hashlib.sha256(file.read_bytes()).hexdigest() == file.with_suffix(".sha256").read_text("ascii")
    assert file.lstat().st_mode & 0o777 == 0o600
    pairs(CPP, [3], [4]).assert_equal(CPP)


@pytest.mark.usefixtures("fresh_cache")
def test_a_cache_folder_that_is_a_link_is_named_and_nothing_comes_into_it(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "dsmip").symlink_to(tmp_path / "theirs")
    reason = why_unavailable()
    assert reason is not None
    assert f"{tmp_path / 'dsmip'}: is a link" in reason
    assert "set XDG_CACHE_HOME" in reason
    assert list((tmp_path / "theirs").iterdir()) == []


@pytest.mark.parametrize("given", ["", " "])
@pytest.mark.usefixtures("fresh_cache")
def test_an_empty_name_of_a_compiler_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    assert why_unavailable() is None


def test_a_cpu_takes_it_if_it_can() -> None:
    unit = TextUnit(1, 1, 1)
    assert use_backend(unit, "auto", CPU) == unit.backend == "cpp"


def test_only_a_cpu_has_the_backend() -> None:
    with pytest.raises(UserError, match="backend cpp runs on a CPU, not on cuda"):
        use_backend(TextUnit(1, 1, 1), "cpp", torch.device("cuda"))
