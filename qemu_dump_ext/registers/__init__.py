"""Registers of vCPUs: read from their sources, and written as notes."""

from __future__ import annotations
