"""Read the state of a guest in an internal snapshot of a qcow2 image.

`savevm` writes it there, `virsh snapshot-create` of a domain that runs, and whatever uses QMP's
`snapshot-save`. It is QEMU's migration stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from qemu_dump_ext.dump_readers._declaration import LISTED_MAX, DumpReader, Fit
from qemu_dump_ext.dump_readers._image import DumpImage
from qemu_dump_ext.dump_readers._vm_state_image import VmStateImage
from qemu_dump_ext.dump_readers.migration import READER as MIGRATION
from qemu_dump_ext.dump_readers.migration import MigrationFile
from qemu_dump_ext.errors import NotADumpError, RequestError
from qemu_dump_ext.structures.qcow2 import QCOW2_MAGIC, Qcow2Snapshot, parse_qcow2

_SHOWN = 20


class Qcow2File(MigrationFile):
    """An open state of a guest in an image.

    Attributes:
        snapshot: The snapshot that has it.
        snapshots: All those of the image.
    """

    def __init__(
        self, image: DumpImage, format_suffix: str = "", snapshot: str | None = None
    ) -> None:
        """Open the state in the snapshot of a name or an ID; None: the image has one alone.

        Raises:
            RequestError: There is no such snapshot, or there are several.
            NotADumpError: The image has no state of a guest.
        """
        header = parse_qcow2(image.read)
        self.snapshots = header.snapshots
        self.snapshot = _choose(header.snapshots, snapshot)
        super().__init__(VmStateImage(image, header, self.snapshot), format_suffix)
        self.format = f"qcow2{format_suffix}"


def open_snapshot(image: DumpImage, name: str) -> Qcow2File:
    """Open the state in the snapshot of a name or an ID; errors as `Qcow2File`."""
    if image.read(0, min(len(QCOW2_MAGIC), image.size)) != QCOW2_MAGIC:
        raise RequestError("--snapshot-name is for qcow2 images, and this is none")
    dump = Qcow2File(image, snapshot=name)
    dump.reader = READER.name
    return dump


def _choose(snapshots: Sequence[Qcow2Snapshot], name: str | None) -> Qcow2Snapshot:
    with_state = [one for one in snapshots if one.state_size]
    if not with_state:
        raise NotADumpError(
            f"the qcow2 image has no state of a guest: {len(snapshots) or 'no'} snapshots"
            + (", of the disk alone: that of another disk may have it" if snapshots else "")
        )
    found = with_state
    if name is not None:
        found = [one for one in with_state if one.name == name] or [
            one for one in with_state if one.identifier == name
        ]
    if len(found) == 1:
        return found[0]
    if not found and any(name in {one.name, one.identifier} for one in snapshots):
        raise RequestError(f"snapshot {name!r} is of the disk alone, and has no state of a guest")
    listed = ", ".join(f"{one.name!r} (ID {one.identifier})" for one in with_state[:_SHOWN])
    more = f" and {len(with_state) - _SHOWN} more" if len(with_state) > _SHOWN else ""
    which = "no such one" if not found else "which one?"
    raise RequestError(
        f"the qcow2 image has snapshots {listed}{more}: {which}",
        hint="--snapshot-name NAME, or ID, says which",
    )


def _describe_snapshot(snapshot: Qcow2Snapshot) -> str:
    state = f"{snapshot.state_size} bytes of state" if snapshot.state_size else "of the disk alone"
    return f"{snapshot.name} (ID {snapshot.identifier}), {state}"


READER = DumpReader(
    name="qcow2",
    probe=lambda head: Fit.SURE if head.startswith(QCOW2_MAGIC) else Fit.NO,
    open=Qcow2File,
    describe=lambda dump: {
        "snapshot": lambda: dump.snapshot.name,
        "snapshots": lambda: [_describe_snapshot(one) for one in dump.snapshots[:LISTED_MAX]],
        **MIGRATION.describe(dump),
    },
    verify=MIGRATION.verify,
)
