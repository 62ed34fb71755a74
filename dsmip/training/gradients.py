"""The gradient of one batch, equal to that of one big batch whatever the workers and micro-batches.

A batch's mentions and entities come either as raw items (towers train, so they are encoded here) or as rows of the
feature cache (towers frozen). Every worker encodes and prepares its own; what a pair needs of entities is gathered over
workers, and their gradients go back to whose they are. Micro-batches use cached gradients (Gao et al., 2021).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import TrainConfig
from dsmip.data.collate import ItemBatch
from dsmip.data.table import Column, Ragged, Table, concatenate
from dsmip.training.batches import Items, Step
from dsmip.units.matcher import BatchGold, Matcher, PairedItems


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """Sum of the losses of a batch's mentions and their number, over all workers: equal on each."""

    total: float
    num_mentions: int

    @property
    def mean(self) -> float:
        return self.total / max(self.num_mentions, 1)  # a batch may have no mention at all


def batch_backward(
    matcher: Matcher,
    step: Step,
    config: TrainConfig,
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> BatchLoss:
    """Accumulates the gradient of the whole batch's mean loss, which is returned.

    With `micro_batch_size` the towers run twice over small slices: once without a graph for the features, once to carry
    the features' gradients back, with the same random draws (dropout), else the passes would differ.
    """
    mentions, replay_mentions = _features(matcher.encode_mentions, step.mentions, config, device)
    entities, replay_entities = _features(matcher.encode_entities, step.entities, config, device)
    gold_row_M, entity_row_E = step.gold_row_M.to(device), step.entity_row_E.to(device)
    column_M = torch.arange(len(gold_row_M), device=device)
    items = _paired(step, mentions, entities, device) if matcher.reads_items else None
    prepared = matcher.loss_mentions(mentions), matcher.loss_entities(entities)
    columns, hand_back = prepared[1], _nothing
    if config.negatives == "gathered" and distributed.world_size() > 1:
        columns, entity_row_E, first, hand_back = _gathered(columns, entity_row_E)
        column_M = column_M + first
    gold = BatchGold.from_rows(gold_row_M, entity_row_E, column_M)
    loss_sum = matcher.loss(prepared[0], columns, gold)
    own = torch.stack([loss_sum.detach().double(), loss_sum.new_tensor(len(gold_row_M), dtype=torch.float64)])
    totals = distributed.sum_over_workers(own)
    scale(loss_sum / totals[1].clamp_min(1).to(loss_sum.dtype)).backward()
    hand_back()
    replay_mentions()
    replay_entities()
    if items is not None:
        count = totals[1].clamp_min(1)
        added = _item_backward(matcher, items, config, device, lambda loss: scale(loss / count.to(loss.dtype)))
        totals = totals + distributed.sum_over_workers(torch.stack([added, torch.zeros_like(added)]))
    total, num_mentions = totals.tolist()  # waits for the device, so it comes after all work is on its way there
    return BatchLoss(total, int(num_mentions))


def _paired(step: Step, mentions: Table, entities: Table, device: torch.device) -> PairedItems:
    """A worker's share of a batch, for a loss of its items."""
    assert not isinstance(step.mentions, Table)
    assert not isinstance(step.entities, Table)
    gold_row_M = step.gold_row_M.to(device)
    own_M = torch.arange(len(gold_row_M), device=device)
    return PairedItems(
        step.mentions.to(device),
        step.entities.to(device),
        _detached(mentions),
        _detached(entities),
        BatchGold.from_rows(gold_row_M, step.entity_row_E.to(device), own_M),
        int(torch.randint(2**62, ())),
    )


def _item_backward(
    matcher: Matcher,
    items: PairedItems,
    config: TrainConfig,
    device: torch.device,
    scaled: Callable[[Tensor], Tensor],
) -> Tensor:
    """Accumulates the gradient of the items' loss, some mentions after the others; the loss itself, float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = len(items.mentions)
    size = config.micro_batch_size or max(count, 1)
    for start in range(0, count, size):
        with autocast(config, device):
            loss = matcher.item_loss(items, slice(start, min(start + size, count)))
        scaled(loss).backward()
        total += loss.detach()
    return total


def _features(
    encode: Callable[[ItemBatch], Table], items: Items, config: TrainConfig, device: torch.device
) -> tuple[Table, Callable[[], None]]:
    """Features of a batch, and what to call after backward (re-encoding of micro-batches, or nothing)."""
    if isinstance(items, Table):
        return items.to(device).single(), _nothing
    size = config.micro_batch_size or len(items)
    with autocast(config, device):
        if size >= len(items):
            return encode(items.to(device)), _nothing
        with torch.no_grad():
            slices = [items.rows(start, start + size).to(device) for start in range(0, len(items), size)]
            states, tables = [], []
            for rows in slices:
                states.append(_random_state(device))
                tables.append(_as_leaves(encode(rows)))

    def replay() -> None:
        for rows, state, leaves in zip(slices, states, tables, strict=True):
            with autocast(config, device), _drawing_again(state, device):
                features = encode(rows)
            _backward(features, [leaf.grad for leaf in _floats(leaves)])

    return concatenate(tables), replay


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the generators that layers on a device draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _drawing_again(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draws are those that followed a state; afterwards all goes on as if there had been none."""
    cpu, cuda = state
    with torch.random.fork_rng(devices=[] if cuda is None else [device]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _gathered(own: Table, entity_row_E: Tensor) -> tuple[Table, Tensor, int, Callable[[], None]]:
    """Prepared entities of all workers in rank order, with their kb rows and how many stand before this worker's.

    The last is what to call after backward, so that each worker's rows get their whole gradient. The collectives stay
    out of the graph: a worker with an empty share uses fewer columns than the others, and they would wait for it.
    """
    named = own.tensors()
    everyone = distributed.gather_tensors([entity_row_E, *named.values()])
    tables = [_as_leaves(Table.of_tensors(dict(zip(named, tensors, strict=True)))) for _, *tensors in everyone]

    def hand_back() -> None:
        parts = [[_gradient(leaf) for leaf in _floats(table)] for table in tables]
        _backward(own, distributed.sum_own_parts(parts))

    before = sum(len(rows) for rows, *_ in everyone[: distributed.rank()])
    return concatenate(tables), torch.cat([rows for rows, *_ in everyone]), before, hand_back


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _backward(features: Table, gradients: Sequence[Tensor | None]) -> None:
    """Carries gradients of the floating-point columns on to what made them."""
    pairs = [
        (values, gradient)
        for values, gradient in zip(_floats(features), gradients, strict=True)
        if gradient is not None and values.requires_grad
    ]
    if pairs:
        torch.autograd.backward([values for values, _ in pairs], [gradient for _, gradient in pairs])


def _nothing() -> None:
    """What is left to do after backward where features come straight from their encoder."""


def _detached(features: Table) -> Table:
    columns: dict[str, Column] = {}
    for name, column in features.columns.items():
        if isinstance(column, Ragged):
            columns[name] = Ragged(column.values.detach(), column.starts, column.lengths)
        else:
            columns[name] = features.dense(name).detach()
    return Table(columns)


def _as_leaves(features: Table) -> Table:
    leaves = _detached(features)
    for values in _floats(leaves):
        values.requires_grad_()
    return leaves


def _floats(features: Table) -> list[Tensor]:
    tensors = [c if isinstance(c, Tensor) else c.values for c in features.columns.values()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast | nullcontext[None]:
    """Of the towers, in the precision that a training has."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float16)
