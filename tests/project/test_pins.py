"""The pins in pyproject.toml: they cover the environment, and the tool that writes them keeps to its word."""

import re
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools.refresh_pins import (
    BUILD,
    BUILD_REQUIREMENTS,
    CLUSTER_FILES,
    PACKAGES,
    REQUIREMENTS,
    pins_of,
    with_pins,
    with_ray_version,
    write_hashed,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = PROJECT["tool"]["uv"][PACKAGES]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that uv made")
def test_every_installed_package_is_pinned() -> None:
    # the environment's own folder: an imported Ray adds its vendored packages to sys.path
    here = metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {f"{_normal(each.name)}=={each.version}" for each in here}
    assert len(installed) > 100
    pinned = {pin.partition(" ;")[0] for pin in PINS}
    assert {each for each in installed if not each.startswith("dsmip==")} <= pinned


def test_every_dependency_is_pinned() -> None:
    groups = PROJECT["dependency-groups"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(each for group in groups for each in group)]
    names = {_normal(re.split(r"[\[>=<]", each)[0]) for each in wanted}
    assert names <= {pin.partition("==")[0] for pin in PINS}
    assert any(pin.startswith("hatchling==") for pin in PROJECT["tool"]["uv"][BUILD])


def test_pins_of_keeps_markers_only_where_a_package_has_several_versions() -> None:
    exported = [
        "ray[default]==2.1",
        "# ==",
        "numpy==1.0 ; python_version < '3'",
        "numpy==2.0 ; os_name == 'x'",
        "b==3 ; z",
    ]
    assert pins_of("\n".join(exported)) == [
        "b==3",
        "numpy==1.0 ; python_version < '3'",
        "numpy==2.0 ; os_name == 'x'",
        "ray==2.1",
    ]


def test_with_pins_replaces_one_list_and_nothing_else() -> None:
    before = (
        '[tool.uv]\nconstraint-dependencies = []\nbuild-constraint-dependencies = [\n    "c",\n]\n[tool.x]\ny = [1]\n'
    )
    after = with_pins(before, PACKAGES, ["a==1", "b==2 ; python_version < '3'"])
    assert tomllib.loads(after) == {
        "tool": {
            "uv": {PACKAGES: ["a==1", "b==2 ; python_version < '3'"], BUILD: ["c"]},
            "x": {"y": [1]},
        }
    }
    assert with_pins(after, PACKAGES, []) == before.replace("ies = []", "ies = [\n]")
    with pytest.raises(ValueError, match="found 0"):
        with_pins("[project]\n", PACKAGES, [])


def test_every_cluster_file_follows_the_ray_version() -> None:
    (ray,) = (pin for pin in PINS if pin.startswith("ray=="))
    version = ray.removeprefix("ray==")
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "deploy").rglob("*") if path.is_file()}
    naming = {str(path.relative_to(ROOT)) for path, text in texts.items() if version in text}
    assert {*naming, "cluster.yaml"} - {REQUIREMENTS} == set(CLUSTER_FILES)
    for name in CLUSTER_FILES:
        cluster = (ROOT / name).read_text(encoding="utf-8")
        assert with_ray_version(cluster, PINS) == cluster
        assert with_ray_version(cluster, ["ray==9.9.9"]) == cluster.replace(version, "9.9.9")
        assert version in cluster


@pytest.mark.parametrize("name", [REQUIREMENTS, BUILD_REQUIREMENTS])
def test_hashed_requirements_are_the_pins_and_name_no_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|--(extra-)?index|--find-links|@", text)
    pins = {pin.partition(" ;")[0] for pin in (*PINS, *PROJECT["tool"]["uv"][BUILD])}
    requirements = re.findall(r"^([^\s#]+==\S+).*((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.M)
    assert len(requirements) == len(re.findall(r"^[^\s#]", text, flags=re.M))  # none without a hash
    assert {re.sub(r"\[.*\]", "", requirement) for requirement, _ in requirements} <= pins


def test_hashed_requirements_hold_all_that_nodes_need() -> None:
    text = (ROOT / REQUIREMENTS).read_text(encoding="utf-8")
    there = {_normal(name) for name in re.findall(r"^([\w.-]+)(?:\[.*\])?==", text, flags=re.M)}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["s3"], *extras["gcs"]]
    assert {_normal(re.split(r"[\[>=<]", each)[0]) for each in wanted} <= there
    build = (ROOT / BUILD_REQUIREMENTS).read_text(encoding="utf-8")
    assert all(f"\n{pin} " in build for pin in PROJECT["tool"]["uv"][BUILD])


def test_written_requirements_name_no_index(tmp_path: Path) -> None:
    hashed = "a==1 \\\n    --hash=sha256:00\nb==2 ; os_name == 'x' \\\n    --hash=sha256:01\n"
    write_hashed(
        f"--index-url https://packages.example/simple\n# from https://packages.example\n{hashed}", tmp_path / "r"
    )
    assert (tmp_path / "r").read_text().partition("\n")[2] == hashed
