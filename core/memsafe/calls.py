"""How a call goes, for embedding and reranking alike: check, deduplicate, queue, wait, give every row its place."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from memsafe import inputs
from memsafe.config import MemoryPolicy
from memsafe.errors import ConfigError, InputTooLargeError
from memsafe.events import EventHook, RunReport
from memsafe.runtimes import Quantization, check_engine

if TYPE_CHECKING:
    from types import TracebackType

    from memsafe.engine.engine import Engine
    from memsafe.models.ways import Way

__all__ = ["Model", "Options", "Prepare", "Work", "in_thread"]

_Result = TypeVar("_Result")

_Self = TypeVar("_Self", bound="Model")  # typing.Self came with Python 3.11


@dataclass(frozen=True)
class Options:
    """Options of one call that embedding and reranking share. model: the model's own, passed on to its modules."""

    kind: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    urgent: bool | None = None
    max_rows: int | None = None
    fixed_tokens: int | None = None
    warn: bool = True
    show_progress: bool | None = None
    progress: Callable[[int], None] | None = None
    on_report: Callable[[RunReport], object] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def told(self, report: RunReport) -> RunReport:
        """`report`, of which :attr:`on_report` has been told."""
        if self.on_report is not None:
            self.on_report(report)
        return report

    @classmethod
    def of(cls, options: dict[str, Any], taken_by_model: Callable[[], set[str]] = set) -> Options:
        """`options` of a call, checked. taken_by_model: names of options beside ours, asked for only where there are such."""
        names = [each.name for each in fields(cls) if each.name != "model"]
        own = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        if rest:
            known = taken_by_model()
            for name in rest:
                if name not in known:
                    choice = ", ".join([*names, *sorted(known)])
                    raise ConfigError(f"unknown option {name!r}; choose from {choice}")
        options = own
        if options.get("kind") not in (None, "query", "document"):
            raise ConfigError(f"kind: got {options['kind']!r}; choose 'query', 'document' or None")
        if options.get("urgent") not in (None, True, False):
            raise ConfigError(f"urgent: got {options['urgent']!r}; give True, False or None")
        if options.get("on_report") is not None and not callable(options["on_report"]):
            raise ConfigError(f"on_report: got a {type(options['on_report']).__name__}; give a callable, or None")
        if not isinstance(options.get("warn", True), bool):
            raise ConfigError(f"warn: got {options['warn']!r}; give True or False")
        for name in ("prompt", "prompt_name"):
            if options.get(name) is not None:
                if not isinstance(options[name], str):
                    raise ConfigError(f"{name}: got a {type(options[name]).__name__}; give a str or None")
                options[name] = str.__str__(options[name])
        return cls(**options, model={name: value for name, value in rest.items() if value is not None})


@dataclass(frozen=True)
class Work:
    """What a call gives the engine. values: distinct inputs as `way` encodes them; positions: of each in the caller's list, or None.

    fold: what makes rows of the caller's distinct inputs of those of `values`; None where they are the same. owners: which of
    the caller's distinct inputs each of `values` is a part of; None likewise. told: what the report says beside. spent_s: seconds of
    tokenising before the engine was asked.
    """

    values: Sequence[Any]
    way: Way
    positions: Sequence[int] | None = None
    fold: Callable[[Any], Any] | None = None
    owners: Sequence[int] | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    spent_s: float = 0.0

    def rows(self, rows: Any) -> Any:
        return rows if self.fold is None or rows is None else self.fold(rows)

    def report(self, report: RunReport) -> RunReport:
        if not self.told:
            return report
        spent = {name: getattr(report, name) + self.spent_s for name in ("tokenize_s", "total_s")}
        return replace(report, **self.told, **spent)


Prepare = Callable[[inputs.Distinct, "Way"], Work]
"""What a call does instead of giving its distinct inputs to the engine as they are."""


