"""Every method on every picture, measured by every metric; stopped at any moment, it goes on where it was."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import captum
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import captum_fusion
from captum_fusion import functional, models
from captum_fusion.evaluation import measures, store
from captum_fusion.evaluation import methods as words
from captum_fusion.evaluation.data import Example, Examples, as_example, load_image, open_dataset
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.measures import METRICS
from captum_fusion.evaluation.network import Network, Work, drawing_name, prepare
from captum_fusion.evaluation.presets import PRESETS, Preset
from captum_fusion.evaluation.processes import Processes, processes
from captum_fusion.evaluation.store import Row, Store

_TARGETS = ("prediction", "label")

#: What :func:`evaluate` writes into its folder, besides ``run.json`` and ``index.html``.
_FOLDERS = ("rows", "maps", "tables", "figures")


class Evaluation(NamedTuple):
    """What :func:`evaluate` found; under torchrun on the first process only.

    Attributes:
        rows: One for each model, image, method and metric, as on disk.
        cells: Their summaries (:class:`captum_fusion.evaluation.reporting.Cell`).
        files: The files of the report.
    """

    rows: list[Row]
    cells: list[Any]
    files: list[Path]


@dataclass
class _Job:
    """The pictures, and where rows go.

    Attributes:
        examples: The dataset.
        names: What its examples are called.
        settings: What all rows depend on.
        folder: Where rows go.
        pictures: Of how many images maps are drawn.
        workers: Processes that read pictures.
        show_progress: Whether there is a bar.
        identities: Of examples that are known without being opened: fingerprints of what is explained, and of where
            its objects are.
        skipped: Why (model, image) is left out.
    """

    examples: Examples
    names: Sequence[str]
    settings: dict[str, Any]
    folder: Path
    pictures: int
    workers: int
    show_progress: bool
    identities: Mapping[str, tuple[str, str]]
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)

    def skip(self, model: str, image: str, why: str) -> None:
        """Leave a picture out, and say so."""
        self.skipped[model, image] = why
        tqdm.write(f"{image} is left out: {why}".encode(errors="backslashreplace").decode())

    def signed(self, row: Row, work: Work) -> Row:
        """A row with the fingerprints of what it depends on."""
        picture, place = self.identities.get(row["image"], ("", ""))
        sees = row["metric"] in work.metrics and work.metrics[row["metric"]][0].sees_places
        return {**row, **({"picture": picture} if picture else {}), **({"place": place} if sees and place else {})}

    def holds(self, row: Row, work: Work) -> bool:
        """Whether a row is of this study: of the same picture and places, and, a win, against the same reference."""
        now = self.signed({"image": row["image"], "metric": row["metric"], "reference": work.reference}, work)
        return all(row.get(key, now.get(key)) == now.get(key) for key in ("picture", "place", "reference"))

    def drawing(self, model: str, index: int, labels: Sequence[str]) -> Path:
        """Where the maps of a picture are drawn."""
        return self.folder / "maps" / drawing_name(index, model, self.seen(index), labels)

    def seen(self, index: int) -> str:
        """A picture's name, and the fingerprint that tells it from another of that name."""
        name = self.names[index]
        return " ".join([name, *self.identities.get(name, ())[:1]])


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
            return index, example, load_image(example.image)
        except Exception as error:  # a dataset of the user's may raise anything for a picture that is broken
            return index, example, ValueError(models.first_line(error))


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
    _check_theta(theta)
    labelled = _labelled(methods if methods is not None else chosen.methods)
    before, labelled = labelled, _with_theta(labelled, list(theta) if theta is not None else chosen.theta)
    if theta and before == labelled:
        raise ValueError(f"theta: none of the methods {', '.join(before)} has it, or all have one of their own")
    given_metrics = _labelled(metrics if metrics is not None else chosen.metrics, "metric")
    measured = {label: measures.find(each) for label, each in given_metrics.items()}
    used = [each for each, _ in measured.values()]
    drops = METRICS["average_drop"] in used or any(label.partition(":")[0] == "average_drop" for label in measured)
    if drops and METRICS["complexity"] not in used:  # a drop alone says nothing
        if "complexity" in measured:
            raise ValueError("metrics: 'complexity' is the mask's area, shown with average_drop; name yours otherwise")
        given_metrics["complexity"], measured["complexity"] = "complexity", measures.find("complexity")
    if reference is None:
        reference = chosen.reference if chosen.reference in labelled else list(labelled)[-1]
    if reference not in labelled:
        raise ValueError(f"reference must be one of the methods {', '.join(labelled)}, not {reference!r}")
    given = list(model) if isinstance(model, (list, tuple)) and not isinstance(model, models.LoadedModel) else [model]
    loaders = _loaders(given, weights, classes, whole_image, device)
    if len(loaders) > 1 and any(
        hasattr(each, "attribute") and not isinstance(each, type) for each in labelled.values()
    ):
        raise ValueError("methods: an attribution object explains one model; for several give names or functions")
    where = device or _device_of(given)
    chunk = (4 if where == "cpu" else 64) if perturbations_per_eval is None else perturbations_per_eval
    _check(target, limit, seed=seed, workers=workers, threads=threads, perturbations_per_eval=chunk, pictures=pictures)
    functional.score_function(score_fn or "softmax")
    places = [layer] * len(loaders) if layer is None or isinstance(layer, str) else list(layer)
    if len(places) != len(loaders):
        raise ValueError(f"layer: there are {len(places)} names for {len(loaders)} models")
    examples: Examples
    if isinstance(dataset, (str, Path)):
        examples = _open(dataset, Path(output), year, image_set, target)
        source = "bundled" if str(dataset) == "bundled" else str(Path(dataset).resolve())
    else:
        examples, source = dataset, type(dataset).__name__
    number = len(examples) if limit is None else min(limit, len(examples))
    if not number:
        raise ValueError("dataset: it is empty")
    work = Work(
        methods={label: labelled[label] for label in sorted(labelled, key=lambda each: each != reference)},
        labels=list(labelled),
        metrics=measured,
        reference=reference,
        target=target,
        score_fn=score_fn,
        perturbations_per_eval=chunk,
        seed=seed,
        share=chosen.share,
        folders=_folders(examples),
    )
    settings_of_rows = {
        "dataset": source,
        "year": year,
        "image_set": image_set,
        "target": target,
        "score_fn": score_fn,
        "perturbations_per_eval": chunk,
        "threads": threads,
        "seed": seed,
        "share": chosen.share,
        "whole_image": whole_image,
        "device": where.partition(":")[0],
        "methods": {label: words.fingerprint(each) for label, each in labelled.items()},
        "metrics": {label: words.fingerprint(each) for label, each in given_metrics.items()},
    }
    names = _names(examples, number)
    job = _Job(
        examples, names, settings_of_rows, Path(output), pictures, workers, show_progress,
        identities=_identities(examples, names, target),
    )  # fmt: skip
    with _threads(threads), processes(where) as world:
        if world.size > 1 and where == "cuda":
            where = f"cuda:{world.local_rank}"
        rows = _run(job, work, loaders, places, where, world)
        if world.rank:
            return Evaluation([], [], [])
    if not rows:
        (_, image), why = next(iter(job.skipped.items()), ((None, ""), "nothing was measured"))
        raise ValueError(f"dataset: none of the {number} pictures could be explained (first: {image}: {why})")
    from captum_fusion.evaluation import reporting

    study = reporting.Study(
        title=chosen.title if preset is not None else "Explanation methods compared",
        models=list(loaders),
        methods=list(labelled),
        metrics=list(measured),
        reference=reference,
        images=number,
        skipped=_left_out(job, list(loaders)),
        settings={**(settings or {}), **_shown(job, work, list(loaders))},
        examples={
            name: [file for i in range(min(pictures, number)) if (file := job.drawing(name, i, work.labels)).is_file()]
            for name in loaders
        },
        headings={
            label: (each.heading if label == each.name else label, each.better) for label, (each, _) in measured.items()
        },
        published=chosen.published if preset is not None else {},
        pictures=_pictures(examples, names),
    )
    cells = reporting.summarize(rows, study, seed=seed)
    return Evaluation(rows, cells, reporting.write_report(job.folder, rows, study, cells=cells))


