"""`crash.json`: all that is known about one crash. Pure.

Every key is always there; null where something is unknown.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, field
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from qemu_dump_ext.crash_collector.forms import (
    CRASH_ID,
    GUEST_NAME,
    MOMENT_LENGTH_MAX,
    SIGNATURE_ID,
    check_moment,
)
from qemu_dump_ext.errors import DumpError
from qemu_dump_ext.value import Value

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")

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

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _check_file_name(text: str) -> str:
    if not _FILE_NAME.fullmatch(text):
        raise ValueError("it is no name of a file in the directory of a crash")
    return text


Moment: TypeAlias = Annotated[
    str, Field(max_length=MOMENT_LENGTH_MAX), AfterValidator(check_moment)
]
"""ISO 8601, with a time zone."""
SignatureId: TypeAlias = Annotated[str, Field(pattern=rf"\A{SIGNATURE_ID.pattern}\z")]
FileName: TypeAlias = Annotated[str, AfterValidator(_check_file_name)]
GuestName: TypeAlias = Annotated[str, Field(pattern=rf"\A{GUEST_NAME.pattern}\z")]
Number: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]


class CorruptRecordError(DumpError):
    """A `crash.json` contradicts the schema."""

    exit_status = 5


class CrashCause(Value):
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


class Signature(Value):
    """The signature of a crash, by which the same one is recognised.

    Attributes:
        id: 16 hexadecimal digits, of message and frames.
        message: The panic message without what differs from one crash to the next.
        frames: Functions of the call trace, innermost first.
    """

    __pydantic_config__ = _STRICT

    id: SignatureId
    message: str
    frames: tuple[str, ...]


class DumpFacts(Value):
    """The dump, or why there is none.

    Attributes:
        file: Its name in the directory of the crash, or None.
        format: The format of the dump, as `DumpRequest.format` has it.
        bytes: The size of the file in bytes.
        complete: Nothing that belongs into it is missing.
        left_out: What is missing, one line each.
        reason: Why there is no dump, or None.
        verified_by: What opened it and found no fault: `verify`, `crash`, `drgn`.
    """

    __pydantic_config__ = _STRICT

    file: FileName | None
    format: str
    bytes: Number = 0
    complete: bool = False
    left_out: tuple[str, ...] = ()
    reason: str | None = None
    verified_by: tuple[str, ...] = ()


class QemuFacts(Value):
    """The QEMU of the guest.

    Attributes:
        version: The version, such as `7.2.22`.
        target: QEMU's name of the architecture.
        pid: The process of QEMU on this host; None where it is not known.
        command_line: The command line of QEMU, as the kernel shows it; None where it cannot be
            read.
    """

    __pydantic_config__ = _STRICT

    version: str
    target: str
    pid: Number | None
    command_line: tuple[str, ...] | None


class UploadFacts(Value):
    """Where the crash was copied to, and when that was confirmed (ISO 8601, UTC)."""

    __pydantic_config__ = _STRICT

    url: str
    time: Moment


class FileFacts(Value):
    """One file of the directory: its size, and its SHA-256 in hexadecimal digits."""

    __pydantic_config__ = _STRICT

    bytes: Number
    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class CrashRecord(Value):
    """One crash.

    Attributes:
        id: `GUEST/TIME-SIGNATURE`, the directory in the store; empty before it is committed.
        guest: Its name.
        labels: The labels of the guest, from the configuration.
        time: When it happened, ISO 8601, UTC.
        cause: Why it counts.
        signature: What the same crash is recognised by.
        dump: The dump, or why there is none.
        qemu: Whose guest.
        guest_stopped_seconds: How long we kept a guest stopped that ran.
        after_action: What the configuration wants done with the guest.
        remarks: What could not be had besides the dump, one line each.
        kernel: Release of the guest's kernel, as VMCOREINFO has it; None: not known.
        uploaded: None: nowhere yet.
        occurrence: The how manyth crash of its signature this is in this store, from 1.
        held: Never removed by limits.
        files: Every file of the directory but this record and the list of checksums.
        schema_version: The version of this description.
    """

    __pydantic_config__ = _STRICT

    id: Annotated[str, Field(pattern=rf"\A({CRASH_ID.pattern})?\z")]
    guest: GuestName
    labels: dict[str, str]
    time: Moment
    cause: CrashCause
    signature: Signature
    dump: DumpFacts
    qemu: QemuFacts
    guest_stopped_seconds: Annotated[float, Field(ge=0)]
    after_action: str
    remarks: tuple[str, ...] = ()
    kernel: Annotated[str, Field(max_length=200)] | None = None
    uploaded: UploadFacts | None = None
    occurrence: Number = 0
    held: bool = False
    files: dict[FileName, FileFacts] = field(default_factory=dict)
    schema_version: Literal[1] = SCHEMA_VERSION

    @property
    def moment(self) -> datetime:
        """When it happened."""
        return datetime.fromisoformat(self.time)

    def to_json(self) -> str:
        """Return the content of `crash.json`; what is no text for UTF-8 becomes `?`."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "replace").decode() + "\n"

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
        record = _RECORD.validate_json(text)
    except ValidationError as error:
        raise CorruptRecordError(f"crash.json: {reason_of(error)}") from error
    if record.id and not record.id.startswith(f"{record.guest}/"):
        raise CorruptRecordError(f"crash.json: id: it is none of guest {record.guest}")
    if record.id and record.dump.file is not None and record.dump.file not in record.files:
        raise CorruptRecordError(f"crash.json: files: {record.dump.file} is not among them")
    return record


def reason_of(error: Exception) -> str:
    """Return in one line why something that was read from the disk is refused."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))[:200] or "the whole"
    return f"{place}: {first['msg']}"
