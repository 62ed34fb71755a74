"""The gate's picture features beside the shards: read like computed ones, never stale, damaged ones refused by name."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vgg import VGG, make_layers

from data_prep.build.view import make_view
from dsmip.config import ExperimentConfig, validated
from dsmip.data.collate import ImageCollator
from dsmip.data.dataset import Dataset
from dsmip.data.images import CLIP_PIXELS, PixelForm
from dsmip.data.manifest import KB
from dsmip.encoders.feature_cache import load_features
from dsmip.encoders.image_features import (
    KB_AND_SPLITS,
    Data,
    DTypeName,
    ImageFeatures,
    Origin,
    Pixels,
    Weights,
    features_file,
    features_name,
    image_rows,
    is_outdated,
    network_hash,
    stored_features,
    write_manifest,
)
from dsmip.encoders.image_networks import ClipImage, NetworkChoice, find_network
from dsmip.encoders.vgg import Vgg16Features
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedEvaluation, plan_files
from dsmip.models.dsmip import GATE
from dsmip.parallel import map_alone
from dsmip.runs.load_config import changed, parse_config, to_yaml
from dsmip.runs.part_features import PartFeatures
from dsmip.runs.run import Run
from dsmip.training.stages import CPU
from dsmip.units.gate import GateConfig, stored_images
from ray_jobs.jobs.features import feature_request


@pytest.fixture
def dataset(small_data: Dataset, tmp_path: Path) -> Dataset:
    """A copy: features go into its folder."""
    shutil.copytree(small_data.folder, tmp_path / "data")
    return Dataset.open(tmp_path / "data")


def store(
    dataset: Dataset,
    choice: NetworkChoice,
    size: int = 16,
    dtype: DTypeName = "float32",
    form: PixelForm = CLIP_PIXELS,
) -> ImageFeatures:
    """Features in one go, without the job."""
    network = choice.build()
    described = network.identity()
    origin = Origin(
        kind=choice.kind,
        weights=Weights(name=choice.weights_name, sha256=network_hash(described)),
        pixels=Pixels(size=size, side=described.side, mean=described.mean, std=described.std, form=form),
        dtype=dtype,
        data=Data(name=dataset.manifest.name, sha256=dataset.manifest_hash),
    )
    name = features_name(origin)
    for split in KB_AND_SPLITS:
        rows = range(dataset.num_entities if split == KB else dataset.num_mentions(split))
        images = ImageCollator(size, form)
        encode = partial(image_rows, network, dataset, split, collator=images, dtype=dtype, device=CPU)
        for table in map_alone(encode, [rows], CPU):
            table.save(dataset.folder / features_file(name, split))
    return write_manifest(dataset.own, origin)


def gate_features(run: Run) -> dict[str, torch.Tensor]:
    """The gate's inputs of the kb and of a split."""
    features = PartFeatures(run, GATE, run.config)
    found = {split: load_features(features.files(split, CPU)) for split in (KB, "test")}
    return {f"{split}.{name}": table.dense(name) for split, table in found.items() for name in ("text", "picture")}


@pytest.mark.parametrize("cache_dtype", ["float32", "float16"])
def test_the_gate_reads_what_it_would_compute(
    small_config: ExperimentConfig,
    dataset: Dataset,
    tmp_path: Path,
    cache_dtype: DTypeName,
) -> None:
    """To the last bit."""
    config = small_config.model_copy(update={"cache_dtype": cache_dtype})
    expected = gate_features(Run.create(tmp_path / "computing", config, dataset))
    choice = NetworkChoice("clip", None, config.backbone.architecture)
    store(dataset, replace(choice, seed=1), dtype=cache_dtype)
    stored = store(dataset, choice, dtype=cache_dtype)
    assert [file.items - file.with_image for file in stored.manifest.files.values()] == [3, 8, 2, 3]
    found = gate_features(Run.create(tmp_path / "reading", config, dataset))
    assert PartFeatures(Run.open(tmp_path / "reading"), GATE, config).beside == stored.folder
    for name, column in expected.items():
        assert column.dtype == getattr(torch, cache_dtype)
        assert torch.equal(found[name], column), name


