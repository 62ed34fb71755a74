"""One big batch on one worker against micro-batches and against workers with uneven and empty shares."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsmip import distributed
from dsmip.config import ExperimentConfig, TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Ragged, Table
from dsmip.models import find_system
from dsmip.runs.load_config import parse_config
from dsmip.training.batches import Step
from dsmip.training.gradients import batch_backward
from dsmip.units.matcher import BatchGold, Matcher, PairedItems, Scores
from tests.support.tokens import mask_to_end
from tests.support.training.workers import run_workers

CPU = torch.device("cpu")
BACKBONE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
# Mentions 0 and 3 have the same gold, and an extra negative is mention 1's gold.
GOLD_ROWS = [4, 7, 2, 4, 9]
EXTRA_ROWS = [7, 1]


class BilinearMatcher(Matcher):
    """A float64 stand-in with trainable encoders (dense and ragged features), to compare gradients closely."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(50, 6, dtype=torch.float64)
        self.images = torch.nn.Linear(12, 6, dtype=torch.float64)
        self.weight = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def encode_mentions(self, batch: ItemBatch) -> Table:
        image = torch.tanh(self.images(batch.images.flatten(1).double() / 255))
        return Table({"picture": image, "tokens": Ragged.from_padded(self.tokens(batch.token_ids), batch.token_mask)})

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self.encode_mentions(batch)

    def prepare_mentions(self, features: Table) -> Table:
        tokens_NTd, _ = features.ragged("tokens").padded()
        return Table({"vector": functional.normalize(features.dense("picture") + tokens_NTd.sum(dim=1), dim=-1)})

    def prepare_entities(self, features: Table) -> Table:
        return self.prepare_mentions(features)

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        return Scores(mentions.dense("vector") @ self.weight @ entities.dense("vector").T)

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        total_ME = self.score(mentions, entities).total_ME.masked_fill(gold.same_ME, -torch.inf)
        return functional.cross_entropy(total_ME, gold.column_M, reduction="sum")

    def encoder_trains(self) -> bool:
        return True


class GuessingMatcher(BilinearMatcher):
    """Its loss has a term of items: drawn tokens of each mention are guessed from its gold's picture."""

    @property
    def reads_items(self) -> bool:
        return True

    def item_loss(self, batch: PairedItems, rows: slice) -> Tensor:
        chance_ML = torch.rand(batch.mentions.token_ids.shape, generator=torch.Generator().manual_seed(batch.seed))
        hidden_mL = (batch.mentions.token_mask & (chance_ML < 0.5))[rows]
        golds_m6 = torch.tanh(self.images(batch.entities.images[batch.gold.column_M[rows]].flatten(1).double() / 255))
        log_p_mV = (golds_m6 @ self.tokens.weight.T).log_softmax(dim=1)
        return -(log_p_mV.gather(1, batch.mentions.token_ids[rows]) * hidden_mL).sum()


@dataclass(frozen=True)
class Case:
    """How the batch is divided: mentions and extra negatives of each worker."""

    mentions: tuple[int, ...]
    extra: tuple[int, ...]
    micro_batch_size: int | None = None
    matcher: str = "bilinear"


PLAIN = {"bilinear": BilinearMatcher, "guessing": GuessingMatcher}
SHARES = {
    "even": Case((3, 2), (1, 1)),
    "uneven": Case((4, 1), (0, 2)),
    "empty_first": Case((0, 5), (2, 0)),
    "empty_last": Case((5, 0), (2, 0)),
    "empty_micro": Case((5, 0), (1, 1), micro_batch_size=2),
    "micro": Case((4, 1), (2, 0), micro_batch_size=2),
    **{
        f"{part}_{name}": Case(shares, extra, micro, part)
        for part in ("text", "visual", "multimodal")
        for name, shares, extra, micro in (("uneven", (3, 2), (2, 0), 2), ("empty", (5, 0), (2, 0), None))
    },
}


