"""crash and drgn: what proves that they open a dump, what they tell, how a person starts them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qemu_dump_ext.errors import DumpError

_SECONDS = 600
_TRACE_SECONDS = 60
_DRGN_PROOF = "print('OSRELEASE', prog['UTS_RELEASE'].string_().decode())"
_CRASH_PROOF = "sys\nquit\n"
_PROOF: Mapping[str, str] = {"crash": "RELEASE: ", "drgn": "OSRELEASE "}
_TRACE_SCRIPT = Path(__file__).with_name("drgn_trace.py")
_TRACE_PROOF = "TRACE "


class ReaderError(DumpError):
    """A reader does not tell what it was asked for."""


def reader_command(reader: str, dump: Path, vmlinux: Path | None) -> list[str]:
    """Return the command that opens a dump.

    Args:
        reader: `crash` or `drgn`.
        dump: The file.
        vmlinux: The kernel's vmlinux with DWARF; crash opens nothing without.
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
    text = "" if reader == "drgn" else _CRASH_PROOF
    try:
        _run(argv, text, _PROOF[reader], _SECONDS)
    except ReaderError as error:
        return str(error)
    return None


def has_drgn() -> bool:
    """Tell whether drgn is installed."""
    return importlib.util.find_spec("drgn") is not None


def trace_by_drgn(dump: Path, vmlinux: Path) -> Sequence[str]:
    """Return the functions in which the guest was, innermost first.

    Args:
        dump: The file.
        vmlinux: The kernel's vmlinux with DWARF.

    Returns:
        Those of the thread that crashed, or else of the threads on all vCPUs, one behind the other.

    Raises:
        ReaderError: drgn cannot tell.
    """
    argv = [*reader_command("drgn", dump, vmlinux), "-q", str(_TRACE_SCRIPT)]
    try:
        names = json.loads(_run(argv, "", _TRACE_PROOF, _TRACE_SECONDS).splitlines()[0])
    except (ReaderError, ValueError) as error:
        raise ReaderError(f"drgn {error}") from error
    return [str(name) for name in names]


def _run(argv: Sequence[str], text: str, proof: str, seconds: float) -> str:
    """Return what a program says behind the proof that it did its work."""
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
            start_new_session=True,
        )
    except OSError as error:
        raise ReaderError(f"cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ReaderError(f"did not end in {seconds} s") from error
    output = done.stdout.decode("utf-8", "replace")
    _, found, told = output.partition(proof)
    if not found:
        last = (output.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ReaderError(f"does not open it: {last[:300]}")
    return told
