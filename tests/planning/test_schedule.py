"""Works side by side, against a slow twin that goes by small slices of time, and cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmip.planning.schedule import Work, rung_sizes, side_by_side, threads_of
from ray_jobs.training.trials import survivors

WORKS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=5
)


def by_slices(works: list[Work], cpus: float, slice_seconds: float = 0.01) -> float:
    """Every running work gets its share of a slice of time, again and again."""
    left, now = {number: work.alone for number, work in enumerate(works)}, 0.0
    running: list[int] = []
    while left:
        for number in sorted(left.keys() - set(running)):
            asked = sum(works[each].cpu for each in running) + works[number].cpu
            if running and asked > cpus:
                break
            running.append(number)
        busy = sum(works[each].demand for each in running)
        for number in running:
            left[number] -= slice_seconds * min(1.0, cpus / busy)
        running = [number for number in running if left[number] > 1e-9]
        left = {number: seconds for number, seconds in left.items() if seconds > 1e-9}
        now += slice_seconds
    return now


@given(WORKS, st.sampled_from([1.0, 2.0, 4.0]))
def test_as_the_slow_twin_has_it(drawn: list[tuple[int, int, float]], cpus: float) -> None:
    works = [
        Work(str(number), alone, float(demand), min(cpu, cpus)) for number, (alone, demand, cpu) in enumerate(drawn)
    ]
    assert side_by_side(works, cpus).seconds == pytest.approx(by_slices(works, cpus), abs=0.1)


def test_three_trainings_on_two_cores_share_them() -> None:
    """60 + 60 + 30 seconds of one thread each, which two cores do in 75, the short one first."""
    works = [Work(name, seconds, 1.0, 0.6, memory=5) for name, seconds in (("a", 60.0), ("b", 60.0), ("c", 30.0))]
    found = side_by_side(works, 2.0)
    assert found.seconds == pytest.approx(75)
    assert (found.memory, found.at_once) == (15, 3)


def test_who_asks_for_a_whole_cpu_waits_for_it() -> None:
    works = [Work(str(number), 10.0, 1.0, 1.0, memory=7) for number in range(3)]
    found = side_by_side(works, 2.0)
    assert (found.seconds, found.memory, found.at_once) == (pytest.approx(20), 14, 2)


def test_gpus_are_shared_apart_from_cpus() -> None:
    works = [Work("a", 10.0, 1.0, 4.0, 0.5), Work("b", 10.0, 1.0, 4.0, 0.5)]
    assert side_by_side(works, 16.0, 1.0).seconds == pytest.approx(20)
    assert side_by_side(works, 16.0, 2.0).seconds == pytest.approx(10)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(2, 5))
def test_rungs_are_as_large_as_those_of_a_sweep(trials: int, rungs: int, reduction: int) -> None:
    numbers = list(range(trials))
    for size in rung_sizes(trials, rungs, reduction):
        assert size == len(numbers)
        numbers = survivors(dict.fromkeys(numbers, 0.5), reduction)


def test_threads_are_whole_cpus() -> None:
    assert [threads_of(cpu) for cpu in (0.0, 0.6, 1.0, 2.5)] == [1, 1, 1, 2]
