"""A row-sliceable table of named tensors: what encoders and `prepare` return, what the feature cache holds.

A column is a dense tensor [N, ...], a `Repeated` one (equal rows are stored once), or a `Ragged`: a variable number of
token rows per item. Slicing rows of a ragged column touches only its starts and lengths, so a table that is
memory-mapped from a file stays on disk until a batch is padded, and items that share token rows (all items without a
picture) store them once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsmip.storage.atomic import atomic_path

Rows = slice | Tensor


@dataclass(frozen=True, slots=True)
class Ragged:
    """N token sequences inside one [R, d] tensor: item n owns rows starts[n] .. starts[n] + lengths[n]."""

    values: Tensor
    starts: Tensor
    lengths: Tensor

    @staticmethod
    def from_padded(values_NTd: Tensor, mask_NT: Tensor | None = None) -> "Ragged":
        """Packs [N, T, d]; `mask_NT` marks the tokens to keep, which must come first in each row (None: all)."""
        num_items, num_tokens = values_NTd.shape[:2]
        if mask_NT is None:
            lengths = torch.full((num_items,), num_tokens, dtype=torch.int64, device=values_NTd.device)
            starts = torch.arange(num_items, device=values_NTd.device) * num_tokens
            return Ragged(values_NTd.flatten(0, 1), starts, lengths)
        lengths = mask_NT.sum(dim=1)
        return Ragged(values_NTd[mask_NT], lengths.cumsum(0) - lengths, lengths)

    def rows(self, index: Rows) -> "Ragged":
        """The chosen items; values are shared, not copied."""
        return Ragged(self.values, self.starts[index], self.lengths[index])

    def padded(self) -> tuple[Tensor, Tensor]:
        """(values [N, T, d], zero where padded; mask [N, T] bool) with T the longest length (at least 1)."""
        num_tokens = max(int(self.lengths.max()), 1) if len(self.lengths) else 1
        position_T = torch.arange(num_tokens, device=self.values.device)
        mask_NT = position_T < self.lengths[:, None]
        index_NT = (self.starts[:, None] + position_T).where(mask_NT, 0)
        return self.values[index_NT] * mask_NT[..., None], mask_NT

    def compact(self) -> "Ragged":
        """Copies only the token rows that are used, each once, in order of first start."""
        unique_starts, inverse = torch.unique(self.starts, return_inverse=True)
        length_of_unique = torch.zeros_like(unique_starts).scatter_reduce(0, inverse, self.lengths, "amax")
        new_starts = length_of_unique.cumsum(0) - length_of_unique
        offset = torch.repeat_interleave(unique_starts - new_starts, length_of_unique)
        index = torch.arange(int(length_of_unique.sum()), device=self.values.device) + offset
        return Ragged(self.values[index], new_starts[inverse], self.lengths)

    def sharing(self, alike_N: Tensor, alike: "Ragged | None" = None) -> "Ragged":
        """The same items, but those that are alike (bool [N]) have the same token rows, kept once.

        Args:
            alike: One item, whose rows they are; None: the first of those that are alike.
        """
        if not bool(alike_N.any()):
            return self
        own = self.rows(~alike_N).compact()
        shared = (alike or self.rows(alike_N.nonzero()[:1, 0])).compact()
        starts_N, lengths_N = torch.full_like(self.starts, len(own.values)), self.lengths.clone()
        starts_N[~alike_N], lengths_N[alike_N] = own.starts, shared.lengths
        return Ragged(torch.cat([own.values, shared.values]), starts_N, lengths_N)

    def to(self, device: torch.device) -> "Ragged":
        return Ragged(self.values.to(device), self.starts.to(device), self.lengths.to(device))

    def map_rows(self, transform: Callable[[Tensor], Tensor]) -> "Ragged":
        """`transform` [R, d] -> [R, e] of every token row in use; rows that items share are transformed once."""
        used = self.in_use()
        return Ragged(transform(used.values), used.starts, used.lengths)

    def in_use(self) -> "Ragged":
        """The same items without token rows that none of them uses (a slice of a table shares all of its rows)."""
        return self.compact() if len(self.values) > int(self.lengths.sum()) else self

    def cast(self, dtype: torch.dtype) -> "Ragged":
        return Ragged(self.values.to(dtype), self.starts, self.lengths)


@dataclass(frozen=True, slots=True)
class Repeated:
    """N dense rows, equal ones stored once: item n has row index[n] (int32) of values [U, ...]."""

    values: Tensor
    index: Tensor

    def rows(self, index: Rows) -> "Repeated":
        """The chosen items; values are shared, not copied."""
        return Repeated(self.values, self.index[index])

    def dense(self) -> Tensor:
        """A copy of every item's row [N, ...]."""
        return self.values[self.index]

    def compact(self) -> "Repeated":
        """Copies only the rows that are used, each once."""
        used, inverse = self.index.unique(return_inverse=True)
        return Repeated(self.values[used], inverse.int())

    def to(self, device: torch.device) -> "Repeated":
        return Repeated(self.values.to(device), self.index.to(device))

    def cast(self, dtype: torch.dtype) -> "Repeated":
        return Repeated(self.values.to(dtype), self.index)


