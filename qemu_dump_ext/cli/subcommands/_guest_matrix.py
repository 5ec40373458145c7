"""Fetch, boot and dump every guest of the manifest, and let `verify` look at the dumps."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qemu_dump_ext.cli import dump_command
from qemu_dump_ext.dump_readers import open_dump
from qemu_dump_ext.engine.verify import verify_dump
from qemu_dump_ext.errors import EXIT_INCOMPLETE, EXIT_SUCCESS, DumpError
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import GuestImage
from qemu_dump_ext.guest_images.store import ImageStore
from qemu_dump_ext.value import Value

DUMPS = {
    "ELF": ("--qmp", ()),
    "ELF -p": ("--qmp", ("-p",)),
    "kdump": ("--qmp", ("-z", "-R")),
    "kdump, gdb": ("--gdb", ("-z",)),
}
_OK = "ok"


class MatrixRow(Value):
    """One guest.

    Attributes:
        name: The name of the guest.
        release: The release of the guest's kernel.
        boot_seconds: Until its marker.
        results: The results by name of the dump: `ok` with seconds, or what went wrong.
    """

    name: str
    release: str
    boot_seconds: float
    results: dict[str, str]

    @property
    def succeeded(self) -> bool:
        """Every dump is sound."""
        return bool(self.results) and all(
            result.startswith(_OK) for result in self.results.values()
        )


def try_guest(image: GuestImage, store: ImageStore, report: Callable[[str], None]) -> MatrixRow:
    """Boot one guest and take every dump of it; what goes wrong is in the row."""
    try:
        files = store.fetch(image, report=report)
        report("booting")
        started = time.monotonic()
        with BootedGuest(image, files) as guest, tempfile.TemporaryDirectory() as directory:
            booted = time.monotonic() - started
            results = {name: _try_dump(guest, name, Path(directory), report) for name in DUMPS}
    except DumpError as error:
        return MatrixRow(image.name, "-", 0.0, dict.fromkeys(DUMPS, str(error)))
    return MatrixRow(image.name, files.release, booted, results)


def _try_dump(guest: BootedGuest, name: str, directory: Path, report: Callable[[str], None]) -> str:
    report(name)
    door, words = DUMPS[name]
    path = directory / name.replace(" ", "")
    address = guest.gdb_socket if door == "--gdb" else guest.qmp_sockets[0]
    qmp = ["--qmp", str(guest.qmp_sockets[0])] if door == "--gdb" else []
    started = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as output:
        status = dump_command.main([door, str(address), *qmp, *words, str(path)])
    seconds = time.monotonic() - started
    if status not in {EXIT_SUCCESS, EXIT_INCOMPLETE}:
        return output.getvalue().strip()
    with open_dump(path) as dump:
        problems = verify_dump(dump).problems
    path.unlink()
    if problems:
        return problems[0]
    return f"{_OK}, {seconds:.1f} s" + (", registers missing" if status else "")


def matrix_lines(rows: Sequence[MatrixRow]) -> Iterator[str]:
    """Yield a table in Markdown."""
    yield "| guest | kernel | boot | " + " | ".join(DUMPS) + " |"
    yield "|---" * (3 + len(DUMPS)) + "|"
    for row in rows:
        cells = [row.name, row.release, f"{row.boot_seconds:.0f} s", *row.results.values()]
        yield "| " + " | ".join(cells) + " |"
