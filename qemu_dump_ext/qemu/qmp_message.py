"""One line that a QMP peer sent, and what an answer in it must look like. Pure.

A peer may send anything: whatever is used later is checked here, where it enters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qemu_dump_ext.errors import MonitorAnswerError

LINE_MAX = 16 << 20
"""Bytes of the longest line that is read; `query-qmp-schema` has a quarter of a megabyte."""
_DEPTH_MAX = 200  # long backing chains of disks have some dozens
_OPENING = re.compile(rb"[\[{]")
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_message(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; its text can be written as UTF-8.

    Raises:
        ValueError: It is none, or nested too deep; says so in one line.
    """
    content: Any = None
    try:
        content = json.loads(
            line.decode("utf-8", "replace"), parse_constant=_refuse, parse_float=_float
        )
        deep = _is_deep(line, content)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg}") from error
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {_DEPTH_MAX} levels deep")
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - the text is of the wrong form
    if _LONE_SURROGATE.search(line):
        whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        content = json.loads(whole)
    return dict(content)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has the number {constant}")


def _float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits[:20])


def _is_deep(line: bytes, content: object) -> bool:
    if sum(1 for _ in _OPENING.finditer(line)) <= _DEPTH_MAX:
        return False
    level = [content]
    for _ in range(_DEPTH_MAX):
        level = [child for value in level for child in _children(value)]
        if not level:
            return False
    return True


def _children(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def run_state(answer: object) -> str:
    """Return the run state that `query-status` tells, such as `running`.

    Raises:
        MonitorAnswerError: The answer has none.
    """
    status = answer.get("status") if isinstance(answer, Mapping) else None
    return _text("query-status", status, answer)


def target_of(answer: object) -> str:
    """Return the name of the target that `query-target` tells, such as `mipsel`; as `run_state`."""
    name = answer.get("arch") if isinstance(answer, Mapping) else None
    return _text("query-target", name, answer)


def command_names(answer: object) -> list[str]:
    """Return the names of commands that `query-commands` tells; as `run_state`."""
    entries = answer if isinstance(answer, list) else [None]
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    known = [name for name in names if isinstance(name, str)]
    if len(known) != len(names):
        raise nonsense("query-commands", answer)
    return known


def version_text(version: object) -> str:
    """Return QEMU's version, such as `7.2.22`, by what greeting or `query-version` have of it.

    Args:
        version: The object around `qemu`; `unknown` is returned for any other.
    """
    numbers = version.get("qemu") if isinstance(version, Mapping) else None
    if not isinstance(numbers, Mapping):
        return "unknown"
    parts = [numbers.get(name) for name in ("major", "minor", "micro")]
    known = all(isinstance(part, int) and abs(part) < 1 << 31 for part in parts)
    return ".".join(map(str, parts)) if known else "unknown"


def monitor_text(command: str, answer: object) -> str:
    """Return what the human monitor says, by the answer to `human-monitor-command`.

    Args:
        command: The command of the human monitor; for the message.
        answer: QMP's.

    Raises:
        MonitorAnswerError: It is no text.
    """
    if not isinstance(answer, str):
        raise nonsense(command, answer)
    return answer.replace("\r\n", "\n")


def nonsense(command: str, answer: object) -> MonitorAnswerError:
    """Return the error that says that an answer makes no sense."""
    kind = "null" if answer is None else f"of type {type(answer).__name__}"
    if isinstance(answer, Mapping):
        kind = f"an object of {', '.join(map(str, list(answer)[:3])) or 'nothing'}"
    return MonitorAnswerError(command, f"the answer makes no sense: it is {kind}")


def bad_reply(command: str) -> MonitorAnswerError:
    """Return the error that says that what came for an answer is none."""
    return MonitorAnswerError(
        command, "the answer makes no sense: it has neither a result nor an error"
    )


def _text(command: str, value: object, answer: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 100:
        raise nonsense(command, answer)
    return value
