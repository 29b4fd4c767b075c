"""Conditions under which a map must be right or an error clear, for every method of this package and of its peers.

``tests/test_matrix.py`` checks every class of this package, and ``python -m tests.matrix_table`` prints the table of
docs/robustness.md. A condition calls ``explain(model, layer, x, target)``, which returns the maps of shape
(N, ..., *spatial), and raises :class:`CellError` if they are wrong.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import RISE
from tests.classes import build
from tests.networks import Net, hooks_on, images, make

Explain = Callable[[nn.Module, nn.Module, Tensor, Any], Tensor]

TARGETS = [0, 3]


class CellError(Exception):
    """A result is wrong, or something is not as it was before. The message is a cell of the table."""


@dataclass(frozen=True)
class Condition:
    """A row of the matrix.

    Attributes:
        name: What the table calls it.
        check: Explains, raises :class:`CellError` if a result is wrong, and returns the last result.
        says: Pattern of the messages that are a clear error, for a condition in which an error is a right answer.
    """

    name: str
    check: Callable[[Explain], Tensor]
    says: str | None = None


@dataclass(frozen=True)
class Cell:
    """The outcome of a condition: ``"works"``, ``"error"`` (a clear one) or ``"fails"``.

    Attributes:
        kind: The outcome.
        why: Why it fails, in a few words.
        error: The exception that was raised.
        result: The last map.
    """

    kind: str
    why: str = ""
    error: Exception | None = None
    result: Tensor | None = None


CONDITIONS: dict[str, Condition] = {}

#: Cells that are left out: RISE reads no layer.
NOT_APPLICABLE = {(RISE, "a dead layer")}


def condition(name: str, says: str | None = None) -> Callable[[Callable[[Explain], Tensor]], Condition]:
    """Add a condition to the matrix."""

    def add(check: Callable[[Explain], Tensor]) -> Condition:
        CONDITIONS[name] = Condition(name, check, says)
        return CONDITIONS[name]

    return add


def cell(condition: Condition, explain: Explain) -> Cell:
    """Run a method under a condition. Hooks that a call leaves behind, also after an error, fail every condition."""

    def watched(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Tensor:
        before = hooks_on(model)
        try:
            return explain(model, layer, x, target)
        finally:
            if hooks_on(model) != before:
                raise CellError("leaves hooks on the network")

    try:
        return Cell("works", result=condition.check(watched))
    except CellError as error:
        return Cell("fails", str(error), error)
    except Exception as error:
        if condition.says is not None and re.search(condition.says, str(error), re.IGNORECASE):
            return Cell("error", error=error)
        message = textwrap.shorten(str(error), 40, placeholder=" …")
        return Cell("fails", f"`{type(error).__name__}: {message}`", error)


def ours(cls: Any) -> Explain:
    """How a class of this package explains."""

    def explain(model: nn.Module, layer: nn.Module, x: Tensor, target: Any) -> Tensor:
        maps: Tensor = build(cls, model, layer).attribute(x, target)
        return maps

    return explain


# -------------------------------------------------------------------------------------------------------------- checks


def expect(holds: Any, otherwise: str) -> None:
    if not holds:
        raise CellError(otherwise)


def equal(a: Tensor, b: Tensor, otherwise: str) -> None:
    """Maps are equal up to rounding. The iterations of a super-resolution amplify rounding errors."""
    expect(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max()))), otherwise
    )


def right(maps: Tensor, examples: int, *sizes: tuple[int, ...]) -> Tensor:
    """Maps are finite, and of one of the sizes if any are given."""
    expect(maps.shape[0] == examples, f"{maps.shape[0]} maps for {examples} examples")
    expect(not sizes or tuple(maps.shape[-len(sizes[0]) :]) in sizes, f"a map of size {tuple(maps.shape[1:])}")
    expect(maps.isfinite().all(), "a map with NaN")
    return maps


def plain(explain: Explain, x: Tensor | None = None, target: Any = None) -> Tensor:
    """The maps under usual conditions."""
    model = make()
    return explain(model, model.relu2, images(2, 3, 8, 8) if x is None else x, TARGETS if target is None else target)


def informative(maps: Tensor) -> Tensor:
    """Maps show something: a condition on maps of zeros would hold by itself."""
    expect(maps.amax() - maps.amin() > 1e-6, "a map that is constant")
    return maps


# --------------------------------------------------------------------------------------------------------------- state


class Normed(Net):
    """Has batch norm, one in eval mode within a network in train mode, as after freezing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm, self.frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        x = self.relu2(self.frozen(self.conv2(self.relu1(self.norm(self.conv1(x))))))
        return self.head(self.pool(x).flatten(1))


