"""What opens a dump: which reader, with which vmlinux, by which command.

A vmlinux is that of the kernel in the dump when it has its build ID. Source: the ELF note
NT_GNU_BUILD_ID; where debuginfod and the packages of distributions put debug symbols.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from qemu_dump_ext.errors import RequestError
from qemu_dump_ext.third_party import interpreter
from qemu_dump_ext.value import Value

READERS = ("crash", "drgn", "gdb")
VMLINUX_VARIABLE = "QEMU_DUMP_VMLINUX"
"""Environment: where kernels' files with symbols are, with `{release}` in it."""
_DEBUG_ROOT = Path("/usr/lib/debug")
_PLACES = (
    "{root}/boot/vmlinux-{release}",
    "{root}/lib/modules/{release}/vmlinux",
    "/lib/modules/{release}/build/vmlinux",
    "/boot/vmlinux-{release}",
)
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,199}")
_BUILD_ID = re.compile(r"[0-9a-f]{16,64}")
_NT_GNU_BUILD_ID, _SHT_NOTE = 3, 7
_SECTIONS_MAX, _NOTES_MAX = 4096, 1 << 16
_DEBUGINFOD_SECONDS = 900
_NOT_INSTALLED = "it is not installed"
# Names of machines as Linux has them, by QEMU's name of the target.
_MACHINES = {"i386": "i686", "ppc64": "ppc64le", "arm": "armv7l"}


class Kernel(Value):
    """The kernel in a dump, as far as its VMCOREINFO tells; it is untrusted.

    Attributes:
        release: As `uname -r` prints it; None: not known, or no Linux.
        build_id: In hexadecimal digits; None: not known, as before Linux 5.9.
    """

    release: str | None = None
    build_id: str | None = None

    @property
    def safe_release(self) -> str | None:
        """The release, where it is one that may stand in a path and in a command."""
        return self.release if self.release and _RELEASE.fullmatch(self.release) else None


NO_KERNEL = Kernel()


class Opening(Value):
    """How a dump is opened.

    Attributes:
        argv: The command.
        vmlinux: The kernel's symbols in it, or None.
        remark: What would make it better, or None.
    """

    argv: tuple[str, ...]
    vmlinux: Path | None = None
    remark: str | None = None

    def line(self) -> str:
        """Say it in one line, to be typed as it is."""
        return shlex.join(self.argv) + (f"    # {self.remark}" if self.remark else "")


def is_file(path: Path) -> bool:
    """Return whether there is a file, as far as the user may look.

    `Path.is_file` raises PermissionError where a directory may not be searched.
    """
    return os.path.isfile(path)  # noqa: PTH113


def find_vmlinux(kernel: Kernel, *, template: str | None = None) -> Path | None:
    """Return the file with the symbols of a kernel, as far as one is on this host.

    Args:
        kernel: Which one.
        template: Looked at first; may have `{release}` in it. None: what the environment has.
    """
    for path in _candidates(kernel, template or os.environ.get(VMLINUX_VARIABLE)):
        if not is_file(path):
            continue
        if kernel.build_id is None or read_build_id(path) == kernel.build_id:
            return path
    return None


