"""What a list shows of each crash in a store, read without checking all the rest.

Of a thousand crashes, that takes a tenth of the time that reading their records does.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from qemu_dump_ext.crash_collector.forms import (
    CRASH_ID,
    MOMENT_LENGTH_MAX,
    SIGNATURE_ID,
    check_moment,
)
from qemu_dump_ext.crash_collector.store.files import RECORD_BYTES_MAX, RECORD_FILE
from qemu_dump_ext.value import Value

_logger = logging.getLogger(__name__)


class CrashSummary(Value):
    """One crash in short; see `CrashRecord`.

    Attributes:
        id: `GUEST/TIME-SIGNATURE`.
        guest: Its name.
        time: When it happened, ISO 8601.
        cause: The word of the configuration.
        signature: The ID of it.
        message: Of the signature.
        dump_bytes: The size of the dump; None: there is none.
        held: Never removed by limits.
    """

    id: str
    guest: str
    time: str
    cause: str
    signature: str
    message: str
    dump_bytes: int | None
    held: bool

    @property
    def moment(self) -> datetime:
        """When it happened."""
        return datetime.fromisoformat(self.time)


def crash_directories(store: Path) -> list[str]:
    """Return `GUEST/NAME` of all directories of crashes, the oldest of each guest first."""
    return [
        f"{guest}/{name}"
        for guest in sorted(_names(store))
        for name in sorted(_names(store / guest))
    ]


def _names(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if not name.startswith(".")]  # noqa: PTH208
    except OSError:
        return []  # a file, or removed meanwhile


def summaries(store: Path) -> Iterator[CrashSummary]:
    """Yield every crash; one that cannot be read is logged and passed over."""
    for name in crash_directories(store):
        try:
            yield _summary(name, json.loads(_content(f"{store}/{name}/{RECORD_FILE}")))
        except FileNotFoundError:
            continue  # removed meanwhile
        except KeyError as error:
            _logger.warning("%s is passed over: crash.json: it has no %s", store / name, error)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            _logger.warning("%s is passed over: crash.json: %s", store / name, error)


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - of many
        if os.fstat(file.fileno()).st_size > RECORD_BYTES_MAX:
            raise ValueError("it is too long")
        return file.read()


def _summary(name: str, content: dict[str, Any]) -> CrashSummary:
    signature, dump = content["signature"], content["dump"]
    found = CrashSummary(
        id=_text(content["id"]),
        guest=_text(content["guest"]),
        time=check_moment(_text(content["time"])[:MOMENT_LENGTH_MAX]),
        cause=_text(content["cause"]["kind"]),
        signature=_text(signature["id"]),
        message=_text(signature["message"]),
        dump_bytes=None if dump["file"] is None else int(dump["bytes"]),
        held=content["held"] is True,
    )
    if found.id != name or not CRASH_ID.fullmatch(name) or not name.startswith(f"{found.guest}/"):
        raise ValueError(f"it is that of {found.id[:200]!r}")
    if not SIGNATURE_ID.fullmatch(found.signature):
        raise ValueError("signature.id is none")
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a word is no text")
    return value
