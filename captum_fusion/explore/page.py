"""The page, with Gradio: what happens when its components change, and what belongs to a visitor."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_fusion import functional, shared_work
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation import methods
from captum_fusion.explore import bundle, drawing, layout, text
from captum_fusion.explore.drawing import Display
from captum_fusion.explore.pictures import Picture
from captum_fusion.explore.recipes import COMPONENTS, FIRST, PANELS, PRESETS, Recipe
from captum_fusion.explore.session import CancelledError, Explanation, Question, Session, Watch, top_share
from captum_fusion.explore.sources import Example

#: Runs that take longer, in seconds, wait for the button.
QUICK = 20.0

#: Where a forward sample takes longer, in seconds, the first screen has a gradient method.
SLOW = 0.25

#: The largest upload.
LARGEST = "20mb"


@dataclass
class Visitor:
    """What belongs to one open page.

    Attributes:
        folder: For files to download.
        picture: The picture.
        example: The number of the example that was picked.
        explanations: The maps that are shown.
        drawn: Their drawings.
        wanted: The number of the newest run.
        cancelled: The number of the newest run that was cancelled.
        finished: The number of the newest run that ended.
    """

    folder: Path
    picture: Picture | None = None
    example: int = 0
    explanations: list[Explanation] = field(default_factory=list)
    drawn: list[Image.Image] = field(default_factory=list)
    wanted: int = 0
    cancelled: int = -1
    finished: int = 0


class Page:
    """The page of a session.

    Args:
        session (Session): The network.
        examples (sequence of Example): The pictures to choose from.
        specs (sequence of str): The methods of the first screen.
    """

    def __init__(self, session: Session, examples: Sequence[Example], specs: Sequence[str]) -> None:
        self.session, self.examples, self.specs = session, examples, list(specs)[:PANELS]
        self._offered = list(dict.fromkeys([*specs, *PRESETS, *METHODS]))
        self._visitors: dict[str, Visitor] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="captum_fusion_"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def blocks(self) -> gr.Blocks:
        """Build the page."""
        built = layout.Layout(self.session, self.examples, self.specs, self._offered)
        with built.blocks:
            self._connect(built)
        return built.blocks

    # ---------------------------------------------------------------------------------------------------- the wiring

    def _connect(self, page: layout.Layout) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        chosen: list[Any] = [page.target, page.rival, page.methods, page.layer, page.gradient, page.region]
        opened = [page.image, page.note, page.target, page.rival, page.other, page.editor, page.brushed]
        priced: list[Any] = [page.layer, page.gradient, page.region]
        drawn: list[Any] = [part for panel in page.panels for part in panel]
        drawn += [part for step in page.steps for part in step] + [page.steps_note, page.asked]
        asking: list[Any] = [page.share, page.fill, page.asked]
        answered = [page.only, page.without, page.answer]

        def show(event: Any) -> None:
            """Draw after a run."""
            event = event.then(self._redraw, page.display, drawn, concurrency_limit=None, **quiet)
            event = event.then(self._ask, asking, answered, concurrency_id="network", **quiet)
            event.then(self._files, None, page.downloads, concurrency_limit=None, **quiet)

        def run(event: Any, function: Callable[..., Any]) -> None:
            event = event.then(
                function, chosen, [page.status], concurrency_id="network", concurrency_limit=1, show_progress="full",
                show_progress_on=[image for _, image, _ in page.panels], api_visibility="private",
            )  # fmt: skip
            show(event.then(self._end, None, [page.explain, page.cancel], queue=False, **quiet))

        def run_priced(event: Any) -> None:
            """Show what the methods cost now, and run."""
            run(event.then(self._prices, priced, [page.methods], **quiet), self._run_if_quick)

        begin: dict[str, Any] = {"outputs": [page.explain, page.cancel], "queue": False, **quiet}
        network: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, **quiet}
        for event, start, function, inputs in (
            (page.blocks.load, self._begin, self._open_first, None),
            (page.gallery.select, self._pick, self._open_example, None),
            (page.image.upload, self._begin, self._open_upload, [page.image]),
        ):
            run_priced(event(start, **begin).then(function, inputs, opened, **network))
        added = page.other.input(self._begin, **begin)
        added = added.then(self._add_class, [page.other, page.target], [page.target, page.other], **quiet)
        run(added, self._run_if_quick)
        others: list[Any] = [page.target, page.rival, page.methods]
        run(gr.on([part.input for part in others], self._begin, **begin), self._run_if_quick)
        run_priced(gr.on([part.input for part in priced], self._begin, **begin))
        page.methods.change(_components, [page.methods], [page.components, page.gradient], queue=False, **quiet)
        run(page.explain.click(self._begin, **begin), self._run)
        page.cancel.click(self._cancel, **begin)
        redraw = gr.on(
            [part.input for part in page.display], self._redraw, page.display, drawn, trigger_mode="always_last",
            concurrency_limit=None, **quiet,
        )  # fmt: skip
        redraw.then(self._files, None, page.downloads, concurrency_limit=None, **quiet)
        gr.on([part.input for part in asking], self._ask, asking, answered, trigger_mode="always_last", **network)
        page.brush.click(self._brush, [page.editor, page.fill], [page.brushed], **network)
        page.blocks.unload(self._leave)

    def _visitor(self, request: gr.Request) -> Visitor:
        key = str(request.session_hash)
        if key not in self._visitors:
            self._visitors[key] = Visitor(Path(tempfile.mkdtemp(dir=self._folder)))
        return self._visitors[key]

    def _leave(self, request: gr.Request) -> None:
        visitor = self._visitors.pop(str(request.session_hash), None)
        if visitor is not None:
            visitor.wanted += 1
            shutil.rmtree(visitor.folder, ignore_errors=True)

    def _begin(self, request: gr.Request) -> tuple[Any, Any]:
        """Order a run; one that goes on ends."""
        visitor = self._visitor(request)
        visitor.wanted += 1
        return _buttons(runs=True)

    def _cancel(self, request: gr.Request) -> tuple[Any, Any]:
        visitor = self._visitor(request)
        visitor.cancelled = visitor.wanted
        return _buttons(runs=False)

    def _end(self, request: gr.Request) -> tuple[Any, Any]:
        visitor = self._visitor(request)
        return _buttons(runs=visitor.wanted not in (visitor.finished, visitor.cancelled))

    # --------------------------------------------------------------------------------------------------- the picture

    def _open_first(self, request: gr.Request) -> list[Any]:
        return self._open(self.examples[0], request) if self.examples else [gr.skip()] * 7

    def _pick(self, chosen: gr.SelectData, request: gr.Request) -> tuple[Any, Any]:
        """Note the picked example: only the first handler of an event is told what was selected."""
        self._visitor(request).example = chosen.index
        return self._begin(request)

    def _open_example(self, request: gr.Request) -> list[Any]:
        return self._open(self.examples[self._visitor(request).example], request)

    def _open_upload(self, path: str | None, request: gr.Request) -> list[Any]:
        return [gr.skip()] * 7 if path is None else self._open(Example(Path(path)), request)

    def _open(self, example: Example, request: gr.Request) -> list[Any]:
        visitor, session = self._visitor(request), self.session
        try:
            picture = session.open(example.path)
        except ValueError as error:
            previous = None if visitor.picture is None else visitor.picture.view
            return [previous, text.note(str(error), error=True), *[gr.skip()] * 5]
        visitor.picture, visitor.explanations = picture, []
        top = session.top(picture)
        remark = f"{picture.name}: {picture.size[0]} x {picture.size[1]} pixels"
        if picture.unseen > 0.02:
            remark += f", of which the network sees the middle {text.percent(1 - picture.unseen)}"
        remark += f". {example.credit}." if example.credit else "."
        return [
            picture.view,
            text.note(remark),
            gr.Radio(layout.class_choices(session, picture, top), value=top[0]),
            gr.Dropdown(layout.rivals(session, top), value=-1),
            None,
            picture.view,
            "",
        ]

    def _add_class(self, wanted: int | None, target: int | None, request: gr.Request) -> tuple[Any, Any]:
        visitor = self._visitor(request)
        if wanted is None or visitor.picture is None:
            return target, None
        indices = list(dict.fromkeys([*self.session.top(visitor.picture), wanted]))
        return gr.Radio(layout.class_choices(self.session, visitor.picture, indices), value=wanted), None

    def _prices(self, layer: str, gradient: str, region: str, request: gr.Request) -> Any:
        """The methods with what they cost now."""
        recipes = _recipes(self._offered, gradient, region)
        return gr.Dropdown(layout.method_choices(self.session, recipes, self._visitor(request).picture, layer))

    # ------------------------------------------------------------------------------------------------------- the run

    def _run_if_quick(
        self, target: Any, rival: int, specs: list[str], layer: str, gradient: str, region: str,
        request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008 - Gradio's way to ask for it
    ) -> str:  # fmt: skip
        """Make the maps, unless this takes long."""
        return self._explain(target, rival, _recipes(specs, gradient, region), layer, request, progress, QUICK)

    def _run(
        self, target: Any, rival: int, specs: list[str], layer: str, gradient: str, region: str,
        request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
    ) -> str:  # fmt: skip
        return self._explain(target, rival, _recipes(specs, gradient, region), layer, request, progress, float("inf"))

    def _explain(
        self,
        target: Any,
        rival: int,
        recipes: list[Recipe],
        layer: str,
        request: gr.Request,
        progress: Any,
        most: float,
    ) -> str:
        visitor = self._visitor(request)
        number, picture = visitor.wanted, visitor.picture
        visitor.finished = max(visitor.finished, number)

        def is_cancelled() -> bool:
            return visitor.wanted != number or visitor.cancelled >= number

        if picture is None or target is None:
            return text.note("Choose a picture first.")
        if not recipes:
            return text.note("Choose a method.")
        if rival == target:
            return text.note("The two classes are the same; choose another one to compare with.", error=True)
        question = Question(int(target), None if rival in (None, -1) else int(rival), layer)
        wanted, waiting = self._affordable(picture, question, recipes[:PANELS], most)
        new = [known[0] for recipe, known in wanted if known and not self.session.has(picture, question, recipe)]
        total = sum(one.forward_samples + one.layer_samples for one in new)
        watch = Watch(_reporter(progress, max(1, int(total))), is_cancelled)
        done, failures = [], []
        try:
            with shared_work():
                for recipe, _ in wanted:
                    try:
                        done.append(self.session.explain(picture, question, recipe, watch))
                    except ValueError as error:
                        failures.append(str(error))
        except CancelledError:
            return text.note("Cancelled.")
        visitor.explanations = done
        taken = [f"{text.spent(done)}."] if done else []
        later = [f"Press Explain for {', '.join(waiting)}."] if waiting else []
        return text.note(" ".join([*failures, *taken, *later]), error=bool(failures))

    def _affordable(
        self, picture: Picture, question: Question, recipes: Sequence[Recipe], most: float
    ) -> tuple[list[tuple[Recipe, Any]], list[str]]:
        """The methods that take at most some seconds together, with their costs, and what is said of the others."""
        wanted, waiting, seconds = [], [], 0.0
        for recipe in recipes:
            known = self.session.cost(recipe, picture, question.layer)
            own = 0.0 if known is None or self.session.has(picture, question, recipe) else known[1]
            if seconds + own <= most:
                wanted.append((recipe, known))
                seconds += own
            else:
                waiting.append(f"{recipe.label} ({text.price(known)})")
        return wanted, waiting

    # --------------------------------------------------------------------------------------------------- the display

    def _redraw(
        self, mode: str, alpha: float, cmap: str, threshold: float, shared: bool, request: gr.Request
    ) -> list[Any]:
        """Draw the maps; the network does not run."""
        visitor, session = self._visitor(request), self.session
        display = Display(mode, alpha, cmap, threshold, shared)
        shown = visitor.explanations
        if visitor.picture is None:
            visitor.drawn = []
        else:
            visitor.drawn = drawing.draw(visitor.picture.view, [one.heat for one in shown], display)
        values: list[Any] = []
        for i in range(PANELS):
            if i < len(shown):
                caption = text.caption(shown[i], session.class_names, session.is_probability)
                values += [gr.Column(visible=True), visitor.drawn[i], caption]
            else:
                plain = visitor.picture.view if i == 0 and visitor.picture is not None else None
                values += [gr.Column(visible=i == 0), plain, ""]
        return [*values, *self._draw_steps(visitor, display), _asked_choices(shown)]

    def _draw_steps(self, visitor: Visitor, display: Display) -> list[Any]:
        fused = next((one for one in visitor.explanations if one.details is not None), None)
        if fused is None or fused.details is None or visitor.picture is None:
            note = text.note("Choose fusion-cam or union-cam to see how its map came about.")
            return [part for _ in range(layout.STEPS) for part in (gr.Image(None, visible=False), "")] + [note]
        details = fused.details
        maps = [details.denoised_map, details.region_map, details.union_map]
        heats = [functional.at_least_float32(one[0, 0]).float().cpu() for one in maps] + [fused.heat]
        view = visitor.picture.view.copy()
        view.thumbnail((400, 400))
        images = drawing.draw(view, heats, display._replace(shared=False))
        values: list[Any] = []
        for image, caption in zip(images, text.steps(fused, self.session.is_probability), strict=True):
            values += [gr.Image(image, visible=True), caption]
        sentence = (
            f"{fused.recipe.label}: each map is weighted by the score that the picture has when it is seen through the "
            "map, that is, multiplied by it."
        )
        return [*values, text.note(sentence)]

    # ------------------------------------------------------------------------------------------------------ questions

    def _ask(self, share: float, fill: str, asked: str | None, request: gr.Request) -> tuple[Any, Any, str]:
        """Show the network only the highlighted part, and everything else."""
        visitor = self._visitor(request)
        picture, shown = visitor.picture, visitor.explanations
        if picture is None or not shown:
            return None, None, ""
        one = next((one for one in shown if one.recipe.label == asked), shown[0])
        mask = top_share(one.heat, share / 100)
        columns = {
            "Whole picture": picture.scores,
            "Highlighted part only": self.session.ask(picture, mask, fill),
            "Highlighted part hidden": self.session.ask(picture, 1 - mask, fill),
        }
        views = drawing.masked(picture.view, mask), drawing.masked(picture.view, 1 - mask)
        return *views, self._table(picture, one.question, columns)

    def _brush(self, edited: dict[str, Any] | None, fill: str, request: gr.Request) -> str:
        """Show the network the picture without the painted part."""
        visitor = self._visitor(request)
        picture = visitor.picture
        painted = _painted(edited, None if picture is None else tuple(picture.inputs.shape[2:]))
        if picture is None or painted is None:
            return text.note("Nothing is painted yet: choose the brush and paint over a part of the picture.")
        columns = {"Whole picture": picture.scores, "Without it": self.session.ask(picture, 1 - painted, fill)}
        question = visitor.explanations[0].question if visitor.explanations else None
        area = text.note(f"{text.percent(float(painted.mean()))} of what the network sees is painted over.")
        return area + self._table(picture, question, columns)

    def _table(self, picture: Picture, question: Question | None, columns: dict[str, Tensor]) -> str:
        asked = [] if question is None else [question.target, question.rival]
        best = [
            self.session.top(picture, 4),
            *(scores.topk(min(2, len(scores))).indices.tolist() for scores in columns.values()),
        ]
        indices = [index for index in dict.fromkeys([*asked, *(i for some in best for i in some)]) if index is not None]
        return text.table(self.session.class_names, indices, columns, self.session.is_probability)

    # ---------------------------------------------------------------------------------------------------------- files

    def _files(self, request: gr.Request) -> list[Any]:
        """Write the files to download."""
        visitor = self._visitor(request)
        picture, shown, drawn = visitor.picture, visitor.explanations, visitor.drawn
        if picture is None or not shown or len(drawn) != len(shown):
            return [gr.DownloadButton(value=None, interactive=False)] * 3
        stem = bundle.safe_name(Path(picture.name).stem)
        files = {
            f"{stem}_map.png": bundle.png(drawing.side_by_side(drawn)),
            f"{stem}_map.npy": bundle.arrays(shown),
            f"{stem}_bundle.zip": bundle.bundle(self.session, picture, shown, drawn),
        }
        values = []
        for name, content in files.items():
            path = visitor.folder / name
            path.write_bytes(content)
            values.append(gr.DownloadButton(value=str(path), interactive=True))
        return values


# -------------------------------------------------------------------------------------------------------------- helpers


def _buttons(runs: bool) -> tuple[Any, Any]:
    """The buttons that start and cancel a run."""
    return gr.Button(interactive=not runs), gr.Button(interactive=runs)


def _components(specs: list[str]) -> tuple[Any, Any]:
    """Show the components where a method has them."""
    taken = {part for spec in specs for part in COMPONENTS.get(methods.parse(spec).name, ())}
    return gr.Accordion(visible=bool(taken)), gr.Dropdown(visible="gradient" in taken)


def _recipes(specs: Sequence[str], gradient: str, region: str) -> list[Recipe]:
    """Methods with the chosen components, as far as they take them."""
    given = {"gradient": gradient or None, "region": region or None}
    taken = [COMPONENTS.get(methods.parse(spec).name, ()) for spec in specs]
    return [Recipe(spec, **{name: given[name] for name in names}) for spec, names in zip(specs, taken, strict=True)]


def _asked_choices(shown: Sequence[Explanation]) -> Any:
    labels = [one.recipe.label for one in shown]
    return gr.Dropdown(labels, value=labels[0] if labels else None, visible=len(labels) > 1)


def _reporter(progress: Any, total: int) -> Callable[[int], None]:
    """Reports samples at most ten times a second."""
    last = 0.0

    def report(samples: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            progress((min(samples, total), total), unit="samples")

    return report


def _painted(edited: dict[str, Any] | None, size: tuple[int, ...] | None) -> Tensor | None:
    """The painted part of an edited picture, as a mask, (H, W); None if nothing is painted."""
    if not edited or size is None:
        return None
    mask = torch.zeros(size)
    for layer in edited.get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").resize((size[1], size[0]), Image.Resampling.BOX)
        mask = torch.maximum(mask, torch.from_numpy(np.asarray(alpha) > 64).float())
    return mask if mask.any() else None


def serve(session: Session, examples: Sequence[Example], specs: Sequence[str] = (), **launch: Any) -> gr.Blocks:
    """Serve the page.

    Args:
        session (Session): The network.
        examples (sequence of Example): The pictures to choose from.
        specs (sequence of str, optional): The methods of the first screen.
            Default: () (:data:`FIRST`)
        launch (Any, optional): Arguments of ``gradio.Blocks.launch``.

    Returns:
        gradio.Blocks: The page.
    """
    blocks = Page(session, examples, specs or (FIRST if session.seconds < SLOW else "grad-cam",)).blocks()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    usual: dict[str, Any] = {
        "show_error": True, "max_file_size": LARGEST, "footer_links": [], "quiet": True, "ssr_mode": False,
        "height": 900,
        "theme": theme, "css": text.CSS,
    }  # fmt: skip
    blocks.launch(**{**usual, **launch})
    return blocks
