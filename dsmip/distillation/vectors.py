"""Distilled vectors: a small network for each side, whose products imitate a model's exact scores in a search.

It reads what a matcher has prepared of an item: its global vector, its dense columns, and the means of its token rows,
plain and normalised, so that what lives in tokens alone can be imitated too. N items, d numbers that are read of an
item, h width of the bottleneck, g width of a vector.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import Side
from dsmip.errors import UserError
from dsmip.evaluation.candidates import GlobalVectors, VectorSource
from dsmip.storage.atomic import atomic_path

COLUMN = "candidate_vector"
"""Of prepared entities in an index that has their vectors."""
_FARTHEST = 20.0  # deviations from the mean
_TILE = 512  # items whose token rows are padded at a time


class SideNetwork(nn.Module):
    """Vectors of one side: a linear map and a bottleneck beside it, of standardised inputs."""

    mean_d: Tensor
    scale_d: Tensor

    def __init__(self, num_inputs: int, hidden: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_d", torch.zeros(num_inputs))
        self.register_buffer("scale_d", torch.ones(num_inputs))
        self.linear = nn.Linear(num_inputs, width)
        self.hidden = nn.Linear(num_inputs, hidden)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, inputs_Nd: Tensor) -> Tensor:
        """float32 [N, g]."""
        inputs_Nd = self.standardised(inputs_Nd)
        vectors_Ng: Tensor = self.linear(inputs_Nd) + self.out(F.gelu(self.hidden(inputs_Nd)))
        return vectors_Ng

    def standardised(self, inputs_Nd: Tensor) -> Tensor:
        """Inputs of mean 0 and variance 1 among those that it was fitted to; what never differed there is 0.

        An item that is far from all of those, as a picture is where they had none, counts as far and no more.
        """
        return ((inputs_Nd - self.mean_d) * self.scale_d).clamp(-_FARTHEST, _FARTHEST)


class Projection(nn.Module):
    """The networks of both sides."""

    def __init__(self, num_mention_inputs: int, num_entity_inputs: int, hidden: int, width: int) -> None:
        super().__init__()
        self.mentions = SideNetwork(num_mention_inputs, hidden, width)
        self.entities = SideNetwork(num_entity_inputs, hidden, width)

    def side(self, side: Side) -> SideNetwork:
        return self.mentions if side == "mentions" else self.entities

    def save(self, path: Path) -> None:
        """Writes a safetensors file atomically."""
        with atomic_path(path) as temporary:
            save_file({name: each.contiguous() for name, each in self.state_dict().items()}, temporary)

    @staticmethod
    def load(path: Path) -> "Projection":
        """Reads what `save` wrote.

        Raises:
            UserError: It is missing, damaged or something else.
        """
        try:
            tensors = load_file(path)
            hidden, num_mention_inputs = tensors["mentions.hidden.weight"].shape
            width, num_entity_inputs = tensors["entities.linear.weight"].shape
            projection = Projection(num_mention_inputs, num_entity_inputs, hidden, width)
            projection.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{path}: no vectors of candidates can be read ({first}); export the run again") from None
        return projection.eval()


class DistilledVectors(VectorSource):
    """The vectors of a projection. Entities of an index that has them are not computed again.

    Attributes:
        projection: On the device.
        base: The model's global vectors, which are read among the inputs.
    """

    def __init__(self, projection: Projection, base: GlobalVectors) -> None:
        self.projection, self.base = projection.to(base.device).eval(), base

    @torch.no_grad()
    def of(self, prepared: Table, side: Side) -> Tensor:
        if side == "entities" and COLUMN in prepared.columns:
            return prepared.dense(COLUMN).to(self.base.device).float()
        network = self.projection.side(side)
        tiles = [prepared.rows(slice(start, start + _TILE)) for start in range(0, len(prepared), _TILE)]
        return torch.cat([network(inputs_of(tile, side, self.base)) for tile in tiles])

    def with_vectors(self, entities: Table) -> Table:
        """Prepared entities with the column that holds their vectors."""
        vectors_Ng = self.of(entities, "entities")
        device = next(
            each.device if isinstance(each, Tensor) else each.values.device for each in entities.columns.values()
        )
        return entities.merged(Table({COLUMN: vectors_Ng.to(device)}))


@torch.no_grad()
def inputs_of(prepared: Table, side: Side, base: GlobalVectors) -> Tensor:
    """What is read of prepared items, float32 [N, d], on the device: each row of its own item alone."""
    inputs = [base.of(prepared, side)]
    for name in sorted(prepared.columns):
        column = prepared.columns[name]
        if isinstance(column, Ragged):
            mean_Nd = _mean_rows(column.in_use().to(base.device))
            inputs += [mean_Nd, F.layer_norm(mean_Nd, mean_Nd.shape[1:])]
            continue
        dense = prepared.dense(name)
        if dense.is_floating_point():
            inputs.append(dense.to(base.device).float().reshape(len(dense), -1))
    return torch.cat(inputs, dim=1)


def _mean_rows(tokens: Ragged) -> Tensor:
    """The mean of each item's token rows, float32 [N, d]; zeros where there is none."""
    rows_NTd, _ = tokens.cast(torch.float32).padded()
    return rows_NTd.sum(dim=1) / tokens.lengths[:, None].clamp_min(1)
