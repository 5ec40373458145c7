"""`qemu-hmp-proxy`: the proxy is a package beside this one, installed as `hmp_proxy`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from qemu_dump_ext.cli import run_guarded
from qemu_dump_ext.third_party import import_package

_PROGRAM = "qemu-hmp-proxy"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_guarded(_PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    import_package("qemu.qmp", _PROGRAM)
    status: int = importlib.import_module("qemu_dump_ext.hmp_proxy.proxy").main(argv)
    return status
