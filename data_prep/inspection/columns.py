"""Columns of an inspection: numbers per mention, entity and image, read shard by shard.

Texts are 64-bit hashes of what is left when case, width of letters and spaces do not count. M: mentions of all splits
one after the other, in shard order; N: entities by row; P: images of one side, mentions or entities, those of an owner
side by side in order.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_prep.inspection.image_hash import GRID, read_signature
from dsmip.data.dataset import Dataset
from dsmip.data.manifest import KB, SPLITS, ShardInfo
from dsmip.data.records import Entity, read_gold, read_mention
from dsmip.data.tar import Fields, read_samples
from dsmip.data.text import ClipTokenizer, Template, Tokenizer, entity_text, mention_text
from dsmip.parallel import map_tasks
from dsmip.progress import Progress, counting
from dsmip.storage.dataset_storage import DatasetStorage, open_file

CONTEXT_LENGTH = 77  # of every CLIP
_ENTITIES_AT_ONCE = 4096
_NUM_COLOURS = GRID * GRID * 3

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Flags = NDArray[np.bool_]
AnyColumns = TypeVar("AnyColumns", "ImageColumns", "MentionColumns", "EntityColumns")


@dataclass(frozen=True, slots=True)
class ImageColumns:
    """Columns of P images.

    Attributes:
        owner: Row of the mention or entity.
        content: Hash of the file.
        bits: Difference hash, see `image_hash`.
        colours: Grid of colours, uint8 [P, 48].
        plain: Whether its pixels hardly differ.
        readable: Whether it can be decoded; where it cannot, the signature is zeros.
    """

    owner: Ints
    content: Hashes
    bits: Hashes
    colours: NDArray[np.uint8]
    plain: Flags
    readable: Flags


@dataclass(frozen=True, slots=True)
class MentionColumns:
    """Columns of M mentions.

    Attributes:
        split: Position of the split in SPLITS.
        gold: Entity row.
        word: Hash of the word.
        sentence: Hash of the sentence.
        positions: Tokens of the text, uncut.
        has_sentence: Whether there is a sentence.
        has_word: Whether the word is in it.
        has_image: Whether there is an image.
        has_desc: Whether 'dsmip enhance' has given a description.
        desc_of_gold: Whether the gold's own text is in that.
    """

    split: Ints
    gold: Ints
    word: Hashes
    sentence: Hashes
    positions: Ints
    has_sentence: Flags
    has_word: Flags
    has_image: Flags
    has_desc: Flags
    desc_of_gold: Flags


@dataclass(frozen=True, slots=True)
class EntityColumns:
    """Columns of N entities.

    Attributes:
        name: Hash of the name.
        text: Hash of name and attributes together.
        positions: Tokens of the text, uncut.
        has_attributes: Whether there are any.
        num_images: How many images there are.
    """

    name: Hashes
    text: Hashes
    positions: Ints
    has_attributes: Flags
    num_images: Ints


@dataclass(frozen=True, slots=True)
class Columns:
    """All that the checks look at.

    Attributes:
        mentions: Columns of the mentions.
        entities: Columns of the entities.
        mention_images: Columns of the mentions' images; empty when images were left out.
        entity_images: Columns of the entities' images; empty when images were left out.
        context_length: Tokens at which a text is cut.
    """

    mentions: MentionColumns
    entities: EntityColumns
    mention_images: ImageColumns
    entity_images: ImageColumns
    context_length: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard to read."""

    files: DatasetStorage
    info: ShardInfo
    split: str  # the kb or a split
    images: bool
    samples: frozenset[int]  # those to read: of a view not all


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts of some entities."""

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    num_images: tuple[int, ...]


def read_columns(dataset: Dataset, *, images: bool, workers: int, progress: Progress) -> Columns:
    """Reads every record of a dataset.

    Args:
        dataset: What to read.
        images: Whether to read its images.
        workers: Number of processes.
        progress: Called with the number of tasks that are done.

    Raises:
        UserError: A shard is missing or damaged.
    """
    table = dataset.entity_texts()
    tasks: list[_Texts | _Shard] = [
        _texts(table.slice(start, _ENTITIES_AT_ONCE)) for start in range(0, len(table), _ENTITIES_AT_ONCE)
    ]
    for split in (*SPLITS, *((KB,) if images else ())):
        tasks += [
            _Shard(dataset.files, shard, split, images, frozenset(samples))
            for shard, samples in dataset.samples_of(split)
        ]
    entities, mentions = [_entity_columns(_Texts((), (), ()))], [_mention_columns([], 0)]
    of_mentions, of_entities = [_image_columns([])], [_image_columns([])]
    num_mentions, add = 0, counting(progress, "read", len(tasks))
    for found in map_tasks(_read, tasks, workers):
        if isinstance(found, EntityColumns):
            entities.append(found)
        elif found[0] is None:
            of_entities.append(found[1])
        else:
            of_mentions.append(replace(found[1], owner=found[1].owner + num_mentions))
            mentions.append(found[0])
            num_mentions += len(found[0].gold)
        add(1)
    return Columns(
        joined(mentions), joined(entities), joined(of_mentions), joined(of_entities), _tokenizer().context_length
    )


def text_hash(*texts: str) -> int:
    """A hash of 64 bits that two texts share when they differ in case, width of letters and spaces only."""
    return _hash("\0".join(map(plain_text, texts)).encode("utf-8", "surrogatepass"))


def plain_text(text: str) -> str:
    """What is left of a text when case, width of letters and spaces do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@lru_cache(1)
