"""What a method costs, from the catalogue's formulas."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods

#: The time of a backward sample, in forward samples. For estimates.
BACKWARD = 2.0

#: The components of a fusion that is given none.
_USUAL = {"gradient_method": "grad-cam", "region_method": "score-cam"}


@dataclass(frozen=True)
class Cost:
    """What a map costs.

    Attributes:
        forward_samples: Samples that go through the whole network.
        backward_samples: Samples that come back.
        layer_samples: Forward samples that begin at the layer.
    """

    forward_samples: float
    backward_samples: float = 0.0
    layer_samples: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_samples + other.forward_samples,
            self.backward_samples + other.backward_samples,
            self.layer_samples + other.layer_samples,
        )


def cost(text: str, channels: int, positions: int) -> Cost | None:
    """The cost of a method of the catalogue, from its formula.

    Args:
        text (str): The spec, with a fusion's preset or components if any.
        channels (int): The live channels of the layer.
        positions (int): The positions of the layer.

    Returns:
        Cost or None: None if a formula is not understood.

    Examples::

        >>> cost("score-cam", 512, 169).forward_samples
        513.0
        >>> cost("fusion-cam:preset=fast", 512, 169)
        Cost(forward_samples=61.0, backward_samples=1.0, layer_samples=0.0)
        >>> cost("fusion-cam:gradient_method=grad-cam,region_method=ablation-cam", 512, 169).layer_samples
        512.0
    """
    spec = methods.parse(text)
    options = {**METHODS[spec.name].preset_options(spec.options.get("preset")), **spec.options}
    limit = options.get("max_evaluations")
    live = channels if limit is None else min(channels, int(limit))
    names = [name for name in _USUAL if methods.takes(spec.name, name)]
    if not any(options.get(name) for name in names):
        return _evaluated(METHODS[spec.name].info.cost, live, positions)
    total = Cost(4.0)  # the baseline, both components, and the union
    clean = 0
    for name in names:
        part = options.get(name) or _USUAL[name]
        component = methods.parse(part).name
        own = cost(part, live if methods.takes(component, "max_evaluations") else channels, positions)
        if own is None:
            return None
        total += own
        clean += "layer" in inspect.signature(METHODS[component].cls.__init__).parameters
    if "gradient_method" not in names:  # the fusion's own gradient map
        total += Cost(1.0, 1.0)
        clean += 1
    if clean == 2:  # one pass gives the layer's outputs and gradients to both
        both = total.backward_samples > 1
        total += Cost(-1.0, -1.0 if both else 0.0)
    return total


def duration(seconds: float) -> str:
    """A time in words.

    Examples::

        >>> duration(0.2), duration(42.3), duration(400)
        ('under 1 s', '42 s', '7 min')
    """
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _evaluated(formula: str, channels: int, positions: int) -> Cost | None:
    """The value of a formula such as ``"1, 1 b, 2 K + 1 (layer)"``."""
    symbols = {"": 1, "K": channels, "Z": positions, "(Z - 1)": positions - 1}
    totals = {"": 0.0, " b": 0.0, " (layer)": 0.0}
    for part in formula.split(", "):
        unit = next((unit for unit in (" b", " (layer)") if part.endswith(unit)), "")
        for term in part.removesuffix(unit).split(" + "):
            matched = re.fullmatch(r"(\d*) ?(.*)", term)
            if matched is None or matched[2] not in symbols:
                return None
            totals[unit] += int(matched[1] or 1) * symbols[matched[2]]
    return Cost(*totals.values())