@condition("train mode is kept")
def train_mode_is_kept(explain: Explain) -> Tensor:
    model = make(Normed).train()
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    maps = right(explain(model, model.relu2, images(2, 3, 8, 8), TARGETS), 2)
    expect(modes == [module.training for module in model.modules()], "changes the network's mode")
    return maps


@condition("`.grad` and `requires_grad` are kept")
def grad_is_kept(explain: Explain) -> Tensor:
    model, x = make(), images(2, 3, 8, 8)
    model.conv1.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    flags = [p.requires_grad for p in model.parameters()]
    maps = right(explain(model, model.relu2, x, TARGETS), 2)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expect(list(grads) == ["head.weight"] and (grads["head.weight"] == 7).all(), "changes `.grad` of the parameters")
    expect(flags == [p.requires_grad for p in model.parameters()], "changes `requires_grad` of the parameters")
    expect(not x.requires_grad and x.grad is None, "changes `requires_grad` of the input")
    return maps


@condition("full backward hooks work afterwards")
def backward_hooks_work_afterwards(explain: Explain) -> Tensor:
    model, x, called = make(), images(2, 3, 8, 8), []
    maps = right(explain(model, model.relu2, x, TARGETS), 2)
    handles = [
        module.register_full_backward_hook(lambda module, *gradients: called.append(module))
        for module in model.modules()
    ]
    model(x.requires_grad_()).sum().backward()
    for handle in handles:
        handle.remove()
    expect(len(called) == len(handles), "disables hooks of the user")
    return maps


@condition("frozen parameters")
def frozen_parameters(explain: Explain) -> Tensor:
    model = make().requires_grad_(False)
    maps = right(explain(model, model.relu2, images(2, 3, 8, 8), TARGETS), 2)
    expect(not any(p.requires_grad for p in model.parameters()), "unfreezes the parameters")
    equal(maps, plain(explain), "another map")
    return informative(maps)


def under(context: Any, explain: Explain) -> Tensor:
    model, expected = make(), plain(explain)
    with context():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        maps = right(explain(model, model.relu2, images(2, 3, 8, 8), TARGETS), 2)
        expect(modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), "changes the gradient mode")
    equal(maps, expected, "another map")
    return informative(expected)


@condition("under `no_grad`")
def no_grad(explain: Explain) -> Tensor:
    return under(torch.no_grad, explain)


@condition("under `inference_mode`")
def inference_mode(explain: Explain) -> Tensor:
    return under(torch.inference_mode, explain)


# --------------------------------------------------------------------------------------------------------------- inputs


@condition("a batch equals single examples")
def batch_equals_single_examples(explain: Explain) -> Tensor:
    x, targets = images(3, 3, 8, 8), [0, 3, 1]
    maps = right(plain(explain, x, targets), 3)
    for i in range(3):
        equal(maps[i : i + 1], plain(explain, x[i : i + 1], [targets[i]]), "another map in a batch")
    return informative(maps)


@condition("a constant input")
def constant_input(explain: Explain) -> Tensor:
    return right(plain(explain, torch.full((2, 3, 8, 8), 0.5)), 2)


@condition("a dead layer")
def dead_layer(explain: Explain) -> Tensor:
    model = make()
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1)
    maps = right(explain(model, model.relu2, images(2, 3, 8, 8), TARGETS), 2)
    flat = maps.flatten(1)
    expect((flat.amax(1) - flat.amin(1) < 1e-6).all(), "a map that shows something")
    return maps


@condition("an input that is not square")
def input_that_is_not_square(explain: Explain) -> Tensor:
    return informative(right(plain(explain, images(2, 3, 9, 14)), 2, (9, 14), (5, 7)))


@condition("an input of one channel")
def input_of_one_channel(explain: Explain) -> Tensor:
    model = make(channels=1, seed=2)
    return informative(right(explain(model, model.relu2, images(2, 1, 8, 8), TARGETS), 2))


