"""How much the tests with a nightly profile do: a little by default, much with ``CAPTUM_FUSION_NIGHTLY=1``."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("CAPTUM_FUSION_NIGHTLY") == "1"


def amount(quick: int, nightly: int) -> int:
    """A number of cases, calls or runs."""
    return nightly if NIGHTLY else quick
