"""One network with the methods and metrics of a study: from a picture to rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import SavedWork, functional, models, shared_work
from captum_fusion._passes.pace import now
from captum_fusion.evaluation import measures, methods, store
from captum_fusion.evaluation.data import Example
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.labels import Classes, ObjectMasks, object_masks
from captum_fusion.evaluation.loading import NetworkSource
from captum_fusion.evaluation.measures import COSTS, Subject
from captum_fusion.evaluation.settings import Study
from captum_fusion.evaluation.store import Row
from captum_fusion.metrics import Curve

#: The most maps beside each other.
_PANELS = 4

#: A cell of a table: a method and a metric.
Pair = tuple[str, str]


class Network:
    """A network on which a study is run.

    Args:
        loaded (LoadedModel): The network, in eval mode and on its device.
        study (Study): What is compared on it.
        source (NetworkSource): What it was loaded from, with the layer to explain and its reshape.
        folders (sequence of str): The labels of the dataset that are names, sorted.
        probe (Tensor): An input of the network, (1, C, H, W), to check everything with before the run.
        say (callable): Called with a remark for the user.

    Raises:
        ValueError: For an argument that does not fit; the message names it.
    """

    def __init__(
        self,
        loaded: models.LoadedModel,
        study: Study,
        source: NetworkSource,
        folders: Collection[str],
        probe: Tensor,
        say: Callable[[str], None],
    ) -> None:
        self.loaded, self.study, self.model, self.name, self._say = loaded, study, loaded.model, loaded.name, say
        self._said: set[Any] = set()
        self.layout = self._layout(probe)
        probe = probe.contiguous(memory_format=self.layout)
        output = self._output(probe)
        outputs = output.shape[1]
        self.classes = Classes(outputs, models.class_names_of(loaded, outputs), list(folders))
        fusing = [label for label, method in study.methods.items() if methods.fuses_stages(method)]
        named = None if source.layer is None else [source.layer]
        reshapes, explained = methods.explained_layers(self.model, probe, named, source.reshape, bool(fusing))
        [self.layer_name] = reshapes
        self._reshape = explained.reshape
        fused = [name for name, module in self.model.named_modules() if module in explained.stages]
        self._fused_layers = dict.fromkeys(fusing, fused or [self.layer_name])
        chosen = {} if study.score_fn is None else {"score_fn": study.score_fn}
        self.options = {**chosen, "perturbations_per_eval": study.perturbations_per_eval, "seed": study.seed}
        self.methods = {
            label: methods.build(study.methods[label], explained, {**chosen, "seed": study.seed}, self.options)
            for label in study.reference_first
        }
        self._try_metrics(probe, int(output[0].argmax()))

    def settings(self) -> dict[str, Any]:
        """What the rows of this network depend on."""
        return {
            "weights": weights_fingerprint(self.model),
            "layer": self.layer_name,
            "reshape": None if self._reshape is None else repr(self._reshape),
            "layout": str(self.layout),
            "classes": self.classes.outputs,
            "names": None if self.classes.names is None else fingerprint_of(*self.classes.names),
            "layers": self._fused_layers,
        }

    def _layout(self, inputs: Tensor) -> torch.memory_format:
        """channels_last, which is faster on most networks, where the network takes it."""
        try:
            with torch.no_grad():
                self.model(inputs.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
            return torch.channels_last
        except Exception:  # a network may raise anything; whether it takes pictures at all is checked next
            return torch.contiguous_format

    def _output(self, inputs: Tensor) -> Tensor:
        return models.output_of(self.name, self.model, inputs)

    def _try_metrics(self, probe: Tensor, target: int) -> None:
        """Compute every metric of the package once, so that one that cannot work is refused before the run."""
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
            objects=ObjectMasks(half, half),
        )
        for label, (measure, options) in self.study.metrics.items():
            if not measure.ours:
                continue
            try:
                if measure.name in ("insertion", "deletion", "overall"):
                    options = {"steps": 1, **options}  # a short curve is enough
                if self.study.is_win(label):
                    subject.rivals[measures.options_key(options)] = measures.drop_of(subject, options)
                measures.measure((measure, options), subject)
            except Exception as error:  # the network in it may raise anything
                raise ValueError(f"metrics: {label}: {models.first_line(error)}") from error

    # ----------------------------------------------------------------------------------------------------- a picture

    def prepare(self, picture: Any) -> tuple[Tensor, tuple[int, int] | None]:
        """:func:`prepare`, in the network's memory layout."""
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
        """Compute the missing cells of one picture.

        Args:
            image (str): The picture's name in the rows.
            example (Example): The picture's description.
            inputs (Tensor): From :meth:`prepare`.
            size (tuple[int, int], optional): The picture's width and height; None for a tensor.
            missing (collection of pairs): The cells that are missing.
            drawing (Path, optional): The file that the maps of all methods are drawn to.

        Yields:
            list[Row]: The rows of one method.

        Raises:
            ValueError: If the picture has no class to explain.
        """
        output = self._output(inputs)[0]
        by_label = self.study.explain == "label"
        target = self.classes.target(example, output) if by_label else int(output.argmax())
        objects = object_masks(example, target, self.classes, inputs, size, self.loaded)
        maps: dict[str, Tensor] = {}
        rivals: dict[Any, float] = {}
        any_win = any(self.study.is_win(metric) for _, metric in missing)
        with shared_work() if self.study.share else contextlib.nullcontext(SavedWork()) as saved:
            for label, explain in self.methods.items():
                wanted = [metric for metric in self.study.columns if (label, metric) in missing]
                is_reference = label == self.study.reference
                if not wanted and drawing is None and not (is_reference and any_win):
                    continue
                row = {"model": self.name, "image": image, "method": label, "target": target}
                try:
                    attributions, costs = self._explain(explain, inputs, target, saved)
                except Exception as error:  # a method of the user's may raise anything; the other methods go on
                    why = f"{type(error).__name__}: {models.first_line(error)}"
                    self._once(label, f"{self.name}: {label} fails on {image}: {why}")
                    yield [{**row, **self._metric_of(metric), "value": None, "error": why} for metric in wanted]
                    continue
                maps[label] = attributions
                subject = Subject(
                    self.model,
                    inputs,
                    attributions,
                    target,
                    example,
                    explain=explain,
                    options=self.options,
                    objects=objects,
                    rivals=rivals,
                    is_reference=is_reference,
                )
                if is_reference and any_win:
                    self._record_rival(subject)
                yield [{**row, **self._measured(metric, subject, costs)} for metric in wanted]
        if drawing is not None and maps:
            try:
                self._draw(inputs, target, float(self._scores(output)[target]), maps, objects.masks, drawing)
            except (RuntimeError, ValueError, TypeError) as error:  # the rows are written; the run goes on
                self._say(f"the maps of {image} could not be drawn: {models.first_line(error)}")

    def _scores(self, output: Tensor) -> Tensor:
        return functional.score_function(self.study.score_fn or "softmax")(output[None])[0]

    def _record_rival(self, subject: Subject) -> None:
        """Record the drop of the reference method, which wins are against."""
        for label, (_, options) in self.study.metrics.items():
            if self.study.is_win(label):
                # If it fails, the wins against it report that.
                with contextlib.suppress(Exception):
                    subject.rivals[measures.options_key(options)] = measures.drop_of(subject, options)

    def _once(self, key: Any, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(text)

    def _explain(
        self, explain: methods.Explain, inputs: Tensor, target: int, saved: SavedWork
    ) -> tuple[Tensor, dict[str, float]]:
        """A map, and what it would have cost without sharing."""
        before = _costs_of(saved)
        with Meter(self.model, inputs.device) as meter:
            attributions = explain(inputs, target)
        costs = {name: cost + meter.costs[name] - before[name] for name, cost in _costs_of(saved).items()}
        if attributions.dim() != inputs.dim() or attributions.shape[0] != 1 or not attributions.numel():
            raise ValueError(f"the map must be of shape (1, channels, height, width), not {tuple(attributions.shape)}")
        if not attributions.isfinite().all():
            raise ValueError("the map is not finite")
        return functional.at_least_float32(attributions), costs

    def _metric_of(self, metric: str) -> Row:
        """The metric of a row, and the reference if it is a win against it."""
        return {"metric": metric, **({"reference": self.study.reference} if self.study.is_win(metric) else {})}

    def _measured(self, metric: str, subject: Subject, costs: Mapping[str, float]) -> Row:
        row = {**self._metric_of(metric), "value": None}
        if metric in costs:
            return {**row, "value": costs[metric]}
        try:
            value = measures.measure(self.study.metrics[metric], subject)
            if isinstance(value, Curve):
                shares, scores = (numbers.flatten().tolist() for numbers in (value.shares, value.scores))
                if len(shares) != len(scores):
                    raise ValueError(f"a curve must have as many scores as shares, not {len(scores)} and {len(shares)}")
                found: Row = {**row, "value": float(value.auc), "shares": shares, "curve": scores}
            elif isinstance(value, str):
                return {**row, "error": value, "final": True}
            else:
                found = {**row, "value": value}
        except Exception as error:  # as for methods
            why = f"{type(error).__name__}: {models.first_line(error)}"
            self._once((metric,), f"{self.name}: {metric} fails on {subject.example.name}: {why}")
            return {**row, "error": why}
        numbers = (found["value"], *found.get("shares", ()), *found.get("curve", ()))
        return found if all(map(math.isfinite, numbers)) else {**row, "error": "not finite"}

    def _draw(
        self, inputs: Tensor, target: int, score: float, maps: Mapping[str, Tensor], objects: Tensor, path: Path
    ) -> None:
        from captum_fusion.visualization import visualize_grid

        picture = self.loaded.restore(inputs)[0].cpu() if inputs.shape[1] in (1, 3) else inputs[0, :1].cpu()
        panels: list[Any] = [(None, f"{self.classes.title(target)}: p = {score:.2f}")]
        panels += [(_heat(maps[label]), label) for label in self.study.methods if label in maps]
        lines = -(-len(panels) // _PANELS)
        columns = -(-len(panels) // lines)
        grid = [(picture, panels[i : i + columns]) for i in range(0, len(panels), columns)]
        figure, file = visualize_grid(grid, outlines=[objects] * lines), BytesIO()
        figure.savefig(file, dpi=100, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
        store.write_whole(path, file.getvalue())


def _heat(attributions: Tensor) -> Tensor:
    return functional.normalize(attributions.sum(1, keepdim=True).relu())


def prepare(loaded: models.LoadedModel, picture: Any) -> tuple[Tensor, tuple[int, int] | None]:
    """Make the network's input of a picture.

    Args:
        loaded (LoadedModel): The network.
        picture (Image or Tensor): A picture, or a tensor (C, H, W) that is ready for the network.

    Returns:
        tuple[Tensor, tuple[int, int] or None]: The input, (1, C, H, W), and the picture's width and height; None for a
        tensor.

    Raises:
        ValueError: If the picture cannot be prepared.
    """
    device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or not picture.is_floating_point():
            raise ValueError(f"a tensor must be floating point, of shape (C, H, W), not {tuple(picture.shape)}")
        return picture.unsqueeze(0).to(device), None
    try:
        return loaded.preprocess(picture).to(device), picture.size
    except Exception as error:  # preprocessing may be the user's
        raise ValueError(f"preprocessing failed ({models.first_line(error)})") from error


def _costs_of(saved: SavedWork) -> dict[str, float]:
    """The cost columns of what sharing has saved so far."""
    return dict(zip(COSTS, (saved.forward_samples, saved.backward_samples, saved.seconds), strict=True))


class Meter:
    """Measures what is run while it is entered; leaves no hook behind.

    Samples are counted by hooks on the network. An accelerator works asynchronously, so the clock is read when all the
    work given to it is done.

    Args:
        model (Module): The network.
        device (device): Where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._forward = self._backward = 0
        self.costs: dict[str, float] = {}

    def __enter__(self) -> Meter:
        self._handle = self._model.register_forward_hook(self._count)
        self._start = now(self._device)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._handle.remove()
        if kind is None:
            seconds = now(self._device) - self._start
            self.costs = dict(zip(COSTS, (self._forward, self._backward, seconds), strict=True))

    def _count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._forward += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._count_backward)  # type: ignore[no-untyped-call]

    def _count_backward(self, gradient: Tensor) -> None:
        self._backward += len(gradient)


def weights_fingerprint(model: nn.Module) -> str:
    """A content hash of a network's parameters and buffers."""
    state = sorted(model.state_dict().items())
    return fingerprint_of(*(part for key, value in state for part in (key, _dense(value))))


def _dense(value: Any) -> Any:
    """A tensor whose bytes can be read; other entries of a state dict as text."""
    if not isinstance(value, Tensor):
        return repr(value)
    return value if value.layout == torch.strided else value.to_dense()


def drawing_name(number: int, model: str, image: str, labels: Iterable[str]) -> str:
    """The file name of a picture's maps; it changes with the picture, its regions and the methods."""
    safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in model)[:40]
    return f"{safe}_{number:04d}_{fingerprint_of(model, image, *labels)[:8]}.png"
