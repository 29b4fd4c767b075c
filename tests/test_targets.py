"""Forward functions for other questions: values by hand, by linearity and by loops; layers, arguments and errors."""

from __future__ import annotations

import functools
import pickle
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from captum_fusion import RISE, LayerFusionCAM, LayerHiResCAM, LayerScoreCAM
from captum_fusion.targets import (
    BoxScore,
    Contrast,
    Output,
    RegionScore,
    Similarity,
    detected_boxes,
    detr_detections,
    predicted_region,
    similar_classes,
)
from tests.networks import FlatHead, Net, images, make
from tests.test_docs_code import blocks


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------- output


class Returning(nn.Module):
    def __init__(self, make_output: Any) -> None:
        super().__init__()
        self.make_output, self.linear = make_output, nn.Linear(3, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.make_output(scale * self.linear(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("make_output", "path"),
    [
        (lambda y: {"out": y, "aux": None}, "out"),
        (lambda y: SimpleNamespace(logits=y), "logits"),
        (lambda y: (None, y), 1),
        (lambda y: SimpleNamespace(heads=[{"a": y}]), ["heads", 0, "a"]),
    ],
)
def test_output(make_output: Any, path: Any) -> None:
    network, x = Returning(make_output), images(2, 3, 4, 4)
    same(Output(network, path)(x, scale=2.0), 2 * network.linear(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("make_output", "path", "message"),
    [
        (lambda y: {"out": y}, "logits", "path: the output has no 'logits'; it is a dict with 'out'"),
        (lambda y: (y,), 3, "path: the output has no 3; it is a tuple of 1"),
        (lambda y: SimpleNamespace(logits=y), "out", "no 'out'; it is a SimpleNamespace with logits"),
        (lambda y: {"out": None}, "out", "must be a tensor, not a NoneType"),
    ],
)
def test_outputs_that_are_not_there(make_output: Any, path: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Output(Returning(make_output), path)(images(1, 3, 4, 4))


# ------------------------------------------------------------------------------------------------------------- contrast


def test_contrast_with_all_others_and_with_some() -> None:
    model, x = make(), images(2, 3, 8, 8)
    logits = model(x).detach().numpy()
    expected = np.array([[row[c] - 0.5 * np.delete(row, c).mean() for c in range(5)] for row in logits])
    same(Contrast(model, gamma=0.5)(x), torch.tensor(expected, dtype=torch.float32))
    others = torch.tensor([[1, 2], [0, 4]])
    expected = np.array([row - row[[*classes]].mean() for row, classes in zip(logits, others.tolist(), strict=True)])
    same(Contrast(model)(x, others), torch.tensor(expected, dtype=torch.float32))
    same(Contrast(model, gamma=0)(x, others), model(x))


def test_grad_cam_of_a_contrast_is_a_contrast_of_grad_cams() -> None:
    """Before its ReLU, Grad-CAM is linear in the score."""
    model, x, others = make(FlatHead), images(2, 3, 8, 8), torch.tensor([[1, 2], [4, 2]])
    grad_cam = LayerGradCam(model, model.relu2)
    rest = torch.stack([grad_cam.attribute(x, others[:, i]) for i in range(2)]).mean(0)
    found = LayerGradCam(Contrast(model, gamma=0.7), model.relu2).attribute(x, [0, 3], additional_forward_args=others)
    same(found, grad_cam.attribute(x, [0, 3]) - 0.7 * rest)


def test_contrast_is_torchcams_finer_cam() -> None:
    methods = pytest.importorskip("torchcam.methods")
    if not hasattr(methods, "FinerCAM"):
        pytest.skip("this torchcam has no FinerCAM")
    model, x, target = make(FlatHead), images(2, 3, 8, 8), [1, 3]
    with methods.FinerCAM(model, "relu2", gamma=0.6, num_references=2) as extractor:
        [theirs] = extractor(class_idx=target, scores=model(x), normalized=False)
    contrast = Contrast(model, gamma=0.6)
    others = similar_classes(model(x), target, number=2)
    ours = LayerGradCam(contrast, model.relu2).attribute(
        x, target, additional_forward_args=others, relu_attributions=True
    )
    same(ours[:, 0].detach(), theirs.detach())
    assert ours.abs().amax() > 0


def test_other_classes_follow_their_example() -> None:
    model, x, others = make(), images(2, 3, 8, 8), torch.tensor([[1], [2]])
    contrast = Contrast(model)
    for method in (
        LayerScoreCAM(contrast, model.relu2, score_fn="identity"),
        LayerFusionCAM(contrast, model.relu2, score_fn="identity"),
    ):
        both = method.attribute(x, [0, 3], additional_forward_args=others)
        for i, target in enumerate([0, 3]):
            alone = method.attribute(x[i : i + 1], target, additional_forward_args=others[i : i + 1])
            same(both[i : i + 1], alone)


def test_similar_classes() -> None:
    logits = images(4, 9)
    found = similar_classes(logits, [0, 3, 8, 3], number=4)
    for row, target, classes in zip(logits.tolist(), (0, 3, 8, 3), found.tolist(), strict=True):
        order = sorted((c for c in range(9) if c != target), key=lambda c: abs(row[c] - row[target]))
        assert classes == order[:4]
    assert (similar_classes(logits, 2) == similar_classes(logits, torch.tensor([2] * 4))).all()


def test_errors_of_contrasts() -> None:
    model, x = make(), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"others must be of shape \(2, n\), not \(3, 1\)"):
        Contrast(model)(x, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two classes"):
        Contrast(make(outputs=1))(x)
    with pytest.raises(ValueError, match="number must be from 1 to 4, not 5"):
        similar_classes(model(x), 0, number=5)


# --------------------------------------------------------------------------------------------------------------- region


class Dense(nn.Module):
    """Classifies every position on its own."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        convolution = getattr(nn, f"Conv{dims}d")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features, self.relu, self.head = convolution(3, 8, 1), nn.ReLU(), convolution(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.features(x)))


@pytest.mark.parametrize("size", [(6,), (6, 5), (3, 4, 5)])
def test_region_score(size: tuple[int, ...]) -> None:
    model, x = Dense(len(size)).eval(), images(2, 3, *size)
    region = images(2, *size) > 0
    for probabilities in (False, True):
        dense = model(x).softmax(1) if probabilities else model(x)
        expected = torch.stack([dense[i, :, region[i]].mean(1) for i in range(2)])
        same(RegionScore(model, probabilities)(x, region), expected)
    same(RegionScore(model)(x), model(x).flatten(2).mean(2))


def test_the_map_of_a_region_is_inside_it() -> None:
    model, x = Dense().eval(), images(2, 3, 6, 6)
    regions = torch.zeros(2, 6, 6, dtype=torch.bool)
    regions[0, :2], regions[1, 3:, 4:] = True, True
    found = LayerHiResCAM(RegionScore(model), model.relu).attribute(x, [0, 2], additional_forward_args=regions)
    assert (found[:, 0][~regions] == 0).all()
    assert found[0].abs().amax() > 0
    fused = LayerFusionCAM(RegionScore(model), model.relu, score_fn="identity")
    both = fused.attribute(x, 1, additional_forward_args=regions)
    same(both[1:], fused.attribute(x[1:], 1, additional_forward_args=regions[1:]))


def test_predicted_region() -> None:
    output = torch.tensor([[[[3.0, 0.0]], [[1.0, 2.0]], [[0.0, 1.0]]]]).repeat(2, 1, 1, 1)
    assert predicted_region(output, [0, 1]).tolist() == [[[True, False]], [[False, True]]]
    with pytest.raises(ValueError, match="class 2 is predicted nowhere in example 0"):
        predicted_region(output, 2)


def test_errors_of_regions() -> None:
    model, x = Dense().eval(), images(2, 3, 4, 4)
    with pytest.raises(ValueError, match="region is empty"):
        RegionScore(model)(x, torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"region must be of shape \(2, 4, 4\), not \(2, 1, 4, 4\)"):
        RegionScore(model)(x, torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="not a tensor of shape"):
        RegionScore(make())(images(1, 3, 8, 8))


# ------------------------------------------------------------------------------------------------------------------ box


class Bright(nn.Module):
    """Detects two objects at fixed places; their scores are the brightness there. The second has two boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, pictures: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 4.0, 8.0, 8.0], [4.0, 4.0, 8.0, 6.0]])
        found = []
        for picture in self.layer(torch.stack(pictures)):
            one, two = picture[:, :4, :4].mean(), picture[:, 4:, 4:].mean()
            found.append({"boxes": boxes, "labels": torch.tensor([1, 2, 2]), "scores": torch.stack([one, two, one])})
        return found


def test_box_score_is_the_best_overlap_times_score() -> None:
    x = torch.zeros(2, 3, 8, 8)
    x[:, :, :4, :4], x[:, :, 4:, 4:] = 0.5, 0.8
    boxes = torch.tensor([[4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 4.0, 8.0]])
    same(BoxScore(Bright(), classes=4)(x, boxes), torch.tensor([[0.0, 0, 0.8, 0], [0, 0.25, 0, 0]]))


def test_maps_of_a_box_are_at_the_object() -> None:
    model, x = Bright().eval(), 0.5 + 0.5 * images(2, 3, 8, 8).sigmoid()
    score, boxes = BoxScore(model, classes=4), torch.tensor([[4.0, 4.0, 8.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
    gradients = LayerHiResCAM(score, model.layer).attribute(x, [2, 1], additional_forward_args=boxes)
    assert (gradients[0, 0, :4] == 0).all()
    assert (gradients[0, 0, 4:, 4:] > 0).all()
    assert (gradients[1, 0, :4, :4] > 0).all()
    d_rise = RISE(score, n_masks=300, grid_size=2, score_fn="identity")
    maps = d_rise.attribute(x, [2, 1], additional_forward_args=boxes)[:, 0]
    assert maps[0, 4:, 4:].mean() > 1.05 * maps[0, :4, :4].mean()
    assert maps[1, :4, :4].mean() > 1.05 * maps[1, 4:, 4:].mean()


def test_a_detector_of_torchvision() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0, topk_candidates=20
        ).eval()
    x = images(1, 3, 64, 64).sigmoid()
    with torch.no_grad():
        [found] = detector(list(x))
    best = int(found["scores"].argmax())
    box, label = found["boxes"][best : best + 1], int(found["labels"][best])
    score = BoxScore(detector, classes=4)
    same(score(x, box)[:, label], found["scores"][best : best + 1])
    layer = detector.backbone.features[0][-1]
    attribution = LayerGradCam(score, layer).attribute(x, label, additional_forward_args=box)
    assert attribution.abs().amax() > 0


def test_raw_heads_by_a_function() -> None:
    class Raw(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            boxes = torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.5, 0.75, 1.0, 0.5]]]).expand(len(x), 2, 4)
            return {"pred_boxes": boxes, "logits": torch.stack([x.mean((2, 3)), x[..., 0, 0]], 1)}

    x = images(2, 3, 8, 16)
    detections = functools.partial(detr_detections, size=(8, 16))
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0], [0.0, 4.0, 16.0, 8.0]])
    found = BoxScore(Raw(), classes=2, detections=detections)(x, boxes)
    expected = torch.stack([x[0].mean((1, 2)).softmax(0)[:2], x[1, :, 0, 0].softmax(0)[:2]])
    same(found, expected)  # the boxes do not overlap, so each example has one query


