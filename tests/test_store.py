"""Rows in columns are the rows that were written, in less memory."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captum_fusion.evaluation.store import Rows, Store, is_done, joined, key_of

ROW = {"model": "net", "image": "a.png", "method": "cam", "metric": "insertion"}


def varied(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of every kind, many with the same key."""
    draw, rows = random.Random(seed), []
    for _ in range(number):
        row: dict[str, Any] = {
            "model": draw.choice(["net", "Net", "other"]), "image": draw.choice(["b", "a", "a#2", "\udc80"]),
            "method": draw.choice(["cam", "fusion-cam:theta=5"]), "target": draw.randrange(3), "metric": "insertion",
        }  # fmt: skip
        kind = draw.randrange(5)
        row["value"] = draw.random() if kind < 3 else None
        if kind == 1:
            row |= {"shares": [0.0, 0.5, 1.0][: draw.randrange(2, 4)], "curve": [draw.random() for _ in range(3)]}
        if kind == 2:
            row |= {"metric": "win_rate", "reference": draw.choice(["cam", "fusion-cam"]), "picture": "0123"}
        if kind > 2:
            row["error"] = draw.choice(["out of memory", "no label"])
        if kind == 4:
            row["final"] = True
        rows.append(row)
    return rows


def test_rows_are_a_sequence_of_the_given_dicts() -> None:
    given = varied(60)
    rows = Rows(given)
    assert len(rows) == 60
    assert list(rows) == given == rows
    assert rows[-1] == given[-1]
    assert list(rows[10:20]) == given[10:20]
    assert rows[np.array([3, 1])] == [given[3], given[1]]
    assert list(reversed(rows)) == given[::-1]
    assert list(pickle.loads(pickle.dumps(rows))) == given
    assert rows != given[1:]
    with pytest.raises(IndexError):
        rows[60]
    assert not Rows()
    assert list(Rows()) == list(Rows().latest()) == []


def test_fields_that_come_late_or_go_are_kept_apart() -> None:
    given = [{"image": "a"}, {"image": "b", "error": "x"}, {"image": "c", "curve": [1.0]}, {"image": "d", "error": "y"}]
    given = [{"value": None, **row} for row in given]
    rows = Rows(given)
    assert list(rows) == given
    codes, texts = rows.column("error")
    assert (codes.tolist(), texts) == ([-1, 0, -1, 1], ["x", "y"])
    assert rows.column("unknown")[0].tolist() == [-1] * 4
    assert [rows.curve(i).tolist() for i in range(4)] == [[], [], [1.0], []]


def test_the_latest_rows_are_those_of_a_dict() -> None:
    for seed in range(5):
        given, found = varied(200, seed), {}
        for row in given:
            key = key_of(row)
            if is_done(row) or key not in found or not is_done(found[key]):
                found[key] = row
        latest = Rows(given).latest()
        assert list(latest) == sorted(found.values(), key=key_of)
        assert list(latest.latest()) == list(latest)


def test_rows_of_several_processes_are_one_after_another() -> None:
    given = varied(30)
    assert joined([Rows(given[:20]), Rows(), Rows(given[20:])]) == given
    alone = Rows(given)
    assert joined([Rows(), alone]) is alone
    assert not joined([])


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    given = [{**ROW, "image": name, "value": 0.1} for name in ("é", "日本", "\udc80", "a b")]  # the third: not UTF-8
    given.append({**ROW, "image": "z", "value": 1 / 3, "shares": [0.0, 1.0], "curve": [0.1 + 0.2, 5e-324]})
    with Store(tmp_path) as store:
        store.append(given)
    with (tmp_path / "rank-0.jsonl").open("ab") as file:
        file.write(b'not JSON\n{"model": "net"}\n[1]\n' + json.dumps({**ROW, "image": "cut"}).encode())
    assert list(Store(tmp_path).rows()) == sorted(given, key=key_of)


def test_a_store_that_could_not_be_opened_can_be_opened_later(tmp_path: Path) -> None:
    (tmp_path / "rank-0.jsonl").mkdir()
    with pytest.raises(ValueError, match="could not be written"), Store(tmp_path):
        pass
    (tmp_path / "rank-0.jsonl").rmdir()
    with Store(tmp_path) as store:
        store.append([{**ROW, "value": 1.0}])
