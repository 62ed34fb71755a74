"""A run, and why one is refused: one configuration on one data set, its parts, features, trials and evaluations.

It lies in a folder or in an object store (`dsmip.storage.run_storage`):

<run>/run.json                    written first: data hash and folder, hashes of other files; and what made it
<run>/records/                    what each command was run on, and how it ended
<run>/config.yaml                 the whole configuration
<run>/<part>/weights.safetensors  a finished part (or whole system), with part.json (metrics, history) last
<run>/ray/                        checkpoints of trainings that are not finished
<run>/features/                   features of its own encoders (frozen ones' are shared: dsmip.encoders.shared_tables)
<run>/variants/<hash>/            parts of other stage-one settings that a search asked for
<run>/evaluate/<split>/<model>/   metrics.json and ranks.parquet
<run>/other_data/<hash>/          features, index and evaluate/ of another data set that the run's models have ranked
"""

import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmip.config import ExperimentConfig, flat
from dsmip.data.dataset import Dataset
from dsmip.encoders.feature_cache import FeatureCache
from dsmip.encoders.shared_tables.places import places_of, writable_place
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.runs.load_config import load_config, to_yaml
from dsmip.runs.loaded_model import CONFIG, PART, WEIGHTS, TrainedParts
from dsmip.runs.moved_files import FILES, by_content, found_again, noted_files, noted_in
from dsmip.runs.provenance import environment, recorded
from dsmip.runs.weights import own_weights, save_weights
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import STAMP, RunStorage
from dsmip.units.matcher import Part

TRAININGS = "ray"


