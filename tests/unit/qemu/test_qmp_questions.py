"""Several questions at once, of which some are answered in time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from qemu_dump_ext.qemu.qmp import _Questions


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _at_once() -> str:
    return "answer"


async def _never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


def test_which_one_is_late_is_known(loop: asyncio.AbstractEventLoop):
    questions = _Questions(loop, [_at_once, _never, _at_once], 0)
    assert questions.answer(0) == questions.answer(2) == "answer"
    with pytest.raises(TimeoutError):
        questions.answer(1)
    assert asyncio.run_coroutine_threadsafe(_left(), loop).result() == 0


async def _left() -> int:
    return len(asyncio.all_tasks()) - 1
