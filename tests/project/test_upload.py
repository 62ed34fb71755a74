"""What `ray job submit --working-dir .` uploads, by Ray's own packaging of the checkout."""

import shutil
from pathlib import Path
from zipfile import ZipFile

import ray_jobs.cluster.connection  # noqa: F401  (before Ray is imported)

# isort: split
from ray._private.runtime_env.packaging import create_package

from dsmip.runs.provenance import SOURCES, source_sha256
from tests.support.paths import ROOT

LEFT_OUT = (
    "data/mine/kb-000000.tar",
    "runs/mine/text/weights.safetensors",
    "demo/results.json",
    "shards-elsewhere/kb-000000.tar",  # named in no ignore file
    "weights.safetensors",
    "dsmip/__pycache__/errors.cpython-311.pyc",
    ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
    ".git/objects/pack/pack-1.pack",
)


def test_only_the_packages_and_ones_own_configurations_are_uploaded_and_have_the_digest_of_the_checkout(
    tmp_path: Path,
) -> None:
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    for name in SOURCES:
        shutil.copytree(ROOT / name, checkout / name)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, checkout)
    for name in LEFT_OUT:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(1 << 20))
    (checkout / "mine.yaml").write_text("model: dsmip\n")

    create_package(str(checkout), package, include_gitignore=True)
    with ZipFile(package) as archive:
        sent = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for name in SOURCES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sent == expected | {"mine.yaml"}
    assert package.stat().st_size < 4 << 20  # sources alone: some 2 MiB

    with ZipFile(package) as archive:
        archive.extractall(tmp_path / "there")
    assert source_sha256(tmp_path / "there") == source_sha256(checkout)
    (tmp_path / "there" / "dsmip" / "errors.py").write_text("")
    assert source_sha256(tmp_path / "there") != source_sha256(checkout)
