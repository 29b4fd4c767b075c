"""What holds for every class, random networks, inputs, targets and chunks.

A few cases with every change, always the same; 10 000 random ones with ``CAPTUM_FUSION_NIGHTLY=1``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_fusion import RISE, LayerAugmentedGradCAM, LayerLinearCAM
from tests.classes import EVERY_CLASS, INPUT_SPACE, SIGNED, build, chunked
from tests.networks import images, make, state_of
from tests.nightly import NIGHTLY, amount

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "leaky": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "hardtanh": nn.Hardtanh,
}


@dataclass(frozen=True)
class Shape:
    """The architecture of a random network."""

    rank: int
    channels: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    activation: str
    in_place: bool
    branches: tuple[bool, ...]
    norm: bool
    pooled: bool
    outputs: int
    scale: float
    seed: int


class Block(nn.Module):
    """Convolution, perhaps batch norm, activation; perhaps with a second branch that is added."""

    def __init__(self, shape: Shape, inputs: int, width: int, stride: int, branch: bool) -> None:
        super().__init__()
        convolution, norm = getattr(nn, f"Conv{shape.rank}d"), getattr(nn, f"BatchNorm{shape.rank}d")
        self.conv = convolution(inputs, width, 3, padding=1, stride=stride)
        self.norm = norm(width) if shape.norm else nn.Identity()
        self.act = ACTIVATIONS[shape.activation](inplace=shape.in_place)
        self.side = convolution(inputs, width, 1, stride=stride) if branch else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y if self.side is None else y + self.side(x))


class RandomNet(nn.Module):
    """Blocks, and a linear head on the last activations or on their averages."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = (shape.channels, *shape.widths)
        parts = zip(widths[:-1], shape.widths, shape.strides, shape.branches, strict=True)
        self.blocks = nn.Sequential(*(Block(shape, *part) for part in parts))
        self.pool = getattr(nn, f"AdaptiveAvgPool{shape.rank}d")(1 if shape.pooled else 2)
        self.head = nn.Linear(shape.widths[-1] * (1 if shape.pooled else 2**shape.rank), shape.outputs)
        with torch.no_grad():
            self.head.weight.mul_(shape.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(x)).flatten(1))


@st.composite
def shapes(draw: Any) -> Shape:
    rank = draw(st.sampled_from([1, 2, 2, 2, 3]))
    depth = draw(st.integers(1, 3))

    def each(strategy: Any) -> tuple[Any, ...]:
        return tuple(draw(strategy) for _ in range(depth))

    return Shape(
        rank=rank,
        channels=draw(st.integers(1, 4)),
        widths=each(st.integers(1, 6)),
        strides=each(st.sampled_from([1, 1, 2])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        in_place=draw(st.booleans()),
        branches=each(st.booleans()),
        norm=draw(st.booleans()),
        pooled=draw(st.booleans()),
        outputs=draw(st.integers(2, 5)),
        scale=draw(st.sampled_from([1.0, 20.0])),
        seed=draw(st.integers(0, 1000)),
    )


@dataclass(frozen=True)
class Case:
    """One call."""

    shape: Shape
    layer: tuple[int, str]
    size: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    targets: tuple[int, ...]
    form: str
    chunk: int | None
    other_chunk: int | None
    frozen: bool
    scale: float
    seed: int


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "mirrored": lambda x: x.flip(-1).contiguous().mT.contiguous().mT if x.dim() > 3 else x,
}
FORMS = {
    "list": list,
    "tensor": torch.tensor,
    "list of tuples": lambda targets: [(target,) for target in targets],
}


@st.composite
def cases(draw: Any) -> Case:
    shape = draw(shapes())
    examples = draw(st.integers(1, 3))
    chunk = st.sampled_from([None, 1, 2, 5, 64])
    return Case(
        shape=shape,
        layer=(draw(st.integers(0, len(shape.widths) - 1)), draw(st.sampled_from(["block", "conv", "act"]))),
        size=tuple(draw(st.integers(3, {1: 14, 2: 9, 3: 6}[shape.rank])) for _ in range(shape.rank)),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16])),
        targets=tuple(draw(st.integers(0, shape.outputs - 1)) for _ in range(examples)),
        form=draw(st.sampled_from(sorted(FORMS))),
        chunk=draw(chunk),
        other_chunk=draw(chunk),
        frozen=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0])),
        seed=draw(st.integers(0, 1000)),
    )


