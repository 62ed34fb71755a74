"""The command `python -m benchmarks.memory`."""

from benchmarks.ranking.memory import main

if __name__ == "__main__":
    main()
