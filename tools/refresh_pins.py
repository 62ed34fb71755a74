"""Rewrites the pins in pyproject.toml: every package of the resolution, transitive ones too, at one exact version.

    uv run python tools/refresh_pins.py           # newest versions that fit together
    uv run python tools/refresh_pins.py --keep    # present pins stay; new dependencies are pinned, unused pins go

The floors in `dependencies` are not touched. The cluster files follow the Ray version, and the files of hashed
requirements in deploy/ follow the pins: what nodes and the image install. Run `uv sync` afterwards.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PACKAGES, BUILD = "constraint-dependencies", "build-constraint-dependencies"
CLUSTER_FILES = (
    "cluster.yaml",
    "deploy/onprem.yaml",
    "deploy/Dockerfile",
    "deploy/kuberay/base/rayjob.yaml",
    "deploy/kuberay/rayservice.yaml",
)
REQUIREMENTS = "deploy/requirements.txt"
BUILD_REQUIREMENTS = "deploy/requirements-build.txt"
_PLAIN = ("--no-annotate", "--no-header", "--no-emit-index-url")


def main(arguments: Sequence[str]) -> None:
    """Resolves in a temporary folder, then rewrites pyproject.toml, the cluster files and the hashed requirements."""
    if arguments not in ([], ["--keep"]):
        sys.exit(__doc__)
    keep = bool(arguments)
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    bare = text if keep else with_pins(with_pins(text, PACKAGES, []), BUILD, [])
    with TemporaryDirectory() as folder:
        packages = _package_pins(bare, Path(folder), keep=keep)
        build = _build_pins(bare, Path(folder))
    pinned = with_pins(with_pins(text, PACKAGES, packages), BUILD, build)
    project.write_text(pinned, encoding="utf-8")
    with TemporaryDirectory() as folder:
        write_hashed(_hashed_packages(pinned, Path(folder)), ROOT / REQUIREMENTS)
        write_hashed(_hashed_build(pinned, Path(folder)), ROOT / BUILD_REQUIREMENTS)
    for name in CLUSTER_FILES:
        cluster = ROOT / name
        cluster.write_text(with_ray_version(cluster.read_text(encoding="utf-8"), packages), encoding="utf-8")
    print(f"pinned {len(packages)} packages and {len(build)} for the build; run uv sync")


def pins_of(exported: str) -> list[str]:
    """One requirement per package of `uv export`'s output, sorted.

    A package that is locked at several versions gets one requirement for each, with the environments it is locked for.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for line in exported.splitlines():
        requirement, _, marker = line.partition(" ; ")
        if "==" in requirement and not requirement.startswith("#"):
            found.setdefault(re.split(r"\[|==", requirement)[0], []).append((requirement.split("==")[1], marker))
    return [
        f"{name}=={version} ; {marker}" if len(versions) > 1 else f"{name}=={version}"
        for name, versions in sorted(found.items())
        for version, marker in versions
    ]


def with_pins(text: str, key: str, pins: Sequence[str]) -> str:
    """pyproject.toml's text with the list `key` replaced.

    Raises:
        ValueError: The list is not there once.
    """
    block = "".join(f'    "{pin}",\n' for pin in pins)
    new, count = re.subn(rf"^{key} = \[(?:\]|\n.*?^\])", f"{key} = [\n{block}]", text, flags=re.M | re.S)
    if count != 1:
        raise ValueError(f"pyproject.toml must hold the list {key} once; found {count}")
    return new


def with_ray_version(cluster: str, pins: Sequence[str]) -> str:
    """A cluster file's text with the pinned Ray version in its images' tags and in KubeRay's `rayVersion`."""
    (version,) = (pin.removeprefix("ray==") for pin in pins if pin.startswith("ray=="))
    return re.sub(r"(rayproject/ray:|rayVersion: \")\d+(?:\.\d+)+", rf"\g<1>{version}", cluster)


def _package_pins(project: str, folder: Path, *, keep: bool) -> list[str]:
    """Everything that the project and its development need, on all platforms."""
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    if keep and (ROOT / "uv.lock").is_file():
        shutil.copy(ROOT / "uv.lock", folder)
    command = ["uv", "export", "--quiet", "--project", str(folder), "--all-groups", "--all-extras", "--no-emit-project"]
    return pins_of(_output([*command, "--no-hashes", *_PLAIN], folder))


def write_hashed(exported: str, target: Path) -> None:
    """Writes requirements with their hashes; lines that name an index, whose address is nobody else's, are left out."""
    lines = [line for line in exported.splitlines() if line.lstrip().startswith("--hash=") or "==" in line]
    head = "# Written by tools/refresh_pins.py from the pins in pyproject.toml; for pip install --require-hashes."
    target.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def _hashed_packages(project: str, folder: Path) -> str:
    """What nodes need, object stores included, with the hashes of every file."""
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    command = ["uv", "export", "--quiet", "--project", str(folder), "--no-dev", "--extra", "s3", "--extra", "gcs"]
    return _output([*command, "--no-emit-project", *_PLAIN], folder)


def _hashed_build(project: str, folder: Path) -> str:
    return _output([*_build_command(project, folder), "--generate-hashes"], folder)


def _build_pins(project: str, folder: Path) -> list[str]:
    """What builds the package itself, in `build-system.requires` and below."""
    return pins_of(_output(_build_command(project, folder), folder))


def _build_command(project: str, folder: Path) -> list[str]:
    tree = tomllib.loads(project)
    requirements, present = folder / "build.in", folder / "build-pins.txt"
    requirements.write_text("\n".join(tree["build-system"]["requires"]), encoding="utf-8")
    present.write_text("\n".join(tree["tool"]["uv"][BUILD]), encoding="utf-8")
    python = tree["project"]["requires-python"].removeprefix(">=")
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", python]
    return [*command, *_PLAIN, "--constraints", str(present), str(requirements)]


def _output(command: Sequence[str], folder: Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout


if __name__ == "__main__":
    main(sys.argv[1:])