def network(case: Case) -> tuple[Any, nn.Module, Tensor]:
    """The network, the layer and the inputs of a case."""
    model = make(RandomNet, seed=case.shape.seed, shape=case.shape).to(case.dtype)
    model.requires_grad_(not case.frozen)
    block = model.blocks[case.layer[0]]
    layer = block if case.layer[1] == "block" else getattr(block, case.layer[1])
    x = images(len(case.targets), case.shape.channels, *case.size, seed=case.seed).to(case.dtype) * case.scale
    return model, layer, LAYOUTS[case.layout](x)


def alike(a: Tensor, b: Tensor, cls: Any, case: Case) -> None:
    """Equal up to the rounding of the dtype, as a share of the largest value."""
    rounding = 1e-12 if case.dtype is torch.float64 else 1e-5
    share = 1e-2 if cls is LayerAugmentedGradCAM else 1e-4 if case.dtype is torch.float64 else 2e-2
    torch.testing.assert_close(a, b, rtol=0, atol=share * float(b.abs().max()) + rounding)


def check(cls: Any, case: Case) -> None:
    """All properties of one case."""
    model, layer, x = network(case)
    method, target = build(cls, model, layer), FORMS[case.form](case.targets)

    before, given_x = state_of(model, x), x.clone()
    try:
        maps = method.attribute(x, target, **chunked(cls, case.chunk))
    except ValueError as error:
        if cls is not LayerAugmentedGradCAM or "two spatial dimensions" not in str(error):
            raise
        assert state_of(model, x) == before
        return
    note(f"map of shape {tuple(maps.shape)}, largest value {float(maps.abs().max()):.3g}")
    assert state_of(model, x) == before
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert torch.equal(x, given_x)

    strides = math.prod(case.shape.strides[: case.layer[0] + 1])
    size = tuple(math.ceil(n / strides) for n in case.size)
    if cls in INPUT_SPACE or cls.info.space == "input":
        size = case.size
    assert maps.shape[0] == len(x)
    assert tuple(maps.shape[2:]) == size
    assert maps.dtype is case.dtype
    assert not maps.requires_grad
    assert maps.isfinite().all()
    if cls in INPUT_SPACE:
        assert ((maps >= 0) & (maps <= 1)).all()
    elif cls is RISE or (cls in EVERY_CLASS and not cls_signed(cls)):
        assert (maps >= 0).all()

    if case.chunk is not None or not chunked(cls, None):
        assert torch.equal(method.attribute(x, target, **chunked(cls, case.chunk)), maps), "not deterministic"
    if case.dtype is torch.bfloat16:
        return
    alike(method.attribute(x, target, **chunked(cls, case.other_chunk)), maps, cls, case)
    alone = [method.attribute(x[i : i + 1], t, **chunked(cls, case.chunk)) for i, t in enumerate(case.targets)]
    for i, single in enumerate(alone):
        alike(maps[i : i + 1], single, cls, case)


def cls_signed(cls: Any) -> bool:
    return cls in SIGNED or not hasattr(cls, "info") or cls.info.signed


@pytest.mark.filterwarnings("ignore:layer. the output of .* has a single position")
@pytest.mark.parametrize("cls", EVERY_CLASS, ids=lambda cls: cls.__name__)
@settings(
    max_examples=amount(6, math.ceil(10_000 / len(EVERY_CLASS))),
    derandomize=not NIGHTLY,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_properties(cls: Any, case: Case) -> None:
    if cls is LayerLinearCAM:  # it explains the last layer of networks that end in pooling
        shape = dataclasses.replace(case.shape, pooled=True)
        case = dataclasses.replace(case, shape=shape, layer=(len(shape.widths) - 1, "block"))
    check(cls, case)
