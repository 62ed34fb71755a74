"""`dsmip import`: a checkpoint in Lightning's layout becomes a run with the matcher's scores; others are refused."""

import os
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import dsmip
from dsmip.data.collate import gold_rows
from dsmip.data.dataset import Dataset
from dsmip.errors import UserError
from dsmip.models import systems
from dsmip.runs.load_config import load_config
from dsmip.runs.run import Run
from dsmip.runs.status import read_status
from dsmip.units.shared_clip import PUBLISHED_NORMS, SharedClipMatcher
from ray_jobs.jobs.train_experts import train_parts
from ray_jobs.local_jobs.import_run import import_run
from tests.support.displays import Lines
from tests.support.encoders.backbones import NARROW_BACKBONE

IMPORTABLE = sorted(name for name, system in systems().items() if system.published_sign)


class Settings(dict[str, Any]):
    """As Lightning's own class of hyper-parameters: nothing that a plain reader knows."""


class Planted:
    """Makes a folder when somebody unpickles it as pickle does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def overrides(narrow_backbone: Path) -> list[str]:
    return [f"backbone.architecture={narrow_backbone}", "system.width=8", "system.num_tokens=16"]


def clip_state() -> dict[str, Tensor]:
    """A Hugging Face CLIPModel of the narrow backbone's sizes, with its position numbers."""
    sizes: Any = NARROW_BACKBONE
    text, vision = sizes["text_cfg"], sizes["vision_cfg"]
    config = CLIPConfig(
        text_config={
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
        },
        vision_config={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": 2,
        },
        projection_dim=sizes["embed_dim"],
    )
    state = {f"encoder.clip.{name}": tensor for name, tensor in CLIPModel(config).state_dict().items()}
    return {**state, "encoder.clip.text_model.embeddings.position_ids": torch.arange(77)[None]}


def released_state(name: str, overrides: list[str]) -> dict[str, Tensor]:
    """A system's state dict under its published names, with random numbers."""
    config = load_config(systems()[name].published_config, overrides)
    matcher = systems()[name].build_part(name, config, with_encoder=False)
    assert isinstance(matcher, SharedClipMatcher)
    starts = {**matcher.published_units, **PUBLISHED_NORMS}
    state = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for own, tensor in matcher.scorer.state_dict().items():
            start = next(start for start in starts if own.startswith(start))
            state[starts[start] + own.removeprefix(start)] = torch.randn(tensor.shape) / 4
        return state | clip_state()


