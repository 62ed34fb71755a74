"""The page of an inspection, which needs no other file: findings and what they mean, figures, records and their images.

It has no script: its tables are sorted when they are written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from data_prep.inspection.findings import VERDICTS, Finding, percent, touched
from data_prep.inspection.presentation.tables import VERDICT_NOTE, figure_tables
from data_prep.inspection.report import Example, Inspection
from dsmip.data.records import Entity, Mention
from dsmip.pages.templates import base_style, page_environment
from dsmip.pages.thumbnails import thumbnail
from dsmip.storage.atomic import write_text

_IMAGE_SIDE = 128
_TEXT_CHARACTERS = 400
_OPTION = re.compile(r"--[a-z][a-z-]*")


@dataclass(frozen=True, slots=True)
class _Card:
    """A record as it is shown.

    Attributes:
        role: What it is in an example.
        title: Its word or name.
        text: Its sentence or attributes, cut.
        record_id: Its id.
        image: A data URI; "" when there is none, or none that can be decoded.
    """

    role: str
    title: str
    text: str
    record_id: str
    image: str


def write_page(found: Inspection, path: Path) -> None:
    """Writes the page to a file, whole or not at all."""
    environment = page_environment("data_prep.inspection.presentation")
    environment.filters |= {"percent": percent, "options_whole": _options_whole}
    page = environment.get_template("page.html.j2").render(
        style=base_style(),
        found=found,
        findings={
            kind: [finding for finding in found.findings if finding.meaning.kind == kind]
            for kind in ("leak", "flaw", "property")
        },
        verdicts=_verdicts(found.findings),
        verdict_note=VERDICT_NOTE,
        tables=figure_tables(found),
        touched=touched(found.prepared),
        samples=[(example.split, _cards(example)) for example in found.samples],
        examples=_examples(found),
    )
    write_text(path, page)


def _options_whole(text: str) -> Markup:
    """A text whose options (`--split`) are not broken at a line's end."""
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(escape(text))))


def _verdicts(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """How many findings have each verdict, the worst first."""
    return [(verdict, sum(finding.verdict == verdict for finding in findings)) for verdict in VERDICTS]


def _examples(found: Inspection) -> dict[str, tuple[str, list[tuple[str, list[_Card]]]]]:
    """Titles and examples by finding, in the order of the findings."""
    examples: dict[str, tuple[str, list[tuple[str, list[_Card]]]]] = {}
    for finding in found.findings:
        shown = [(each.split, _cards(each)) for each in found.examples if each.finding == finding.name]
        if shown:
            examples[finding.name] = (finding.label, shown)
    return examples


def _cards(example: Example) -> list[_Card]:
    return [_card(role, record) for role, record in example.records]


def _card(role: str, record: Mention | Entity) -> _Card:
    image: bytes | None
    if isinstance(record, Mention):
        image, title, record_id = record.image, record.word, record.mention_id
        text = f"{record.sentence} [description: {record.desc}]" if record.desc else record.sentence
    else:
        image, title = next(iter(record.images), None), record.name
        text, record_id = record.attributes, record.entity_id
    text = text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}..."
    return _Card(role, title, text, record_id, thumbnail(image, _IMAGE_SIDE) if image else "")
