"""Cost of the methods, in ratios of process CPU time measured in the same run, on one thread.

    pip install -e ".[benchmark]"
    python -m tests.benchmarks.cost --rounds 5 --data ../shared/data --output cost.md

Every round measures the plain forward pass and every contender once, in turn; a figure is the median of the rounds'
ratios, with their smallest and largest. The plain forward is the cheapest for each image over batches of 1, 2, 4, 8
and 16, contiguous and channels_last, under no_grad. Networks are torchvision's with seeded weights, or with real ones
where ``--data`` has them (a folder with a ``builders.py``).
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import captum
import torch
import torchvision
from captum.attr import LayerFeatureAblation, LayerGradCam
from torch import Tensor, nn
from tqdm import tqdm

import captum_fusion
from captum_fusion import functional
from captum_fusion.attr.catalog import METHODS
from captum_fusion.evaluation.methods import parse
from captum_fusion.metrics import deletion, insertion
from tests.real_data import builders

SIZE = 224
#: Methods against plain forwards, as the command line takes them, and the largest ratio that is aimed at.
BARS = {
    "score-cam": 1.10,
    "fusion-cam": 1.10,
    "fusion-cam:preset=fast": 1.10,
    "fusion-cam:preset=best": 1.10,
    "union-cam": 1.10,
    "group-cam": 1.15,
}
Line = tuple[str, str, str, list[float]]


def cpu_time(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def seeded(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(torchvision.models, name)(weights=None, **options).eval()
        return model


def pictures(count: int) -> Tensor:
    coarse = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")


def plain_forward(model: nn.Module) -> float:
    """CPU seconds for each image, at the batch and layout where they are fewest."""
    best = float("inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        for batch in (1, 2, 4, 8, 16):
            x = pictures(batch).contiguous(memory_format=layout)
            calls = max(1, 8 // batch)
            with torch.no_grad():
                for _ in range(2):
                    seconds = cpu_time(lambda x=x, calls=calls: [model(x) for _ in range(calls)])
                    best = min(best, seconds / calls / batch)
    return best


def against_plain_forwards(
    name: str, model: nn.Module, layer: nn.Module, rounds: int, bars: dict[str, float], curves_too: bool
) -> list[Line]:
    """Time of region and fusion methods, relative to plain forwards of as many samples, in batches of 1 and 4."""
    works: dict[str, Callable[[], Any]] = {}
    for method in bars:
        spec = parse(method)
        build = METHODS[spec.name].build(model, [layer], **spec.options)
        for batch in (1, 4):
            x, targets = pictures(batch), list(range(batch))
            works[f"{method}, batch {batch}"] = lambda build=build, x=x, targets=targets: build.attribute(x, targets)
    for batch in (1, 4) if curves_too else ():
        x, targets = pictures(batch), list(range(batch))
        maps = LayerGradCam(model, layer).attribute(x, targets).detach()

        def curves(x: Tensor = x, targets: list[int] = targets, maps: Tensor = maps) -> None:
            insertion(model, x, maps, targets)
            deletion(model, x, maps, targets)

        works[f"insertion + deletion, batch {batch}"] = curves
    bars = {**bars, "insertion + deletion": 1.10}
    seen = [0]
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(0, seen[0] + len(inputs[0])))
    samples: dict[str, int] = {}
    ratios: dict[str, list[float]] = {key: [] for key in works}
    for _ in tqdm(range(rounds), desc=name):
        plain = plain_forward(model)
        for key, work in works.items():
            seen[0] = 0
            seconds = cpu_time(work)
            samples[key] = seen[0]
            ratios[key].append(seconds / samples[key] / plain)
    handle.remove()
    return [
        (name, f"{key} ({samples[key]} samples)", f"<= {bars[key.split(',')[0]]:.2f}", values)
        for key, values in ratios.items()
    ]


def against_other_libraries(name: str, model: nn.Module, layer_name: str, rounds: int) -> list[Line]:
    """How many times faster than torchcam and pytorch-grad-cam, which must give the same Score-CAM."""
    from pytorch_grad_cam import ScoreCAM as TheirScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import ScoreCAM as TorchcamScoreCAM

    layer, x, target = model.get_submodule(layer_name), pictures(1), 243
    ours = captum_fusion.LayerScoreCAM(model, layer)

    def torchcam() -> Tensor:
        with TorchcamScoreCAM(model, layer_name) as extractor, torch.no_grad():
            model(x)
            return extractor(target)[0]

    def grad_cam() -> Any:
        with TheirScoreCAM(model, [layer]) as extractor:
            return extractor(x, [ClassifierOutputTarget(target)])

    maps = [functional.normalize(ours.attribute(x, target))[0, 0], torchcam()[0]]
    correlation = float(torch.corrcoef(torch.stack([m.flatten() for m in maps]))[0, 1])
    times: dict[str, list[float]] = {"torchcam": [], "pytorch-grad-cam": []}
    for _ in tqdm(range(rounds), desc=f"{name} and others"):
        own = cpu_time(lambda: ours.attribute(x, target))
        for key, work in (("torchcam", torchcam), ("pytorch-grad-cam", grad_cam)):
            times[key].append(cpu_time(work) / own)
    return [
        (name, f"Score-CAM, times faster than {key} (maps correlate {correlation:.4f} with torchcam's)", ">= 2.2", t)
        for key, t in times.items()
    ]


def against_captum(rounds: int) -> list[Line]:
    """How many times faster than LayerFeatureAblation, and gradient methods over LayerGradCam."""
    model, x = seeded("resnet18"), pictures(1)
    layer = model.layer4
    masks = {
        "ablation-cam": torch.arange(512).reshape(1, -1, 1, 1),
        "recipro-cam": torch.arange(49).reshape(1, 1, 7, 7),
    }
    lines: list[Line] = []
    for name, mask in masks.items():
        method = METHODS[name].build(model, [layer], score_fn="identity")
        theirs = LayerFeatureAblation(model, layer)
        ablate = lambda mask=mask, theirs=theirs: theirs.attribute(  # noqa: E731
            x, target=243, layer_mask=mask, perturbations_per_eval=32
        )
        ratios = [
            cpu_time(ablate) / cpu_time(lambda method=method: method.attribute(x, 243))
            for _ in tqdm(range(rounds), desc=name)
        ]
        lines.append(
            ("ResNet-18 layer4", f"{name}, times faster than LayerFeatureAblation, same mask", ">= 50", ratios)
        )
    grad = LayerGradCam(model, layer)
    for name in ("hires-cam", "grad-cam++", "xgrad-cam", "layer-cam"):
        method = METHODS[name].build(model, [layer])
        ratios = []
        for _ in range(max(rounds, 5)):
            base = cpu_time(lambda: [grad.attribute(x, 243) for _ in range(10)])
            ratios.append(cpu_time(lambda method=method: [method.attribute(x, 243) for _ in range(10)]) / base)
        lines.append(("ResNet-18 layer4", f"{name}, over captum's LayerGradCam", "<= 1.05", ratios))
    return lines


_MEMORY = """
import resource, torch
from torch import nn
from captum_fusion import LayerScoreCAM
torch.set_num_threads(1)
class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, {channels}, 1, stride=32), nn.Linear(3, 10)
    def forward(self, x):
        self.layer(x)
        return self.head(x[:, :, ::16, ::16].mean((2, 3)))
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
def now():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
model = Free().eval()
LayerScoreCAM(model, model.layer).attribute(torch.rand(1, 3, 64, 64), 1)
x = torch.rand({batch}, 3, 224, 224)
open("/proc/self/clear_refs", "w").write("5")
start = now()
LayerScoreCAM(model, model.layer).attribute(x, [i % 10 for i in range({batch})])
print(peak() - start)
"""


def memory(channels: int, batch: int) -> float:
    """Peak memory above the start, in MiB, of Score-CAM on a network that costs nothing."""
    code = _MEMORY.format(channels=channels, batch=batch)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def import_time() -> float:
    """Milliseconds that importing captum_fusion takes after captum."""
    code = (
        "import time, captum.attr, captum.metrics, matplotlib\n"
        "start = time.perf_counter()\nimport captum_fusion\nprint(1000 * (time.perf_counter() - start))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def table(lines: list[Line]) -> str:
    rows = ["| network | measurement | goal | median | minimum to maximum |", "| --- | --- | --- | --- | --- |"]
    for network, what, bar, values in lines:
        rows.append(
            f"| {network} | {what} | {bar} | **{statistics.median(values):.2f}** "
            f"| {min(values):.2f} to {max(values):.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="a folder with builders.py and real weights")
    parser.add_argument("--only", nargs="+", help="squeezenet, resnet, googlenet, captum, memory")
    parser.add_argument("--methods", nargs="+", choices=[*BARS, "curves"], help="of those against plain forwards")
    parser.add_argument("--output", type=Path, help="also write the table, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = None if options.data is None else builders(options.data)
    wanted = options.only or ["squeezenet", "resnet", "googlenet", "captum", "memory"]
    lines: list[Line] = []
    chosen = options.methods or [*BARS, "curves"]
    bars = {key: bar for key, bar in BARS.items() if key in chosen}
    if "memory" in wanted:
        for channels, batch in ((512, 4), (2048, 4), (512, 16)):
            found = [memory(channels, batch) for _ in range(options.rounds)]
            lines.append(
                ("a trivial network", f"peak MiB of Score-CAM, {channels} channels, batch {batch}", "<= 64", found)
            )
        lines.append(("", "import after captum, ms", "<= 50", [import_time() for _ in range(options.rounds)]))
    if "captum" in wanted:
        lines += against_captum(options.rounds)
    if "squeezenet" in wanted:
        model = seeded("squeezenet1_0") if real is None else real.squeezenet1_0()
        lines += against_plain_forwards(
            "SqueezeNet 1.0 features", model, model.features, options.rounds, bars, "curves" in chosen
        )
    if "resnet" in wanted:
        model = seeded("resnet18")
        lines += against_plain_forwards(
            "ResNet-18 layer4", model, model.layer4, options.rounds, bars, "curves" in chosen
        )
    if "googlenet" in wanted:
        print(table(lines), flush=True)  # in case the rest is stopped
        model = seeded("googlenet", init_weights=False) if real is None else real.googlenet_bvlc()
        lines += against_other_libraries("GoogLeNet inception5b", model, "inception5b", options.rounds)
    head = (
        f"{date.today()}, {platform.processor() or platform.machine()}, one thread, {options.rounds} rounds; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, captum "
        f"{captum.__version__}; peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB"
    )
    text = f"{head}\n\n{table(lines)}\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
