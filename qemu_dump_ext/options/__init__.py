"""The words in which every door is asked for a dump."""

from __future__ import annotations
