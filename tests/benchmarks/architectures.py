"""Four methods on the default layer of many networks with random weights.

    python -m tests.benchmarks.architectures --output architectures.json --write
    python -m tests.benchmarks.architectures --only resnet18 vit_b_32

A network that is in ``--output`` already is not run again. ``--write`` puts the table into ``docs/architectures.md``.
Networks of timm and transformers are left out where these are not installed.

A network works if Grad-CAM, Score-CAM, Ablation-CAM and Fusion-CAM return maps of the right shape that are finite and
not constant. Where tokens become a map, each of two cells must depend on the part of the picture at its own position:
that finds grids that are transposed, shifted by a class token, or in another order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_fusion.attr.catalog import METHODS
from captum_fusion.layers import DefaultLayer, default_layer, find_layer, reshape_of
from captum_fusion.targets import BoxScore, Output, RegionScore

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
START, END = "<!-- generated: architectures -->\n", "<!-- end: architectures -->"
CLASSES = 10
#: Networks whose errors the page explains.
STATED = {"timm: tnt_s_patch16_224"}
#: The methods, with few channels.
RUN: dict[str, dict[str, Any]] = {
    "grad-cam": {},
    "score-cam": {"max_evaluations": 8},
    "ablation-cam": {"groups": 8},
    "fusion-cam": {"max_evaluations": 8},
}


class Network(NamedTuple):
    """A network of the table.

    Attributes:
        name: Its name.
        family: The heading of its table.
        build: Makes it, with random weights.
        size: Height and width of its input.
        layer: The layer to explain, for networks whose default layer is not what one would explain.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    size: int
    layer: str | None = None


# ------------------------------------------------------------------------------------------------------------ networks

#: Larger versions of networks that are in the table, left out for their time and memory.
LARGE = {
    "convnext_base", "convnext_large", "densenet161", "densenet201", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_m", "efficientnet_v2_l", "regnet_x_16gf", "regnet_x_32gf",
    "regnet_x_8gf", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf", "resnet152", "resnext101_32x8d",
    "resnext101_64x4d", "swin_b", "swin_v2_b", "vgg13", "vgg13_bn", "vgg16_bn", "vgg19", "vgg19_bn", "vit_h_14",
    "vit_l_16", "vit_l_32", "wide_resnet101_2",
}  # fmt: skip
#: Input sizes of torchvision's classifiers that do not take pictures of 96 x 96.
SIZES = {"inception_v3": 128, "googlenet": 128, "alexnet": 128} | dict.fromkeys(
    ("swin_t", "swin_s", "swin_v2_t", "swin_v2_s"), 128
)

TIMM = {
    # Vision transformers
    "vit_tiny_patch16_224": 96, "vit_small_patch16_dinov3": 96, "vit_small_patch14_reg4_dinov2": 98,
    "vit_tiny_r_s16_p8_224": 224, "deit_tiny_distilled_patch16_224": 96, "eva02_tiny_patch14_224": 98,
    "cait_xxs24_224": 96, "convit_tiny": 96, "crossvit_9_240": 240, "tnt_s_patch16_224": 96,
    "samvit_base_patch16_224": 96, "xcit_nano_12_p16_224": 96, "volo_d1_224": 96, "vitamin_small_224": 96,
    # Hierarchical transformers
    "swin_tiny_patch4_window7_224": 224, "swinv2_tiny_window8_256": 256, "hiera_tiny_224": 224, "mvitv2_tiny": 224,
    "pit_ti_distilled_224": 224, "levit_128s": 224, "pvt_v2_b0": 128, "mobilevit_xxs": 128, "efficientvit_b0": 128,
    # MLPs and others
    "poolformer_s12": 128, "mambaout_femto": 128, "focalnet_tiny_srf": 128,
    # Convolutional networks
    "convnext_atto": 128, "resnet10t": 128, "regnety_002": 128, "efficientnet_lite0": 128,
    "mobilenetv4_conv_small": 128, "fastvit_t8": 128, "repvit_m0_9": 128, "ghostnet_100": 128,
    "edgenext_xx_small": 128, "inception_next_atto": 128, "starnet_s1": 128,
}  # fmt: skip


