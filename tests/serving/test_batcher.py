"""Dynamic batching: what waits together is linked together, within bounds."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dsmip.data.records import Mention
from dsmip.linking.links import Link, Links
from dsmip.serving.batcher import Batcher, Busy, Stopped


class HeldLinker:
    """Links each word to itself once it is let; notes the batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun, self.let = threading.Event(), threading.Event()

    def link_many(self, mentions: list[dict[str, Any]], *, top: int, **options: Any) -> Iterator[Links]:
        self.batches.append([each["word"] for each in mentions])
        self.begun.set()
        assert self.let.wait(30)
        for each in mentions:
            if each["word"] == "broken":
                raise RuntimeError("of the model")
            links = tuple(Link(each["word"], 0, "", "", float(-rank)) for rank in range(top))
            yield Links(Mention("", each["word"], "", "", -1), links)


def words(*given: str) -> list[dict[str, Any]]:
    return [{"word": each} for each in given]


@pytest.fixture
def held() -> HeldLinker:
    return HeldLinker()


@pytest.fixture
def batcher(held: HeldLinker) -> Iterator[Batcher]:
    batcher = Batcher(lambda: held, batch=4, waiting=6)  # type: ignore[arg-type, return-value]
    yield batcher
    held.let.set()
    batcher.close()


def test_what_comes_meanwhile_is_linked_together_and_each_gets_its_own(held: HeldLinker, batcher: Batcher) -> None:
    first = batcher.submit(words("a"), 1)
    assert held.begun.wait(30)
    later = [batcher.submit(words("b", "c"), 2), batcher.submit(words("d"), 3), batcher.submit(words("e", "f"), 1)]
    held.let.set()
    assert [[each.mention.word for each in job.result(30)] for job in (first, *later)] == [
        ["a"],
        ["b", "c"],
        ["d"],
        ["e", "f"],
    ]
    assert [len(links) for job in later for links in job.result()] == [2, 2, 3, 1, 1]
    assert held.batches == [["a"], ["b", "c", "d"], ["e", "f"]]


def test_too_many_are_refused_and_cancelled_ones_make_room(held: HeldLinker, batcher: Batcher) -> None:
    batcher.submit(words("a"), 1)
    assert held.begun.wait(30)
    gone = batcher.submit(words(*"bcdef"), 1)
    with pytest.raises(Busy):
        batcher.submit(words("g", "h"), 1)
    assert gone.cancel()
    held.let.set()
    batcher.close()
    assert held.batches == [["a"]]


def test_a_request_of_more_than_may_wait_is_taken_while_nobody_waits(held: HeldLinker, batcher: Batcher) -> None:
    held.let.set()
    assert len(batcher.submit(words(*"abcdefgh"), 1).result(30)) == 8


def test_an_error_reaches_those_who_wait_and_nobody_later(held: HeldLinker, batcher: Batcher) -> None:
    held.let.set()
    with pytest.raises(RuntimeError, match="of the model"):
        batcher.submit(words("broken"), 1).result(30)
    assert batcher.submit(words("a"), 1).result(30)[0].mention.word == "a"


def test_the_end_links_what_waits_and_takes_nothing_more(held: HeldLinker, batcher: Batcher) -> None:
    first = batcher.submit(words("a"), 1)
    assert held.begun.wait(30)
    second = batcher.submit(words("b"), 1)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    held.let.set()
    closing.join(30)
    assert (len(first.result(0)), len(second.result(0))) == (1, 1)
    with pytest.raises(Stopped):
        batcher.submit(words("c"), 1)


def test_those_who_were_just_answered_are_waited_for(held: HeldLinker) -> None:
    """As many as there were, and a single one not at all."""
    batcher = Batcher(lambda: held, batch=4, waiting=6, linger=1e6)  # type: ignore[arg-type, return-value]
    first = batcher.submit(words("a"), 1)
    assert held.begun.wait(30)
    second = batcher.submit(words("b"), 1)
    held.let.set()
    first.result(30)
    third = batcher.submit(words("c"), 1)
    for job in (second, third):
        job.result(30)
    assert held.batches == [["a"], ["b", "c"]]
    batcher.submit(words("d"), 1)
    batcher.close()  # though one more was expected
    assert held.batches[2:] == [["d"]]
    alone = Batcher(lambda: held, batch=4, waiting=6, linger=1e6)  # type: ignore[arg-type, return-value]
    for word in "ef":
        alone.submit(words(word), 1).result(30)
    alone.close()
    assert held.batches[3:] == [["e"], ["f"]]
