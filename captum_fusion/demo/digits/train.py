"""Trains the network for digit scenes and draws the bundled scenes.

``python -m captum_fusion.demo.digits.train`` needs ``pip install captum-fusion[train]`` and a few minutes on two CPU
cores.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from captum_fusion.demo.digits import CLASSES, MEAN, WEIGHTS, preprocess
from captum_fusion.demo.digits.drawing import SIZE, Digits, Drawing, draw_scene, load_digits, smooth_noise
from captum_fusion.demo.digits.model import DigitSceneNet

BATCH = 32

# First elements of the random generators' seeds, which separate these streams of scenes.
TRAINING, TESTING, BUNDLING = range(3)


class TrainingScenes(Dataset[tuple[Tensor, Tensor]]):
    """Training scenes, drawn on access. A scene depends only on the seed and its index.

    Item ``i`` is a preprocessed image, float32 (3, 96, 96), and the target probabilities, float32 (10,).

    Args:
        digits: the digits to draw scenes with.
        length: number of scenes.
        seed: seed of the scenes.

    Example::

        >>> image, target = TrainingScenes(load_digits()[0], length=100, seed=0)[5]
        >>> image.shape, target.sum()
        (torch.Size([3, 96, 96]), tensor(1.))
    """

    def __init__(self, digits: Digits, length: int, seed: int) -> None:
        self.digits = digits
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([TRAINING, self.seed, index])
        scene = draw_scene(self.digits, int(rng.choice(3, p=[0.1, 0.4, 0.5])), rng)
        image, visible = _image(scene), np.ones(len(scene.labels), dtype=bool)
        style = rng.random()
        if style < 0.4:
            image, visible = fade(scene, rng)
        elif style < 0.45:
            image, visible = _featureless(scene, rng), np.zeros(len(scene.labels), dtype=bool)
        target = torch.full((10,), 0.1)
        if visible.any():
            target = torch.zeros(10)
            target[np.array(scene.labels)[visible]] = 1 / float(visible.sum())
        return preprocess(image)[0], target


def fade(scene: Drawing, rng: np.random.Generator) -> tuple[Tensor, NDArray[np.bool_]]:
    """Fade parts of a scene to the mean colour or to a blurred copy of the scene.

    Args:
        scene: the scene.
        rng: source of all randomness.

    Returns:
        The image, float32 (3, 96, 96) in [0, 1], and which digits remain visible, bool (digits,). No digit is
        half visible.

    Example::

        >>> rng = np.random.default_rng(0)
        >>> image, visible = fade(draw_scene(load_digits()[0], 2, rng), rng)
        >>> image.shape, visible.shape
        (torch.Size([3, 96, 96]), (2,))
    """
    image = _image(scene)
    base = _blurred(scene, radius=14) if rng.random() < 0.25 else torch.tensor(MEAN).view(3, 1, 1)
    while True:
        mask = _box(rng) if rng.random() < 0.3 else _blobs(rng)
        shown = [mask[ink] for ink in scene.masks]
        visible = np.array([np.quantile(values, 0.1) > 0.4 for values in shown], dtype=bool)
        hidden = np.array([values.mean() < 0.1 for values in shown], dtype=bool)
        if (visible | hidden).all():
            return base + torch.from_numpy(mask) * (image - base), visible


def _blobs(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a mask of smooth blobs, float (96, 96) in [0, 1], with soft or hard edges."""
    field = smooth_noise(int(rng.integers(2, 8)), rng)
    return ((field - rng.uniform(0.1, 0.8)) * rng.uniform(1, 8) + 0.5).clip(0, 1)


