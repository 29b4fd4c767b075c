"""A network, its layers, and the maps that were made of it. Nothing here knows of the page."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from captum_fusion import FusionDetails, functional, layers, models
from captum_fusion._passes.pace import now
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods
from captum_fusion.evaluation.cost import BACKWARD, Cost, cost
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.network import Meter
from captum_fusion.explore import pictures
from captum_fusion.explore.pictures import Picture
from captum_fusion.explore.recipes import Recipe
from captum_fusion.targets import Contrast

#: How many maps are kept.
KEPT = 64

_TRIAL = 4  # samples of the trial that says how long a sample takes


class CancelledError(Exception):
    """The run was cancelled."""


class Question(NamedTuple):
    """What is explained.

    Attributes:
        target: The index of the class.
        rival: The index of a class that it is compared with. Default: None
        layer: The dotted name of the layer. Default: ``""`` (the session's)
    """

    target: int
    rival: int | None = None
    layer: str = ""


class Explanation(NamedTuple):
    """A map and how it was made.

    Attributes:
        recipe: The method.
        question: What is explained.
        layers: Dotted names of the layers.
        heat: The map, (H, W), float32 in [0, 1].
        details: The steps of a fusion; None for other methods.
        score: The probability of the class in the whole picture; compared with a rival, among these two.
        kept: The same for the highlighted part alone.
        forward_samples: What the map took.
        backward_samples: What the map took.
        seconds: What the map took.
        code: The constructor call as Python.
        imports: The classes that the call names, for each package.
    """

    recipe: Recipe
    question: Question
    layers: tuple[str, ...]
    heat: Tensor
    details: FusionDetails | None
    score: float
    kept: float
    forward_samples: int
    backward_samples: int
    seconds: float
    code: str
    imports: dict[str, set[str]]


class Source(NamedTuple):
    """Where the network is from, as Python lines that make ``loaded``, a :class:`captum_fusion.models.LoadedModel`.

    Attributes:
        lines: Python lines.
        facts: The same for a manifest.
    """

    lines: tuple[str, ...]
    facts: dict[str, Any]


class Watch:
    """Follows a run and can end it.

    Args:
        progress (callable, optional): Called with the number of samples that are done.
            Default: None
        is_cancelled (callable, optional): Called now and then; the run ends if it returns True.
            Default: None
    """

    def __init__(
        self, progress: Callable[[int], None] | None = None, is_cancelled: Callable[[], bool] | None = None
    ) -> None:
        self._progress, self._is_cancelled, self.samples = progress, is_cancelled, 0

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook that counts samples.

        Raises:
            CancelledError: If the run is cancelled.
        """
        if self._is_cancelled is not None and self._is_cancelled():
            raise CancelledError
        self.samples += len(output) if isinstance(output, Tensor) else 1
        if self._progress is not None:
            self._progress(self.samples)


class Session:
    """A network and the maps that were made of it. Several threads may use it; their runs are one after the other.

    Args:
        loaded (LoadedModel): The network, in eval mode and on its device.
        source (Source): Where it is from.
        layer (str, optional): Dotted name of the layer to explain.
            Default: None (the last convolutional stage)
        score_fn (str, optional): Turns outputs into scores, see :class:`captum_fusion.LayerFusionCAM`.
            Default: None (softmax, and for a method's weights what its paper uses)

    Raises:
        ValueError: If the network does not take pictures, or has no such layer.

    Examples::

        >>> from captum_fusion.demo import digits
        >>> session = Session(models.load_model("digits"), Source((), {}))
        >>> picture = session.open(digits.scene_path("four_and_six"))
        >>> session.top(picture, 2)
        [6, 4]
        >>> explanation = session.explain(picture, Question(4), Recipe("grad-cam"))
        >>> explanation.heat.shape, explanation.layers
        (torch.Size([96, 96]), ('stage4',))
    """

    def __init__(
        self, loaded: models.LoadedModel, source: Source, layer: str | None = None, score_fn: str | None = None
    ) -> None:
        self.loaded, self.source, self.model, self.score_fn = loaded, source, loaded.model, score_fn
        self.device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
        self._lock = threading.RLock()
        self._kept: OrderedDict[Any, Explanation] = OrderedDict()
        probe = self._prepare(Image.new("RGB", (320, 320), "gray"))
        outputs = models.output_of(loaded.name, self.model, probe).shape[1]
        #: About how long a forward sample takes.
        self.seconds = self._timed(torch.cat([probe] * _TRIAL)) / _TRIAL
        self.class_names = models.class_names_of(loaded, outputs) or [str(index) for index in range(outputs)]
        try:
            stages = layers.resolution_layers(self.model, probe)
            self.stages = tuple(name for name, _ in stages)
        except ValueError:
            self.stages = ()
        try:
            if layer is not None:
                layers.find_layer(self.model, layer)
            self.layer = layer or layers.default_layer(self.model, probe).name
        except ValueError as error:
            raise ValueError(f"layer: {error}") from error
        outputs_of_layers, self._rest = self._outputs(probe)
        self._reshapes = self._reshapes_of(outputs_of_layers, probe)
        shapes = {name: tuple(heat.shape[1:]) for name, heat in self._maps(outputs_of_layers).items()}
        #: Channels and size of the maps of every layer that can be explained, by name, the last first.
        self.layers: dict[str, tuple[int, ...]] = dict(reversed(shapes.items()))

    @property
    def is_probability(self) -> bool:
        """Whether scores are from 0 to 1."""
        return self.score_fn != "identity"

    # --------------------------------------------------------------------------------------------------- the network

    def _prepare(self, image: Image.Image) -> Tensor:
        try:
            return self.loaded.preprocess(image).to(self.device)
        except Exception as error:  # preprocessing may be the user's
            raise ValueError(f"preprocessing failed ({models.first_line(error)})") from error

    def _outputs(self, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The outputs of all modules that may be maps, in order of completion, and the share of the time after each.

        Both by the modules' names.
        """
        outputs: dict[str, Tensor] = {}
        ends: dict[str, float] = {}

        def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() in (3, 4):
                outputs.pop(name, None)
                outputs[name], ends[name] = output, now(self.device)

        handles = [m.register_forward_hook(partial(keep, name)) for name, m in self.model.named_modules() if name]
        start = now(self.device)
        try:
            with torch.no_grad():
                self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        end = now(self.device)
        return outputs, {name: (end - time) / (end - start) for name, time in ends.items()}

    def _reshapes_of(self, outputs: Mapping[str, Tensor], probe: Tensor) -> dict[str, Any]:
        """How to convert the outputs of layers to maps, where they are tokens. It depends on the output's shape.

        Layers without an entry cannot be converted, such as windows of attention.
        """
        found: dict[torch.Size, Any] = {}
        refused: set[torch.Size] = set()
        if not any(hasattr(module, "normalized_shape") for module in self.model.modules()):
            return dict.fromkeys(outputs)
        for name, output in outputs.items():
            if output.shape not in found and output.shape not in refused:
                try:
                    found[output.shape] = layers.reshape_of(self.model, layers.find_layer(self.model, name), probe)
                except ValueError:
                    refused.add(output.shape)
        return {name: found[output.shape] for name, output in outputs.items() if output.shape in found}

    def _maps(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs that are maps, or can be converted to maps, with several positions, (N, channels, H, W)."""
        known = ((name, output) for name, output in outputs.items() if name in self._reshapes)
        reshapes = ((name, output, self._reshapes[name]) for name, output in known)
        maps = {name: output if reshape is None else reshape(output) for name, output, reshape in reshapes}
        return {name: found for name, found in maps.items() if found.dim() == 4 and min(found.shape[2:]) > 1}

    def _timed(self, inputs: Tensor) -> float:
        with Meter(self.model, self.device) as meter, torch.no_grad():
            self.model(inputs)
        return meter.costs["seconds"]

    def scores(self, inputs: Tensor) -> Tensor:
        """The score of every class, (N, classes)."""
        with self._lock, torch.no_grad():
            return self._scored(self.model(inputs))

    def _scores_of(self, inputs: Tensor, question: Question) -> list[float]:
        """The score of the class in question for each input; compared with a rival, among these two."""
        with self._lock, torch.no_grad():
            outputs = self.model(inputs)
        index = question.target
        if question.rival is not None:
            outputs, index = outputs[:, [index, question.rival]] - outputs[:, [question.rival]], 0
        values: list[float] = self._scored(outputs)[:, index].tolist()
        return values

    def _scored(self, outputs: Tensor) -> Tensor:
        return functional.score_function(self.score_fn or "softmax")(outputs).float().cpu()

    # -------------------------------------------------------------------------------------------------- the pictures

    def open(self, path: str | Path, name: str | None = None) -> Picture:
        """Read a picture and ask the network what it is.

        Args:
            path (str or Path): The file.
            name (str, optional): Its name in messages.
                Default: None (the name of the file)

        Raises:
            ValueError: If it is not a picture, or the network does not take it.
        """
        name = name or Path(path).name
        content, image = pictures.read(path, name)
        with self._lock:
            inputs = self._prepare(image)
            view, unseen = pictures.look(self.loaded.preprocess, image, inputs)
            models.output_of(self.loaded.name, self.model, inputs)
            scores = self.scores(inputs)[0]
            maps = self._maps(self._outputs(inputs)[0])
            live = {key: int((found[0].flatten(1).std(1) > 0).sum()) for key, found in maps.items()}
        return Picture(name, content, fingerprint_of(content), image.size, inputs, view, unseen, scores, live)

    def top(self, picture: Picture, number: int = 5) -> list[int]:
        """The most probable classes of a picture, as indices."""
        indices: list[int] = picture.scores.topk(min(number, len(picture.scores))).indices.tolist()
        return indices

    # ------------------------------------------------------------------------------------------------------ the maps

    def layers_of(self, recipe: Recipe, question: Question) -> tuple[str, ...]:
        """The layers that a method explains: the chosen one; all stages, if a method fuses them by default."""
        chosen = question.layer or self.layer
        if methods.fuses_stages(recipe.method) and chosen == self.layer and self.stages:
            return self.stages
        return (chosen,)

    def cost(self, recipe: Recipe, picture: Picture, layer: str = "") -> tuple[Cost, float] | None:
        """What a map costs, and about how many seconds it takes here.

        Returns:
            tuple[Cost, float] or None: None if it is not known.
        """
        name = layer or self.layer
        if name not in self.layers or methods.parse(recipe.method).name not in METHODS:
            return None
        channels, height, width = self.layers[name]
        found = cost(recipe.spec, picture.live.get(name, channels), height * width)
        if found is None:
            return None
        samples = found.forward_samples + BACKWARD * found.backward_samples + self._rest[name] * found.layer_samples
        return found, samples * self.seconds

    def has(self, picture: Picture, question: Question, recipe: Recipe) -> bool:
        """Whether the map was made before."""
        return (picture.key, question._replace(layer=question.layer or self.layer), recipe) in self._kept

    def explain(self, picture: Picture, question: Question, recipe: Recipe, watch: Watch | None = None) -> Explanation:
        """Make a map, or return the one that was made before.

        Args:
            picture (Picture): From :meth:`open`.
            question (Question): What is explained.
            recipe (Recipe): The method.
            watch (Watch, optional): Follows the run.
                Default: None

        Raises:
            ValueError: If the method does not fit the network or the layer; the message names it.
            CancelledError: If the run was cancelled.
        """
        question = question._replace(layer=question.layer or self.layer)
        key = picture.key, question, recipe
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._explain(picture, question, recipe, watch or Watch())
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _explain(self, picture: Picture, question: Question, recipe: Recipe, watch: Watch) -> Explanation:
        target, rival, _ = question
        network, others, score_fn = self.model, None, self.score_fn
        if rival is not None:
            network, others = Contrast(self.model), torch.tensor([[rival]], device=self.device)
            score_fn = Contrast.score_fn
        names = self.layers_of(recipe, question)
        options = {"score_fn": score_fn, "reshape": self._reshapes.get(names[-1])}
        handle = self.model.register_forward_hook(watch.note)
        try:
            made = recipe.construction(names, {key: value for key, value in options.items() if value is not None})
            attribution = made.build(self.model, network)
            with Meter(self.model, self.device) as meter:
                attribute = partial(attribution.attribute, additional_forward_args=others)
                method = methods.BuiltMethod(recipe.label, attribute, attribution)
                heat, details = methods.heat_map(method, picture.inputs, target)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ValueError(f"{recipe.label} on layer {', '.join(names)}: {models.first_line(error)}") from error
        finally:
            handle.remove()
        forward, backward, seconds = meter.costs.values()
        if forward >= 16:
            self.seconds = seconds / (forward + BACKWARD * backward)
        score, kept = self._scores_of(torch.cat([picture.inputs, picture.inputs * heat]), question)
        return Explanation(
            recipe,
            question,
            made.layers or (),
            functional.at_least_float32(heat[0, 0]).float().cpu(),
            details,
            score,
            kept,
            int(forward),
            int(backward),
            seconds,
            made.code(),
            made.imports(),
        )

    # ----------------------------------------------------------------------------------------------------- questions

    def ask(self, picture: Picture, shown: Tensor, fill: str = "mean") -> Tensor:
        """The score of every class when a part of the picture is hidden.

        Args:
            picture (Picture): From :meth:`open`.
            shown (Tensor): What stays, in [0, 1], (H, W) of the network's input.
            fill (str, optional): What takes the place of the rest: ``"mean"`` (0 in the network's input, which is the
                mean colour of its training) or ``"blur"``.
                Default: ``"mean"``

        Returns:
            Tensor: (classes,).
        """
        mask = shown.to(picture.inputs)[None, None]
        return self.scores(self._background(picture.inputs, fill).lerp(picture.inputs, mask))[0]

    @staticmethod
    def _background(inputs: Tensor, fill: str) -> Tensor:
        if fill == "mean":
            return torch.zeros_like(inputs)
        from torchvision.transforms.functional import gaussian_blur

        size = max(inputs.shape[2:]) // 8 * 2 + 1
        blurred: Tensor = gaussian_blur(inputs, [size, size], [size / 4, size / 4])
        return blurred


def top_share(heat: Tensor, share: float) -> Tensor:
    """The most important part of a map, as a mask.

    Args:
        heat (Tensor): The map, (H, W).
        share (float): The part's share of the area, in [0, 1].

    Returns:
        Tensor: float32 (H, W), 1 inside and 0 outside. Positions where the map is 0 are outside.

    Examples::

        >>> top_share(torch.tensor([[0.0, 0.2], [0.9, 0.4]]), 0.5)
        tensor([[0., 0.],
                [1., 1.]])
    """
    number = round(share * heat.numel())
    mask = torch.zeros(heat.numel())
    mask[heat.flatten().argsort(descending=True, stable=True)[:number]] = 1
    return mask.reshape(heat.shape) * (heat > 0)