# ---------------------------------------------------------------------------------------------------------- arguments


def _preset(name: str | None, given: Any, metrics: Any) -> Preset:
    if name is not None and name not in PRESETS:
        raise words.unknown("preset", name, PRESETS)
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
    for label in found:
        if not isinstance(label, str) or not label:
            raise ValueError(f"{kind}s: a label must be a text, not {label!r}")
        if kind == "metric" and label in measures.COSTS:
            raise ValueError(f"metrics: {label!r} is always measured of every method; name yours otherwise")
    return found


def _check_theta(theta: Any) -> None:
    if theta is None:
        return
    if isinstance(theta, str) or not isinstance(theta, Iterable) or not all(isinstance(each, Real) for each in theta):
        raise ValueError(f"theta must be a sequence of numbers, not {theta!r}")


def _with_theta(labelled: dict[str, Any], theta: Sequence[float]) -> dict[str, Any]:
    if not theta:
        return labelled
    found: dict[str, Any] = {}
    for label, method in labelled.items():
        given = words.parse(method) if isinstance(method, str) else None
        if given is None or not words.takes(given.name, "theta") or "theta" in given.options:
            found[label] = method
            continue
        for value in theta:
            shown = f"{value:g}" if float(f"{value:g}") == value else repr(value)
            text = f"{method}{',' if given.options else ':'}theta={shown}"
            found[text if label == method else f"{label}:theta={shown}"] = text
    return found


