"""Metadata of a method, kept on its class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

FAMILIES = ("fusion", "gradient", "region", "activation")


class MethodInfo(NamedTuple):
    """Metadata of a method, read by the catalogue, the tables of the documentation and the tests.

    Attributes:
        name: Name on the command line.
        family: ``"fusion"``, ``"gradient"``, ``"region"`` or ``"activation"``.
        cost: Forward samples per example, for a layer with K live channels and Z positions. ``(layer)`` marks samples
            that start at the layer; ``b`` marks backward samples.
        citation: Authors, venue and year.
        url: Link to the paper.
        signed: Whether the map has both signs. Default: False
        space: ``"layer"`` or ``"input"``, whichever has the same spatial size as the map. Default: ``"layer"``
        fuses_layers: Whether a list of layers is fused into one map. Default: False
        presets: Names of class methods that create the method for a purpose, each with the options that it
            sets, as in a spec. Default: none
        note: What a reader must know before using the method; shown wherever it is listed. Default: ``""``
    """

    name: str
    family: str
    cost: str
    citation: str
    url: str
    signed: bool = False
    space: str = "layer"
    fuses_layers: bool = False
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    note: str = ""