@pytest.mark.parametrize("said_by", ["the backbone", "the run"])
def test_the_gate_reads_pictures_that_were_fitted_as_its_backbone_or_its_run_wants(
    small_config: ExperimentConfig, narrow_backbone: Path, dataset: Dataset, tmp_path: Path, said_by: str
) -> None:
    """Cropped ones of the same network are others, and are not taken for squashed ones."""
    form = PixelForm(resize="squash", filter="bilinear")
    path, pixels = tmp_path / "squashed.json", form if said_by == "the run" else None
    stated = {"resize_mode": "squash", "interpolation": "bilinear"}
    path.write_text(json.dumps({"model_cfg": json.loads(narrow_backbone.read_text()), "preprocess_cfg": stated}))
    if pixels is None:
        config = changed(small_config, {"backbone": {"architecture": str(path)}})
    else:
        config = changed(small_config, {"system": {"pixels": pixels.model_dump()}})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    request = feature_request("clip", str(tmp_path / "config.yaml"), (), None, 0)
    assert (request.size, request.form) == (16, form)
    expected = gate_features(Run.create(tmp_path / "computing", config, dataset))
    store(dataset, request.choice)  # cropped
    assert stored_images(GateConfig(picture="clip"), config.backbone, dataset, "float32", pixels) is None
    squashed = store(dataset, request.choice, form=form)
    assert stored_images(GateConfig(picture="clip"), config.backbone, dataset, "float32", pixels) == squashed
    found = gate_features(Run.create(tmp_path / "reading", config, dataset))
    for name, column in expected.items():
        assert torch.equal(found[name], column), name


def test_a_view_reads_those_of_its_data(small_config: ExperimentConfig, dataset: Dataset, tmp_path: Path) -> None:
    """Its rows of them; those of another version of the data are nobody's."""
    stored = store(dataset, NetworkChoice("clip", None, small_config.backbone.architecture))
    view = make_view(dataset.folder, tmp_path / "view", 0.5, seed=0)
    features = PartFeatures(Run.create(tmp_path / "run", small_config, view), GATE, small_config)
    assert features.beside is not None
    assert features.beside.resolve() == stored.folder
    kept = torch.tensor(view.kept.get("train"))
    whole = load_features([stored.file("train")]).dense("picture")
    assert torch.equal(features.table("train", CPU).dense("picture"), whole[kept])
    assert features.table(KB, CPU).dense("picture").shape[0] == view.num_entities
    manifest = stored.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(dataset.manifest_hash, "0" * 64))
    assert [is_outdated(each) for each in stored_features(view)] == [True]
    assert PartFeatures(features.home, GATE, small_config).beside is None