def write_checkpoint(path: Path, state: Mapping[str, Tensor], planted: Path) -> Path:
    """In the layout of Lightning's own, with what a plain reader of tensors refuses."""
    content = {
        "epoch": 11,
        "global_step": 1200,
        "pytorch-lightning_version": "1.7.7",
        "state_dict": state,
        "callbacks": {Settings: {"best": torch.tensor(0.5), "planted": Planted(planted)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "hyper_parameters": Settings(args=Namespace(lr=1e-5), folder=Path("data")),
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("config", [None, "mmoe_wikimel", "mmoe_richpediamel", "mmoe_wikidiverse"])
def test_mmoes_released_gate_is_taken_unless_another_is_asked_for(
    config: str | None, overrides: list[str], small_data: Dataset, tmp_path: Path, narrow_backbone: Path
) -> None:
    file = write_checkpoint(tmp_path / "released.ckpt", released_state("mmoe", overrides), tmp_path / "planted")
    asked = [*overrides, "system.gate=per_token"]
    for folder, given, gate in (("a", overrides, "published"), ("b", asked, "per_token")):
        run = import_run("mmoe", file, tmp_path / folder, small_data.location, config=config, overrides=given)
        assert run.config.system.gate == gate


@pytest.mark.parametrize("name", IMPORTABLE)
def test_a_released_checkpoint_becomes_a_run_with_its_weights(
    name: str, overrides: list[str], small_data: Dataset, tmp_path: Path
) -> None:
    state = released_state(name, overrides)
    file = write_checkpoint(tmp_path / "released.ckpt", state, tmp_path / "planted")
    run = import_run(name, file, tmp_path / "run", small_data.location, config=None, overrides=overrides)
    assert not (tmp_path / "planted").exists()
    assert run.config.backbone.pretrained is None
    expected = systems()[name].build_part(name, run.config, with_encoder=True)
    assert isinstance(expected, SharedClipMatcher)
    expected.load_published_state_dict(state)
    found = Run.open(tmp_path / "run").load_part(name, with_encoder=True).state_dict()
    for key, tensor in expected.state_dict().items():
        if not key.endswith("logit_scale"):  # of CLIP's own loss: it takes no part in any score
            assert torch.equal(found[key], tensor), key
    report = run.part_report(name)["imported"]
    assert (report["epoch"], report["lightning"], report["file"]) == (11, "1.7.7", "released.ckpt")


@torch.no_grad()
def test_an_imported_run_is_ranked_by_the_matchers_own_scores(
    overrides: list[str], small_data: Dataset, tmp_path: Path
) -> None:
    state = released_state("mimic", overrides)
    file = write_checkpoint(tmp_path / "released.ckpt", state, tmp_path / "planted")
    options: dict[str, Any] = {"config": None, "overrides": overrides}
    run = import_run("mimic", file, tmp_path / "run", small_data.location, **options)
    assert import_run("mimic", file, tmp_path / "run", small_data.location, **options).folder == run.folder
    matcher = systems()["mimic"].build_part("mimic", run.config, with_encoder=True)
    assert isinstance(matcher, SharedClipMatcher)
    matcher.load_published_state_dict(state)
    collator = run.collator("mimic")
    mentions = matcher.encode_mentions(collator.mentions(list(small_data.mentions("test"))))
    entities = matcher.encode_entities(collator.entities(list(small_data.entities())))
    score_ME = matcher.score(matcher.prepare_mentions(mentions), matcher.prepare_entities(entities)).total_ME
    ranks = pq.read_table(dsmip.evaluate(tmp_path / "run").folder / "ranks.parquet")
    best_Mk = score_ME.sort(dim=1, descending=True).values
    torch.testing.assert_close(torch.tensor(ranks["top_scores"].to_pylist()).float(), best_Mk, atol=1e-4, rtol=1e-4)
    gold_M = score_ME.gather(1, gold_rows(small_data, "test")[:, None])
    assert ranks["better"].to_pylist() == (score_ME > gold_M).sum(dim=1).tolist()
    other = write_checkpoint(tmp_path / "other.ckpt", {**state, "matcher.tglu.fc_query.bias": torch.ones(8)}, tmp_path)
    with pytest.raises(UserError, match="holds another 'mimic', which is kept; give a new folder"):
        import_run("mimic", other, tmp_path / "run", small_data.location, **options)


def test_an_imported_run_is_finished_and_its_next_command_can_be_copied(
    overrides: list[str], small_data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_checkpoint(tmp_path / "released.ckpt", released_state("mimic", overrides), tmp_path / "planted")
    folder = tmp_path / "my run; echo"
    run = import_run("mimic", file, folder, small_data.location, config=None, overrides=overrides)
    assert f"next: dsmip evaluate --run '{folder}' --split test" in capsys.readouterr().out
    train_parts(run, [(run, "mimic")], display := Lines())
    assert display.lines == ["  mimic: finished already, imported, without validation figures"]
    (part,) = read_status(folder).parts
    assert (part.state, part.figures) == ("finished", {})


def test_what_does_not_fit_is_named_and_makes_no_run(overrides: list[str], small_data: Dataset, tmp_path: Path) -> None:
    state = released_state("m3el", overrides)
    files = {name: tmp_path / name for name in ("m3el.ckpt", "note.ckpt", "cut.ckpt", "bare.pt", "other.ckpt")}
    write_checkpoint(files["m3el.ckpt"], state, tmp_path / "planted")
    files["note.ckpt"].write_text("no checkpoint")
    files["cut.ckpt"].write_bytes(files["m3el.ckpt"].read_bytes()[:-500])
    torch.save([1, 2], files["bare.pt"])
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, files["other.ckpt"])
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("net/constants.pkl", b"")
    said = {
        ("mimic", "m3el.ckpt"): "is a checkpoint of m3el, not of mimic: dsmip import m3el takes it",
        ("mimic", "note.ckpt"): "is no checkpoint; needed is a .ckpt file that PyTorch Lightning wrote",
        ("mimic", "cut.ckpt"): "is no checkpoint; needed",
        ("mimic", "bare.pt"): "holds no state dict of tensors; needed",
        ("mimic", "scripted.pt"): "is a TorchScript archive and no checkpoint",
        ("mimic", "other.ckpt"): r"no released checkpoint of mimic: it has tensors such as layer\.weight",
    }
    for (system, file), message in said.items():
        with pytest.raises(UserError, match=message):
            import_run(system, tmp_path / file, tmp_path / "run", small_data.location, config=None, overrides=overrides)
    wider = [*overrides, "system.width=16"]
    with pytest.raises(UserError, match=r"m3el\.ckpt: weights of M3EL .*has shape .*that it was trained with"):
        import_run("m3el", files["m3el.ckpt"], tmp_path / "run", small_data.location, config=None, overrides=wider)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_with_numbers_missing_is_damaged(
    overrides: list[str], small_data: Dataset, tmp_path: Path
) -> None:
    whole = write_checkpoint(tmp_path / "whole.ckpt", released_state("mimic", overrides), tmp_path / "planted")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "part.ckpt", "w") as target:
        for name in source.namelist():
            if not name.endswith("/data/0"):
                target.writestr(name, source.read(name))
    options: dict[str, Any] = {"config": None, "overrides": overrides}
    with pytest.raises(UserError, match=r"part\.ckpt cannot be read: .*data/0"):
        import_run("mimic", tmp_path / "part.ckpt", tmp_path / "run", small_data.location, **options)
