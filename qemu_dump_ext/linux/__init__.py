"""What is known of a Linux kernel from its memory."""

from __future__ import annotations
