"""Candidates: a few entities per mention by products of vectors, then exact scores of these alone. For serving.

    search = CandidateSearch(GlobalVectors(matcher, device), index)     # once per index
    links = link(matcher, mentions, index, search, k=100, top=5)        # prepared mentions -> kb rows and scores

What the search misses is lost, so ranks among candidates are no ranks over the knowledge base. M mentions, E entities,
g width of a vector, K candidates, T kept ones.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.errors import UserError
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranks import NotRankable
from dsmip.evaluation.refinement import PairScorer
from dsmip.ops import ranking as ops
from dsmip.units.matcher import Matcher

SearchMethod = Literal["gemm", "faiss"]
_TILE = 4096


class VectorSource(Protocol):
    """Makes one vector of each prepared item: the larger two items' product, the better their score should be."""

    def of(self, prepared: Table, side: Side) -> Tensor:
        """float32 [N, g] of N prepared items; for each of them what it would be alone."""


@dataclass(frozen=True)
class GlobalVectors:
    """`Matcher.global_vectors`, with nothing learned for the search: all of a score that is one product of two vectors.

    Attributes:
        matcher: On the device.
        device: Where vectors are computed.
    """

    matcher: Matcher
    device: torch.device

    @torch.no_grad()
    def of(self, prepared: Table, side: Side) -> Tensor:
        """See `VectorSource.of`.

        Raises:
            UserError: The matcher has no global vectors.
        """
        return self.matcher.global_vectors(_dense(prepared).to(self.device), side).float()


class VectorSearch:
    """Finds the entities whose vectors have the largest dot products with a mention's; none is skipped.

    Holds 4 g bytes per entity.

    Attributes:
        method: `faiss` (its IndexFlatIP) where that package is installed and the vectors lie on a CPU, else `gemm`.
            Both find the same, but of entities with equal products `gemm` takes those of lower rows.
        width: Of a vector.
    """

    def __init__(self, vectors_Eg: Tensor, first_row: int = 0) -> None:
        """Takes the vectors of kb rows `first_row` .. `first_row + E`.

        Raises:
            ValueError: One of them is not finite.
        """
        _refuse_infinite(vectors_Eg, "entity", first_row)
        self.first_row, self.device = first_row, vectors_Eg.device
        self._num_entities, self.width = vectors_Eg.shape
        faiss = _faiss() if self.device.type == "cpu" else None
        self.method: SearchMethod = "gemm" if faiss is None else "faiss"
        if faiss is None:
            self._vectors_Eg = vectors_Eg.float()
        else:
            self._flat = faiss.IndexFlatIP(vectors_Eg.shape[1])
            self._flat.add(vectors_Eg.float().contiguous().numpy())

    def __len__(self) -> int:
        return self._num_entities

    def search(self, vectors_Mg: Tensor, k: int) -> Tensor:
        """Kb rows int64 [M, min(k, E)] of each mention's best entities, best first.

        Raises:
            ValueError: k < 1, or a vector is not finite.
        """
        if k < 1:
            raise ValueError(f"{k} candidates: at least one is needed")
        _refuse_infinite(vectors_Mg, "mention")
        k, vectors_Mg = min(k, len(self)), vectors_Mg.to(self.device).float()
        if self.method == "gemm":
            row_MK = ops.largest_products(vectors_Mg, self._vectors_Eg, k).rows_MK
        else:
            row_MK = torch.from_numpy(self._flat.search(vectors_Mg.contiguous().numpy(), k)[1])
        return row_MK + self.first_row


class CandidateSearch(VectorSearch):
    """The search among all entities of an index, by the vectors of a source.

    Attributes:
        source: Of the vectors.
    """

    def __init__(self, source: VectorSource, index: EntityIndex) -> None:
        """
        Raises:
            UserError: The source has no vectors of these, or one is not finite.
        """
        self.source = source
        vectors_Eg = torch.cat([source.of(tile, "entities") for tile in index.tiles(_TILE)])
        if broken := _infinite(vectors_Eg):
            raise UserError(
                f"the model's vector of entity row {index.first_row + broken[0]} is NaN or infinite, so that no "
                "candidates can be found; its training diverged, or the entity's features are broken"
            )
        super().__init__(vectors_Eg, index.first_row)

    def candidates(self, mentions: Table, k: int) -> Tensor:
        """As `search`, of prepared mentions.

        Raises:
            NotRankable: A mention's vector is not finite, and so are its products with all entities.
        """
        vectors_Mg = self.source.of(mentions, "mentions")
        if broken := _infinite(vectors_Mg):
            raise NotRankable(broken[0], self.first_row, "candidates' vectors")
        return self.search(vectors_Mg, k)


