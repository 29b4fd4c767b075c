"""The whole suite with the oldest or the newest releases of captum and PyTorch that are supported.

``python -m tests.benchmarks.versions oldest`` makes a virtual environment in a temporary folder, installs this
checkout with captum, torch and torchvision at the lower bounds of pyproject.toml, and runs the tests. ``newest`` takes
the newest releases, also release candidates. Further arguments are pytest's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = ("captum", "torch", "torchvision")


def lower_bounds() -> list[str]:
    """The oldest releases, as requirements. ``.*`` takes the last release of a series."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = {name: re.search(rf'^    "{name}>=([\d.]+)"', text, re.MULTILINE) for name in PINNED}
    return [f"{name}=={bound[1]}.*" for name, bound in bounds.items() if bound]


def main() -> int:
    """Make the environment and run the tests in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.versions", description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=["oldest", "newest"])
    which, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        releases = lower_bounds() if which.which == "oldest" else ["--pre", "--upgrade", *PINNED]
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]", *releases], check=True)
        subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True)
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
