from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.classes import CLASSES, EVERY_CLASS

# Small networks run fastest on one thread, and two test runs on one machine do not slow each other down.
torch.set_num_threads(1)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> Any:
    """Each of the public layer methods."""
    return request.param


@pytest.fixture(params=EVERY_CLASS, ids=lambda cls: cls.__name__)
def every_cls(request: pytest.FixtureRequest) -> Any:
    """Each of the public attribution classes, also those without a layer."""
    return request.param
