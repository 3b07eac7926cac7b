"""Rows of every kind reach their places, whatever the order and the pieces that they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from memsafe.engine.sinks import Outputs, RowWriter, finite, replaced
from memsafe.ragged import RaggedArray

RANDOM = np.random.default_rng(0)
DENSE = RANDOM.normal(size=(9, 4)).astype(np.float32)
SPARSE = csr_array(np.where(RANDOM.random((9, 12)) < 0.3, RANDOM.normal(size=(9, 12)), 0).astype(np.float32))
RAGGED = RaggedArray.of([RANDOM.normal(size=(count, 3)).astype(np.float32) for count in (2, 0, 5, 1, 1, 0, 3, 2, 4)])
EVERY = Outputs({"dense": DENSE, "sparse": SPARSE, "ragged": RAGGED})


def same(one: Any, other: Any) -> None:
    if isinstance(one, Outputs):
        assert list(one.named) == list(other.named)
        for name in one.named:
            same(one.named[name], other.named[name])
    elif isinstance(one, RaggedArray):
        assert np.array_equal(one.counts, other.counts)
        assert np.array_equal(
            one.values[one.offsets[0] : one.offsets[-1]], other.values[other.offsets[0] : other.offsets[-1]]
        )
    elif isinstance(one, csr_array):
        assert one.shape == other.shape and one.dtype == other.dtype == np.float32
        assert np.array_equal(one.toarray(), other.toarray())
    else:
        assert np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("rows", [DENSE, SPARSE, RAGGED, EVERY], ids=["dense", "sparse", "ragged", "several"])
def test_rows_reach_their_places(rows: Any) -> None:
    """Pieces in any order give the rows in theirs, and taking rows of the result takes those rows."""
    writer = RowWriter(9)
    assert writer.array is None
    for places in ([7, 2, 0], [8], [], [1, 3, 6, 5, 4]):
        writer.write(places, rows[np.array(places, dtype=np.int64)])
    same(writer.array, rows)
    same(writer.array[np.array([3, 3, 0])], rows[np.array([3, 3, 0])])


@pytest.mark.parametrize("rows", [SPARSE, RAGGED], ids=["sparse", "ragged"])
def test_rows_that_never_came_are_empty(rows: Any) -> None:
    """Where some inputs did not fit, the others' rows are there, and theirs are empty; dense ones would be NaN."""
    writer = RowWriter(9)
    writer.write([6, 0], rows[np.array([6, 0])])
    found = writer.array
    same(found[np.array([0, 6])], rows[np.array([0, 6])])
    counts = np.diff(found.indptr) if isinstance(found, csr_array) else found.counts
    assert counts[[1, 2, 3, 4, 5, 7, 8]].sum() == 0


@pytest.mark.parametrize("rows", [DENSE, SPARSE, RAGGED, EVERY], ids=["dense", "sparse", "ragged", "several"])
def test_rows_that_are_no_numbers_are_found_and_replaced(rows: Any) -> None:
    """A NaN in any output of a row is found; other rows stay as they are when it is replaced."""
    assert finite(rows).all()
    spoilt = rows[np.arange(9)]
    part = spoilt.named["ragged"] if isinstance(spoilt, Outputs) else spoilt
    if isinstance(part, RaggedArray):
        part.values[part.offsets[6]] = np.nan
    elif isinstance(part, csr_array):
        part.data[part.indptr[6]] = np.inf
    else:
        part[6, 2] = np.nan
    assert np.flatnonzero(~finite(spoilt)).tolist() == [6]
    same(replaced(spoilt, np.array([6]), rows[np.array([6])]), rows)


def test_ragged_arrays() -> None:
    """A row is a view, a slice shares the values, places are copied; lengths and bounds are checked."""
    assert len(RAGGED) == 9 and RAGGED.dim == 3 and RAGGED.counts.tolist() == [2, 0, 5, 1, 1, 0, 3, 2, 4]
    assert RAGGED[2].shape == (5, 3) and np.shares_memory(RAGGED[2], RAGGED.values) and RAGGED[-1].shape == (4, 3)
    assert np.shares_memory(RAGGED[2:5].values, RAGGED.values) and RAGGED[2:5].counts.tolist() == [5, 1, 1]
    assert RAGGED[5:2].counts.tolist() == [] and RAGGED[::2].counts.tolist() == [2, 5, 1, 3, 4]
    same(RAGGED[[8, 0]], RaggedArray.of([RAGGED[8], RAGGED[0]]))
    assert [len(row) for row in RAGGED] == RAGGED.counts.tolist()
    with pytest.raises(IndexError):
        RAGGED[9]
    for values, offsets in (
        (RAGGED.values, [0, 3, 2]),
        (RAGGED.values, [0, 99]),
        (RAGGED.values[0], [0, 1]),
        (RAGGED.values, []),
    ):
        with pytest.raises(ValueError, match="offsets"):
            RaggedArray(values, offsets)
    assert RaggedArray.of([], dim=5).dim == 5
