"""Have QEMU save the state of a guest into qcow2 images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.raw_qmp import RawQmp
from tests.support.waiting import wait_until


def run_job(qmp: RawQmp, command: str, **arguments: Any) -> None:
    """Have QEMU do what takes its time, and wait for it."""
    qmp.execute(command, **{"job-id": "job"}, **arguments)

    def jobs() -> Sequence[dict[str, Any]]:
        return [*qmp.execute("query-jobs")]

    wait_until(lambda: jobs()[0]["status"] == "concluded")
    (job,) = jobs()
    qmp.execute("job-dismiss", id="job")
    assert "error" not in job, job


def add_disk(qmp: RawQmp, path: Path, **options: Any) -> None:
    """Give a machine a qcow2 image that its guest does not see, by the name of the file."""
    path.touch()
    file = f"of-{path.name}"
    qmp.execute("blockdev-add", **{"driver": "file", "filename": str(path), "node-name": file})
    options = {"size": 1 << 20, **options}
    run_job(qmp, "blockdev-create", options={"driver": "qcow2", "file": file, **options})
    qmp.execute("blockdev-add", **{"driver": "qcow2", "file": file, "node-name": path.name})


def remove_disk(qmp: RawQmp, name: str) -> None:
    """Take it away again."""
    for node in (name, f"of-{name}"):
        qmp.execute("blockdev-del", **{"node-name": node})


def save_state(qmp: RawQmp, disk: str, tag: str) -> None:
    """Have a machine save its state."""
    run_job(qmp, "snapshot-save", tag=tag, vmstate=disk, devices=[disk])


def delete_state(qmp: RawQmp, disk: str, tag: str) -> None:
    """Have a machine delete a state."""
    run_job(qmp, "snapshot-delete", tag=tag, devices=[disk])
