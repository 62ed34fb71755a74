"""Generated releases with faults put in: every record has a fate that is known, whichever layout it is written in."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.build.rules import MAX_GROUP_VALUE, UniqueIds, checked_entities, checked_mentions
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, ReleaseOptions
from dsmip.data.records import MAX_ID, MAX_TEXT

SPLITS = ("train", "validation", "test")
MIMIC_NAMES = {
    "entity": {"entity_id": "qid", "name": "entity_name", "attributes": "attr", "images": "image_list"},
    "mention": {"mention_id": "id", "word": "mentions", "entity_id": "answer", "image": "imgPath"},
}
MIMIC_FILES = {"train": "T_train.json", "validation": "T_dev.json", "test": "T_test.json"}


@dataclass(frozen=True)
class Fault:
    """What is done to one field of a record, and what must become of it.

    `rule`: seen by the rules, not the parser; `then`: what they see of a field that the parser has left out.
    """

    field: str
    value: Any
    reason: str
    action: str
    rule: bool = True
    only: str = ""
    then: "Fault | None" = None

    @property
    def is_fatal(self) -> bool:
        return self.action == "rejected"


WHOLE, LINE = "whole record", "line"
EMPTY_NAME = Fault("name", " ", "empty name", "degraded")
NO_ID = Fault("mention_id", None, "no mention id", "repaired")
ENTITY_FAULTS = [
    Fault("entity_id", "", "no entity id", "rejected"),
    Fault("entity_id", None, "no entity id", "rejected"),
    Fault("entity_id", "Q" * (MAX_ID + 1), "unusable entity id", "rejected"),
    Fault("entity_id", "Q\n\x07", "unusable entity id", "rejected"),
    Fault("entity_id", ["Q1"], "wrong type", "rejected", rule=False),
    Fault("name", "\udc00", "broken text", "rejected"),
    EMPTY_NAME,
    Fault("name", "a\x00b", "control characters", "repaired"),
    Fault("name", 5, "wrong type", "degraded", rule=False, then=EMPTY_NAME),
    Fault("attributes", None, "empty attributes", "degraded"),
    Fault("attributes", "x" * (MAX_TEXT + 1), "text too long", "degraded"),
    Fault("images", [3], "wrong type", "degraded", rule=False),
    Fault("images", ["../a.jpg"], "picture outside the folder", "degraded", rule=False, only="jsonl"),
    Fault("id", 1000, "non-contiguous id", "repaired", rule=False, only="mimic"),
    Fault(WHOLE, ["no object"], "wrong type", "rejected", rule=False),
    Fault(LINE, '{"entity_id": "Q1"', "wrong JSON", "rejected", rule=False, only="jsonl"),
]
MENTION_FAULTS = [
    NO_ID,
    Fault("mention_id", "m" * (MAX_ID + 1), "unusable mention id", "repaired"),
    Fault("mention_id", "\ud800", "unusable mention id", "repaired"),
    Fault("mention_id", True, "wrong type", "degraded", rule=False, then=NO_ID),
    Fault("word", "\x1f ", "empty word", "rejected"),
    Fault("word", "a\x85b", "control characters", "repaired"),
    Fault("word", {"a": 1}, "wrong type", "rejected", rule=False),
    Fault("sentence", None, "empty sentence", "degraded"),
    Fault("sentence", "x" * (MAX_TEXT + 1), "text too long", "degraded"),
    Fault("sentence", "\ud83d", "broken text", "rejected"),
    Fault("entity_id", "NIL", "nil gold", "rejected"),
    Fault("entity_id", None, "null gold", "rejected"),
    Fault("entity_id", "Q99", "unknown gold", "rejected"),
    Fault("kind", "x" * (MAX_GROUP_VALUE + 1), "unusable groups", "degraded"),
    Fault("kind", "a\x00", "unusable groups", "degraded"),
    Fault("image", 7, "wrong type", "degraded", rule=False),
    Fault("image", "C:\\a.jpg", "picture outside the folder", "degraded", rule=False, only="jsonl"),
    Fault("split", "exam", "unknown split", "rejected", rule=False, only="jsonl"),
    Fault(WHOLE, None, "wrong type", "rejected", rule=False),
    Fault(LINE, "nonsense", "wrong JSON", "rejected", rule=False, only="jsonl"),
]


@dataclass(eq=False)
class Draft:
    """One record to write: sound fields, and the faults to put in."""

    fields: dict[str, Any]
    faults: list[Fault]
    split: str = "train"

    @property
    def found(self) -> list[Fault]:
        """The faults that leave a finding: of a record that is rejected, not all that it has."""
        fatal = [fault for fault in self.faults if fault.is_fatal]
        if not fatal:
            return self.faults + [fault.then for fault in self.faults if fault.then]
        return fatal if not fatal[0].rule else fatal + [fault for fault in self.faults if not fault.rule]

    def written(self) -> Any:
        """The record with its faults, or the line itself."""
        for fault in self.faults:
            if fault.field in (WHOLE, LINE):
                return fault.value
        return self.fields | {fault.field: fault.value for fault in self.faults}


@dataclass
class Expected:
    """What must come of a release; findings are (file, record, reason, action)."""

    entities: list[str] = field(default_factory=list)
    mentions: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    findings: Counter[tuple[str, int, str, str]] = field(default_factory=Counter)


@st.composite
def drafts(draw: Callable[..., Any], faults: list[Fault], layout: str, sound: Mapping[str, Any]) -> Draft:
    """A record with up to three faults of different fields, at most one of them fatal."""
    usable = [fault for fault in faults if fault.only in ("", layout)]
    chosen = draw(st.lists(st.sampled_from(usable), max_size=3, unique_by=lambda fault: fault.field))
    fatal = [fault for fault in chosen if fault.is_fatal][:1]
    kept = [fault for fault in chosen if not fault.is_fatal]
    # What comes in place of a record has no other faults.
    chosen = fatal if fatal and fatal[0].field in (WHOLE, LINE) else fatal + kept
    fields = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in sound.items()}
    return Draft(fields, chosen, draw(st.sampled_from(SPLITS)))


@st.composite
def releases(draw: Callable[..., Any], layout: str) -> tuple[list[Draft], list[Draft]]:
    """Entities and mentions; ids are drawn from few, so that they come again."""
    ids = st.sampled_from([f"Q{number}" for number in range(6)])
    entity = {"entity_id": ids, "name": "n", "attributes": "a", "images": []}
    entities = draw(st.lists(drafts(ENTITY_FAULTS, layout, entity), max_size=8))
    names = st.sampled_from(["m1", "m2", "m1-2", "m1-2-2"])
    mention = {"mention_id": names, "word": "w", "sentence": "s", "entity_id": ids, "image": "", "kind": "k"}
    return entities, draw(st.lists(drafts(MENTION_FAULTS, layout, mention), max_size=12))


def _expected(layout: str, entities: list[Draft], mentions: list[Draft]) -> Expected:
    result = Expected()
    kb = "kb_entity.json" if layout == "mimic" else "entities.jsonl"
    for position, draft in enumerate(entities):
        found = [(fault.reason, fault.action) for fault in draft.found]
        entity_id = draft.fields["entity_id"]
        if not any(fault.is_fatal for fault in draft.faults):
            if entity_id in result.entities:
                found = [(fault.reason, fault.action) for fault in draft.faults if not fault.rule]
                found.append(("duplicate entity", "rejected"))
            else:
                result.entities.append(entity_id)
        result.findings.update((kb, position, *each) for each in found)
    used: set[str] = set()
    for split in SPLITS:
        own = [draft for draft in mentions if draft.split == split]
        for draft in own:
            source = MIMIC_FILES[split] if layout == "mimic" else "mentions.jsonl"
            position = (own if layout == "mimic" else mentions).index(draft)
            found = [(fault.reason, fault.action) for fault in draft.found]
            if not any(fault.is_fatal for fault in draft.faults):
                if draft.fields["entity_id"] in result.entities:
                    found += _take_id(draft, f"{Path(source).stem}-{position}", used, result.mentions[split])
                else:
                    found = [(fault.reason, fault.action) for fault in draft.faults if not fault.rule]
                    found.append(("unknown gold", "rejected"))
            result.findings.update((source, position, *each) for each in found)
    return result


def _take_id(draft: Draft, made: str, used: set[str], kept: list[str]) -> list[tuple[str, str]]:
    wanted = made if any(fault.field == "mention_id" for fault in draft.faults) else draft.fields["mention_id"]
    candidates = [wanted, *(f"{wanted}-{number}" for number in range(2, 99))]
    kept.append(next(candidate for candidate in candidates if candidate not in used))
    used.add(kept[-1])
    return [("duplicate mention id", "repaired")] * (kept[-1] != wanted)


def _write(folder: Path, layout: str, entities: list[Draft], mentions: list[Draft]) -> None:
    if layout == "jsonl":
        for name, records in (("entities", entities), ("mentions", mentions)):
            lines = [_line(draft, name == "mentions") for draft in records]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        return
    kb = [_renamed(draft.written(), MIMIC_NAMES["entity"], {"id": row}) for row, draft in enumerate(entities)]
    (folder / "kb_entity.json").write_text(json.dumps(kb))
    for split, name in MIMIC_FILES.items():
        own = [_renamed(draft.written(), MIMIC_NAMES["mention"], {}) for draft in mentions if draft.split == split]
        (folder / name).write_text(json.dumps(own))


def _line(draft: Draft, has_split: bool) -> str:
    if any(fault.field == LINE for fault in draft.faults):
        return str(draft.written())
    record = draft.written()
    if has_split and isinstance(record, dict):
        record = {"split": draft.split} | record
    return json.dumps(record)


def _renamed(record: Any, names: Mapping[str, str], more: Mapping[str, Any]) -> Any:
    if not isinstance(record, dict):
        return record
    return dict(more) | {names.get(name, name): value for name, value in record.items()}


@pytest.mark.parametrize("layout", ["mimic", "jsonl"])
def test_every_record_meets_its_fate(layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(release=releases(layout))
    def check(release: tuple[list[Draft], list[Draft]]) -> None:
        folder = tmp_path_factory.mktemp("release")
        _write(folder, layout, *release)
        opened = open_release(folder, None, ReleaseOptions())
        assert opened.layout == layout
        findings: list[Finding] = []
        entities = list(checked_entities(opened.entities(), findings.append))
        rows = {entity.entity_id: row for row, entity in enumerate(entities)}
        ids = UniqueIds()
        mentions = {
            split: list(checked_mentions(opened.mentions(split), rows, findings.append, ids)) for split in SPLITS
        }
        expected = _expected(layout, *release)
        assert [entity.entity_id for entity in entities] == expected.entities
        assert {split: [each.mention_id for each in items] for split, items in mentions.items()} == expected.mentions
        found = Counter((each.source, each.record, each.reason, each.action) for each in findings)
        assert found == expected.findings
        num_rejected = sum(finding.action == "rejected" for finding in findings)
        assert len(entities) + sum(map(len, mentions.values())) + num_rejected == sum(map(len, release))
        texts = [text for entity in entities for text in (entity.name, entity.attributes)]
        texts += [text for items in mentions.values() for each in items for text in (each.word, each.sentence)]
        assert all(len(text) <= MAX_TEXT and text.isprintable() for text in texts)
        json.dumps([finding.detail for finding in findings], ensure_ascii=False).encode()

    check()
