"""One network, its layer, and the methods and metrics on it: from a picture to rows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_fusion import SavedWork, functional, layers, models, shared_work
from captum_fusion.evaluation import measures, methods, store
from captum_fusion.evaluation.data import Class, Example
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.measures import COSTS, METRICS, Measure, Subject
from captum_fusion.evaluation.store import Row
from captum_fusion.metrics import Curve

#: What a cell of the table is: a method and a metric.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Work:
    """What is done with every network.

    Attributes:
        methods: By their labels, the reference first.
        labels: The labels in the order of the table.
        metrics: By their labels, with options.
        reference: Label of the method that wins and differences are against.
        target: ``"prediction"`` or ``"label"``.
        score_fn: For methods and metrics; None for each one's own.
        perturbations_per_eval: Masked rows at once.
        seed: Of methods and metrics that draw.
        share: Whether methods share rows.
        folders: Names of the dataset's folders, in their order, where labels are these.
    """

    methods: Mapping[str, Any]
    labels: Sequence[str]
    metrics: Mapping[str, tuple[Measure, dict[str, Any]]]
    reference: str
    target: str
    score_fn: str | None
    perturbations_per_eval: int
    seed: int
    share: bool
    folders: Sequence[str]

    @property
    def columns(self) -> list[str]:
        """What is measured of every method: the metrics and the costs."""
        return [*self.metrics, *COSTS]

    def is_win(self, metric: str) -> bool:
        """Whether a metric is one against the reference."""
        return metric in self.metrics and self.metrics[metric][0] is METRICS["win_rate"]


class Network:
    """One network and what is done with it.

    Args:
        loaded (LoadedModel): The network, in eval mode where it is to run.
        work (Work): What to do.
        layer (str, optional): Where to explain.
        probe (Tensor): An input of it, to find out what it takes and returns.
        say (callable): Says something to the user, once.

    Raises:
        ValueError: For an argument that does not fit; the message names it.
    """

    def __init__(
        self, loaded: models.LoadedModel, work: Work, layer: str | None, probe: Tensor, say: Callable[[str], None]
    ) -> None:
        self.loaded, self.work, self.model, self.name, self._say = loaded, work, loaded.model, loaded.name, say
        self._said: set[Any] = set()
        self.layout = self._layout(probe)
        probe = probe.contiguous(memory_format=self.layout)
        output = self._output(probe)
        self.outputs = output.shape[1]
        names = loaded.class_names
        if names is None and self.outputs == 1000:
            names = models.imagenet_classes()
        if names is not None and len(names) != self.outputs:
            raise ValueError(f"classes: there are {len(names)} names for {self.outputs} outputs")
        self.class_names = None if names is None else list(names)
        of_stages = [label for label, method in work.methods.items() if _is_integrative(method)]
        self.layer_name, place = self._place(layer, probe, wants_stages=bool(of_stages))
        fused = [name for name, module in self.model.named_modules() if module in place.stages]
        self._stages = dict.fromkeys(of_stages, fused or [self.layer_name])
        chosen = {} if work.score_fn is None else {"score_fn": work.score_fn}
        self.options = {**chosen, "perturbations_per_eval": work.perturbations_per_eval, "seed": work.seed}
        self.methods = {
            label: methods.build(method, place, {**chosen, "seed": work.seed}, self.options)
            for label, method in work.methods.items()
        }
        self._counter = _Counter(self.model)
        self._try_metrics(probe, int(output[0].argmax()))

    def settings(self) -> dict[str, Any]:
        """What rows of this network depend on."""
        return {
            "weights": _weights(self.model),
            "layer": self.layer_name,
            "layout": str(self.layout),
            "classes": self.outputs,
            "names": None if self.class_names is None else fingerprint_of(*self.class_names),
            "layers": self._stages,
        }

    def _layout(self, inputs: Tensor) -> torch.memory_format:
        """channels_last, which is faster on most networks, where the network takes it."""
        try:
            with torch.no_grad():
                self.model(inputs.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
            return torch.channels_last
        except Exception:  # a network may raise anything; whether it takes pictures at all is found out next
            return torch.contiguous_format

    def _output(self, inputs: Tensor) -> Tensor:
        return models.output_of(self.name, self.model, inputs)

    def _place(self, given: str | None, probe: Tensor, wants_stages: bool) -> tuple[str, methods.Place]:
        try:
            if given is not None:
                return given, methods.Place(self.model, [layers.find_layer(self.model, given)], [])
            name, layer = layers.default_layer(self.model, probe)
            found = layers.resolution_layers(self.model, probe) if wants_stages else []
        except ValueError as error:
            raise ValueError(f"layer: {error}") from error
        return name, methods.Place(self.model, [layer], [module for _, module in found])

    def _try_metrics(self, probe: Tensor, target: int) -> None:
        """Refuse what no metric of ours can measure, before hours are spent."""
        half = torch.zeros(1, *probe.shape[2:], dtype=torch.bool)
        half[:, : half.shape[1] // 2 + 1] = True
        subject = Subject(
            self.model,
            probe,
            probe.abs().sum(1, keepdim=True),
            target,
            Example("probe", None),
            explain=lambda inputs, target=None: inputs.abs().sum(1, keepdim=True),
            options=self.options,
            regions=half,
            boxes=half,
        )
        for label, (measure, options) in self.work.metrics.items():
            if not measure.ours:
                continue
            try:
                if measure.name in ("insertion", "deletion", "overall"):
                    options = {"steps": 1, **options}  # a short curve will do
                if self.work.is_win(label):
                    subject.rivals[measures.options_key(options)] = measures.drop_of(subject, options)
                measures.measure((measure, options), subject)
            except Exception as error:  # the network in it may raise anything
                raise ValueError(f"metrics: {label}: {models.first_line(error)}") from error

    # ----------------------------------------------------------------------------------------------------- a picture

    def prepare(self, picture: Any) -> tuple[Tensor, tuple[int, int] | None]:
        """:func:`prepare`, in the layout that the network likes."""
        inputs, size = prepare(self.loaded, picture)
        return inputs.contiguous(memory_format=self.layout), size

    def rows(
        self,
        image: str,
        example: Example,
        inputs: Tensor,
        size: tuple[int, int] | None,
        missing: Collection[Pair],
        drawing: Path | None,
    ) -> Iterator[list[Row]]:
        """Run what is missing of one picture; its rows, method by method.

        Args:
            image (str): What the rows call the picture.
            example (Example): Its description.
            inputs (Tensor): From :meth:`prepare`.
            size (tuple, optional): The picture's (width, height).
            missing (collection of pairs): The cells that are not there yet.
            drawing (Path, optional): Where all methods' maps are drawn.

        Raises:
            ValueError: If there is nothing to explain.
        """
        target = self._target(example, inputs)
        regions, boxes, nowhere = self._place_of(example, target, inputs, size)
        drawn: dict[str, Tensor] = {}
        rivals: dict[Any, float] = {}
        any_win = any(self.work.is_win(metric) for _, metric in missing)
        with shared_work() if self.work.share else contextlib.nullcontext(SavedWork()) as spared:
            for label, explain in self.methods.items():
                mine = [metric for metric in self.work.columns if (label, metric) in missing]
                is_reference = label == self.work.reference
                if not mine and drawing is None and not (is_reference and any_win):
                    continue
                row = {"model": self.name, "image": image, "method": label, "target": target}
                try:
                    attributions, costs = self._explain(explain, inputs, target, spared)
                except Exception as error:  # a method of the user's may raise anything; one picture is not the run
                    why = f"{type(error).__name__}: {models.first_line(error)}"
                    self._once(label, f"{self.name}: {label} fails on {image}: {why}")
                    yield [{**row, **self._named(metric), "value": None, "error": why} for metric in mine]
                    continue
                drawn[label] = attributions
                subject = Subject(
                    self.model,
                    inputs,
                    attributions,
                    target,
                    example,
                    regions=regions,
                    boxes=boxes,
                    nowhere=nowhere,
                    explain=explain,
                    options=self.options,
                    rivals=rivals,
                    is_reference=is_reference,
                )
                if is_reference and any_win:
                    self._know_rival(subject)
                yield [{**row, **self._measured(metric, subject, costs)} for metric in mine]
        if drawing is not None and drawn:
            try:
                self._draw(inputs, target, drawn, drawing)
            except (RuntimeError, ValueError, TypeError) as error:  # the rows are there; a figure is not worth them
                self._say(f"the maps of {image} could not be drawn: {models.first_line(error)}")

    def _know_rival(self, subject: Subject) -> None:
        for label, (_, options) in self.work.metrics.items():
            if self.work.is_win(label):
                # Where it cannot be known, the wins against it say so.
                with contextlib.suppress(Exception):
                    subject.rivals[measures.options_key(options)] = measures.drop_of(subject, options)

    def _once(self, key: Any, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(text)

    def _explain(
        self, explain: methods.Explain, inputs: Tensor, target: int, spared: SavedWork
    ) -> tuple[Tensor, dict[str, float]]:
        """A map, and what it would have cost alone."""
        before = SavedWork(spared.forward_samples, spared.backward_samples, spared.seconds)
        _synchronize(inputs)
        start = time.perf_counter()
        with self._counter as counter:
            attributions = explain(inputs, target)
        _synchronize(inputs)
        seconds = time.perf_counter() - start
        costs = {
            "rows": counter.rows + spared.forward_samples - before.forward_samples,
            "backward_rows": counter.backward_rows + spared.backward_samples - before.backward_samples,
            "seconds": seconds + spared.seconds - before.seconds,
        }
        if attributions.dim() != inputs.dim() or attributions.shape[0] != 1 or not attributions.numel():
            raise ValueError(f"the map must be of shape (1, channels, height, width), not {tuple(attributions.shape)}")
        if not attributions.isfinite().all():
            raise ValueError("the map is not finite")
        return functional.at_least_float32(attributions), costs

    def _named(self, metric: str) -> Row:
        """A metric in a row, with the reference that wins are against."""
        return {"metric": metric, **({"reference": self.work.reference} if self.work.is_win(metric) else {})}

    def _measured(self, metric: str, subject: Subject, costs: Mapping[str, float]) -> Row:
        row = {**self._named(metric), "value": None}
        if metric in costs:
            return {**row, "value": costs[metric]}
        try:
            value = measures.measure(self.work.metrics[metric], subject)
        except Exception as error:  # as for methods
            why = f"{type(error).__name__}: {models.first_line(error)}"
            self._once((metric,), f"{self.name}: {metric} fails on {subject.example.name}: {why}")
            return {**row, "error": why}
        if isinstance(value, str):
            return {**row, "error": value, "final": True}
        if isinstance(value, Curve):
            shares, scores = (each.flatten().tolist() for each in (value.shares, value.scores))
            return {**row, "value": float(value.auc), "shares": shares, "curve": scores}
        if value != value or value in (float("inf"), float("-inf")):
            return {**row, "error": "not finite"}
        return {**row, "value": value}

    # ---------------------------------------------------------------------------------------------- classes and places

    def _target(self, example: Example, inputs: Tensor) -> int:
        output = self._output(inputs)[0]
        if self.work.target == "prediction":
            return int(output.argmax())
        known = [index for each in example.label for index in self._indices(each)]
        if not known:
            raise ValueError(
                f"its label {' '.join(map(str, example.label))!r} is none of the network's classes"
                if example.label
                else "it has no label"
            )
        return max(known, key=lambda index: float(output[index]))

    def _indices(self, label: Class) -> list[int]:
        """The outputs that a class stands for."""
        if isinstance(label, int):
            return [label] if 0 <= label < self.outputs else []
        names = [name.casefold() for name in self.class_names or ()]
        found = [i for i, name in enumerate(names) if name == label.casefold()]
        if found:
            return found
        # ImageFolder's rule, folders in the order of their names, where they are not the classes' names or numbers.
        folders = self.work.folders
        if len(folders) == self.outputs and label in folders and not {each.casefold() for each in folders} & set(names):
            if all(each.isascii() and each.isdigit() for each in folders):
                return [int(label)] if int(label) < self.outputs else []
            return [list(folders).index(label)]
        return [int(label)] if label.isascii() and label.isdigit() and int(label) < self.outputs else []

    def _place_of(
        self, example: Example, target: int, inputs: Tensor, size: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor, str]:
        """Masks of the target's objects in the network's input, its boxes as masks, and why there are none."""
        none = torch.zeros(0, *inputs.shape[2:], dtype=torch.bool)
        seen = self._seen
        if size is None:  # a tensor is what the network sees, and so are the places in it
            size = int(inputs.shape[3]), int(inputs.shape[2])
            seen = _white
        mine = [region for region in example.regions if any(target in self._indices(each) for each in region.classes)]
        if not mine:
            other = "only objects of classes that are not explained are known"
            return none, none, other if example.regions else "the object's place is not known"
        try:
            boxes = [seen(canvas) for region in mine for canvas in region.paint_boxes(size)]
            masks = [seen(mask) for region in mine if (mask := region.paint_mask(size)) is not None]
        except ValueError as error:
            return none, none, models.first_line(error)
        shown = [[each for each in some if each.any()] for some in (masks or boxes, boxes or masks)]
        if not shown[0] or not shown[1]:
            return none, none, "the object is outside of what the network sees"
        return torch.stack(shown[0]), torch.stack(shown[1]), ""

    def _seen(self, canvas: Any) -> Tensor:
        """A painted region as the network's preprocessing shows it."""
        light = self.loaded.restore(self.loaded.preprocess(canvas.convert("RGB")))[0].mean(0).cpu()
        brightest = float(light.max())
        return light > 0.5 * brightest if brightest > 0.02 else torch.zeros_like(light, dtype=torch.bool)

    # -------------------------------------------------------------------------------------------------------- figures

    def _draw(self, inputs: Tensor, target: int, drawn: Mapping[str, Tensor], path: Path) -> None:
        from captum_fusion.visualization import visualize_grid

        label = str(target) if self.class_names is None else self.class_names[target]
        picture = self.loaded.restore(inputs)[0].cpu() if inputs.shape[1] in (1, 3) else inputs[0, :1].cpu()
        score = functional.score_function(self.work.score_fn or "softmax")(self._output(inputs))[0, target]
        panels: list[Any] = [(None, f"{label}: p = {float(score):.2f}")]
        panels += [(_heat(drawn[each]), each) for each in self.work.labels if each in drawn]
        rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
        figure, file = visualize_grid([(picture, row) for row in rows]), BytesIO()
        figure.savefig(file, dpi=100, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
        store.write_whole(path, file.getvalue())


def _white(canvas: Any) -> Tensor:
    return torch.from_numpy(np.asarray(canvas) > 127)


def _is_integrative(method: Any) -> bool:
    return isinstance(method, str) and methods.parse(method).name == "integrative-cam"


def _heat(attributions: Tensor) -> Tensor:
    return functional.normalize(attributions.sum(1, keepdim=True).relu())


def prepare(loaded: models.LoadedModel, picture: Any) -> tuple[Tensor, tuple[int, int] | None]:
    """The network's input, (1, C, H, W), and the picture's (width, height) if it is one.

    Raises:
        ValueError: If the picture cannot be prepared.
    """
    where = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or not picture.is_floating_point():
            raise ValueError(f"a tensor must be floating point, of shape (C, H, W), not {tuple(picture.shape)}")
        return picture.unsqueeze(0).to(where), None
    try:
        return loaded.preprocess(picture).to(where), picture.size
    except Exception as error:  # preprocessing may be the user's
        raise ValueError(f"preprocessing failed ({models.first_line(error)})") from error


class _Counter:
    """Counts the rows that go through a network while it is entered; leaves no hook behind."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.rows = self.backward_rows = 0

    def __enter__(self) -> _Counter:
        self.rows = self.backward_rows = 0
        self._handle = self._model.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self.rows += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._count_backward)  # type: ignore[no-untyped-call]

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_rows += len(gradient)


def _synchronize(inputs: Tensor) -> None:
    if inputs.device.type != "cpu":
        torch.accelerator.synchronize(inputs.device)


def _weights(model: nn.Module) -> str:
    return fingerprint_of(*(part for pair in sorted(model.state_dict().items()) for part in pair))


def drawing_name(number: int, model: str, image: str, labels: Iterable[str]) -> str:
    """The file of a picture's maps: another one for another picture or other methods."""
    safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in model)[:40]
    return f"{safe}_{number:04d}_{fingerprint_of(model, image, *labels)[:8]}.png"
