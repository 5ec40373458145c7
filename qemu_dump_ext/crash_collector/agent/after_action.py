"""What is done with a guest once its crash is stored."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qemu_dump_ext.crash_collector.config.settings import AfterCommand
from qemu_dump_ext.crash_collector.record import CrashRecord
from qemu_dump_ext.crash_collector.store.store import CrashStore
from qemu_dump_ext.crash_collector.watch.session import GuestSession
from qemu_dump_ext.errors import SourceError

_OUTPUT_MAX = 2000

_logger = logging.getLogger(__name__)


async def run_action(action: str, session: GuestSession, status: str) -> None:
    """Resume, reset or quit the guest, or leave it.

    Args:
        action: By the word that the configuration has for it.
        session: The connection to the guest.
        status: The run state in which it is.

    Raises:
        SourceError: QEMU refuses it, or is gone.
    """
    if action == "resume" and status != "running":
        await session.qmp("cont")
    elif action == "reset":
        await session.qmp("system_reset")
        if status != "running":
            await session.qmp("cont")
    elif action == "quit":
        with suppress(SourceError):
            await session.qmp("quit")


async def run_command(
    action: AfterCommand, store: CrashStore, crash_id: str, ending: asyncio.Event
) -> None:
    """Run a program and log what it says.

    Args:
        action: Which one, and for how long at most.
        store: Where the crash is.
        crash_id: Which one.
        ending: The program is killed when this is set.

    Raises:
        RequestError: There is no such crash.
        DumpError: Its record cannot be read.
        OSError: There is no such program.
    """
    record = store.record(crash_id)
    process = await asyncio.create_subprocess_exec(
        *action.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **_environment(record, store.directory(crash_id))},
        start_new_session=True,
    )
    talk = asyncio.create_task(process.communicate())
    ended = asyncio.create_task(ending.wait())
    try:
        await asyncio.wait(
            [talk, ended], timeout=action.timeout, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        ended.cancel()
        if not talk.done():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    output, _ = await talk
    _logger.log(
        logging.ERROR if process.returncode else logging.INFO,
        "%s ended with status %s: %s",
        action.command[0],
        process.returncode,
        output.decode("utf-8", "replace")[-_OUTPUT_MAX:].strip(),
        extra={"guest": record.guest, "crash": crash_id},
    )


def _environment(record: CrashRecord, directory: Path) -> Mapping[str, str]:
    return {
        "CRASH_DIRECTORY": str(directory),
        "CRASH_ID": record.id,
        "CRASH_GUEST": record.guest,
        "CRASH_CAUSE": record.cause.kind,
        "CRASH_SIGNATURE": record.signature.id,
        "CRASH_DUMP": str(directory / record.dump.file) if record.dump.file else "",
    }
