"""Which formats can be written here and now, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping

from qemu_dump_ext.dump_formats import all_dump_formats
from qemu_dump_ext.errors import CodecUnavailableError
from qemu_dump_ext.plan.request import DumpRequest
from qemu_dump_ext.value import Value


class Capabilities(Value):
    """An answer in the terms of QMP's query-dump-guest-memory-capability.

    Attributes:
        formats: What can be written.
        unavailable: What cannot, and why.
    """

    formats: tuple[str, ...]
    unavailable: Mapping[str, str]

    def lines(self) -> list[str]:
        """Say it in words."""
        names_of: dict[str, list[str]] = {}
        for name, why in self.unavailable.items():
            names_of.setdefault(why, []).append(name)
        return [
            "formats: " + ", ".join(self.formats),
            *(f"not available: {', '.join(names)}: {why}" for why, names in names_of.items()),
        ]


def query_capabilities() -> Capabilities:
    """Try every format."""
    formats: list[str] = []
    unavailable: dict[str, str] = {}
    for name, dump_format in all_dump_formats().items():
        try:
            dump_format.require(DumpRequest(format=name))
        except CodecUnavailableError as error:
            unavailable[name] = str(error)
        else:
            formats.append(name)
    return Capabilities(tuple(formats), unavailable)
