"""Which of the things that happen to a guest are a new crash, and which belong to the last one."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Mapping

from qemu_dump_ext.crash_collector.agent.stage import Stage
from qemu_dump_ext.crash_collector.record import CrashCause
from qemu_dump_ext.crash_collector.watch.guests import Guest

_ALSO_MAX = 20
_RECORDS_PER_DUMP = 10

_logger = logging.getLogger(__name__)


class CrashIntake:
    """Decides for one guest; an event loop runs.

    Attributes:
        cause: The cause of the last crash; None: there was none.
        superseded: Set when a better cause for it has been found than a line on the console.
    """

    def __init__(self, guest: Guest) -> None:
        self.cause: CrashCause | None = None
        self.superseded = asyncio.Event()
        self._guest = guest
        self._also: Counter[str] = Counter()
        self._recent: deque[float] = deque()
        self._only_counted = 0
        self._next: CrashCause | None = None

    @property
    def also(self) -> Mapping[str, int]:
        """What else belongs to the last crash, and how often it happened; still counts."""
        return self._also

    def is_new(self, cause: CrashCause, stage: Stage) -> bool:
        """Take something that has happened.

        Args:
            cause: What.
            stage: Where the collection of the last crash is.

        Returns:
            Whether a crash is to be collected now because of it.
        """
        if cause.kind not in self._guest.settings.causes:
            _logger.debug("not a crash here: %s", cause.detail, extra=self._extra())
        elif stage is Stage.ENDED:
            return not self._is_too_many()
        elif stage is Stage.STORED:
            # Of the guest after what was done about its last crash.
            if self._next is None and not self._is_too_many():
                self._next = cause
        elif cause.kind != "console" and self.cause and self.cause.kind == "console":
            self._also[f"{self.cause.kind}: {self.cause.detail}"] += 1
            self.cause = cause
            self.superseded.set()
        elif len(self._also) < _ALSO_MAX:
            self._also[f"{cause.kind}: {cause.detail}"] += 1
        else:
            self._also["more, only counted"] += 1
        return False

    def begin(self, cause: CrashCause) -> None:
        """Count what happens from now on to this crash."""
        _logger.warning("crash: %s", cause.detail, extra=self._extra(cause=cause.kind))
        self.cause, self._also = cause, Counter()
        if self._only_counted:
            self._also["crashed too often: only counted"] = self._only_counted
            self._only_counted = 0
        self.superseded.clear()

    def take_next(self) -> CrashCause | None:
        """Return the crash that came while the last one, already stored, was dealt with."""
        following, self._next = self._next, None
        return following

    def _is_too_many(self) -> bool:
        # A guest must not fill the store, nor push the crashes of others out of it.
        rate, now = self._guest.settings.rate, asyncio.get_running_loop().time()
        while self._recent and now - self._recent[0] > rate.per:
            self._recent.popleft()
        if len(self._recent) < _RECORDS_PER_DUMP * rate.dumps:
            self._recent.append(now)
            return False
        if not self._only_counted:
            _logger.error("crashes too often: more are only counted", extra=self._extra())
        self._only_counted += 1
        return True

    def _extra(self, **more: object) -> dict[str, object]:
        return {"guest": self._guest.name, **more}
