"""One piece of work for each object of a tree, by several threads, results in the order of the objects."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from streamcrypt.storage import Tree

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD: Final = 4  # items for each thread that are taken before the first result is waited for


def scan(
    tree: Tree, workers: int, items: Iterable[Item], work: Callable[[Tree, Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """``work(tree, item)`` of every item, with a copy of the tree for each thread; what it raises ends the scan."""
    own = threading.local()
    copies: list[Tree] = []
    waiting: deque[tuple[Item, Future[Result]]] = deque()

    def run(item: Item) -> Result:
        mine: Tree | None = getattr(own, "tree", None)
        if mine is None:
            mine = own.tree = tree.copy()
            copies.append(mine)
        return work(mine, item)

    threads = ThreadPoolExecutor(workers, thread_name_prefix="streamcrypt-scan")
    try:
        for item in items:
            waiting.append((item, threads.submit(run, item)))
            if len(waiting) > _AHEAD * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    finally:
        threads.shutdown(cancel_futures=True)
        for copy in copies:
            copy.close()
