"""The memory that there is: a process that takes more gets killed."""

from pathlib import Path

_PROC, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(meminfo: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this process may still take, of the machine and of its container; None: nobody says."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(limit - used + _file_cache(cgroup), 0))
    except (OSError, ValueError):  # no limit is the word "max"
        pass
    return min(found, default=None)


def _file_cache(cgroup: Path) -> int:
    """Bytes of files that a container has read: they count as used, and are given up when memory is asked for."""
    try:
        lines = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return sum(int(value) for name, value in lines if name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 0
