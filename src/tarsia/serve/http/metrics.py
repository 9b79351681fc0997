"""What Prometheus is told. Labels are bounded: beyond ``counted`` adapters, further ones are "(other)"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from tarsia.serve.wire import Stats

BASE: Final = "(base)"
OTHER: Final = "(other)"
NONE: Final = "(none)"
"""Labels that no adapter can have; none: nobody answered."""

_TTFT: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TPOT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_E2E: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# fmt: off
_WORKER_COUNTERS: Final = {
    "steps": "Passes of the language model", "step_seconds": "Seconds in passes of the language model",
    "prompt_tokens": "Tokens of prompts", "cached_tokens": "Tokens of prompts that were read before",
    "completion_tokens": "Tokens that were said",
    "prefix_hits": "Requests whose prompt was partly in the cache", "prefix_misses": "Requests whose prompt was not",
    "picture_hits": "Pictures that were encoded before", "picture_misses": "Pictures that were encoded",
    "adapter_loads": "Adapters taken into memory", "adapter_evictions": "Adapters that made room for others",
    "adapter_refusals": "Adapters refused at loading", "block_evictions": "Blocks of the cache that made room",
    "preemptions": "Answers that gave their blocks to others, and read again what they had",
}
_WORKER_GAUGES: Final = {
    "reading": "Requests whose prompt is encoded", "waiting": "Requests that wait for a place in a step",
    "running": "Requests that are stepped", "blocks_used": "Blocks of the cache in use",
    "blocks_free": "Blocks of the cache that are free", "adapter_bytes": "Bytes of adapters in memory",
    "adapters_resident": "Adapters in memory", "process_bytes": "Bytes of the worker",
}
# fmt: on


class Metrics:
    """Counts of one server; ``stats``: what the worker last counted, ``restarts``: how often it was begun again."""

    def __init__(self, counted: int, stats: Callable[[], Stats | None], restarts: Callable[[], int]) -> None:
        self._counted, self._stats, self._restarts = counted, stats, restarts
        self._names: set[str] = set()
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "tarsia_requests", f"Requests by who answered ({OTHER}: beyond {counted} adapters) and how they ended",
            ["adapter", "outcome"], registry=self.registry,
        )  # fmt: skip
        self.refused = Counter("tarsia_refused", "Answers with an error, by status", ["status"], registry=self.registry)
        self.tokens = Counter(
            "tarsia_tokens", "Tokens by adapter and kind", ["adapter", "kind"], registry=self.registry
        )
        self.first = self._histogram("time_to_first_token_seconds", "Seconds from a request to its first text", _TTFT)
        self.each = self._histogram("time_per_output_token_seconds", "Seconds for each token after the first", _TPOT)
        self.whole = self._histogram("request_seconds", "Seconds from a request to its end", _E2E)
        self.queue = Gauge("tarsia_queue_requests", "Requests that wait for their first step", registry=self.registry)
        self.running = Gauge("tarsia_running_requests", "Requests that are answered now", registry=self.registry)
        self.other = Gauge(
            "tarsia_adapters_without_label", f"1 where adapters beyond {counted} are counted as {OTHER}",
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tarsia_{name}", text, buckets=buckets, registry=self.registry)

    def label(self, adapter: str | None) -> str:
        """The label of an adapter that has answered; None is the bare base."""
        if adapter is None:
            return BASE
        if adapter not in self._names and len(self._names) >= self._counted:
            self.other.set(1)
            return OTHER
        self._names.add(adapter)
        return adapter

    def collect(self) -> Iterator[Metric]:
        """What the worker counts, as it last said it; nothing while there is none (its counts begin anew with it)."""
        yield CounterMetricFamily("tarsia_worker_restarts", "Workers started in a lost one's place", self._restarts())
        stats = self._stats()
        if stats is None:
            return
        for name, text in _WORKER_COUNTERS.items():
            yield CounterMetricFamily(f"tarsia_worker_{name}", text, getattr(stats, name))
        for name, text in _WORKER_GAUGES.items():
            yield GaugeMetricFamily(f"tarsia_worker_{name}", text, getattr(stats, name))

    def page(self) -> bytes:
        """Prometheus' text."""
        return generate_latest(self.registry)
