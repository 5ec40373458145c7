"""The QEMU behind the proxy."""

from __future__ import annotations
