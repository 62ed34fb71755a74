"""The command `python -m benchmarks.stores`."""

from benchmarks.data.stores import main

if __name__ == "__main__":
    main()
