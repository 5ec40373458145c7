"""Crash dumps of QEMU guests, taken from outside QEMU."""

from __future__ import annotations

__version__ = "0.1.0"
