"""`qemu-hmp-proxy`: the proxy is a package beside this one, installed as `hmp_proxy`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from qemu_dump_ext.cli import run_guarded
from qemu_dump_ext.third_party import import_package

_PROGRAM = "qemu-hmp-proxy"


def main(argv: Sequence[str] | None = None, program: str = _PROGRAM) -> int:
    """Entry point; returns the exit status."""
    return run_guarded(program, lambda: _run(argv, program))


def _run(argv: Sequence[str] | None, program: str) -> int:
    import_package("qemu.qmp", program)
    status: int = importlib.import_module("qemu_dump_ext.hmp_proxy.proxy").main(argv, program)
    return status
