"""Whatever stands in a MELBench or WikiDiverse file, each input is either in a split or rejected once."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.rules import UniqueIds, checked_entities, checked_mentions
from data_prep.formats.registry import open_release
from data_prep.formats.release import Finding, ReleaseOptions
from dsmip.data.manifest import SPLITS

_KB = [{"qid": f"Q{n}", "entity_name": f"Title {n}", "attr": "a"} for n in range(3)]
_ODD = st.sampled_from([None, True, 3, 1.5, "", " ", "\ud800", "%", "nil", [], ["a"], [None, "Q1"], {}, {"a": 1}])
_GOLD = st.sampled_from(["Q0", "Q1", "https://en.wikipedia.org/wiki/Title_2", "Q9"]) | _ODD
_WORD = st.sampled_from(["Ash", "elm"]) | _ODD
_SENTENCE = st.sampled_from(["Ash, elm", "ash, ELM", "Ash"]) | _ODD
_IMAGE = st.sampled_from(["http://x/a.jpg", "a.jpg", "b.svg"]) | _ODD
_OFFSET = st.integers(-1, 9) | _ODD
_TOPIC = st.just("sports") | _ODD


def _melbench_records() -> st.SearchStrategy[Any]:
    texts = st.tuples(_WORD, _WORD, _GOLD) | st.tuples(*[st.lists(part, max_size=3) for part in (_WORD, _WORD, _GOLD)])
    scalars = st.fixed_dictionaries({}, optional={"id": st.just("7") | _ODD, "sentence": _SENTENCE, "imgPath": _IMAGE})
    made = st.builds(
        lambda some, three: {**some, **dict(zip(("mentions", "entities", "answer"), three, strict=True))},
        scalars,
        texts,
    )
    return made | _ODD


def _melbench_inputs(record: Any) -> int:
    """Mentions of a record of sound lists, else 1."""
    if not isinstance(record, dict) or not isinstance(record.get("mentions"), list):
        return 1
    lists = [record[name] for name in ("mentions", "entities", "answer")]
    sound = all(one is None or (isinstance(one, list) and len(one) == len(lists[0])) for one in lists)
    return max(len(lists[0]), 1) if sound else 1


def _passages() -> st.SearchStrategy[Any]:
    mention = st.tuples(_WORD, _TOPIC, _OFFSET, _OFFSET, _GOLD).map(list) | _ODD
    return st.tuples(_SENTENCE, _IMAGE, _TOPIC, st.lists(mention, max_size=3) | _ODD).map(list) | _ODD


def _passage_inputs(record: Any) -> int:
    if not isinstance(record, list) or len(record) != 4 or not isinstance(record[3], list):
        return 1
    return max(len(record[3]), 1)


def _check(folder: Path, layout: str, options: ReleaseOptions, num_inputs: int) -> None:
    (folder / "kb_entity.json").write_text(json.dumps(_KB))
    release = open_release(folder, layout, options)
    rows = {entity.entity_id: row for row, entity in enumerate(checked_entities(release.entities(), lambda _: None))}
    findings: list[Finding] = []
    ids = UniqueIds()
    kept = [m for split in SPLITS for m in checked_mentions(release.mentions(split), rows, findings.append, ids)]
    assert len(kept) + sum(finding.action == "rejected" for finding in findings) == num_inputs
    assert all(mention.gold in rows and mention.word for mention in kept)


@settings(max_examples=60, deadline=None)
@given(st.lists(_melbench_records(), max_size=6), st.booleans())
def test_melbench(records: list[Any], by_ids: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Any-MEL.json").write_text(json.dumps({str(n): record for n, record in enumerate(records)}))
        (folder / "splits.json").write_text('{"train": ["0", 1], "dev": ["2-0", "7"], "test": ["3"]}')
        options = ReleaseOptions() if by_ids else ReleaseOptions(split=(50, 25, 25))
        _check(folder, "melbench", options, sum(map(_melbench_inputs, records)))


@settings(max_examples=60, deadline=None)
@given(st.lists(_passages(), max_size=4), st.lists(_passages(), max_size=2))
def test_wikidiverse(train: list[Any], test: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, records in {"train": train, "valid": [], "test": test}.items():
            (folder / f"{split}.json").write_text(json.dumps(records))
        _check(folder, "wikidiverse", ReleaseOptions(), sum(map(_passage_inputs, [*train, *test])))
