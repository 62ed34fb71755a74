"""A training's outside world on one machine, without a cluster: the newest sound checkpoint folder counts."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dsmip.messages import on_stderr
from dsmip.runs.checkpoints import KEPT, MANIFEST, newest_sound
from dsmip.training.monitor import StepFigures

Report = Callable[[Mapping[str, float]], None]


class LocalContext:
    """`Context` of a single process. Keeps the two newest checkpoints of `folder` and resumes from a sound one."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        on_epoch: Report = lambda metrics: None,
        warn: Callable[[str], None] = on_stderr,
    ) -> None:
        self.device = torch.device(device)
        self.folder, self.on_epoch, self.warn = folder, on_epoch, warn

    @property
    def where(self) -> str:
        """What a user deletes to train anew."""
        return str(self.folder)

    def alive(self) -> None:
        """Nobody watches."""

    def features_done(self, done: int, total: int) -> None:
        """Nothing is shown of features."""

    def step_done(self, epoch: int, step: int, num_steps: int, figures: StepFigures) -> None:
        """Nothing is shown of a step."""

    def asked_to_leave(self) -> bool:
        return False

    def step_saved(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        self._drop_older()

    def epoch_done(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self._drop_older()
        self.on_epoch(metrics)

    def restore(self) -> Path | None:
        complete = [folder for folder in self._checkpoints() if (folder / MANIFEST).is_file()]
        return newest_sound(reversed(complete), self.device, self.warn, self.where)

    def checkpoint_folder(self, epoch: int, step: int) -> Path:
        folder = self.folder / f"epoch-{epoch:04d}-step-{step:07d}"
        if folder.exists():
            shutil.rmtree(folder)  # left by an interrupted write
        return folder

    def _drop_older(self) -> None:
        for older in self._checkpoints()[:-KEPT]:
            shutil.rmtree(older)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*"))
