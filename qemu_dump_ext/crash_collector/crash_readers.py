"""crash and drgn: what proves that they open a dump, and how a person starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_SECONDS = 600
_DRGN_PROOF = "print('OSRELEASE', prog['UTS_RELEASE'].string_().decode())"
_CRASH_PROOF = "sys\nquit\n"
_PROOF: Mapping[str, str] = {"crash": "RELEASE: ", "drgn": "OSRELEASE "}


def reader_command(reader: str, dump: Path, vmlinux: Path | None) -> list[str]:
    """Return the command that opens a dump.

    Args:
        reader: `crash` or `drgn`.
        dump: The file.
        vmlinux: With DWARF; crash opens nothing without.
    """
    if reader == "crash":
        return ["crash", *([str(vmlinux)] if vmlinux else []), str(dump)]
    symbols = ["-s", str(vmlinux)] if vmlinux else []
    return [sys.executable, "-m", "drgn", "-c", str(dump), *symbols]


def prove_open(reader: str, dump: Path, vmlinux: Path | None) -> str | None:
    """Open a dump in a reader; return why it does not, or None: it does."""
    argv = reader_command(reader, dump, vmlinux)
    argv += ["-q", "-e", _DRGN_PROOF] if reader == "drgn" else []
    argv[1:1] = ["-s"] if reader == "crash" else []
    return _run(argv, "" if reader == "drgn" else _CRASH_PROOF, _PROOF[reader])


def _run(argv: Sequence[str], text: str, proof: str) -> str | None:
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"did not end in {_SECONDS} s"
    output = done.stdout.decode("utf-8", "replace")
    if proof in output:
        return None
    last = (output.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return f"does not open it: {last[:300]}"
