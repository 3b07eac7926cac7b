"""What :class:`MemsafeRerank` and :class:`MemsafeCrossEncoder` share: one core reranker and its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from langchain_memsafe._core import CoreModel
from langchain_memsafe._options import chosen_device, load_options, predict_options

if TYPE_CHECKING:
    import numpy as np

    from memsafe import Reranker


class RerankerModel(CoreModel):
    """The fields that a cross-encoder is loaded and called with."""

    model_name: str = Field(default="BAAI/bge-reranker-base", alias="model")
    """A cross-encoder on the hub, or a local folder."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``CrossEncoder``, such as ``device`` (a list uses several), ``max_length``, ``activation_fn``."""

    predict_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``CrossEncoder.predict``, such as ``prompt`` or ``apply_softmax``.

    ``batch_size`` caps the rows of a micro-batch; without it the planner decides."""

    long_documents: str = "truncate"
    """``"truncate"``, or documents that do not fit beside the query are read in windows and have their best
    (``"max_passage"``) or mean (``"mean_passage"``) score. ``window_overlap`` and ``max_windows`` go into `model_kwargs`."""

    show_progress: bool = False
    """Show a progress bar."""

    _built_from: ClassVar[frozenset[str]] = CoreModel._built_from | {"long_documents"}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shared.get(self._build)  # a model that cannot be loaded is refused here, as upstream does

    @property
    def reranker(self) -> Reranker:
        """The core object, for what this interface has no words for: ``reranker.run(pairs).report``, ``.num_labels``."""
        return cast("Reranker", self._shared.get(self._build))

    def _build(self) -> Reranker:
        from memsafe import Reranker  # brings torch: not needed to import this module

        self._shared.device = chosen_device(self.predict_kwargs, self.model_kwargs)
        return Reranker(
            self.model_name,
            **{**load_options(self.model_kwargs, ("long_documents",)), "device": self._shared.device},
            dtype=self.dtype,
            long_documents=self.long_documents,
            memory=self.memory,
            hooks=self.hooks,
        )

    def _options(self, reranker: Reranker) -> dict[str, Any]:
        """Options of ``Reranker.run``: someone waits for a ranking, so it goes before bulk work."""
        options = {
            **predict_options(self.predict_kwargs, device=self._shared.device, model=reranker.model),
            "urgent": True,
        }
        return {**options, "show_progress": self.show_progress}


def relevance(scores: np.ndarray) -> np.ndarray:
    """Scores, float32 ``(n,)``, from the core's ``(n,)`` or ``(n, num_labels)``.

    With more than one label the second is taken, "relevant" in the two-label models that ``HuggingFaceCrossEncoder``
    was written for (such as bert-multilingual-passage-reranking-msmarco).
    """
    if scores.ndim == 1:
        return scores
    return scores[:, 0] if scores.shape[1] == 1 else scores[:, 1]