@dataclass(frozen=True)
class Run(TrainedParts):
    """An opened run with its configuration and data. `at`: where it lies.

    Attributes:
        dataset: The data it was made on, or another one that its models are to rank.
        of_other_data: Whether it is another one.
    """

    dataset: Dataset
    of_other_data: bool = False

    @staticmethod
    def create(location: Location, config: ExperimentConfig, dataset: Dataset) -> "Run":
        """Makes the run, or opens it when it was made from the same configuration and data.

        How parts are run and what stage one does not depend on may change; everything may as long as nothing has been
        trained.

        Raises:
            UserError: There is a run of another configuration or data set, or something else.
        """
        storage = open_run_storage(location)
        storage.refresh()
        if (storage.folder / STAMP).is_file():
            run = Run._opened(storage, dataset)
            run.remember_data()
            if difference := first_difference(_stage_one(run.config), _stage_one(config)):
                if run.has_begun:
                    raise UserError(
                        f"run {storage} was made with another configuration ({difference}); "
                        "use another --run folder, or the same configuration to resume"
                    )
                storage.delete(TRAININGS)
            if load_config(str(storage.folder / CONFIG)) != config:
                storage.write_text(CONFIG, to_yaml(config))
            run = Run(storage, config, dataset)
            run.note_files()
            return run
        made = {  # before anything is written: this takes a while, and may be interrupted
            "data": {"folder": dataset.location, "name": dataset.manifest.name, "sha256": dataset.manifest_hash},
            FILES: noted_files(config, storage, {}),
            "seed": config.seed,
            "made": environment(),
            "id": uuid.uuid4().hex,
        }
        if (found := storage.glob("*")) and not (found == [CONFIG] and _made_here(storage.folder / CONFIG)):
            raise UserError(f"{storage} is not empty and not a run (no {STAMP}); give a new folder for --run")
        storage.write_text(CONFIG, to_yaml(config))
        storage.write_json(STAMP, made)
        return Run(storage, config, dataset)

    @staticmethod
    def open(location: Location, data: Dataset | Location | None = None, *, any_data: bool = False) -> "Run":
        """Opens an existing run.

        Args:
            location: Where it lies.
            data: Its data, where that is not where the run remembers it; it must have the same manifest.
            any_data: With `data` of another manifest, the run is opened to rank these.

        Raises:
            UserError: There is no run, its data has moved, or the data's manifest differs.
        """
        storage = open_run_storage(location)
        storage.refresh()
        return Run._opened(storage, data, any_data=any_data)

    @staticmethod
    def _opened(storage: RunStorage, data: Dataset | Location | None, *, any_data: bool = False) -> "Run":
        made_on = data_of_run(storage)
        if data is None:
            try:
                data = Dataset.open(made_on.folder)
            except UserError as error:
                raise UserError(
                    f"{error}; if the data of run {storage} has moved, say where it is by --data"
                ) from error
        dataset = data if isinstance(data, Dataset) else Dataset.open(str(data))
        is_other = dataset.manifest_hash != made_on.sha256
        if is_other and not any_data:
            raise UserError(
                f"run {storage} was made on data '{made_on.name}' with manifest {made_on.sha256[:12]}, but "
                f"{dataset.location} has manifest {dataset.manifest_hash[:12]}; use the run's own data or another run"
            )
        if not (storage.folder / CONFIG).is_file():
            raise UserError(f"run {storage} is damaged (no {CONFIG}); train into another --run folder")
        return Run(storage, _stored_config(storage, storage.folder / CONFIG), dataset, is_other)

    def remember_data(self) -> None:
        """Writes down where the data lies now, for commands that are not told."""
        stamp = _stamp(self.storage)
        if stamp["data"]["folder"] != self.dataset.location:
            stamp["data"]["folder"] = self.dataset.location
            self.storage.write_json(STAMP, stamp)

    def note_files(self) -> dict[str, str]:
        """Writes down the files that the configuration names, where that is news.

        Returns:
            What stands for their names in keys that a move does not change.
        """
        stamp = _stamp(self.storage)
        noted = noted_files(self.config, self.storage, noted_in(stamp))
        if noted != noted_in(stamp):
            self.storage.write_json(STAMP, {**stamp, FILES: noted})
        return by_content(noted)

    def recorded(
        self, command: str, config: ExperimentConfig | None = None, *, seed: int | None = None
    ) -> AbstractContextManager[None]:
        """Keeps a record of a command on this run; `config` and `seed` where they are not the run's own."""
        used = config or self.config
        sha256 = self.dataset.manifest_hash
        return recorded(self.storage, command, used, seed=used.seed if seed is None else seed, data_sha256=sha256)

    @property
    def trainings(self) -> RunStorage:
        """Where stage one keeps its checkpoints."""
        return self.storage / TRAININGS

    @property
    def training_folder(self) -> Path:
        return self.trainings.folder

    @property
    def has_begun(self) -> bool:
        """Whether some part has been trained, at least to its first checkpoint."""
        return any(map(self.is_finished, self.part_names)) or bool(self.trainings.glob("*/checkpoint_*"))

    @property
    def below(self) -> str:
        """Where features, index and evaluations of its data are: "", or a folder of the run with a slash at its end."""
        return f"other_data/{self.dataset.manifest_hash[:16]}/" if self.of_other_data else ""

    @property
    def cache(self) -> FeatureCache:
        data = self.dataset
        own = self.storage / f"{self.below}features"
        return FeatureCache(own, self.feature_dtype, places_of(data), lambda: writable_place(data))

    def trained_on(self) -> Dataset | None:
        """The data that it was made on; None where another one is to be ranked, and this one has moved."""
        if not self.of_other_data:
            return self.dataset
        try:
            return Run._opened(self.storage, None).dataset
        except UserError:
            return None

    def stored_config(self, path: Path) -> ExperimentConfig:
        """Of the run; files that have moved with it are found again."""
        return _stored_config(self.storage, path)

    def save_part(self, part: str, trained: Part, report: dict[str, Any]) -> None:
        """Writes a finished part: the weights that are not the untouched pretrained tower's, then part.json."""
        with self.storage.atomic(f"{part}/{WEIGHTS}") as path:
            save_weights(path, own_weights(trained))
        self.storage.write_json(f"{part}/{PART}", report)


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run remembers of its data.

    Attributes:
        folder: Where it lies, a folder or URI.
        name: Of the data set.
        sha256: Of its manifest.
    """

    folder: str
    name: str
    sha256: str


def data_of_run(storage: RunStorage) -> RunData:
    """What a run remembers of its data, which is not opened; no run, or a damaged one, is refused."""
    return RunData(**_stamp(storage)["data"])


def _stored_config(storage: RunStorage, path: Path) -> ExperimentConfig:
    """A configuration that a run keeps in the file `path`; files that have moved with the run are found again."""
    return found_again(load_config(str(path)), storage, noted_in(_stamp(storage)))


def _stamp(storage: RunStorage) -> dict[str, Any]:
    path = storage.folder / STAMP
    if not path.is_file():
        raise UserError(f"no run at {storage} (no {STAMP}); 'dsmip train' makes one")
    return read_json(path, _checked_stamp, "; train into another --run folder")


def _checked_stamp(stamp: Any) -> dict[str, Any]:
    noted_in(stamp)
    return {**stamp, "data": {key: str(stamp["data"][key]) for key in ("folder", "name", "sha256")}}


def first_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The first dotted key whose value differs between two dumped configurations, in words; empty when none does."""
    before, after = flat(stored), flat(given)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key)!r}, is now {after.get(key)!r}"
    return ""


def _made_here(path: Path) -> bool:
    """Whether a configuration is as a run writes it, all that an interrupted start leaves; not a user's own file."""
    try:
        return path.read_text(encoding="utf-8") == to_yaml(load_config(str(path)))
    except (OSError, ValueError, UserError):
        return False


def _stage_one(config: ExperimentConfig) -> dict[str, Any]:
    """What trained experts depend on."""
    parts = find_system(config.model).part_names(config.system)
    return {
        **config.model_dump(mode="json", exclude={"tune", "pretrain", "parts", "watch"}),
        "parts": {name: config.part(name).model_dump(mode="json", include={"train"}) for name in parts},
    }
