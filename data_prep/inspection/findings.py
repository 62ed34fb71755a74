"""Findings of an inspection, judged: which of its counts matter, what they mean and what to do, the worst first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.inspection.batches import SameGold
from data_prep.inspection.checks import Count, Row
from data_prep.inspection.meanings import OF_ACTIONS, OF_BATCHES, Meaning, meaning_of
from dsmip.data.manifest import SPLITS

Verdict = Literal["serious", "look at it", "negligible"]
VERDICTS: tuple[Verdict, ...] = ("serious", "look at it", "negligible")
# From which share on: a leak of 5 % can move hits@1 by 5 points, more than models of one table often differ by.
SERIOUS_LEAK, SERIOUS_FLAW, NOTABLE = 0.05, 0.10, 0.01


@dataclass(frozen=True, slots=True)
class SplitCount:
    """A finding's count in one split, or in "kb".

    Attributes:
        name: The split, or "kb".
        count: How many records of how many.
        verdict: How bad it is; None for a property of the data, which is not bad.
    """

    name: str
    count: Count
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found by one check.

    Attributes:
        name: The check's name, of entities with "kb_" before it.
        label: The check's words, of entities with "entity: " before them.
        meaning: What it means, and what to do.
        counts: By split, without those that are 0.
    """

    name: str
    label: str
    meaning: Meaning
    counts: tuple[SplitCount, ...]

    @property
    def verdict(self) -> Verdict | None:
        """The worst of its counts."""
        return min((each.verdict for each in self.counts if each.verdict), key=VERDICTS.index, default=None)

    @property
    def share(self) -> float:
        """The largest of its counts."""
        return max(each.count.share or 0.0 for each in self.counts)

    def to_json(self) -> dict[str, Any]:
        """Its words and figures."""
        return {
            "check": self.name,
            "label": self.label,
            "kind": self.meaning.kind,
            "verdict": self.verdict,
            "means": self.meaning.means,
            "remedy": self.meaning.remedy,
            "splits": [
                {"split": each.name, "count": each.count.count, "of": each.count.of, "verdict": each.verdict}
                for each in self.counts
            ],
        }


def findings_of(mentions: Sequence[Row], entities: Sequence[Row], same_gold: SameGold) -> tuple[Finding, ...]:
    """All that was found: leaks, flaws and properties, the first two by verdict and share, the last as they were asked.

    A near copy is left out where there are only exact ones, and what two splits share is counted in the later one.
    """
    found = [*_of_rows(mentions), *_of_rows(entities, "kb_", "entity: ")]
    if same_gold.batches_with_any:
        found.append(_of_batches(same_gold))
    wrong = [finding for finding in found if finding.verdict is not None]
    wrong.sort(key=lambda one: (one.meaning.kind != "leak", VERDICTS.index(one.verdict or "negligible"), -one.share))
    return (*wrong, *(finding for finding in found if finding.verdict is None))


def percent(share: float | None) -> str:
    """A share in words; a few of many are not none of them."""
    points = 100 * (share or 0.0)
    return "< 0.1 %" if 0 < points < 0.1 else f"{points:.1f} %"


def verdict(kind: str, share: float) -> Verdict | None:
    """How bad a share is; None for a property."""
    if kind == "property":
        return None
    if share >= (SERIOUS_LEAK if kind == "leak" else SERIOUS_FLAW):
        return "serious"
    return "look at it" if share >= NOTABLE else "negligible"


def touched(prepared: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, int, Meaning]]:
    """What preparation touched: action, reason, count and meaning, what was lost most of first."""
    rows = [
        (action, reason, count, meaning_of(reason, action))
        for action, reasons in prepared.items()
        for reason, count in reasons.items()
        if count
    ]
    order = list(OF_ACTIONS)
    return sorted(rows, key=lambda row: (order.index(row[0]), -row[2], row[1]))


def _of_rows(rows: Iterable[Row], prefix: str = "", subject: str = "") -> Iterator[Finding]:
    counts_of = {row.name: row.counts for row in rows}
    for row in rows:
        exact = counts_of.get(row.name.replace("_near_", "_exact_"), {}) if "_near_" in row.name else {}
        by_split = tuple(
            SplitCount(name, count, verdict(row.meaning.kind, count.share or 0.0))
            for name, count in row.counts.items()
            if count.count
            and not _is_of_a_later_split(row.name, name)
            and not (name in exact and exact[name].count == count.count)
        )
        if by_split:
            yield Finding(prefix + row.name, subject + row.label, row.meaning, by_split)


def _is_of_a_later_split(check: str, split: str) -> bool:
    """Whether a check tells what a split shares with one behind it, which is told there."""
    other = check.rpartition("_in_")[2]
    return other in SPLITS and split in SPLITS and SPLITS.index(other) > SPLITS.index(split)


def _of_batches(pairs: SameGold) -> Finding:
    count = Count(pairs.batches_with_any, pairs.num_batches)
    means = OF_BATCHES.means.format(share=percent(count.share), mean=pairs.mean)
    remedy = OF_BATCHES.remedy.format(expected=pairs.expected_mean)
    label = f"a batch of {pairs.batch_size} has mentions of the same gold"
    return Finding(
        "same_gold_pairs", label, Meaning(OF_BATCHES.kind, means, remedy), (SplitCount("train", count, None),)
    )
