import math

import pytest

from hf_teleport.display.quantities import count, duration, size


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.00 s"),
        (0.062, "0.06 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (220, "3 min 40 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (36_000_000, "10,000 h 0 min"),
        (math.nan, "unknown"),
        (math.inf, "unknown"),
    ],
)
def test_durations(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("octets", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KiB"),
        (0.062 * 2**30, "63 MiB"),
        (2**30, "1.0 GiB"),
        (9.94 * 2**30, "9.9 GiB"),
        (9.96 * 2**30, "10 GiB"),
        (1000 * 2**20, "1.0 GiB"),
        (3000 * 2**40, "3,000 TiB"),
    ],
)
def test_sizes(octets, told):
    assert size(octets) == told


def test_counts():
    assert count(1048576) == "1,048,576"
