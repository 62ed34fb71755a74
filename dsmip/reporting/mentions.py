"""Mentions of a report for its browser: texts, thumbnails, gold, best entities, and what each expert says of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.errors import UserError
from dsmip.evaluation.groups import num_meanings, stored_groups
from dsmip.pages.thumbnails import thumbnail
from dsmip.progress import Progress
from dsmip.reporting.evaluations import EvaluatedRun, Key, ModelEvaluation

MAX_MENTIONS = 1_000
MAX_IMAGE_BYTES = 16 << 20  # of all thumbnails, as the page holds them
TOP = 5
_IMAGE_SIDE = 96
_SENTENCE_CHARACTERS, _ATTRIBUTES_CHARACTERS, _NAME_CHARACTERS = 1_000, 300, 200
NO_IMAGE, LEFT_OUT = -1, -2
Top = tuple[int, float, int]  # entity, score, expert (-1: none)


@dataclass(frozen=True)
class ShownMentions:
    """What the page's script reads, and what its reader must know of it.

    Attributes:
        data: Values that JSON has; entities, images and experts are named by their places in lists.
        mentions: How many are there.
        of: How many the split has.
        every: One of so many is there.
        images_left_out: Thumbnails for which there was no room.
        depth: How many best entities the ranks hold, where these are fewer than TOP.
    """

    data: Mapping[str, Any]
    mentions: int
    of: int
    every: int
    images_left_out: int
    depth: int


class _Gallery:
    """Thumbnails, each once, up to a number of bytes."""

    def __init__(self, room: int) -> None:
        self.images: list[str] = []
        self.left_out = 0
        self._room = room
        self._place_of: dict[str, int] = {}

    def add(self, content: bytes | None) -> int:
        """The thumbnail's place; NO_IMAGE where there is nothing to be shown, LEFT_OUT where there is no room."""
        image = thumbnail(content, _IMAGE_SIDE) if content else ""
        if not image:
            return NO_IMAGE
        if image not in self._place_of:
            if len(image) > self._room:
                self.left_out += 1
                return LEFT_OUT
            self._room -= len(image)
            self._place_of[image] = len(self.images)
            self.images.append(image)
        return self._place_of[image]