def test_detr_of_huggingface() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5, "num_labels": 4}
    sizes |= {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)
        model = transformers.DetrForObjectDetection(config).eval()
    x, score = images(1, 3, 64, 96), BoxScore(model, 4, functools.partial(detr_detections, size=(64, 96)))
    with torch.no_grad():
        output = model(x)
        box = detected_boxes(score.detections(output), 2)
    best = output.logits.softmax(2)[0, :, 2].amax()
    assert score(x, box)[0, 2] >= best - 1e-6, "the best query's own box"
    layer = next(module for name, module in model.named_modules() if name.endswith("encoder.stages.3"))
    attribution = LayerGradCam(score, layer).attribute(x, 2, additional_forward_args=box)
    assert attribution.shape == (1, 1, 2, 3)
    assert attribution.abs().amax() > 0


def test_detected_boxes() -> None:
    x = torch.zeros(2, 3, 8, 8)
    x[:, :, 4:, 4:] = 0.8
    found = Bright()(list(x))
    same(detected_boxes(found, [1, 2]), torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8]]))
    with pytest.raises(ValueError, match="target: class 3 is not detected in example 1"):
        detected_boxes(found, [1, 3])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    with pytest.raises(ValueError, match="target: class 1 is not detected in example 0"):
        detected_boxes([nothing], 1)
    with pytest.raises(ValueError, match="target must be one class or 2, one for each example, not 3"):
        detected_boxes(found, [1, 1, 1])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0.0, 0, 4, 4]] * 2, r"boxes must be of shape \(1, 4\)"),
        ([[4.0, 0, 4, 4]], "x0 < x1"),
        ([[9.0, 0, 12, 4]], "overlap the image of 8 x 8 pixels"),
    ],
)
def test_bad_boxes(boxes: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoxScore(Bright(), classes=4)(torch.ones(1, 3, 8, 8), torch.tensor(boxes))


def test_a_box_may_reach_into_the_first_or_last_pixel_only() -> None:
    score = BoxScore(Bright(), classes=4)
    for box in ([-3.0, -3, 1, 1], [-3, -3, 0.5, 0.5], [7, 7, 12, 12], [7.5, 7.5, 12, 12]):
        assert score(torch.ones(1, 3, 8, 8), torch.tensor([box])).isfinite().all()
    for box in ([-3.0, 0, 0, 4], [0, -3, 4, 0], [8, 0, 9, 4], [0, 8, 4, 9]):
        with pytest.raises(ValueError, match="overlap the image"):
            score(torch.ones(1, 3, 8, 8), torch.tensor([box]))


def test_labels_beyond_the_classes() -> None:
    with pytest.raises(ValueError, match="labels go up to 2, and classes is 2"):
        BoxScore(Bright(), classes=2)(torch.ones(1, 3, 8, 8), torch.tensor([[0.0, 0, 4, 4]]))


# ----------------------------------------------------------------------------------------------------------- similarity


def test_similarity() -> None:
    model, x, references = make(), images(2, 3, 8, 8), images(3, 5)
    embeddings = model(x).detach().numpy()
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in references.numpy()] for a in embeddings]
    expected = torch.tensor(np.array(cosines), dtype=torch.float32)
    same(Similarity(model, references)(x), expected)
    same(Similarity(model, 7 * references, scale=20)(x), 20 * expected)
    assert (Similarity(model, references).score_fn, Similarity(model, references, 20).score_fn) == (
        "identity",
        "softmax",
    )


