"""What programs in Python use; its names are those of `qemu_dump_ext` itself."""

from __future__ import annotations
