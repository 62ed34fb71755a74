"""An inspection as tables of text, the same for a terminal and for a page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.inspection.report import Count, Inspection, Row
from dsmip.data.manifest import SPLITS

_FLAWS_LISTED = 12


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Its title.
        header: Names of the columns.
        rows: Cells; the first one names the row.
        note: What a reader must know to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(found: Inspection) -> list[TextTable]:
    """All figures of an inspection, the largest flaws first."""
    return [_flaws(found), _mentions(found), _entities(found), _lengths(found), _batches(found), _prepared(found)]


def _flaws(found: Inspection) -> TextTable:
    """The faults by share; training mentions count only where they are asked something that is theirs."""
    counts = [
        (count.share or 0.0, row, split, count)
        for row in (*found.mentions, *found.entities)
        if row.flaw
        for split, count in row.counts.items()
        # what a split shares with train is its own fault, not that of train
        if count.count and not (split == "train" and "_in_" in row.name)
    ]
    counts.sort(key=lambda entry: -entry[0])
    rows = tuple((row.label, split, *_figures(count)) for _, row, split, count in counts[:_FLAWS_LISTED])
    more = len(counts) - len(rows)
    note = "none found" if not rows else f"{more} smaller ones are in the tables below" if more > 0 else ""
    return TextTable("Largest flaws", ("a mention's or an entity's ...", "of", "count", "share"), rows, note)


def _mentions(found: Inspection) -> TextTable:
    sizes = ("mentions", *(str(found.sizes[split]) for split in SPLITS))
    rows = [sizes, *(_cells(row, SPLITS) for row in found.mentions)]
    golds = [found.golds[split] for split in SPLITS]
    rows.append(("distinct golds", *(str(gold.of) for gold in golds)))
    rows.append(("distinct golds unseen in training", *map(_text, golds)))
    note = (
        "Texts are compared without regard to case and spaces. Nearly: 64-bit difference hashes within 4 bits and"
        " 4 x 4 grids of colours within 16 of 255; a picture of one colour is nearly no other."
    )
    return TextTable("Mentions", ("of the mentions ...", *SPLITS), tuple(rows), note)


def _entities(found: Inspection) -> TextTable:
    rows = (("entities", str(found.sizes["kb"])), *(_cells(row, ("kb",)) for row in found.entities))
    return TextTable("Knowledge base", ("of the entities ...", "kb"), rows)


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
    note = "Pairs of mentions that would be each other's false negative; training with seed 0, first epoch."
    return TextTable(f"Training batches of {pairs.batch_size}", ("", "train"), rows, note)


def _prepared(found: Inspection) -> TextTable:
    rows = tuple(
        (reason, action, str(count)) for action, reasons in found.findings.items() for reason, count in reasons.items()
    )
    return TextTable(
        "What preparation touched",
        ("reason", "records", "count"),
        rows,
        "" if rows else "no record",
    )


def _cells(row: Row, splits: Sequence[str]) -> tuple[str, ...]:
    return (row.label, *(_text(row.counts[split]) if row.counts[split].of else "-" for split in splits))


def _figures(count: Count) -> Iterator[str]:
    yield f"{count.count} of {count.of}"
    yield _percent(count)


def _text(count: Count) -> str:
    return f"{count.count} ({_percent(count)})" if count.count else "0"


def _percent(count: Count) -> str:
    share = 100 * (count.share or 0.0)
    # a few of many are not none of them
    return "< 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"