def fetch_vmlinux(kernel: Kernel) -> Path | None:
    """Let debuginfod look for the symbols, where the user has its servers; may take minutes."""
    build_id = kernel.build_id or ""
    program = shutil.which("debuginfod-find")
    if (
        program is None
        or not os.environ.get("DEBUGINFOD_URLS")
        or not _BUILD_ID.fullmatch(build_id)
    ):
        return None
    try:
        done = subprocess.run(
            [program, "debuginfo", build_id],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_DEBUGINFOD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    path = Path(os.fsdecode(done.stdout.strip()))
    return path if done.returncode == 0 and is_file(path) else None


def symbols_command(kernel: Kernel) -> str | None:
    """Return the command that brings the kernel's symbols, where its distribution is known."""
    release = kernel.safe_release
    if release is None:
        return None
    if re.search(r"\.(?:el|fc|amzn)\d", release):
        return f"dnf debuginfo-install kernel-{release}"
    if re.search(r"-(?:generic|lowlatency|kvm|aws|azure|gcp|virtual)$", release):
        return f"apt install linux-image-{release}-dbgsym"
    if re.search(r"-\d+-[a-z0-9-]+$", release) or re.search(r"\+deb\d", release):
        return f"apt install linux-image-{release}-dbg"
    return None


def opening(
    dump: Path,
    dump_format: str,
    kernel: Kernel,
    *,
    target: str | None = None,
    reader: str | None = None,
    vmlinux: Path | None = None,
    zeros_left_out: bool = False,
    names_kernel: bool = True,
) -> Opening | None:
    """Return how a dump is opened on this host; None: by nothing that is known.

    Args:
        dump: The file.
        dump_format: By its name in QMP, or by that of what reads it.
        kernel: The kernel in it.
        target: QEMU's name of the architecture; None: that of this host.
        reader: `crash`, `drgn` or `gdb`; None: the first that is there and can.
        vmlinux: The kernel's symbols, in whatever is named by its user: crash needs no
            VMCOREINFO besides. None: looked for.
        zeros_left_out: The dump has no pages of zeros, which crash must be told.
        names_kernel: Its header, if it is a kdump, has the names of the kernel; QEMU's has not.

    Raises:
        RequestError: The reader cannot open it, or is not there.
    """
    is_linux = kernel.release is not None or vmlinux is not None
    vmlinux = vmlinux or find_vmlinux(kernel)
    problems = {
        name: _problem_of_format(name, dump_format, names_kernel=names_kernel)
        or _problem(name, kernel, target, vmlinux, is_linux=is_linux)
        for name in READERS
    }
    if reader is None:
        reader = next((name for name in READERS if problems[name] is None), None)
    elif (problem := problems[reader]) is not None:
        raise RequestError(f"{reader} cannot open {dump}: {problem}")
    if reader is None:
        return None
    remark = None
    if vmlinux is None and (command := symbols_command(kernel)) is not None:
        remark = f"symbols: {command}"
    argv = _argv(reader, dump, vmlinux)
    if reader == "crash" and zeros_left_out:
        argv = (argv[0], "--zero_excluded", *argv[1:])
    return Opening(argv, vmlinux, remark)


def read_build_id(path: Path) -> str | None:
    """Return the build ID of an ELF file, in hexadecimal digits; None: it has none."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if head[:4] != b"\x7fELF" or len(head) < 64:
                return None
            order = "<" if head[5] == 1 else ">"
            wide = head[4] == 2
            (at,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", head, 40 if wide else 32)
            size, count = struct.unpack_from(f"{order}HH", head, 58 if wide else 46)
            for index in range(min(count, _SECTIONS_MAX)):
                file.seek(at + index * size)
                section = file.read(64 if wide else 40)
                (kind,) = struct.unpack_from(f"{order}I", section, 4)
                offset, length = struct.unpack_from(
                    f"{order}{'QQ' if wide else 'II'}", section, 24 if wide else 16
                )
                if kind == _SHT_NOTE:
                    file.seek(offset)
                    if found := _build_id_in(file.read(min(length, _NOTES_MAX)), order):
                        return found
    except (OSError, ValueError, struct.error, OverflowError):
        pass
    return None


def _build_id_in(notes: bytes, order: str) -> str | None:
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from(f"{order}III", notes, position)
        name_at = position + 12
        at = name_at + name_size + -name_size % 4
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + 4] == b"GNU\0":
            return notes[at : at + size].hex()
        position = at + size + -size % 4
    return None


def _candidates(kernel: Kernel, template: str | None) -> Iterator[Path]:
    release, build_id = kernel.safe_release, kernel.build_id or ""
    if template is not None and (release or "{release}" not in template):
        yield Path(template.replace("{release}", release or ""))
    if _BUILD_ID.fullmatch(build_id):
        yield _DEBUG_ROOT / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
        yield Path(home) / "debuginfod_client" / build_id / "debuginfo"
    if release is not None:
        for place in _PLACES:
            yield Path(place.format(root=_DEBUG_ROOT, release=release))


def is_for_crash_alone(dump_format: str, *, names_kernel: bool) -> bool:
    """Tell whether no reader but crash, if any, opens a dump; arguments as of `opening`."""
    return all(
        _problem_of_format(reader, dump_format, names_kernel=names_kernel) is not None
        for reader in READERS
        if reader != "crash"
    )


def _problem_of_format(reader: str, dump_format: str, *, names_kernel: bool = True) -> str | None:
    """Return why a reader opens no dumps of a format, or None."""
    family = dump_format.partition("-")[0]
    is_kdump = family == "kdump"
    if reader == "gdb":
        return None if dump_format == "elf" else "it reads ELF cores alone"
    if reader == "drgn" and is_kdump and not names_kernel:
        return "its header does not name the kernel, as it is where QEMU writes it"
    if is_kdump or dump_format == "elf" or (reader == "crash" and family in {"elf", "xen"}):
        return None
    return "it reads ELF cores and kdumps"


def _problem(
    reader: str, kernel: Kernel, target: str | None, vmlinux: Path | None, *, is_linux: bool
) -> str | None:
    """Return why a reader opens no such dump here, or None."""
    if reader == "gdb":
        return None if shutil.which("gdb") else _NOT_INSTALLED
    if kernel.release is None and (reader == "drgn" or not is_linux):
        return "nothing in it tells of a Linux kernel (VMCOREINFO)"
    if reader == "drgn":
        return None if _drgn() else f"{_NOT_INSTALLED} (pip install 'qemu_dump_ext[drgn]')"
    host = os.uname().machine
    if target is not None and _MACHINES.get(target, target) != host:
        return f"it is built for {host}, and this is {target}"
    if not shutil.which("crash"):
        return _NOT_INSTALLED
    return None if vmlinux else _without_symbols(kernel)


def _without_symbols(kernel: Kernel) -> str:
    command = symbols_command(kernel)
    return f"it needs the vmlinux of {kernel.release}" + (f" ({command})" if command else "")


def _drgn() -> Sequence[str] | None:
    if program := shutil.which("drgn"):
        return (Path(program).name,)
    if importlib.util.find_spec("drgn") is not None and (python := interpreter()) is not None:
        return (python, "-m", "drgn")
    return None


def _argv(reader: str, dump: Path, vmlinux: Path | None) -> tuple[str, ...]:
    symbols = [str(vmlinux)] if vmlinux else []
    if reader == "crash":
        return ("crash", *symbols, str(dump))
    if reader == "gdb":
        return ("gdb", *symbols, "-c", str(dump))
    return (*(_drgn() or ("drgn",)), "-c", str(dump), *(("-s", *symbols) if symbols else ()))
