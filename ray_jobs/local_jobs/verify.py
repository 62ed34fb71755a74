"""The job `dsmip verify`: every file of a dataset against its manifest. Knows no Ray."""

from dataclasses import asdict
from pathlib import Path, PurePath

from data_prep.inspection.verification import Verification, verify_dataset
from dsmip.storage.atomic import write_json
from ray_jobs.terminal.display import Display
from ray_jobs.terminal.lines import say


def verify_data(data: str, *, json_file: Path | None, workers: int) -> Verification:
    """Prints what is wrong, or that nothing is; also writes it to `json_file` when one is given.

    Raises:
        UserError: When there is no manifest to compare with.
    """
    with Display(transient=True) as progress:
        found = verify_dataset(data, workers=workers, progress=progress)
    if json_file is not None:
        write_json(json_file, {"data": PurePath(data).name, "ok": found.ok, **asdict(found)})
    for problem in found.problems:
        say(str(problem))
    if found.num_problems > len(found.problems):
        say(f"... and {found.num_problems - len(found.problems)} more")
    read = f"{found.shards} shards, {found.samples} samples, {found.images} pictures read"
    verdict = "all as the manifest says" if found.ok else f"{found.num_problems} problems; prepare the dataset again"
    say(f"{data}: {read}: {verdict}")
    return found
