"""`qemu-hmp-proxy`: finds the proxy's scripts and runs them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import qemu_dump_ext

_SCRIPT = "hmp_proxy"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    package = Path(qemu_dump_ext.__file__).resolve().parent
    for folder in (package / "hmp_proxy", package.parent / "hmp"):
        if (folder / f"{_SCRIPT}.py").is_file():
            sys.path.insert(0, str(folder))
            status: int = importlib.import_module(_SCRIPT).main(argv)
            return status
    print("qemu-hmp-proxy: its scripts are not installed: reinstall qemu_dump_ext", file=sys.stderr)
    return 1
