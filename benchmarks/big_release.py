"""The command `python -m benchmarks.big_release`."""

from benchmarks.data.big_release import main

if __name__ == "__main__":
    main()
