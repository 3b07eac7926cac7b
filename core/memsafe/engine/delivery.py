"""Rows to the calls that wait for them; and everyone in a micro-batch is told what happened to it."""

from __future__ import annotations

from memsafe.engine.jobs import Job
from memsafe.engine.sinks import Rows
from memsafe.events import Event, MicroBatchDone
from memsafe.machine.device import Device
from memsafe.planning.batch import MicroBatch, TokenizedInput

__all__ = ["deliver", "jobs_of", "tell"]


def jobs_of(batch: MicroBatch) -> list[Job]:
    """The jobs that have inputs in `batch`, each once."""
    return list(dict.fromkeys(item.job for item in batch.items))


def tell(batch: MicroBatch, event: Event | None, **counts: float) -> None:
    """Every job of `batch` learns what happened: counts for its report, the event for its hooks. Call it outside locks."""
    for job in jobs_of(batch):
        if counts:
            job.report.add(**counts)
        if event is not None and job.emit is not None:
            job.emit(event)


def deliver(
    batch: MicroBatch,
    rows: Rows,
    device: Device,
    *,
    seconds: float,
    predicted_bytes: int,
    measured_bytes: int | None,
    budget_bytes: int,
) -> None:
    """Give each job its rows of `batch`, float32 of shape (len(batch), ...), and its share of the report."""
    by_job: dict[Job, list[int]] = {}
    for place, item in enumerate(batch.items):
        by_job.setdefault(item.job, []).append(place)
    computed = batch.shape.tokens
    event = MicroBatchDone(
        device.name,
        len(batch),
        batch.num_tokens,
        computed,
        predicted_bytes,
        measured_bytes,
        budget_bytes,
        seconds,
    )
    process = device.process_bytes()
    for job, places in by_job.items():
        whole = len(places) == len(batch)
        items: tuple[TokenizedInput, ...] = batch.items if whole else tuple(batch.items[i] for i in places)
        tokens = sum(item.num_tokens for item in items)
        share = tokens / max(batch.num_tokens, 1)
        job.report.add(
            tokens=tokens, computed_tokens=round(computed * share), micro_batches=1, compute_s=seconds * share
        )
        job.report.peak(
            largest_micro_batch_tokens=batch.num_tokens,
            predicted_peak_bytes=predicted_bytes,
            measured_peak_bytes=measured_bytes,
            process_peak_bytes=process,
            budget_max_bytes=budget_bytes,
        )
        job.report.least(budget_min_bytes=budget_bytes)
        if job.emit is not None:
            job.emit(event)
        job.deliver(items, rows if whole else rows[places])
