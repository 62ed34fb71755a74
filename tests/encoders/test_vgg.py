"""VGG-16 features against torchvision's own network, and the messages when its weights are not there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

from dsmip.encoders.vgg import Vgg16Features
from dsmip.errors import UserError


@pytest.fixture
def thin_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's vgg16 with a narrow classifier: the real one has half a gigabyte of weights."""

    def thin(**options: object) -> nn.Module:
        network = vgg16(**options)
        network.classifier[0] = nn.Linear(512 * 49, 8)
        network.classifier[3] = nn.Linear(8, 8)
        network.classifier[6] = nn.Linear(8, 4)
        return network

    monkeypatch.setattr("torchvision.models.vgg16", thin)


@pytest.mark.slow
def test_features_are_torchvisions_fc7(thin_vgg: None, tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    reference = models.vgg16(weights=None, init_weights=False).eval()
    torch.save(reference.state_dict(), tmp_path / "vgg.pth")
    save_file(reference.state_dict(), tmp_path / "vgg.safetensors")
    network = Vgg16Features.build(tmp_path / "vgg.pth")
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    features = network(images, torch.tensor([True, False]))

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    pixels[1] = 0
    with torch.no_grad():
        hidden = reference.avgpool(reference.features(pixels)).flatten(1)
        torch.testing.assert_close(features, reference.classifier[:5](hidden))
    network.train()
    assert torch.equal(network(images, torch.tensor([True, False])), features)
    again = Vgg16Features.build(str(tmp_path / "vgg.safetensors"))
    assert torch.equal(again(images, torch.tensor([True, False])), features)
    assert again(images[:, :, :64, :64], torch.ones(2, dtype=torch.bool)).shape == (2, 8)


def test_real_size() -> None:
    with torch.device("meta"):
        network = Vgg16Features()
        features = network.fc7(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, 4096)
    assert sum(p.numel() for p in network.parameters()) == 134_260_544


def test_missing_weights_are_named(thin_vgg: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gone\.pth do not exist.*gate\.picture to clip"):
        Vgg16Features.build("gone.pth")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"\(VGG-16\) do not fit.*features\.0\.bias is missing"):
        Vgg16Features.build(tmp_path / "wrong.safetensors")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route\).*local file"):
        Vgg16Features.build("torchvision")
