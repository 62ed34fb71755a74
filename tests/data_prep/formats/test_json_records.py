"""Records of JSON files: the same values as the standard library reads, however the file falls into chunks."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.formats import json_records
from data_prep.formats.json_records import BrokenLine, array_records, line_records, object_records, opening
from dsmip.errors import UserError

TEXTS = st.text(st.characters(codec=None, categories=None), max_size=8)  # lone surrogates too
NUMBERS = st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}])
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.json"


def _write(path: Path, value: Any, layout: dict[str, Any], plain: bool) -> None:
    # Lone surrogates cannot be written but as escapes.
    text = json.dumps(value, ensure_ascii=not plain, **layout)
    try:
        path.write_bytes(text.encode())
    except UnicodeEncodeError:
        path.write_text(json.dumps(value, **layout))


@QUICK
@given(values=st.lists(VALUES, max_size=5), layout=LAYOUTS, chunk=st.integers(1, 9), plain=st.booleans())
def test_any_array_comes_back(values: list[Any], layout: dict[str, Any], chunk: int, plain: bool, path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CHUNK", chunk)
        _write(path, values, layout, plain)
        read = list(array_records(path))
        assert read == values
        assert [type(value) for value in read] == [type(value) for value in values]
        assert opening(path) == "["
        keyed = {f"k{index}": value for index, value in enumerate(values)}
        _write(path, keyed, layout, plain)
        assert list(object_records(path)) == list(keyed.items())


@QUICK
@given(
    values=st.lists(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3), min_size=1, max_size=4),
    layout=LAYOUTS,
    chunk=st.integers(5, 40),
    where=st.floats(0, 1, exclude_max=True),
    junk=st.sampled_from(["#", "}", '"', "1x", "\n"]),
)
def test_errors_are_where_the_standard_library_sees_them(
    values: list[Any], layout: dict[str, Any], chunk: int, where: float, junk: str, path: Path
) -> None:
    text = json.dumps(values, **layout)
    start, stop = text.index("{") + 1, text.rindex("}")
    cut = start + int(where * (stop - start))
    broken = text[:cut] + junk + text[cut:]
    path.write_text(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CHUNK", chunk)
        try:
            expected = json.loads(broken)
        except json.JSONDecodeError as error:
            with pytest.raises(UserError, match=f"line {error.lineno} column {error.colno}: "):
                list(array_records(path))
        else:
            assert list(array_records(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON array of records, found nothing"),
        (b'{"a": 1}', "found an object"),
        (b"3", "found something else"),
        (b"[1, 2", r"line 1 column 6: .* expected ',' or ']'"),
        (b"[1]\n\n x", "line 3 column 2: wrong JSON: extra data"),
        (b"[1,\n,2]", "line 2 column 1: wrong JSON"),
        (b'["a",\n "\xff"]', "line 2 column 3: not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a number of too many digits"),
    ],
)
def test_what_is_no_array_is_named(content: bytes, message: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(array_records(path))


def test_a_broken_line_does_not_stop_the_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD", 5000)
    bad = [b"{'a'}", b'"\xff"', b"[1] 2", b"1" * 4500, b'"' + b"x" * 20_000 + b'"', b"[" * 4900]
    path.write_bytes(b"\xef\xbb\xbf1\r\n\n" + b"\n".join(bad) + b'\n{"a": "\\ud800"}')
    problems = [
        "line 3 column 2: Expecting property name enclosed in double quotes",
        "line 4 column 2: not UTF-8 text",
        "line 5 column 5: Extra data",
        "line 6: a number of too many digits",
        "line 7: longer than 5000 bytes",
        "line 8: nested too deeply",
    ]
    assert list(line_records(path)) == [1, *map(BrokenLine, problems), {"a": "\ud800"}]
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(line_records(path.with_name("nowhere")))


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line_that_is_cut_off_is_broken_at_its_end(tmp_path: Path, end: str) -> None:
    (tmp_path / "records.jsonl").write_bytes(f'{{"id": "X3"{end}'.encode())
    assert list(line_records(tmp_path / "records.jsonl")) == [BrokenLine("line 1 column 12: Expecting ',' delimiter")]
