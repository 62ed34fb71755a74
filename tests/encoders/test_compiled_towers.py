"""Towers with compiled layers: the same gradients, the same state, no compilation for each length of text."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.training.tower_rate import drawn_items
from dsmip.config import BackboneConfig
from dsmip.encoders.clip import Tuning, compile_towers
from dsmip.errors import UserError
from dsmip.units.expert import Expert, ExpertConfig

SIZES = ((6, 11), (5, 9), (7, 13))  # items, tokens


def expert(backbone: Path, tune: Tuning, prompts: int) -> Expert:
    config = ExpertConfig(tune=tune, prompt_length=prompts, prompt_depth=prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture = BackboneConfig(architecture=str(backbone))
        return Expert.build("multimodal", config, architecture, 8, mask_padding=True, with_encoder=True).double()


def features(of: Expert, items: int, tokens: int) -> list[Tensor]:
    table = of.encode_mentions(drawn_items(items, tokens, 16, seed=0))
    return [table.dense(f"{name}_global") for name in ("text", "image")] + [
        table.ragged(f"{name}_tokens").values for name in ("text", "image")
    ]


def gradients(of: Expert, items: int, tokens: int) -> dict[str, Tensor]:
    of.zero_grad()
    torch.stack([(values * values.detach().cos()).sum() for values in features(of, items, tokens)]).sum().backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tune", "prompts"), [("frozen", 2), ("full", 0)])
def test_features_and_gradients_are_the_same_for_any_sizes(narrow_backbone: Path, tune: Tuning, prompts: int) -> None:
    plain, compiled = (expert(narrow_backbone, tune, prompts) for _ in range(2))
    torch._dynamo.reset()
    compile_towers(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for sizes in SIZES:
        with torch.no_grad():
            torch.testing.assert_close(features(compiled, *sizes), features(plain, *sizes), rtol=1e-9, atol=1e-9)
        expected, found = gradients(plain, *sizes), gradients(compiled, *sizes)
        assert found.keys() == expected.keys()
        assert found
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    # two towers, with and without gradients; all layers, lengths and batches share them
    assert 0 < counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    ("given", "named"), [("no-such-compiler -O2", "'no-such-compiler'"), ("", "''"), ("g++ '", '"g\\+\\+ \'"')]
)
def test_a_missing_compiler_is_named(
    narrow_backbone: Path, monkeypatch: pytest.MonkeyPatch, given: str, named: str
) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(UserError, match=f"no C\\+\\+ compiler named {named} "):
        compile_towers(expert(narrow_backbone, "frozen", 0))


@pytest.mark.slow
def test_what_is_compiled_lies_in_a_private_folder(
    narrow_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own has a name that another user knows, and what lies there is loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named by the user"))
    matcher = expert(narrow_backbone, "frozen", 0)
    compile_towers(matcher)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "named by the user")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_somebody")
    compile_towers(matcher)
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.parent == tmp_path / "dsmip"
    assert (folder.parent.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o700, 0o700)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="compiled: is a link"):
        compile_towers(matcher)
