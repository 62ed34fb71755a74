"""What is known of a training before it begins: missing mentions and pictures, settings that cannot work together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.registry import open_release
from data_prep.formats.release import ReleaseOptions
from dsmip.config import Choice, ExperimentConfig, TuneConfig
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import ImageSettings
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.runs.checks import check_pretraining, check_training, check_trials
from dsmip.runs.load_config import job_config
from dsmip.training.stages import check_held_out
from ray_jobs.jobs.prepare import BuildOptions, prepare_release
from tests.support.encoders.small_bert import write_small_bert
from tests.support.encoders.tower_kinds import tower_kinds

QUICK = ("train.warmup_steps=0",)


def _dataset(folder: Path, splits: list[str], images: ImageSettings) -> Dataset:
    folder.mkdir()
    entities = [{"entity_id": n, "name": f"n{n}", "attributes": "a"} for n in range(2)]
    mentions = [
        {"mention_id": n, "word": "w", "sentence": "s", "entity_id": n % 2, "split": split}
        for n, split in enumerate(splits)
    ]
    for name, records in (("entities", entities), ("mentions", mentions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    release = open_release(folder, None, ReleaseOptions(), lambda _: None)
    prepare(release, folder / "data", DatasetOptions(name="own", images=images))
    return Dataset.open(folder / "data")


def test_a_split_that_training_needs_is_missing(tmp_path: Path) -> None:
    config, images = job_config("demo", QUICK), ImageSettings(size=64, quality=92)
    sound = _dataset(tmp_path / "sound", ["train", "train", "validation"], images)
    assert check_training(config, sound) == []
    for missing, left in (("train", "validation"), ("validation", "train")):
        dataset = _dataset(tmp_path / missing, [left, "test"], images)
        with pytest.raises(UserError, match=f"has no mention of {missing}, so .*--split 70/10/20") as refused:
            check_training(config, dataset)
        assert refused.value.exit_code == 2
    with pytest.raises(UserError, match="has one mention of train, and a batch contrasts at least two"):
        check_training(config, _dataset(tmp_path / "one", ["train", "validation"], images))


def test_pictures_smaller_than_the_backbones_are_told_with_the_remedy(tmp_path: Path) -> None:
    config = job_config("demo", QUICK)
    small = ImageSettings(size=32, quality=92)
    dataset = _dataset(tmp_path / "small", ["train", "train", "validation"], small)
    (line,) = check_training(config, dataset)
    assert line.startswith(f"warning: {dataset.location} has pictures of at most 32 pixels")
    assert "takes 64: they are enlarged; 'dsmip prepare --image-size 64'" in line
    as_it_was = small.model_copy(update={"keep_original": True})
    kept = _dataset(tmp_path / "kept", ["train", "train", "validation"], as_it_was)
    assert check_training(config, kept) == []


@pytest.fixture
def sound(tmp_path: Path) -> Dataset:
    return _dataset(tmp_path / "sound", ["train"] * 9 + ["validation"], ImageSettings(size=64, quality=92))


def test_what_the_towers_cannot_hold_is_refused_with_the_key(sound: Dataset) -> None:
    prompts = "system.experts.multimodal.prompt"
    with pytest.raises(UserError, match="multimodal: 99 prompts leave no room for a text in the 77 positions of tiny"):
        check_training(job_config("demo", [f"{prompts}_length=99"]), sound)
    with pytest.raises(
        UserError, match=r"multimodal.prompt_depth: prompt depth 99 exceeds the \d+ layers of the text tower"
    ):
        check_training(job_config("demo", [f"{prompts}_depth=99"]), sound)
    with pytest.raises(UserError, match=r"VGG-16 weights no.pth do not exist \(system.gate.vgg_weights\); name"):
        check_training(job_config("demo", ["system.gate.picture=vgg16", "system.gate.vgg_weights=no.pth"]), sound)
    unused = ["system.use=[text, visual]", f"{prompts}_length=99"]  # stage one trains it all the same
    with pytest.raises(UserError, match="multimodal: 99 prompts leave no room"):
        check_training(job_config("demo", unused), sound)
    with pytest.raises(UserError, match="99 prompts leave no room"):
        check_trials([({}, job_config("demo", [])), ({}, job_config("demo", [f"{prompts}_length=99"]))])


def test_a_search_space_is_tried_at_its_ends_before_stage_one(sound: Dataset) -> None:
    def space(key: str, choice: Mapping[str, Any]) -> ExperimentConfig:
        tune = TuneConfig(rungs=(2,), space={key: Choice(**choice)})
        return job_config("demo", QUICK).model_copy(update={"tune": tune})

    prompts = "system.experts.multimodal.prompt_length"
    for key, choice, wrong in (
        ("system.gate.dropout", {"values": [0.1, 7]}, "system.gate.dropout: Input should be less than 1"),
        ("system.gate.dropout", {"uniform": [0.1, 7]}, "system.gate.dropout: Input should be less than 1"),
        ("train.epochs", {"uniform": [8, 12]}, "tune.train.epochs: Input should be a valid integer"),
        (prompts, {"values": [2, 99]}, "multimodal: 99 prompts leave no room"),
    ):
        with pytest.raises(UserError, match=wrong):
            check_training(space(key, choice), sound)
    assert check_training(space("system.gate.dropout", {"uniform": [0, 1]}), sound) == []  # 1 is not drawn


def test_rungs_beyond_the_epochs_are_told_by_train_and_refused_by_tune(sound: Dataset) -> None:
    config = job_config("demo", [*QUICK, "tune.train.epochs=5"])
    assert [line for line in check_training(config, sound) if "tune.rungs ends at 20 epochs, but" in line]
    with pytest.raises(UserError, match=r"tune.rungs ends at 20 epochs, but tune.train.epochs is 5"):
        check_trials([({}, config)])
    with pytest.raises(UserError, match=r"tune.space: a trial has train.epochs=5"):
        check_trials([({}, job_config("demo", [])), ({"train.epochs": 5}, config)])


def test_a_share_of_a_batch_without_negatives_is_refused(sound: Dataset) -> None:
    settings = ["train.negatives=local", "train.batch_size=6", "parts.visual.workers=1..4", *QUICK]
    with pytest.raises(UserError, match=r"parts.visual: negatives: local leaves each of 4 workers 6 / 4 mentions"):
        check_training(job_config("demo", settings), sound)
    assert check_training(job_config("demo", [*settings, "train.batch_size=8"]), sound) == []


def test_held_out_golds_leave_both_stages_something(sound: Dataset) -> None:
    """All mentions have one of two golds, so a share takes none, half, or all."""
    for share, stage in ((1e-9, "two 0"), (1 - 1e-9, "one 0")):
        with pytest.raises(UserError, match=f"leaves stage {stage} of 9 training mentions"):
            check_held_out(sound, share)
    check_held_out(sound, 0)


def test_pretraining_without_pairs_or_with_lost_weights_is_refused(sound: Dataset, small_data: Dataset) -> None:
    with pytest.raises(UserError, match="fewer than two entities have a picture"):
        check_pretraining(job_config("demo", []), sound)
    with pytest.raises(UserError, match=r"weights file no.safetensors does not exist"):
        check_pretraining(job_config("demo", ["backbone.pretrained=no.safetensors"]), small_data)
    (line,) = check_pretraining(job_config("demo", ["pretrain.epochs=4"]), small_data)
    assert line.startswith("warning: backbone: the learning rate grows during 20 of about 4 steps (pretrain.warmup")


def test_weights_that_are_lost_or_of_another_network_are_refused(sound: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights file no.safetensors does not exist"):
        check_training(job_config("demo", ["backbone.pretrained=no.safetensors"]), sound)
    other = Backbone.build("small", None)
    save_file(other.clip.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(UserError, match=r"small.safetensors \(tiny\) do not fit the architecture"):
        check_training(job_config("demo", [f"backbone.pretrained={tmp_path}/small.safetensors"]), sound)
    own = Backbone.build("tiny", None)
    save_file(own.clip.state_dict(), tmp_path / "tiny.safetensors")
    settings = [f"backbone.pretrained={tmp_path}/tiny.safetensors", *QUICK]
    assert check_training(job_config("demo", settings), sound) == []


def test_a_file_that_tells_nothing_of_its_activation_is_warned_of(
    sound: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it may be of open_clip's twin with QuickGELU; its own JSON is a user's own network."""
    monkeypatch.setattr(Backbone, "checked", staticmethod(lambda name, _: Backbone.build(name, None, device="meta")))
    save_file({"a": torch.zeros(1)}, tmp_path / "some.safetensors")
    for architecture, state in (("ViT-B-32", "without"), ("ViT-B-32-quickgelu", "with")):
        settings = [f"backbone.pretrained={tmp_path}/some.safetensors", f"backbone.architecture={architecture}", *QUICK]
        lines = check_training(job_config("demo", settings), sound)
        assert [line for line in lines if f"with QuickGELU, and {architecture} is {state} it" in line]
    settings = [f"backbone.pretrained={tmp_path}/some.safetensors", *QUICK]
    assert check_training(job_config("demo", settings), sound) == []


