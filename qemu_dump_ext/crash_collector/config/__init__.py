"""What the collector's configuration may say."""

from __future__ import annotations
