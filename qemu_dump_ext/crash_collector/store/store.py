"""The directory where crashes are kept: complete or absent, private, with checksums.

::

    STORE/GUEST/TIME-SIGNATURE/   one crash: crash.json, SHA256SUMS, and what they name
    STORE/.incoming/              under way; renamed when complete
    STORE/.signatures.json        how often each signature was seen; survives what is removed
    STORE/.states.json            what people made of each signature
    STORE/.notifications.json     what is still to be told to somebody
    STORE/.lock                   held while any of this changes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from qemu_dump_ext.crash_collector.forms import CRASH_ID
from qemu_dump_ext.crash_collector.record import (
    CorruptRecordError,
    CrashRecord,
    Moment,
    SignatureId,
    parse_record,
    reason_of,
)
from qemu_dump_ext.crash_collector.store.files import (
    CHECKSUM_FILE,
    RECORD_BYTES_MAX,
    RECORD_FILE,
    file_facts,
    replace_file,
    set_aside,
    sync_directory,
    sync_names,
    write_record,
)
from qemu_dump_ext.crash_collector.store.states import (
    STATES_FILE,
    SignatureStates,
    read_states,
    write_states,
)
from qemu_dump_ext.crash_collector.store.summary import crash_directories
from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.value import Value

_INCOMING = ".incoming"
_SIGNATURES = ".signatures.json"
_LOCK = ".lock"
_TIME_FORMAT = "%Y%m%dT%H%M%S.%fZ"
_COUNTS_BYTES_MAX = 64 << 20
_MESSAGE_MAX = 1000
_SIGNATURES_MAX = 10_000
"""A guest that makes up a message for every crash pushes out what was seen longest ago."""

_logger = logging.getLogger(__name__)


class SignatureCount(Value):
    """How often a signature was seen, and when; times as in the records."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    message: Annotated[str, Field(max_length=_MESSAGE_MAX)]
    count: Annotated[int, Field(ge=1, lt=1 << 53)]
    first_seen: Moment
    last_seen: Moment


_COUNTS = TypeAdapter(dict[SignatureId, SignatureCount])


