"""The command `dsmip bench` as a script for `ray job submit`."""

from ray_jobs.cli import run_script

if __name__ == "__main__":
    run_script("bench")
