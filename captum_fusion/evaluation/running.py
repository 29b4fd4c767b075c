"""Every method on every picture, measured by every metric; a run that was stopped continues where it was."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data as torch_data
from tqdm import tqdm

from captum_fusion import models
from captum_fusion._arguments import printable
from captum_fusion.evaluation import loading, measures, store
from captum_fusion.evaluation.data import Dataset, Example, Identity, Items, as_dataset, load_image
from captum_fusion.evaluation.fingerprints import fingerprint_of
from captum_fusion.evaluation.loading import NetworkSource
from captum_fusion.evaluation.network import Network, drawing_name, prepare
from captum_fusion.evaluation.processes import Processes, processes
from captum_fusion.evaluation.settings import FOLDERS, Settings, agree, make_study
from captum_fusion.evaluation.sources import open_dataset
from captum_fusion.evaluation.store import Row, Rows, Store, remove_parts


class Evaluation(NamedTuple):
    """The results of :func:`evaluate`; under torchrun on the first process only.

    Attributes:
        rows: One for each model, image, method and metric, as on disk; a sequence of dicts.
        cells: Their summaries (:class:`captum_fusion.evaluation.report.Cell`).
        files: The files of the report.
    """

    rows: Sequence[Row]
    cells: list[Any]
    files: list[Path]


def evaluate(
    dataset: str | Path | Items,
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
    reshape: str | Sequence[str] | None = None,
    explain: str = "prediction",
    score_fn: str | None = None,
    limit: int | None = None,
    whole_image: bool = False,
    device: str | None = None,
    workers: int = 0,
    threads: int = 1,
    perturbations_per_eval: int | None = None,
    seed: int = 0,
    pictures: int = 4,
    show_progress: bool = True,
    command: str | None = None,
) -> Evaluation:
    """Compare explanation methods on pictures, and write rows, tables, figures and a page into a folder.

    A row for each model, image, method and metric is on disk as soon as it is computed. Called again with the same
    folder, an evaluation continues where it was stopped, or adds methods, metrics, models or images. The tables are the
    same to the last digit, since the number of samples at once, the memory layout and the number of threads are fixed;
    only seconds differ. Started by ``torchrun``, the processes divide the pictures between them and give the same
    results as one process.

    Args:
        dataset (str, Path or dataset): What :func:`captum_fusion.evaluation.open_dataset` takes or returns, or anything
            with a length whose items :func:`captum_fusion.evaluation.as_example` takes, such as a torch dataset of
            ``(picture, label)``.
        model (str, Module, LoadedModel or list of these): Names for :func:`captum_fusion.models.load_model`; a network
            of your own gets 224 x 224 pictures with ImageNet's normalisation, unless a
            :class:`captum_fusion.models.LoadedModel` says otherwise.
            Default: ``"resnet50"``
        output (str or Path): The folder for the results.
        preset (str, optional): A study of :data:`captum_fusion.evaluation.PRESETS`; the next four arguments change it.
            Default: None (``"fusioncam-table"`` if no methods are given)
        methods (sequence or mapping, optional): Specs (``"fusion-cam:theta=20"``); in a mapping, by labels of your own,
            anything that :func:`captum_fusion.evaluation.methods.build` takes: attribution objects, functions
            ``explain(model, layer, inputs, target)``.
            Default: None (the preset's)
        metrics (sequence or mapping, optional): Specs (``"insertion:preset=rise"``), and functions
            ``metric(forward_func, inputs, attributions, target)``.
            Default: None (the preset's)
        theta (sequence of float, optional): Run the methods that have ``theta`` with each of these values.
            Default: None (the preset's)
        reference (str, optional): The label of the method that differences are taken against.
            Default: None (the preset's, or the last method)
        weights (str or sequence of str, optional): As of :func:`captum_fusion.models.load_model`, for each model.
            Default: None
        classes (str, optional): A file with the class names.
            Default: None
        layer (str or sequence of str, optional): The dotted name of the layer, one for all models or one for each.
            Default: None (:func:`captum_fusion.layers.default_layer`)
        reshape (str or sequence of str, optional): How the layer's output becomes maps, as of
            :func:`captum_fusion.layers.parse_reshape` (``"14x14+1"``), one for all models or one for each.
            Default: None (found by itself)
        explain (str, optional): The class that is explained: ``"prediction"``, the network's for the whole picture, or
            ``"label"``, the dataset's.
            Default: ``"prediction"``
        score_fn (str, optional): ``"softmax"``, ``"sigmoid"`` or ``"identity"``, for methods and metrics.
            Default: None (the default of each, mostly softmax)
        limit (int, optional): Only the first pictures.
            Default: None (all)
        whole_image (bool, optional): Squeeze whole pictures into the network's input instead of cropping them.
            Default: False
        device (str, optional): Where models that are given by name run.
            Default: None (``"cuda"`` if available, with one device for each process; else ``"cpu"``)
        workers (int, optional): Processes that read pictures.
            Default: 0
        threads (int, optional): Threads of torch in each process.
            Default: 1
        perturbations_per_eval (int, optional): Masked samples in one call of the network.
            Default: None (4 on a CPU, 64 elsewhere)
        seed (int, optional): Of the methods and metrics that draw at random, and of the bootstrap.
            Default: 0
        pictures (int, optional): For how many pictures the maps are drawn.
            Default: 4
        show_progress (bool, optional): Show a bar, with the rate and the time left.
            Default: True
        command (str, optional): The command line that started the evaluation, for the page.
            Default: None

    Returns:
        Evaluation: Rows, summaries and files.

    Raises:
        ValueError: For an argument that does not fit, before anything is run; the message names it.

    Examples::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     results = evaluate(
        ...         "digits", "digits", output=folder, methods=["grad-cam", "xgrad-cam"],
        ...         metrics=["average_drop", "complexity"], limit=2, pictures=0, show_progress=False,
        ...     )
        >>> len(results.rows)  # two images, two methods, two metrics and three costs
        20
    """
    where = device or loading.device_of(model)
    chunk = (4 if where == "cpu" else 64) if perturbations_per_eval is None else perturbations_per_eval
    study = make_study(
        preset=preset, methods=methods, metrics=metrics, theta=theta, reference=reference,
        explain=explain, score_fn=score_fn, perturbations_per_eval=chunk, seed=seed,
    )  # fmt: skip
    settings = Settings(
        study, Path(output), where, limit, whole_image, threads, workers, pictures, show_progress, command
    )
    networks = loading.sources_of(model, weights, classes, layer, reshape, whole_image, device)
    is_object = [hasattr(m, "attribute") and not isinstance(m, type) for m in study.methods.values()]
    if len(networks) > 1 and any(is_object):
        raise ValueError("methods: an attribution object explains one model; for several give names or functions")
    if isinstance(dataset, (str, Path)):
        dataset = open_dataset(dataset, for_each_label=explain == "label")
    examples = as_dataset(dataset).without(settings.output / folder for folder in FOLDERS).first(limit)
    if not len(examples):
        raise ValueError("dataset: it is empty")
    return _Run(settings, networks, examples).evaluation()


class _Run:
    """An evaluation of a dataset.

    Args:
        settings (Settings): How it runs.
        sources (sequence of NetworkSource): The networks.
        dataset (Dataset): The pictures.
    """

    def __init__(self, settings: Settings, sources: Sequence[NetworkSource], dataset: Dataset) -> None:
        self.settings, self.study, self.sources, self.dataset = settings, settings.study, sources, dataset
        self.names = dataset.names()
        self.identities = _Identities(dataset, self.names, with_label=self.study.explain == "label")
        self.skipped: dict[tuple[str, str], str] = {}  # why a model has no rows for an image

    def evaluation(self) -> Evaluation:
        """Run what is missing, and write the report."""
        with _threads(self.settings.threads), processes(self.settings.device) as world:
            rows = self._all_rows(world)
            if world.rank:
                return Evaluation([], [], [])
        if not rows:
            (_, image), why = next(iter(self.skipped.items()), ((None, ""), "nothing was measured"))
            number = len(self.names)
            raise ValueError(f"dataset: none of the {number} pictures could be explained (first: {image}: {why})")
        return self._report(rows)

    # ------------------------------------------------------------------------------------------------ the processes

    def _all_rows(self, world: Processes) -> Rows:
        """Run what is missing; on the first process, return the rows that were asked for."""
        output = self.settings.output
        with contextlib.ExitStack() as stack:
            networks: list[Network] = []
            settings: dict[str, dict[str, Any]] = {"run": self.settings.of_rows(self.dataset.source)}
            mine, problem = Store(output / "rows", world.rank, None if world.rank else _say), None
            try:  # everything that can be wrong is found before the first row is written
                for source in self.sources:
                    network, recorded = self._network(source, world, stack)
                    networks.append(network)
                    settings[f"model {source.name}"] = recorded
                stack.enter_context(mine)
            except (ValueError, TypeError) as error:
                problem = str(error)
            world.stop_together(problem)
            # If the first process does not see this machine's disk, one process of the machine looks after it.
            same_disk = world.share_disk(output / "rows")
            keeps_disk = world.rank == 0 or (world.local_rank == 0 and not same_disk)
            try:
                if keeps_disk:
                    remove_parts(output, FOLDERS)
                    agree(output, settings, next(mine.lines(), None) is not None, _say)
            except ValueError as error:
                problem = str(error)
            world.stop_together(problem)
            for network in networks:
                self._run_network(network, world, mine)
            # The others of this machine may still be writing. They know the pictures of their rows.
            for known in world.broadcast(world.gather(dict(self.identities))):
                self.identities.update(known)
            gathered = world.gather((self._wanted(mine) if keeps_disk else Rows(), self.skipped))
        for _, skipped in gathered:
            self.skipped.update(skipped)
        return store.joined(rows for rows, _ in gathered).latest()

    def _network(
        self, source: NetworkSource, world: Processes, stack: contextlib.ExitStack
    ) -> tuple[Network, dict[str, Any]]:
        """A network, in eval mode until the stack is closed, and what its rows depend on."""
        device = self.settings.device
        if world.size > 1 and device == "cuda":
            device = f"cuda:{world.local_rank}"
        loaded = loading.load(source, device)
        stack.enter_context(loading.eval_mode(loaded.model))
        first, probe = self._probe(loaded)
        network = Network(loaded, self.study, source, self.dataset.class_names(), probe, _say)
        return network, {**network.settings(), "preprocessing of": {first: fingerprint_of(probe)}}

    def _probe(self, loaded: models.LoadedModel) -> tuple[str, Tensor]:
        """The first picture that can be read, the same for all processes: what it is, and as the network's input."""
        opened, why = _Opened(self.dataset, range(len(self.names))), ""
        for index in range(len(opened)):
            _, _, picture = opened[index]
            try:
                if isinstance(picture, Exception):
                    raise picture
                return self._identified(index), prepare(loaded, picture)[0]
            except ValueError as error:
                why = why or str(error)
        raise ValueError(f"dataset: none of the {len(self.names)} pictures could be read (first: {why})")

    def _wanted(self, mine: Store) -> Rows:
        """The rows on this disk that were asked for."""
        networks, images = {source.name for source in self.sources}, set(self.names)
        cells = {(method, metric) for method in self.study.methods for metric in self.study.columns}
        return Rows(
            row
            for row in mine.lines()
            if row["model"] in networks
            and row["image"] in images
            and (row["method"], row["metric"]) in cells
            and self._holds(row)
        )

    # -------------------------------------------------------------------------------------------------- one network

    def _run_network(self, network: Network, world: Processes, mine: Store) -> None:
        missing = self._missing(network.name, world, mine)
        loader = torch_data.DataLoader(
            _Opened(self.dataset, list(missing)),
            batch_size=None,
            num_workers=self.settings.workers,
            collate_fn=_same,
            generator=torch.Generator(),  # otherwise it would draw from the global one
        )
        shown = self.settings.show_progress and world.rank == 0
        every = 0.1 if sys.stderr.isatty() else 60.0  # a line a minute in a log
        for index, example, picture in tqdm(
            loader, desc=network.name, unit="image", disable=not shown, mininterval=every, maxinterval=max(every, 10)
        ):
            drawing = self._drawing(network.name, index) if index < self.settings.pictures else None
            drawing = None if drawing is not None and drawing.is_file() else drawing
            try:
                if isinstance(picture, Exception):
                    raise picture
                self.identities.learn(self.names[index], example)
                inputs, size = network.prepare(picture)
                for rows in network.rows(self.names[index], example, inputs, size, missing[index], drawing):
                    mine.append(self._signed(row) for row in rows)
            except OSError:  # the disk's, not the picture's
                raise
            except Exception as error:  # one picture does not stop the run
                self._skip(network.name, self.names[index], models.first_line(error))

    def _missing(self, model: str, world: Processes, mine: Store) -> dict[int, set[tuple[str, str]]]:
        """The pictures of this process that have cells to compute or maps to draw, with these cells."""
        own = set(self.names[world.rank :: world.size])
        done = {
            (row["image"], row["method"], row["metric"])
            for row in mine.lines()
            if row["model"] == model and row["image"] in own and store.is_done(row) and self._holds(row)
        }
        cells = [(method, metric) for method in self.study.methods for metric in self.study.columns]
        missing: dict[int, set[tuple[str, str]]] = {}
        for index in range(world.rank, len(self.names), world.size):
            wanted = {cell for cell in cells if (self.names[index], *cell) not in done}
            if wanted or (index < self.settings.pictures and not self._drawing(model, index).is_file()):
                missing[index] = wanted
        return missing

    def _skip(self, model: str, image: str, why: str) -> None:
        self.skipped[model, image] = why
        _say(f"{image} is left out: {why}")

    def _signed(self, row: Row) -> Row:
        """A row with the content hashes of what it depends on."""
        identity = self.identities[row["image"]]
        signature = {"picture": identity.picture}
        if self.study.sees_regions(row["metric"]):
            signature["regions"] = identity.regions
        return {**row, **{key: value for key, value in signature.items() if value}}

    def _holds(self, row: Row) -> bool:
        """Whether a row is still valid: of the same picture and regions, and, a win, against the same reference."""
        now = self._signed({"image": row["image"], "metric": row["metric"]})
        same_reference = row.get("reference", self.study.reference) == self.study.reference
        return same_reference and all(row.get(key) == now.get(key) for key in ("picture", "regions"))

    def _identified(self, index: int) -> str:
        """A picture's name and the content hash that tells it from another one of that name."""
        name = self.names[index]
        return f"{name} {self.identities[name].picture}"

    def _drawing(self, model: str, index: int) -> Path:
        """The file that the maps of a picture are drawn to."""
        image = f"{self._identified(index)} {self.identities[self.names[index]].regions}"
        name = drawing_name(index, model, image, list(self.study.methods))
        return self.settings.output / "maps" / name

    # --------------------------------------------------------------------------------------------------- the report

    def _report(self, rows: Rows) -> Evaluation:
        from captum_fusion.evaluation import report

        study, networks = self.study, [source.name for source in self.sources]
        drawn = range(min(self.settings.pictures, len(self.names)))
        outline = report.Outline(
            title=study.title,
            models=networks,
            methods=list(study.methods),
            metrics=list(study.metrics),
            reference=study.reference,
            images=len(self.names),
            skipped=self._left_out(),
            settings=self._shown_settings(),
            examples={
                name: [file for index in drawn if (file := self._drawing(name, index)).is_file()] for name in networks
            },
            headings={
                label: (measure.heading if label == measure.name else label, measure.better)
                for label, (measure, _) in study.metrics.items()
            },
            published=study.published,
            pictures=self.dataset.shared_pictures(),
        )
        cells = report.summarize(rows, outline, seed=study.seed)
        return Evaluation(rows, cells, report.write(self.settings.output, rows, outline, cells=cells))

    def _left_out(self) -> list[tuple[str, str]]:
        """Skipped pictures, each with the reason, and the models unless it is the same for all."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for (model, image), why in self.skipped.items():
            reasons.setdefault((image, why), []).append(model)
        return sorted(
            (image, why if len(by) == len(self.sources) else f"{why} ({', '.join(sorted(by))})")
            for (image, why), by in reasons.items()
        )

    def _shown_settings(self) -> dict[str, str]:
        """The settings that the page lists."""
        known = json.loads((self.settings.output / "run.json").read_text(encoding="utf-8"))
        study = self.study
        shown = {} if self.settings.command is None else {"command": self.settings.command}
        shown |= {"dataset": self.dataset.source, "explained": study.explain, "score": study.score_fn or "softmax"}
        for source in self.sources:
            network = known.get(f"model {source.name}", {})
            shown[source.name] = f"layer {network.get('layer')}, weights {network.get('weights')}"
        for label, metric in study.metrics.items():
            if options := measures.options_in_force(metric):
                shown[f"metric {label}"] = ", ".join(f"{option} {value}" for option, value in options.items())
        shown |= {
            "samples at once": str(study.perturbations_per_eval),
            "threads": str(self.settings.threads),
            "seed": str(study.seed),
            "passes shared": "yes" if study.share else "no",
        }
        return {**shown, **{name: str(version) for name, version in known.get("versions", {}).items()}}


def _say(text: str) -> None:
    """Write a remark beside the progress bar."""
    tqdm.write(printable(text))


class _Identities(dict[str, Identity]):
    """Content hashes of a dataset's examples by name, found out when they are first asked for."""

    def __init__(self, dataset: Dataset, names: Sequence[str], with_label: bool) -> None:
        super().__init__()
        self._dataset, self._with_label = dataset, with_label
        self._indices = {name: index for index, name in enumerate(names)}

    def __missing__(self, name: str) -> Identity:
        try:
            self.learn(name, self._dataset[self._indices[name]])
        except Exception:  # an item that cannot be opened is reported when its turn comes
            self[name] = Identity()
        return self[name]

    def learn(self, name: str, example: Example) -> None:
        """Find out the content hashes of an example that is open, unless they are known."""
        if name not in self:
            try:
                self[name] = example.identity(self._with_label)
            except Exception:  # as above
                self[name] = Identity()


class _Opened(torch_data.Dataset[Any]):
    """The pictures of a dataset, opened; one that cannot be opened is an exception."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Example, Any]:
        index = self.indices[position]
        example = Example(str(index), None)
        try:
            example = self.dataset[index]
            return index, example, load_image(example.image)
        except Exception as error:  # a dataset of the user's may raise anything for a broken picture
            return index, example, ValueError(models.first_line(error))


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
