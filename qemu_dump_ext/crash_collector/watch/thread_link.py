"""A link to a guest whose monitor is asked by threads, for it blocks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from qemu_dump_ext.errors import SourceError


class ThreadLink:
    """What such links have in common; each knows by itself how it hears of changes."""

    def __init__(self, who: str, ask: Callable[..., Any], opened: contextlib.ExitStack) -> None:
        """Use a monitor.

        Args:
            who: Answers, in words.
            ask: Executes a command of QMP, with its arguments or None, and returns the answer.
            opened: What the end of the link closes.
        """
        self._who = who
        self._ask = ask
        self._opened = opened
        self._open = True

    @property
    def is_open(self) -> bool:
        """Whether it is of use."""
        return self._open

    async def execute(
        self, seconds: float, command: str, arguments: Mapping[str, object] | None = None
    ) -> Any:
        """Execute a command of QMP.

        Raises:
            SourceError: It is not answered in so many seconds, or refused.
        """
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.to_thread(self._ask, command, arguments)
        except TimeoutError as error:
            raise SourceError(
                f"{self._who} does not answer {command} in {seconds:.0f} s"
            ) from error

    async def close(self) -> None:
        """Close what was opened for it."""
        self._open = False
        await asyncio.to_thread(self._opened.close)
