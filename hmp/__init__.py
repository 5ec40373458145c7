"""The HMP proxy: QEMU's human monitor for many clients, with a better dump-guest-memory."""

from __future__ import annotations
