"""Weights in the files that others publish: TorchScript archives, CLIPModel, SiglipModel; nothing in them is run."""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.clip import Backbone
from dsmip.encoders.formats.sizes import networks_of_such_sizes
from dsmip.encoders.formats.torchscript import read_archive
from dsmip.encoders.networks import build_network
from dsmip.encoders.weights import read_weights, stored_activation
from dsmip.errors import UserError
from dsmip.runs.load_config import job_config

TEXT = {"context_length": 12, "vocab_size": 100, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
ALIKE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
OF_HUGGING_FACE: dict[str, Any] = {
    "text_config": {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 98,
        "eos_token_id": 99,
    },
    "vision_config": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
}


@register_model
def vit_tiny_patch8_siglip_for_tests(pretrained: bool = False, **options: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    form: dict[str, Any] = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}
    passed = {name: value for name, value in options.items() if not name.startswith(("pretrained_cfg", "cache_dir"))}
    return VisionTransformer(**sizes, **form | passed)


def written(folder: Path, **changes: Any) -> str:
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **changes}
    (folder / "backbone.json").write_text(json.dumps(config))
    return str(folder / "backbone.json")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Full texts; the last token, the end of text, is the highest id."""
    ids = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 99
    return ids


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as OpenAI's are: a scripted network in half precision, with three numbers."""
    torch.manual_seed(3)
    clip = CLIP(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=True).eval()  # type: ignore[arg-type]
    for name in ("input_resolution", "context_length", "vocab_size"):
        if hasattr(clip, name):
            delattr(clip, name)
        clip.register_buffer(name, torch.tensor(32))
    path = tmp_path_factory.mktemp("archive") / "ViT-B-32.pt"
    torch.jit.script(clip.half()).save(str(path))
    return path


@torch.no_grad()
def test_a_torchscript_archive_gives_the_programs_own_features(
    program: Path, tmp_path: Path, ids: Tensor, pixels: Tensor
) -> None:
    own = torch.jit.load(str(program)).float()
    names = own.state_dict().keys() - {"attn_mask"}
    assert read_archive(program).tensors.keys() == names
    backbone = Backbone.build(written(tmp_path, quick_gelu=True), str(program))
    torch.testing.assert_close(backbone.encode_image(pixels).pooled, own.encode_image(pixels), **ALIKE)
    text = backbone.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(text.pooled, own.encode_text(ids), **ALIKE)
    Backbone.checked(written(tmp_path, quick_gelu=True), str(program))
    with pytest.raises(UserError, match=r"with QuickGELU \(it is a state dict of OpenAI's\) but .* is without it"):
        Backbone.checked(written(tmp_path), str(program))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def rewritten(program: Path, to: Path, data: bytes | None = None, without: str = "") -> Path:
    """A copy with another data.pkl, or without a member."""
    with zipfile.ZipFile(program) as before, zipfile.ZipFile(to, "w") as after:
        for name in before.namelist():
            if name.endswith("/data.pkl") and data is not None:
                after.writestr(name, data)
            elif not without or not name.endswith(without):
                after.writestr(name, before.read(name))
    return to


def pickled(program: Path) -> bytes:
    with zipfile.ZipFile(program) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("/data.pkl")))


def test_nothing_in_an_archive_is_run(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb(), protocol=2)
    pickle.loads(bomb)  # what an ordinary reader would do
    Path("exploded").rmdir()
    whole = pickled(program)
    before = rewritten(program, tmp_path / "before.pt", bomb[:-1] + b"0" + whole[2:])  # goes off, is dropped, goes on
    state, plain = read_weights(before), read_weights(program)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    alone = rewritten(program, tmp_path / "alone.pt", bomb)
    with pytest.raises(UserError, match=r"alone.pt holds no state dict"):
        read_weights(alone)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"\x80\x02cos\nsystem\n", b"\x80\x02}q\x00(X\x01", b"\x80\x02K\x01Q."]
)
def test_a_damaged_archive_is_called_so(program: Path, tmp_path: Path, data: bytes) -> None:
    damaged = rewritten(program, tmp_path / "damaged.pt", data)
    with pytest.raises(UserError, match=r"damaged.pt, a TorchScript archive, cannot be read"):
        read_weights(damaged)


def test_an_archive_without_its_numbers_or_with_other_sizes_is_refused(program: Path, tmp_path: Path) -> None:
    without = rewritten(program, tmp_path / "without.pt", without="/data/0")
    with pytest.raises(UserError, match=r"without.pt, a TorchScript archive, cannot be read: .*data/0"):
        read_weights(without)
    sized = pickled(program).replace(b"K\x18", b"K\x7f")  # sizes of 24 are 127 now
    with pytest.raises(UserError, match=r"cannot be read: a tensor is larger than its data"):
        read_weights(rewritten(program, tmp_path / "sized.pt", sized))


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as before, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as after:
        for name in before.namelist():
            after.writestr(name, before.read(name), zipfile.ZIP_DEFLATED if name.endswith("/data/0") else None)
    with pytest.raises(UserError, match=r"bomb.pt, a TorchScript archive, cannot be read: .*data/0 is compressed"):
        read_weights(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "large.pt", "w") as after:
        after.writestr("net/constants.pkl", b"")
        after.writestr("net/data.pkl", bytes((256 << 20) + 1), zipfile.ZIP_DEFLATED, compresslevel=1)
    with pytest.raises(UserError, match="cannot be read: its pickle is too large"):
        read_weights(tmp_path / "large.pt")


