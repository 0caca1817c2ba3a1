"""Prometheus metrics, in a registry of the app's own.

Labels are few and bounded: the route's template, never a path, a query or a file name.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Every metric of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry, "namespace": "clipkit"}
        self.requests = Counter("requests", "Requests answered.", ["route", "method", "status"], **shared)
        self.request_seconds = Histogram(
            "request_duration_seconds", "Time to answer.", ["route"], buckets=SECONDS, **shared
        )
        self.stage_seconds = Histogram(
            "stage_seconds", "Time in one stage of a request.", ["stage"], buckets=SECONDS, **shared
        )
        self.queue_depth = Gauge("queue_depth", "Items admitted and not yet done.", ["queue"], **shared)
        self.queue_wait = Histogram(
            "queue_wait_seconds", "Time an item waited.", ["queue"], buckets=SECONDS, **shared
        )
        self.batch_size = Histogram("batch_size", "Items in one batch.", ["queue"], buckets=SIZES, **shared)
        self.worker_restarts = Counter("worker_restarts", "Workers started again.", ["queue"], **shared)
        self.skipped = Counter("skipped_items", "Items whose client was gone.", ["queue"], **shared)
        self.rejected = Counter("rejected", "Requests refused, by code.", ["reason"], **shared)
        self.decode_failures = Counter(
            "image_decode_failures", "Pictures refused, by code.", ["code"], **shared
        )
        self.cache_hits = Counter("text_cache_hits", "Texts found in the cache.", **shared)
        self.cache_misses = Counter("text_cache_misses", "Texts not found in the cache.", **shared)
        self.index_vectors = Gauge("index_vectors", "Vectors in an index.", ["index"], **shared)
