"""Bytes on disk and on the wire: layouts, encoded and decoded, without any I/O."""

from __future__ import annotations
