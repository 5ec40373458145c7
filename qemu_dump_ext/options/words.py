"""The words of an option that takes one of several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator


class Words(Collection[str]):
    """Words that are looked for when the first of them is asked for.

    To know those of `--format` is to import every format, and most commands name none.
    """

    def __init__(self, find: Callable[[], Collection[str]]) -> None:
        self._find = find

    def __contains__(self, word: object) -> bool:
        return word in self._find()

    def __iter__(self) -> Iterator[str]:
        return iter(self._find())

    def __len__(self) -> int:
        return len(self._find())
