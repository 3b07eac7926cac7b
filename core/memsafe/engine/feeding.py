"""From a call's inputs to its queue: tokenised in pieces, while the devices compute what is tokenised already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from memsafe.engine.jobs import Backlog, Job
from memsafe.errors import InputError
from memsafe.models.ways import Encoded, Unfit, Way
from memsafe.planning.batch import TokenizedInput
from memsafe.planning.order import pieces

__all__ = ["failure", "feed"]


def feed(
    backlog: Backlog,
    job: Job,
    inputs: Sequence[Any],
    way: Way,
    max_pending: int | None,
    learning: Callable[[], bool] = lambda: False,
) -> int:
    """Tokenise `inputs` and put them in the job's queue. Returns how many were cut at the model's length.

    learning: whether a device can use a sample of all texts; see :func:`memsafe.planning.order.pieces`.

    What goes wrong ends the job: an :class:`InputError` names the input by its place in the caller's list.
    """
    chars = [_chars(value) for value in inputs]
    truncated = 0
    fixed, gathered = job.key.fixed is not None, list[TokenizedInput]()
    for chunk in pieces(chars, (lambda: False) if fixed else learning):
        if job.done:
            break
        started = time.perf_counter()
        try:
            encoded = way.encode([inputs[i] for i in chunk])
        except Exception as error:
            job.fail(failure(error, job.position, inputs, chunk))
            break
        items = [_item(i, one, job) for i, one in zip(chunk, encoded, strict=True)]
        truncated += sum(one.truncated for one in encoded)
        job.report.add(tokenize_s=time.perf_counter() - started)
        if fixed:  # what has come when a micro-batch is cut must not depend on how fast it came
            gathered += items
        else:
            backlog.extend(job, items, max_pending)
    if gathered:
        backlog.extend(job, gathered, max_pending, whole=True)
    return truncated


def _item(index: int, encoded: Encoded, job: Job) -> TokenizedInput:
    """Text that gives no token at all is computed as one of padding."""
    num_tokens = max(encoded.num_tokens, 1)
    return TokenizedInput(
        index, encoded.input_ids, encoded.token_type_ids, num_tokens=num_tokens, job=job, raw=encoded.raw
    )


def _chars(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def failure(
    error: Exception, position_of: Callable[[int], int], inputs: Sequence[Any], chunk: Sequence[int]
) -> Exception:
    """`error` of encoding `chunk`, with the place of the input that is to blame, where one is. position_of: in the caller's list."""
    if isinstance(error, Unfit):
        position = position_of(chunk[error.place])
        return InputError(f"input {position} {error.reason}", index=position)
    bad = next((i for i in chunk if not _is_unicode(inputs[i])), None)
    return error if bad is None else _not_unicode(position_of(bad))


def _is_unicode(text: Any) -> bool:
    try:
        for part in (text,) if isinstance(text, str) else text:
            part.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _not_unicode(index: int) -> InputError:
    return InputError(
        f"input {index} holds lone surrogates, which are not Unicode text; clean it with "
        "text.encode('utf-8', 'replace').decode('utf-8')",
        index=index,
    )
