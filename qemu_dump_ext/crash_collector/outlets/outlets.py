"""Where a crash is shown once it is in the store: uploaded, in reports and metrics, told people.

Each works in threads of its own, and none keeps the agent waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from qemu_dump_ext.crash_collector.collect.collection import Collected
from qemu_dump_ext.crash_collector.config.settings import Configuration
from qemu_dump_ext.crash_collector.outlets.metrics import AgentState, Metrics
from qemu_dump_ext.crash_collector.outlets.notify import Notifier
from qemu_dump_ext.crash_collector.outlets.report import write_report
from qemu_dump_ext.crash_collector.outlets.upload import Uploader
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.errors import DumpError, SourceError
from qemu_dump_ext.host_limits import start_needed_thread

_IDLE_SHARE = 20  # in a storm of crashes, most are in one report with others

_logger = logging.getLogger(__name__)


class CrashOutlets:
    """What the configuration wants of these."""

    def __init__(
        self,
        configuration: Configuration,
        store: CrashStore,
        state: Callable[[], AgentState],
        now: Callable[[], datetime],
    ) -> None:
        """Look at the configuration.

        Args:
            configuration: What is wanted, and where.
            store: Whose crashes.
            state: What the agent does now, but for the upload.
            now: The clock of the records.

        Raises:
            RequestError: No package for the upload's URL is installed.
        """
        self._port = configuration.metrics_port
        self._metrics = Metrics(store, lambda: self._with_upload(state()))
        upload, report = configuration.upload, configuration.report
        self._uploader = None if upload is None else Uploader(store, upload)
        self._report = None if report is None else _ReportWriter(store, report, now)
        self._notifier = Notifier(store, configuration.notify) if configuration.notify else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Work until the end of the block.

        Raises:
            RequestError: The port of the metrics cannot be had.
        """
        with ExitStack() as stack:
            if self._port is not None:
                stack.enter_context(self._metrics.served(self._port))
            for worker in (self._uploader, self._report, self._notifier):
                if worker is not None:
                    worker.start()
                    stack.callback(worker.stop)
            yield

    def crash_stored(self, collected: Collected) -> None:
        """Show a crash."""
        self._metrics.crash_stored(collected)
        if self._notifier is not None:
            self._notifier.crash_stored(collected.record)
        for worker in (self._uploader, self._report):
            if worker is not None:
                worker.wake()

    def crash_not_stored(self) -> None:
        """Count an attempt that failed."""
        self._metrics.crash_not_stored()

    def _with_upload(self, state: AgentState) -> AgentState:
        if self._uploader is None:
            return state
        return replace(
            state,
            upload_backlog=self._uploader.backlog,
            uploaded=self._uploader.uploaded,
            upload_failures=self._uploader.failures,
        )


class _ReportWriter:
    def __init__(self, store: CrashStore, output: Path, now: Callable[[], datetime]) -> None:
        self._store = store
        self._output = output
        self._now = now
        self._woken = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def start(self) -> None:
        self._woken.set()
        start_needed_thread(self._thread, SourceError)

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._ending.set()
        self._woken.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._woken.wait()
            self._woken.clear()
            started = time.monotonic()
            try:
                write_report(self._store, self._output, now=self._now())
            except (DumpError, OSError) as error:
                _logger.error("no report: %s", error)  # noqa: TRY400
            if self._ending.is_set():
                return
            self._ending.wait(_IDLE_SHARE * (time.monotonic() - started))