def _tokenizer() -> Tokenizer:
    return ClipTokenizer(CONTEXT_LENGTH)


def _texts(table: Any) -> _Texts:
    columns = table.select(["name", "attributes", "num_images"]).to_pydict()
    return _Texts(tuple(columns["name"]), tuple(columns["attributes"]), tuple(columns["num_images"]))


def _read(task: "_Texts | _Shard") -> "EntityColumns | tuple[MentionColumns | None, ImageColumns]":
    return _entity_columns(task) if isinstance(task, _Texts) else _read_shard(task)


def _entity_columns(texts: _Texts) -> EntityColumns:
    template, tokenizer = Template(), _tokenizer()
    pairs = list(zip(texts.names, texts.attributes, strict=True))
    lines = [entity_text(Entity(0, "", name, attributes), template) for name, attributes in pairs]
    return EntityColumns(
        name=_hashes(text_hash(name) for name, _ in pairs),
        text=_hashes(text_hash(name, attributes) for name, attributes in pairs),
        positions=_ints(tokenizer.num_positions(line) for line in lines),
        has_attributes=_flags(bool(attributes.strip()) for _, attributes in pairs),
        num_images=_ints(texts.num_images),
    )


def _read_shard(shard: _Shard) -> tuple[MentionColumns | None, ImageColumns]:
    """A shard's mentions (None: entities, whose texts are in the table) and its images.

    Their owner is an entity's row, or a mention's position in the shard.
    """
    records: list[tuple[Any, ...]] = []
    images: list[tuple[Any, ...]] = []
    address = shard.files.address(shard.info.path)
    with open_file(shard.files, shard.info) as stream:
        for sample in read_samples(stream, address, shard.samples.__contains__):
            if shard.split == KB:
                row, names = int(sample.key), [name for name in sample.fields if name.endswith(".jpg")]
                names.sort(key=lambda name: int(name.split(".")[0]))
            else:
                records.append(_mention_record(sample.fields, f"{address}: {sample.key}"))
                row, names = len(records) - 1, ["jpg"] if shard.images and "jpg" in sample.fields else []
            images += [(row, *_image_record(sample.fields[name])) for name in names]
    mentions = None if shard.split == KB else _mention_columns(records, SPLITS.index(shard.split))
    return mentions, _image_columns(images)


def _mention_record(fields: Fields, address: str) -> tuple[Any, ...]:
    mention = read_mention(fields, address)
    word, sentence = mention.word.casefold(), mention.sentence
    gold_text = read_gold(fields, address).attributes if mention.desc else ""
    return (
        mention.entity_row,
        text_hash(mention.word),
        text_hash(sentence),
        _tokenizer().num_positions(mention_text(mention, Template())),
        bool(sentence.strip()),
        word.strip() in sentence.casefold(),
        mention.image is not None,
        bool(mention.desc),
        bool(gold_text.strip()) and plain_text(gold_text) in plain_text(mention.desc),
    )


def _image_record(content: bytes) -> tuple[Any, ...]:
    found = read_signature(content)
    if found is None:
        return _hash(content), 0, bytes(_NUM_COLOURS), False, False
    return _hash(content), found.bits, found.colours, found.plain, True


def _mention_columns(records: Sequence[tuple[Any, ...]], split: int) -> MentionColumns:
    gold, word, sentence, positions, has_sentence, has_word, has_image, has_desc, desc_of_gold = _transposed(records, 9)
    return MentionColumns(
        split=np.full(len(records), split, np.int64),
        gold=_ints(gold),
        word=_hashes(word),
        sentence=_hashes(sentence),
        positions=_ints(positions),
        has_sentence=_flags(has_sentence),
        has_word=_flags(has_word),
        has_image=_flags(has_image),
        has_desc=_flags(has_desc),
        desc_of_gold=_flags(desc_of_gold),
    )


def _image_columns(records: Sequence[tuple[Any, ...]]) -> ImageColumns:
    owner, content, bits, colours, plain, readable = _transposed(records, 6)
    return ImageColumns(
        owner=_ints(owner),
        content=_hashes(content),
        bits=_hashes(bits),
        colours=np.frombuffer(b"".join(colours), np.uint8).reshape(-1, _NUM_COLOURS),
        plain=_flags(plain),
        readable=_flags(readable),
    )


def _transposed(records: Sequence[tuple[Any, ...]], width: int) -> Iterator[tuple[Any, ...]]:
    return iter(zip(*records, strict=True)) if records else iter([()] * width)


def joined(columns: Sequence[AnyColumns]) -> AnyColumns:
    """Columns one after the other."""
    kind = type(columns[0])
    return kind(**{each.name: np.concatenate([getattr(one, each.name) for one in columns]) for each in fields(kind)})


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int64)


def _hashes(values: Iterable[int]) -> Hashes:
    return np.fromiter(values, np.uint64)


def _flags(values: Iterable[bool]) -> Flags:
    return np.fromiter(values, np.bool_)