def _box(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a mask that hides a box or everything outside a box, float (96, 96) in [0, 1]."""
    mask = np.zeros((SIZE, SIZE), dtype=np.float32)
    top, left = rng.integers(-20, SIZE - 20, size=2)
    height, width = rng.integers(20, 80, size=2)
    mask[max(top, 0) : top + height, max(left, 0) : left + width] = 1
    return mask if rng.random() < 0.5 else 1 - mask


def _featureless(scene: Drawing, rng: np.random.Generator) -> Tensor:
    """Blur a scene beyond recognition, or replace it with one colour."""
    if rng.random() < 0.5:
        return _blurred(scene, radius=rng.uniform(14, 30))
    colour = torch.tensor(MEAN if rng.random() < 0.3 else rng.random(3), dtype=torch.float32)
    return colour.view(3, 1, 1).expand(3, SIZE, SIZE)


def _blurred(scene: Drawing, radius: float) -> Tensor:
    image = Image.fromarray(scene.image).filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def _image(scene: Drawing) -> Tensor:
    return torch.from_numpy(scene.image).permute(2, 0, 1) / 255


def train(digits: Digits, steps: int, seed: int) -> DigitSceneNet:
    """Train the network from scratch.

    Args:
        digits: the training digits.
        steps: number of optimiser steps, each with 32 new scenes.
        seed: seed of the initial weights and of the scenes.

    Returns:
        The trained network, in evaluation mode.

    Example::

        >>> train(load_digits()[0], steps=2, seed=0).training
        False
    """
    torch.manual_seed(seed)
    model = DigitSceneNet().to(memory_format=torch.channels_last)
    # One process draws scenes while this one trains.
    scenes = TrainingScenes(digits, steps * BATCH, seed)
    batches = DataLoader(scenes, BATCH, num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    loss_function = nn.CrossEntropyLoss()
    progress = tqdm(batches, unit="step")
    for images, targets in progress:
        loss = loss_function(model(images.to(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.to(memory_format=torch.contiguous_format).eval()


def named(model: nn.Module, scenes: list[Drawing]) -> list[bool]:
    """Check whether the network recognises all digits of each scene.

    A scene with n digits is recognised if they are its n most probable classes. A scene without digits is recognised if
    no class has a probability above 0.5.

    Args:
        model: the network.
        scenes: the scenes.

    Returns:
        One value per scene.

    Example::

        >>> from captum_fusion.demo.digits import load_model
        >>> rng = np.random.default_rng(0)
        >>> named(load_model(), [draw_scene(load_digits()[1], 0, rng)])
        [True]
    """
    with torch.no_grad():
        probabilities = model(preprocess(torch.stack([_image(scene) for scene in scenes]))).softmax(dim=1)
    results = []
    for scene, values in zip(scenes, probabilities, strict=True):
        top = values.topk(len(scene.labels)).indices.tolist()
        results.append(set(top) == set(scene.labels) if scene.labels else bool(values.max() <= 0.5))
    return results


def accuracy(model: nn.Module, digits: Digits, count: int, seed: int, scenes: int = 2000) -> float:
    """Measure the fraction of random test scenes in which the network recognises all digits.

    Args:
        model: the network.
        digits: the test digits.
        count: number of digits in each scene: 0, 1 or 2.
        seed: seed of the scenes.
        scenes: number of scenes.

    Returns:
        A number in [0, 1].

    Example::

        >>> from captum_fusion.demo.digits import load_model
        >>> accuracy(load_model(), load_digits()[1], count=1, seed=0, scenes=100) > 0.9
        True
    """
    stream = _scene_stream(digits, count, TESTING, seed)
    right = [named(model, list(itertools.islice(stream, 100))) for _ in range(scenes // 100)]
    return float(np.mean(right))


def bundle(model: nn.Module, digits: Digits, folder: Path, seed: int) -> None:
    """Write test scenes and their masks as PNG files, and ``scenes.json`` with their names and labels.

    These are the first five scenes with two digits, the first two with one and the first with none, each kind from its
    own random stream. Scenes that the network does not recognise, and scenes with a digit of an earlier scene of the
    stream, are left out. The five scenes with two digits therefore show all ten digits.

    Args:
        model: the trained network.
        digits: the test digits.
        folder: output folder. The scenes of an earlier run are removed first; other files stay.
        seed: seed of the scenes.

    Example::

        >>> import tempfile
        >>> from captum_fusion.demo.digits import load_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bundle(load_model(), load_digits()[1], Path(folder), seed=0)
        ...     len(list(Path(folder).glob("*_mask_*.png")))
        12
    """
    folder.mkdir(parents=True, exist_ok=True)
    index_file = folder / "scenes.json"
    for entry in json.loads(index_file.read_text(encoding="utf-8")) if index_file.exists() else []:
        for old in (f"{entry['name']}.png", *(f"{entry['name']}_mask_{label}.png" for label in entry["labels"])):
            (folder / old).unlink(missing_ok=True)
    chosen: dict[str, tuple[int, ...]] = {}
    for count, wanted in ((2, 5), (1, 2), (0, 1)):
        stream = _scene_stream(digits, count, BUNDLING, seed)
        for scene in itertools.islice(_first_named(model, stream), wanted):
            name = "_and_".join(CLASSES[label] for label in scene.labels) or "no_digit"
            chosen[name] = scene.labels
            Image.fromarray(scene.image).save(folder / f"{name}.png", optimize=True)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                Image.fromarray(mask).save(folder / f"{name}_mask_{label}.png", optimize=True)
    index = [{"name": name, "labels": labels} for name, labels in chosen.items()]
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _scene_stream(digits: Digits, count: int, purpose: int, seed: int) -> Iterator[Drawing]:
    for index in itertools.count():
        yield draw_scene(digits, count, np.random.default_rng([purpose, seed, count, index]))


def _first_named(model: nn.Module, stream: Iterator[Drawing]) -> Iterator[Drawing]:
    shown: set[int] = set()
    for scene in stream:
        if shown.isdisjoint(scene.labels) and all(named(model, [scene])):
            shown.update(scene.labels)
            yield scene


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m captum_fusion.demo.digits.train", description="Train the demonstration network from scratch."
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="weights file to write [%(default)s]")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="also write the test scenes to this folder")
    parser.add_argument("--steps", type=int, default=3200, help="number of training steps [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness [%(default)s]")
    options = parser.parse_args()

    try:
        training_digits, test_digits = load_digits()
    except ImportError as error:
        parser.error(str(error))
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))  # the process that draws takes one core
    model = train(training_digits, options.steps, options.seed)
    safetensors.torch.save_file(model.state_dict(), options.output)
    for count, scenes in ((1, "one digit"), (2, "two digits"), (0, "no digit")):
        print(f"test scenes with {scenes} recognised: {accuracy(model, test_digits, count, options.seed):.1%}")
    if options.scenes is not None:
        bundle(model, test_digits, options.scenes, options.seed)


if __name__ == "__main__":
    main()
