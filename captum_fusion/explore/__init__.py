"""The interactive explorer: pictures, classes, methods and layers of a network, in the browser or a notebook.

It needs the extra ``app``: ``pip install "captum-fusion[app]"``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    import gradio
    from PIL import Image

    from captum_fusion.models import LoadedModel

__all__ = ["explore"]


def explore(
    model: nn.Module | LoadedModel | str | None = None,
    layer: str | None = None,
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    classes: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = (),
    images: Sequence[str] = (),
    weights: str | None = None,
    score_fn: str | None = None,
    **launch: Any,
) -> gradio.Blocks:
    """Explore a network: in a notebook below the cell, otherwise in a page of the browser.

    The page is served to this computer only (127.0.0.1), nothing is sent anywhere, and it works offline.

    Args:
        model (Module, LoadedModel or str, optional): A classifier of pictures; or a name, as in
            :func:`captum_fusion.models.load_model`.
            Default: None (the bundled network)
        layer (str, optional): Dotted name of the layer to explain.
            Default: None (the last convolutional stage)
        preprocess (callable, optional): For a module: from an RGB picture to the network's input, (1, 3, H, W).
            Default: None (224 x 224 pixels, ImageNet's normalisation)
        classes (sequence of str, optional): Names of the classes.
            Default: None (those of the weights, where they are known)
        methods (sequence of str, optional): The methods of the first screen, with options
            (``"fusion-cam:theta=20"``), at most four side by side.
            Default: () (a quick fusion)
        images (sequence of str, optional): Picture files to choose from.
            Default: () (the bundled pictures)
        weights (str, optional): For a name: as in :func:`captum_fusion.models.load_model`.
            Default: None
        score_fn (str, optional): Turns outputs into scores: ``"softmax"``, ``"sigmoid"`` or ``"identity"``.
            Default: None (softmax, and for a method's weights what its paper uses)
        launch (Any, optional): Further arguments of ``gradio.Blocks.launch``: ``server_port``, ``share``,
            ``inbrowser``, ``prevent_thread_lock``, ...

    Returns:
        gradio.Blocks: The page. ``close()`` ends it.

    Raises:
        ImportError: Without the extra ``app``.
        ValueError: If the network does not take pictures, or there is no such layer, picture or name.

    Examples::

        >>> page = explore("bundled", prevent_thread_lock=True)  # doctest: +SKIP
        >>> page.close()  # doctest: +SKIP
    """
    from captum_fusion.explore import recipes, sources
    from captum_fusion.explore.session import Session

    page = load_page()
    loaded, source = sources.of_any(model, weights, preprocess)
    loaded = sources.with_classes(loaded, classes)
    session = Session(loaded, source, layer, score_fn)
    blocks: gradio.Blocks = page.serve(
        session, sources.examples(images, loaded.name), recipes.checked(methods), **launch
    )
    return blocks


def load_page() -> ModuleType:
    """Import the page, and Gradio with it, without its telemetry.

    Raises:
        ImportError: Without Gradio.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the explorer needs Gradio: pip install "captum-fusion[app]"')
    return importlib.import_module("captum_fusion.explore.page")