def test_a_warm_up_of_most_steps_is_told(sound: Dataset) -> None:
    (first, *_) = warnings = check_training(job_config("demo", []), sound)
    assert len(warnings) == 3
    assert first.startswith("warning: text: the learning rate grows during 20 of about 5 steps (train.warmup_steps")


def test_prepare_says_which_split_is_missing_and_what_helps(tmp_path: Path) -> None:
    _dataset(tmp_path / "own", ["train", "train"], ImageSettings(size=64, quality=92))
    release = open_release(tmp_path / "own", None, ReleaseOptions(), lambda _: None)
    lines: list[str] = []
    prepare_release(release, tmp_path / "again", BuildOptions(), lambda part, done, total: None, lines.append)
    assert [line.partition(";")[0] for line in lines] == [
        "warning: no mention of validation is left, and 'dsmip train' needs some",
        "warning: no mention of test is left",
    ]
    assert all("--split 70/10/20" in line for line in lines)
    lines.clear()
    cut = open_release(tmp_path / "own", None, ReleaseOptions(split=(70, 10, 20)), lambda _: None)
    prepare_release(cut, tmp_path / "cut", BuildOptions(), lambda part, done, total: None, lines.append)
    assert [line.partition("; ")[2] for line in lines] == [  # of two mentions of one sentence
        "--split keeps mentions of equal sentence or picture together, and there are too few others"
    ] * 2
    split = open_release(tmp_path / "own", None, ReleaseOptions(split=(34, 33, 33)), lambda _: None)
    assert {part: len(list(split.mentions(part))) for part in ("train", "validation", "test")}["train"] == 2