def make_items(count: int, seed: int, size: int) -> ItemBatch:
    """Texts of different length; every third item has no picture."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(1, 49, (count, 7), generator=generator)
    token_ids[:, 0] = 49406
    for row in range(count):
        end = 2 + (row * 3) % 5
        token_ids[row, end], token_ids[row, end + 1 :] = 49407, 0
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    has_image = torch.arange(count) % 3 != 1
    images[~has_image] = 0
    return ItemBatch(token_ids, mask_to_end(token_ids), images, has_image)


def make_matcher(name: str, architecture: str) -> Matcher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name in PLAIN:
            return PLAIN[name]()
        return find_system("dsmip").build_part(name, expert_config(architecture), with_encoder=True)


def expert_config(architecture: str) -> ExperimentConfig:
    experts: dict[str, Any] = {name: {"tune": "full"} for name in ("text", "visual")}
    experts["multimodal"] = {"tune": "full", "prompt_length": 2, "prompt_depth": 2}
    system = {"experts": experts, "width": 8, "gate": {"picture": "clip"}}
    return parse_config({"model": "dsmip", "backbone": {"architecture": architecture}, "system": system})


def item_rows(items: ItemBatch, rows: list[int]) -> ItemBatch:
    return ItemBatch(items.token_ids[rows], items.token_mask[rows], items.images[rows], items.has_image[rows])


def share(case: Case, rank: int | None) -> Step:
    """One worker's part of the batch, or (rank None) the whole of it in one part, columns in another order."""
    size = 2 if case.matcher in PLAIN else 16
    mentions, kb = make_items(len(GOLD_ROWS), 1, size), make_items(10, 2, size)
    if case.matcher in PLAIN:
        mentions, kb = (ItemBatch(b.token_ids % 50, b.token_mask, b.images, b.has_image) for b in (mentions, kb))
    first = 0 if rank is None else sum(case.mentions[:rank])
    number = len(GOLD_ROWS) if rank is None else case.mentions[rank]
    own = list(range(first, first + number))
    first_extra = 0 if rank is None else sum(case.extra[:rank])
    extra = EXTRA_ROWS[first_extra : first_extra + (len(EXTRA_ROWS) if rank is None else case.extra[rank])]
    columns = [GOLD_ROWS[n] for n in own] + extra
    rows = torch.tensor([GOLD_ROWS[n] for n in own], dtype=torch.int64)
    return Step(item_rows(mentions, own), item_rows(kb, columns), rows, torch.tensor(columns, dtype=torch.int64))


def gradients(case: Case, rank: int | None, architecture: str, **settings: Any) -> dict[str, Tensor]:
    """Gradients by parameter after one step, and the loss summed over all mentions under `loss`."""
    matcher = make_matcher(case.matcher, architecture)
    config = TrainConfig(**settings)
    step = share(case, rank)
    torch.manual_seed(9)
    loss = batch_backward(matcher, step, config, CPU)
    distributed.sum_gradients(matcher.parameters())
    found = {name: p.grad for name, p in matcher.named_parameters() if p.grad is not None}
    return {**found, "loss": torch.tensor(loss.total, dtype=torch.float64)}


def gradients_of_worker(architecture: str) -> dict[str, dict[str, Tensor]]:
    found = {
        name: gradients(case, distributed.rank(), architecture, micro_batch_size=case.micro_batch_size)
        for name, case in SHARES.items()
    }
    guessing = replace(SHARES["empty_micro"], matcher="guessing")
    found["guessing"] = gradients(guessing, distributed.rank(), architecture, micro_batch_size=2)
    for name in ("even", "empty_last"):
        found[f"local_{name}"] = gradients(SHARES[name], distributed.rank(), architecture, negatives="local")
    return found


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone") / "gradients.json"
    path.write_text(json.dumps(BACKBONE))
    return str(path)


