"""Maps as files, with everything that is needed to make them again."""

from __future__ import annotations

import json
import platform
import re
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from captum_fusion import __version__
from captum_fusion.evaluation.network import weights_fingerprint
from captum_fusion.explore.pictures import Picture
from captum_fusion.explore.session import Explanation, Session

#: The packages whose versions a bundle states.
_PACKAGES = ("captum", "torch", "torchvision", "numpy", "pillow")


def safe_name(text: str) -> str:
    """A name as a part of a file name on any system.

    Examples::

        >>> safe_name("../a b.png")
        'a_b.png'
    """
    return re.sub(r"[^\w+=.,-]+", "_", text).strip("._-") or "picture"


def map_names(explanations: Sequence[Explanation]) -> list[str]:
    """A file name without a suffix for each map."""
    return [f"map_{i}_{safe_name(one.recipe.label)}" for i, one in enumerate(explanations, 1)]


def arrays(explanations: Sequence[Explanation]) -> bytes:
    """The maps as one array, float32, (maps, H, W), in numpy's format; a single map is of shape (H, W)."""
    file = BytesIO()
    maps = [one.heat.numpy() for one in explanations]
    np.save(file, maps[0] if len(maps) == 1 else np.stack(maps))
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bundle(
    session: Session, picture: Picture, explanations: Sequence[Explanation], drawn: Sequence[Image.Image] = ()
) -> bytes:
    """A zip archive with the picture, the maps, a manifest, and a script that makes the maps again.

    Args:
        session (Session): The network.
        picture (Picture): The picture.
        explanations (sequence of Explanation): Its maps.
        drawn (sequence of Image, optional): Their drawings.
            Default: ()

    Returns:
        bytes: The archive: ``manifest.json``, ``reproduce.py``, the picture, ``map_1_....npy`` (float32, (H, W)), ...
    """
    names, photograph = map_names(explanations), safe_name(picture.name)
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest(session, picture, explanations), indent=2) + "\n")
        archive.writestr("reproduce.py", script(session, picture, explanations))
        archive.writestr(photograph, picture.content)
        for name, one in zip(names, explanations, strict=True):
            archive.writestr(f"{name}.npy", arrays([one]))
        for name, image in zip(names, drawn, strict=False):
            archive.writestr(f"{name}.png", png(image))
    return file.getvalue()


def manifest(session: Session, picture: Picture, explanations: Sequence[Explanation]) -> dict[str, Any]:
    """What the maps are, as JSON values."""

    def named(index: int | None) -> dict[str, Any] | None:
        return None if index is None else {"index": index, "name": session.class_names[index]}

    return {
        "model": {
            "name": session.loaded.name,
            **session.source.facts,
            "weights_hash": weights_fingerprint(session.model),
            "score_fn": session.score_fn or "softmax",
        },
        "picture": {"file": safe_name(picture.name), "size": list(picture.size), "hash": picture.key},
        "maps": [
            {
                "file": f"{name}.npy",
                "method": one.recipe.method,
                "gradient_method": one.recipe.gradient,
                "region_method": one.recipe.region,
                "call": one.code,
                "layers": list(one.layers),
                "class": named(one.question.target),
                "rather_than": named(one.question.rival),
                "score": one.score,
                "score_of_highlighted_part": one.kept,
                "forward_samples": one.forward_samples,
                "backward_samples": one.backward_samples,
                "seconds": round(one.seconds, 3),
            }
            for name, one in zip(map_names(explanations), explanations, strict=True)
        ],
        "versions": {
            "captum_fusion": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in _PACKAGES},
        },
    }


def script(session: Session, picture: Picture, explanations: Sequence[Explanation]) -> str:
    """The Python lines that make the maps again, from the folder of the unpacked bundle.

    They write ``again_1.npy``, ``again_2.npy``, ...
    """
    imports: dict[str, set[str]] = {
        "captum_fusion.evaluation.data": {"load_image"},
        "captum_fusion.functional": {"normalize", "upsample"},
        "captum_fusion.layers": {"find_layer"},
    }
    for one in explanations:
        for package, names in one.imports.items():
            imports.setdefault(package, set()).update(names)
    if any(one.question.rival is not None for one in explanations):
        imports["captum_fusion.targets"] = {"Contrast"}
    lines = ['"""Makes the maps of this bundle again."""', "", "import numpy as np"]
    if any(one.question.rival is not None for one in explanations) and "import torch" not in session.source.lines:
        lines.append("import torch")
    lines += [f"from {package} import {', '.join(sorted(names))}" for package, names in sorted(imports.items())]
    lines += [
        *session.source.lines,
        "model = loaded.model",
        f"inputs = loaded.preprocess(load_image({safe_name(picture.name)!r}))",
    ]
    for i, one in enumerate(explanations, 1):
        lines += ["", *_lines(one), f'np.save("again_{i}.npy", heat[0, 0].float().numpy())']
    return "\n".join(lines) + "\n"


def _lines(one: Explanation) -> Iterable[str]:
    target, rival, _ = one.question
    yield "network = model" if rival is None else "network = Contrast(model)"
    if len(one.layers) == 1:
        yield f"layer = find_layer(model, {one.layers[0]!r})"
    elif one.layers:
        yield f"layers = [find_layer(model, name) for name in {list(one.layers)!r}]"
    yield f"attribution = {one.code}"
    others = "" if rival is None else f", additional_forward_args=torch.tensor([[{rival}]])"
    yield f"heat = attribution.attribute(inputs, target={target}{others}).detach()"
    yield "heat = normalize(upsample(heat.sum(1, keepdim=True).relu(), inputs.shape[2:]))"
