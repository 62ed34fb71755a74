"""Ranks as TREC run and qrels files, which the tools of information retrieval read (trec_eval, ranx, ir-measures)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmip.errors import UserError
from dsmip.evaluation.stored.ranks import StoredRanks
from dsmip.storage.atomic import write_text

RUN_FILE, QRELS_FILE = "run.trec", "qrels.trec"
_COLUMNS = ("mention_id", "gold", "top", "top_scores")
_UNSAFE = re.compile(r"[\s%#]")


@dataclass(frozen=True)
class TrecFiles:
    """What was written.

    Attributes:
        depth: How many entities a mention has at most.
        golds_outside: Mentions whose gold is none of them: the run file says nothing of its rank.
        by_rank: Whether the scores are minus the ranks, as the model's own do not keep the order.
    """

    run: Path
    qrels: Path
    mentions: int
    depth: int
    golds_outside: int
    by_rank: bool


def write_trec(stored: StoredRanks, folder: Path) -> TrecFiles:
    """Writes run.trec and qrels.trec of stored ranks into a folder, which is made.

    Ids keep their text but for white space, % and #, which are written as in URLs; of mentions with the same id the
    second is ID#2. Scores are the model's where they fall strictly in single precision, which trec_eval reads them in;
    else (ties, re-ranked entities before others) they are minus the ranks.

    Raises:
        UserError: The ranks are of an older version, or the folder is a file.
    """
    stored.check(_COLUMNS)
    names = [_token(name) + (f"#{number + 1}" if number else "") for name, number in stored.mention_keys()]
    golds, tops, scores = (stored.table[column].to_pylist() for column in _COLUMNS[1:])
    by_rank = not all(_falls(each) for each in scores)
    if by_rank:
        scores = [[-float(rank) for rank in range(1, len(top) + 1)] for top in tops]
    tag = _token(stored.model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --out is the folder of {RUN_FILE} and {QRELS_FILE}")
    folder.mkdir(parents=True, exist_ok=True)
    files = TrecFiles(
        folder / RUN_FILE,
        folder / QRELS_FILE,
        len(names),
        max(map(len, tops)),
        sum(gold not in top for gold, top in zip(golds, tops, strict=True)),
        by_rank,
    )
    write_text(files.qrels, "".join(f"{name} 0 {_token(gold)} 1\n" for name, gold in zip(names, golds, strict=True)))
    write_text(files.run, "".join(_run_lines(names, tops, scores, tag)))
    return files


def _run_lines(
    names: Sequence[str], tops: Sequence[Sequence[str]], scores: Sequence[Sequence[float]], tag: str
) -> Iterator[str]:
    for name, top, of_top in zip(names, tops, scores, strict=True):
        for rank, (entity_id, score) in enumerate(zip(top, of_top, strict=True), start=1):
            yield f"{name} Q0 {_token(entity_id)} {rank} {score!r} {tag}\n"


def _falls(scores: Sequence[float]) -> bool:
    return bool((np.diff(np.asarray(scores, dtype=np.float32)) < 0).all())


def _token(text: str) -> str:
    """The text as one word of a line."""
    return _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), text) or "%00"
