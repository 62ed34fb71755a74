"""Work ahead of its reader: order, exceptions in their place, a bounded number, and threads that end."""

import itertools
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmip.parallel import map_ahead, read_ahead


def test_read_ahead_keeps_order() -> None:
    assert list(read_ahead(iter(range(50)), 3)) == list(range(50))
    assert list(read_ahead(iter([None, 1]), 1)) == [None, 1]


def test_read_ahead_passes_an_exception_on_in_its_place() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("shard 7 is damaged")

    reader = read_ahead(broken(), 4)
    assert next(reader) == 1
    with pytest.raises(ValueError, match="shard 7"):
        next(reader)


def test_read_ahead_makes_a_bounded_number_and_stops_its_thread() -> None:
    """A training that ends in the middle of an epoch leaves nothing behind."""
    made: list[int] = []
    thread: list[threading.Thread] = []

    def endless() -> Iterator[int]:
        thread.append(threading.current_thread())
        for number in itertools.count():
            made.append(number)
            yield number

    reader = read_ahead(endless(), 3)
    assert [next(reader) for _ in range(2)] == [0, 1]
    assert isinstance(reader, Iterator)
    reader.close()  # type: ignore[attr-defined]
    thread[0].join(timeout=30)
    assert not thread[0].is_alive()
    assert thread[0] is not threading.current_thread()
    assert len(made) <= 2 + 3 + 2


@given(count=st.integers(0, 40), threads=st.integers(1, 5))
def test_map_ahead_is_map(count: int, threads: int) -> None:
    assert list(map_ahead(lambda number: -number, range(count), threads)) == [-number for number in range(count)]


def test_map_ahead_works_at_several_items_at_once_and_keeps_their_order() -> None:
    """The first item is done when the others are."""
    others = threading.Barrier(3)

    def work(number: int) -> int:
        others.wait(timeout=30)
        return number

    assert list(map_ahead(work, range(6), 3)) == list(range(6))


def test_map_ahead_passes_an_exception_on_in_its_place() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("picture 2 is damaged")
        return number

    reader = map_ahead(work, range(9), 3)
    assert [next(reader), next(reader)] == [0, 1]
    with pytest.raises(ValueError, match="picture 2"):
        next(reader)


def test_map_ahead_makes_a_bounded_number_and_stops_its_threads() -> None:
    made: list[int] = []
    threads = set[threading.Thread]()

    def drawn() -> Iterator[int]:
        threads.add(threading.current_thread())
        yield from itertools.count()

    def work(number: int) -> int:
        threads.add(threading.current_thread())
        made.append(number)
        return number

    reader = map_ahead(work, drawn(), 2)
    assert [next(reader) for _ in range(3)] == [0, 1, 2]
    assert isinstance(reader, Iterator)
    reader.close()  # type: ignore[attr-defined]
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert threading.current_thread() not in threads
    assert len(made) <= 3 + 2 + 3