def test_texts_longer_than_the_towers_context_are_refused(sound: Dataset) -> None:
    backbone = "backbone={architecture: tiny, pretrained: null}"
    for system in ("mimic", "m3el", "mmoe"):
        with pytest.raises(
            UserError, match=f"{system}: texts of 99 tokens and 0 prompts exceed the 77 positions of tiny"
        ):
            check_training(job_config(f"{system}_wikimel", [backbone, "system.num_tokens=99"]), sound)


def test_hard_negatives_that_nothing_looks_for_are_told(sound: Dataset, tmp_path: Path) -> None:
    gate = job_config("demo", [*QUICK, "tune.train.hard_negatives=2"])
    assert check_training(gate, sound) == [
        "tune.train.hard_negatives: a gate that fuses its experts learns from whole rankings; it does nothing"
    ]
    folder = write_small_bert(tmp_path / "text", ("w", "n0", "n1"))
    blink = [f"backbone={{architecture: null, text: 'hf:{folder}'}}", "system.num_tokens=12", *QUICK]
    blink += ["parts.crossencoder.train.hard_negatives=3", "parts.crossencoder.train.warmup_steps=0"]
    (told,) = check_training(job_config("blink_wikimel", blink), sound)
    assert told.startswith("parts.crossencoder.train.hard_negatives: a re-ranker learns from all system.candidates")


def test_a_tokenizer_of_another_network_is_refused(sound: Dataset, tmp_path: Path) -> None:
    """Its words beyond what the tower embeds would end a worker."""
    folder = write_small_bert(tmp_path / "text", (f"w{number}" for number in range(100)))
    bert = [f"backbone={{architecture: null, text: 'hf:{folder}'}}", "parts.bert.resources.gpu=0", *QUICK]
    assert check_training(job_config("bert_wikimel", bert), sound) == []
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"]["vocab"] |= {f"further{number}": number for number in range(150, 200)}
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its tokenizer has 200 tokens, and its text tower embeds 160"):
        check_training(job_config("bert_wikimel", bert), sound)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"tokenizer .*text (knows no words|cannot be had)"):
        check_training(job_config("bert_wikimel", bert), sound)


def test_a_tower_that_reads_padding_wants_full_texts(sound: Dataset, tmp_path: Path) -> None:
    (tmp_path / "clipa.json").write_text(json.dumps(tower_kinds()["clipa"](tmp_path)))
    config = job_config(
        "mimic_wikimel",
        [f"backbone={{architecture: {tmp_path / 'clipa.json'}, pretrained: null}}", "system.num_tokens=9"],
    )
    with pytest.raises(UserError, match=r"9 tokens do not fill the 12 positions.*set system.num_tokens to 12"):
        check_training(config, sound)


def test_prompts_are_refused_where_a_tower_has_no_place_for_them(sound: Dataset, tmp_path: Path) -> None:
    (tmp_path / "resnet.json").write_text(json.dumps(tower_kinds()["resnet"](tmp_path)))
    config = job_config("demo", [f"backbone={{architecture: {tmp_path / 'resnet.json'}}}"])
    with pytest.raises(UserError, match="prompts have no place in the vision tower: it is a convolutional network"):
        check_training(config, sound)
