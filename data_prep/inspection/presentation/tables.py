"""An inspection as tables of text, the same for a terminal and for a page: sorted, rows without a hit folded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_prep.inspection.checks import Count, Row
from data_prep.inspection.findings import NOTABLE, SERIOUS_FLAW, SERIOUS_LEAK, percent, touched
from data_prep.inspection.report import Inspection
from dsmip.data.manifest import SPLITS

VERDICT_NOTE = (
    f"Serious: from {100 * SERIOUS_LEAK:.0f} % for a leak, {100 * SERIOUS_FLAW:.0f} % for a flaw;"
    f" negligible: under {100 * NOTABLE:.0f} %."
)


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Its title.
        header: Names of the columns.
        rows: Cells; the first one names the row.
        note: What a reader must know to read it.
        folded: Names of the rows that hold nothing.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: tuple[str, ...] = ()


def figure_tables(found: Inspection) -> list[TextTable]:
    """All figures of an inspection; of checks the largest share first."""
    return [_mentions(found), _entities(found), _lengths(found), _batches(found)]


def prepared_table(found: Inspection) -> TextTable:
    """What preparation touched, without the words for it."""
    rows = tuple((reason, action, str(count)) for action, reason, count, _ in touched(found.prepared))
    title = "What preparation touched"
    return TextTable(title, ("reason", "records", "count"), rows, "" if rows else "no record")


def _mentions(found: Inspection) -> TextTable:
    golds = [found.golds[split] for split in SPLITS]
    sizes = [
        ("mentions", *(str(found.sizes[split]) for split in SPLITS)),
        ("distinct golds", *(str(gold.of) for gold in golds)),
        ("distinct golds unseen in training", "-", *map(_text, golds[1:])),
    ]
    if found.unknown:
        sizes.append(("besides, of what is not in the kb", *(str(found.unknown.get(split, 0)) for split in SPLITS)))
    rows, folded = _sorted(found.mentions, SPLITS)
    note = (
        "Largest share first; - where a question is not asked. Texts are compared without regard to case and spaces."
        " Nearly: 64-bit difference hashes within 4 bits and 4 x 4 grids of colours within 16 of 255; a picture of one"
        " colour is nearly no other."
    )
    return TextTable("Mentions", ("of the mentions ...", *SPLITS), (*sizes, *rows), note, folded)


def _entities(found: Inspection) -> TextTable:
    rows, folded = _sorted(found.entities, ("kb",))
    header = ("of the entities ...", "kb")
    return TextTable("Knowledge base", header, (("entities", str(found.sizes["kb"])), *rows), "", folded)


def _lengths(found: Inspection) -> TextTable:
    rows = tuple(
        (
            "entities" if split == "kb" else f"mentions of {split}",
            f"{each.mean:.1f}",
            *map(str, (each.median, each.p95, each.longest)),
            _text(Count(each.cut, each.texts)),
        )
        for split, each in found.lengths.items()
    )
    header = ("texts of", "mean", "median", "95 %", "longest", f"cut at {found.context_length}")
    note = "CLIP's tokens of 'word : sentence' and 'name : attributes', start and end included, no prompts."
    return TextTable("Lengths in tokens", header, rows, note)


def _batches(found: Inspection) -> TextTable:
    pairs = found.same_gold
    rows = (
        ("batches of an epoch", str(pairs.num_batches)),
        ("same-gold pairs of a batch, mean", f"{pairs.mean:.2f}"),
        ("... of batches drawn at random", f"{pairs.expected_mean:.2f}"),
        ("... largest", str(pairs.largest)),
        ("batches with such a pair", _text(Count(pairs.batches_with_any, pairs.num_batches))),
    )
    note = "Pairs of mentions with one gold, which the loss leaves out; training with seed 0, first epoch."
    return TextTable(f"Training batches of {pairs.batch_size}", ("", "train"), rows, note)


def _sorted(rows: Iterable[Row], splits: Sequence[str]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Cells of rows with hits, the largest share first, and the labels of those without."""

    def largest(row: Row) -> float:
        return max(count.share or 0.0 for count in row.counts.values())

    rows = sorted(rows, key=lambda row: -largest(row))
    return (
        [_cells(row, splits) for row in rows if largest(row)],
        tuple(row.label for row in rows if not largest(row)),
    )


def _cells(row: Row, splits: Sequence[str]) -> tuple[str, ...]:
    return (row.label, *(_text(row.counts[split]) if row.counts[split].of else "-" for split in splits))


def _text(count: Count) -> str:
    return f"{count.count} ({percent(count.share)})" if count.count else "0"
