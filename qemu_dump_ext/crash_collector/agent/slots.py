"""Where collections run: so many at the same time, beside those that wait for a slow QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qemu_dump_ext.crash_collector.watch.patience import Patience

_SLOW_PER_SLOT = 8
_LOOK_SECONDS = 0.5

_T = TypeVar("_T")


class CollectionSlots:
    """Threads that collect; an event loop runs."""

    def __init__(self, count: int) -> None:
        """Prepare.

        Args:
            count: How many collections there are at the same time that are not slow.
        """
        self._free = asyncio.Semaphore(count)
        self._pool = ThreadPoolExecutor((1 + _SLOW_PER_SLOT) * count, "collect")

    async def run(self, work: Callable[[], _T], patience: Patience) -> _T:
        """Do it in a thread, once there is room.

        Args:
            work: What.
            patience: The patience of it: where QEMU is slow, it keeps nobody out.
        """
        await self._free.acquire()
        working = asyncio.ensure_future(
            asyncio.get_running_loop().run_in_executor(self._pool, work)
        )
        try:
            while not patience.is_slow and not working.done():
                await asyncio.wait([working], timeout=_LOOK_SECONDS)
        finally:
            self._free.release()
        return await working

    def shutdown(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()
