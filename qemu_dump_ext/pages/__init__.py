"""The way of guest pages through a dump: read, sifted, packed, in order."""

from __future__ import annotations
