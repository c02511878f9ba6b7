"""OpenTelemetry at the rim: the SDK set up by the standard `OTEL_*` variables, and trace context in NATS headers.

Code elsewhere uses the OpenTelemetry API only. There is no span per token.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from opentelemetry import propagate
from opentelemetry.context import Context

from .settings import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricReader

TRACE_HEADERS: Final = ("traceparent", "tracestate", "baggage")
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
RATES: Final = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1_000, 2_000, 5_000)


def carrier() -> dict[str, str]:
    """NATS headers that carry the current trace context."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def context(headers: Mapping[str, str] | None) -> Context:
    """The trace context in NATS headers: what a span continues that this message caused."""
    return propagate.extract({key: value for key, value in (headers or {}).items() if key in TRACE_HEADERS})


def setup(service: str, *, exposes: bool = False) -> None:
    """Sets the SDK up for a service's process: traces where `OTEL_TRACES_EXPORTER` says (`otlp`, `console`;
    default none); metrics for Prometheus where the service `exposes` them (see `exposition`) and the exporter is
    installed, served by themselves where `OTEL_EXPORTER_PROMETHEUS_PORT` is set, and sent where
    `OTEL_METRICS_EXPORTER=otlp`. The other variables are the SDK's own, which is not loaded where nothing is to leave
    the process. Raises `ConfigError`.
    """
    os.environ.setdefault("OTEL_SERVICE_NAME", f"tapeline-{service}")
    if (wanted := os.environ.get("OTEL_TRACES_EXPORTER", "none")) != "none":
        _set_up_traces(wanted)
    readers = _readers(exposes)
    if readers:
        _set_up_metrics(readers)


def _set_up_traces(wanted: str) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    provider = TracerProvider()
    if wanted == "otlp":
        _need("opentelemetry.exporter.otlp.proto.http", "OTEL_TRACES_EXPORTER=otlp")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    elif wanted == "console":
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    else:
        raise ConfigError(f"OTEL_TRACES_EXPORTER={wanted}: this build knows none, console and otlp")
    trace.set_tracer_provider(provider)


def _readers(exposes: bool) -> list["MetricReader"]:
    """Whoever wants the metrics."""
    readers: list[MetricReader] = []
    port = os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT")
    if port:
        _need("opentelemetry.exporter.prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT")
        from prometheus_client import start_http_server

        start_http_server(int(port), os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "localhost"))
    if port or (exposes and _is_installed("opentelemetry.exporter.prometheus")):
        from opentelemetry.exporter.prometheus import PrometheusMetricReader

        readers.append(PrometheusMetricReader())
    if os.environ.get("OTEL_METRICS_EXPORTER") == "otlp":
        _need("opentelemetry.exporter.otlp.proto.http", "OTEL_METRICS_EXPORTER=otlp")
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    return readers


def _set_up_metrics(readers: list["MetricReader"]) -> None:
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View

    views = [
        View(instrument_unit="s", aggregation=ExplicitBucketHistogramAggregation(SECONDS)),
        View(instrument_unit="{token}/s", aggregation=ExplicitBucketHistogramAggregation(RATES)),
    ]
    metrics.set_meter_provider(MeterProvider(metric_readers=readers, views=views))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


def _need(module: str, setting: str) -> None:
    if not _is_installed(module):
        raise ConfigError(f"{setting} needs the package {module.replace('.', '-')}, which is not installed")


def shutdown() -> None:
    """Sends what is still waiting to be sent."""
    from opentelemetry import metrics, trace

    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if callable(stop := getattr(provider, "shutdown", None)):
            stop()


def exposition() -> tuple[bytes, str]:
    """This process's metrics as Prometheus reads them, and their content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return generate_latest(), CONTENT_TYPE_LATEST
