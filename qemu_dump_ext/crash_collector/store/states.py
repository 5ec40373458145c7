"""What people made of a signature: open, acknowledged, resolved, come back, or merged into another.

They are in the store in `.states.json`, by signature; what has none there is open.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from qemu_dump_ext.crash_collector.forms import MOMENT_LENGTH_MAX, SIGNATURE_ID, check_moment
from qemu_dump_ext.crash_collector.store.files import replace_file, set_aside
from qemu_dump_ext.errors import DumpWriteError, RequestError
from qemu_dump_ext.value import Value

if TYPE_CHECKING:
    from qemu_dump_ext.crash_collector.record import CrashRecord

STATES_FILE = ".states.json"
STATES_BYTES_MAX = 64 << 20
_NOTE_MAX = 2000
_RELEASE_MAX = 200

StateName: TypeAlias = Literal["open", "regression", "acknowledged", "resolved", "merged"]
STATE_NAMES: tuple[StateName, ...] = get_args(StateName)
"""What needs somebody first."""

_logger = logging.getLogger(__name__)


class SignatureState(Value):
    """Of one signature.

    Attributes:
        state: The word.
        note: What people wrote about it.
        fixed_in: Release of the first kernel in which it is resolved; None: in all.
        into: The signature that it is the same as, where it is merged.
        changed: When this was said; None: never.
    """

    state: StateName = "open"
    note: str = ""
    fixed_in: str | None = None
    into: str | None = None
    changed: str | None = None


OPEN = SignatureState()


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
            return parse_states(file.read(STATES_BYTES_MAX))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if keep_damaged:
            _logger.warning("%s is passed over: %s", path, reason)
        else:
            set_aside(path, reason)
    return SignatureStates({})


def parse_states(text: bytes) -> SignatureStates:
    """Read what `states_text` wrote; checked by hand, for every list of crashes reads it.

    Raises:
        ValueError: It is something else; says where.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no object of JSON")  # noqa: TRY004 - what is damaged is told so
    return SignatureStates({name: _parsed_state(name, state) for name, state in content.items()})


def _parsed_state(name: str, content: Any) -> SignatureState:
    if not SIGNATURE_ID.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is no signature")
    if not isinstance(content, dict) or not content.keys() <= _CHECKS.keys():
        raise ValueError(f"{name} has other words than {', '.join(_CHECKS)}")
    for word, value in content.items():
        if not _CHECKS[word](value):
            raise ValueError(f"{name}.{word} is not what it should be")
    return SignatureState(**content)


def _is_text(value: object, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_moment(value: object) -> bool:
    return _is_text(value, MOMENT_LENGTH_MAX) and bool(check_moment(str(value)))


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "state": lambda value: value in STATE_NAMES,
    "note": lambda value: _is_text(value, _NOTE_MAX),
    "fixed_in": lambda value: value is None or _is_text(value, _RELEASE_MAX),
    "into": lambda value: (
        value is None or bool(isinstance(value, str) and SIGNATURE_ID.fullmatch(value))
    ),
    "changed": lambda value: value is None or _is_moment(value),
}


def states_text(states: SignatureStates) -> bytes:
    """Return what is written down of them."""
    content = {name: asdict(state) for name, state in states.known.items() if state != OPEN}
    return json.dumps(content, indent=1).encode()


def write_states(path: Path, states: SignatureStates) -> None:
    """Write them; hold the lock of the store.

    Raises:
        DumpWriteError: It cannot be written.
    """
    try:
        replace_file(path, states_text(states))
    except OSError as error:
        raise DumpWriteError(f"cannot write {path}: {error.strerror}") from error


def check_merge(states: SignatureStates, signature_id: str, into: str) -> None:
    """Check that one signature can be merged into another.

    Raises:
        RequestError: They are one already.
    """
    if states.canonical(into) == states.canonical(signature_id):
        raise RequestError(f"{signature_id} and {into} are one already")
