"""The scheduler of tests over several processes: modules stay whole, those of the shared Ray stay together.

Each process has fixtures of its own: a module in two of them would make its own twice, and so would a shared Ray.
"""

from functools import cache

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.support.paths import ROOT

SHARED_RAY = "ray_cluster"
"""The fixture, whose name stands in each module that uses it."""


class WholeModules(LoadScopeScheduling):  # type: ignore[misc]
    """Sends modules to processes that have nothing left to do."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid.partition("::")[0])


@cache
def scope_of(module: str) -> str:
    """What a test file is sent together with: those of the shared Ray with one another."""
    path = ROOT / module
    return SHARED_RAY if path.is_file() and SHARED_RAY in path.read_text(encoding="utf-8") else module