def _check(target: str, limit: int | None, **counts: int) -> None:
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, _TARGETS))}, not {target!r}")
    for name, value in {**counts, **({} if limit is None else {"limit": limit})}.items():
        least = 0 if name in ("seed", "workers", "pictures") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")


def _open(source: str | Path, output: Path, year: str | None, image_set: str, target: str) -> list[Example]:
    """The examples of a source, without what an earlier run has written beside them."""
    found = open_dataset(source, year=year, image_set=image_set, for_each_label=target == "label")
    if str(source) == "bundled":
        return found
    own = [output.resolve() / each for each in _FOLDERS]
    return [example for example in found if not any(each in Path(example.image).resolve().parents for each in own)]


def _folders(examples: Examples) -> list[str]:
    """Labels that are names, sorted: of an ImageFolder, its folders; none of datasets that would have to be opened."""
    if not isinstance(examples, list):
        return []
    known = [each for example in examples if isinstance(example, Example) for each in as_example(example, 0).label]
    return sorted({each for each in known if isinstance(each, str)})


def _unopened(examples: Examples, number: int) -> list[Example]:
    """The first examples; none of datasets that would have to be opened."""
    if isinstance(examples, list) and all(isinstance(each, Example) for each in examples):
        return examples[:number]
    return []


def _names(examples: Examples, number: int) -> list[str]:
    """Names of the first examples; their numbers where that would mean to open them."""
    if known := _unopened(examples, number):
        names = [example.name for example in known]
        if len(set(names)) < len(names):
            raise ValueError("dataset: two examples have the same name")
        return names
    return [str(index) for index in range(number)]


def _identities(examples: Examples, names: Sequence[str], target: str) -> dict[str, tuple[str, str]]:
    """Fingerprints of examples, and of their places; none of datasets that would have to be opened."""
    found = {}
    for index, name in enumerate(names) if isinstance(examples, list) else ():
        with contextlib.suppress(TypeError):  # no example: said when its turn comes
            example = as_example(examples[index], index)
            found[name] = example.fingerprint(with_label=target == "label"), example.fingerprint_of_places()
    return found


def _pictures(examples: Examples, names: Sequence[str]) -> dict[str, str]:
    """For each example the first of the same picture; none of datasets that would have to be opened."""
    first: dict[Any, str] = {}
    return {
        each.name: first.setdefault(
            str(each.image) if isinstance(each.image, (str, Path)) else id(each.image), each.name
        )
        for each in _unopened(examples, len(names))
    }


Loader = Callable[[], models.LoadedModel]


