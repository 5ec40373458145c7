"""What was done, in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qemu_dump_ext.errors import EXIT_INCOMPLETE, EXIT_SUCCESS


@dataclass(frozen=True)
class DumpReport:
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

    @property
    def exit_status(self) -> int:
        """EXIT_SUCCESS, or EXIT_INCOMPLETE where something could not be had."""
        return EXIT_INCOMPLETE if self.missing or self.doubts or self.lacking else EXIT_SUCCESS

    @property
    def _why_missing(self) -> str:
        if self.native_refusal is None:
            return "no source gives them"
        return f"QEMU's own notes, which have them, could not be had: {self.native_refusal}"

    def lines(self) -> list[str]:
        """Say it in words."""
        mib = 1 << 20
        rate = self.memory_size / mib / max(self.seconds, 1e-6)
        summary = (
            f"{self.target}: {self.format}, {self.memory_size / mib:.1f} MiB of guest memory in"
            f" {self.bytes_written / mib:.1f} MiB, {self.seconds:.1f} s ({rate:.0f} MiB/s"
        )
        if self.mended is None:
            summary += (
                f", memory by {self.memory_source}), guest stopped for {self.stopped_seconds:.1f} s"
            )
        else:
            summary += ")"
        lines = [summary]
        lines += [f"{name} was not used: {reason}" for name, reason in self.passed_over]
        lines += self.remarks
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
