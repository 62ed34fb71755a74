"""`dsmip train` whose workers note their steps: python noted_train.py '<StepLog as JSON>' <options of dsmip train>."""

import json
import sys
from pathlib import Path

from disturbed import StepLog, noted

from ray_jobs import train_experts
from ray_jobs.cli import run_script


def main() -> None:
    plan = json.loads(sys.argv.pop(1))
    log = StepLog(Path(plan["folder"]), tuple(map(tuple, plan["holds"])), plan["pause"])
    train_experts._loop = noted(log)
    run_script("train")


if __name__ == "__main__":
    main()
