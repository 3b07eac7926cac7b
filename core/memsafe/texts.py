"""How calls of models go that make of each text something else than one dense row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from memsafe import inputs
from memsafe.calls import Model, Options, in_thread
from memsafe.errors import ConfigError
from memsafe.events import RunReport

__all__ = ["TextModel", "identity_of"]

_Run = TypeVar("_Run")


class TextModel(Model, Generic[_Run]):
    """What such models share: checks, options of a call, asyncio."""

    _show_progress = False

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that the model saved, by name."""
        return dict(getattr(self.model, "prompts", None) or {})

    def run(self, texts: Sequence[str], **options: Any) -> _Run:
        """Embed `texts` and report what it took.

        Options, all optional: kind, prompt, prompt_name, urgent, max_rows, fixed_tokens, warn, show_progress, progress and what the
        model's own modules take, as for :meth:`memsafe.Embedder.run`; and those of the class.

        Raises:
            InputError: a text is not a str, with its index. ConfigError: an option is unknown.
            InputTooLargeError: a text does not fit alone; what was finished is in its ``partial``, other rows being empty.
        """
        call, keep = self._call(options)
        rows, report = self._run(inputs.check_texts(texts), call, _as_it_is, keep=keep)
        return self._finish(rows, report)

    async def arun(self, texts: Sequence[str], **options: Any) -> _Run:
        """:meth:`run` for asyncio; cancelling the task cancels the work."""
        call, keep = self._call(options)
        rows, report = await self._arun(inputs.check_texts(texts), call, _as_it_is, keep=keep)
        return await in_thread(self._finish, rows, report)

    def identity(self, **options: Any) -> dict[str, Any]:
        """What decides the rows of a call with these options of :meth:`run`, beside the texts: as
        :meth:`memsafe.Embedder.identity`, and the options of the class."""
        own = self._decisive(options)
        self._keep(options)
        return {**identity_of(self, Options.of(options, self._model_options)), **own}

    def _decisive(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of a call's options those of the class that decide its rows, and ``dimension``; ready for JSON."""
        raise NotImplementedError

    def _call(self, options: dict[str, Any]) -> tuple[Options, Callable[[Any], Any] | None]:
        keep = self._keep(options)
        if options.get("show_progress") is None:
            options["show_progress"] = self._show_progress
        return Options.of(options, self._model_options), keep

    def _keep(self, options: dict[str, Any]) -> Callable[[Any], Any] | None:
        """Take the options of the class out of `options`; returns what is kept of the rows of each micro-batch, None for all
        as it is."""
        raise NotImplementedError

    def _finish(self, rows: Any, report: RunReport) -> _Run:
        """rows: None if there was no text."""
        raise NotImplementedError


def identity_of(model: Model, given: Options) -> dict[str, Any]:
    """What decides rows of `model`, whatever they are, beside the texts."""
    from memsafe.models import sbert

    loaded = model._engine.model
    try:
        prompt = sbert.resolve_prompt(model.model, given.prompt, given.prompt_name, given.kind)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {
        "model": loaded.content,
        "dtype": loaded.dtype_name,
        "max_length": model.max_length,
        "kind": given.kind,
        "prompt": prompt or "",
        "model_options": {name: str(value) for name, value in sorted(given.model.items())},
    }


def _as_it_is(rows: Any) -> Any:
    return rows
