"""What Prometheus can ask the agent of a host, on loopback alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from qemu_dump_ext.crash_collector.collect.budget import LIMITS
from qemu_dump_ext.crash_collector.collect.collection import Collected
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import RequestError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread
from qemu_dump_ext.value import Value

_LOOPBACK = "127.0.0.1"
_FAILED = "failed"
_CONNECTIONS_MAX = 8
_IDLE_SECONDS = 10.0
_PREFIX = "qemu_crash_collector_"
# Guests come and go, and Prometheus keeps each name.
_GUESTS_MAX = 2000
_OTHER_GUESTS = "(others)"
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_BYTES = tuple(float(1 << shift) for shift in range(20, 42, 3))


class AgentState(Value):
    """What the agent is doing now.

    Attributes:
        watched: Guests.
        connected: Of those.
        collecting: Crashes that are being collected.
        upload_backlog: Crashes that are not uploaded yet.
        uploaded: Since the start.
        upload_failures: Likewise; each is tried again.
    """

    watched: int
    connected: int
    collecting: int
    upload_backlog: int = 0
    uploaded: int = 0
    upload_failures: int = 0


class Metrics:
    """Counts what happens, and asks for the rest when it is asked."""

    def __init__(self, store: CrashStore, state: Callable[[], AgentState]) -> None:
        """Prepare.

        Args:
            store: Whose size is told.
            state: Asked in a thread of the server.
        """
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._crashes = Counter(
            f"{_PREFIX}crashes", "Crashes stored", ["guest", "cause"], registry=registry
        )
        self._kept = Counter(f"{_PREFIX}dumps_kept", "Dumps stored", registry=registry)
        self._skipped = Counter(
            f"{_PREFIX}dumps_skipped",
            "Crashes stored without a dump: dumps_per_signature, rate and free are what the"
            " configuration wants, failed is not",
            ["reason"],
            registry=registry,
        )
        self._not_stored = Counter(
            f"{_PREFIX}crashes_not_stored",
            "Attempts to store a crash that failed; they are made again",
            registry=registry,
        )
        self._seconds = Histogram(
            f"{_PREFIX}dump_seconds", "Time a dump took", buckets=_SECONDS, registry=registry
        )
        self._bytes = Histogram(
            f"{_PREFIX}dump_bytes", "Size of a dump", buckets=_BYTES, registry=registry
        )
        self._stopped = Histogram(
            f"{_PREFIX}guest_stopped_seconds",
            "Time that a guest which ran was kept stopped",
            buckets=_SECONDS,
            registry=registry,
        )
        self._last = Gauge(
            f"{_PREFIX}last_success_timestamp_seconds",
            "When a crash was last stored",
            registry=registry,
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "guests_watched": ("Guests of the configuration", lambda: state().watched),
            "guests_connected": ("Guests with a connection", lambda: state().connected),
            "collections_under_way": ("Crashes being collected", lambda: state().collecting),
            "upload_backlog": ("Crashes not uploaded yet", lambda: state().upload_backlog),
            "store_bytes": ("Size of all crashes kept", lambda: _bytes_below(store.path)),
            "store_free_bytes": ("What its file system has left", store.free_bytes),
        }
        for name, (text, ask) in gauges.items():
            Gauge(f"{_PREFIX}{name}", text, registry=registry).set_function(ask)
        registry.register(_UploadCounters(state))
        for reason in (*LIMITS, _FAILED):
            self._skipped.labels(reason)
        self._guests: set[str] = set()

    def crash_stored(self, collected: Collected) -> None:
        """Count a crash."""
        record = collected.record
        if len(self._guests) < _GUESTS_MAX:
            self._guests.add(record.guest)
        guest = record.guest if record.guest in self._guests else _OTHER_GUESTS
        self._crashes.labels(guest, record.cause.kind).inc()
        if record.dump.file is None:
            self._skipped.labels(collected.refusal.limit if collected.refusal else _FAILED).inc()
        else:
            self._kept.inc()
            self._bytes.observe(record.dump.bytes)
        if collected.dump_seconds is not None:
            self._seconds.observe(collected.dump_seconds)
        if record.guest_stopped_seconds:
            self._stopped.observe(record.guest_stopped_seconds)
        self._last.set_to_current_time()

    def crash_not_stored(self) -> None:
        """Count an attempt that failed."""
        self._not_stored.inc()

    @contextmanager
    def served(self, port: int) -> Iterator[int]:
        """Answer HTTP in threads of its own.

        Args:
            port: 0: any that is free.

        Yields:
            The port.

        Raises:
            RequestError: It cannot be had.
        """
        try:
            server = make_server(_LOOPBACK, port, make_wsgi_app(self._registry), _Server, _Handler)
        except OSError as error:
            raise RequestError(
                f"cannot serve metrics at {_LOOPBACK}:{port}: {error.strerror}"
            ) from error
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        start_needed_thread(thread, SourceError)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own word
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    # Who connects and asks nothing takes neither threads nor descriptors from the agent for long.
    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free = threading.BoundedSemaphore(_CONNECTIONS_MAX)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who asked is gone, or said nothing."""


class _UploadCounters(Collector):
    # What the upload has counted itself.
    def __init__(self, state: Callable[[], AgentState]) -> None:
        self._state = state

    def collect(self) -> Iterator[CounterMetricFamily]:
        state = self._state()
        yield CounterMetricFamily(f"{_PREFIX}uploads", "Crashes uploaded", state.uploaded)
        yield CounterMetricFamily(
            f"{_PREFIX}upload_failures",
            "Uploads that failed; they are tried again",
            state.upload_failures,
        )


def _bytes_below(directory: Path) -> int:
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(f"{where}/{name}").st_size
            except OSError:
                continue  # removed meanwhile
    return total