@pytest.fixture(scope="module")
def workers(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    return list(run_workers(gradients_of_worker, 2, tmp_path_factory.mktemp("workers"), architecture))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert found.keys() - {"loss"} >= expected.keys() - {"loss"}
    for name in expected.keys() - {"loss"}:
        scale = max(float(expected[name].abs().max()), 1e-4)
        error = float((found[name] - expected[name]).abs().max())
        assert error <= relative * scale, f"{name} is off by {error} of {scale}"


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(architecture: str, size: int) -> None:
    case = SHARES["even"]
    expected = gradients(case, None, architecture)
    found = gradients(case, None, architecture, micro_batch_size=size)
    assert len(expected) == 5
    assert_same_gradients(found, expected, 1e-12)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_loss_of_items_is_the_same_in_micro_batches(architecture: str, size: int) -> None:
    """Its draws are of the whole batch, and all of it is in the loss that is reported."""
    case = replace(SHARES["even"], matcher="guessing")
    expected, plain = gradients(case, None, architecture), gradients(SHARES["even"], None, architecture)
    found = gradients(case, None, architecture, micro_batch_size=size)
    assert_same_gradients(found, expected, 1e-12)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert float(expected["loss"]) > float(plain["loss"]) + 1
    assert not torch.allclose(expected["images.weight"], plain["images.weight"])


@pytest.mark.slow
def test_a_loss_of_items_is_of_all_workers_shares(
    workers: list[dict[str, dict[str, Tensor]]], architecture: str
) -> None:
    """One of which has no mention; the other's share is then all of it."""
    expected = gradients(replace(SHARES["empty_micro"], matcher="guessing"), None, architecture)
    for worker in workers:
        assert_same_gradients(worker["guessing"], expected, 1e-12)
        assert float(worker["guessing"]["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-12)


@pytest.mark.parametrize("part", ["text", "visual", "multimodal"])
def test_micro_batches_of_an_expert(architecture: str, part: str) -> None:
    case = Case((5,), (2,), matcher=part)
    expected = gradients(case, None, architecture)
    assert any("backbone" in name and float(g.abs().max()) > 0 for name, g in expected.items())
    assert_same_gradients(gradients(case, None, architecture, micro_batch_size=3), expected, 1e-3)


@pytest.mark.parametrize("name", SHARES)
def test_workers_give_the_gradient_of_the_whole_batch(
    workers: list[dict[str, dict[str, Tensor]]], architecture: str, name: str
) -> None:
    expected = gradients(SHARES[name], None, architecture)
    relative = 1e-12 if SHARES[name].matcher == "bilinear" else 1e-3
    for worker in workers:
        assert_same_gradients(worker[name], expected, relative)
        assert float(worker[name]["loss"]) == pytest.approx(float(expected["loss"]), rel=relative)
    assert torch.equal(workers[0][name]["loss"], workers[1][name]["loss"])


@pytest.mark.parametrize("name", ["even", "empty_last"])
def test_local_negatives_sum_the_workers_own_batches(
    workers: list[dict[str, dict[str, Tensor]]], architecture: str, name: str
) -> None:
    """Each worker contrasts with its own columns, and the mean is over the mentions of all."""
    expected: dict[str, Tensor] = {}
    for rank, num_mentions in enumerate(SHARES[name].mentions):
        for key, gradient in gradients(SHARES[name], rank, architecture).items():
            weighted = gradient * num_mentions / len(GOLD_ROWS)
            expected[key] = expected[key] + weighted if key in expected else weighted
    for worker in workers:
        assert_same_gradients(worker[f"local_{name}"], expected, 1e-12)


def test_the_gradient_is_that_of_the_mean_loss_without_same_gold_pairs(architecture: str) -> None:
    """Against autograd over scores computed pair by pair, with each mention's negatives listed by hand."""
    step = share(SHARES["even"], None)
    matcher = make_matcher("bilinear", architecture)
    batch_backward(matcher, step, TrainConfig(), CPU)
    found = {name: p.grad for name, p in matcher.named_parameters()}
    twin = make_matcher("bilinear", architecture)
    assert isinstance(step.mentions, ItemBatch)
    assert isinstance(step.entities, ItemBatch)
    mentions = twin.prepare_mentions(twin.encode_mentions(step.mentions))
    scores = twin.score(mentions, twin.prepare_entities(twin.encode_entities(step.entities))).total_ME
    # columns: golds of mentions 0 .. 4, then two more entities; 0 and 3 share theirs, column 5 is 1's gold again
    columns = {0: [0, 1, 2, 4, 5, 6], 1: [1, 0, 2, 3, 4, 6], 2: [2, 0, 1, 3, 4, 5, 6], 3: [3, 1, 2, 4, 5, 6]}
    columns[4] = [4, 0, 1, 2, 3, 5, 6]
    losses = [torch.logsumexp(scores[m, chosen], dim=0) - scores[m, m] for m, chosen in columns.items()]
    torch.stack(losses).mean().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-14, rtol=1e-10)


def test_cached_features_get_no_gradient(architecture: str) -> None:
    """A step of table rows trains what comes after the towers."""
    matcher = make_matcher("text", architecture)
    items = share(Case((5,), (2,), matcher="text"), None)
    assert isinstance(items.mentions, ItemBatch)
    assert isinstance(items.entities, ItemBatch)
    with torch.no_grad():
        tables = matcher.encode_mentions(items.mentions), matcher.encode_entities(items.entities)
    cached = Step(*tables, items.gold_row_M, items.entity_row_E)
    loss = batch_backward(matcher, cached, TrainConfig(micro_batch_size=2), CPU)
    expected = gradients(Case((5,), (2,), matcher="text"), None, architecture)
    assert (loss.total, loss.num_mentions) == (pytest.approx(float(expected.pop("loss")), rel=1e-5), 5)
    found = {name: p.grad for name, p in matcher.named_parameters() if p.grad is not None}
    assert found
    assert not any(".backbone." in name for name in found)
    assert_same_gradients(found, {name: g for name, g in expected.items() if name in found}, 1e-3)


@pytest.mark.parametrize("name", ["bilinear", "multimodal"])
def test_a_batch_without_mentions_moves_nothing(architecture: str, name: str) -> None:
    """All of its mentions may be held out."""
    step = share(Case((0, 5), (2, 0), matcher=name), 0)
    matcher = make_matcher(name, architecture)
    assert batch_backward(matcher, step, TrainConfig(), CPU).mean == 0.0
    assert all(p.grad is None or not p.grad.any() for p in matcher.parameters())


class ForgetfulMatcher(BilinearMatcher):
    """Its towers have dropout, and keep what they said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Tensor] = []

    def encode_mentions(self, batch: ItemBatch) -> Table:
        features = super().encode_mentions(batch)
        dropped = functional.dropout(features.dense("picture"), 0.5, self.training)
        self.said.append(dropped.detach())
        return Table({**features.columns, "picture": dropped})


def test_dropout_draws_the_same_when_gradients_are_carried_back() -> None:
    """What is left out of a batch's features gets no gradient either: both passes leave out the same."""
    torch.manual_seed(1)
    matcher = ForgetfulMatcher().train()
    step = share(Case((5,), (2,)), None)
    before = torch.get_rng_state()
    batch_backward(matcher, step, TrainConfig(micro_batch_size=2), CPU)
    first, again = matcher.said[: len(matcher.said) // 2], matcher.said[len(matcher.said) // 2 :]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    with torch.no_grad():
        for items in (step.mentions, step.entities):
            assert isinstance(items, ItemBatch)
            for start in range(0, len(items), 2):
                matcher.encode_mentions(items.rows(start, start + 2))
    assert torch.equal(torch.get_rng_state(), drawn)  # the second pass draws nothing more
