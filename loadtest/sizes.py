"""Sizes of messages: one, or several with their shares.

In: `10KB`; `1KB:60,10KB:30,1MB:10`; a file of such pairs, one a line, `#` begins a comment; or `mixed`, the sizes of
real mail. Out: octets, and a mapping of octets to shares. KB and MB are 1,000 and 1,000,000 octets, KiB and MiB 1,024
and 1,048,576. Not here: what stands in a message (content). On failure: LoadError.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import LoadError

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([a-z]{0,3})", re.IGNORECASE)
_PAIR = re.compile(r"\s*([^:\s]+ ?[a-z]*)\s*[:\s]\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*%?\s*", re.IGNORECASE)
LARGEST = 1 << 30  # octets of one message

# Upper bound in octets: percent of mail below it and not below the bound before. The figures are those of Johannes
# Buchner, "Modelling realistic email traffic – email size distribution" (johannes.jakeapp.com, 2009), who has them from
# a post to the freebsd-net list of October 2002. Read them as what they are: one site, over twenty years ago; as made
# here, mean 53 KB, median 4 KB, nothing above 4 MiB. Mail has grown, the shape has stayed: "Fluctuations in email size"
# (Eur. Phys. J. Plus, 2017) finds the same heavy tail in six years of a campus's mail. For your own mail make a file
# from your log.
_MIXED = {
    2 << 10: 23.53,
    4 << 10: 25.64,
    8 << 10: 18.43,
    16 << 10: 11.98,
    32 << 10: 5.78,
    64 << 10: 5.11,
    128 << 10: 2.83,
    256 << 10: 2.44,
    512 << 10: 1.50,
    1 << 20: 1.25,
    2 << 20: 1.47,
    4 << 20: 0.04,
}
_STEPS = 4  # sizes that stand for all between two bounds, evenly on a logarithmic scale


def parse_size(text: str) -> int:
    """`1000`, `1KB`, `1.5MB` or `64KiB` as octets. Raises LoadError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].lower() not in _UNITS:
        raise LoadError(f"{text!r} is no size; 1KB, 1.5MB or 64KiB would be")
    size = round(float(found[1]) * _UNITS[found[2].lower()])
    if size > LARGEST:
        raise LoadError(f"{text!r} is more than 1 GiB")
    return size


def parse_sizes(text: str) -> dict[int, float]:
    """Sizes in octets and their shares, which need not add up to anything. Raises LoadError."""
    if text == "mixed":
        return mixed()
    # Not Path.is_file: it raises where the text is too long for a name.
    parts = text.split(",") if ":" in text and not os.path.isfile(text) else _read_lines(text)
    shares: dict[int, float] = {}
    for part in parts:
        found = _PAIR.fullmatch(part)
        if found is None:
            raise LoadError(f"{part.strip()!r} is no size with its share; 10KB:30 would be")
        size = parse_size(found[1])
        shares[size] = shares.get(size, 0.0) + float(found[2])
    if not sum(shares.values()):
        raise LoadError(f"{text!r} holds no sizes with a share")
    return {size: share for size, share in shares.items() if share}


def _read_lines(name: str) -> list[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LoadError(f"{name!r} is neither `mixed` nor sizes with shares, and no file to read: {why}") from None
    return list(filter(None, (line.partition("#")[0].strip() for line in lines)))


def mixed() -> dict[int, float]:
    """A few sizes for each row of the table."""
    return {
        round(bound / 2 * 2 ** ((step + 0.5) / _STEPS)): percent / _STEPS
        for bound, percent in _MIXED.items()
        for step in range(_STEPS)
    }