def test_modules_without_end_are_refused(program: Path, tmp_path: Path) -> None:
    """Each of 40 modules holds the next one twice: 2^40 names."""
    levels = b"".join(b"cm\nC\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00" for _ in range(40))
    data = b"\x80\x02cm\nC\n)\x81q\x00" + levels + b"."
    with pytest.raises(UserError, match="its modules have no end"):
        read_weights(rewritten(program, tmp_path / "deep.pt", data))


def saved(model: Any, folder: Path, form: str) -> str:
    model.save_pretrained(folder)
    if form == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / form)
    return str(folder if form == "folder" else folder / form)


@torch.no_grad()
def check_features(backbone: Backbone, model: Any, ids: Tensor, pixels: Tensor) -> None:
    found = model.eval()(input_ids=ids, pixel_values=pixels)
    image, text = backbone.encode_image(pixels), backbone.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(normalize(image.pooled, dim=-1), found.image_embeds, **ALIKE)
    torch.testing.assert_close(normalize(text.pooled, dim=-1), found.text_embeds, **ALIKE)


@pytest.mark.parametrize("form", ["folder", "model.safetensors", "pytorch_model.bin"])
def test_a_clip_model_gives_its_own_features(form: str, tmp_path: Path, ids: Tensor, pixels: Tensor) -> None:
    torch.manual_seed(4)
    model = CLIPModel(CLIPConfig(**OF_HUGGING_FACE, projection_dim=24))
    pretrained = saved(model, tmp_path / "model", form)
    check_features(Backbone.build(written(tmp_path, quick_gelu=True), pretrained), model, ids, pixels)
    Backbone.checked(written(tmp_path, quick_gelu=True), pretrained)
    with pytest.raises(UserError, match=r"with QuickGELU \(so .*config.json says\) but .* is without it"):
        Backbone.checked(written(tmp_path), pretrained)


def test_a_siglip_model_gives_its_own_features(tmp_path: Path, ids: Tensor, pixels: Tensor) -> None:
    torch.manual_seed(5)
    model = SiglipModel(SiglipConfig(**OF_HUGGING_FACE))
    model.text_model.head = torch.nn.Linear(16, 32)  # a smaller text tower than Hugging Face's classes have
    model.vision_model.head.attention.in_proj_bias.data.normal_()  # zero at first
    pretrained = saved(model, tmp_path / "model", "folder")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1]}'
    )
    text = {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    vision = {"timm_model_name": "vit_tiny_patch8_siglip_for_tests", "timm_pool": "map", "timm_proj": "none"}
    config = {"embed_dim": 32, "custom_text": True, "init_logit_bias": -10}
    architecture = written(tmp_path, **config, vision_cfg={"image_size": 32} | vision, text_cfg=TEXT | text)
    backbone = Backbone.build(architecture, pretrained)
    check_features(backbone, model, ids, pixels)
    assert backbone.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert backbone.std.flatten().tolist() == [0.25, 0.5, 1]
    Backbone.checked(architecture, pretrained)
    with pytest.raises(UserError, match=r"without QuickGELU \(so .*config.json says\)"):
        Backbone.checked(written(tmp_path, quick_gelu=True), pretrained)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", '{"image_mean": 5}', "image_mean must be three numbers, not 5"),
        ("preprocessor_config.json", '{"image_std": [1]}', r"image_std must be three numbers, not \[1\]"),
        ("preprocessor_config.json", "[1]", "must hold a JSON object"),
        ("config.json", '{"model_type": ["clip"]}', "do not fit"),
        ("config.json", '{"model_type": "clip", "text_config": 5}', "with QuickGELU"),
    ],
)
def test_odd_files_beside_weights_are_one_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        Backbone.checked("tiny", str(folder))


def test_weights_of_another_network_are_told_whose_they_are(tmp_path: Path) -> None:
    with torch.device("meta"):
        state: Mapping[str, Tensor] = build_network(resolve_architecture("ViT-B-16-quickgelu")).state_dict()
    names = networks_of_such_sizes(state)
    assert {"ViT-B-16", "ViT-B-16-quickgelu"} <= set(names)
    assert not {"ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP"} & set(names)
    torch.manual_seed(4)
    pretrained = saved(CLIPModel(CLIPConfig(**OF_HUGGING_FACE, projection_dim=24)), tmp_path / "model", "folder")
    with pytest.raises(UserError, match=r"model \(tiny\) do not fit the architecture: "):
        Backbone.build("tiny", pretrained)


def test_a_folder_becomes_its_file_in_a_jobs_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers live in other folders, and a run finds its files again by their content."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = job_config("demo", ["backbone.pretrained=~/model"])
    assert config.backbone.pretrained == str(tmp_path / "model" / "model.safetensors")
    assert stored_activation(Path(config.backbone.pretrained)) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_a_file_that_is_closed_to_this_user_is_no_missing_one(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "closed.safetensors")
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"closed\.safetensors cannot be read: .*Permission denied"):
            read_weights(tmp_path / "closed.safetensors")
    finally:
        os.seteuid(0)