class Model:
    """A loaded model and the way of a call through it. Base of Embedder and Reranker."""

    _kind = ""
    _settings: dict[str, Any]
    """What the subclass was constructed with."""

    def __init__(
        self,
        model: Any,
        device: Any,
        *,
        memory: MemoryPolicy | dict[str, Any] | None,
        hooks: Sequence[EventHook],
        options: dict[str, Any],
        engine: str = "torch",
        quantization: Any = None,
        **spec: Any,
    ) -> None:
        policy = inputs.policy(memory)
        device = check_engine(engine, dtype=spec.get("dtype"), device=device, options=options)
        chosen_quantization = Quantization.of(quantization)
        names = inputs.devices(device)
        # torch is imported only now, with the allocator's settings in the environment already
        from memsafe.machine import allocator

        allocator.configure(policy.alloc_conf)
        from memsafe.models.model import ModelSpec

        chosen = ModelSpec(
            self._kind,
            inputs.model_name(model),
            _rename(options),
            engine=engine,
            quantization=chosen_quantization,
            **spec,
        )
        self._engine: Engine = self._make_engine(chosen, names, policy, hooks)
        # The device's dispatcher knows the engine, so dropping this object would not free the model by itself.
        from memsafe.engine import reaper

        weakref.finalize(self, reaper.drop, self._engine).atexit = False

    def _make_engine(
        self, spec: Any, devices: Sequence[str | None], policy: MemoryPolicy, hooks: Sequence[EventHook]
    ) -> Engine:
        """What runs this model; memsafe.testing puts a simulated one here."""
        from memsafe.engine.engine import Engine

        return Engine(spec, devices, policy, hooks)

    @property
    def model(self) -> Any:
        """The SentenceTransformer or CrossEncoder inside (the first device's copy)."""
        return self._engine.model.st

    @property
    def device(self) -> str:
        """Where the model is, in torch's words; several names are joined by a comma."""
        return ", ".join(self._engine.device_names)

    @property
    def max_length(self) -> int | None:
        """Tokens after which inputs are cut; None if the model takes any length."""
        return self._engine.model.encoder.max_length

    @property
    def memory(self) -> MemoryPolicy:
        """The policy in force."""
        return self._engine.policy

    @property
    def path(self) -> str:
        """How micro-batches run: ``"packed"``, ``"padded (why)"``, ``"one input at a time (why)"``, or ``"the model's own ... (why)"``."""
        return self._engine.model.path

    def close(self) -> None:
        """Free the model and give its memory back; calls that still wait fail. Closing twice is fine."""
        if "_engine" in vars(self):  # a copy that was never used has loaded nothing
            self._engine.close()

    # copies and pickles: the settings travel, the model is loaded where it is first used

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._settings["model"], (str, os.PathLike)):
            raise ConfigError(
                f"model: a {type(self).__name__} with a loaded model cannot be copied or pickled; make it from a folder or a "
                "hub id, which is loaded where the copy is used"
            )
        return {"_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _loading=threading.RLock())

    def __getattr__(self, name: str) -> Any:
        """What a copy lacks is there once it has loaded its model."""
        if name.startswith("__") or "_loading" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._loading:
            if "_engine" not in vars(self):
                self.__init__(**self._settings)  # type: ignore[misc]
        return object.__getattribute__(self, name)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        values: Sequence[Any],
        options: Options,
        finish: Callable[[Any], Any],
        prepare: Prepare | None = None,
        keep: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, RunReport]:
        """Rows of `values` in their order (None if there are none) and the report.

        finish: what makes results of the model's rows; used for those of an error, which has some of them. prepare: see
        :data:`Prepare`. keep: what is kept of the rows of each micro-batch, None for all as it is.
        """
        try:
            with self._engine.in_use():
                return self._run_here(values, options, finish, prepare, keep)
        except RuntimeError as error:
            _raise_interrupt(error)
            raise

    def _run_here(
        self,
        values: Sequence[Any],
        options: Options,
        finish: Callable[[Any], Any],
        prepare: Prepare | None,
        keep: Callable[[Any], Any] | None,
    ) -> tuple[Any, RunReport]:
        distinct = inputs.Distinct(values)
        engine = self._engine
        reload_s = engine.ready()
        work = _work(distinct, self._way(options), prepare)
        show = bool(options.show_progress)
        with inputs.progress_bar(len(distinct.values), show, options.progress, "text") as progress:
            job = self._open(work, options, _in_texts(progress, work, len(distinct.values)), keep)
            job.report.set(reload_s=reload_s)
            try:
                engine.announce(job)
                engine.feed(job, work.values, work.way, warn=options.warn)
                rows, report = engine.finish(job, num_texts=len(values))
            except InputTooLargeError as error:
                _spread(error, distinct, work, finish)
                raise
            except BaseException:
                job.cancel()
                raise
        return distinct.spread(work.rows(rows)), options.told(work.report(report))

    async def _arun(
        self,
        values: Sequence[Any],
        options: Options,
        finish: Callable[[Any], Any],
        prepare: Prepare | None = None,
        keep: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, RunReport]:
        with self._engine.in_use():
            return await self._arun_here(values, options, finish, prepare, keep)

    async def _arun_here(
        self,
        values: Sequence[Any],
        options: Options,
        finish: Callable[[Any], Any],
        prepare: Prepare | None,
        keep: Callable[[Any], Any] | None,
    ) -> tuple[Any, RunReport]:
        distinct = inputs.Distinct(values)
        engine = self._engine
        show = bool(options.show_progress)
        reload_s, way = await in_thread(lambda: (engine.ready(), self._way(options)))
        work = await in_thread(_work, distinct, way, prepare)
        with inputs.progress_bar(len(distinct.values), show, options.progress, "text") as progress:
            job = self._open(work, options, _in_texts(progress, work, len(distinct.values)), keep)
            job.report.set(reload_s=reload_s)
            try:
                engine.announce(job)
                await in_thread(engine.feed, job, work.values, work.way, warn=options.warn)
                await asyncio.wrap_future(job.future())
                rows, report = await in_thread(engine.finish, job, num_texts=len(values))
            except InputTooLargeError as error:
                _spread(error, distinct, work, finish)
                raise
            except BaseException:
                job.cancel()
                raise
        return distinct.spread(work.rows(rows)), options.told(work.report(report))

    def _open(
        self,
        work: Work,
        options: Options,
        progress: Callable[[int], None] | None,
        keep: Callable[[Any], Any] | None,
    ) -> Any:
        return self._engine.open(
            len(work.values),
            way=work.way,
            urgent=options.kind == "query" if options.urgent is None else options.urgent,
            max_rows=options.max_rows,
            fixed_tokens=options.fixed_tokens,
            progress=progress,
            positions=work.positions,
            keep=keep,
        )

    def _model_options(self) -> set[str]:
        """Names of call options that the model's own modules take, such as ``task``."""
        from memsafe.models import sbert

        return sbert.call_options(self.model)

    def _way(self, options: Options) -> Way:
        """As ``encode_query`` and ``encode_document`` do, `kind` is the model's ``task`` too, unless one is given."""
        from memsafe.models import sbert

        try:
            prompt = sbert.resolve_prompt(self.model, options.prompt, options.prompt_name, options.kind)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        encoder = self._engine.model.encoder
        given = sbert.with_task(self.model, options.kind, options.model, lambda given: encoder.accepts(given))
        return self._engine.way(prompt, given)


