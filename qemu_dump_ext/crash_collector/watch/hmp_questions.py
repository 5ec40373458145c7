"""QEMU's human monitor, asked as the agent asks QMP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qemu_dump_ext.crash_collector.watch.patience import Patience
from qemu_dump_ext.errors import MonitorAnswerError
from qemu_dump_ext.qemu.hmp import HmpMonitor
from qemu_dump_ext.qemu.monitor_text import RUNNING, parse_status

_SAME_IN_BOTH = frozenset(("stop", "cont", "system_reset", "quit"))
_REFUSED = "Error:"


class HmpQuestions:
    """A connection, asked from any thread.

    Attributes:
        address: Where it is.
        pid: Of QEMU's process, or None: it cannot be seen.
    """

    def __init__(self, monitor: HmpMonitor, pid: int | None, patience: Patience | None) -> None:
        """Use a monitor.

        Args:
            monitor: Connected; its owner closes it.
            pid: Of QEMU's process, if it is known.
            patience: For how long it is asked; None: for as long as it takes.
        """
        self.address = monitor.address
        self.pid = pid
        self._monitor = monitor
        self._patience = patience

    def execute(self, command: str) -> str:
        """Return the answer of one line.

        Raises:
            SourceError: QEMU is gone, does not answer, or the time of a collection is over.
        """
        return self.begin(command)()

    def begin(self, command: str) -> Callable[[], str]:
        """Have a line executed; what is returned waits for its answer."""
        if self._patience is None:
            return self._monitor.begin(command)
        patience = self._patience
        with patience.asking(command):
            answer = self._monitor.begin(command)

        def wait() -> str:
            with patience.waiting():
                return answer()

        return wait

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Return what QMP would, for the few commands of which the human monitor has a line.

        Raises:
            MonitorAnswerError: It has none, or refuses it.
            SourceError: As `execute`.
        """
        if command == "query-status":
            state = parse_status(self.execute("info status"))
            return {"status": state, "running": state == RUNNING}
        if command == "human-monitor-command" and arguments is not None:
            return self.execute(str(arguments["command-line"]))
        if command not in _SAME_IN_BOTH:
            raise MonitorAnswerError(command, "a human monitor has no such command")
        if _REFUSED in (answer := self.execute(command)):
            raise MonitorAnswerError(command, answer)
        return {}