@dataclass(frozen=True)
class Links:
    """What M mentions are linked to, best first (CPU tensors).

    Attributes:
        row_MT: kb rows int64.
        score_MT: Their scores float64, as in a refined ranking.
        chosen_MT: Index of the expert that scored each; None for a matcher that makes no choice.
        candidate_row_MK: kb rows of all candidates, ascending.
    """

    row_MT: Tensor
    score_MT: Tensor
    chosen_MT: Tensor | None
    candidate_row_MK: Tensor


def link(matcher: Matcher, mentions: Table, index: EntityIndex, search: CandidateSearch, k: int, top: int) -> Links:
    """The `top` best of each prepared mention's `k` candidates (at most all of both), equal scores by lower row.

    Candidates are scored in float64 on the ranking's grid (`PairScorer`) and not in float32: a few pairs cost little,
    and so their order is that of the exact ranking, whatever the candidates they are scored beside.

    Raises:
        ValueError: k < 1, or a search of another index.
        NotRankable: A score, or a number of a mention's vector, is NaN or infinite.
    """
    if (len(search), search.first_row) != (len(index), index.first_row):
        raise ValueError(f"a search among {len(search)} entities for an index of {len(index)}: they must be the same")
    return link_with(PairScorer(matcher, mentions, index, search.device), search, k, top)


def link_with(pairs: PairScorer, search: CandidateSearch, k: int, top: int) -> Links:
    """As `link`, with what scores pairs of the mentions and the search's index, which many calls may share."""
    row_MK = search.candidates(pairs.mentions, k).cpu().sort(dim=1).values
    score_MK, chosen_MK = _scored(pairs, row_MK, search.first_row)
    best = ops.merge_top_k(score_MK, row_MK, top)
    column_MT = torch.searchsorted(row_MK, best.rows_MK.contiguous())
    chosen_MT = None if chosen_MK is None else chosen_MK.gather(1, column_MT)
    return Links(best.rows_MK, best.scores_MK, chosen_MT, row_MK)


def _scored(pairs: PairScorer, row_MK: Tensor, first_row: int) -> tuple[Tensor, Tensor | None]:
    """Exact scores float64 [M, K] of each mention's kb rows (ascending), and the experts that gave them."""
    score_MK, choices = torch.zeros(row_MK.shape, dtype=torch.float64), list[Tensor]()
    for mention, row_K in enumerate(row_MK):
        score_MK[mention : mention + 1], chosen_1K = pairs.score_and_choose(torch.tensor([mention]), row_K - first_row)
        if chosen_1K is not None:
            choices.append(chosen_1K)
    if len(broken := (~score_MK.isfinite()).nonzero()):
        mention, column = broken[0].tolist()
        raise NotRankable(mention, int(row_MK[mention, column]))
    return score_MK, torch.cat(choices) if choices else None


def _dense(table: Table) -> Table:
    """Without token rows, which have no part in global vectors and would be the most to move to a device."""
    return Table({name: column for name, column in table.columns.items() if not isinstance(column, Ragged)})


def _faiss() -> ModuleType | None:
    try:
        return import_module("faiss")
    except ImportError:
        return None


def _infinite(vectors_Ng: Tensor) -> list[int]:
    """Rows that have a number that is not finite."""
    found: list[int] = (~vectors_Ng.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    return found


def _refuse_infinite(vectors_Ng: Tensor, what: str, first: int = 0) -> None:
    if broken := _infinite(vectors_Ng):
        raise ValueError(f"the vector of {what} {first + broken[0]} is not finite: nothing can be searched")
