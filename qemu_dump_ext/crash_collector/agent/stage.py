"""Where the collection of a crash is."""

from __future__ import annotations

from enum import Enum


class Stage(Enum):
    """One behind the other; `RETRYING` leads back to `COLLECTING`."""

    SETTLING = "settling"
    """What QEMU does with the guest by itself is waited for."""
    COLLECTING = "collecting"
    """QEMU is asked; the guest may stand still because of us."""
    RETRYING = "retrying"
    """The crash could not be stored, which is tried again."""
    STORED = "stored"
    """It is stored, and what is to be done behind that is done."""
    ENDED = "ended"
    """Nothing is done any more."""
