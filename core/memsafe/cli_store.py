"""``memsafe store``: look after a store of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memsafe.cli_output import DAMAGED, AsJson, StorePath, print_json, print_table, say, shown_value, told
from memsafe.config import format_bytes

__all__ = ["store_app"]

store_app = typer.Typer(no_args_is_help=True, help="Look after a store of embeddings.")


@store_app.command()
@told
def info(store: StorePath, as_json: AsJson = False) -> None:
    """Say what a store holds, and what made it."""
    from memsafe.corpus import open_store

    found = open_store(store).info
    if as_json:
        print_json(found)
    else:
        rows = [[name, format_bytes(value) if name == "bytes" else shown_value(value)] for name, value in found.items()]
        print_table(None, rows)


@store_app.command()
@told
def verify(store: StorePath, as_json: AsJson = False) -> None:
    """Read everything and compare it with its checksums. Exit code 5 if something is damaged."""
    from memsafe.corpus import open_store

    found = open_store(store).verify()
    if as_json:
        print_json(
            {
                "ok": found.ok,
                "rows": found.rows,
                "blocks": found.blocks,
                "bytes": found.num_bytes,
                "problems": found.problems,
            }
        )
    else:
        what = f"{found.rows:,} rows in {found.blocks:,} blocks, {format_bytes(found.num_bytes)}"
        say("\n".join([what, *(found.problems or ["all of it is as it was written"])]))
    if not found.ok:
        raise typer.Exit(DAMAGED)


@store_app.command()
@told
def export(
    store: StorePath,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new .parquet, .arrow or .feather file.")],
    as_json: AsJson = False,
) -> None:
    """Write ids and rows to a Parquet or Arrow file."""
    from memsafe.corpus import open_store

    count = open_store(store).export(output)
    if as_json:
        print_json({"rows": count, "path": str(output)})
    else:
        say(f"{count:,} rows in {output}")
