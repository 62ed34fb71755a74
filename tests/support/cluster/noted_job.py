"""`dsmip train` or `dsmip tune` whose workers note their steps.

python -m tests.support.cluster.noted_job '<StepLog>' <command> <options>
"""

import sys

from ray_jobs.cli import run_script
from ray_jobs.jobs import train_experts
from ray_jobs.training import sweep
from tests.support.cluster.disturbed import StepLog, noted, noted_trial


def main() -> None:
    log, command = StepLog.from_json(sys.argv.pop(1)), sys.argv.pop(1)
    train_experts.worker_loop = noted(log)
    sweep.tune_trial = noted(log, noted_trial)
    run_script(command)


if __name__ == "__main__":
    main()
