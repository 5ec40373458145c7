"""Compare QEMU's own dump of a Windows guest with ours: time, and the guest's pause.

    .venv/bin/python -m tests.bench.bench_windows [--mib 1024] [--rounds 3]

The guest is a machine with what Windows has in memory, and for the rest with random bytes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from tests.bench.bench_dump import Case, by_cli, by_qemu, measure, table
from tests.support.windows_guest import MEMORY_MIB, WindowsImage, windows_machine

_MIB = 1 << 20
_FILLED_AT = MEMORY_MIB * _MIB
_CASES = [
    Case(" ".join(("win-dmp", *words)), by_qemu("win-dmp"), by_cli("-w", *words))
    for words in ((), ("--exact",), ("--snapshot",))
]


def _measure(mib: int, rounds: int, folder: Path) -> None:
    fill = folder / "fill"
    with fill.open("wb") as stream:
        for _ in range(mib // 2):
            stream.write(os.urandom(_MIB))
    loader = f"loader,file={fill},addr={_FILLED_AT:#x},force-raw=on"
    image = WindowsImage()
    image.set_runs([(0x1, 0x9E), (0x100, (mib << 8) - 0x100)])
    with windows_machine(
        ["qemu-system-x86_64"], folder, ["-m", str(mib), "-device", loader]
    ) as machine:
        machine.plant(image)
        print("\n".join(table([measure(case, machine, rounds, folder) for case in _CASES])))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="guest memory; half of it is filled")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-windows-", dir=Path.cwd()) as name:
        _measure(arguments.mib, arguments.rounds, Path(name))


if __name__ == "__main__":
    main()
