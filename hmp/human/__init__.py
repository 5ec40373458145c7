"""The human monitor's side of the proxy."""

from __future__ import annotations