def test_a_model_ranks_the_same_with_stored_features(
    small_config: ExperimentConfig, dataset: Dataset, tmp_path: Path
) -> None:
    tables = []
    for _ in range(2):
        run = Run.create(tmp_path / f"run-{len(tables)}", small_config, dataset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            for name in run.part_names:
                run.save_part(name, run.system.build_part(name, small_config, with_encoder=True), {})
            run.save_part("dsmip", run.system.build_whole(small_config), {})
        files = plan_files(OpenedEvaluation(run, "test", "dsmip"))
        files.build(list(files.missing), CPU)
        files.finish()
        opened = files.open()
        tables.append((opened.mentions, opened.index.take(torch.arange(len(opened.index)))))
        store(dataset, NetworkChoice("clip", None, small_config.backbone.architecture))
    for computed, read in zip(*tables, strict=True):
        assert torch.equal(computed.dense("gate.logits"), read.dense("gate.logits"))


@pytest.fixture
def thin_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VGG of sixteen layers and few channels under torchvision's names."""

    def thin(**_: object) -> nn.Module:
        layers = [2, 2, "M", 2, 2, "M", 4, 4, 4, "M", 4, 4, 4, "M", 4, 4, 4, "M"]
        network = VGG(make_layers(layers), init_weights=False)
        network.classifier[0], network.classifier[3] = nn.Linear(4 * 49, 8), nn.Linear(8, 8)
        return network

    monkeypatch.setattr("torchvision.models.vgg16", thin)


@pytest.mark.usefixtures("thin_vgg")
def test_vgg_features_take_the_place_of_the_weights(
    small_config: ExperimentConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """By file while it is there, by the hash without it, by torchvision's name; else the missing weights are told."""
    weights = tmp_path / "vgg.safetensors"
    save_file(Vgg16Features.random(0).state_dict(), weights)

    def run(vgg_weights: str) -> Run:
        tree = small_config.model_dump(mode="json")
        tree["system"]["gate"] |= {"picture": "vgg16", "vgg_weights": vgg_weights}
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        return Run.create(folder, parse_config(tree), dataset)

    expected = gate_features(run(str(weights)))
    stored = store(dataset, NetworkChoice("vgg16", str(weights)))
    sha256 = stored.manifest.origin.weights.sha256
    assert stored.manifest.origin.weights.name == "vgg.safetensors"
    by_file = gate_features(run(str(weights)))
    weights.unlink()
    by_hash = gate_features(run(f"sha256:{sha256[:16]}"))
    for name, column in expected.items():
        assert torch.equal(by_file[name], column)
        assert torch.equal(by_hash[name], column)
    with pytest.raises(UserError, match=r"no VGG-16 features by the weights sha256:0{16}"):
        gate_features(run(f"sha256:{'0' * 16}"))
    with pytest.raises(UserError, match="safetensors do not exist"):
        gate_features(run(str(weights)))
    tagged = stored.manifest.model_dump(mode="json")
    tagged["origin"]["weights"]["name"] = "torchvision IMAGENET1K_V1"
    (stored.folder / "manifest.json").write_text(json.dumps(tagged))
    assert torch.equal(gate_features(run("torchvision"))["kb.picture"], expected["kb.picture"])


def test_what_features_depend_on_is_in_their_key(
    small_config: ExperimentConfig, narrow_backbone: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """Weights, form and pixel statistics of the network, precision and data: each makes other features."""
    gate, backbone = GateConfig(picture="clip"), small_config.backbone
    choice = NetworkChoice("clip", None, backbone.architecture)
    form = json.loads(narrow_backbone.read_text())
    heads, means = tmp_path / "heads.json", tmp_path / "means.json"
    heads.write_text(json.dumps({**form, "vision_cfg": {**form["vision_cfg"], "head_width": 8}}))
    means.write_text(json.dumps({"model_cfg": form, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    choices = [choice, replace(choice, seed=1), *(replace(choice, architecture=str(path)) for path in (heads, means))]
    assert len({hashed(each) for each in choices}) == 4
    stored = store(dataset, choice)
    assert stored_images(gate, backbone, dataset, "float32") == stored
    assert stored_images(gate, backbone, dataset, "float16") is None
    for path in (heads, means):
        other = backbone.model_copy(update={"architecture": str(path)})
        assert stored_images(gate, other, dataset, "float32") is None
    manifest = dataset.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "small"', '"name": "smaller"'))
    assert stored_images(gate, backbone, Dataset.open(dataset.folder), "float32") is None


def hashed(choice: NetworkChoice) -> str:
    return network_hash(choice.build().identity())


def test_a_text_tower_has_no_part_in_the_hash(small_config: ExperimentConfig) -> None:
    choice = NetworkChoice("clip", None, small_config.backbone.architecture)
    network = choice.build()
    assert isinstance(network, ClipImage)
    before = network_hash(network.identity())
    with torch.no_grad():
        network.module.clip.get_parameter("token_embedding.weight").add_(1.0)
    assert network_hash(network.identity()) == before
    with torch.no_grad():
        network.module.clip.get_parameter("visual.proj").add_(1.0)
    assert network_hash(network.identity()) != before


def test_damaged_features_are_refused_by_name(small_config: ExperimentConfig, dataset: Dataset, tmp_path: Path) -> None:
    stored = store(dataset, NetworkChoice("clip", None, small_config.backbone.architecture))
    run = Run.create(tmp_path / "run", small_config, dataset)
    gate: GateConfig = small_config.system.gate  # type: ignore[attr-defined]
    open_images = partial(stored_images, gate, small_config.backbone, run.dataset, "float32")
    kb, manifest = stored.folder / "kb.safetensors", stored.folder / "manifest.json"
    content, text = kb.read_bytes(), manifest.read_text()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        kb.write_bytes(damaged)
        found = open_images()
        assert found is not None
        with pytest.raises(UserError, match=r"kb\.safetensors: the features are damaged.*dsmip features"):
            found.file(KB)
    kb.unlink()
    with pytest.raises(UserError, match=r"kb\.safetensors: the features are missing"):
        stored.file(KB)
    for wrong, said in (('"width": 24', '"width": "x"'), ('"kb"', '"bk"')):
        manifest.write_text(text.replace(wrong, said))
        with pytest.raises(UserError, match=r"manifest\.json: .*delete the folder"):
            open_images()
    manifest.unlink()
    assert open_images() is None  # not finished


def test_an_unknown_image_network_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"'vgg19'; did you mean 'vgg16'\? \(known: vgg16, clip\)"):
        find_network("vgg19")
    with pytest.raises(UserError, match=r"^gate: picture: Input should be 'vgg16' or 'clip'$"):
        validated(GateConfig, {"picture": "vgg19"}, "gate", "")
