"""Which formats can be written here and now, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qemu_dump_ext.errors import CodecUnavailableError
from qemu_dump_ext.page_codecs import UNCOMPRESSED, all_page_codecs
from qemu_dump_ext.plan.request import DumpRequest


@dataclass(frozen=True)
class Capabilities:
    """An answer in the terms of QMP's query-dump-guest-memory-capability.

    Attributes:
        formats: What can be written.
        unavailable: What cannot, and why.
    """

    formats: tuple[str, ...]
    unavailable: Mapping[str, str]

    def lines(self) -> list[str]:
        """Say it in words."""
        return [
            "formats: " + ", ".join(self.formats),
            *(f"not available: {name}: {why}" for name, why in self.unavailable.items()),
        ]


def query_capabilities() -> Capabilities:
    """Try every codec."""
    formats = [DumpRequest().format_name]
    unavailable: dict[str, str] = {}
    for codec in (*all_page_codecs().values(), None):
        name = UNCOMPRESSED if codec is None else codec.name
        both = [DumpRequest(codec=name, raw=raw).format_name for raw in (False, True)]
        try:
            if codec is not None:
                codec.compressor()
        except CodecUnavailableError as error:
            unavailable |= dict.fromkeys(both, str(error))
        else:
            formats += both
    return Capabilities(tuple(formats), unavailable)