def torchvision_networks() -> Iterator[Network]:
    from torchvision import models

    for name in models.list_models(module=models):
        if name in LARGE:
            continue
        size, options = SIZES.get(name, 96), {}
        if name.startswith("vit_"):
            options["image_size"] = size = int(name.rpartition("_")[2]) * 6
        elif name == "maxvit_t":
            size, options = 224, {"input_size": (224, 224)}
        elif name in ("inception_v3", "googlenet"):
            options["init_weights"] = False
        build = partial(models.get_model, name, weights=None, num_classes=CLASSES, **options)
        yield Network(name, "torchvision, classification", build, size)
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        yield Network(name, "torchvision, segmentation", partial(_segmenter, name), 96)
    for name, layer in {
        "fasterrcnn_resnet50_fpn": "backbone.body.layer4",
        "fasterrcnn_mobilenet_v3_large_320_fpn": "backbone.body.16",
        "maskrcnn_resnet50_fpn": "backbone.body.layer4",
        "retinanet_resnet50_fpn": "backbone.body.layer4",
        "fcos_resnet50_fpn": "backbone.body.layer4",
        "ssd300_vgg16": "backbone.extra.0",
        "ssdlite320_mobilenet_v3_large": "backbone.features.0",
    }.items():
        size = int("".join(filter(str.isdigit, name.partition("_")[0])) or 128)
        yield Network(name, "torchvision, detection", partial(_detector, name), size, f"model.{layer}")


def _segmenter(name: str) -> nn.Module:
    from torchvision.models import get_model

    model = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=None)
    return RegionScore(Output(model, "out"))


def _detector(name: str) -> nn.Module:
    """A detector, asked for a class in a box."""
    from torchvision.models import get_model

    if "rcnn" in name:
        options: dict[str, Any] = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 20}
    else:
        options = {"score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 20}
    if not name.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}
    model = get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **options)
    return BoxScore(model, CLASSES)


def timm_networks() -> Iterator[Network]:
    if importlib.util.find_spec("timm") is None:
        return
    fixed = ("vit", "deit", "beit", "eva", "cait", "convit", "tnt", "samvit", "xcit", "volo", "flexivit")
    for name, size in TIMM.items():
        options = {"img_size": size} if name.startswith(fixed) and "224" not in str(size) else {}
        if name == "vitamin_small_224":
            options = {"img_size": size}
        yield Network(name, "timm", partial(_timm, name, num_classes=CLASSES, **options), size)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, **options)
    return model


