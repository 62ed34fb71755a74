"""Rules for faulty records, the same for every layout: what is rejected, repaired or degraded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from data_prep.formats.release import Action, Finding, RawEntity, RawMention
from dsmip.data.records import MAX_TEXT, has_control, is_id, is_text, without_control

UNKNOWN_GOLD = "unknown gold"
MAX_GROUPS, MAX_GROUP_NAME, MAX_GROUP_VALUE = 32, 64, 256

Note = Callable[[Finding], object]


class UniqueIds:
    """Ids that were given out: the first one of its name stays as it is, the next ones end in -2, -3 ..."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """`wanted`, or the first free one made from it."""
        found, use = wanted, self._uses.get(wanted, 0)
        while found in self._uses:
            use += 1
            found = f"{wanted}-{use}"
        self._uses[wanted] = max(use, 1)
        self._uses.setdefault(found, 1)
        return found


def checked_entities(items: Iterable[RawEntity | Finding], note: Note) -> Iterator[RawEntity]:
    """Entities to keep, in release order: the position of one is its kb row.

    Rejected: text with lone surrogates, no entity id, one that is too long or has control characters, an id that came
    before. Repaired: control characters (a space each). Degraded: a text that is too long (cut), empty name, empty
    attributes.

    Args:
        items: What a release delivers.
        note: Takes the findings.
    """
    known: set[str] = set()
    for item in items:
        if isinstance(item, Finding):
            note(item)
        elif reason := _entity_fault(item, known):
            note(_finding(item, reason, "rejected", item.entity_id))
        else:
            known.add(item.entity_id)
            texts = _clean({"name": item.name, "attributes": item.attributes}, item, note)
            for name in (name for name, text in texts.items() if not text):
                note(_finding(item, f"empty {name}", "degraded", item.entity_id))
            yield replace(item, name=texts["name"], attributes=texts["attributes"])


def checked_mentions(
    items: Iterable[RawMention | Finding],
    row_of: Mapping[str, int],
    note: Note,
    ids: UniqueIds | None = None,
    *,
    keep_nil: bool = False,
) -> Iterator[RawMention]:
    """Mentions to keep, in release order.

    Rejected: text with lone surrogates, empty word, nil, null or unknown gold. Repaired: no id, one that is too long or
    has control characters (file and position make one), an id that came before (a number is put behind it), control
    characters (a space each). Degraded: a text that is too long (cut), groups that are too many or too long (left out),
    empty sentence.

    Args:
        items: What a release delivers.
        row_of: The kb row of each entity id.
        note: Takes the findings.
        ids: Those given out so far: the same for all splits of a release.
        keep_nil: Keep mentions of nil or null gold, which come without a gold, and of unknown gold; all are degraded.
    """
    ids = UniqueIds() if ids is None else ids
    for item in items:
        if isinstance(item, Finding):
            note(item)
            continue
        if not is_text(item.word, item.sentence, item.gold or "", *_group_texts(item)):
            note(_finding(item, "broken text", "rejected", item.mention_id))
            continue
        # Findings on a mention that is rejected in the end would say nothing.
        findings: list[Finding] = []
        texts = _clean({"word": item.word, "sentence": item.sentence}, item, findings.append)
        reason = _no_target(texts["word"], item.gold, row_of)
        if reason and not (keep_nil and texts["word"]):
            note(_finding(item, reason, "rejected", item.gold or ""))
            continue
        if reason:
            findings.append(_finding(item, reason, "degraded", item.gold or ""))
        gold = item.gold if reason in ("", UNKNOWN_GOLD) else None
        mention_id = _mention_id(item, ids, findings.append)
        groups = _bounded_groups(item, findings.append)
        if not texts["sentence"]:
            findings.append(_finding(item, "empty sentence", "degraded", mention_id))
        for finding in findings:
            note(finding)
        kept = replace(item, word=texts["word"], sentence=texts["sentence"], gold=gold)
        yield replace(kept, mention_id=mention_id, groups=groups)


def _finding(item: RawEntity | RawMention, reason: str, action: Action, detail: str) -> Finding:
    item_id = item.entity_id if isinstance(item, RawEntity) else item.mention_id
    return Finding(item.source, item.record, reason, action, detail, item_id)


def _entity_fault(item: RawEntity, known: set[str]) -> str | None:
    """Why an entity cannot be kept, or None."""
    if not is_text(item.entity_id, item.name, item.attributes):
        return "broken text"
    if not item.entity_id:
        return "no entity id"
    if not is_id(item.entity_id):
        return "unusable entity id"
    return "duplicate entity" if item.entity_id in known else None


def _no_target(word: str, gold: str | None, row_of: Mapping[str, int]) -> str:
    """Why a mention cannot be linked, or nothing."""
    if not word:
        return "empty word"
    if not gold:
        return "null gold"
    if gold.lower() == "nil":
        return "nil gold"
    return "" if gold in row_of else UNKNOWN_GOLD


def _clean(texts: Mapping[str, str], item: RawEntity | RawMention, note: Note) -> dict[str, str]:
    """Texts without control characters and of bounded length."""
    control = [name for name, text in texts.items() if has_control(text)]
    if control:
        texts = {name: without_control(text) for name, text in texts.items()}
        note(_finding(item, "control characters", "repaired", ", ".join(control)))
    long = [name for name, text in texts.items() if len(text) > MAX_TEXT]
    if long:
        note(_finding(item, "text too long", "degraded", ", ".join(long)))
    return {name: text[:MAX_TEXT].strip() for name, text in texts.items()}


def _mention_id(item: RawMention, ids: UniqueIds, note: Note) -> str:
    wanted = item.mention_id
    if not (wanted and is_id(wanted) and is_text(wanted)):
        reason = "unusable mention id" if wanted else "no mention id"
        note(_finding(item, reason, "repaired", wanted))
        wanted = f"{Path(item.source).stem}-{item.record}"
    mention_id = ids.take(wanted)
    if mention_id != wanted:
        note(_finding(item, "duplicate mention id", "repaired", f"{wanted} -> {mention_id}"))
    return mention_id


def _bounded_groups(item: RawMention, note: Note) -> dict[str, str]:
    kept: dict[str, str] = {}
    unusable = []
    for name, value in sorted(item.groups.items()):
        too_long = len(name) > MAX_GROUP_NAME or len(value) > MAX_GROUP_VALUE
        if too_long or len(kept) == MAX_GROUPS or has_control(name + value):
            unusable.append(name)
        else:
            kept[name] = value
    if unusable:
        note(_finding(item, "unusable groups", "degraded", ", ".join(unusable)))
    return kept


def _group_texts(item: RawMention) -> list[str]:
    return [text for pair in item.groups.items() for text in pair]
