"""The command `python -m benchmarks.ranking`."""

from benchmarks.ranking.against_published import main

if __name__ == "__main__":
    main()
