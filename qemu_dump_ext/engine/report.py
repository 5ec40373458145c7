"""What was done, in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from qemu_dump_ext.engine.opening import NO_KERNEL, Kernel, is_file, opening
from qemu_dump_ext.errors import EXIT_INCOMPLETE, EXIT_SUCCESS
from qemu_dump_ext.value import Value


class DumpReport(Value):
    """What was done.

    Attributes:
        target: The target as the user named it.
        format: `elf`, `kdump-zlib`, `kdump-raw-zlib`, ...
        memory_size: Guest memory in the dump, in bytes.
        bytes_written: Size of what was written.
        seconds: The seconds from the first question to the last byte.
        stopped_seconds: How long the guest was kept stopped.
        memory_source: Where guest memory came from.
        passed_over: Faster memory sources, and why each was not taken.
        missing: Registers that no source gave, by note and cpu_index; zero in the dump.
        remarks: What else the user should know.
        native_refusal: Why QEMU's own notes, of which some have more registers, could not be had;
            None where they could, or QEMU has none for the target.
        doubts: What could not be found out, and may be otherwise than in the dump.
        lacking: What else of the guest could not be had, and is not in the dump.
        mended: Of a dump that was made of another one: how it differs from that; None of others.
        stopped_by_us: The guest ran before, and stood still for the dump alone.
        stood_still: The guest did not run while its memory was read.
        memory_is_slow: A faster memory source would have made the dump much shorter.
        architecture: QEMU's name of the target.
        zeros_left_out: There are no pages of zeros in the dump.
        names_kernel: The header of a kdump has the names of the kernel.
        kernel: What the kernel in the dump calls itself, as far as it tells.
    """

    target: str
    format: str
    memory_size: int
    bytes_written: int
    seconds: float
    stopped_seconds: float
    memory_source: str
    passed_over: Sequence[tuple[str, str]]
    missing: Mapping[tuple[str, int], Sequence[str]]
    remarks: Sequence[str]
    native_refusal: str | None = None
    doubts: Sequence[str] = ()
    lacking: Sequence[str] = ()
    mended: Sequence[str] | None = None
    stopped_by_us: bool = True
    stood_still: bool = True
    memory_is_slow: bool = False
    architecture: str | None = None
    zeros_left_out: bool = False
    names_kernel: bool = True
    kernel: Kernel = NO_KERNEL

    @property
    def exit_status(self) -> int:
        """EXIT_SUCCESS, or EXIT_INCOMPLETE where something could not be had."""
        return EXIT_INCOMPLETE if self.missing or self.doubts or self.lacking else EXIT_SUCCESS

    @property
    def _why_missing(self) -> str:
        if self.native_refusal is None:
            return "no source gives them"
        return f"QEMU's own notes, which have them, could not be had: {self.native_refusal}"

    def opening_line(self) -> list[str]:
        """Return the command that opens the dump here; nothing where it is in no file."""
        path = Path(self.target)
        if not is_file(path) or self.target == "-":
            return []
        found = opening(
            path,
            self.format,
            self.kernel,
            target=self.architecture,
            zeros_left_out=self.zeros_left_out,
            names_kernel=self.names_kernel,
        )
        return [f"open it: {found.line()}"] if found else []

    def lines(self, *, verbose: bool = False) -> list[str]:
        """Say it in words.

        Args:
            verbose: Say why faster memory sources were not taken, also where it cost little.
        """
        mib = 1 << 20
        rate = self.memory_size / mib / max(self.seconds, 1e-6)
        summary = (
            f"{self.target}: {self.format}, {self.memory_size / mib:.1f} MiB of guest memory in"
            f" {self.bytes_written / mib:.1f} MiB, {self.seconds:.1f} s ({rate:.0f} MiB/s"
        )
        if self.mended is None:
            still = f"guest stopped for {self.stopped_seconds:.1f} s"
            summary += f", memory by {self.memory_source})"
            before = "guest was stopped before" if self.stood_still else "guest was not stopped"
            summary += f", {still if self.stopped_by_us else before}"
        else:
            summary += ")"
        lines = [summary]
        if verbose or self.memory_is_slow:
            lines += [f"{name} was not used: {reason}" for name, reason in self.passed_over]
        lines += self.remarks
        lines += _misnamed(self.target, self.format)
        lines += [f"mended: {difference}" for difference in self.mended or ()]
        lines += [f"incomplete: {what}" for what in self.lacking]
        lines += [f"uncertain: {doubt}" for doubt in self.doubts]
        lines += [
            f"incomplete: vCPU {index} has zero for {', '.join(names)} in its note {note}:"
            f" {self._why_missing}"
            for (note, index), names in self.missing.items()
        ]
        return lines

    def to_json(self) -> str:
        """Say it to a machine: one line; keys are the attributes, and `exit_status`."""
        fields = asdict(self)
        fields["missing"] = [
            {"note": note, "vcpu": index, "registers": list(names)}
            for (note, index), names in self.missing.items()
        ]
        return json.dumps(fields | {"exit_status": self.exit_status})


def _misnamed(target: str, dump_format: str) -> list[str]:
    """Return a remark where the name of a file says another format than it has."""
    suffix = Path(target).suffix.lower()
    is_elf = dump_format == "elf"
    if is_elf and suffix == ".kdump":
        return ["an ELF core, whatever its name says: -z writes a kdump"]
    if suffix in {".elf", ".core"} and dump_format.startswith("kdump"):
        return ["a kdump, whatever its name says: without -z, -l and -s it is an ELF core"]
    return []
