"""``memsafe plan`` and ``memsafe doctor``: the command line of :mod:`memsafe.advice` and :mod:`memsafe.doctor`.

:func:`register` adds both to a typer application. Importing this needs typer (the extra ``cli``).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from memsafe.errors import MemsafeError

__all__ = ["doctor", "plan", "register"]


def register(app: typer.Typer) -> None:
    """Add ``plan`` and ``doctor`` to `app`."""
    app.command("plan")(plan)
    app.command("doctor")(doctor)


def plan(
    model: Annotated[str, typer.Argument(help="Folder, or hub id.")],
    device_memory: Annotated[str, typer.Option(help="What the device has, such as 16GiB.")],
    taken: Annotated[str, typer.Option(help="What others hold of it.")] = "0",
    max_length: Annotated[int | None, typer.Option(help="Tokens after which texts are cut.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or auto; as stored if left out.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A file with one text a line; .jsonl: the field 'text' of each.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Or how long they are: median=300,longest=8192,count=1000.")
    ] = None,
    rerank: Annotated[
        bool | None, typer.Option("--rerank/--embed", help="What the model is for; as it says if left out.")
    ] = None,
    reserve: Annotated[str | None, typer.Option(help="What stays free for others.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Figures for programs.")] = False,
) -> None:
    """Will a model fit, and with which settings? Nothing is loaded; the exit status is 1 if it does not fit."""
    from memsafe.advice import advise

    try:
        advice = advise(
            model,
            device_memory=device_memory,
            taken=taken,
            max_length=max_length,
            dtype=dtype,
            texts=None if texts is None else _texts(texts),
            lengths=lengths,
            rerank=rerank,
            reserve=reserve,
            device=device,
        )
    except (MemsafeError, OSError) as error:
        _fail(error)
    _say(advice.to_dict() if as_json else str(advice))
    raise typer.Exit(0 if advice.fits else 1)


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs, and for --compare on another machine.")
    ] = False,
    compare: Annotated[Path | None, typer.Option(help="A file that --json wrote on another machine.")] = None,
) -> None:
    """What this machine offers, what limits it, what is known to go wrong. The exit status is 1 if something does, or, with
    --compare, if the machines differ in what matters."""
    from memsafe import doctor as room

    found = room.examine()
    if compare is None:
        _say(found.to_dict() if as_json else str(found))
        raise typer.Exit(1 if any(each.level == "problem" for each in found.findings) else 0)
    try:
        other = json.loads(compare.read_text(encoding="utf-8"))
        if not isinstance(other, dict) or "versions" not in other:
            raise ValueError("it is not what memsafe doctor --json writes")
    except (OSError, ValueError) as error:
        _fail(f"compare: {compare.name} cannot be read: {error}")
    differences = room.compare(found.to_dict(), other)
    if as_json:
        _say([asdict(each) for each in differences])
    else:
        _say("\n".join(_line(each) for each in differences) or "No difference.")
    raise typer.Exit(1 if any(each.matters for each in differences) else 0)


def _line(difference: Any) -> str:
    matters = f" ({difference.matters})" if difference.matters else ""
    return f"{difference.where}{matters}: here {difference.one}, there {difference.other}"


def _texts(file: Path) -> list[str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    try:
        return [json.loads(line)["text"] for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(f"texts: {file.name} is no JSON Lines with a field 'text' ({type(error).__name__})") from error


def _say(content: Any) -> None:
    typer.echo(content if isinstance(content, str) else json.dumps(content, indent=1))


def _fail(error: object) -> NoReturn:
    typer.echo(str(error), err=True)
    raise typer.Exit(2)
