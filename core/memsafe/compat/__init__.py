"""Doors for programs written for other libraries: :class:`SentenceTransformer` and :class:`CrossEncoder`.

-from sentence_transformers import SentenceTransformer
+from memsafe.compat import SentenceTransformer

Importing this imports torch.
"""

from __future__ import annotations

from memsafe.compat.sentence_transformers import CrossEncoder, SentenceTransformer

__all__ = ["CrossEncoder", "SentenceTransformer"]
