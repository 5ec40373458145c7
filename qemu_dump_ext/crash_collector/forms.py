"""The forms that names, ids and times of crashes have. Pure, and needs no package of others."""

from __future__ import annotations

import re
from datetime import UTC, datetime

GUEST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]{0,199}")
CRASH_ID = re.compile(rf"{GUEST_NAME.pattern}/[0-9]{{8}}T[0-9.]+Z-[0-9a-f]{{16}}(\.[0-9]{{1,9}})?")
SIGNATURE_ID = re.compile(r"[0-9a-f]{16}")
MOMENT_LENGTH_MAX = 40


def is_guest_name(name: str) -> bool:
    """Tell whether a guest of this name has a directory in a store."""
    return GUEST_NAME.fullmatch(name) is not None


def utc_text(moment: datetime) -> str:
    """Return a moment as records have it: `2026-01-31T12:00:00.000001+00:00`."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def check_moment(text: str) -> str:
    """Return `text`, which is a time in ISO 8601 with a time zone.

    Raises:
        ValueError: It is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time of no time zone")
    try:
        moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a time that no calendar has") from error
    return text