Column = Tensor | Ragged | Repeated


_FIELDS: Mapping[type, tuple[str, ...]] = {Ragged: ("values", "starts", "lengths"), Repeated: ("values", "index")}


def _num_items(column: Column) -> int:
    by_item = column.lengths if isinstance(column, Ragged) else column.index if isinstance(column, Repeated) else column
    return by_item.shape[0]  # a third of the time of `len`, and every table asks each of its columns


@dataclass(frozen=True)
class Table:
    """Named columns of equal number of rows. `table["name"]`, `table.rows(index)`, `len(table)`."""

    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        sizes = {name: _num_items(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns differ in their number of rows: {sizes}")

    def __len__(self) -> int:
        for column in self.columns.values():
            return _num_items(column)
        return 0

    def dense(self, name: str) -> Tensor:
        """A dense column, a copy where equal rows are stored once.

        Raises:
            TypeError: It is ragged.
        """
        column = self.columns[name]
        if isinstance(column, Ragged):
            raise TypeError(f"column {name} is ragged")
        return column.dense() if isinstance(column, Repeated) else column

    def ragged(self, name: str) -> Ragged:
        """A ragged column.

        Raises:
            TypeError: It is dense.
        """
        column = self.columns[name]
        if not isinstance(column, Ragged):
            raise TypeError(f"column {name} is dense")
        return column

    def rows(self, index: Rows) -> "Table":
        """The chosen rows of every column."""
        return Table({n: c[index] if isinstance(c, Tensor) else c.rows(index) for n, c in self.columns.items()})

    def take(self, index: Rows) -> "Table":
        """The chosen rows with only the stored rows they use: what to compute on or to send to a device."""
        chosen = self.rows(index)
        return Table({n: c if isinstance(c, Tensor) else c.compact() for n, c in chosen.columns.items()})

    def distinct(self) -> tuple["Table", Tensor | None]:
        """Rows that differ, and the index of each row among them (int64 [N]): what is scored once is copied.

        (self, None) where no two rows are known to be equal: a plain column tells nothing; of a ragged one items that
        share their token rows are equal.
        """
        places: list[Tensor] = []
        for column in self.columns.values():
            if isinstance(column, Tensor):
                return self, None
            places += [column.index] if isinstance(column, Repeated) else [column.starts, column.lengths]
        if not places:
            return self, None
        index_CN = torch.stack([place_N.long() for place_N in places])
        if bool((index_CN == index_CN[0]).all()):
            index_CN = index_CN[:1]
        index_N = torch.unique(index_CN, dim=1, return_inverse=True)[1]
        num_distinct = int(index_N.max()) + 1 if len(index_N) else 0
        if num_distinct == len(self):
            return self, None
        row_N = torch.arange(len(self), device=index_N.device)
        first_U = row_N.new_zeros(num_distinct).scatter_reduce(0, index_N, row_N, "amin", include_self=False)
        return self.rows(first_U), index_N

    def to(self, device: torch.device) -> "Table":
        return Table({n: c.to(device) for n, c in self.columns.items()})

    def cast(self, dtype: torch.dtype) -> "Table":
        """Floating-point columns in another precision."""
        columns: dict[str, Column] = {}
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                columns[name] = column.to(dtype) if column.is_floating_point() else column
            else:
                columns[name] = column.cast(dtype)
        return Table(columns)

    def single(self) -> "Table":
        """With columns of half precision, in which features may be stored, as float32: what is computed with them."""

        def is_half(column: Column) -> bool:
            return (column if isinstance(column, Tensor) else column.values).dtype == torch.float16

        halves = Table({name: column for name, column in self.columns.items() if is_half(column)})
        return self.merged(halves.cast(torch.float32)) if halves.columns else self

    def under(self, prefix: str) -> "Table":
        """The columns named `prefix.*`, without the prefix."""
        start = prefix + "."
        return Table({n.removeprefix(start): c for n, c in self.columns.items() if n.startswith(start)})

    def prefixed(self, prefix: str) -> "Table":
        """Every column renamed to `prefix.<name>`."""
        return Table({f"{prefix}.{n}": c for n, c in self.columns.items()})

    def merged(self, other: "Table") -> "Table":
        """Columns of both (same rows)."""
        return Table({**self.columns, **other.columns})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, shared rows counted once."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by `column` or `column/field`."""
        tensors: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                tensors[name] = column
                continue
            for field in _FIELDS[type(column)]:
                tensors[f"{name}/{field}"] = getattr(column, field)
        return tensors

    def save(self, path: Path, metadata: Mapping[str, object] | None = None) -> None:
        """Writes a safetensors file atomically; only rows in use are written."""
        # cloned: columns may share starts and lengths, which safetensors refuses
        tensors = {
            n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for n, t in self.take(slice(None)).tensors().items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"table": json.dumps(dict(metadata or {}), sort_keys=True)})

    @staticmethod
    def load(path: Path) -> "Table":
        """Opens a saved table memory-mapped: tensors stay on disk until they are read."""
        with safe_open(path, framework="pt", device="cpu") as stored:
            return Table.of_tensors({name: stored.get_tensor(name) for name in sorted(stored.keys())})

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> "Table":
        """The table that has these `tensors`, with their order of columns."""
        columns: dict[str, Column] = {}
        for name in dict.fromkeys(name.split("/")[0] for name in tensors):
            if name in tensors:
                columns[name] = tensors[name]
                continue
            kind: type[Ragged] | type[Repeated] = Repeated if f"{name}/index" in tensors else Ragged
            columns[name] = kind(*(tensors[f"{name}/{field}"] for field in _FIELDS[kind]))
        return Table(columns)


def concatenate(tables: Sequence[Table]) -> Table:
    """Rows of all tables one after the other; all must have the same columns."""
    if not tables:
        raise ValueError("no tables to concatenate")
    columns: dict[str, Column] = {}
    for name, first in tables[0].columns.items():
        if not isinstance(first, Ragged):
            columns[name] = _joined([t.columns[name] for t in tables])
            continue
        ragged = [t.ragged(name) for t in tables]
        base, starts = 0, []
        for column in ragged:
            starts.append(column.starts + base)
            base += len(column.values)
        columns[name] = Ragged(
            torch.cat([each.values for each in ragged]), torch.cat(starts), torch.cat([each.lengths for each in ragged])
        )
    return Table(columns)


def _joined(columns: Sequence[Column]) -> Tensor | Repeated:
    """Dense columns and those of repeated rows; one of repeated rows if any column is."""
    plain = [column for column in columns if isinstance(column, Tensor)]
    if len(plain) == len(columns):
        return torch.cat(plain)
    base, index, values = 0, list[Tensor](), list[Tensor]()
    for column in (_repeated(column) for column in columns if not isinstance(column, Ragged)):
        index.append(column.index + base)
        values.append(column.values)
        base += len(column.values)
    return Repeated(torch.cat(values), torch.cat(index))


def _repeated(column: Tensor | Repeated) -> Repeated:
    if isinstance(column, Repeated):
        return column
    return Repeated(column, torch.arange(len(column), dtype=torch.int32, device=column.device))
