"""Forward functions for questions other than "why this class?".

Captum explains a forward function that returns a score. Each class here wraps a network and returns a score for one
kind of question. It is a module, so that its layers can be named as usual, and takes its per-example arguments as
``additional_forward_args``. Every attribution of this package and of captum works with it.

========================  ===========================================================  =============================
class                     question                                                     output
========================  ===========================================================  =============================
:class:`Output`           about one of several outputs (``.logits``, ``"out"``)        that output
:class:`Contrast`         why this class rather than others?                           (N, classes)
:class:`RegionScore`      why this class in this region (segmentation)?                (N, classes)
:class:`BoxScore`         why this class in this box (detection)?                      (N, classes)
:class:`Similarity`       why similar to these references or prompts (CLIP)?           (N, references)
========================  ===========================================================  =============================

The attribute ``score_fn`` of each is the value to pass as ``score_fn`` to methods and metrics. Gradient methods without
that option use the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import functional as formulas

__all__ = [
    "BoxScore",
    "Contrast",
    "Output",
    "RegionScore",
    "Similarity",
    "detected_boxes",
    "detr_detections",
    "predicted_region",
    "similar_classes",
]

#: One detection result of torchvision: boxes (D, 4), labels (D,) and scores (D,).
Detections = Mapping[str, Tensor]


class Output(nn.Module):
    """A network with one of its outputs picked.

    Args:
        model (Module): Network that returns a tuple, a dict or an object, possibly nested.
        path (str, int or sequence of these): Where the output is: an attribute or key, an index, or a sequence of them.

    Raises:
        TypeError: In the call, if there is no such output or it is no tensor. The message lists what there is.

    Examples::

        >>> class Segmenter(nn.Module):
        ...     def forward(self, x):
        ...         return {"out": x.mean((2, 3)), "aux": None}
        >>> Output(Segmenter(), "out")(torch.ones(2, 5, 4, 4)).shape
        torch.Size([2, 5])
    """

    score_fn = "softmax"

    def __init__(self, model: nn.Module, path: str | int | Sequence[str | int]) -> None:
        super().__init__()
        self.model = model
        self.path: tuple[str | int, ...] = (path,) if isinstance(path, (str, int)) else tuple(path)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The picked output; arguments are the network's."""
        found = self.model(*inputs, **options)
        for step in self.path:
            try:
                by_key = isinstance(step, int) or isinstance(found, Mapping)
                found = found[step] if by_key else getattr(found, str(step))
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise TypeError(f"path: the output has no {step!r}; it is {_outline(found)}") from error
        if not isinstance(found, Tensor):
            raise TypeError(f"path: the output at {self.path} must be a tensor, not {_outline(found)}")
        return found


class Contrast(nn.Module):
    """Why one class rather than others: ``y_c - gamma * mean(y of the others)``.

    With ``others`` the mean is over these classes, which must be the same for all perturbed copies of an example;
    :func:`similar_classes` finds the most similar ones. Without, it is over all other classes. From the paper:
    Z. Zhang et al., "Finer-CAM: Spotting the Difference Reveals Finer Details for Visual Explanation", CVPR 2025,
    https://arxiv.org/abs/2501.11309

    Args:
        model (Module): Network that returns logits (N, classes) with at least two classes.
        gamma (float, optional): Strength of the contrast. 0 gives the logits. Default: 1.0

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> inputs, (target, other) = digits.preprocess(scene.image), scene.labels
        >>> contrast = Contrast(model)
        >>> grad_cam = LayerGradCam(contrast, model.stage4)
        >>> grad_cam.attribute(inputs, target, additional_forward_args=torch.tensor([[other]])).shape
        torch.Size([1, 1, 12, 12])
    """

    score_fn = "identity"

    def __init__(self, model: nn.Module, gamma: float = 1.0) -> None:
        super().__init__()
        self.model, self.gamma = model, float(gamma)

    def forward(self, inputs: Tensor, others: Tensor | None = None) -> Tensor:
        """Contrasts of all classes.

        Args:
            inputs (Tensor): The network's input.
            others (Tensor, optional): Classes to contrast with, int64, (N, n). Default: None (all other classes)

        Returns:
            Tensor: Of shape (N, classes).

        Raises:
            ValueError: If the network's output or ``others`` has another shape.
        """
        logits = self.model(inputs)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"model must return (N, classes) with at least two classes, not {tuple(logits.shape)}")
        if others is None:
            rest = (logits.sum(1, keepdim=True) - logits) / (logits.shape[1] - 1)
        elif others.dim() != 2 or others.shape[0] != logits.shape[0]:
            raise ValueError(f"others must be of shape ({logits.shape[0]}, n), not {tuple(others.shape)}")
        else:
            rest = logits.gather(1, others.to(logits.device)).mean(1, keepdim=True)
        contrast: Tensor = logits - self.gamma * rest
        return contrast


