"""Cost of the methods on a GPU, as ratios to plain forward passes of as many samples in the same run.

    bash tests/benchmarks/gpu.sh                                   (with the tests that need a GPU)
    python -m tests.benchmarks.gpu --output gpu.md
    python -m tests.benchmarks.gpu --device cpu --size 32 --networks resnet18 --seconds 0.1     (a trial without a GPU)

The plain forward is the cheapest for each image over batch sizes and memory layouts, under no_grad, in the same
precision. Networks are torchvision's with seeded random weights, so every channel of a ResNet is live. Goals are for a
current data centre card.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import captum
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from captum_fusion import LayerScoreCAM, functional, layers
from captum_fusion.attr.catalog import METHODS as CATALOGUE
from captum_fusion.metrics import deletion, insertion

#: Seconds for one image that the package aims at: network, method, precision.
GOALS = {
    ("resnet50", "fusion-cam", "float32"): 0.7,
    ("resnet50", "fusion-cam", "float16"): 0.35,
    ("resnet50", "fusion-cam, fast", "float32"): 0.06,
    ("vgg16", "fusion-cam", "float32"): 0.4,
    ("vgg16", "fusion-cam", "float16"): 0.2,
}
#: Names in the catalogue and presets.
METHODS = (
    ("score-cam", None),
    ("fusion-cam", None),
    ("fusion-cam", "fast"),
    ("fusion-cam", "best"),
    ("group-cam", None),
    ("ablation-cam", None),
)


class Line(NamedTuple):
    """One measurement."""

    network: str
    precision: str
    what: str
    samples: int
    seconds: float
    ratio: float
    peak: float
    goal: str = ""


class Bench:
    """Measurements of one network.

    Args:
        network (str): Name of a torchvision model.
        device (torch.device): Where to run.
        size (int): Height and width of the pictures.
        seconds (float): Minimum time of a measurement.
    """

    def __init__(self, network: str, device: torch.device, size: int, seconds: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options = {"image_size": size} if network.startswith("vit") else {}
            self.model = torchvision.models.get_model(network, weights=None, **options).eval().to(device)
        self.network, self.device, self.size, self.seconds = network, device, size, seconds
        self.layer_name, self.layer, self.reshape = layers.default_layer(self.model, self.pictures(1))
        self.seen = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen += len(inputs[0])

    def pictures(self, count: int) -> Tensor:
        coarse = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(1))
        return nn.functional.interpolate(coarse, (self.size, self.size), mode="bilinear").to(self.device)

    def time(self, work: Callable[[], Any]) -> float:
        """Median seconds of one call, after a first call that may compile, allocate or search."""
        work()
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return float(timer.adaptive_autorange(min_run_time=self.seconds, max_run_time=4 * self.seconds).median)

    def plain_forward(self) -> float:
        """Seconds for each image of the cheapest plain forward pass."""
        best = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            for batch in (8, 32, 128, 256) if self.device.type == "cuda" else (1, 8):
                x = self.pictures(1).repeat(batch, 1, 1, 1).contiguous(memory_format=layout)

                def forward(x: Tensor = x) -> None:
                    with torch.no_grad():
                        self.model(x)

                best = min(best, self.time(forward) / batch)
        return best

    def measured(self, what: str, work: Callable[[], Any], plain: float, precision: str, images: int) -> Line:
        seconds = self.time(work)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seen = 0
        work()
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else float("nan")
        goal = GOALS.get((self.network, what, precision))
        return Line(
            self.network,
            precision,
            f"{what}, batch {images}",
            self.seen,
            seconds / images,
            seconds / self.seen / plain,
            peak,
            "" if goal is None or images > 1 else f"{goal} s",
        )

    def lines(self, precision: str) -> Iterator[Line]:
        with autocast(self.device, precision):
            plain = self.plain_forward()
            yield Line(self.network, precision, "plain forward", 1, plain, 1.0, float("nan"))
            for name, preset in METHODS:
                method = CATALOGUE[name].build(self.model, [self.layer], preset=preset, reshape=self.reshape)
                label = name if preset is None else f"{name}, {preset}"
                for images in (1, 4) if name == "score-cam" else (1,):
                    x, target = self.pictures(images), list(range(images))

                    def attribute(method: Any = method, x: Tensor = x, target: list[int] = target) -> None:
                        method.attribute(x, target)

                    yield self.measured(label, attribute, plain, precision, images)
            x, maps = self.pictures(1), torch.rand(1, 1, self.size, self.size, device=self.device)

            def curves() -> None:
                insertion(self.model, x, maps, [0])
                deletion(self.model, x, maps, [0])

            yield self.measured("insertion + deletion", curves, plain, precision, 1)
            if precision == "float32" and self.reshape is None:
                for library, work in self.peers(x):
                    yield self.measured(f"Score-CAM of {library}", work, plain, precision, 1)

    def peers(self, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Score-CAM of other libraries, where they are installed."""
        if importlib.util.find_spec("torchcam"):
            from torchcam.methods import ScoreCAM

            def torchcam() -> None:
                with ScoreCAM(self.model, self.layer_name) as extractor, torch.no_grad():
                    self.model(x)
                    extractor(0)

            yield "torchcam", torchcam
        if importlib.util.find_spec("pytorch_grad_cam"):
            from pytorch_grad_cam import ScoreCAM as TheirScoreCAM
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            def grad_cam() -> None:
                with TheirScoreCAM(self.model, [self.layer]) as extractor:
                    extractor(x, [ClassifierOutputTarget(0)])

            yield "pytorch-grad-cam", grad_cam

    def little_memory(self) -> str:
        """Whether Score-CAM gives the same map when a large part of the card's memory is taken."""
        x, method = self.pictures(1), LayerScoreCAM(self.model, self.layer, reshape=self.reshape)
        expected = method.attribute(x, 0)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, torch.cuda.memory_allocated(self.device) / torch.cuda.mem_get_info(self.device)[1] + 0.005)
        )
        try:
            found = method.attribute(x, 0, perturbations_per_eval=None)
        except torch.OutOfMemoryError:
            return "out of memory"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        worst = float((functional.normalize(found) - functional.normalize(expected)).abs().max())
        return f"the same map up to {worst:.1e}"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def table(lines: Sequence[Line]) -> str:
    headers = ("network", "precision", "what", "samples", "s for each image", "x plain forwards", "peak MiB", "goal")
    return tabulate(lines, headers, tablefmt="github", floatfmt=("", "", "", "", ".4f", ".2f", ".0f", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vgg16", "vit_b_16"])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=0.3, help="minimum time of a measurement")
    parser.add_argument("--output", type=Path, help="also write the table, as Markdown")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    precisions = options.precisions or (["float32", "float16"] if on_gpu else ["float32"])
    card = torch.cuda.get_device_name(options.device) if on_gpu else "CPU"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, captum {captum.__version__}"
    switches = {"cudnn": torch.backends.cudnn.allow_tf32, "cuda.matmul": torch.backends.cuda.matmul.allow_tf32}
    tf32 = " and ".join(name for name, on in switches.items() if on) or "off"
    head = f"{date.today()}, {card}, {versions}, TF32 in float32: {tf32}"
    print(head, flush=True)
    lines: list[Line] = []
    notes: list[str] = []
    for network in options.networks:
        bench = Bench(network, options.device, options.size, options.seconds)
        for precision in precisions:
            for line in bench.lines(precision):
                lines.append(line)
                print(*line, flush=True)
                if options.output is not None:  # after every line, since the time may run out
                    options.output.write_text(f"{head}\n\n{table(lines)}\n", encoding="utf-8")
        if on_gpu:
            notes.append(f"{network} with little memory: {bench.little_memory()}")
            print(notes[-1], flush=True)
    text = "\n\n".join([head, table(lines), *notes]) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
