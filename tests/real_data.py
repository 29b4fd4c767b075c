"""Where the real networks and photographs are, which are not in the repository (CONTRIBUTING.md)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("CAPTUM_FUSION_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def builders(folder: Path = DATA) -> Any:
    """The module that builds the networks."""
    spec = importlib.util.spec_from_file_location("_real_data_builders", folder / "builders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
