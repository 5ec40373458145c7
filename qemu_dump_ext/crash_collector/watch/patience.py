"""How long QEMU is waited for while one crash is collected: a slow one keeps no other out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from qemu.qmp import QMPClient

from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.qemu.qmp import QmpQuestion, SharedQmp

# What is asked around a pause, also to end it: never too late, and not by the collection alone.
_ALWAYS = frozenset(
    (
        *("cont", "query-status", "query-migrate", "query-dump"),
        *("migrate_cancel", "query-migrate-capabilities", "migrate-set-capabilities", "closefd"),
        *("info status", "info migrate", "info dump"),
    )
)


class Patience:
    """Of one collection. Asked by several threads.

    Attributes:
        limit: Seconds after which nothing more is asked.
        slow: Seconds of waiting for answers after which QEMU counts as slow.
    """

    def __init__(
        self, limit: float, slow: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = limit
        self.slow = slow
        self._clock = clock
        self._begun: float | None = None
        self._waited = 0.0
        self._asked: float | None = None

    def begin(self) -> None:
        """Count from now on."""
        self._begun = self._clock()

    def check(self) -> None:
        """Look whether the time is over.

        Raises:
            SourceError: It is.
        """
        if self._begun is not None and self._clock() - self._begun >= self.limit:
            raise SourceError(f"not done within {self.limit:g} s (collection_timeout)")

    @property
    def is_slow(self) -> bool:
        """Tell whether QEMU has been waited for too long altogether."""
        asked = self._asked
        waiting = 0.0 if asked is None else self._clock() - asked
        return self._waited + waiting >= self.slow

    @contextmanager
    def asking(self, told: str) -> Iterator[None]:
        """Count the time of the block, unless it is about what is asked around a pause.

        Args:
            told: The question.

        Raises:
            SourceError: The time is over.
        """
        if told in _ALWAYS:
            yield
            return
        self.check()
        with self.waiting():
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for QEMU."""
        asked = self._asked = self._clock()
        try:
            yield
        finally:
            self._asked = None
            self._waited += self._clock() - asked


class LimitedQmp(SharedQmp):
    """Asks nothing more when the time of a collection is over, but to let the guest run."""

    def __init__(
        self,
        client: QMPClient,
        loop: asyncio.AbstractEventLoop,
        address: str,
        *,
        answer_seconds: float,
        patience: Patience,
        pid: int | None,
    ) -> None:
        super().__init__(client, loop, address, answer_seconds=answer_seconds)
        self.patience = patience
        self.pid = pid

    def _begin_all(self, questions: Sequence[QmpQuestion]) -> list[Callable[[], object]]:
        if all(one.told in _ALWAYS for one in questions):
            return super()._begin_all(questions)
        self.patience.check()
        return [partial(self._wait, answer) for answer in super()._begin_all(questions)]

    def _wait(self, answer: Callable[[], object]) -> object:
        with self.patience.waiting():
            return answer()
