"""The ways to a guest: by a socket that is named, or by the guest's own name, UUID or PID."""

from __future__ import annotations
