"""`crash.json`: all that is known about one crash. Pure.

Every key is always there; null where something is unknown.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qemu_dump_ext.errors import DumpError

GUEST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]{0,199}")


SCHEMA_VERSION: Literal[1] = 1

CauseKind: TypeAlias = Literal[
    "guest-panicked",
    "crashloaded",
    "watchdog",
    "memory-failure",
    "shutdown",
    "reset",
    "internal-error",
    "io-error",
    "console",
    "no-progress",
    "trigger",
    "qemu-died",
]
CAUSE_KINDS: tuple[CauseKind, ...] = get_args(CauseKind)

_STRICT = ConfigDict(extra="forbid", strict=True)


class CorruptRecordError(DumpError):
    """A `crash.json` contradicts the schema."""

    exit_status = 5


@dataclass(frozen=True)
class CrashCause:
    """Why it counts as a crash.

    Attributes:
        kind: The word of the configuration.
        detail: One line for people.
        event: QEMU's event as QMP sent it, or None.
    """

    __pydantic_config__ = _STRICT

    kind: CauseKind
    detail: str
    event: dict[str, Any] | None = None


@dataclass(frozen=True)
class Signature:
    """By what the same crash is recognised.

    Attributes:
        id: 16 hexadecimal digits, of message and frames.
        message: The panic message without what differs from one crash to the next.
        frames: Functions of the call trace, innermost first.
    """

    __pydantic_config__ = _STRICT

    id: str
    message: str
    frames: tuple[str, ...]


@dataclass(frozen=True)
class DumpFacts:
    """The dump, or why there is none.

    Attributes:
        file: Its name in the directory of the crash, or None.
        format: As `DumpRequest.format_name` has it.
        bytes: Of the file.
        complete: Nothing that belongs into it is missing.
        left_out: What is missing, one line each.
        reason: Why there is no dump, or None.
        verified_by: What opened it and found no fault: `verify`, `crash`, `drgn`.
    """

    __pydantic_config__ = _STRICT

    file: str | None
    format: str
    bytes: int = 0
    complete: bool = False
    left_out: tuple[str, ...] = ()
    reason: str | None = None
    verified_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class QemuFacts:
    """The QEMU of the guest.

    Attributes:
        version: Such as `7.2.22`.
        target: QEMU's name of the architecture.
        pid: On this host; None where it is not known.
        command_line: As the kernel shows it; None where it cannot be read.
    """

    __pydantic_config__ = _STRICT

    version: str
    target: str
    pid: int | None
    command_line: tuple[str, ...] | None


@dataclass(frozen=True)
class UploadFacts:
    """Where the crash was copied to, and when that was confirmed (ISO 8601, UTC)."""

    __pydantic_config__ = _STRICT

    url: str
    time: str


@dataclass(frozen=True)
class FileFacts:
    """One file of the directory: its size, and its SHA-256 in hexadecimal digits."""

    __pydantic_config__ = _STRICT

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CrashRecord:
    """One crash.

    Attributes:
        id: `GUEST/TIME-SIGNATURE`, the directory in the store; empty before it is committed.
        guest: Its name.
        labels: From the configuration.
        time: When it happened, ISO 8601, UTC.
        cause: Why it counts.
        signature: By what it is recognised.
        dump: The dump, or why there is none.
        qemu: Whose guest.
        guest_stopped_seconds: How long we kept a guest stopped that ran.
        after_action: What the configuration wants done with the guest.
        remarks: What could not be had besides the dump, one line each.
        uploaded: None: nowhere yet.
        occurrence: The how manyth crash of its signature this is in this store, from 1.
        held: Never removed by limits.
        files: Every file of the directory but this record and the list of checksums.
        schema_version: Of this description.
    """

    __pydantic_config__ = _STRICT

    id: str
    guest: str
    labels: dict[str, str]
    time: str
    cause: CrashCause
    signature: Signature
    dump: DumpFacts
    qemu: QemuFacts
    guest_stopped_seconds: float
    after_action: str
    remarks: tuple[str, ...] = ()
    uploaded: UploadFacts | None = None
    occurrence: int = 0
    held: bool = False
    files: dict[str, FileFacts] = field(default_factory=dict)
    schema_version: Literal[1] = SCHEMA_VERSION

    @property
    def moment(self) -> datetime:
        """When it happened."""
        return datetime.fromisoformat(self.time)

    def to_json(self) -> str:
        """Return the content of `crash.json`."""
        return _RECORD.dump_json(self, indent=2).decode() + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return it as it is in `crash.json`, for JSON of more than one crash."""
        return asdict(self)


_RECORD = TypeAdapter(CrashRecord)


def parse_record(text: str | bytes) -> CrashRecord:
    """Read what `to_json` wrote.

    Raises:
        CorruptRecordError: It is no such record; says where it differs.
    """
    try:
        return _RECORD.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise CorruptRecordError(f"crash.json: {place}: {first['msg']}") from error


def utc_text(moment: datetime) -> str:
    """Return a moment as records have it: `2026-01-31T12:00:00.000001+00:00`."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def is_guest_name(name: str) -> bool:
    """Tell whether a guest of this name has a directory in a store."""
    return GUEST_NAME.fullmatch(name) is not None
