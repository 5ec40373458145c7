"""One file for each use case, under the user's word for it."""

from __future__ import annotations