def in_dtype(dtype: torch.dtype, alike: float, explain: Explain) -> Tensor:
    maps = []
    for kind in (dtype, torch.float32):
        model = make()
        with torch.no_grad():
            model.head.weight.mul_(20)  # the scores of masked inputs differ by more than the dtype's rounding
        model = model.to(kind)
        maps.append(right(explain(model, model.relu2, images(2, 3, 8, 8).to(kind), TARGETS), 2).flatten(1))
    shown = informative(maps[1]).any(1)
    similar = nn.functional.cosine_similarity(maps[0].float(), maps[1])[shown]
    expect((similar > alike).all(), "another map")
    return maps[0]


@condition("float64")
def float64(explain: Explain) -> Tensor:
    return in_dtype(torch.float64, 0.999, explain)


@condition("bfloat16")
def bfloat16(explain: Explain) -> Tensor:
    return in_dtype(torch.bfloat16, 0.95, explain)


@condition("float16")
def float16(explain: Explain) -> Tensor:
    return in_dtype(torch.float16, 0.95, explain)


@condition("a convolution before an in-place ReLU", says="layer")
def convolution_before_an_in_place_relu(explain: Explain) -> Tensor:
    usual, in_place, x = make(), make(inplace=True), images(2, 3, 8, 8)
    for name in ("conv1", "conv2"):
        maps = right(explain(in_place, getattr(in_place, name), x, TARGETS), 2)
        equal(maps, explain(usual, getattr(usual, name), x, TARGETS), "the map of the ReLU's output")
    return informative(maps)


def with_dimensions(dims: int, explain: Explain) -> Tensor:
    model, size = make(dims=dims), (8, 6, 10)[:dims]
    maps = explain(model, model.relu2, images(2, 3, *size), TARGETS)
    return informative(right(maps, 2, size, (4, 3, 5)[:dims]))


@condition("1-D", says="dimension|only 2D")
def one_dimension(explain: Explain) -> Tensor:
    return with_dimensions(1, explain)


@condition("3-D", says="dimension")
def three_dimensions(explain: Explain) -> Tensor:
    return with_dimensions(3, explain)


@condition("NaN in one example of a batch", says="nan|finite")
def nan_in_one_example(explain: Explain) -> Tensor:
    x, targets = images(3, 3, 8, 8), [0, 3, 1]
    x[1, 0, 3, 3] = torch.nan
    maps = plain(explain, x, targets)
    expect(not maps[1].isfinite().all(), "shows NaN as numbers")
    for i in (0, 2):
        equal(maps[i : i + 1], plain(explain, x[i : i + 1], [targets[i]]), "NaN spreads to other examples")
    return informative(maps[[0, 2]])


@condition("an empty batch", says=r"empty|no examples")
def empty_batch(explain: Explain) -> Tensor:
    maps = plain(explain, images(2, 3, 8, 8)[:0], 1)
    expect(maps.shape[0] == 0, "a map of nothing")
    return maps


@condition("one example without a batch dimension", says="batch")
def one_example_without_a_batch_dimension(explain: Explain) -> Tensor:
    x = images(3, 8, 8)
    maps = plain(explain, x, 1)
    expected = plain(explain, x[None], [1])
    equal(maps.reshape(expected.shape) if maps.numel() == expected.numel() else maps, expected, "another map")
    return informative(maps)


# -------------------------------------------------------------------------------------------------------------- targets


def in_both_forms(index: int, explain: Explain) -> Tensor:
    """A target as one number and as a list, which must not differ."""
    forms: list[Any] = []
    for target in (index, [index] * 2):
        try:
            forms.append(plain(explain, target=target))
        except CellError:
            raise
        except Exception as error:
            forms.append(error)
    errors = [form for form in forms if isinstance(form, Exception)]
    if len(errors) == 2:
        raise errors[0]
    expect(not errors, f"{index} is a target, and a list with {index} is not" if errors else "")
    equal(forms[0], forms[1], f"{index} and a list with {index} are different targets")
    return informative(forms[0])


@condition("a target out of range", says="out of (bounds|range)")
def target_out_of_range(explain: Explain) -> Tensor:
    in_both_forms(7, explain)
    raise CellError("a map for a class that does not exist")


@condition("a negative target", says="negative|out of (bounds|range)|class_idx")
def negative_target(explain: Explain) -> Tensor:
    return in_both_forms(-1, explain)