def test_maps_of_a_similarity() -> None:
    model, x = make(), images(2, 3, 8, 8)
    score = Similarity(model, model(x).detach(), scale=10)
    method = LayerFusionCAM(score, model.relu2, score_fn=score.score_fn)
    both = method.attribute(x, [0, 1])
    same(both[1:], method.attribute(x[1:], 1))


def test_prompts_of_clip() -> None:
    """The page on targets, with a small network: the scores are CLIP's own."""
    transformers = pytest.importorskip("transformers")
    [code] = [block for block in blocks("targets.md") if "transformers" in block]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 100, "eos_token_id": 99},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = transformers.CLIPModel(config).eval()
    tokens = torch.tensor([[1, 5, 99], [1, 7, 99]])
    prompts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": images(1, 3, 32, 32)}
    fakes = SimpleNamespace(
        CLIPModel=SimpleNamespace(from_pretrained=lambda name: clip),
        CLIPProcessor=SimpleNamespace(from_pretrained=lambda name: lambda **options: prompts),
    )
    names: dict[str, Any] = {
        "torch": torch,
        "Similarity": Similarity,
        "LayerFusionCAM": LayerFusionCAM,
        "picture": None,
    }
    with mock.patch.dict(sys.modules, {"transformers": fakes}):
        exec(compile(code, "targets.md", "exec"), names)
    same(names["similarity"](prompts["pixel_values"]), clip(**prompts).logits_per_image)
    assert names["attribution"].shape == (1, 1, 32, 32)
    assert names["attribution"].amax() == 1


