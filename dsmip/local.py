"""A training's outside world on one machine, without a cluster: the newest complete checkpoint folder counts."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Report = Callable[[Mapping[str, float]], None]


class LocalContext:
    """`Context` of a single process. Keeps the newest checkpoint of `folder` and resumes from it."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        on_epoch: Report = lambda metrics: None,
        on_step: Callable[[int, int, int, float], None] = lambda epoch, step, num_steps, loss: None,
    ) -> None:
        self.device = torch.device(device)
        self.folder, self.on_epoch, self.on_step = folder, on_epoch, on_step

    def step_done(self, epoch: int, step: int, num_steps: int, loss: float) -> None:
        self.on_step(epoch, step, num_steps, loss)

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        for older in self._checkpoints():
            if older != checkpoint:
                shutil.rmtree(older)
        self.on_epoch(metrics)

    def restore(self) -> Path | None:
        complete = [folder for folder in self._checkpoints() if (folder / "checkpoint.json").is_file()]
        return complete[-1] if complete else None

    def checkpoint_folder(self, epoch: int) -> Path:
        folder = self.folder / f"epoch-{epoch:04d}"
        if folder.exists():
            shutil.rmtree(folder)  # left by an interrupted write
        return folder

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*"))
