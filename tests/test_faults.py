"""Faults in the middle of a call or a run: everything is as before, nothing is lost or doubled, the next call is right.

A few kills and full disks with every change, many with ``CAPTUM_FUSION_NIGHTLY=1``.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.classes import build, chunked
from tests.networks import Net, images, make, state_of
from tests.nightly import amount
from tests.test_evaluation import content, content_of, run

TARGETS = [0, 3]


class Faulty(Net):
    """Raises in the middle of its forward pass, from call ``at`` on (or only then), or for many samples at its head."""

    calls, at, once = 0, 0, False
    error: BaseException = RuntimeError("the network failed")
    most: int | None = None

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        self.calls += 1
        if self.at and (self.calls == self.at or (self.calls > self.at and not self.once)):
            self.relu2(self.conv2(self.relu1(self.conv1(x))))
            raise self.error
        features = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        if self.most is not None and len(features) > self.most:
            raise torch.OutOfMemoryError("out of memory (in this test)")
        return self.head(self.pool(features).flatten(1))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("the network failed"),
    "interrupt": KeyboardInterrupt,
    "out of memory": lambda: torch.OutOfMemoryError("out of memory (in this test)"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_network_that_fails_at_any_call(every_cls: Any, kind: str) -> None:
    model, x = make(Faulty), images(2, 3, 6, 6)
    method, limit = build(every_cls, model, model.relu2), chunked(every_cls, 8)
    expected, before, given = method.attribute(x, TARGETS, **limit), state_of(model, x), x.clone()
    calls = model.calls
    for at in range(1, calls + 1):
        model.calls, model.at, model.error = 0, at, ERRORS[kind]()
        with pytest.raises(type(model.error)) as raised:
            method.attribute(x, TARGETS, **limit)
        assert raised.value is model.error, "the user sees the network's own error"
        assert model.calls >= at
        assert state_of(model, x) == before
        assert torch.equal(x, given)
    model.at = 0
    same(method.attribute(x, TARGETS, **limit), expected)


def test_a_network_that_fails_once(every_cls: Any) -> None:
    """An error that does not come back is raised, or the map is right as if it had not been."""
    model, x = make(Faulty), images(2, 3, 6, 6)
    model.once = True
    method, limit = build(every_cls, model, model.relu2), chunked(every_cls, 8)
    expected, before = method.attribute(x, TARGETS, **limit), state_of(model, x)
    for at in range(1, model.calls + 1):
        model.calls, model.at, model.error = 0, at, ERRORS["error"]()
        maps = raised = None
        try:
            maps = method.attribute(x, TARGETS, **limit)
        except RuntimeError as error:
            raised = error
        assert raised in (None, model.error)
        if maps is not None:
            same(maps, expected)
        assert state_of(model, x) == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_for_two_samples_is_enough(every_cls: Any, deterministic: bool) -> None:
    """Chunks become smaller until they fit; those that a user has asked for do not."""
    model, x = make(Faulty), images(1, 3, 6, 6)
    method = build(every_cls, model, model.relu2)
    expected, before = method.attribute(x, 1), state_of(model, x)
    model.most = 2
    torch.use_deterministic_algorithms(deterministic)
    try:
        same(method.attribute(x, 1), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert state_of(model, x) == before
    model.most = 1
    if chunked(every_cls, 8):
        calls = model.calls
        with pytest.raises(torch.OutOfMemoryError, match="in this test"):
            method.attribute(x, 1, **chunked(every_cls, 8))
        assert model.calls > calls
        assert state_of(model, x) == before


# ------------------------------------------------------------------------------------------------------- the evaluation

OPTIONS: dict[str, Any] = {
    "methods": ["grad-cam", "score-cam", "fusion-cam"],
    "metrics": ["average_drop", "deletion:steps=4"],
}


def in_child(work: Callable[[], Any], patience: float | None = None) -> int | None:
    """The exit code of a process that does some work; it is killed if its time is over."""
    child: Any = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(patience)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    code: int | None = child.exitcode
    return code


def test_runs_that_are_killed_at_random_moments(tmp_path: Path) -> None:
    """No row is lost or doubled, however often a run is killed."""
    whole, started = run(tmp_path / "whole", **OPTIONS), time.monotonic()
    run(tmp_path / "timed", **OPTIONS)
    seconds, moments = time.monotonic() - started, random.Random(0)
    kills, chain, longest = 0, 0, 3 * amount(4, 60)
    for _ in range(longest):
        folder = tmp_path / f"killed {chain}"
        code = in_child(lambda folder=folder: run(folder, **OPTIONS), moments.uniform(0, seconds))
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            chain += 1
        kills += code != 0
        if kills >= amount(4, 60):
            break
    assert kills >= amount(4, 60) // 2, "hardly any run was killed"
    for number in range(chain + 1):
        folder = tmp_path / f"killed {number}"
        assert content_of(run(folder, **OPTIONS)) == content_of(whole)
        assert content(folder) == content(tmp_path / "whole")
        written = (folder / "rows" / "rank-0.jsonl").read_bytes()
        assert written.endswith(b"\n")
        assert len(written.splitlines()) == len(whole.rows), "a row is lost or doubled"
        assert not [path for path in folder.rglob(".*") if path.is_file() and path.suffix not in (".lock", "")]


def test_a_file_that_a_killed_run_was_writing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(partial: str, path: Path) -> None:
        if path.suffix == ".svg":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert in_child(lambda: run(tmp_path, **OPTIONS)) == -signal.SIGKILL
    left = [path for path in tmp_path.rglob(".*.svg.*") if path.is_file()]
    assert len(left) == 1
    mine = tmp_path / "figures" / ".mine"
    mine.touch()
    run(tmp_path, **OPTIONS)
    assert not left[0].exists()
    assert mine.exists()


def test_a_disk_that_is_full(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file of the rows ends in the middle of one: the disk's error is raised, and the next run goes on."""
    whole = run(tmp_path / "whole", **OPTIONS)
    rows = (tmp_path / "whole" / "rows" / "rank-0.jsonl").stat().st_size
    sizes = random.Random(1)
    for number in range(amount(3, 40)):
        folder, limit = tmp_path / f"full {number}", sizes.randrange(1, rows)

        def limited(folder: Path = folder, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                run(folder, **OPTIONS)
            except OSError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                found = run(folder, **OPTIONS)  # in the same process, which holds no lock any more
                os._exit(3 if error.errno == errno.EFBIG and content_of(found) == content_of(whole) else 4)
            os._exit(5)

        assert in_child(limited, 120) == 3, f"{limit} bytes; {capfd.readouterr().err[-2000:]}"
        found = run(folder, **OPTIONS)
        assert content_of(found) == content_of(whole), limit
        assert content(folder) == content(tmp_path / "whole")


def test_pictures_that_are_empty_or_cut_are_named_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for kind in ("png", "jpg", "bmp", "tiff", "webp", "gif"):
        file = folder / f"whole.{kind}"
        Image.effect_noise((40, 40), 60).convert("RGB").save(file)
        content_of_file = file.read_bytes()
        (folder / f"empty.{kind}").write_bytes(b"")
        for share in (1, 10, 50, 90):
            (folder / f"cut {share:02d}.{kind}").write_bytes(content_of_file[: len(content_of_file) * share // 100])
    found = run(tmp_path / "out", folder, methods=["grad-cam"], metrics=["complexity"])
    measured = {row["image"] for row in found.rows if row["value"] is not None}
    assert {f"whole.{kind}" for kind in ("png", "jpg", "bmp", "tiff", "webp")} <= measured
    assert not [name for name in measured if not name.startswith("whole")], "half a picture is no picture"
