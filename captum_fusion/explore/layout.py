"""The components of the page, with Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from captum_fusion.attr.catalog import METHODS
from captum_fusion.explore import drawing, text
from captum_fusion.explore.drawing import Display
from captum_fusion.explore.pictures import Picture
from captum_fusion.explore.recipes import PANELS, Recipe
from captum_fusion.explore.session import Session
from captum_fusion.explore.sources import Example
from captum_fusion.visualization import MODES

#: The maps that a fusion's steps show.
STEPS = 4


class Layout:
    """The components of the page and their arrangement, without what they do.

    Args:
        session (Session): The network.
        examples (sequence of Example): The pictures to choose from.
        specs (sequence of str): The methods of the first screen.
        offered (sequence of str): The methods to choose from.
    """

    def __init__(
        self, session: Session, examples: Sequence[Example], specs: Sequence[str], offered: Sequence[str]
    ) -> None:
        self.session, self.examples, self.specs, self.offered = session, examples, list(specs), offered
        self.blocks = gr.Blocks(title="captum_fusion explorer", analytics_enabled=False, delete_cache=(3600, 3600))
        with self.blocks:
            gr.Markdown(
                "## Why this class?\n"
                "Choose a picture and a class. The map shows which parts of the picture the network's decision is "
                f"based on. Network: **{text.title(session.loaded.name)}**."
            )
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self._build_picture()
                with gr.Column(scale=8, min_width=320):
                    self._build_method()
                    self._build_panels()
                    self._build_display()
                    with gr.Tabs(overflow_behavior="wrap"):
                        self._build_ask()
                        self._build_brush()
                        self._build_steps()
                        self._build_downloads()

    def _build_picture(self) -> None:
        self.image = gr.Image(
            label="Picture: drop, paste or upload yours",
            type="filepath",
            image_mode=None,
            height=230,
            sources=["upload", "clipboard"],
            buttons=[],
            elem_id="picture",
        )
        # Gradio would decode the file itself, and answer a broken one with its traceback.
        vars(self.image)["preprocess"] = lambda payload: None if payload is None else payload.path
        thumbnails = []
        for example in self.examples:
            with Image.open(example.path) as opened:
                opened.thumbnail((240, 240))
                thumbnails.append(opened.convert("RGB"))
        self.gallery = gr.Gallery(
            thumbnails, show_label=False, columns=5, height="auto", allow_preview=False, object_fit="cover",
            buttons=[], interactive=False, visible=bool(thumbnails), elem_id="examples",
        )  # fmt: skip
        self.note = gr.HTML(elem_id="note", padding=False)
        self.target = gr.Radio(
            [], label="What the network sees; click a class to explain it", elem_classes="cf-classes", elem_id="target"
        )
        names = [(name, index) for index, name in enumerate(self.session.class_names)]
        self.rival = gr.Dropdown(
            rivals(self.session, []), value=-1, label="... rather than", filterable=True, elem_id="rival"
        )
        self.other = gr.Dropdown(names, value=None, label="Explain any other class", elem_id="other")

    def _build_method(self) -> None:
        session = self.session
        with gr.Row():
            self.methods = gr.Dropdown(
                method_choices(session, [Recipe(spec) for spec in self.offered], None),
                value=self.specs,
                multiselect=True,
                max_choices=PANELS,
                label=f"Methods (up to {PANELS} side by side)",
                scale=3,
                min_width=260,
                elem_id="methods",
            )
            shapes = {session.layer: session.layers.get(session.layer), **session.layers}
            layers = [(f"{n} ({' x '.join(map(str, shape))})" if shape else n, n) for n, shape in shapes.items()]
            self.layer = gr.Dropdown(
                layers, value=session.layer, label="Layer", scale=2, min_width=260, elem_id="layer"
            )
        with gr.Accordion("Components of the fusion", open=False) as self.components, gr.Row():
            own = ("(the method's own)", "")
            self.gradient = gr.Dropdown(
                [own, *_names("gradient")], value="", label="Gradient map", min_width=240, elem_id="gradient"
            )
            self.region = gr.Dropdown(
                [own, *_names("region", "activation")], value="", label="Region map", min_width=240, elem_id="region"
            )
        with gr.Row(elem_classes="cf-run"):
            self.status = gr.HTML(elem_id="status", min_height=24, padding=False)
            self.explain = gr.Button("Explain", variant="primary", size="md", scale=0, min_width=110, elem_id="explain")
            self.cancel = gr.Button("Cancel", size="md", scale=0, min_width=110, interactive=False, elem_id="cancel")

    def _build_panels(self) -> None:
        self.panels: list[tuple[gr.Column, gr.Image, gr.HTML]] = []
        with gr.Row(elem_classes="cf-maps"):
            for i in range(PANELS):
                with gr.Column(visible=i == 0, min_width=190) as column:
                    image = gr.Image(
                        show_label=False, interactive=False, format="jpeg", buttons=["fullscreen"],
                        elem_id=f"map{i}", alt_text="The picture with the map over it",
                    )  # fmt: skip
                    caption = gr.HTML(elem_id=f"caption{i}", padding=False)
                self.panels.append((column, image, caption))

    def _build_display(self) -> None:
        with gr.Row():
            modes = [(mode.replace("_", " "), mode) for mode in MODES]
            self.mode = gr.Radio(modes, value=MODES[0], label="Show as", elem_id="mode", scale=5, min_width=260)
            self.shared = gr.Radio(
                [("each map its own", False), ("the same for all", True)],
                value=False,
                label="Scale (the same: one colour is one share of a map)",
                elem_id="shared",
                scale=4,
                min_width=260,
            )
        with gr.Row():
            self.alpha = gr.Slider(
                0, 1, Display().alpha, step=0.05, label="Opacity", min_width=220, scale=2, elem_id="alpha"
            )
            self.threshold = gr.Slider(
                0, 1, 0, step=0.05, label="Hide values below", min_width=260, scale=2, elem_id="threshold"
            )
            self.cmap = gr.Dropdown(
                list(drawing.CMAPS), value=drawing.CMAPS[0], label="Colours", scale=1, min_width=120, elem_id="cmap"
            )
        self.display: list[Any] = [self.mode, self.alpha, self.cmap, self.threshold, self.shared]

    def _build_ask(self) -> None:
        with gr.Tab("Ask the network"):
            with gr.Row():
                self.share = gr.Slider(
                    5, 95, 30, step=5, label="Highlighted part, % of the picture", min_width=260, elem_id="share"
                )
                self.fill = gr.Radio(
                    [("grey", "mean"), ("blur", "blur")], value="mean", label="Hide with", elem_id="fill"
                )
                self.asked = gr.Dropdown([], label="Map", visible=False, min_width=240, elem_id="asked")
            with gr.Row():
                self.only = gr.Image(label="Highlighted part only", **_still("only"))
                self.without = gr.Image(label="Highlighted part hidden", **_still("without"))
            self.answer = gr.HTML(elem_id="answer", padding=False)

    def _build_brush(self) -> None:
        with gr.Tab("Brush"):
            gr.Markdown("Paint over a part of the picture and ask what the network sees without it.")
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self.editor = gr.ImageEditor(
                        type="pil", sources=(), transforms=(), layers=False, show_label=False, height=460,
                        brush=gr.Brush(default_size=36, colors=["#e6308a"], color_mode="fixed"), elem_id="editor",
                        buttons=[],
                    )  # fmt: skip
                with gr.Column(scale=2, min_width=300):
                    self.brush = gr.Button("Ask without the painted part", variant="primary", elem_id="brush")
                    self.brushed = gr.HTML(elem_id="brushed", padding=False)

    def _build_steps(self) -> None:
        with gr.Tab("Steps"):
            self.steps_note = gr.HTML(elem_id="steps_note", padding=False)
            self.steps: list[tuple[gr.Image, gr.HTML]] = []
            with gr.Row(elem_classes="cf-steps"):
                for i in range(STEPS):
                    with gr.Column(min_width=150):
                        image = gr.Image(show_label=False, visible=False, **_still(f"step{i}", None))
                        self.steps.append((image, gr.HTML(elem_id=f"stepcaption{i}", padding=False)))

    def _build_downloads(self) -> None:
        with gr.Tab("Download"):
            gr.Markdown(
                "The bundle has the picture, the maps, a manifest (network, layer, class, method, options, versions) "
                "and the Python lines that make the maps again."
            )
            with gr.Row():
                self.downloads = [
                    gr.DownloadButton(label, interactive=False, elem_id=f"download_{key}", min_width=200)
                    for key, label in (
                        ("picture", "Picture (.png)"),
                        ("map", "Map (.npy)"),
                        ("bundle", "Bundle (.zip)"),
                    )
                ]


def rivals(session: Session, first: Sequence[int]) -> list[tuple[str, int]]:
    """The classes to compare with, some of them first."""
    names = session.class_names
    indices = dict.fromkeys([*first, *range(len(names))])
    return [("(no other class)", -1), *((names[index], index) for index in indices)]


def class_choices(session: Session, picture: Picture, indices: Sequence[int]) -> list[tuple[str, int]]:
    """Classes with their scores."""
    names = session.class_names
    scores = {index: text.amount(float(picture.scores[index]), session.is_probability) for index in indices}
    return [(f"{names[index]}: {score}", index) for index, score in scores.items()]


def method_choices(
    session: Session, recipes: Sequence[Recipe], picture: Picture | None, layer: str = ""
) -> list[tuple[str, str]]:
    """The methods with their prices."""
    choices = []
    for recipe in recipes:
        known = None if picture is None else text.price(session.cost(recipe, picture, layer))
        choices.append((f"{recipe.method} ({known})" if known else recipe.method, recipe.method))
    return choices


def _still(name: str, height: int | None = 300) -> dict[str, Any]:
    """Options of a picture that is only looked at."""
    return {
        "interactive": False,
        "format": "jpeg",
        "buttons": ["fullscreen"],
        "height": height,
        "elem_id": name,
        "min_width": 220,
    }


def _names(*families: str) -> list[str]:
    return [name for name, method in METHODS.items() if method.info.family in families]
