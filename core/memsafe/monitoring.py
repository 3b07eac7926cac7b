"""Event hooks that count: :class:`PrometheusHook` and :class:`OpenTelemetryHook`, for ``Embedder(..., hooks=[PrometheusHook()])``.

Both speak of the same :data:`METRICS`, in bytes, tokens and seconds, by device; never of a text. Their client libraries are extras:
``pip install "memsafe[prometheus]"`` and ``pip install "memsafe[otel]"``.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from memsafe.errors import MissingExtraError
from memsafe.events import (
    BudgetChanged,
    CacheReleased,
    Event,
    FallbackUsed,
    InputsTruncated,
    MicroBatchDone,
    ModelReloaded,
    ModelUnloaded,
    NonFiniteRedone,
    OutOfMemory,
    Waited,
)

__all__ = ["METRICS", "Metric", "OpenTelemetryHook", "PrometheusHook"]

_TOKENS = tuple(float(2**power) for power in range(6, 20))
"""Bounds of a histogram of micro-batches, in tokens: 64 to half a million."""
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_RATIOS = (0.5, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2, 1.5)
_REMEMBERED = 64


@dataclass(frozen=True)
class Metric:
    """One figure of one kind of event. name: after ``memsafe_`` (Prometheus) or ``memsafe.`` (OpenTelemetry), without a unit.

    unit: "bytes", "seconds", "tokens", ...; "ratio" for a number without one. label: which attribute of the event tells cases
    apart, beside its device; "" for none. value: of an event, None for nothing to say. bounds: of a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    event: type[Event]
    value: Callable[[Any], float | None]
    label: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """As Prometheus' conventions have it: the unit behind the name, ``_total`` behind a counter (the client adds it)."""
        unit = "" if self.name.endswith(self.unit) else f"_{self.unit}"
        return f"memsafe_{self.name}{unit}" + ("_total" if self.kind == "counter" else "")


def _ratio(event: MicroBatchDone) -> float | None:
    return event.measured_bytes / event.predicted_bytes if event.measured_bytes and event.predicted_bytes else None


METRICS: tuple[Metric, ...] = (
    Metric("micro_batches", "counter", "micro_batches", "Micro-batches that finished", MicroBatchDone, lambda e: 1),
    Metric("inputs", "counter", "inputs", "Texts or pairs in them", MicroBatchDone, lambda e: e.sequences),
    Metric("tokens", "counter", "tokens", "Tokens of inputs", MicroBatchDone, lambda e: e.tokens),
    Metric(
        "computed_tokens", "counter", "tokens", "Tokens computed, padding included", MicroBatchDone,
        lambda e: e.computed_tokens,
    ),
    Metric("forward", "histogram", "seconds", "Time of a forward", MicroBatchDone, lambda e: e.seconds, bounds=_SECONDS),
    Metric(
        "micro_batch", "histogram", "tokens", "Size of a micro-batch, padding included", MicroBatchDone,
        lambda e: e.computed_tokens, bounds=_TOKENS,
    ),
    Metric(
        "predicted_peak", "gauge", "bytes", "Predicted peak of the last micro-batch, beyond the weights", MicroBatchDone,
        lambda e: e.predicted_bytes,
    ),
    Metric(
        "measured_peak", "gauge", "bytes", "Measured peak of the last micro-batch that was measured", MicroBatchDone,
        lambda e: e.measured_bytes,
    ),
    Metric(
        "measured_over_predicted", "histogram", "ratio", "Measured peak as a multiple of the predicted one", MicroBatchDone,
        _ratio, bounds=_RATIOS,
    ),
    Metric(
        "budget", "gauge", "bytes", "What the last micro-batch might take, beyond the weights", MicroBatchDone,
        lambda e: e.budget_bytes,
    ),
    Metric("out_of_memory", "counter", "errors", "Refusals of the device, by what was decided", OutOfMemory, lambda e: 1, "action"),
    Metric("budget_cap", "gauge", "bytes", "Cap on a micro-batch after a refusal", BudgetChanged, lambda e: e.cap_bytes),
    Metric("budget_changes", "counter", "changes", "Moves of that cap", BudgetChanged, lambda e: 1, "reason"),
    Metric("released", "counter", "bytes", "Cached memory given back", CacheReleased, lambda e: e.released_bytes, "reason"),
    Metric("fallbacks", "counter", "inputs", "Inputs for which a rung of the ladder was used", FallbackUsed, lambda e: 1, "rung"),
    Metric("waited", "counter", "seconds", "Time spent waiting for neighbours' memory", Waited, lambda e: e.seconds),
    Metric("non_finite", "counter", "rows", "Rows computed again in float32", NonFiniteRedone, lambda e: e.rows),
    Metric("truncated", "counter", "inputs", "Inputs that were cut", InputsTruncated, lambda e: e.count),
    Metric("model_unloads", "counter", "unloads", "Times that idle weights left the device", ModelUnloaded, lambda e: 1),
    Metric("model_reload", "histogram", "seconds", "Time a call waited for them", ModelReloaded, lambda e: e.seconds, bounds=_SECONDS),
)  # fmt: skip


