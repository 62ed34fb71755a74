"""The command `python -m benchmarks.shards`."""

from benchmarks.data.shards import main

if __name__ == "__main__":
    main()
