"""One file for each word behind `qemu-dump`."""

from __future__ import annotations