def similar_classes(logits: Tensor, target: Tensor | Sequence[int] | int, number: int = 3) -> Tensor:
    """The classes whose logits are closest to the target's, as in Finer-CAM.

    Args:
        logits (Tensor): Of the original inputs, (N, classes).
        target (int, sequence of int or Tensor): Target of each example.
        number (int, optional): Number of classes, less than ``classes``. Default: 3

    Returns:
        Tensor: int64, (N, number), the closest first.

    Raises:
        ValueError: If there are not as many other classes.

    Examples::

        >>> similar_classes(torch.tensor([[5.0, 1.0, 4.0, 9.0]]), 0, number=2)
        tensor([[2, 1]])
    """
    if not 0 < number < logits.shape[1]:
        raise ValueError(f"number must be from 1 to {logits.shape[1] - 1}, not {number!r}")
    targets = torch.as_tensor(target, device=logits.device).expand(logits.shape[0])[:, None]
    distance = (logits - logits.gather(1, targets)).abs()
    distance = distance.scatter(1, targets, torch.inf)
    return distance.argsort(dim=1, stable=True)[:, :number]


class RegionScore(nn.Module):
    """Why a class in a region: the mean of its scores over the region, for dense outputs such as segmentations.

    Args:
        model (Module): Network that returns ``(N, classes, *spatial)``; :class:`Output` picks it from a dict.
        probabilities (bool, optional): Apply a softmax over the classes at each position before the mean.
            Default: False

    Examples::

        >>> from captum_fusion import LayerScoreCAM
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> image = torch.rand(1, 3, 16, 16)
        >>> target = int(network(image)[0, :, 0, 0].argmax())
        >>> region = predicted_region(network(image), target)
        >>> score = RegionScore(network)
        >>> method = LayerScoreCAM(score, network[1], score_fn=score.score_fn)
        >>> method.attribute(image, target, additional_forward_args=region).shape
        torch.Size([1, 1, 16, 16])
    """

    score_fn = "identity"

    def __init__(self, model: nn.Module, probabilities: bool = False) -> None:
        super().__init__()
        self.model, self.probabilities = model, probabilities

    def forward(self, inputs: Tensor, region: Tensor | None = None) -> Tensor:
        """Mean scores of all classes.

        Args:
            inputs (Tensor): The network's input.
            region (Tensor, optional): Mask or weights of each example's positions, ``(N, *spatial of the output)``.
                Default: None (all positions)

        Returns:
            Tensor: Of shape (N, classes).

        Raises:
            ValueError: If the output is not dense, the region's shape does not fit, or it is empty.
        """
        scores = self.model(inputs)
        if not isinstance(scores, Tensor) or scores.dim() < 3:
            raise ValueError(f"model must return (N, classes, *spatial), not {_outline(scores)}")
        if self.probabilities:
            scores = scores.softmax(1)
        flat = formulas.at_least_float32(scores.flatten(2))
        if region is None:
            return flat.mean(2).to(scores.dtype)
        if region.shape != (scores.shape[0], *scores.shape[2:]):
            expected = (scores.shape[0], *scores.shape[2:])
            raise ValueError(f"region must be of shape {expected}, not {tuple(region.shape)}")
        weights = region.to(flat).flatten(1)
        if not (weights.sum(1) > 0).all():
            raise ValueError("region is empty for at least one example")
        return ((flat * weights[:, None]).sum(2) / weights.sum(1, keepdim=True)).to(scores.dtype)


def predicted_region(output: Tensor, target: Tensor | Sequence[int] | int) -> Tensor:
    """The positions where the target is the predicted class.

    Args:
        output (Tensor): Of the original inputs, ``(N, classes, *spatial)``.
        target (int, sequence of int or Tensor): Target of each example.

    Returns:
        Tensor: bool, ``(N, *spatial)``.

    Raises:
        ValueError: If the target is predicted nowhere in an example.

    Examples::

        >>> predicted_region(torch.tensor([[[0.0, 3.0], [1.0, 2.0]]]), 1)
        tensor([[ True, False]])
    """
    targets = torch.as_tensor(target, device=output.device).expand(output.shape[0])
    region: Tensor = output.argmax(1) == targets.reshape(-1, *[1] * (output.dim() - 2))
    for i, some in enumerate(region.flatten(1).any(1).tolist()):
        if not some:
            raise ValueError(f"target: class {int(targets[i])} is predicted nowhere in example {i}")
    return region


