"""The store of crashes, and its limits."""

from __future__ import annotations
