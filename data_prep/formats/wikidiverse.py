"""The layout of WikiDiverse as its authors released it, in either of two forms.

    train.json valid.json test.json    [[sentence, img_url, topic, [[mention, type, start, end, url], ...]], ...]
    train_w_10cands.json valid_... test_...    [[sentence, img_url, mention, type, left context, right context, url,
                                                 candidates, topic, start, end], ...]
    wikinewsImgs/  (or images/, or a zip of that name)

The README of wangxw5/wikiDiverse shows both forms and how the file of a picture is named: the MD5 of the url's base
name, then its extension, where svg became png. Golds are addresses of Wikipedia; the authors' evaluation knows "nil"
and damaged schemes of addresses ("nhttps://", "]https://"). Rules of our own: how an address finds its entity (see
`entities_by_title`; what finds none is an unknown gold), what is done about a span that does not
fit (see `span_fault`), and that a picture may also keep its own name, as where people have loaded it themselves.

An input is a mention: a passage counts once for each; a passage that cannot be read counts once.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from data_prep.formats.image_files import ImageFiles
from data_prep.formats.json_records import array_records, opening
from data_prep.formats.registry import knowledge_base_file, open_knowledge_base
from data_prep.formats.release import (
    Action,
    Finding,
    KnowledgeBase,
    Layout,
    RawEntity,
    RawImage,
    RawMention,
    ReleaseOptions,
    refuse_unknown_options,
)
from dsmip.errors import UserError

_PAGE_FIELDS = ("wiki_url", "url", "title")
_IMAGES = ("wikinewsImgs", "images")
_NAMES = {"train": "train", "validation": "valid", "test": "test"}
_FORMS = {"passages": ".json", "mentions": "_w_10cands.json"}
_TEXT = (str, type(None))
_PASSAGE = (("sentence", (object,)), ("picture", (object,)), ("topic", (object,)), ("mentions", (list,)))
_MENTION = (("mention", _TEXT), ("type", (object,)), ("start", (object,)), ("end", (object,)), ("address", _TEXT))
_FLAT = 11  # fields of a record of the mention-level form


@dataclass(frozen=True, slots=True)
class _Annotation:
    """A mention as the release has it."""

    position: int
    mention_id: str
    sentence: str
    image: str
    topic: str
    word: str
    type: str
    start: object
    end: object
    gold: str


class WikidiverseRelease:
    """A folder with the three files of either form; where it has both, passages are read.

    Args:
        folder: Where it lies.
        options: Which text of entities to read, and where the knowledge base is.

    Raises:
        UserError: A file or the knowledge base is missing, or an option is chosen that the layout does not have.
    """

    layout: str = "wikidiverse"

    def __init__(self, folder: Path, options: ReleaseOptions = ReleaseOptions()) -> None:
        refuse_unknown_options(options, self.layout, ("entity_text", "kb"))
        self.folder = folder
        form, self._files = _split_files(folder)
        kb_file = knowledge_base_file(folder, options)
        self._kb = open_knowledge_base(kb_file, options)
        self._read = _READERS[form]
        self.choices: Mapping[str, str] = {
            "kb": options.kb.absolute().name if options.kb else kb_file.name,
            "entity_text": options.entity_text,
            "form": form,
        }

    @classmethod
    def fits(cls, folder: Path) -> bool:
        """Whether a training file is there and its first record is a list."""
        files = [folder / f"train{suffix}" for suffix in _FORMS.values()]
        return any(_starts_with_list(path) for path in files if path.is_file())

    def files(self) -> list[tuple[str, Path]]:
        """The mentions, the images, and below kb/ the knowledge base."""
        paths = [*self._files.values(), *self._images.files()]
        return [
            *((path.relative_to(self.folder).as_posix(), path) for path in paths),
            *((f"kb/{name}", path) for name, path in self._kb.files()),
        ]

    def entities(self) -> Iterator[RawEntity | Finding]:
        """Entities of the knowledge base, in its order."""
        return self._kb.entities()

    def mentions(self, split: str) -> Iterator[RawMention | Finding]:
        """Mentions in the order of the split's file, a passage's in the passage's order; groups: topic, type."""
        if split == "train":
            yield from self._images.refused
        source = self._files[split].name
        for item in self._annotations(split):
            if isinstance(item, Finding):
                yield item
                continue
            # "nil" is no title, even where a page is called Nil.
            gold = None if item.gold.lower() == "nil" else self._entity_of.get(wiki_title(item.gold))
            # What is rejected anyway needs no second finding.
            action = span_fault(item.sentence, item.word, item.start, item.end) if gold and item.word.strip() else None
            if action:
                yield Finding(source, item.position, "wrong span", action, item.mention_id, item.mention_id)
            yield RawMention(
                source,
                item.position,
                item.mention_id,
                item.word.strip(),
                item.sentence.strip(),
                gold or item.gold or None,
                {name: text for name, text in (("topic", item.topic), ("type", item.type)) if text},
                self._image(item.image),
            )

    def _annotations(self, split: str) -> Iterator[_Annotation | Finding]:
        path = self._files[split]
        for position, record in enumerate(array_records(path)):
            yield from self._read(path, position, record)

    @cached_property
    def _entity_of(self) -> Mapping[str, str]:
        """The entity id for each gold's title that the knowledge base can tell."""
        golds = {
            wiki_title(item.gold)
            for split in self._files
            for item in self._annotations(split)
            if isinstance(item, _Annotation)
        }
        return entities_by_title(golds - {""}, self._kb)

    def _image(self, url: str) -> RawImage | None:
        return self._images.find(url, image_names(url)) if url else None

    @cached_property
    def _images(self) -> ImageFiles:
        return ImageFiles([self.folder / (name + form) for name in _IMAGES for form in ("", ".zip")])