def _loaders(
    given: Sequence[Any], weights: Any, classes: str | None, whole_image: bool, device: str | None
) -> dict[str, Loader]:
    """Functions that load the models, by their labels."""
    files = [weights] * len(given) if weights is None or isinstance(weights, str) else list(weights)
    if len(files) != len(given) or (isinstance(weights, str) and len(given) > 1):
        raise ValueError(f"weights: there are {1 if isinstance(weights, str) else len(files)} for {len(given)} models")
    found: dict[str, Loader] = {}
    for each, file in zip(given, files, strict=True):
        if isinstance(each, str):
            label = each.rpartition(":")[2]
            label = label if label not in found else f"{each} ({file})"
            loader: Loader = partial(models.load_model, each, file, classes, whole_image)
        elif isinstance(each, (models.LoadedModel, nn.Module)):
            if file is not None or classes is not None or device is not None:
                raise ValueError("weights, classes and device belong to models of a name; this one is loaded already")
            label = each.name if isinstance(each, models.LoadedModel) else type(each).__name__
            loader = partial(_same, each)
            if isinstance(each, nn.Module):
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


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while: masked rows would move the statistics of a network in train mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------------------------- running


def _run(
    job: _Job,
    work: Work,
    loaders: Mapping[str, Loader],
    places: Sequence[str | None],
    device: str,
    world: Processes,
) -> list[Row]:
    """Run what is missing; on the first process the rows that were asked for."""
    with contextlib.ExitStack() as stack:
        networks: list[Network] = []
        settings: dict[str, dict[str, Any]] = {}
        mine, problem = Store(job.folder / "rows", world.rank), None
        try:  # everything that can be wrong is found out before the first row is written
            for (name, loader), layer in zip(loaders.items(), places, strict=True):
                loaded = _load(name, loader, device)
                stack.enter_context(_eval_mode(loaded.model))
                first, probe = _probe(job, loaded)
                networks.append(Network(loaded, work, layer, probe, tqdm.write))
                settings[name] = {**networks[-1].settings(), "preprocessing of": {first: fingerprint_of(probe)}}
            stack.enter_context(mine)
        except (ValueError, TypeError) as error:
            problem = str(error)
        world.stop_together(problem)
        # A disk that the first process does not see is looked after by one process of that machine.
        same_disk = world.share_disk(job.folder / "rows")
        keeps_disk = world.rank == 0 or (world.local_rank == 0 and not same_disk)
        try:
            if keeps_disk:
                _agree(job, settings, mine)
        except ValueError as error:
            problem = str(error)
        world.stop_together(problem)
        for network in networks:
            _run_network(job, work, network, world, mine)
        world.wait()  # the others of this machine may still be writing
        images, cells = set(job.names), {(method, metric) for method in work.labels for metric in work.columns}
        rows = [
            row
            for row in (mine.each() if keeps_disk else ())
            if row["model"] in loaders
            and row["image"] in images
            and (row["method"], row["metric"]) in cells
            and job.holds(row, work)
        ]
        gathered = world.gather((rows, job.skipped))
    for _, skipped in gathered:
        job.skipped.update(skipped)
    return sorted(store.latest(row for some, _ in gathered for row in some), key=store.key_of)


def _load(name: str, loader: Loader, device: str) -> models.LoadedModel:
    try:
        loaded = loader()._replace(name=name)
    except (ValueError, TypeError, KeyboardInterrupt):
        raise
    except Exception as error:  # a function of the user's may raise anything
        raise ValueError(f"model: {name} could not be made ({models.first_line(error)})") from error
    if isinstance(loader, partial) and loader.func is models.load_model:
        try:
            loaded.model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: {device} is not available here ({models.first_line(error)})") from error
    return loaded


def _probe(job: _Job, loaded: models.LoadedModel) -> tuple[str, Tensor]:
    """The first picture that can be read, the same one for every process: what it is, and as the network's input."""
    items, why = _Items(job.examples, range(len(job.names))), ""
    for position in range(len(items)):
        _, _, picture = items[position]
        try:
            if isinstance(picture, Exception):
                raise picture
            return job.seen(position), prepare(loaded, picture)[0]
        except ValueError as error:
            why = why or str(error)
    raise ValueError(f"dataset: none of the {len(job.names)} pictures could be read (first: {why})")


