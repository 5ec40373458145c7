"""The agent of a host: watches its guests and stores their crashes."""

from __future__ import annotations
