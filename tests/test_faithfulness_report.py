"""The report of the benchmark of faithfulness: pairing, margins and Holm's correction, on values by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.benchmarks.faithfulness_report import REFERENCE, Values, holm, interval, mean_table, network_table, verdict


def rows(
    metric: str, method: str, values: dict[str, float | None], network: str = "googlenet_bvlc"
) -> list[dict[str, Any]]:
    common = {"model": f"builders:{network}", "method": method, "metric": metric}
    return [{**common, "image": image, "value": value} for image, value in values.items()]


def test_holm() -> None:
    """The smallest p-value counts three times, the next twice, and none less than the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])


def test_interval() -> None:
    values = np.random.default_rng(0).normal(3, 1, 400)
    mean, low, high = interval(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert interval(np.array([2.0, 2.0])) == (2, 2, 2)


def test_differences_are_paired_and_over_networks() -> None:
    values = Values(
        rows("overall:steps=14", REFERENCE, {"a": 1.0, "b": 2.0, "c": None})
        + rows("overall:steps=14", "new", {"a": 1.5, "b": 2.5, "c": 9.0})
        + rows("overall:steps=14", REFERENCE, {"a": 0.0, "b": 0.0}, "squeezenet1_0")
        + rows("overall:steps=14", "new", {"a": 1.0, "b": 2.0}, "squeezenet1_0")
    )
    assert values.differences("googlenet_bvlc", "new", "overall").tolist() == [0.5, 0.5]
    assert values.over_networks("new", "overall", difference=True).tolist() == [0.75, 1.25]
    counts = {REFERENCE: "9", "new": "7"}
    text = "\n".join(
        mean_table(values, [REFERENCE, "new"], lambda method, networks: f"{counts[method]} of {len(networks)}")
    )
    assert "| Fusion-CAM | 9 of 2 | 0.750 [0.500, 1.000] |" in text
    assert "| new | 7 of 2 | +1.000 [+0.750, +1.250] |" in text


def test_margins_and_significance() -> None:
    images, metrics = [str(i) for i in range(8)], ("overall", "average_drop:area=0.25", "energy_pointing_game")
    noise = np.random.default_rng(0).normal(0, 0.001, 8)
    values = Values(
        [row for metric in metrics for row in rows(metric, REFERENCE, dict.fromkeys(images, 0.5))]
        + rows("overall", "new", {i: 0.6 + e for i, e in zip(images, noise, strict=True)})
        + rows("average_drop:area=0.25", "new", {i: 9.5 + e for i, e in zip(images, noise, strict=True)})
        + rows("energy_pointing_game", "new", {i: 0.48 + e for i, e in zip(images, noise, strict=True)})
    )
    assert verdict(values, "new") == ["GoogLeNet, AD % at equal area"], "energy is within its margin"
    text = "\n".join(network_table(values, "new"))
    assert "**+0.100 [" in text
    assert "+9.0 [+9.0, +9.0] worse" in text
