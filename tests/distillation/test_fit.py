"""Distilled vectors: nearest products against a slow twin, what the fit learns where global vectors know nothing."""

import pytest
import torch
from torch import Tensor

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table
from dsmip.distillation.fit import FitOptions, Lesson, fit_projection
from dsmip.distillation.products import nearest_products
from dsmip.distillation.vectors import COLUMN, DistilledVectors, Projection, inputs_of
from dsmip.encoders.base import Side
from dsmip.errors import UserError
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors, link
from dsmip.evaluation.index import EntityIndex
from dsmip.ops.losses import listwise_divergences
from dsmip.ops.ranking import recall_at
from dsmip.units.matcher import Matcher, Scores
from tests.support.scoring.matchers import CPU

WIDTH = 12


class TokenMatcher(Matcher):
    """Scores by tokens alone: the cosine of their means, with a hidden map between; its global vectors are noise."""

    def __init__(self) -> None:
        super().__init__()
        self.map_dd = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)))

    def encode_mentions(self, batch: ItemBatch) -> Table:
        raise NotImplementedError

    encode_entities = encode_mentions

    def prepare_mentions(self, features: Table) -> Table:
        return features

    prepare_entities = prepare_mentions

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        m_Md, e_Ed = (_mean(each.ragged("tokens")) for each in (mentions, entities))
        return Scores(torch.nn.functional.normalize(m_Md @ self.map_dd) @ torch.nn.functional.normalize(e_Ed).T)

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        return prepared.dense("pooled")

    def encoder_trains(self) -> bool:
        return False


def _mean(tokens: Ragged) -> Tensor:
    values_NTd, _ = tokens.padded()
    return values_NTd.sum(dim=1) / tokens.lengths[:, None]