class CrashStore:
    """One directory of crashes, shared by the agent and the commands of people.

    Attributes:
        path: The path of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_behind = False  # the file of counts misses something that is stored

    def prepare(self) -> None:
        """Make the directory if there is none, and count what was stored but not counted yet.

        Raises:
            DumpWriteError: That is not possible.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / _INCOMING).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise DumpWriteError(f"cannot create {self.path}: {error.strerror}") from error
        with self.locked():
            self._count_again()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else, of this and other processes, from changing the store.

        Raises:
            DumpWriteError: There is no such store, or it is not ours.
        """
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DumpWriteError(f"cannot lock the store {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def new_incoming(self, guest: str) -> Path:
        """Make a private directory for a crash that is under way."""
        return Path(tempfile.mkdtemp(prefix=f"{guest}-", dir=self.path / _INCOMING))

    def discard(self, incoming: Path) -> None:
        """Remove what is not to be committed."""
        shutil.rmtree(incoming, ignore_errors=True)

    def remove_incoming(self) -> list[str]:
        """Remove what was under way when the agent ended; nothing may be under way now."""
        found = sorted((self.path / _INCOMING).iterdir())
        for directory in found:
            shutil.rmtree(directory, ignore_errors=True)
        return [directory.name for directory in found]

    def commit(self, incoming: Path, record: CrashRecord) -> CrashRecord:
        """Give a crash its name; it is complete and on the disk when it appears.

        Args:
            incoming: The directory from `new_incoming`; has the files that belong to the record.
            record: `id`, `occurrence` and `files` are filled in.

        Raises:
            DumpWriteError: It cannot be written; `incoming` is left.
        """
        try:
            files = {
                path.name: file_facts(path)
                for path in sorted(incoming.iterdir())
                if path.name not in {RECORD_FILE, CHECKSUM_FILE}
            }
            with self.locked():
                counts = self._count_again() if self._is_behind else self._counts_to_change()
                known = counts.get(record.signature.id)
                record = replace(
                    record,
                    id=self._free_id(record),
                    occurrence=known.count + 1 if known else 1,
                    files=files,
                )
                write_record(incoming, record)
                sync_directory(incoming)
                final = self.directory(record.id)
                final.parent.mkdir(mode=0o700, exist_ok=True)
                incoming.rename(final)
                # From here on it is stored, whatever fails.
                for directory in (final.parent, self.path):
                    sync_names(directory)
                counts[record.signature.id] = _counted(known, record)
                self._write_counts(counts)
                self._note_regression(record)
        except OSError as error:
            raise DumpWriteError(
                f"cannot store a crash of {record.guest} in {self.path}: {error.strerror}"
            ) from error
        return record

    def directory(self, crash_id: str) -> Path:
        """Return the directory of a crash.

        Raises:
            RequestError: That is not the form of an id.
        """
        if not CRASH_ID.fullmatch(crash_id):
            raise RequestError(
                f"{crash_id!r} is no crash: GUEST/TIME-SIGNATURE, as 'list' shows it"
            )
        return self.path / crash_id

    def directories(self) -> list[Path]:
        """Return the directories of all crashes, the oldest of each guest first."""
        return [self.path / name for name in crash_directories(self.path)]

    def records(self) -> Iterator[CrashRecord]:
        """Yield every crash; one that cannot be read is logged and passed over."""
        for directory in self.directories():
            try:
                yield self._read(directory)
            except FileNotFoundError:
                continue  # removed meanwhile
            except (CorruptRecordError, OSError) as error:
                _logger.warning("%s is passed over: %s", directory, error)

    def record(self, crash_id: str) -> CrashRecord:
        """Return one crash.

        Raises:
            RequestError: There is none.
            CorruptRecordError: Its record is damaged.
        """
        try:
            return self._read(self.directory(crash_id))
        except OSError as error:
            raise RequestError(f"there is no crash {crash_id} in {self.path}") from error

    def find(self, guest: str, time: str) -> CrashRecord | None:
        """Return what is stored of a guest's crash at a moment, as records have it; None: nothing.

        What cannot be read is not there.
        """
        for directory in sorted((self.path / guest).glob(f"{_stamp(time)}-*")):
            with contextlib.suppress(CorruptRecordError, OSError):
                record = self._read(directory)
                if record.time == time:
                    return record
        return None

    def update(self, record: CrashRecord) -> None:
        """Replace the record of a crash, and the list of checksums with it; hold the lock.

        Raises:
            DumpWriteError: It cannot be written.
        """
        directory = self.directory(record.id)
        try:
            write_record(directory, record)
            sync_directory(directory)
        except OSError as error:
            raise DumpWriteError(f"cannot write {directory}: {error.strerror}") from error

    def remove_dump(self, record: CrashRecord, reason: str) -> None:
        """Remove the dump of a crash, and say in its record why; hold the lock."""
        if record.dump.file is None:
            return
        files = dict(record.files)
        files.pop(record.dump.file, None)
        dump = replace(record.dump, file=None, bytes=0, reason=reason)
        self.update(replace(record, dump=dump, files=files))
        with contextlib.suppress(FileNotFoundError):
            (self.directory(record.id) / record.dump.file).unlink()

    def remove(self, record: CrashRecord) -> None:
        """Remove a crash with all its files; hold the lock."""
        directory = self.directory(record.id)
        # Away at once, and not bit by bit.
        doomed = self.path / _INCOMING / f"removed-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            directory.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()

    def dumps_of(self, signature_id: str) -> int:
        """Return how many crashes of a signature, and of those merged with it, have their dump."""
        return sum(
            1
            for name in self.states().family(signature_id)
            for _ in self.path.glob(f"[!.]*/*-{name}*/vmcore*")
        )

    def states(self) -> SignatureStates:
        """Return what people made of the signatures."""
        return read_states(self.path / STATES_FILE)

    def states_mark(self) -> object:
        """Return what is another thing once somebody has changed the states."""
        try:
            status = (self.path / STATES_FILE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def change_states(self, change: Callable[[SignatureStates], None]) -> SignatureStates:
        """Change the states of signatures; returns what they are now.

        Raises:
            DumpWriteError: They cannot be written.
        """
        with self.locked():
            states = read_states(self.path / STATES_FILE, keep_damaged=False)
            change(states)
            write_states(self.path / STATES_FILE, states)
        return states

    def _note_regression(self, record: CrashRecord) -> None:
        # The crash is stored, whatever becomes of this.
        states = read_states(self.path / STATES_FILE)
        if (changed := states.after_crash(record)) is None:
            return
        name, state = changed
        states.known[name] = state
        try:
            write_states(self.path / STATES_FILE, states)
        except DumpWriteError as error:
            _logger.warning("%s; it misses that %s has come back", error, name)

    def signatures(self) -> dict[str, SignatureCount]:
        """Return what was counted, by signature.

        What is lost or damaged begins again with what the records say.
        """
        try:
            return self._read_counts()
        except FileNotFoundError:
            return self._counted_anew()
        except (OSError, ValueError) as error:
            _logger.warning("%s is counted anew: %s", self.path / _SIGNATURES, reason_of(error))
            return self._counted_anew()

    def _counts_to_change(self) -> dict[str, SignatureCount]:
        # What is damaged is kept for whoever wants to know why.
        path = self.path / _SIGNATURES
        try:
            return self._read_counts()
        except FileNotFoundError:
            return self._counted_anew()
        except (OSError, ValueError) as error:
            set_aside(path, reason_of(error))
            return self._counted_anew()

    def _read_counts(self) -> dict[str, SignatureCount]:
        with (self.path / _SIGNATURES).open("rb") as file:
            return _COUNTS.validate_json(file.read(_COUNTS_BYTES_MAX))

    def _counted_anew(self) -> dict[str, SignatureCount]:
        counts: dict[str, SignatureCount] = {}
        for record in sorted(self.records(), key=lambda record: record.moment):
            counts[record.signature.id] = _counted(counts.get(record.signature.id), record)
        return counts

    def free_bytes(self) -> int:
        """Return what the file system has left for us."""
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize

    def _read(self, directory: Path) -> CrashRecord:
        with (directory / RECORD_FILE).open("rb") as file:
            record = parse_record(file.read(RECORD_BYTES_MAX))
        if record.id != f"{directory.parent.name}/{directory.name}":
            raise CorruptRecordError(f"crash.json is that of {record.id}")
        return record

    def _free_id(self, record: CrashRecord) -> str:
        stamp = _stamp(record.time)
        name = f"{record.guest}/{stamp}-{record.signature.id}"
        number = 1
        while (self.path / name).exists():  # the clock was set back
            number += 1
            name = f"{record.guest}/{stamp}-{record.signature.id}.{number}"
        return name

    def _count_again(self) -> dict[str, SignatureCount]:
        # What was stored behind the last time that the counts could be written, or were: a crash
        # says which number it has.
        counts = self._counts_to_change()
        for record in sorted(self.records(), key=lambda record: record.occurrence):
            known = counts.get(record.signature.id)
            if known is None or known.count < record.occurrence:
                counts[record.signature.id] = _counted(known, record)
                self._is_behind = True
        if self._is_behind:
            self._write_counts(counts)
        return counts

    def _write_counts(self, counts: dict[str, SignatureCount]) -> None:
        while len(counts) > _SIGNATURES_MAX:
            del counts[min(counts, key=lambda name: counts[name].last_seen)]
        content = {name: asdict(count) for name, count in counts.items()}
        try:
            replace_file(self.path / _SIGNATURES, json.dumps(content, indent=1).encode())
        except OSError as error:
            _logger.warning(
                "cannot write %s: %s; what it misses is counted later",
                self.path / _SIGNATURES,
                error.strerror,
            )
            self._is_behind = True
        else:
            self._is_behind = False


def _stamp(time: str) -> str:
    return datetime.fromisoformat(time).astimezone(UTC).strftime(_TIME_FORMAT)


def _counted(known: SignatureCount | None, record: CrashRecord) -> SignatureCount:
    if known is None:
        return SignatureCount(
            record.signature.message, max(1, record.occurrence), record.time, record.time
        )
    return SignatureCount(
        record.signature.message,
        max(known.count + 1, record.occurrence),
        min(known.first_seen, record.time),
        max(known.last_seen, record.time),
    )
