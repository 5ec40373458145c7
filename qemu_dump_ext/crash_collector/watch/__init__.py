"""Notice that a guest crashed."""

from __future__ import annotations
