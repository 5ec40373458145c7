"""Descriptors that clients of QMP have sent, by their names in QEMU."""

from __future__ import annotations

import os


class NamedDescriptors:
    """What getfd has given to QEMU, of which the proxy keeps its own copies."""

    def __init__(self) -> None:
        self._by_name: dict[str, int] = {}

    def get(self, name: str) -> int | None:
        """Return the descriptor of a name; it stays ours to close."""
        return self._by_name.get(name)

    def keep(self, name: str, descriptor: int) -> None:
        """Own a descriptor from here on; one of the same name is closed, as by QEMU."""
        self.drop(name)
        self._by_name[name] = descriptor

    def drop(self, name: str) -> None:
        """Close the descriptor of a name, if there is one."""
        descriptor = self._by_name.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def drop_all(self) -> None:
        """Close them all."""
        for name in list(self._by_name):
            self.drop(name)
