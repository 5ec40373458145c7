"""Where crashes go from the store: reports, metrics, uploads."""

from __future__ import annotations
