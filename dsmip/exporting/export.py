"""The export of a run's model as a bundle (`dsmip.linking.bundle`)."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml

from dsmip.config import ExperimentConfig
from dsmip.data.table import Table
from dsmip.distillation.vectors import DistilledVectors
from dsmip.encoders.architecture import HUGGING_FACE_NAMES, MODEL_NAME, Architecture, resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.formats.hugging_face_files import copy_configuration, save_tokenizer
from dsmip.errors import UserError
from dsmip.evaluation.index import MANIFEST, EntityIndex, finish_index
from dsmip.evaluation.index_builder import IndexPlan, OpenedModel, plan_index
from dsmip.exporting.agreement import Probes
from dsmip.exporting.candidate_vectors import VectorChoice, choose_vectors
from dsmip.exporting.card import model_card
from dsmip.linking.bundle import (
    BUNDLE,
    CALIBRATION,
    CANDIDATES,
    CARD,
    ENTITIES,
    FILES,
    INDEX,
    BundleManifest,
    IndexDtype,
    Segment,
    stated_files,
)
from dsmip.linking.growing.index_storage import stored_as
from dsmip.linking.growing.segment_files import entity_table
from dsmip.linking.growing.segments import ENTITY_SCHEMA, GROUP_ROWS, read_index
from dsmip.linking.load import LoadOptions, examples_of_data, load_linker
from dsmip.progress import Progress, counting, no_progress
from dsmip.runs.load_config import with_files
from dsmip.runs.loaded_model import CONFIG, PART, WEIGHTS, LoadedModel
from dsmip.runs.run import Run
from dsmip.storage.atomic import write_json, write_text
from dsmip.storage.locations import Location
from dsmip.version import VERSION

_BACKBONE = f"{FILES}/backbone.safetensors"
_VISION_OF_HUB = "hf-hub:"  # how timm names a network whose sizes are on the hub


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle.

    Attributes:
        model: A finished part, or the system's name for the whole (None: the whole, if there is one).
        data: Where the run's data lies, if it has moved.
        with_backbone: The pretrained backbone's tensors, also where their tag would do.
        index_dtype: In which the index is stored; pairs are scored in float32.
        candidate_vectors: What finds candidates: the model's `global` vectors, `distilled` ones that its exact scores
            of training mentions have taught, or (`auto`) the latter where the former hold too little.
    """

    model: str | None = None
    data: Location | None = None
    with_backbone: bool = False
    index_dtype: IndexDtype = "float32"
    candidate_vectors: VectorChoice = "auto"


