"""The job `dsmip prepare`: a raw release becomes a dataset directory, in processes of this machine, without Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from pydantic import ValidationError

from data_prep.build import Progress, prepare, run_in_processes, run_serially
from data_prep.demo_release import DemoConfig, write_demo_release
from data_prep.mimic_release import MimicRelease
from dsmip.errors import UserError
from dsmip.manifest import Manifest


def prepare_mimic(
    source: Path, out: Path, *, name: str | None, image_size: int, seed: int, workers: int, progress: Progress
) -> Manifest:
    """Builds `out` from a release in the MIMIC layout. Raises UserError for a wrong release or folder."""
    run = run_in_processes(workers) if workers > 1 else run_serially
    release = MimicRelease(source)
    name = name or source.absolute().name
    return prepare(release, out, name=name, image_size=image_size, seed=seed, run=run, progress=progress)


def prepare_demo(
    config: DemoConfig, out: Path, *, name: str | None = None, workers: int = 1, progress: Progress
) -> Manifest:
    """Draws the demo release beside `out`, builds `out` from it and removes the release."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=".release-") as folder:
        release = Path(folder) / f"demo-{config.seed}"
        write_demo_release(config, release, lambda done, total: progress("pictures", done, total))
        return prepare_mimic(
            release,
            out,
            name=name or release.name,
            image_size=config.picture_size,
            seed=config.seed,
            workers=workers,
            progress=progress,
        )


def write_release_once(config: DemoConfig, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Draws the demo release into `folder`, or keeps what is there: a release under that name is complete."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_demo_release(config, unfinished, progress)
    unfinished.rename(folder)


def demo_config(source: str) -> DemoConfig:
    """The generator's configuration from the command line: a seed, or a YAML file of its keys.

    Raises UserError when it is neither, or a key or value is wrong.
    """
    if source.isdecimal():
        return DemoConfig(seed=int(source))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--format demo takes a seed or a YAML file as SOURCE; '{source}' is neither")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of keys (of {', '.join(DemoConfig.model_fields)})")
    try:
        return DemoConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(DemoConfig.model_fields)
        raise UserError(f"{path}: {where}: {first['msg']} (keys: {known})") from error


if __name__ == "__main__":
    from ray_jobs.cli import run_script

    run_script("prepare")
