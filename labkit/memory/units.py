"""Sizes in bytes, written and read."""

import re

GIB, MIB, KIB = 2**30, 2**20, 2**10
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 2**40,
}  # fmt: skip


LEAST_BARE, MOST = MIB, 10**18
"""Below the first, a number without a unit is hardly meant in bytes; above the other, no size is
meant at all."""


def size_text(n_bytes: float) -> str:
    """Bytes in the unit that reads best, such as `12.01 GiB`; a minus stays in front."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:,.2f} {unit}"
    return f"{n_bytes:.0f} B"


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24 GB` or `25769803776`.

    Raises:
        ValueError: it is no size; a number without a unit below 1 MiB, but 0; or above 10**18.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)", text.strip())
    if match and match[2].upper() in ("K", "M", "G", "T"):
        letter = match[2].upper()
        raise ValueError(f"{text!r} may be either of two: write {letter}B or {letter}iB")
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size: give one such as 24GiB or 80GB")
    n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if not match[2] and 0 < n_bytes < LEAST_BARE:
        raise ValueError(f"{text!r} would be bytes: give a unit, such as 24GiB")
    if n_bytes > MOST:
        raise ValueError(f"{text[:20]!r}... is too large a size: give one such as 24GiB or 80GB")
    return round(n_bytes)
