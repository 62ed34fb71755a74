"""Groups of linked mentions against a naive closure, and what links two mentions."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dsmip.data.records import Mention
from dsmip.suites.groups import linked_groups, mention_keys

keys = st.lists(st.tuples(*[st.none() | st.integers(0, 5)] * 3), max_size=9)


def closure(items: Sequence[Sequence[int | None]]) -> list[set[int]]:
    """The group of each item: grown from it until nothing is linked to it any more."""

    def linked(one: int, other: int) -> bool:
        return any(a is not None and a == b for a, b in zip(items[one], items[other], strict=True))

    found = []
    for item in range(len(items)):
        group = {item}
        while more := {other for other in range(len(items)) if any(linked(one, other) for one in group)} - group:
            group |= more
        found.append(group)
    return found


@settings(max_examples=50)
@given(keys)
def test_groups_are_the_closure_of_shared_keys(items: list[tuple[int | None, ...]]) -> None:
    found = linked_groups(items)
    assert [{other for other, its in enumerate(found) if its == group} for group in found] == closure(items)
    assert sorted(set(found)) == list(range(len(set(found))))  # a test counts on numbers without a gap


def test_a_sentence_a_picture_and_a_gold_link_mentions_and_nothing_else_does() -> None:
    def mention(number: int, sentence: str, gold: str, image: bytes | None) -> Mention:
        return Mention(f"m{number}", "word", sentence, gold, 0, {}, image=image)

    mentions = [
        mention(0, "one", "Q1", b"red"),
        mention(1, "one ", "Q2", None),  # 0's sentence
        mention(2, "two", "Q3", b"red"),  # 0's picture
        mention(3, "", "Q4", None),
        mention(4, " ", "Q5", None),  # no sentence is none that is shared; nor is no picture
        mention(5, "five", "Q2", b"blue"),  # 1's gold
        mention(6, "Q4", "Q6", b"Q4"),  # a sentence is no gold
    ]
    assert linked_groups(list(map(mention_keys, mentions))) == [0, 0, 0, 1, 2, 0, 3]
