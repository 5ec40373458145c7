"""What a guest is to a dump, and what the engine wants from those who reach it."""

from __future__ import annotations
