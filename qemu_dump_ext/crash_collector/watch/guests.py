"""Which guests there are: sockets by name, by pattern, and in directories."""

from __future__ import annotations

import errno
import glob
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry, Settings
from qemu_dump_ext.crash_collector.record import is_guest_name
from qemu_dump_ext.qemu.address import tcp_address, unix_path

_SOCKETS_MAX = 10_000

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guest:
    """A guest that is to be watched.

    Attributes:
        name: The name of its directory in the store.
        address: The address of its QMP socket: a path or HOST:PORT.
        settings: What holds for it.
    """

    name: str
    address: str
    settings: Settings

    def fill(self, template: str, release: str = "") -> str:
        """Fill in the words that a template of the configuration may have."""
        return template.format(name=self.name, release=release, **_words_of(self.address))


def obstacle(address: str) -> str | None:
    """Return why nobody of this user can connect to a socket now, or None; nobody is asked."""
    if tcp_address(address) is not None:
        return None
    path = unix_path(address)
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - also of a path that is too long
    except OSError as error:
        return "there is no such socket now" if error.errno == errno.ENOENT else error.strerror
    if not stat.S_ISSOCK(mode):
        return "it is no socket"
    return None if os.access(path, os.W_OK) else "it is not permitted to connect to it"


class GuestFinder:
    """Looks for guests as often as it is asked; says once what is wrong with one."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def find(self, configuration: Configuration) -> dict[str, Guest]:
        """Return the guests that there are now, by name.

        The first entry of the configuration that has a socket decides about it.
        """
        found: dict[str, Guest] = {}
        taken: set[str] = set()
        for entry in configuration.guests:
            for address in _addresses(entry):
                if address in taken or Path(address) == configuration.control_socket:
                    continue
                taken.add(address)
                name = entry.name.format(**_words_of(address))
                if not is_guest_name(name):
                    self._tell(f"{address} is not watched: {name!r} is no name for a directory")
                elif name in found:
                    self._tell(
                        f"{address} is not watched: {found[name].address} is called {name} as well"
                    )
                else:
                    found[name] = Guest(name, address, entry)
        return found

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _logger.error("%s (give it another `name`)", message)


def _addresses(entry: GuestEntry) -> Iterator[str]:
    if entry.socket is not None:
        yield entry.socket
    elif entry.glob is not None:
        paths = glob.iglob(entry.glob, recursive=True)  # noqa: PTH207 - of any directory
        yield from sorted(islice(filter(_is_socket, paths), _SOCKETS_MAX))
    elif entry.directory is not None:
        paths = map(str, entry.directory.glob("*"))
        yield from sorted(islice(filter(_is_socket, paths), _SOCKETS_MAX))


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116 - hundreds a second
    except OSError:
        return False


def _words_of(address: str) -> dict[str, str]:
    if (target := tcp_address(address)) is not None:
        return {"stem": f"{target[0]}-{target[1]}", "directory": target[0]}
    path = Path(address)
    return {"stem": path.stem, "directory": path.parent.name}
