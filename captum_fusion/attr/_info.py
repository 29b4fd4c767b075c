"""What tables and lists say of a method, kept on its class."""

from __future__ import annotations

from typing import NamedTuple

FAMILIES = ("fusion", "gradient", "region", "activation")


class MethodInfo(NamedTuple):
    """The facts about a method that the catalogue, the documentation's tables and the tests read.

    Attributes:
        name: Its name on the command line.
        family: ``"fusion"``, ``"gradient"``, ``"region"`` or ``"activation"``.
        cost: Samples that go through the network for each example: with K live channels and Z positions of the layer;
            ``(layer)`` marks samples that begin at the layer, and ``b`` counts backward samples.
        citation: First author, venue and year.
        url: The paper.
        signed: Whether the map has both signs. Default: False
        space: ``"layer"`` for maps of the layer's size, ``"input"`` for maps of the input's size. Default: ``"layer"``
        fuses_layers: Whether a list of layers gives one map. Default: False
    """

    name: str
    family: str
    cost: str
    citation: str
    url: str
    signed: bool = False
    space: str = "layer"
    fuses_layers: bool = False
