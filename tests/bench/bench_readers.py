"""Fill the table of docs/convert.md: which reader opens what, before and after it was converted.

    .venv/bin/python -m tests.bench.bench_readers [FORM...]

Boots the Linux guest of x86_64, stops it, and has it written in every form that convert reads; each
form is given to crash, drgn and makedumpfile, and then what convert makes of it: an ELF core and a
kdump. Prints the table in Markdown. crash, makedumpfile and gcore must be installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import drgn
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import cpu_curr

from qemu_dump_ext.cli import main as qemu_dump
from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import GuestImage, default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore
from tests.support.convert_sources import ConvertSources
from tests.support.oracle import OracleDumps
from tests.support.raw_qmp import RawQmp

_ROWS = {
    "native-elf": "QEMU's ELF",
    "native-flattened": "QEMU's kdump, flattened",
    "native-raw": "QEMU's kdump, after `-R`",
    "savevm": "the state in a qcow2 image, by `savevm`",
    "virtualbox": "VirtualBox's core",
    "xen": "Xen's core of an HVM domain",
    "lime": "LiME",
    "avml": "AVML",
    "gcore": "core of QEMU",
    "migration": "QEMU's migration stream",
}
"""By form; the last one ends with a guest that has migrated."""
_SECONDS = 300
_LEAST_FRAMES = 4
_REFUSES = "refuses"


class _Readers:
    """The three, which know what kernel the guest has."""

    def __init__(self, image: GuestImage, release: str, vmlinux: Path, folder: Path) -> None:
        self._image = image
        self._release = release
        self._vmlinux = vmlinux
        self._folder = folder

    def crash(self, path: Path) -> str:
        """Tell whether crash shows the kernel's release."""
        done = subprocess.run(
            ["crash", "-s", str(self._vmlinux), str(path)],
            input="sys\nquit\n",
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        return "opens" if f"RELEASE: {self._release}\n" in done.stdout else _REFUSES

    def drgn(self, path: Path) -> str:
        """Tell whether drgn finds the guest's processes, and what the vCPUs were doing."""
        program = drgn.Program()
        try:
            program.set_core_dump(path)
            program.load_debug_info([self._vmlinux])
            names = {task.comm.string_().decode() for task in for_each_task(program)}
        except Exception:  # noqa: BLE001 - by whatever it is refused
            return _REFUSES
        if not set(self._image.processes) <= names:
            return _REFUSES
        frames = 0
        with suppress(Exception):  # without registers, of a kdump by no kind of its own
            frames = len(program.stack_trace(cpu_curr(program, 0)))
        return "opens" if frames >= _LEAST_FRAMES else "opens, no stacks of vCPUs"

    def makedumpfile(self, path: Path) -> str:
        """Tell whether makedumpfile finds the kernel's log, and whether it filters."""
        log, filtered = self._folder / "log", self._folder / "filtered"
        for file in (log, filtered):
            file.unlink(missing_ok=True)
        opens = _succeeds("makedumpfile", "--dump-dmesg", path, log)
        if opens and self._image.kernel_log in log.read_text("utf-8", "replace"):
            filters = _succeeds("makedumpfile", "-d", "31", "-c", path, filtered)
            return "opens, filters" if filters else "opens"
        with path.open("rb") as stream:
            words = ["makedumpfile", "-R", str(filtered)]
            done = subprocess.run(
                words, stdin=stream, capture_output=True, timeout=_SECONDS, check=False
            )
        return _REFUSES if done.returncode else "`-R` only"


def _succeeds(*words: str | Path) -> bool:
    done = subprocess.run(words, capture_output=True, timeout=_SECONDS, check=False)
    return done.returncode == 0


def _ask(reader: Callable[[Path], str], path: Path) -> str:
    try:
        return reader(path)
    except subprocess.TimeoutExpired:
        return f"has not ended after {_SECONDS} s"


def _both(reader: Callable[[Path], str], elf: Path, kdump: Path) -> str:
    of_elf, of_kdump = _ask(reader, elf), _ask(reader, kdump)
    return of_elf if of_elf == of_kdump else f"ELF: {of_elf}; kdump: {of_kdump}"


def _row(name: str, source: Path, readers: _Readers, folder: Path) -> str:
    asked = (readers.crash, readers.drgn, readers.makedumpfile)
    cells = [_ask(reader, source) for reader in asked]
    made: Mapping[str, Path] = {form: folder / form for form in ("elf", "kdump-raw-zlib")}
    for form, target in made.items():
        qemu_dump(["convert", "--force", str(source), str(target), "--format", form])
    cells += [_both(reader, *made.values()) for reader in asked]
    return f"| {_ROWS[name]} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, or those rows of it that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("forms", nargs="*", choices=[[], *_ROWS], metavar="FORM")
    wanted = parser.parse_args().forms or _ROWS
    image = find_image("x86_64")
    store = ImageStore(default_cache())
    fetched = store.fetch(image, debug_symbols=True)
    if fetched.vmlinux is None:
        raise SystemExit(f"there is no vmlinux of {image.name}")
    with (
        tempfile.TemporaryDirectory() as name,
        BootedGuest(image, store.fetch(image)) as guest,
    ):
        with RawQmp(guest.qmp_sockets[1]) as qmp:
            qmp.execute("stop")
        folder = Path(name)
        sources = ConvertSources(guest, OracleDumps(guest, folder), folder)
        readers = _Readers(image, guest.files.release, fetched.vmlinux, folder)
        print(f"| IN |{'|'.join(f' {word} ' for word in _versions())}", end="")
        print("| after: crash | after: drgn | after: makedumpfile |")
        print("|" + "---|" * 7)
        for form in (form for form in _ROWS if form in wanted):
            print(_row(form, sources.make(form), readers, folder), flush=True)


def _versions() -> tuple[str, ...]:
    def told(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found = re.search(
            rf"^{words[0]}\b.*?(\d+\.\d+\.\d+)", done.stdout + done.stderr, re.MULTILINE
        )
        return f"{words[0]} {found[1] if found else ''}".strip()

    return told("crash", "--version"), f"drgn {drgn.__version__}", told("makedumpfile", "-v")


if __name__ == "__main__":
    main()
