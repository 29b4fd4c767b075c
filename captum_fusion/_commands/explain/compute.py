"""Computing the maps of one picture, with one progress bar for the whole run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_fusion import FusionDetails, models, shared_work
from captum_fusion._arguments import printable
from captum_fusion._commands.common import scores
from captum_fusion._commands.explain.cost import Estimate
from captum_fusion._commands.explain.plan import Plan, PlannedMethod
from captum_fusion.evaluation import methods


class Map(NamedTuple):
    """A map and what it keeps.

    Attributes:
        heat: The map, (1, 1, H, W) in [0, 1].
        details: The details of a fusion, or None.
        alone: The score of the highlighted part alone.
    """

    heat: Tensor
    details: FusionDetails | None
    alone: float


class Explained(NamedTuple):
    """One class of a picture with the maps of the methods by title."""

    target: int
    label: str
    score: float
    maps: Mapping[str, Map]


class Progress:
    """One bar for a whole run. It counts the forward samples of the network.

    Args:
        plan (Plan): The network and the methods.
        estimate (Estimate): The expected number of samples.
        pictures (int): The number of pictures.
    """

    def __init__(self, plan: Plan, estimate: Estimate, pictures: int) -> None:
        self._model, self._samples, self._pictures = plan.loaded.model, max(1, estimate.samples), pictures
        self._bar: Any = None
        self._handle: Any = None

    def __enter__(self) -> Progress:
        self._bar = tqdm(total=self._samples * self._pictures, unit=" samples", leave=False, disable=None)
        self._handle = self._model.register_forward_pre_hook(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()
        self._bar.close()

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._bar.update(min(len(args[0]), max(0, self._bar.total - self._bar.n)))

    def start(self, number: int, name: str) -> None:
        """Go to a picture."""
        self._name, self._bar.n = name, number * self._samples
        self.show("")

    def show(self, method: str) -> None:
        """Show the method that runs."""
        self._bar.set_description(f"{self._name} {method}".strip())


def explain(plan: Plan, inputs: Tensor, progress: Progress) -> list[Explained]:
    """Explain every class of one picture.

    Raises:
        ValueError: If no method fits, or the network's output is not finite.
    """
    model = plan.loaded.model
    explained = []
    with shared_work():
        for target in _targets(plan, inputs):
            score = scores(model, inputs, [target], plan.score_fn)[0]
            maps = {}
            for title, heat, details in _maps(plan.methods, inputs, target, progress):
                alone = scores(model, inputs * heat, [target], plan.score_fn)[0]
                maps[title] = Map(heat.cpu(), details, alone)
            explained.append(Explained(target, plan.title(target), score, maps))
    if not any(one.maps for one in explained):
        raise ValueError("none of the methods fits")
    return explained


def _targets(plan: Plan, inputs: Tensor) -> list[int]:
    """The classes to explain, each once."""
    with torch.no_grad():
        output = plan.loaded.model(inputs.clone())[0]
    if not output.isfinite().all():
        raise ValueError("the network's output for this picture is not finite")
    if plan.top is not None:
        best: list[int] = output.topk(plan.top).indices.tolist()
        return best
    return list(dict.fromkeys(int(output.argmax()) if index is None else index for index in plan.targets))


def _maps(
    planned: Mapping[str, PlannedMethod], inputs: Tensor, target: int, progress: Progress
) -> Iterator[tuple[str, Tensor, FusionDetails | None]]:
    """Each method's map and details; if several methods are compared, one that fails is left out with a message."""
    for title, method in planned.items():
        progress.show(title)
        try:
            yield title, *methods.heat_map(method.built, inputs, target)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            if len(planned) == 1:
                raise
            tqdm.write(printable(f"{title} is left out: {models.first_line(error)}"))
