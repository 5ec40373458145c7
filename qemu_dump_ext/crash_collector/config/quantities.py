"""Sizes, durations and templates in the configuration, as people write them."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

_DURATION = re.compile(r"(\d+(?:\.\d+)?) *(ms|s|min|h|d)")
_SECONDS_OF = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(B|KiB|MiB|GiB|TiB)")
_BYTES_OF = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _parse_duration(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError("a duration is a number of seconds, or one with ms, s, min, h or d")
    return float(match[1]) * _SECONDS_OF[match[2]]


def _parse_size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError("a size is a number of bytes, or one with B, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _BYTES_OF[match[2]])


def template(*names: str) -> AfterValidator:
    """Return a check that a text has no `{name}` but these."""

    def check(text: str) -> str:
        used = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        if not used <= set(names):
            known = ", ".join(f"{{{name}}}" for name in names)
            raise ValueError(f"{{{min(used - set(names))}}} is not known here, but {known}")
        return text

    return AfterValidator(check)


Seconds: TypeAlias = Annotated[float, BeforeValidator(_parse_duration), Field(gt=0)]
Size: TypeAlias = Annotated[int, BeforeValidator(_parse_size), Field(ge=0)]
GuestTemplate: TypeAlias = Annotated[str, template("name", "stem", "directory")]
KernelTemplate: TypeAlias = Annotated[str, template("name", "stem", "directory", "release")]
Count: TypeAlias = Annotated[int, Field(ge=0)]
