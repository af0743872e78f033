"""Counters for Prometheus: what the engine's forwards were like, and what the requests came to."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmdlm.serving.engine import Pass

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """One server's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.waiting = Gauge("mmdlm_queue_rows", "Rows that wait for room", registry=kept)
        self.active = Gauge("mmdlm_active_rows", "Rows that were let in, jobs", registry=kept)
        self.forwards = Counter("mmdlm_forwards", "Steps that rows made together, over all lanes", registry=kept)
        self.steps = Counter("mmdlm_steps", "Steps made, over all jobs", registry=kept)
        self.written = Counter("mmdlm_written_tokens", "Tokens written", registry=kept)
        self.rows = Histogram("mmdlm_batch_rows", "Rows of a lane's step, guidance's second ones too", buckets=ROWS,
                              registry=kept)
        self.tokens = Histogram("mmdlm_tokens_per_forward", "Tokens of a lane's step, rows as the longest",
                                buckets=TOKENS, registry=kept)
        self.forward_seconds = Histogram("mmdlm_forward_seconds", "A lane's step: its forwards, and their answers",
                                         buckets=SECONDS, registry=kept)
        self.requests = Counter("mmdlm_requests", "Requests answered", ["route", "status"], registry=kept)
        self.request_seconds = Histogram("mmdlm_request_seconds", "From a request to its answer's last byte",
                                         ["route"], buckets=SECONDS, registry=kept)

    def watch(self, seen: Pass) -> None:
        """Called by the engine after every step, by several lanes at once."""
        self.waiting.set(seen.waiting)
        self.forwards.inc()
        self.steps.inc(seen.jobs)
        self.written.inc(seen.written)
        self.rows.observe(seen.rows)
        self.tokens.observe(seen.rows * seen.length)
        self.forward_seconds.observe(seen.seconds)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self, waiting: int, active: int) -> bytes:
        """Prometheus' text format."""
        self.waiting.set(waiting)
        self.active.set(active)
        return generate_latest(self.registry)
