"""Settings of the test run: the same examples each time, and no clock that decides about success."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("memfit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("memfit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, each test that needs one is skipped by name."""
    if any("cuda" in item.keywords for item in items) and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(skip)
