"""Hooks that count: every event in Prometheus' words and in OpenTelemetry's, once, with units; and a real run."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from memsafe import Embedder, MissingExtraError
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
from memsafe.monitoring import METRICS, OpenTelemetryHook, PrometheusHook

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda:0"
EVENTS: list[Event] = [
    MicroBatchDone(DEVICE, 3, 500, 600, 1000, 1100, 5000, 0.25),
    MicroBatchDone(DEVICE, 2, 100, 100, 400, None, 4000, 0.05),
    OutOfMemory(DEVICE, 3, 500, 1000, "split"),
    OutOfMemory(DEVICE, 3, 500, 1000, "retry"),
    BudgetChanged(DEVICE, 700, "shrink"),
    CacheReleased(DEVICE, 900, "failure"),
    FallbackUsed(DEVICE, "chunk", 4, 8192),
    Waited(DEVICE, 1.5),
    NonFiniteRedone(DEVICE, 7),
    InputsTruncated(DEVICE, 6, 512),
    ModelUnloaded(DEVICE, 1000),
    ModelReloaded(DEVICE, 1000, 1.5),
]
VALUES: dict[str, float] = {
    "micro_batches": 2,
    "inputs": 5,
    "tokens": 600,
    "computed_tokens": 700,
    "predicted_peak": 400,
    "measured_peak": 1100,
    "budget": 4000,
    "budget_cap": 700,
    "budget_changes": 1,
    "released": 900,
    "fallbacks": 1,
    "waited": 1.5,
    "non_finite": 7,
    "truncated": 6,
    "model_unloads": 1,
}
"""Of counters and gauges after :data:`EVENTS`; refusals and histograms are looked at one by one."""


def test_prometheus_has_every_metric_in_its_own_words() -> None:
    """Counters end in _total, names end in their unit, and values are those of the events, by device and by case."""
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    hook = PrometheusHook(registry)
    for event in EVENTS:
        hook(event)
    for name, value in VALUES.items():
        (metric,) = [each for each in METRICS if each.name == name]
        labels = {"device": DEVICE}
        labels |= {"reason": "shrink"} if name == "budget_changes" else {}
        labels |= {"reason": "failure"} if name == "released" else {}
        labels |= {"rung": "chunk"} if name == "fallbacks" else {}
        assert registry.get_sample_value(metric.prometheus_name, labels) == value, name
    refused = {"device": DEVICE, "action": "split"}
    assert registry.get_sample_value("memsafe_out_of_memory_errors_total", refused) == 1
    assert registry.get_sample_value("memsafe_forward_seconds_sum", {"device": DEVICE}) == pytest.approx(0.3)
    assert registry.get_sample_value("memsafe_micro_batch_tokens_bucket", {"device": DEVICE, "le": "128.0"}) == 1
    assert registry.get_sample_value("memsafe_measured_over_predicted_ratio_count", {"device": DEVICE}) == 1
    text = client.generate_latest(registry).decode()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    assert {"memsafe_tokens_total", "memsafe_waited_seconds_total", "memsafe_budget_bytes"} <= names


def test_opentelemetry_has_the_same_figures() -> None:
    """Names with dots, units of UCUM, the same values and labels."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    hook = OpenTelemetryHook(MeterProvider([reader]).get_meter("memsafe"))
    for event in EVENTS:
        hook(event)
    data = reader.get_metrics_data()
    found: dict[str, Any] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        found[metric.name] = metric
    assert set(found) == {f"memsafe.{metric.name}" for metric in METRICS}
    for name, value in VALUES.items():
        (point,) = found[f"memsafe.{name}"].data.data_points
        assert point.value == value and point.attributes["device"] == DEVICE
    refused = {point.attributes["action"]: point.value for point in found["memsafe.out_of_memory"].data.data_points}
    assert refused == {"split": 1, "retry": 1}
    (forward,) = found["memsafe.forward"].data.data_points
    assert (forward.count, found["memsafe.forward"].unit, found["memsafe.budget"].unit) == (2, "s", "By")
    assert found["memsafe.tokens"].unit == "{tokens}" and found["memsafe.measured_over_predicted"].unit == "1"


def test_a_shared_micro_batch_counts_once() -> None:
    """Calls that share one are each told of it, with the same event; equal figures of another one count again."""
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    hook = PrometheusHook(registry)
    one, other = (MicroBatchDone(DEVICE, 1, 10, 10, 1, None, 1, 0.1) for _ in range(2))
    for event in (one, one, other, one, other):
        hook(event)
    assert registry.get_sample_value("memsafe_tokens_total", {"device": DEVICE}) == 20


def test_a_real_run_adds_up(minilm: str, passages: list[str]) -> None:
    """Four calls at once through one model: tokens and inputs are those of their reports, whoever shared what."""
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    reports: list[Any] = []
    texts = [passage[:300] for passage in passages[:20]]
    with Embedder(minilm, device="cpu", hooks=[PrometheusHook(registry)]) as embedder:
        threads = [
            threading.Thread(target=lambda part=part: reports.append(embedder.run(texts[part : part + 5]).report))
            for part in (0, 5, 10, 15)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert registry.get_sample_value("memsafe_tokens_total", {"device": "cpu"}) == sum(r.tokens for r in reports)
    assert registry.get_sample_value("memsafe_inputs_total", {"device": "cpu"}) == sum(
        r.distinct_texts for r in reports
    )
    assert registry.get_sample_value("memsafe_budget_bytes", {"device": "cpu"}) > 0


@pytest.mark.parametrize(
    ("hook", "package", "extra"),
    [("PrometheusHook", "prometheus_client", "prometheus"), ("OpenTelemetryHook", "opentelemetry", "otel")],
)
def test_a_missing_library_names_its_pip_command(hook: str, package: str, extra: str) -> None:
    """Importing the module needs neither."""
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.modules[{package + '.metrics'!r}] = None\n"
        f"from memsafe import monitoring, MissingExtraError\n"
        f"try:\n    monitoring.{hook}()\nexcept MissingExtraError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'pip install "memsafe[{extra}]"' in done.stdout
    assert issubclass(MissingExtraError, ImportError)


def test_every_metric_is_documented_with_its_unit() -> None:
    """docs/monitoring.md has a row for each: its name in Prometheus' words, its kind, its unit."""
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for metric in METRICS:
        assert re.search(rf"^\| `{metric.prometheus_name}` \| {metric.kind} \| {metric.unit} \|", text, re.M), (
            metric.name
        )
    assert len(METRICS) == len({metric.prometheus_name for metric in METRICS})