def items(count: int, seed: int) -> Table:
    """With one to five tokens around a middle of their own, and a pooled vector that knows nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    middle_Nd = torch.randn(count, 1, WIDTH, generator=generator)
    tokens_NTd = middle_Nd + 0.5 * torch.randn(count, 5, WIDTH, generator=generator)
    mask_NT = torch.arange(5) < torch.randint(1, 6, (count, 1), generator=generator)
    pooled_Nd = torch.randn(count, 3, generator=generator)
    return Table({"pooled": pooled_Nd, "tokens": Ragged.from_padded(tokens_NTd, mask_NT)})


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return TokenMatcher().eval()


def fitted(matcher: Matcher, seed: int) -> DistilledVectors:
    base, mentions, entities = GlobalVectors(matcher, CPU), items(400, 1), items(300, 2)
    with torch.no_grad():
        scores_ME = matcher.score(mentions, entities).total_ME
    lesson = Lesson(inputs_of(mentions, "mentions", base), inputs_of(entities, "entities", base), scores_ME)
    return DistilledVectors(fit_projection(lesson, seed, FitOptions(width=16, hidden=16, epochs=4)), base)


@pytest.fixture(scope="module")
def distilled(matcher: Matcher) -> DistilledVectors:
    return fitted(matcher, seed=0)


def top_1_recall(matcher: Matcher, search: CandidateSearch, mentions: Table, entities: Table, k: int) -> float:
    with torch.no_grad():
        best_M1 = matcher.score(mentions, entities).total_ME.argmax(dim=1, keepdim=True)
    return recall_at(best_M1, search.candidates(mentions, k))


def test_what_lives_in_tokens_alone_is_found_by_distilled_vectors(
    matcher: Matcher, distilled: DistilledVectors
) -> None:
    """Of mentions and entities that it has never seen."""
    mentions, entities = items(200, 3), items(500, 4)
    index = EntityIndex([entities])
    by_global = CandidateSearch(GlobalVectors(matcher, CPU), index)
    assert top_1_recall(matcher, by_global, mentions, entities, k=25) < 0.2
    assert top_1_recall(matcher, CandidateSearch(distilled, index), mentions, entities, k=25) >= 0.9


def test_the_fit_is_that_of_its_seed(matcher: Matcher, distilled: DistilledVectors) -> None:
    weights = distilled.projection.state_dict()
    again, other = (fitted(matcher, seed).projection.state_dict() for seed in (0, 1))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["mentions.hidden.weight"], other["mentions.hidden.weight"])


def test_vectors_that_an_index_has_are_those_that_are_computed(matcher: Matcher, distilled: DistilledVectors) -> None:
    entities = items(40, 6)
    stored = distilled.with_vectors(entities)
    assert torch.equal(distilled.of(stored, "entities"), stored.dense(COLUMN))
    torch.testing.assert_close(distilled.of(entities.rows(slice(7, 8)), "entities")[0], stored.dense(COLUMN)[7])
    mentions, index = items(5, 7), EntityIndex([stored])
    exact_ME = matcher.double().score(mentions.cast(torch.float64), entities.cast(torch.float64)).total_ME
    matcher.float()
    links = link(matcher, mentions, index, CandidateSearch(distilled, index), k=len(entities), top=9)
    assert torch.equal(links.row_MT, exact_ME.topk(9, dim=1).indices)


def test_a_projection_is_stored_as_it_is(distilled: DistilledVectors, tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "candidates.safetensors"
    distilled.projection.save(path)
    read = Projection.load(path)
    for name, tensor in distilled.projection.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="no vectors of candidates can be read"):
        Projection.load(path)


def test_nearest_products_are_those_of_the_full_regression_cut_to_a_rank() -> None:
    """The twin regresses on all products of numbers, pair by pair, and cuts what is left of the fitted scores."""
    generator = torch.Generator().manual_seed(0)
    x_Md, y_Ef = torch.randn(30, 4, generator=generator), torch.randn(20, 3, generator=generator)
    scores_ME = torch.randn(30, 20, generator=generator)
    a_gd, b_gf = nearest_products(x_Md, y_Ef, scores_ME, rank=2)
    found_ME = (x_Md.double() @ a_gd.T) @ (y_Ef.double() @ b_gf.T).T

    x, y = x_Md.double(), y_Ef.double()
    pairs = torch.stack([torch.outer(one, other).flatten() for one in x for other in y])
    weights = torch.linalg.lstsq(pairs, scores_ME.double().reshape(-1, 1)).solution.view(4, 3)
    left, strength, right = torch.linalg.svd(x @ weights @ y.T)
    expected_ME = left[:, :2] * strength[:2] @ right[:2]
    torch.testing.assert_close(found_ME, expected_ME, atol=0.05, rtol=0.05)  # the ridge
    wide = nearest_products(x_Md, y_Ef, scores_ME, rank=9)
    assert [each.shape for each in wide] == [(9, 4), (9, 3)]
    assert not wide[0][3:].any()


def test_the_divergence_is_that_of_two_distributions() -> None:
    scores_ME, teacher_ME = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 1.0]] * 2)
    expected = []
    for scores, teacher in zip(scores_ME.double().tolist(), teacher_ME.double().tolist(), strict=True):
        p, q = (torch.tensor(each).exp() / torch.tensor(each).exp().sum() for each in (teacher, scores))
        expected.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)))
    assert listwise_divergences(scores_ME, teacher_ME).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_hardly_differed_does_not_throw_an_item_out_of_reach() -> None:
    """A column that differs by rounding alone says nothing; one that a few items differ in says a bounded amount."""
    generator = torch.Generator().manual_seed(0)
    inputs_Ed = torch.randn(400, 5, generator=generator)
    inputs_Ed[:, 3] = 1 + 2e-6 * torch.randn(400, generator=generator)
    inputs_Ed[:, 4] = 0.0
    inputs_Ed[0, 4] = 1e-3
    mentions_Md = torch.randn(80, 5, generator=generator)
    lesson = Lesson(mentions_Md, inputs_Ed, mentions_Md[:, :3] @ inputs_Ed[:, :3].T)
    network = fit_projection(lesson, 0, FitOptions(epochs=2)).entities
    usual = float(network(inputs_Ed[1:]).detach().norm(dim=1).max())
    for column, value in ((3, 2.0), (4, 5.0)):
        strange_1d = inputs_Ed[1:2].clone()
        strange_1d[0, column] = value
        assert float(network(strange_1d).detach().norm()) < 20 * usual


def test_a_fit_that_diverges_is_not_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    mentions_Md, entities_Ed = (torch.randn(n, 4, generator=generator) for n in (40, 60))
    lesson = Lesson(mentions_Md, entities_Ed, mentions_Md @ entities_Ed.T)
    projection = fit_projection(lesson, 0, FitOptions(epochs=2, learning_rate=float("inf")))
    assert projection.entities(entities_Ed).isfinite().all()
