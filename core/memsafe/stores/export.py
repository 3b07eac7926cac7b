"""A store's rows as a Parquet or Arrow file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsafe.errors import ConfigError, MissingExtraError, StoreError
from memsafe.stores.shards import Array, Id

__all__ = ["export"]


def export(batches: Iterator[tuple[Sequence[Id], Array]], path: Path, dimension: int, dtype: str, *, ids: str) -> int:
    """Write `batches` of (ids, rows) to `path`; returns how many rows. It is there as a whole or not at all."""
    kind = path.suffix.lower()
    if kind not in (".parquet", ".arrow", ".feather"):
        raise ConfigError(f"path: got {path.name!r}; give a name that ends in .parquet, .arrow or .feather")
    try:
        arrow = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'pyarrow is not installed; run: pip install "memsafe[arrow]"', name="pyarrow"
        ) from error
    first = next(batches, None)
    id_type = arrow.string() if ids == "str" else arrow.int64()
    width = arrow.list_(arrow.float32() if dtype == "float32" else arrow.float16(), dimension)
    schema = arrow.schema([("id", id_type), ("embedding", width)])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with _writer(kind, temporary, schema) as writer:
            while first is not None:
                names, rows = first
                flat = arrow.array(np.ascontiguousarray(rows).reshape(-1))
                columns = [arrow.array(list(names), id_type), arrow.FixedSizeListArray.from_arrays(flat, type=width)]
                writer.write_batch(arrow.record_batch(columns, schema=schema))
                count += len(rows)
                first = next(batches, None)
        os.replace(temporary, path)
    except (OSError, arrow.ArrowException) as error:
        raise StoreError(f"{path} cannot be written: {error}", path=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _writer(kind: str, path: Path, schema: Any) -> Any:
    if kind == ".parquet":
        return importlib.import_module("pyarrow.parquet").ParquetWriter(path, schema)
    return importlib.import_module("pyarrow.ipc").new_file(str(path), schema)