class BoxScore(nn.Module):
    """Why a class in a box: the best detection of the class there, ``max over detections of score * IoU``.

    The score of D-RISE for detectors that return one class per detection: V. Petsiuk et al., "Black-box Explanation of
    Object Detectors via Saliency Maps", CVPR 2021, https://arxiv.org/abs/2006.03204. :class:`captum_fusion.RISE` with
    this forward function, ``n_masks=5000`` and ``grid_size=16`` is D-RISE. Detectors of torchvision work as they are
    (Faster R-CNN, RetinaNet, FCOS, SSD). Their detections are differentiable, so that gradient methods work as well.
    Build the detector with a low ``box_score_thresh`` (or ``score_thresh``): a masked object has a low score, and
    detections below the threshold count as 0.

    Args:
        model (Module): Detector in evaluation mode.
        classes (int): Number of classes, including the background class if the labels do.
        detections (callable, optional): Function that turns the network's output into a list with one mapping for each
            example, of boxes (D, 4) as x0, y0, x1, y1 in pixels, labels (D,) and scores (D,).
            Default: None (the output is that list, and the network takes a list of images, as in torchvision)

    Examples::

        >>> class Detector(nn.Module):
        ...     def forward(self, images):
        ...         box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        ...         return [{"boxes": box, "labels": torch.tensor([1]), "scores": x.mean()[None]} for x in images]
        >>> BoxScore(Detector(), classes=3)(torch.ones(1, 3, 4, 4), torch.tensor([[0.0, 0.0, 2.0, 4.0]]))
        tensor([[0.0000, 0.5000, 0.0000]])
    """

    score_fn = "identity"

    def __init__(
        self, model: nn.Module, classes: int, detections: Callable[[Any], Sequence[Detections]] | None = None
    ) -> None:
        super().__init__()
        self.model, self.classes, self.detections = model, int(classes), detections

    def forward(self, inputs: Tensor, boxes: Tensor) -> Tensor:
        """Scores of all classes at one box for each example.

        Args:
            inputs (Tensor): Images, (N, channels, H, W).
            boxes (Tensor): A box for each example, x0, y0, x1, y1 in pixels, (N, 4).

        Returns:
            Tensor: Of shape (N, classes); 0 for classes without a detection that overlaps the box.

        Raises:
            ValueError: If a box has another shape, is empty or lies outside the image, or a label is no class.
        """
        _check_boxes(boxes, inputs)
        found = self.model(list(inputs)) if self.detections is None else self.detections(self.model(inputs))
        if len(found) != len(inputs):
            raise ValueError(f"model must return detections for {len(inputs)} examples, not {len(found)}")
        return torch.stack([self._scores(one, box) for one, box in zip(found, boxes, strict=True)])

    def _scores(self, found: Detections, box: Tensor) -> Tensor:
        from torchvision.ops import box_iou  # torchvision is needed only here

        labels, scores = found["labels"], found["scores"]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"classes: labels go up to {int(labels.max())}, and classes is {self.classes}")
        overlap = scores * box_iou(found["boxes"], box.to(found["boxes"])[None])[:, 0]
        nothing: Tensor = overlap.new_zeros(self.classes)
        return nothing.scatter_reduce(0, labels.long(), overlap, "amax", include_self=True)


def detected_boxes(found: Sequence[Detections], target: Tensor | Sequence[int] | int) -> Tensor:
    """The box of the target's best detection, for each example.

    Args:
        found (sequence of mappings): Detections of the original inputs, one mapping for each example.
        target (int, sequence of int or Tensor): Target of each example.

    Returns:
        Tensor: x0, y0, x1, y1 in pixels, (N, 4), detached.

    Raises:
        ValueError: If the target is not detected in an example, or there are not as many targets as examples.

    Examples::

        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 4.0, 4.0]])
        >>> found = {"boxes": boxes, "labels": torch.tensor([3, 3]), "scores": torch.tensor([0.2, 0.9])}
        >>> detected_boxes([found], 3)
        tensor([[1., 1., 4., 4.]])
    """
    targets = torch.as_tensor(target).flatten()
    if len(targets) not in (1, len(found)):
        raise ValueError(f"target must be one class or {len(found)}, one for each example, not {len(targets)}")
    best = []
    for i, (one, wanted) in enumerate(zip(found, targets.expand(len(found)).tolist(), strict=True)):
        scores = one["scores"].masked_fill(one["labels"] != wanted, -torch.inf)
        if not scores.numel() or not scores.amax() > -torch.inf:
            raise ValueError(f"target: class {wanted} is not detected in example {i}")
        best.append(one["boxes"][scores.argmax()].detach())
    return torch.stack(best)


