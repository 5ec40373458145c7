"""Guests made of public packages: fetched once, booted under TCG, nothing installed."""

from __future__ import annotations
