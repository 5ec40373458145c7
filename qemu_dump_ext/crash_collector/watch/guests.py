"""Which guests there are: sockets by name, by pattern, and in directories."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qemu_dump_ext.connections.libvirt import DomainList
from qemu_dump_ext.crash_collector.config.settings import Configuration, GuestEntry, Settings
from qemu_dump_ext.crash_collector.forms import is_guest_name
from qemu_dump_ext.errors import SourceError
from qemu_dump_ext.frozen import dataclass
from qemu_dump_ext.qemu.address import tcp_address, unix_path

_SOCKETS_MAX = 10_000
ALL_DOMAINS = "*"
_OF_LIBVIRT = re.compile(r"[a-z+]+://.*#")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guest:
    """A guest that is to be watched.

    Attributes:
        name: The name of its directory in the store.
        address: The address of its QMP socket: a path or HOST:PORT; of a domain of libvirt's, URI
            and name.
        settings: What holds for it.
        uri: Of libvirt's connection, where it is watched through that; else None.
    """

    name: str
    address: str
    settings: Settings
    uri: str | None = None

    @property
    def domain(self) -> str:
        """What libvirt calls it, where it is watched through that."""
        return self.address.partition("#")[2]

    def fill(self, template: str, release: str = "") -> str:
        """Fill in the words that a template of the configuration may have."""
        words = _words_of(self.address)
        if self.uri is not None:
            words = {"stem": self.domain, "directory": self.domain}
        return template.format(name=self.name, release=release, **words)


def obstacle(address: str) -> str | None:
    """Return why nobody of this user can connect to a socket now, or None; nobody is asked."""
    if tcp_address(address) is not None or _OF_LIBVIRT.match(address):
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
        self._domains: dict[str, DomainList] = {}

    def close(self) -> None:
        """Give back what is held."""
        for domains in self._domains.values():
            domains.close()
        self._domains.clear()

    def find(self, configuration: Configuration) -> dict[str, Guest]:
        """Return the guests that there are now, by name.

        The first entry of the configuration that has a socket decides about it.
        """
        found: dict[str, Guest] = {}
        taken: set[str] = set()
        for entry in configuration.guests:
            for address in self._addresses(entry):
                if address in taken or Path(address) == configuration.control_socket:
                    continue
                taken.add(address)
                if entry.libvirt is not None:
                    name = address.partition("#")[2]
                else:
                    name = entry.name.format(**_words_of(address))
                if not is_guest_name(name):
                    self._tell(f"{address} is not watched: {name!r} is no name for a directory")
                elif name in found:
                    self._tell(
                        f"{address} is not watched: {found[name].address} is called {name} as well"
                    )
                else:
                    found[name] = Guest(name, address, entry, entry.libvirt)
        return found

    def _addresses(self, entry: GuestEntry) -> Iterator[str]:
        if entry.libvirt is None:
            yield from _addresses(entry)
            return
        uri = entry.libvirt
        domains = self._domains.setdefault(uri, DomainList(uri))
        pattern = ALL_DOMAINS if entry.name == GuestEntry.name else entry.name
        try:
            names = domains.names(pattern)
        except SourceError as error:
            self._tell_once(f"no domain of {uri} is seen: {error}")
            return
        yield from (f"{uri}#{name}" for name in islice(names, _SOCKETS_MAX))

    def _tell(self, message: str) -> None:
        self._tell_once(f"{message} (give it another `name`)")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _logger.error("%s", message)


def find_guests(configuration: Configuration) -> dict[str, Guest]:
    """Return the guests that there are now, by name; nothing is held afterwards."""
    finder = GuestFinder()
    try:
        return finder.find(configuration)
    finally:
        finder.close()


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
