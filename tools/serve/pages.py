"""Which physical pages are free."""

from __future__ import annotations

import random


class PageAllocator:
    """Hands out page ids, in a scattered order, as after hours of serving."""

    def __init__(self, pages: int, seed: int = 0) -> None:
        self.pages = pages
        self._random = random.Random(seed)
        self._free = list(range(pages))
        self._random.shuffle(self._free)
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    @property
    def taken(self) -> frozenset[int]:
        """The pages that are in use."""
        return frozenset(self._taken)

    def take(self, count: int) -> list[int]:
        """Return `count` page ids that nobody else holds; raises RuntimeError where fewer are free."""
        if count > len(self._free):
            raise RuntimeError(f"pages: expected {count} free ones, got {len(self._free)} of {self.pages}; admit less")
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Free `pages`; raises ValueError where one of them is not in use. They come out again in any order."""
        wrong = [page for page in pages if page not in self._taken]
        if wrong or len(set(pages)) != len(pages):
            raise ValueError(f"pages: expected pages in use, each once, got {wrong or pages}; free a page once")
        self._taken.difference_update(pages)
        for page in pages:
            self._free.insert(self._random.randint(0, len(self._free)), page)

    def rename(self, new_ids: list[int]) -> None:
        """Every page `p` becomes page `new_ids[p]`, a permutation: what moving the caches' contents asks for."""
        self._free = [new_ids[page] for page in self._free]
        self._taken = {new_ids[page] for page in self._taken}


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold `tokens` tokens."""
    return -(-tokens // page_size)