def export_run(
    location: Location,
    out: Path,
    device: torch.device,
    options: ExportOptions = ExportOptions(),
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda line: None,
) -> BundleManifest:
    """Makes the bundle `out`: it is there as a whole, or not at all.

    Args:
        location: Of the run.
        out: A new folder.
        device: Where the index is built, if it is missing.
        options: What goes in.
        progress: Of the index and of the entities.
        notice: Takes lines of what a smaller index and candidates find.

    Raises:
        UserError: No such run or model, something is at `out`, or there is nothing that vectors could be distilled of.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give a new folder for the bundle")
    opened = OpenedModel(Run.open(location, options.data), options.model)
    plan = plan_index(opened)
    linker = load_linker(location, device, LoadOptions(options.model, options.data), progress=progress)
    index = opened.run.storage / plan.name
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    folder.mkdir(parents=True)
    try:
        files = _Files(folder, opened.model.config, with_backbone=options.with_backbone)
        if files.of_hub is not None:
            advice = "" if files.of_hub.startswith(_VISION_OF_HUB) else "; --with-backbone puts that in"
            notice(f"opening it asks the hub for {files.of_hub}{advice}")
        dataset, probes = opened.run.dataset, Probes.of_validation(linker, opened.run.dataset)
        asked = linker, dataset, probes, options.candidate_vectors, opened.run.config.seed
        vectors = choose_vectors(*asked, progress, notice)
        if vectors.distilled is not None:
            vectors.distilled.projection.save(folder / CANDIDATES)
        stored = _write_index(index.folder, plan, folder, options.index_dtype, vectors.distilled)
        agreement = None if stored is None or probes is None else probes.agreement(linker, stored)
        if agreement is not None:
            notice(f"stored as {options.index_dtype}, {agreement}")
        _write_parts(opened, folder, files)
        _write_entities(opened, folder / ENTITIES, progress)
        if linker.calibration is not None:
            write_json(folder / CALIBRATION, linker.calibration.model_dump(mode="json"))
        write_text(
            folder / CARD,
            model_card(
                opened,
                agreement,
                vectors,
                with_backbone=(folder / _BACKBONE).is_file(),
                index=_index_size(folder / INDEX, index.folder, options.index_dtype),
                calibration=linker.calibration,
                of_hub=files.of_hub,
            ),
        )
        manifest = _manifest(opened, folder, options.index_dtype)
        write_json(folder / BUNDLE, manifest.model_dump(mode="json"))
        if out.is_dir():
            out.rmdir()
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _write_index(
    source: Path, plan: IndexPlan, bundle: Path, dtype: IndexDtype, distilled: DistilledVectors | None
) -> EntityIndex | None:
    """Copies an index, with vectors for candidates, or stores it smaller, and returns what that reads as."""
    target = bundle / INDEX
    if dtype == "float32" and distilled is None:
        for name in (MANIFEST, *plan.slices):
            _copy(source / name, target / name)
        return None
    for name in plan.slices:
        table = Table.load(source / name)
        stored_as(table if distilled is None else distilled.with_vectors(table), dtype).save(target / name)
    finish_index(target, dict(plan.made_from), {target / name: rows for name, rows in plan.slices.items()})
    if dtype == "float32":
        return None
    return read_index(bundle, [Segment(folder="", entities=sum(map(len, plan.slices.values())))], dtype)


def _index_size(stored: Path, whole: Path, dtype: IndexDtype) -> str:
    """In what an index is stored, and how large its files are; of a smaller one also those of single precision."""
    own, of_float32 = (sum(path.stat().st_size for path in folder.iterdir()) / 2**20 for folder in (stored, whole))
    return f"{dtype}, {own:.1f} MiB" + ("" if dtype == "float32" else f" (float32: {of_float32:.1f} MiB)")


def _write_parts(opened: OpenedModel, folder: Path, files: "_Files") -> None:
    """Configurations, finished parts, and files that the configurations name."""
    run, model = opened.run, opened.model
    write_text(folder / CONFIG, files.config_text(run.config))
    for part, home in _parts_of(run, model):
        for name in (PART, WEIGHTS):
            home.storage.pull(f"{part}/{name}")
            inside = home.folder.resolve().relative_to(run.folder.resolve())
            _copy(home.folder / part / name, folder / inside / part / name)
    if (run.folder / model.name / CONFIG).is_file():
        write_text(folder / model.name / CONFIG, files.config_text(run.whole_config()))


def _parts_of(run: Run, model: LoadedModel) -> Iterator[tuple[str, Run]]:
    """The finished parts that a model is loaded from, and where each of them lies."""
    if model.name == run.system.name and run.system.gated:
        yield model.name, run
    for part in model.feature_parts:
        if part in run.part_names:
            yield part, run.home(part, model.config)
    if model.reranker is not None:
        yield model.reranker, run


class _Files:
    """Files that configurations name, copied into a bundle.

    Attributes:
        of_hub: A model of Hugging Face's hub that opening the bundle still asks for, weights aside.
    """

    def __init__(self, folder: Path, config: ExperimentConfig, *, with_backbone: bool) -> None:
        self._folder, self._names = folder, dict[str, str]()
        backbone = config.backbone
        self._own_backbone = with_backbone or (backbone.pretrained is not None and os.path.exists(backbone.pretrained))
        if self._own_backbone:
            Backbone.build(backbone.architecture, backbone.pretrained).save_weights(folder / _BACKBONE)
        network = resolve_architecture(backbone.architecture)
        self._architecture = self._with_text_tower(network)
        self.of_hub = _asked_of_hub(network, text=self._architecture is None)

    def _with_text_tower(self, network: Architecture) -> str | None:
        """The architecture by a name that has configuration and tokenizer in the bundle; None: it keeps its own name.

        Where the backbone's weights are not in it, they come with their tag or name, and so may the tokenizer.
        """
        names = _hugging_face_names(network)
        if not names or not (self._own_backbone or network.name.endswith(".json")):
            return None
        inside = {name: f"text-{number}" for number, name in enumerate(dict.fromkeys(names.values()))}
        for key, name in names.items():
            folder = self._folder / FILES / inside[name]
            folder.mkdir(parents=True, exist_ok=True)
            (copy_configuration if key == MODEL_NAME else save_tokenizer)(name, folder)
        if network.separate is not None:  # its own weights are the backbone's
            text = f"{FILES}/{inside[names[MODEL_NAME]]}"
            return str(replace(network.separate, text=text, vision_file=None))
        form, beside = network.as_json(), {key: f"./{inside[name]}" for key, name in names.items()}
        form["model_cfg"] |= {"text_cfg": {**form["model_cfg"]["text_cfg"], **beside}}
        write_json(self._folder / FILES / "network.json", form)
        return f"{FILES}/network.json"

    def config_text(self, config: ExperimentConfig) -> str:
        """A configuration as YAML, with the names that files have in the bundle."""
        tree = config.model_dump(mode="json")
        backbone = tree.pop("backbone")
        if self._own_backbone:
            backbone["pretrained"] = None
        architecture = self._architecture or with_files(backbone["architecture"], self._inside)
        backbone = with_files(backbone | {"architecture": ""}, self._inside) | {"architecture": architecture}
        if self._own_backbone:
            backbone["pretrained"] = _BACKBONE
        tree = with_files(tree, self._inside) | {"backbone": backbone}
        return yaml.safe_dump(tree, sort_keys=True, allow_unicode=True)

    def _inside(self, name: str) -> str:
        path = Path(name)
        if not path.exists():
            return name
        if name not in self._names:
            self._names[name] = f"{FILES}/{len(self._names)}-{path.name}"
            _copy(path, self._folder / self._names[name])
        return self._names[name]


def _hugging_face_names(network: Architecture) -> dict[str, str]:
    """The models that a text tower is built and reads by, by key of its configuration."""
    text = network.config.get("text_cfg") or {}
    return {key: str(text[key]) for key in HUGGING_FACE_NAMES if text.get(key)}


def _asked_of_hub(network: Architecture, *, text: bool) -> str | None:
    """A model of the hub that building a network asks for, weights aside; with `text`, also for its text tower."""
    vision = str(network.config["vision_cfg"].get("timm_model_name") or "")
    if vision.startswith(_VISION_OF_HUB):
        return vision
    names = _hugging_face_names(network).values() if text else ()
    return next((name for name in names if not Path(name).is_dir()), None)


def _write_entities(opened: OpenedModel, path: Path, progress: Progress) -> None:
    """The kb's texts with small pictures; with whole ones where a re-ranker looks at them."""
    run, reranker = opened.run, opened.model.reranker
    whole = reranker is not None and "image" in run.collator(reranker).item_format.of_entities
    count = counting(progress, "entities written", run.dataset.num_entities)
    with pq.ParquetWriter(path, ENTITY_SCHEMA) as writer:
        for start in range(0, run.dataset.num_entities, GROUP_ROWS):
            rows = range(start, min(start + GROUP_ROWS, run.dataset.num_entities))
            table = entity_table(run.dataset.entities(rows), whole_images=whole)
            writer.write_table(table, row_group_size=GROUP_ROWS)
            count(len(table))


def _manifest(opened: OpenedModel, folder: Path, index_dtype: IndexDtype) -> BundleManifest:
    dataset = opened.run.dataset
    return BundleManifest(
        format=2 if (folder / CANDIDATES).is_file() else 1,
        made_with=VERSION,
        model=opened.model.name,
        data=dataset.manifest.name,
        data_sha256=dataset.manifest_hash,
        licence=dataset.manifest.licence,
        images=dataset.manifest.image.model_dump(mode="json"),
        entities=dataset.num_entities,
        index_dtype=index_dtype,
        examples=examples_of_data(dataset),
        files=stated_files(folder),
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
