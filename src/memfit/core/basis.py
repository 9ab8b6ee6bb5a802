"""What a profile depends on, by name, and whether that still holds: a stored profile is used only then."""

from __future__ import annotations

Basis = tuple[tuple[str, str], ...]
_SINCE = {"sharding": "none"}


def what_changed(before: Basis, now: Basis) -> str | None:
    """The first thing that is not as it was, for people; None if everything is.

    What a profile of an older version did not write down yet was not there.
    """
    known = {**_SINCE, **dict(before)} if before else {}
    for name, value in now:
        if name not in known:
            return f"nothing is known of the {name} it was made for"
        if known[name] != value:
            return f"the {name} was {known[name]} and is {value}"
    return None
