"""What QEMU does when its guest panics: the guest must be there for its dump to be taken."""

from __future__ import annotations

import logging

from qemu_dump_ext.crash_collector.watch.libvirt import domain_of
from qemu_dump_ext.crash_collector.watch.session import GuestSession
from qemu_dump_ext.errors import SourceError

_DEFAULT = "shutdown"

_logger = logging.getLogger(__name__)


def panic_action(command_line: tuple[str, ...]) -> str:
    """Return what QEMU does when its guest panics, by its command line: `pause`, `shutdown`, ...

    Source: QEMU softmmu/vl.c, qemu-options.hx (-action, -no-shutdown).
    """
    action = _DEFAULT
    for word, following in zip(command_line, (*command_line[1:], ""), strict=True):
        option = f"-{word.lstrip('-')}" if word.startswith("-") else ""
        if option == "-no-shutdown" and action == _DEFAULT:
            action = "pause"
        elif option == "-action":
            for setting in following.split(","):
                name, _, value = setting.partition("=")
                if name == "panic":
                    action = value
                elif (name, value) == ("shutdown", "pause") and action == _DEFAULT:
                    action = "pause"
    return action


async def require_pause(session: GuestSession, command_line: tuple[str, ...], name: str) -> None:
    """Let QEMU pause the guest when it panics, unless it is to do nothing at all.

    Args:
        session: The connection to QEMU.
        command_line: The command line of QEMU.
        name: The name of the guest, for the log.
    """
    action, extra = panic_action(command_line), {"guest": name}
    domain = domain_of(command_line)
    if domain is not None and not domain.leaves_it:
        _logger.warning("%s", domain.remark, extra=extra)
    if action == "none":
        return
    try:
        # Also where QEMU was started so: somebody may have changed it since.
        await session.qmp("set-action", {"panic": "pause"})
    except SourceError as error:
        if action != "pause":
            _logger.warning(
                "a panic ends this guest before it can be dumped: start QEMU with"
                " -action panic=pause (%s)",
                error,
                extra=extra,
            )
        return
    if action != "pause":
        _logger.warning(
            "QEMU was to %s on a panic; it pauses the guest now: start it with -action panic=pause",
            action,
            extra=extra,
        )
