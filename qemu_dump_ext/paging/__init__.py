"""Page tables of a guest: walked, and made segments of a dump."""

from __future__ import annotations