def _agree(job: _Job, networks: Mapping[str, dict[str, Any]], mine: Store) -> None:
    """Write down what rows depend on, or refuse to mix them with rows that depend on something else."""
    path = job.folder / "run.json"
    known: dict[str, Any] = {}
    if next(mine.each(), None) is not None:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError("it holds no settings")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"output: there are rows in {job.folder}, but what they were made with could not be read from {path} "
                f"({error}); choose another folder"
            ) from error
    kept = dict(known)
    for part, settings in {"run": job.settings, **{f"model {name}": each for name, each in networks.items()}}.items():
        before = known.get(part, {})
        for key, value in settings.items():
            if isinstance(value, dict):  # methods and metrics: others may come, the same must be the same
                changed = [name for name in value if before.get(key, {}).get(name, value[name]) != value[name]]
                pairs = [(f"{key} {name!r}", before[key][name], value[name]) for name in changed]
            else:
                pairs = [(key, before[key], value)] if before.get(key, value) != value else []
            for name, old, new in pairs:
                raise ValueError(
                    f"output: the rows in {job.folder} were made with {name} = {old!r} and would now be made with "
                    f"{new!r}; choose another folder"
                )
        merged = {
            key: {**before.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in settings.items()
        }
        kept[part] = {**before, **merged}
    other = [f"{k} {v}" for k, v in known.get("versions", {}).items() if _versions().get(k) != v]
    if other:
        tqdm.write(f"the rows in {job.folder} were made with {', '.join(other)}: last digits may differ")
    kept.setdefault("versions", _versions())
    if kept != known:
        store.write_whole(path, (json.dumps(kept, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    return {
        "captum_fusion": captum_fusion.__version__,
        "torch": torch.__version__,
        "captum": captum.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _run_network(job: _Job, work: Work, network: Network, world: Processes, mine: Store) -> None:
    done = {
        (row["image"], row["method"], row["metric"])
        for row in mine.each()
        if row["model"] == network.name and store.is_done(row) and job.holds(row, work)
    }
    missing: dict[int, set[tuple[str, str]]] = {}
    for index in range(world.rank, len(job.names), world.size):
        cells = {(a, b) for a in work.labels for b in work.columns if (job.names[index], a, b) not in done}
        if cells or (index < job.pictures and not job.drawing(network.name, index, work.labels).is_file()):
            missing[index] = cells
    loader = DataLoader(
        _Items(job.examples, list(missing)),
        batch_size=None,
        num_workers=job.workers,
        collate_fn=_same,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    shown = job.show_progress and world.rank == 0
    every = 0.1 if sys.stderr.isatty() else 60.0  # a line a minute in a log
    for index, example, picture in tqdm(
        loader, desc=network.name, unit="image", disable=not shown, mininterval=every, maxinterval=max(every, 10)
    ):
        drawing = job.drawing(network.name, index, work.labels) if index < job.pictures else None
        drawing = None if drawing is not None and drawing.is_file() else drawing
        try:
            if isinstance(picture, Exception):
                raise picture
            inputs, size = network.prepare(picture)
            for rows in network.rows(job.names[index], example, inputs, size, missing[index], drawing):
                mine.append(job.signed(row, work) for row in rows)
        except OSError:  # the disk's, not the picture's
            raise
        except Exception as error:  # no picture is the run
            job.skip(network.name, job.names[index], models.first_line(error))


def _left_out(job: _Job, names: Sequence[str]) -> list[tuple[str, str]]:
    """Pictures with the reason, and the model where it is not so for all of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for (model, image), why in job.skipped.items():
        found.setdefault(image, {}).setdefault(why, []).append(model)
    return sorted(
        (image, why if len(by) == len(names) else f"{why} ({', '.join(sorted(by))})")
        for image, reasons in found.items()
        for why, by in reasons.items()
    )


def _shown(job: _Job, work: Work, names: Sequence[str]) -> dict[str, str]:
    """Settings for the page."""
    known = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))
    of = job.settings
    found = {"dataset": of["dataset"], "target": of["target"], "score": of["score_fn"] or "softmax"}
    for name in names:
        network = known.get(f"model {name}", {})
        found[name] = f"layer {network.get('layer')}, weights {network.get('weights')}"
    for label, metric in work.metrics.items():
        if options := measures.options_in_force(metric):
            found[f"metric {label}"] = ", ".join(f"{option} {value}" for option, value in options.items())
    found |= {
        "masked rows at once": str(of["perturbations_per_eval"]),
        "threads": str(of["threads"]),
        "seed": str(of["seed"]),
        "rows shared": "yes" if of["share"] else "no",
    }
    return {**found, **{name: str(version) for name, version in known.get("versions", {}).items()}}
