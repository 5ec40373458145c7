"""What is known of QEMU: its monitors, its process, its own dumps."""

from __future__ import annotations
