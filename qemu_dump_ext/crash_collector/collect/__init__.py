"""Collect one crash of one guest."""

from __future__ import annotations
