"""Settings of the test run: the same examples each time, and no clock that decides about success."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("memfit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("memfit")
