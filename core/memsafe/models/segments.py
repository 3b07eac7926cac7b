"""Rows as they leave a forward, on the device: dense ones are tensors; sparse ones, ragged ones, and several at once are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memsafe.attention.transfer import send
from memsafe.ragged import RaggedArray

__all__ = ["DeviceRows", "Segmented", "Several", "each", "join", "pick", "select", "sparse"]


@dataclass(frozen=True)
class Segmented:
    """Rows of different numbers of values, end to end.

    counts: int64, shape (rows,). values: of sparse rows the numbers other than zero, shape (all counts,); of ragged rows
    vectors, shape (all counts, width). columns: of sparse rows, int32, ascending in each row, like `values`; None for ragged
    ones. width: columns of a sparse row, or numbers of a ragged row's vector.
    """

    counts: Tensor
    values: Tensor
    columns: Tensor | None
    width: int

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    @staticmethod
    def ragged(rows: Sequence[Tensor]) -> Segmented:
        """`rows`, each of shape (its vectors, width), at least one."""
        counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return Segmented(counts, torch.cat(list(rows)), None, rows[0].shape[1])

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to_host(self) -> Any:
        """A ``scipy.sparse.csr_array`` of float32, or a :class:`RaggedArray` of float32."""
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts.cpu().numpy())])
        values = self.values.float().cpu().numpy()
        if self.columns is None:
            return RaggedArray(values, offsets)
        from scipy.sparse import csr_array

        columns = self.columns.cpu().numpy()
        if len(values) < 1 << 31:
            offsets = offsets.astype(np.int32)
        return csr_array((values, columns, offsets), shape=(len(self), self.width))


@dataclass(frozen=True)
class Several:
    """Outputs of one forward, by name; all have as many rows."""

    outputs: Mapping[str, DeviceRows]

    def __len__(self) -> int:
        return len(next(iter(self.outputs.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.outputs.values())).device


DeviceRows = Tensor | Segmented | Several


def sparse(rows: Tensor) -> Segmented:
    """Dense `rows`, shape (rows, width), without their zeros."""
    kept = rows != 0
    places = kept.nonzero()
    return Segmented(kept.sum(dim=1), rows[kept], places[:, 1].to(torch.int32), rows.shape[1])


def join(parts: Sequence[Any]) -> Any:
    """Rows of all `parts`, which are of one kind, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Segmented):
        columns = None if first.columns is None else torch.cat([part.columns for part in parts])
        counts, values = torch.cat([part.counts for part in parts]), torch.cat([part.values for part in parts])
        return Segmented(counts, values, columns, first.width)
    if isinstance(first, Several):
        return Several({name: join([part.outputs[name] for part in parts]) for name in first.outputs})
    return torch.cat(list(parts))


def pick(rows: Any, places: Any) -> Any:
    """The rows at `places`, integers on the host."""
    if isinstance(rows, Several):
        return Several({name: pick(each, places) for name, each in rows.outputs.items()})
    order = send(np.asarray(places), rows.device, torch.int64)
    if not isinstance(rows, Segmented):
        return rows[order]
    ends = rows.counts.cumsum(0)
    counts = rows.counts[order]
    starts = (ends - rows.counts)[order] - (counts.cumsum(0) - counts)
    taken = torch.repeat_interleave(starts, counts)
    taken += torch.arange(len(taken), device=taken.device)
    columns = None if rows.columns is None else rows.columns[taken]
    return Segmented(counts, rows.values[taken], columns, rows.width)


def each(rows: Any) -> list[Tensor]:
    """Every row as one dense tensor of one dimension; several outputs one after another."""
    if isinstance(rows, Several):
        columns = [each(outputs) for outputs in rows.outputs.values()]
        return [torch.cat([one.reshape(-1) for one in row]) for row in zip(*columns, strict=True)]
    if not isinstance(rows, Segmented):
        return [row.reshape(-1) for row in rows]
    counts = rows.counts.tolist()
    values = torch.split(rows.values, counts)
    if rows.columns is None:
        return [row.reshape(-1) for row in values]
    empty = rows.values.new_zeros(rows.width)
    return [
        empty.index_put((columns.long(),), row)
        for row, columns in zip(values, torch.split(rows.columns, counts), strict=True)
    ]


def select(rows: Any, most: int | None) -> Any:
    """Sparse `rows` with only the `most` numbers of each that are furthest from zero; None for all."""
    if most is None or not isinstance(rows, Segmented) or rows.columns is None or not len(rows.values):
        return rows
    row_of = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows.counts)
    order = rows.values.abs().argsort(descending=True, stable=True)
    order = order[row_of[order].argsort(stable=True)]  # by row, the furthest first
    starts = rows.counts.cumsum(0) - rows.counts
    rank = torch.arange(len(order), device=rows.device) - starts[row_of]
    kept = order[rank < most].sort().values
    return Segmented(rows.counts.clamp(max=most), rows.values[kept], rows.columns[kept], rows.width)