def transformers_networks() -> Iterator[Network]:
    """Small networks of transformers, from configurations; nothing is downloaded."""
    if importlib.util.find_spec("transformers") is None:
        return
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    image = {"image_size": 48, "patch_size": 8, **vit}
    swin = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    pyramid = {"hidden_sizes": [16, 32], "depths": [1, 1]}
    mix = {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    segformer = {**mix, **pyramid, "num_attention_heads": [1, 2], "decoder_hidden_size": 32}
    mobile = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 96}
    pvt = {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "image_size": 96}
    levit = {"hidden_sizes": [16, 32, 32], "num_attention_heads": [1, 2, 2], "depths": [1] * 3, "key_dim": [8] * 3}
    focal = {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}
    hiera = {"image_size": [96, 96], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
    registers = {"num_register_tokens": 4, **image}
    networks: dict[str, tuple[str, str | None, dict[str, Any]]] = {  # class, configuration, options
        "ViT": ("ViTForImageClassification", None, image),
        "DeiT, distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", image),
        "DINOv2": ("Dinov2ForImageClassification", None, image),
        "DINOv2 with registers": ("Dinov2WithRegistersForImageClassification", None, registers),
        "DINOv3, embedding": ("DINOv3ViTModel", None, registers),
        "BEiT": ("BeitForImageClassification", None, image),
        "CLIP, image encoder": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**image, "projection_dim": 16}),
        "CLIP, classifier": ("CLIPForImageClassification", None, {"vision_config": image}),
        "SigLIP, image encoder": ("SiglipVisionModel", "SiglipVisionConfig", image),
        "SigLIP, classifier": ("SiglipForImageClassification", None, {"vision_config": image}),
        "Swin": ("SwinForImageClassification", None, swin),
        "Swin v2": ("Swinv2ForImageClassification", None, swin),
        "Hiera": ("HieraForImageClassification", None, hiera),
        "PVT": ("PvtForImageClassification", None, pvt),
        "CvT": ("CvtForImageClassification", None, {"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2]}),
        "LeViT": ("LevitForImageClassification", None, {"image_size": 128, **levit}),
        "FocalNet": ("FocalNetForImageClassification", None, {**focal, "hidden_sizes": [8, 16]}),
        "SegFormer": ("SegformerForImageClassification", None, segformer),
        "SegFormer, segmentation": ("SegformerForSemanticSegmentation", None, segformer),
        "MobileViT": ("MobileViTForImageClassification", None, mobile),
        "PoolFormer": ("PoolFormerForImageClassification", None, {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4}),
        "ConvNeXt": ("ConvNextForImageClassification", None, {**pyramid, "num_stages": 2}),
        "ConvNeXt V2": ("ConvNextV2ForImageClassification", None, {**pyramid, "num_stages": 2}),
        "ResNet": ("ResNetForImageClassification", None, {**pyramid, "embedding_size": 16}),
        "RegNet": ("RegNetForImageClassification", None, {**pyramid, "embedding_size": 8, "groups_width": 8}),
        "MobileNetV2": ("MobileNetV2ForImageClassification", None, {"depth_multiplier": 0.25}),
    }

    def build(cls: str, config: str | None, options: dict[str, Any]) -> nn.Module:
        import transformers as hf

        suffix = next(part for part in ("ForImageClassification", "ForSemanticSegmentation", "Model") if part in cls)
        made = getattr(hf, config or cls.partition(suffix)[0] + "Config")(num_labels=CLASSES, **options)
        path = "image_embeds" if "Projection" in cls else "pooler_output" if suffix == "Model" else "logits"
        model = Output(getattr(hf, cls)(made), path)
        return RegionScore(model) if "Segmentation" in suffix else model

    sizes = {"Swin": 64, "Swin v2": 64, "FocalNet": 64, "LeViT": 128, "ViT": 48} | dict.fromkeys(
        ("CvT", "MobileViT", "PVT", "PoolFormer", "Hiera", "MobileNetV2"), 96
    )
    for name, (cls, config, options) in networks.items():
        size = sizes.get(name, options.get("image_size", options.get("vision_config", {}).get("image_size", 64)))
        yield Network(name, "transformers", partial(build, cls, config, options), size)


def all_networks() -> list[Network]:
    return [*torchvision_networks(), *timm_networks(), *transformers_networks()]


# -------------------------------------------------------------------------------------------------------------- checks


def picture(size: int) -> Tensor:
    """Coloured blobs, (1, 3, size, size), normalised."""
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")


def randomised(model: nn.Module, inputs: Tensor, *arguments: Tensor) -> nn.Module:
    """Make the random weights of a network usable: no weight or scale is zero, and batch norms know their inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.flatten()
            constant = bool((flat == flat[0]).all())
            if constant and parameter.dim() > 1 and not flat[0]:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            elif constant and parameter.dim() == 1 and "bias" not in name and abs(float(flat[0])) < 0.1:
                parameter.fill_(0.2)  # scales of layers that begin near 0
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the mean over all batches
    batch = torch.cat([inputs, inputs.flip(2), inputs.flip(3), inputs.roll(7, 2)])
    with torch.no_grad():
        model(batch, *(argument.repeat(4, *[1] * (argument.dim() - 1)) for argument in arguments))
    for norm, (momentum, _) in zip(norms, before, strict=True):
        norm.eval().momentum = momentum
    return model


def arguments_of(model: nn.Module, size: int) -> tuple[Tensor, ...]:
    return (torch.tensor([[size / 8, size / 4, size * 0.75, size * 0.9]]),) if isinstance(model, BoxScore) else ()


def is_centred(model: nn.Module, found: DefaultLayer, inputs: Tensor, arguments: tuple[Tensor, ...]) -> bool:
    """Whether noise in a part of the picture changes the layer's map at the same position, for two parts.

    A cell passes if its change, relative to those by noise in other parts, is at least a fifth of the largest: random
    weights spread changes. True for maps of less than 3 x 3 cells, where it says little.
    """
    outputs: list[Tensor] = []

    def maps_of(x: Tensor) -> Tensor:
        with torch.no_grad():
            model(x, *arguments)
        return outputs[-1] if found.reshape is None else found.reshape(outputs[-1])

    handle = found.module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    try:
        clean = maps_of(inputs.clone())
        height, width = clean.shape[2:]
        if min(height, width) < 3:
            return True
        tried = [(height // 4, width * 3 // 4), (height * 2 // 3, width // 5)]
        others = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)]
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))
        changes = []
        for row, column in tried + others:
            x, (rows, columns) = inputs.clone(), inputs.shape[2:]
            part = (
                slice(row * rows // height, (row + 1) * rows // height),
                slice(column * columns // width, (column + 1) * columns // width),
            )
            x[..., part[0], part[1]] = noise[..., part[0], part[1]]
            change = (maps_of(x) - clean).norm(dim=1)[0]
            changes.append(change / change.mean())
    finally:
        handle.remove()
    usual = torch.stack(changes).mean(0)
    excess = [change - usual for change in changes[: len(tried)]]
    return all(float(own[cell]) > 0.2 * float(own.max()) for own, cell in zip(excess, tried, strict=True))


@contextmanager
def batches(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes with which a network is called."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def problem(attributions: Any, size: tuple[int, ...]) -> str | None:
    """What is wrong with a map, or None."""
    if tuple(attributions.shape) != (1, 1, *size):
        return f"shape {tuple(attributions.shape)}"
    if not attributions.isfinite().all():
        return "not finite"
    return "constant" if float(attributions.max() - attributions.min()) == 0 else None


def run(network: Network) -> dict[str, Any]:
    """Explain a picture to a network with every method, and return a row of the table."""
    row: dict[str, Any] = {"network": network.name, "family": network.family, "input": network.size}
    try:
        torch.manual_seed(0)
        model, inputs = network.build().eval(), picture(network.size)
        arguments = arguments_of(model, network.size)
        randomised(model, inputs, *arguments)
        if network.layer is None:
            found = default_layer(model, inputs, *arguments)
        else:
            layer = find_layer(model, network.layer)
            found = DefaultLayer(network.layer, layer, reshape_of(model, layer, inputs, *arguments))
        row |= {"layer": found.name, "named": network.layer is not None, "reshape": shown_reshape(found.reshape)}
        with torch.no_grad():
            scores = model(inputs.clone(), *arguments)[0]
        classes = scores.argsort(descending=True).tolist()
        problems = {}
        for name, options in RUN.items():
            for target in classes:  # a map that is 0 everywhere may be right for one class, not for all
                answer, prefix = explain(model, found, inputs, arguments, target, name, options)
                if name == "grad-cam" and "map" not in row:
                    row["map"] = list(answer.shape[2:])
                if name == "ablation-cam":
                    row["prefix"] = prefix
                size = inputs.shape[2:] if name == "fusion-cam" else row["map"]
                wrong = problem(answer, tuple(size))
                if wrong != "constant":
                    break
            if wrong is not None:
                problems[name] = wrong
        if found.reshape is not None and not is_centred(model, found, inputs, arguments):
            problems["reshape"] = "a cell does not depend on its own part of the picture"
        row["error"] = "; ".join(f"{name}: {what}" for name, what in problems.items())
    except Exception as error:  # the table shows it
        row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def explain(
    model: nn.Module, found: DefaultLayer, inputs: Tensor, arguments: tuple[Tensor, ...], target: int, name: str,
    options: dict[str, Any],
) -> tuple[Tensor, bool]:  # fmt: skip
    """A map, and whether every call of the network was with one example."""
    score = {"score_fn": getattr(model, "score_fn", "softmax")} if name != "ablation-cam" else {}
    method: Any = METHODS[name].build(model, [found.module], reshape=found.reshape, **score, **options)
    with batches(model) as sizes:
        answer: Tensor = method.attribute(inputs, target, additional_forward_args=arguments or None).detach()
    return answer, max(sizes) == 1


def shown_reshape(reshape: Any) -> str:
    return "" if reshape is None else repr(reshape)


# --------------------------------------------------------------------------------------------------------------- table


def report(rows: Iterable[dict[str, Any]]) -> str:
    """Tables in Markdown, one for each family."""
    lines, everything = [], list(rows)
    for family in dict.fromkeys(row["family"] for row in everything):
        chosen = [row for row in everything if row["family"] == family]
        works = sum(not row["error"] for row in chosen)
        lines += [f"### {family}", ""]
        lines += [f"{works} of {len(chosen)} work.", ""]
        lines += ["| network | input | layer | map | reshape | shared prefix | error |", "| --- " * 7 + "|"]
        for row in chosen:
            size = " x ".join(map(str, row.get("map", ())))
            layer = f"`{row['layer']}`" + ", named" * row["named"] if "layer" in row else ""
            reshape = f"`{row['reshape']}`" if row.get("reshape") else ""
            prefix = {True: "yes", False: "no", None: ""}[row.get("prefix")]
            cells = (row["network"], str(row["input"]), layer, size, reshape, prefix, row["error"].replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
        lines.append("")
    return "\n".join(lines)


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "torchvision", "timm", "transformers"):
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return f"Versions: {', '.join(found)}.\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks; all without it")
    parser.add_argument("--output", type=Path, default=Path("architectures.json"), help="rows; known ones are kept")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/architectures.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    networks = all_networks()
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    wanted = [network for network in networks if options.only is None or network.name in options.only]
    for network in tqdm(wanted):
        key = f"{network.family}: {network.name}"
        if options.only is not None or key not in known:
            known[key] = run(network)
            if known[key]["error"]:
                tqdm.write(f"{key}: {known[key]['error']}")
            options.output.write_text(json.dumps(known, indent=1) + "\n")
    new = [key for key, row in known.items() if row["error"] and key not in STATED]
    rows = [known[key] for key in (f"{network.family}: {network.name}" for network in networks) if key in known]
    text = f"{report(rows)}\n{versions()}"
    if options.write:
        before, start, rest = PAGE.read_text(encoding="utf-8").partition(START)
        PAGE.write_text(f"{before}{start}\n{text}\n{rest[rest.index(END) :]}", encoding="utf-8")
    else:
        print(text)
    if new:
        raise SystemExit(f"these do not work, and the page does not say so: {', '.join(new)}")


if __name__ == "__main__":
    main()