def _raise_interrupt(error: BaseException) -> None:
    """What a signal raised, where it came just as `threading.Condition.wait` had let its lock go: leaving the lock, which is no
    longer held, then ends in a RuntimeError instead (CPython 3.10 to 3.13). Any other error is left as it is: what is in its
    context may be the caller's own, which he was handling as he called us."""
    cause = error.__context__
    if "cannot release un-acquired lock" in str(error) and cause is not None and not isinstance(cause, Exception):
        raise cause from None


async def in_thread(function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """``asyncio.to_thread`` with a thread of its own: those of asyncio's default executor may all be waiting for us."""
    future: Future[_Result] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = context.run(function, *args, **kwargs)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="memsafe-call", daemon=True).start()
    return await asyncio.wrap_future(future)


def _work(distinct: inputs.Distinct, way: Way, prepare: Prepare | None) -> Work:
    return Work(distinct.values, way, distinct.positions) if prepare is None else prepare(distinct, way)


def _in_texts(progress: Callable[[int], None] | None, work: Work, num_texts: int) -> Callable[[int], None] | None:
    """`progress` told of texts where the engine tells of parts of them: by their share, and of all of them in the end."""
    if progress is None or work.owners is None:
        return progress
    lock, done = threading.Lock(), [0, 0]

    def tell(parts: int) -> None:
        with lock:
            done[0] += parts
            texts = done[0] * num_texts // len(work.values) - done[1]
            done[1] += texts
        if texts:
            progress(texts)

    return tell


def _spread(error: InputTooLargeError, distinct: inputs.Distinct, work: Work, finish: Callable[[Any], Any]) -> None:
    """Make the error of the engine's inputs one of all inputs of the call."""
    if error.partial is not None:
        error.partial = finish(distinct.spread(work.rows(error.partial)))
    failed = error.failed if work.owners is None else sorted({work.owners[place] for place in error.failed})
    error.failed = distinct.affected(failed)


def _rename(options: dict[str, Any]) -> dict[str, Any]:
    """Options for sentence-transformers, with names of both its versions accepted and unset ones left out."""
    if "tokenizer_kwargs" in options and "processor_kwargs" in options:
        raise ConfigError("processor_kwargs and tokenizer_kwargs are the same option; give one")
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in list(options.items()):
        if isinstance(value, os.PathLike):
            options[name] = os.fspath(value)
    return options
