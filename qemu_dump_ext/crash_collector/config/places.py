"""Where a configuration is, unless somebody names one."""

from __future__ import annotations

import os
from pathlib import Path

CONFIGURATION_VARIABLE = "QEMU_CRASH_COLLECTOR_CONFIG"
_NAME = "qemu-crash-collector.yaml"
SYSTEM_CONFIGURATION = Path("/etc") / _NAME


def default_configuration() -> Path:
    """Return which configuration is read; it need not be there."""
    own = user_configuration()
    is_there = os.path.isfile(own)  # noqa: PTH113 - nor where a directory may not be searched
    return named_configuration() or (own if is_there else SYSTEM_CONFIGURATION)


def named_configuration() -> Path | None:
    """Return the configuration that the environment names, or None."""
    named = os.environ.get(CONFIGURATION_VARIABLE)
    return None if named is None else Path(named)


def user_configuration() -> Path:
    """Return where a user has a configuration; it need not be there."""
    return user_directory() / _NAME


def user_directory() -> Path:
    """Return where a user's configurations are."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
    return Path(base)
