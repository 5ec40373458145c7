"""Sizes, durations and templates in the configuration, as people write them."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from qemu_dump_ext.options.sizes import parse_size

_DURATION = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) *(ms|s|min|h|d)")
_SECONDS_OF = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _parse_duration(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError("a duration is a number of seconds, or one with ms, s, min, h or d")
    return float(match[1]) * _SECONDS_OF[match[2]]


def _parse_size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def template(*names: str) -> AfterValidator:
    """Return a check that a text has no `{name}` but these."""

    def check(text: str) -> str:
        parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
        used = {str(name) for _, name, _, _ in parts}
        if any(form or conversion for _, _, form, conversion in parts):
            raise ValueError("a {name} stands alone in its braces")
        if not used <= set(names):
            known = ", ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"{{{min(used - set(names))}}} is not known here, but {known}")
        return text

    return AfterValidator(check)


_YEARS = 100 * 365 * 86400.0
_NUMBER_MAX = (1 << 63) - 1
_TEXT_MAX = 4096
_PATTERN_MAX = 1000


def _check_path(path: Path) -> Path:
    if "\0" in str(path) or len(str(path)) > _TEXT_MAX:
        raise ValueError("no path has a NUL, or more than 4096 characters")
    return path


def _check_absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"it must begin with /, for the agent may be started anywhere: {path}")
    return path


def _compile(pattern: Any) -> Any:
    if not isinstance(pattern, str):
        return pattern
    if len(pattern) > _PATTERN_MAX:
        raise ValueError(f"a pattern has at most {_PATTERN_MAX} characters")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, (re.error, OverflowError)) else "it is too much"
        raise ValueError(f"input should be a valid regular expression: {reason}") from error


Seconds: TypeAlias = Annotated[
    float, BeforeValidator(_parse_duration), Field(gt=0, le=_YEARS, allow_inf_nan=False)
]
Size: TypeAlias = Annotated[int, BeforeValidator(_parse_size), Field(ge=0, le=_NUMBER_MAX)]
Number: TypeAlias = Annotated[int, Field(ge=-_NUMBER_MAX, le=_NUMBER_MAX)]
PathText: TypeAlias = Annotated[str, Field(max_length=_TEXT_MAX, pattern=r"\A[^\x00]*\z")]
GuestTemplate: TypeAlias = Annotated[PathText, template("name", "stem", "directory")]
KernelTemplate: TypeAlias = Annotated[PathText, template("name", "stem", "directory", "release")]
FilePath: TypeAlias = Annotated[Path, AfterValidator(_check_path)]
AbsolutePath: TypeAlias = Annotated[FilePath, AfterValidator(_check_absolute)]
Pattern: TypeAlias = Annotated[re.Pattern[str], BeforeValidator(_compile)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=_NUMBER_MAX)]
