"""Makes a data directory and a run with the commands of any commit, and packs them for the tests.

    python tools/archive_run.py CHECKOUT tests/stored/run_of_2026_11.tar.xz

Tests open the archive with the present code: what users have stored must stay readable. CHECKOUT is a checkout of the
commit to take ("." for this one); the commands run in this Python environment, and take a few minutes.

The archive holds `data` and `run`. The backbone's files are not in it: `write_backbone` gives the same bits everywhere.
Absolute paths below the working folder are replaced by ROOT, and what tells of the machine by neutral words.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

ROOT = "/srv/dsmip"  # stands for the folder that holds `data` and `run`
ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "grey", "pink", "brown")
_SEED = 2026
_LEFT_OUT = ("run/ray/visual", "run/ray/multimodal", "run/variants/*/ray", "run/tune/ray", "run/tune/trials")
_NEUTRAL = {
    "host": "node",
    "platform": "Linux",
    "cpu": {"model": "x86_64", "count": 2},
    "memory_bytes": 8 << 30,
    "gpus": [],
}


def main(arguments: Sequence[str]) -> None:
    """Runs the recipe and writes the archive."""
    if len(arguments) != 2:
        sys.exit(__doc__)
    checkout, target = Path(arguments[0]).resolve(), Path(arguments[1])
    with TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        _make(work, checkout)
        _neutralise(work)
        _pack(work, target)
    print(f"{target}: {target.stat().st_size} bytes")


def write_backbone(folder: Path) -> dict[str, str]:
    """Writes a narrow CLIP with drawn weights; returns the `backbone` section that names it.

    Weights are whole numbers over a power of two, from raw bits: the same on every machine, in every version.
    """
    with torch.device("meta"):
        network = CLIP(ARCHITECTURE["embed_dim"], ARCHITECTURE["vision_cfg"], ARCHITECTURE["text_cfg"])
    bits, tensors = np.random.PCG64(_SEED), {}
    for name, empty in sorted(network.state_dict().items()):
        drawn = bits.random_raw(empty.numel()) >> np.uint64(56)  # 0 .. 255
        values = torch.tensor(drawn.astype(np.float32)).view(empty.shape)
        is_norm = "ln_" in name and name.endswith("weight")
        tensors[name] = torch.ones(empty.shape) if is_norm else ((values - 128) / 256).contiguous()
    architecture, weights = folder / "narrow.json", folder / "narrow.safetensors"
    architecture.write_text(json.dumps(ARCHITECTURE), encoding="utf-8")
    save_file(tensors, weights)
    return {"architecture": str(architecture), "pretrained": str(weights)}


def _make(work: Path, checkout: Path) -> None:
    _write_release(work / "release")
    (work / "config.json").write_text(json.dumps(_config(write_backbone(work))), encoding="utf-8")  # JSON is YAML
    commands = [
        "prepare release data --name colours --licence CC0-1.0 --image-size 16",
        "train --config config.json --data data --run run",
        "tune --run run --seed 1",
        "evaluate --run run --split test",
        "evaluate --run run --split test --model text",
        "evaluate --run run --split validation --model multimodal",
    ]
    program = str(Path(sys.executable).with_name("dsmip"))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DSMIP_CACHE": str(work / "cache")}
    for command in commands:
        print(f"dsmip {command}", flush=True)
        subprocess.run([program, *command.split()], cwd=work, env=environment, check=True)


def _config(backbone: dict[str, str]) -> dict[str, Any]:
    """DSMIP, narrow; the sweep also trains an expert of other settings."""
    return {
        "model": "dsmip",
        "backbone": backbone,
        "system": {
            "experts": {"text": {}, "visual": {}, "multimodal": {"prompt_length": 2, "prompt_depth": 2}},
            "width": 6,
            "gate": {"picture": "clip", "width": 6, "choice": "mention"},
        },
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "extra_negatives": 2,
            "self_mentions": 2,
            "augment": {"shift": 0.2, "flip": 0.5, "colour": 0.3, "drop_tokens": 0.2, "drop_pictures": 0.2},
        },
        "tune": {
            "trials": 2,
            "rungs": [1, 2],
            "reduction": 2,
            "space": {"system.experts.multimodal.prompt_length": {"values": [1, 3]}},
        },
        "held_out": 0.3,
        "seed": 3,
    }


def _write_release(folder: Path) -> None:
    """9 entities, two of three with a picture; 16 / 5 / 7 mentions, some with a picture, of two kinds."""
    kb = [
        {"qid": f"Q{row}", "entity_name": name, "attr": f"colour {row}", "image_list": [f"Q{row}.jpg"] * (row % 3 > 0)}
        for row, name in enumerate(COLOURS)
    ]
    mentions = [
        {
            "id": f"m{number}",
            "sentence": f"a {COLOURS[number * 5 % 9]} thing, number {number}",
            "mentions": COLOURS[number * 5 % 9],
            "answer": f"Q{number * 5 % 9}",
            "imgPath": f"m{number}.jpg" if number % 3 else "",
            "kind": "odd" if number % 2 else "even",
        }
        for number in range(28)
    ]
    for name in ("kb_image", "mention_image"):
        (folder / name).mkdir(parents=True)
    for row, name in enumerate(COLOURS):
        (folder / f"kb_image/Q{row}.jpg").write_bytes(_image_bytes(16, name))
    for number in range(28):
        (folder / f"mention_image/m{number}.jpg").write_bytes(_image_bytes(20, COLOURS[number * 5 % 9]))
    parts = {"kb_entity": kb, "C_train": mentions[:16], "C_dev": mentions[16:21], "C_test": mentions[21:]}
    for name, records in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")


def _image_bytes(width: int, colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, 16), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def _neutralise(work: Path) -> None:
    """Replaces this machine's paths and description in files of text; drops all checkpoints but one training's."""
    for pattern in _LEFT_OUT:
        for folder in work.glob(pattern):
            shutil.rmtree(folder)
    for path in [*work.glob("data/**/*"), *work.glob("run/**/*")]:
        if path.suffix not in (".json", ".yaml", ".jsonl"):
            continue
        text = path.read_text(encoding="utf-8").replace(str(work), ROOT)
        if path.suffix == ".json":
            content = json.loads(text)
            for name in ("made", "environment", "where"):
                fields = content.get(name, {})
                fields |= {key: value for key, value in _NEUTRAL.items() if key in fields}
            if content != json.loads(text):
                text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def _pack(work: Path, target: Path) -> None:
    """The same files give the same bytes."""
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted([*work.glob("data/**/*"), *work.glob("run/**/*")]):
            if not path.is_file():
                continue
            info = tarfile.TarInfo(path.relative_to(work).as_posix())
            info.size = path.stat().st_size
            with path.open("rb") as stream:
                archive.addfile(info, stream)


if __name__ == "__main__":
    main(sys.argv[1:])
