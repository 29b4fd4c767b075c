"""What a run costs: forward samples from the catalogue's formulas, and seconds from a trial."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from captum_fusion._commands.explain import inputs
from captum_fusion._commands.explain.plan import Plan
from captum_fusion._passes.pace import now
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods
from captum_fusion.evaluation.cost import BACKWARD, cost, duration

#: A run that is expected to take longer, in seconds, is announced.
LONG = 10.0

_FROM_LAYER = 0.3  # the time of a sample that begins at the layer, in forward samples
_WORTH_TIMING = 40  # forward samples; a shorter run is not timed in advance
_COPIES = 4  # samples of the trial


class Estimate(NamedTuple):
    """The expected cost of a run.

    Attributes:
        samples: Forward samples for each picture, at most.
        seconds: Seconds for the whole run; None if it is short.
        cheaper: A spec that costs less, or "".
    """

    samples: int
    seconds: float | None
    cheaper: str


def estimate(plan: Plan, first: Path, pictures: int) -> Estimate:
    """Estimate the cost of a run from its first picture. A trial of a few samples is run if it may be long."""
    probe = plan.loaded.preprocess(inputs.open_image(first)).to(plan.device)
    samples, work, cheaper = 0.0, 0.0, ""
    for method in plan.methods.values():
        spec = methods.parse(method.spec)
        channels, positions = plan.sizes.get(method.layers[-1], (0, 0))
        found = cost(method.spec, channels, positions) if spec.name in METHODS else None
        if found is None:
            continue
        samples += found.forward_samples + found.layer_samples
        work += found.forward_samples + BACKWARD * found.backward_samples + _FROM_LAYER * found.layer_samples
        limited = {"max_evaluations", "preset", "region_method"} & spec.options.keys()
        if methods.takes(spec.name, "max_evaluations") and not limited and channels > 64:
            cheaper = cheaper or f"{spec.name}:max_evaluations=56"
    classes = plan.top or len(plan.targets)
    samples, work = samples * classes, work * classes * pictures
    seconds = work * _seconds_of_a_sample(plan, probe) if work > _WORTH_TIMING else None
    return Estimate(round(samples), seconds, cheaper)


def announce(found: Estimate, pictures: int) -> None:
    """Print what a long run costs."""
    if found.seconds is None or found.seconds < LONG:
        return
    hint = f" (--methods {found.cheaper} costs less)" if found.cheaper else ""
    many = f" for each of {pictures} pictures" if pictures > 1 else ""
    print(f"at most {found.samples} forward samples{many}, about {duration(found.seconds)}{hint}", flush=True)


def _seconds_of_a_sample(plan: Plan, probe: Tensor) -> float:
    """The time of a forward sample, from a trial."""
    copies = probe.repeat(_COPIES, *[1] * (probe.dim() - 1))
    with torch.no_grad():
        start = now(plan.device)
        plan.loaded.model(copies)
        return (now(plan.device) - start) / _COPIES
