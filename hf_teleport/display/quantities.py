"""Times, sizes and counts as people read them: '3 min 40 s', '64 MiB', '1,048,576'."""

import math


def duration(seconds: float) -> str:
    """A time in seconds, in words; 'unknown' if it is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def size(octets: float) -> str:
    """A number of bytes in the largest unit that fits, with two digits or more: '1.5 GiB', '64 MiB', '640 KiB'."""
    if octets < 1000:
        return f"{octets:.0f} bytes"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    unit, value = next(units), octets / 1024
    while value >= 999.5 and (larger := next(units, None)):
        unit, value = larger, value / 1024
    return f"{value:,.{1 if value < 9.95 else 0}f} {unit}"


def count(number: int) -> str:
    """A whole number with separators."""
    return f"{number:,}"
