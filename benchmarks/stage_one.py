"""The command `python -m benchmarks.stage_one`."""

from benchmarks.training.stage_one import main

if __name__ == "__main__":
    main()