class _Entities:
    """Entities that some shown mention names, each once."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        table = dataset.entity_texts()
        self._row_of = {each: row for row, each in enumerate(table.column("entity_id").to_pylist())}
        self._place_of: dict[str, int] = {}

    def place(self, entity_id: str) -> int:
        if entity_id not in self._row_of:
            raise UserError(
                f"entity {entity_id!r} of the ranks is not in {self._dataset.location}; evaluate the run again"
            )
        return self._place_of.setdefault(entity_id, len(self._place_of))

    def shown(self, first: Iterable[str], gallery: _Gallery, progress: Progress) -> list[list[Any]]:
        """[id, name, attributes, image] of all, by place; those in `first` have their thumbnails made first."""
        earlier = {*first}
        found: list[list[Any]] = [[] for _ in self._place_of]
        done = 0
        for ids in (earlier, self._place_of.keys() - earlier):
            rows = sorted(self._row_of[each] for each in ids)
            for entity in self._dataset.entities(rows):
                image = gallery.add(next(iter(entity.images), None))
                texts = (_cut(entity.name, _NAME_CHARACTERS), _cut(entity.attributes, _ATTRIBUTES_CHARACTERS))
                found[self._place_of[entity.entity_id]] = [entity.entity_id, *texts, image]
                done += 1
                progress("entities", done, len(found))
        return found


def shown_mentions(
    runs: Sequence[EvaluatedRun],
    right: Sequence[Mapping[Key, float] | None],
    dataset: Dataset,
    progress: Progress,
    *,
    max_mentions: int = MAX_MENTIONS,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> ShownMentions:
    """Reads texts and pictures of evenly spaced mentions and of their entities.

    Args:
        runs: One or two, of the same mentions.
        right: How sure each run is of each mention's best link; None where that is not known.
        dataset: Their data.
        progress: Of what is read.
        max_mentions: No more than so many.
        max_image_bytes: No more of thumbnails.

    Raises:
        UserError: The ranks are not of this data set, or a shard is missing or damaged.
    """
    split, rows = runs[0].split, runs[0].main.rows
    if len(rows) != dataset.num_mentions(split):
        raise UserError(
            f"{runs[0].title} has ranks of {len(rows)} mentions of {split}, {dataset.location} has "
            f"{dataset.num_mentions(split)}; evaluate the run again on this data"
        )
    every = max(1, -(-len(rows) // max_mentions))
    keys, places = list(rows)[::every], range(0, len(rows), every)
    gallery, entities = _Gallery(max_image_bytes), _Entities(dataset)
    mentions = []
    for number, (key, mention) in enumerate(zip(keys, dataset.mentions(split, places), strict=True)):
        if (mention.mention_id, mention.entity_id) != (key[0], rows[key]["gold"]):
            raise UserError(
                f"mention {mention.mention_id!r} of {dataset.location} is {key[0]!r} in the ranks of {runs[0].title}, "
                "or has another gold; evaluate the run again on this data"
            )
        mentions.append(_mention(key, mention, gallery, entities))
        progress("mentions", number + 1, len(keys))
    meanings = num_meanings(dataset, [rows[key]["word"] for key in keys])
    ranks = [_Ranks(run, sure) for run, sure in zip(runs, right, strict=True)]
    for key, shown, meaning in zip(keys, mentions, meanings, strict=True):
        shown |= {"groups": stored_groups(rows[key]), "meanings": meaning}
        shown["runs"] = [each.of(key, entities) for each in ranks]
    shown_first = [entity for key in keys for entity in (rows[key]["gold"], *rows[key]["top"][:1])]
    data = {
        "runs": [{"title": each.run.title, "model": each.run.shown, "experts": each.experts} for each in ranks],
        "mentions": mentions,
        "entities": entities.shown(shown_first, gallery, progress),
        "images": gallery.images,
    }
    depth = min(len(row["top"]) for run in runs for row in run.main.rows.values())
    return ShownMentions(data, len(keys), len(rows), every, gallery.left_out, min(depth, TOP))


class _Ranks:
    """One run's ranks, as the browser shows them."""

    def __init__(self, run: EvaluatedRun, right: Mapping[Key, float] | None) -> None:
        self.run, self._right = run, right
        self._own: Mapping[str, ModelEvaluation] = run.expert_ranks() if run.main.has_choices else {}
        self.experts = run.main.experts(run.experts)

    def of(self, key: Key, entities: _Entities) -> dict[str, Any]:
        row = self.run.main.rows[key]
        shown: dict[str, Any] = {"rank": row["rank"], "top": [list(top) for top in self._top(row, entities)]}
        if self.experts:
            shown["gold_expert"] = self._expert(row["gold_expert"])
        if self._right is not None:
            shown["sure"] = round(self._right[key], 4)
        if self._own:
            own = [self._own[name].rows[key] for name in self.experts]
            shown["own"] = [[each["rank"], entities.place(each["top"][0]) if each["top"] else -1] for each in own]
        return shown

    def _top(self, row: Mapping[str, Any], entities: _Entities) -> Iterator[Top]:
        experts = row["top_experts"] if self.experts else [None] * len(row["top"])
        for entity, score, expert in zip(row["top"][:TOP], row["top_scores"][:TOP], experts[:TOP], strict=True):
            yield entities.place(entity), float(f"{score:.5g}"), self._expert(expert)

    def _expert(self, name: str | None) -> int:
        return self.experts.index(name) if name in self.experts else -1


def _mention(key: Key, mention: Mention, gallery: _Gallery, entities: _Entities) -> dict[str, Any]:
    sentence = f"{mention.sentence} [description: {mention.desc}]" if mention.desc else mention.sentence
    return {
        "id": key[0] if not key[1] else f"{key[0]} ({key[1] + 1})",
        "word": _cut(mention.word, _NAME_CHARACTERS),
        "sentence": _cut(sentence, _SENTENCE_CHARACTERS),
        "image": gallery.add(mention.image),
        "gold": entities.place(mention.entity_id),
    }


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}..."
