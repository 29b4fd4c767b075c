"""Every method on every picture, measured by every metric; stopped at any moment, it goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import captum
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import captum_fusion
from captum_fusion import functional, layers, models, shared_work
from captum_fusion._captum import Spared
from captum_fusion.evaluation import measures, methods, store
from captum_fusion.evaluation.data import Class, Example, Examples, as_example, load_image, open_dataset
from captum_fusion.evaluation.measures import COSTS, Measure, Subject
from captum_fusion.evaluation.presets import PRESETS, Preset
from captum_fusion.evaluation.store import Row, Store
from captum_fusion.metrics import Curve

_TARGETS = ("prediction", "label")


class Evaluation(NamedTuple):
    """What :func:`evaluate` found.

    Attributes:
        rows: One for each model, image, method and metric, as on disk; empty on all processes but the first, like the
            other two.
        cells: Their summaries (:class:`captum_fusion.evaluation.reporting.Cell`).
        files: The files of the report.
    """

    rows: list[Row]
    cells: list[Any]
    files: list[Path]


@dataclass(frozen=True)
class _World:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def broadcast(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process has, on the first; nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        torch.distributed.gather_object(value, found, dst=0)
        return found or []


@contextlib.contextmanager
def _world(device: str) -> Iterator[_World]:
    """The processes that torchrun started, or this one alone; an existing process group is used as it is."""
    distributed = torch.distributed
    if not distributed.is_available() or not (distributed.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ):
        yield _World()
        return
    mine = not distributed.is_initialized()
    if mine:
        # Shares differ in length: the first to finish must be allowed to wait for the last.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", timeout=timedelta(days=14))
    try:
        yield _World(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        if mine:
            distributed.destroy_process_group()


class _Items(Dataset[Any]):
    """Pictures, opened; those that cannot be are exceptions."""

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Example, Any]:
        index = self.indices[position]
        example = Example(str(index), None)
        try:
            example = as_example(self.examples[index], index)
            picture = load_image(example.image)
            return index, example, picture
        except Exception as error:  # a dataset of the user's may raise anything for a picture that is broken
            return index, example, ValueError(models.first_line(error))


@dataclass
class _Job:
    """What is run: everything that a row depends on, besides its own model, image, method and metric."""

    examples: Examples
    names: Sequence[str]
    source: str
    methods: dict[str, Any]
    metrics: dict[str, tuple[Measure, dict[str, Any]]]
    labels: Sequence[str]  # of the methods, as the table has them; they are run with the reference first
    reference: str | None
    target: str
    layer: Sequence[str] | None
    score_fn: str | None
    perturbations_per_eval: int
    threads: int
    seed: int
    share: bool
    whole_image: bool
    device: str
    pictures: int
    folder: Path
    skipped: dict[str, str] = field(default_factory=dict)
    warned: set[Any] = field(default_factory=set)

    def wanted(self, method: str) -> list[str]:
        """The metrics of a method, costs included."""
        return [*self.metrics, *COSTS]

    def settings(self) -> dict[str, Any]:
        """What must be the same for rows to belong together."""
        return {
            "dataset": self.source,
            "target": self.target,
            "score_fn": self.score_fn,
            "perturbations_per_eval": self.perturbations_per_eval,
            "threads": self.threads,
            "seed": self.seed,
            "share": self.share,
            "whole_image": self.whole_image,
            "device": self.device.partition(":")[0],
        }


def evaluate(
    dataset: str | Path | Examples,
    model: Any = "resnet50",
    *,
    output: str | Path,
    preset: str | None = None,
    methods: Sequence[str] | Mapping[str, Any] | None = None,
    metrics: Sequence[Any] | Mapping[str, Any] | None = None,
    theta: Sequence[float] | None = None,
    reference: str | None = None,
    weights: str | Sequence[str] | None = None,
    classes: str | None = None,
    layer: str | Sequence[str] | None = None,
    target: str = "prediction",
    score_fn: str | None = None,
    limit: int | None = None,
    whole_image: bool = False,
    device: str | None = None,
    workers: int = 0,
    threads: int = 1,
    perturbations_per_eval: int | None = None,
    seed: int = 0,
    pictures: int = 4,
    year: str | None = None,
    image_set: str = "val",
    show_progress: bool = True,
    settings: Mapping[str, str] | None = None,
) -> Evaluation:
    """Compare explanation methods on pictures, and write the rows, tables, figures and a page into a folder.

    A row for each model, image, method and metric goes to disk as soon as it is finished. Called again with the same
    folder, an evaluation goes on where it was stopped, or adds methods, metrics, models or images, and gives the same
    tables to the last digit: the number of rows at once, the memory layout and the number of threads are fixed (only
    seconds differ). Started by ``torchrun``, the processes divide the pictures between them; what each finishes is the
    same as with one process.

    Args:
        dataset (str, Path or dataset): What :func:`captum_fusion.evaluation.open_dataset` takes, or anything with a
            length whose items :func:`captum_fusion.evaluation.as_example` takes, such as a torch dataset of
            ``(picture, label)``.
        model (str, Module, LoadedModel or list of these): Names for :func:`captum_fusion.models.load_model`; a network
            of your own is shown 224 x 224 pictures with ImageNet's normalisation, unless a
            :class:`captum_fusion.models.LoadedModel` says otherwise.
            Default: ``"resnet50"``
        output (str or Path): The folder.
        preset (str, optional): A study of :data:`captum_fusion.evaluation.PRESETS`; the next four arguments change it.
            Default: None (``"fusioncam-table"`` where no methods are named)
        methods (sequence or mapping, optional): Names with options (``"fusion-cam:theta=20"``), and by labels of your
            own in a mapping anything that :func:`captum_fusion.evaluation.methods.build` takes: attribution objects,
            functions ``explain(model, layer, inputs, target)``.
            Default: None (the preset's)
        metrics (sequence or mapping, optional): Names with options (``"insertion:preset=rise"``), and functions
            ``metric(forward_func, inputs, attributions, target)``.
            Default: None (the preset's)
        theta (sequence of float, optional): Methods that have it are run with each of these values.
            Default: None (the preset's)
        reference (str, optional): The method that differences are taken against.
            Default: None (the preset's, or the last method)
        weights (str or sequence of str, optional): As of :func:`captum_fusion.models.load_model`, for each model.
            Default: None
        classes (str, optional): A file with the class names.
            Default: None
        layer (str or sequence of str, optional): The dotted name of the layer, for each model.
            Default: None (:func:`captum_fusion.layers.default_layer`)
        target (str, optional): What is explained: ``"prediction"``, the class of the whole picture, or ``"label"``.
            Default: ``"prediction"``
        score_fn (str, optional): ``"softmax"``, ``"sigmoid"`` or ``"identity"``, for methods and metrics.
            Default: None (each one's own, mostly softmax)
        limit (int, optional): Only the first pictures.
            Default: None (all)
        whole_image (bool, optional): Squeeze whole pictures into the network's input instead of cropping them.
            Default: False
        device (str, optional): Where models of a name are run.
            Default: None (``"cuda"`` where there is one, with one device for each process; else ``"cpu"``)
        workers (int, optional): Processes that read pictures.
            Default: 0
        threads (int, optional): Of torch, in each process.
            Default: 1
        perturbations_per_eval (int, optional): Masked rows in one call of the network.
            Default: None (4 on a CPU, 64 elsewhere)
        seed (int, optional): Of the methods and metrics that draw at random, and of the bootstrap.
            Default: 0
        pictures (int, optional): Of how many images the maps are drawn.
            Default: 4
        year (str, optional): Of PASCAL VOC.
            Default: None
        image_set (str, optional): Of ImageNet and PASCAL VOC.
            Default: ``"val"``
        show_progress (bool, optional): Show a bar, with the rate and the time left.
            Default: True
        settings (mapping, optional): More lines for the page's list of settings.
            Default: None

    Returns:
        Evaluation: Rows, summaries and files.

    Raises:
        ValueError: For an argument that does not fit, before anything is run; the message names it.

    Examples::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = evaluate(
        ...         "bundled", "bundled", output=folder, methods=["grad-cam", "xgrad-cam"],
        ...         metrics=["average_drop", "complexity"], limit=2, pictures=0, show_progress=False,
        ...     )
        >>> len(found.rows)  # two images, two methods, two metrics and three costs
        20
    """
    chosen = _preset(preset, methods, metrics)
    labelled = _labelled(methods if methods is not None else chosen.methods)
    labelled = _with_theta(labelled, theta if theta is not None else chosen.theta)
    measured = {label: measures.find(each) for label, each in _labelled(metrics or chosen.metrics, "metric").items()}
    names = {each.name for each, _ in measured.values()}
    if "average_drop" in names and "complexity" not in measured:  # a drop without the mask's area says nothing
        measured["complexity"] = measures.find("complexity")
    if reference is None:
        reference = chosen.reference if chosen.reference in labelled else list(labelled)[-1]
    if reference not in labelled:
        raise ValueError(f"reference must be one of the methods {', '.join(labelled)}, not {reference!r}")
    given = list(model) if isinstance(model, (list, tuple)) and not isinstance(model, models.LoadedModel) else [model]
    device = device or _device_of(given)
    chunk = (4 if device == "cpu" else 64) if perturbations_per_eval is None else perturbations_per_eval
    _check(target=target, limit=limit, workers=workers, threads=threads, perturbations_per_eval=chunk)
    functional.score_function(score_fn or "softmax")
    examples = _open(dataset, Path(output), year, image_set) if isinstance(dataset, (str, Path)) else dataset
    number = len(examples) if limit is None else min(limit, len(examples))
    if not number:
        raise ValueError("dataset: it is empty")
    folder = Path(output)
    source = str(Path(dataset).resolve()) if isinstance(dataset, (str, Path)) and dataset != "bundled" else "bundled"
    source = source if isinstance(dataset, (str, Path)) else f"{type(dataset).__name__} of {len(dataset)}"
    job = _Job(
        examples,
        _names(examples, number),
        source,
        {label: labelled[label] for label in sorted(labelled, key=lambda each: each != reference)},
        measured,
        list(labelled),
        reference,
        target,
        [layer] if isinstance(layer, str) else layer,
        score_fn,
        chunk,
        threads,
        seed,
        chosen.share,
        whole_image,
        device,
        pictures,
        folder,
    )
    loaders = _models(given, weights, classes, whole_image)
    if job.layer is not None and len(job.layer) not in (1, len(loaders)):
        raise ValueError(f"layer: there are {len(job.layer)} names for {len(loaders)} models")
    before = torch.get_num_threads()
    with _world(device) as world:
        if world.size > 1 and device == "cuda":
            device = f"cuda:{world.local_rank}"
        try:
            torch.set_num_threads(threads)
            rows = _run(job, loaders, device, workers, world, show_progress)
        finally:
            torch.set_num_threads(before)
        if world.rank:
            return Evaluation(rows, [], [])
    from captum_fusion.evaluation import reporting

    study = reporting.Study(
        title=chosen.title if preset is not None else "Explanation methods compared",
        models=list(loaders),
        methods=list(labelled),
        metrics=list(measured),
        reference=reference,
        images=number,
        skipped=sorted(job.skipped.items()),
        settings={**(settings or {}), **_shown(job, loaders)},
        examples={
            name: [file for i in range(min(pictures, number)) if (file := _picture(job, name, i)).is_file()]
            for name in loaders
        },
        headings={
            label: (each.heading if label == each.name else label, each.better) for label, (each, _) in measured.items()
        },
        published=chosen.published if preset is not None else {},
    )
    cells = reporting.summarize(rows, study, seed=seed)
    return Evaluation(rows, cells, reporting.write_report(folder, rows, study, cells=cells))


# ---------------------------------------------------------------------------------------------------------- arguments


def _preset(name: str | None, given: Any, metrics: Any) -> Preset:
    if name is not None and name not in PRESETS:
        raise methods.unknown("preset", name, PRESETS)
    if name is None and given is not None:
        table = PRESETS["fusioncam-table"]
        return Preset(table.title, (), tuple(metrics or table.metrics), "")
    return PRESETS[name or "fusioncam-table"]


def _labelled(given: Any, kind: str = "method") -> dict[str, Any]:
    """Methods or metrics by their labels."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        found = {}
        for each in given:
            label = each if isinstance(each, str) else getattr(each, "__name__", type(each).__name__)
            if label in found:
                raise ValueError(f"{kind}s: there are two called {label!r}; name them in a dict")
            found[label] = each
    if not found:
        raise ValueError(f"{kind}s: there is none")
    return found


def _with_theta(labelled: dict[str, Any], theta: Sequence[float]) -> dict[str, Any]:
    if not theta:
        return labelled
    found: dict[str, Any] = {}
    for label, method in labelled.items():
        words = methods.parse(method) if isinstance(method, str) else None
        if words is None or not methods.takes(words.name, "theta") or "theta" in words.options:
            found[label] = method
            continue
        for value in theta:
            text = f"{method}{',' if words.options else ':'}theta={value:g}"
            found[text if label == method else f"{label}:theta={value:g}"] = text
    return found


def _check(*, target: str, limit: int | None, **counts: int) -> None:
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, _TARGETS))}, not {target!r}")
    least = {"limit": 1, "threads": 1, "perturbations_per_eval": 1, "workers": 0}
    for name, value in {**counts, **({} if limit is None else {"limit": limit})}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
            raise ValueError(f"{name} must be an int of at least {least[name]}, not {value!r}")


def _open(source: str | Path, output: Path, year: str | None, image_set: str) -> Examples:
    """The examples of a source, without what an earlier run has written beside them."""
    inside = output.resolve()
    found = open_dataset(source, year=year, image_set=image_set)
    return [example for example in found if inside not in Path(example.image).resolve().parents]


def _names(examples: Examples, number: int) -> list[str]:
    """Names of the first examples, without opening a picture where that is possible."""
    if isinstance(examples, list) and all(isinstance(each, Example) for each in examples):
        names = [example.name for example in examples[:number]]
        if len(set(names)) < len(names):
            raise ValueError("dataset: two examples have the same name")
        return names
    return [str(index) for index in range(number)]


Loader = Callable[[], models.LoadedModel]


def _models(given: Sequence[Any], weights: Any, classes: str | None, whole_image: bool) -> dict[str, Loader]:
    """By their labels, functions that load the models: one at a time need be in memory."""
    files = [weights] if weights is None or isinstance(weights, str) else list(weights)
    if len(files) not in (1, len(given)) or (len(given) > 1 and len(files) == 1 and files[0] is not None):
        raise ValueError(f"weights: there are {len(files)} for {len(given)} models")
    found: dict[str, Loader] = {}
    for each, file in zip(given, files * (1 if len(files) == len(given) else len(given)), strict=True):
        if isinstance(each, str):
            label = each.rpartition(":")[2]
            label = label if label not in found else f"{each} ({file})"
            loader: Loader = partial(models.load_model, each, file, classes, whole_image)
        elif isinstance(each, models.LoadedModel):
            label, loader = each.name, partial(_same, each)
        elif isinstance(each, nn.Module):
            label = type(each).__name__
            loader = partial(models.from_module, label, each, whole_image)
        else:
            raise ValueError(f"model must be a name, a torch.nn.Module or a LoadedModel, not {type(each).__name__}")
        if label in found:
            raise ValueError(f"model: there are two called {label!r}; give LoadedModels with names of their own")
        found[label] = loader
    return found


def _device_of(given: Sequence[Any]) -> str:
    """Where a network of the user's is, or the best that there is for those of a name."""
    for each in given:
        module = each.model if isinstance(each, models.LoadedModel) else each
        if isinstance(module, nn.Module):
            return next((str(parameter.device) for parameter in module.parameters()), "cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _same(value: Any) -> Any:
    return value


# ------------------------------------------------------------------------------------------------------------- running


def _run(
    job: _Job, loaders: Mapping[str, Loader], device: str, workers: int, world: _World, show_progress: bool
) -> list[Row]:
    """Run what is missing; the rows that were asked for."""
    with contextlib.ExitStack() as stack:
        error, mine = None, Store(job.folder / "rows", world.rank)
        try:
            stack.enter_context(mine)
            if world.rank == 0:
                _agree(job.folder / "run.json", job.settings())
        except ValueError as problem:
            error = problem
        # All stop together: one that waited for another which has failed would wait for ever.
        problems = [each for each in world.broadcast(world.gather(error and str(error))) if each]
        if problems:
            raise ValueError(problems[0])
        same_disk = _same_disk(job.folder, world)
        for number, (name, loader) in enumerate(loaders.items()):
            _run_model(job, name, loader, number, device, workers, world, mine, show_progress)
        # Rows on a disk that the first process does not see are sent to it, by one process of that machine.
        sends = world.rank > 0 and world.local_rank == 0 and not same_disk
        gathered = world.gather((list(mine.rows()) if sends else [], job.skipped))
        rows = list(mine.rows()) if world.rank == 0 else []
    wanted = {(model, image) for model in loaders for image in job.names}
    cells = {(method, metric) for method in job.methods for metric in job.wanted(method)}
    together: dict[store.Key, Row] = {}
    for some, skipped in [(rows, {}), *gathered]:
        job.skipped.update(skipped)
        for row in some:
            if "error" not in row or store.key_of(row) not in together:
                together[store.key_of(row)] = row
    asked_for = [
        row
        for row in together.values()
        if (row["model"], row["image"]) in wanted and (row["method"], row["metric"]) in cells
    ]
    return sorted(asked_for, key=store.key_of)


def _same_disk(folder: Path, world: _World) -> bool:
    """Whether the first process writes to the very folder that this one sees."""
    path, token = folder / "rows" / ".token", world.broadcast(os.urandom(8).hex())
    if world.rank == 0 and world.size > 1:
        store.write_whole(path, token.encode())
    world.broadcast(None)
    return world.rank == 0 or (path.is_file() and path.read_text() == token)


def _agree(path: Path, settings: dict[str, Any], part: str = "run") -> None:
    """Write down what rows depend on, or refuse to mix them with rows that depend on something else."""
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"output: {path} could not be read ({error}); choose another folder") from error
    before: dict[str, Any] = known.get(part, settings)
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(
                f"output: the rows in {path.parent} were made with {key} = {before.get(key)!r} and would now be made "
                f"with {value!r}; choose another folder"
            )
    if part not in known:
        text = json.dumps({**known, part: settings, "versions": known.get("versions") or _versions()}, indent=2)
        store.write_whole(path, (text + "\n").encode())


def _versions() -> dict[str, str]:
    return {
        "captum_fusion": captum_fusion.__version__,
        "torch": torch.__version__,
        "captum": captum.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _run_model(
    job: _Job,
    name: str,
    loader: Loader,
    number: int,
    device: str,
    workers: int,
    world: _World,
    mine: Store,
    show_progress: bool,
) -> None:
    done = {store.key_of(row)[1:] for row in mine.rows() if row["model"] == name and "error" not in row}
    indices = [
        index
        for index in range(world.rank, len(job.names), world.size)
        if any(
            (job.names[index], method, metric) not in done for method in job.methods for metric in job.wanted(method)
        )
        or (index < job.pictures and not _picture(job, name, index).is_file())
    ]
    if not indices and world.rank < len(job.names):
        indices = [world.rank]  # nothing to do, but the network must be the one of the rows that are there
    loaded = _load(loader, device)
    loaders = DataLoader(
        _Items(job.examples, indices),
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    bar = tqdm(loaders, desc=name, unit="image", disable=None if show_progress and world.rank == 0 else True)
    runner: _Runner | None = None
    error: str | None = None
    for index, example, picture in bar:
        if isinstance(picture, Exception):
            _skip(job, job.names[index], str(picture))
            continue
        try:
            inputs, whole = _prepare(loaded, picture)
        except ValueError as problem:
            _skip(job, job.names[index], str(problem))
            continue
        if runner is None:
            try:
                runner = _Runner(job, name, loaded, inputs, number)
                if world.rank == 0:
                    _agree(job.folder / "run.json", runner.settings(), f"model {name}")
            except ValueError as problem:
                error = str(problem)
                break
        runner.picture(index, example, inputs, whole, done, mine)
    problems = [each for each in world.broadcast(world.gather(error)) if each]
    if problems:
        raise ValueError(problems[0])


def _load(loader: Loader, device: str) -> models.LoadedModel:
    loaded = loader()
    if isinstance(loader, partial) and loader.func is models.load_model:
        try:
            loaded.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {device} is not available here ({models.first_line(error)})") from error
    return loaded


def _skip(job: _Job, image: str, why: str) -> None:
    job.skipped[image] = why
    tqdm.write(f"{image} is left out: {why}")


def _prepare(loaded: models.LoadedModel, picture: Any) -> tuple[Tensor, tuple[int, int] | None]:
    """The network's input, and the picture's (width, height) if it is one."""
    where = next(iter(loaded.model.parameters()), torch.zeros(1)).device
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or not picture.is_floating_point():
            raise ValueError(f"a tensor must be floating point, of shape (C, H, W), not {tuple(picture.shape)}")
        return picture.unsqueeze(0).to(where), None
    try:
        return loaded.preprocess(picture).to(where), picture.size
    except Exception as error:  # preprocessing may be the user's
        raise ValueError(f"preprocessing failed ({models.first_line(error)})") from error


class _Runner:
    """One model, its layer and the methods built on it."""

    def __init__(self, job: _Job, name: str, loaded: models.LoadedModel, inputs: Tensor, number: int) -> None:
        self.job, self.name, self.loaded, self.model = job, name, loaded, loaded.model
        self.layout = self._layout(inputs)
        inputs = inputs.contiguous(memory_format=self.layout)
        self.layer_names, place = self._place(inputs, number)
        output = self._output(inputs)
        if output.dim() != 2:
            raise ValueError(f"model: {name} must return a tensor of shape (N, classes), not {tuple(output.shape)}")
        self.outputs = output.shape[1]
        names = loaded.class_names
        if names is None and self.outputs == 1000:
            names = models.imagenet_classes()
        self.class_names = None if names is None else list(names)
        chosen = {} if job.score_fn is None else {"score_fn": job.score_fn}
        self.options = {**chosen, "perturbations_per_eval": job.perturbations_per_eval}
        defaults = {**chosen, "seed": job.seed}
        self.methods = {
            label: methods.build(method, place, defaults, {**self.options, "seed": job.seed})
            for label, method in job.methods.items()
        }
        self.counter = _Counter(self.model)

    def settings(self) -> dict[str, Any]:
        """What rows of this model depend on."""
        return {
            "weights": _digest(self.model),
            "layer": self.layer_names,
            "layout": str(self.layout),
            "classes": self.outputs,
        }

    def _layout(self, inputs: Tensor) -> torch.memory_format:
        """channels_last, which is faster on most networks, where the network takes it."""
        try:
            with torch.no_grad():
                self.model(inputs.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
            return torch.channels_last
        except (RuntimeError, ValueError):
            return torch.contiguous_format

    def _output(self, inputs: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                output = self.model(inputs)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"model: {self.name} does not take an input of shape {tuple(inputs.shape)} ({models.first_line(error)})"
            ) from error
        if not isinstance(output, Tensor):
            raise ValueError(f"model: {self.name} must return a tensor, not {type(output).__name__}")
        return output

    def _place(self, inputs: Tensor, number: int) -> tuple[str, methods.Place]:
        given = self.job.layer
        wants_stages = any(
            isinstance(each, str) and methods.parse(each).name == "integrative-cam"
            for each in self.job.methods.values()
        )
        try:
            if given is not None:
                name = given[number if len(given) > 1 else 0]
                return name, methods.Place(self.model, [layers.find_layer(self.model, name)], [])
            name, layer = layers.default_layer(self.model, inputs)
            found = layers.resolution_layers(self.model, inputs) if wants_stages else []
        except ValueError as error:
            raise ValueError(f"layer: {error}") from error
        return name, methods.Place(self.model, [layer], [module for _, module in found])

    # ----------------------------------------------------------------------------------------------------- a picture

    def picture(
        self, index: int, example: Example, inputs: Tensor, size: tuple[int, int] | None, done: set[Any], mine: Store
    ) -> None:
        """Run what is missing of one picture and write it down, method by method."""
        image = self.job.names[index]
        inputs = inputs.contiguous(memory_format=self.layout)
        target = self._target(example, inputs)
        if target is None:
            _skip(self.job, image, "its label is not known to the network")
            return
        drawn: dict[str, Tensor] = {}
        draws = index < self.job.pictures and not _picture(self.job, self.name, index).is_file()
        regions: Tensor | None = None
        with shared_work() if self.job.share else contextlib.nullcontext(Spared()) as spared:
            rival: float | None = None
            for label, explain in self.methods.items():
                missing = [m for m in self.job.wanted(label) if (image, label, m) not in done]
                rivals = label == self.job.reference and "win_rate" in self.job.metrics
                if not missing and not draws and not rivals:
                    continue
                row = {"model": self.name, "image": image, "method": label, "target": target}
                try:
                    attributions, costs = self._explain(explain, inputs, target, spared)
                except Exception as error:  # a method of the user's may raise anything; one picture is not the run
                    self._failed(row, missing, error, mine)
                    continue
                if draws:
                    drawn[label] = attributions
                if regions is None:
                    regions = self._regions(example, target, inputs, size)
                subject = Subject(
                    self.model, inputs, attributions, target, example, regions, explain, self.options, rival
                )
                if rivals:
                    whole_part = subject.call(captum_fusion.metrics.confidences)
                    rival = float(functional.drop(*whole_part))
                mine.append([{**row, **self._measured(metric, subject, costs)} for metric in missing])
        if draws and drawn:
            self._draw(index, example, inputs, target, drawn)

    def _failed(self, row: Row, missing: Iterable[str], error: Exception, mine: Store) -> None:
        why = f"{type(error).__name__}: {models.first_line(error)}"
        mine.append([{**row, "metric": metric, "value": None, "error": why} for metric in missing])
        self._warn(row["method"], f"{self.name}: {row['method']} fails on {row['image']}: {why}")

    def _warn(self, key: Any, text: str) -> None:
        """Say something once."""
        if (self.name, key) not in self.job.warned:
            self.job.warned.add((self.name, key))
            tqdm.write(text)

    def _explain(
        self, explain: methods.Explain, inputs: Tensor, target: int, spared: Spared
    ) -> tuple[Tensor, dict[str, float]]:
        """A map, and what it would have cost alone."""
        before = Spared(spared.rows, spared.backward_rows, spared.seconds)
        _synchronize(inputs)
        start = time.perf_counter()
        with self.counter as counter:
            attributions = explain(inputs, target)
        _synchronize(inputs)
        seconds = time.perf_counter() - start
        costs = {
            "rows": counter.rows + spared.rows - before.rows,
            "backward_rows": counter.backward_rows + spared.backward_rows - before.backward_rows,
            "seconds": seconds + spared.seconds - before.seconds,
        }
        if attributions.dim() != inputs.dim() or attributions.shape[0] != 1:
            raise ValueError(f"the map must be of shape (1, channels, height, width), not {tuple(attributions.shape)}")
        return attributions, costs

    def _measured(self, metric: str, subject: Subject, costs: Mapping[str, float]) -> Row:
        if metric in costs:
            return {"metric": metric, "value": costs[metric]}
        try:
            value = measures.measure(self.job.metrics[metric], subject)
        except Exception as error:  # as for methods
            why = f"{type(error).__name__}: {models.first_line(error)}"
            self._warn((metric, "metric"), f"{self.name}: {metric} fails on {subject.example.name}: {why}")
            return {"metric": metric, "value": None, "error": why}
        if isinstance(value, str):
            return {"metric": metric, "value": None, "error": value}
        if isinstance(value, Curve):
            shares, scores = (each.flatten().tolist() for each in (value.shares, value.scores))
            return {"metric": metric, "value": float(value.auc), "shares": shares, "curve": scores}
        if value != value or value in (float("inf"), float("-inf")):
            return {"metric": metric, "value": None, "error": "not finite"}
        return {"metric": metric, "value": value}

    # -------------------------------------------------------------------------------------------------------- targets

    def _target(self, example: Example, inputs: Tensor) -> int | None:
        output = self._output(inputs)[0]
        if self.job.target == "prediction":
            return int(output.argmax())
        known = [index for each in example.label for index in self._indices(each)]
        return max(known, key=lambda index: float(output[index])) if known else None

    def _indices(self, label: Class) -> list[int]:
        """The outputs that a class stands for."""
        if isinstance(label, str) and self.class_names is not None:
            found = [i for i, name in enumerate(self.class_names) if name.casefold() == label.casefold()]
            if found:
                return found
        if isinstance(label, str) and not label.isdigit():
            return self._sorted_folder(label)
        return [int(label)] if 0 <= int(label) < self.outputs else []

    def _sorted_folder(self, label: str) -> list[int]:
        """ImageFolder's rule: folders in the order of their names, if there are as many as outputs."""
        examples = self.job.examples
        if not isinstance(examples, list):
            return []
        known = _folder_names(examples)
        return [known.index(label)] if len(known) == self.outputs and label in known else []

    def _regions(self, example: Example, target: int, inputs: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Masks of the target's objects in the network's input, through the very preprocessing."""
        mine = [region for region in example.regions if any(target in self._indices(each) for each in region.classes)]
        height, width = inputs.shape[2:]
        if size is None or not mine:
            return torch.zeros(0, height, width, dtype=torch.bool)
        painted = [canvas for region in mine for canvas in region.paint(size)]
        shown = [
            self.loaded.restore(self.loaded.preprocess(canvas.convert("RGB")))[0].mean(0) > 0.5 for canvas in painted
        ]
        kept = [mask for mask in shown if mask.any()]
        return torch.stack(kept) if kept else torch.zeros(0, height, width, dtype=torch.bool)

    # -------------------------------------------------------------------------------------------------------- figures

    def _draw(self, index: int, example: Example, inputs: Tensor, target: int, drawn: Mapping[str, Tensor]) -> None:
        from io import BytesIO

        from captum_fusion.visualization import visualize_grid

        label = str(target) if self.class_names is None else self.class_names[target]
        picture = self.loaded.restore(inputs)[0].cpu() if inputs.shape[1] in (1, 3) else inputs[0, :1].cpu()
        score = functional.score_function(self.job.score_fn or "softmax")(self._output(inputs))[0, target]
        panels: list[Any] = [(None, f"{label}: p = {float(score):.2f}")]
        panels += [
            (functional.normalize(drawn[m].sum(1, keepdim=True).relu()), m) for m in self.job.labels if m in drawn
        ]
        rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
        figure, file = visualize_grid([(picture, row) for row in rows]), BytesIO()
        figure.savefig(file, dpi=100, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
        store.write_whole(_picture(self.job, self.name, index), file.getvalue())


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


def _folder_names(examples: Sequence[Example]) -> list[str]:
    return sorted({each for example in examples for each in example.label if isinstance(each, str)})


def _synchronize(inputs: Tensor) -> None:
    if inputs.device.type != "cpu":
        torch.accelerator.synchronize(inputs.device)


def _digest(model: nn.Module) -> str:
    """A fingerprint of a network's weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _picture(job: _Job, model: str, index: int) -> Path:
    """Where the maps of a picture are drawn: another file for other methods."""
    of = hashlib.sha256("\n".join(job.labels).encode()).hexdigest()[:8]
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    return job.folder / "maps" / safe / f"{index:04d}_{of}.png"


def _shown(job: _Job, loaders: Mapping[str, Loader]) -> dict[str, str]:
    """Settings for the page."""
    known = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))
    found = {"dataset": job.source, "target": job.target, "score": job.score_fn or "softmax"}
    for name in loaders:
        of = known.get(f"model {name}", {})
        found[name] = f"layer {of.get('layer')}, weights {of.get('weights')}"
    found |= {
        "masked rows at once": str(job.perturbations_per_eval),
        "threads": str(job.threads),
        "seed": str(job.seed),
        "rows shared": "yes" if job.share else "no",
    }
    return {**found, **{name: str(version) for name, version in known.get("versions", {}).items()}}
