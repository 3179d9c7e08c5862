"""Reads in threads: in order, and none begun after one has failed."""

import threading

import pytest

from xception_pl.data.errors import DataError
from xception_pl.data.fetch import each


def test_results_come_in_order() -> None:
    assert list(each(lambda number: number * number, range(50), 8)) == [number * number for number in range(50)]


def test_after_a_failure_no_other_read_is_begun() -> None:
    """The threads' first reads, of a source that is away, fail together; what they would read next is left alone."""
    begun: list[int] = []
    together = threading.Barrier(4)

    def away(number: int) -> None:
        begun.append(number)
        together.wait(60)
        raise DataError(f"{number} is away")

    with pytest.raises(DataError, match=r"^0 is away$"):
        list(each(away, range(1000), 4))
    assert sorted(begun) == [0, 1, 2, 3]
