"""Sockets that the proxy listens at, and connections to it."""

from __future__ import annotations
