"""Tell systemd how we are.

Source: sd_notify(3): datagrams to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time

_logger = logging.getLogger(__name__)


def notify(*states: str) -> None:
    """Send states such as `READY=1`; nothing where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.sendto("\n".join(states).encode(), address)
    except OSError as error:
        _logger.warning("the service manager cannot be told: %s", error)


def notify_reloading() -> None:
    """Say that the configuration is read again; `READY=1` follows."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify("RELOADING=1", f"MONOTONIC_USEC={microseconds}")


async def keep_alive() -> None:
    """Answer the service manager's watchdog, if there is one, until cancelled."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or not int(microseconds):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(microseconds) / 1e6 / 2)