def image_names(url: str) -> list[str]:
    """The names that the file of an image may have, the authors' first.

    Where the extension is not one of theirs, their expression leaves the base name whole: the MD5 is put before it.
    """
    base = url.rsplit("/", 1)[-1]
    digest = hashlib.md5(base.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    ends = [match.start() for match in re.finditer(r"\.(jpe?g|png|svg|JPE?G|PNG|SVG)", base)]
    suffix = re.sub(r"\.(svg|SVG)", ".png", base[ends[-1] :] if ends else base)
    return [digest + suffix, digest + Path(base).suffix, base]


def span_fault(sentence: str, word: str, start: object, end: object) -> Action | None:
    """What is to be noted of a mention's span; the word is taken as it is, because a span is never needed again.

    Args:
        sentence: The mention's sentence.
        word: Its word, not empty.
        start: Where the release says that it begins.
        end: Where the release says that it ends.

    Returns:
        None: the word stands at [start, end) or at [start, end], white space around it aside; releases of both
        conventions circulate. "repaired": it does not, but occurs once in the sentence, so that its position is known.
        "degraded": its position is not known.
    """
    word = word.strip()
    if type(start) is int and type(end) is int and 0 <= start <= end:
        text = sentence[start : end + 1]
        if word in (text.strip(), text[: end - start].strip()):
            return None
    found = sentence.find(word)
    return "repaired" if found >= 0 and sentence.find(word, found + 1) < 0 else "degraded"


def _passage(path: Path, position: int, record: Any) -> Iterator[_Annotation | Finding]:
    if problem := _problem(record, _PASSAGE):
        yield Finding(path.name, position, "wrong type", "rejected", problem)
        return
    *texts, mentions = record
    if not mentions:
        yield Finding(path.name, position, "no mentions", "rejected")
    for number, mention in enumerate(mentions):
        if problem := _problem(mention, _MENTION):
            yield Finding(path.name, position, "wrong type", "rejected", f"mention {number}: {problem}")
        else:
            yield from _annotation(path, position, f"{position}-{number}", texts, mention)


def _flat(path: Path, position: int, record: Any) -> Iterator[_Annotation | Finding]:
    if not isinstance(record, list) or len(record) != _FLAT:
        yield Finding(path.name, position, "wrong type", "rejected", f"record is no list of {_FLAT}")
        return
    sentence, image, word, kind, _left, _right, gold, _candidates, topic, start, end = record
    mention = [word, kind, start, end, gold]
    if problem := _problem(mention, _MENTION):
        yield Finding(path.name, position, "wrong type", "rejected", problem)
    else:
        yield from _annotation(path, position, str(position), [sentence, image, topic], mention)


_READERS: Mapping[str, Callable[[Path, int, Any], Iterator[_Annotation | Finding]]] = {
    "passages": _passage,
    "mentions": _flat,
}


def _annotation(
    path: Path, position: int, number: str, passage: list[Any], mention: list[Any]
) -> Iterator[_Annotation | Finding]:
    """A mention of a passage (sentence, image, topic), and a finding for each text of the two that is none.

    `number` tells the mention from others of its file.
    """
    mention_id = f"{path.stem.partition('_')[0]}-{number}"
    word, kind, start, end, gold = mention
    texts = dict(zip(("sentence", "image", "topic", "type"), [*passage, kind], strict=True))
    for name, value in texts.items():
        if not isinstance(value, str | None):
            problem = f"{name} is {type(value).__name__}"
            yield Finding(path.name, position, "wrong type", "degraded", problem, mention_id)
            texts[name] = None
    yield _Annotation(
        position,
        mention_id,
        texts["sentence"] or "",
        (texts["image"] or "").strip(),
        (texts["topic"] or "").strip(),
        word or "",
        (texts["type"] or "").strip(),
        start,
        end,
        (gold or "").strip(),
    )


def _problem(record: Any, fields: tuple[tuple[str, tuple[type, ...]], ...]) -> str:
    """What is wrong with the types of a list, or an empty text."""
    if not isinstance(record, list) or len(record) != len(fields):
        return f"record is no list of {len(fields)}"
    for (name, types), value in zip(fields, record, strict=True):
        if not isinstance(value, types):
            return f"{name} is {type(value).__name__}"
    return ""


def _split_files(folder: Path) -> tuple[str, dict[str, Path]]:
    """The form, and the file of each split."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    missing = ""
    for form, suffix in _FORMS.items():
        paths = {split: folder / (name + suffix) for split, name in _NAMES.items()}
        if all(path.is_file() for path in paths.values()):
            return form, paths
        missing += f"{' or ' if missing else ''}" + ", ".join(path.name for path in paths.values())
    raise UserError(f"{folder}: looked for {missing}; not all of either are there")


def _starts_with_list(path: Path) -> bool:
    return opening(path) == "[" and any(isinstance(record, list) for record in islice(array_records(path), 1))


def wiki_title(reference: str) -> str:
    """The title that a reference means, an address or a title; "" if none.

    Of an address it is what follows /wiki/, up to ? or #: neither the damaged schemes of WikiDiverse's addresses
    ("nhttps://", "]https://") nor the language of a Wikipedia count. Both are percent-decoded; underscores are spaces,
    and the first letter has no case: so Wikipedia has it.
    """
    _, is_address, page = reference.partition("/wiki/")
    text = unquote(re.split("[?#]", page, maxsplit=1)[0] if is_address else reference)
    text = " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split())
    return text[:1].upper() + text[1:]


def entities_by_title(titles: Collection[str], kb: KnowledgeBase) -> Mapping[str, str]:
    """The entity id for each of some titles that the knowledge base can tell.

    An entity has a title by its entity id, else by its record's field wiki_url, url or title, else by its name. What
    comes first in this order decides; a title that two entities have in the same way belongs to none.
    """
    by_id: dict[str, set[str]] = {}
    by_page: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}

    def note(found: dict[str, set[str]], reference: str, entity_id: str) -> None:
        title = wiki_title(reference)
        if title in titles:
            found.setdefault(title, set()).add(entity_id)

    for entity in kb.entities():
        if isinstance(entity, RawEntity):
            note(by_id, entity.entity_id, entity.entity_id)
            note(by_name, entity.name, entity.entity_id)
    for entity_id, record in kb.records():
        for field in _PAGE_FIELDS:
            if isinstance(reference := record.get(field), str):
                note(by_page, reference, entity_id)
    found = by_name | by_page | by_id
    return {title: next(iter(entity_ids)) for title, entity_ids in found.items() if len(entity_ids) == 1}


LAYOUT = Layout(WikidiverseRelease.layout, WikidiverseRelease, WikidiverseRelease.fits, precedence=30)
