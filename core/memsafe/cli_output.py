"""What every command shares: errors in a line, JSON for scripts, a bar, Ctrl-C. Needs the extra ``cli``."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memsafe.config import format_bytes
from memsafe.errors import (
    ConfigError,
    InputError,
    InputTooLargeError,
    MemsafeError,
    MissingExtraError,
    ModelTooLargeError,
    StoreError,
)
from memsafe.events import Event, MicroBatchDone

if TYPE_CHECKING:
    from memsafe.stores.reports import CorpusProgress

__all__ = [
    "DAMAGED",
    "INTERRUPTED",
    "AsJson",
    "MemoryHook",
    "StorePath",
    "print_json",
    "print_table",
    "safe",
    "say",
    "say_how_to_resume",
    "say_report",
    "shown",
    "shown_value",
    "stoppable",
    "told",
]

DAMAGED, INTERRUPTED = 5, 130
_CODES: tuple[tuple[type[MemsafeError], int], ...] = (
    (ModelTooLargeError, 6),
    (InputTooLargeError, 6),
    (ConfigError, 2),
    (MissingExtraError, 2),
    (InputError, 3),
    (StoreError, 4),
)

Command = TypeVar("Command", bound=Callable[..., Any])

AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, errors included; for scripts.")
]
StorePath = Annotated[Path, typer.Argument(help="The folder of the store.", show_default=False)]


def told(command: Command) -> Command:
    """A command whose errors of ours are one line, or one JSON object with ``--json``, and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except MemsafeError as error:
            if options.get("as_json"):
                print_json({"error": {"type": type(error).__name__, "message": str(error), **_plain(error.details)}})
            else:
                Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {safe(str(error))}", highlight=False)
            raise typer.Exit(next((code for kind, code in _CODES if isinstance(error, kind)), 1)) from error

    return wrapped  # type: ignore[return-value]


class MemoryHook:
    """A hook that keeps what the last micro-batch took."""

    used_bytes = budget_bytes = 0

    def __call__(self, event: Event, /) -> None:
        if isinstance(event, MicroBatchDone):
            self.used_bytes, self.budget_bytes = event.measured_bytes or event.predicted_bytes, event.budget_bytes

    def __str__(self) -> str:
        return f"{format_bytes(self.used_bytes)} of {format_bytes(self.budget_bytes)}" if self.budget_bytes else ""


@contextmanager
def shown(memory: MemoryHook, *, quiet: bool) -> Iterator[Callable[[CorpusProgress], None]]:
    """What to call with how far a run is: a bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("texts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, rates="")

        def show(now: CorpusProgress) -> None:
            left = "" if now.left_s is None else f"{_duration(now.left_s)} left"
            rates = "  ".join(each for each in (f"{now.tokens_per_s:,.0f} tokens/s", str(memory), left) if each)
            bar.update(task, completed=now.texts, total=now.total, rates=rates)

        yield show


@contextmanager
def stoppable(store: Path, *, update: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C has been pressed; pressed twice, the process ends at once. What is finished is on the disk by then."""
    pressed = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            say_how_to_resume(store, update=update)
            os._exit(INTERRUPTED)
        pressed = True
        print("stopping after the block in progress; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def say_how_to_resume(store: Path, *, update: bool) -> None:
    option = "--update" if update else "--resume"
    print(f"{store} is not complete; run the same command with {option} to go on", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


def print_table(header: list[str] | None, rows: list[list[str]]) -> None:
    table = Table(*(header or ["", ""]), show_header=header is not None, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(safe, row))
    Console(soft_wrap=True).print(table, highlight=False)


def say(text: str) -> None:
    """`text` on standard output."""
    Console(soft_wrap=True).print(safe(text), highlight=False)


def say_report(report: Any, *pictures: Any) -> None:
    """`pictures` and `report` as rich draws them, where standard output is a terminal; elsewhere the lines of `report`."""
    console = Console()
    if console.is_terminal:
        console.print(*pictures, report, sep="\n")
    else:
        say(str(report))


def safe(text: str) -> str:
    """Without rich's markup: ids and paths may hold brackets."""
    return text.replace("[", "\\[")


def shown_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items() if part not in (None, "", {}))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(details: dict[str, Any]) -> dict[str, Any]:
    """Details of an error that JSON can hold; rows that were finished are not among them."""
    return {
        name: value for name, value in details.items() if isinstance(value, (str, int, float, list, bool, type(None)))
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
