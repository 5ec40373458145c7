from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu_dump_ext.guest_images.machine import BootedGuest
from qemu_dump_ext.guest_images.manifest import default_cache, find_image
from qemu_dump_ext.guest_images.store import ImageStore


@pytest.fixture(scope="module")
def x86_64_guest() -> Iterator[BootedGuest]:
    """A guest of this module's own, which its tests may change in the order they stand in."""
    image = find_image("x86_64")
    with BootedGuest(image, ImageStore(default_cache()).fetch(image)) as guest:
        yield guest