def detr_detections(output: Any, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """The detections of DETR and its relatives, as :class:`BoxScore` needs them.

    ``BoxScore(model, classes, functools.partial(detr_detections, size=(height, width)))`` explains HuggingFace's
    ``DetrForObjectDetection``. Every query counts as one detection of each class.

    Args:
        output (mapping): ``"logits"``, (N, queries, classes + 1) with "no object" last, and ``"pred_boxes"``,
            (N, queries, 4), centre and size as shares of the image.
        size (tuple of int): Height and width of the images, in pixels.

    Returns:
        list[dict[str, Tensor]]: Boxes, labels and scores of each example.

    Examples::

        >>> output = {"logits": torch.zeros(1, 1, 2), "pred_boxes": torch.tensor([[[0.5, 0.5, 1.0, 0.5]]])}
        >>> detr_detections(output, size=(8, 4))
        [{'boxes': tensor([[0., 2., 4., 6.]]), 'labels': tensor([0]), 'scores': tensor([0.5000])}]
    """
    height, width = size
    centre, extent = output["pred_boxes"].split(2, dim=2)
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 2)
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    scores = output["logits"].softmax(2)[..., :-1]
    queries, classes = scores.shape[1:]
    labels = torch.arange(classes, device=scores.device).repeat(queries)
    return [
        {"boxes": b.repeat_interleave(classes, 0), "labels": labels, "scores": s.flatten()}
        for b, s in zip(boxes, scores, strict=True)
    ]


class Similarity(nn.Module):
    """Why similar to a reference: cosines of the network's embedding with reference embeddings.

    The references are embeddings of images, or of prompts by the text encoder of CLIP or SigLIP. The network is the
    image encoder. With the model's ``scale`` and ``score_fn="softmax"``, the scores are probabilities of the prompts.

    Args:
        model (Module): Network that returns embeddings (N, D).
        references (Tensor): Nonzero embeddings, (R, D). They are normalised here.
        scale (float, optional): Factor of the cosines, such as CLIP's ``logit_scale.exp()``. Default: None (1, with
            ``score_fn="identity"``)

    Raises:
        ValueError: If the references' shape does not fit, or one has length 0.

    Examples::

        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).eval()
        >>> image = torch.rand(1, 3, 2, 2)
        >>> Similarity(network, network(image).detach())(image).detach().round(decimals=4)
        tensor([[1.]])
    """

    references: Tensor

    def __init__(self, model: nn.Module, references: Tensor, scale: float | None = None) -> None:
        super().__init__()
        if references.dim() != 2 or not (references.norm(dim=1) > 0).all():
            raise ValueError(f"references must be of shape (R, D), none of length 0, not {tuple(references.shape)}")
        self.model, self.scale = model, 1.0 if scale is None else float(scale)
        self.score_fn = "identity" if scale is None else "softmax"
        self.register_buffer("references", nn.functional.normalize(references.detach(), dim=1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scaled cosines with all references, (N, R).

        Raises:
            ValueError: If the network does not return embeddings of the references' size.
        """
        embeddings = self.model(inputs)
        if (
            not isinstance(embeddings, Tensor)
            or embeddings.dim() != 2
            or embeddings.shape[1] != self.references.shape[1]
        ):
            expected = f"(N, {self.references.shape[1]})"
            raise ValueError(f"model must return embeddings {expected} like the references, not {_outline(embeddings)}")
        exact = nn.functional.normalize(formulas.at_least_float32(embeddings), dim=1)
        return (self.scale * exact @ self.references.to(exact).T).to(embeddings.dtype)


def _check_boxes(boxes: Tensor, images: Tensor) -> None:
    if tuple(boxes.shape) != (len(images), 4):
        raise ValueError(f"boxes must be of shape ({len(images)}, 4), one for each example, not {tuple(boxes.shape)}")
    height, width = images.shape[-2:]
    x0, y0, x1, y1 = boxes.unbind(1)
    if not ((x0 < x1) & (y0 < y1)).all():
        raise ValueError("boxes must be x0, y0, x1, y1 with x0 < x1 and y0 < y1")
    if not ((x1 > 0) & (y1 > 0) & (x0 < width) & (y0 < height)).all():
        raise ValueError(f"boxes must overlap the image of {width} x {height} pixels (x0, y0, x1, y1 in pixels)")


def _outline(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    names = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
    return f"a {type(value).__name__}" + (f" with {', '.join(names[:8])}" if names else "")
