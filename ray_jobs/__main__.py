"""`python -m ray_jobs ...` is `dsmip ...`."""

from ray_jobs.cli import main

if __name__ == "__main__":
    main()
