"""Dumps by QEMU's own dump-guest-memory, of machines that were never started."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.folders import folder_for

MACHINES = {
    "x86_64": ["-m", "64", "-smp", "2"],
    "s390x": ["-m", "64"],
    "ppc64": ["-m", "256"],
    "arm": ["-M", "virt", "-m", "64"],
    "ppc": ["-m", "64"],
}
FORMATS = {"elf": "elf", "flattened": "kdump-zlib"}


@dataclass(frozen=True)
class NativeDumps:
    """The same guest in each format; `raw` is the flattened one after `makedumpfile -R`."""

    elf: Path
    flattened: Path
    raw: Path


def _dump(target: str, directory: Path) -> NativeDumps:
    program = f"qemu-system-{target}"
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    requests = [
        {"execute": "qmp_capabilities"},
        *(
            {
                "execute": "dump-guest-memory",
                "arguments": {
                    "paging": False,
                    "protocol": f"file:{directory / name}",
                    "format": dump_format,
                },
            }
            for name, dump_format in FORMATS.items()
        ),
        {"execute": "quit"},
    ]
    answers = subprocess.run(
        [program, "-S", "-nodefaults", "-display", "none", "-qmp", "stdio", *MACHINES[target]],
        input="\n".join(map(json.dumps, requests)),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert '"error"' not in answers
    raw = directory / "raw"
    with (directory / "flattened").open("rb") as stream:
        subprocess.run(
            ["makedumpfile", "-R", raw], stdin=stream, capture_output=True, check=True, timeout=120
        )
    return NativeDumps(directory / "elf", directory / "flattened", raw)


@pytest.fixture(scope="session", params=MACHINES)
def native_dumps(request) -> NativeDumps:
    """One guest after the other."""
    return _dump(request.param, folder_for(request, request.param))


@pytest.fixture(scope="session")
def x86_dumps(request: pytest.FixtureRequest) -> NativeDumps:
    """A guest with two vCPUs."""
    return _dump("x86_64", folder_for(request, "x86"))
