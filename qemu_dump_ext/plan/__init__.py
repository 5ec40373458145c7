"""Decide what goes into a dump, before a byte is read or written."""

from __future__ import annotations
