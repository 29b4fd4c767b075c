"""Where the real networks and photographs are, which are not in the repository (CONTRIBUTING.md)."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(os.environ.get("CAPTUM_FUSION_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
