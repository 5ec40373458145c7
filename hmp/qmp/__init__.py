"""The QMP side of the proxy."""

from __future__ import annotations
