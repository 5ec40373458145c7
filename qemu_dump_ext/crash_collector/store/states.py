"""What people made of a signature: open, acknowledged, resolved, come back, or merged into another.

They are in the store in `.states.json`, by signature; what has none there is open.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import ConfigDict, Field, TypeAdapter

from qemu_dump_ext.crash_collector.record import CrashRecord, Moment, SignatureId, reason_of
from qemu_dump_ext.crash_collector.store.files import replace_file, set_aside
from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.frozen import dataclass

STATES_FILE = ".states.json"
_BYTES_MAX = 64 << 20
_NOTE_MAX = 2000
_RELEASE_MAX = 200

StateName: TypeAlias = Literal["open", "regression", "acknowledged", "resolved", "merged"]
STATE_NAMES: tuple[StateName, ...] = get_args(StateName)
"""What needs somebody first."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SignatureState:
    """Of one signature.

    Attributes:
        state: The word.
        note: What people wrote about it.
        fixed_in: Release of the first kernel in which it is resolved; None: in all.
        into: The signature that it is the same as, where it is merged.
        changed: When this was said; None: never.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    state: StateName = "open"
    note: Annotated[str, Field(max_length=_NOTE_MAX)] = ""
    fixed_in: Annotated[str, Field(max_length=_RELEASE_MAX)] | None = None
    into: SignatureId | None = None
    changed: Moment | None = None


OPEN = SignatureState()
_STATES = TypeAdapter(dict[SignatureId, SignatureState])


class SignatureStates:
    """The states of all signatures, as they were when they were read.

    Attributes:
        known: By signature; the others are open.
    """

    def __init__(self, known: Mapping[str, SignatureState]) -> None:
        self.known = dict(known)

    def of(self, signature_id: str) -> SignatureState:
        """Return the state of a signature itself, which may be merged."""
        return self.known.get(signature_id, OPEN)

    def canonical(self, signature_id: str) -> str:
        """Return the signature that stands for this one: another, where it is merged."""
        seen = {signature_id}
        while (into := self.of(signature_id).into) is not None and into not in seen:
            seen.add(into)
            signature_id = into
        return signature_id

    def family(self, signature_id: str) -> frozenset[str]:
        """Return all signatures for which the same one stands as for this one."""
        head = self.canonical(signature_id)
        merged = [name for name in self.known if self.canonical(name) == head]
        return frozenset((head, signature_id, *merged))

    def effective(self, signature_id: str) -> SignatureState:
        """Return the state of the signature that stands for this one."""
        return self.of(self.canonical(signature_id))

    def after_crash(self, record: CrashRecord) -> tuple[str, SignatureState] | None:
        """Return what changes by a crash: a signature that was resolved has come back; or None."""
        head = self.canonical(record.signature.id)
        known = self.of(head)
        if known.state != "resolved" or not _is_fixed_in(record.kernel, known.fixed_in):
            return None
        return head, replace(known, state="regression", changed=record.time)


def _is_fixed_in(kernel: str | None, fixed_in: str | None) -> bool:
    """Tell whether a kernel should have the fix; where it is not known, it should."""
    if fixed_in is None or kernel is None:
        return True
    return release_key(kernel) >= release_key(fixed_in)


def release_key(release: str) -> tuple[int, ...]:
    """Return what orders releases of kernels: their numbers, and a candidate before its release."""
    head, is_candidate, candidate = release.partition("-rc")
    numbers = _numbers(head)
    numbers += [0] * (3 - len(numbers))
    return (*numbers[:3], -1, *_numbers(candidate)) if is_candidate else (*numbers, 0)


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d{1,9}", text)]


def read_states(path: Path, *, keep_damaged: bool = True) -> SignatureStates:
    """Read what `write_states` wrote; what is damaged is open again, and the log says so.

    Args:
        path: The file.
        keep_damaged: Leave a damaged file in its place, for nothing will be written there.
    """
    try:
        with path.open("rb") as file:
            return SignatureStates(_STATES.validate_json(file.read(_BYTES_MAX)))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if keep_damaged:
            _logger.warning("%s is passed over: %s", path, reason_of(error))
        else:
            set_aside(path, reason_of(error))
    return SignatureStates({})


def write_states(path: Path, states: SignatureStates) -> None:
    """Write them; hold the lock of the store.

    Raises:
        DumpWriteError: It cannot be written.
    """
    content = {name: asdict(state) for name, state in states.known.items() if state != OPEN}
    try:
        replace_file(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise DumpWriteError(f"cannot write {path}: {error.strerror}") from error


def check_merge(states: SignatureStates, signature_id: str, into: str) -> None:
    """Check that one signature can be merged into another.

    Raises:
        RequestError: They are one already.
    """
    if states.canonical(into) == states.canonical(signature_id):
        raise RequestError(f"{signature_id} and {into} are one already")