class _Hook:
    """Calls `_record` with every value of every event, once: calls that share a micro-batch are told of it one by one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[Event] = deque(maxlen=_REMEMBERED)

    def __call__(self, event: Event, /) -> None:
        with self._lock:
            if any(event is known for known in self._seen):
                return
            self._seen.append(event)
        for metric in METRICS:
            if isinstance(event, metric.event) and (value := metric.value(event)) is not None:
                labels = {"device": event.device}
                if metric.label:
                    labels[metric.label] = str(getattr(event, metric.label))
                self._record(metric, float(value), labels)

    def _record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        raise NotImplementedError


class PrometheusHook(_Hook):
    """Counts into a registry of ``prometheus_client``, which serves it: ``prometheus_client.start_http_server(9100)``.

    registry: None for the process's own. One hook for all models of a process: a second one would register the same names.

    Raises:
        MissingExtraError: prometheus-client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        super().__init__()
        client = _library("prometheus_client", "prometheus")
        options: dict[str, Any] = {} if registry is None else {"registry": registry}
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            labels = ["device", metric.label] if metric.label else ["device"]
            kind = {"counter": client.Counter, "gauge": client.Gauge, "histogram": client.Histogram}[metric.kind]
            more = {"buckets": metric.bounds} if metric.kind == "histogram" else {}
            self._metrics[metric.name] = kind(metric.prometheus_name, metric.help, labels, **options, **more)

    def _record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        found = self._metrics[metric.name].labels(**labels)
        if metric.kind == "counter":
            found.inc(value)
        elif metric.kind == "gauge":
            found.set(value)
        else:
            found.observe(value)


class OpenTelemetryHook(_Hook):
    """Counts into a meter of OpenTelemetry; what becomes of the figures is your meter provider's affair.

    meter: None for the one called "memsafe" of the global provider. Names are ``memsafe.NAME``, units those of UCUM ("By", "s",
    "{tokens}", "1").

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """

    def __init__(self, meter: Any = None) -> None:
        super().__init__()
        metrics = _library("opentelemetry.metrics", "otel")
        meter = metrics.get_meter("memsafe") if meter is None else meter
        make = {"counter": meter.create_counter, "gauge": meter.create_gauge, "histogram": meter.create_histogram}
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            unit = {"bytes": "By", "seconds": "s", "ratio": "1"}.get(metric.unit, f"{{{metric.unit}}}")
            more = {"explicit_bucket_boundaries_advisory": list(metric.bounds)} if metric.kind == "histogram" else {}
            self._metrics[metric.name] = make[metric.kind](
                f"memsafe.{metric.name}", unit=unit, description=metric.help, **more
            )

    def _record(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        found = self._metrics[metric.name]
        if metric.kind == "counter":
            found.add(value, labels)
        elif metric.kind == "gauge":
            found.set(value, labels)
        else:
            found.record(value, labels)


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f'{name} is not installed; run: pip install "memsafe[{extra}]"') from error
