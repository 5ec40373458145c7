"""What we know of Windows: its kernel's structures in guest memory, and the header of its dumps."""

from __future__ import annotations
