"""Files of the store, written so that a crash of the host leaves the old or the new."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.record import CrashRecord, FileFacts

RECORD_FILE = "crash.json"
CHECKSUM_FILE = "SHA256SUMS"
RECORD_BYTES_MAX = 16 << 20

_logger = logging.getLogger(__name__)


def file_facts(path: Path) -> FileFacts:
    """Make a file private and durable; return its size and checksum."""
    import hashlib  # noqa: PLC0415 - large, and lists of crashes need none of it

    from qemu_dump_ext.crash_collector.record import FileFacts  # noqa: PLC0415

    path.chmod(0o600)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileFacts(os.fstat(file.fileno()).st_size, digest)


def record_files(record: CrashRecord) -> dict[str, bytes]:
    """Return the content of `crash.json`, and of the checksums of it and of all other files."""
    import hashlib  # noqa: PLC0415

    text = record.to_json().encode()
    sums = {name: facts.sha256 for name, facts in record.files.items()}
    sums[RECORD_FILE] = hashlib.sha256(text).hexdigest()
    lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    return {RECORD_FILE: text, CHECKSUM_FILE: "".join(lines).encode()}


def write_record(directory: Path, record: CrashRecord) -> None:
    """Write `crash.json` and the checksums of a crash into its directory."""
    for name, content in record_files(record).items():
        replace_file(directory / name, content)


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file for its owner alone: the old one, or all of the new one, is on the disk.

    Args:
        path: The file.
        content: What it is to have.
        durable: Wait for the disk; without, after a crash of the host it may be an empty one.
    """
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with aside.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def set_aside(path: Path, reason: str) -> None:
    """Give what is damaged another name, for whoever wants to know why; say so in the log."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    try:
        path.rename(aside)
    except OSError as error:
        _logger.error("%s is damaged: %s; it stays: %s", path, reason, error.strerror)  # noqa: TRY400
    else:
        _logger.error("%s is damaged, and now %s: %s", path, aside.name, reason)


def sync_names(directory: Path) -> None:
    """Do as `sync_directory`, for names that hold whether or not the disk takes them now."""
    try:
        sync_directory(directory)
    except OSError as error:
        _logger.warning("cannot sync %s: %s", directory, error.strerror)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