def test_errors_of_similarities() -> None:
    with pytest.raises(ValueError, match="none of length 0"):
        Similarity(make(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"embeddings \(N, 7\) like the references, not a tensor of shape \(1, 5\)"):
        Similarity(make(), torch.ones(2, 7))(images(1, 3, 8, 8))


# ----------------------------------------------------------------------------------------------------------- as modules


@pytest.mark.parametrize(
    "wrap",
    [
        Contrast,
        RegionScore,
        lambda m: Output(m, 0),
        lambda m: BoxScore(m, 3),
        lambda m: Similarity(m, torch.ones(1, 5)),
    ],
)
def test_targets_are_modules(wrap: Any) -> None:
    model = Net()
    score = wrap(model)
    assert score.model.relu2 is model.relu2
    assert dict(score.named_modules())["model.relu2"] is model.relu2
    score.eval()
    assert not model.training
    restored = pickle.loads(pickle.dumps(score))
    same(restored.model.head.weight, model.head.weight)
    assert restored.score_fn == score.score_fn


# ------------------------------------------------------------------------------------------------ other kinds of labels


class Halves(nn.Module):
    """One logit for each half of a picture; all pass through the layer ``split``, with a channel for each half."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
        channels = self.split(torch.cat([x * left, x * ~left], 1))
        return 20 * channels.mean((2, 3)) - 4


@pytest.mark.parametrize("method", [LayerScoreCAM, LayerFusionCAM, LayerHiResCAM])
def test_labels_and_thresholds_of_a_scale(method: Any) -> None:
    """Each label, or threshold of an ordinal scale, is explained by its own half."""
    model, x = Halves().eval(), images(1, 1, 8, 8).abs()
    options = {} if method is LayerHiResCAM else {"score_fn": "sigmoid"}
    for target, half in enumerate((slice(0, 4), slice(4, 8))):
        found = method(model, model.split, **options).attribute(x, target).relu()
        assert float(found[..., half].sum() / found.sum()) > 0.9


def test_one_logit_is_two_classes() -> None:
    model, x = make(Net, outputs=1), images(2, 3, 8, 8)

    class TwoClasses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logit = self.model(x)
            return torch.cat([torch.zeros_like(logit), logit], 1)

    for make_method in (LayerFusionCAM, LayerFusionCAM.best):
        found = make_method(model, model.relu2, score_fn="sigmoid").attribute(x, 0)
        same(found, make_method(TwoClasses().eval(), model.relu2).attribute(x, 1), 1e-4)


def test_the_expected_grade_is_a_score_without_a_target() -> None:
    """By hand: the gradient of a sum of sigmoids."""
    thresholds, x = Halves().eval(), images(1, 1, 8, 8).abs()

    class ExpectedGrade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thresholds = thresholds

        def forward(self, x: Tensor) -> Tensor:
            return self.thresholds(x).sigmoid().sum(1)

    found = LayerHiResCAM(ExpectedGrade().eval(), thresholds.split).attribute(x)
    probability = thresholds(x).sigmoid()[0]
    slopes = 20 / 64 * probability * (1 - probability)
    left = torch.arange(8) < 4
    same(found, torch.where(left, slopes[0] * x, slopes[1] * x))
