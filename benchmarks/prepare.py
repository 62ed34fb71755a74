"""The command `python -m benchmarks.prepare`."""

from benchmarks.data.prepare import main

if __name__ == "__main__":
    main()
