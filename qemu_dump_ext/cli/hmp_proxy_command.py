"""`qemu-hmp-proxy`: the proxy is a package beside this one, installed as `hmp_proxy`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    status: int = importlib.import_module("qemu_dump_ext.hmp_proxy.proxy").main(argv)
    return status
