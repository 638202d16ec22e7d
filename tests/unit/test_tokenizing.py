"""Reading ahead in a thread: same items, same order, errors in their place, and no thread is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from comit_bench.errors import MissingError
from comit_bench.pipeline.tokenize import ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(ahead(iter(range(50)))) == list(range(50))
    assert list(ahead(iter([]))) == []
    assert not threads()


def test_items_are_made_while_others_are_used() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    stream = ahead(items(), depth=2)
    assert next(stream) == 0
    for _ in range(500):
        if len(made) >= 3:
            break
        time.sleep(0.01)
    assert 3 <= len(made) <= 4  # two wait, one is in the making; never the whole data set
    stream.close()
    assert not threads()


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise MissingError("gone")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(MissingError, match="gone"):
        next(stream)
    assert not threads()
