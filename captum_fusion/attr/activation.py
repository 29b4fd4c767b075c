"""Activation methods: maps made of a layer's activations, without gradients or with a few masked rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_fusion import functional as formulas
from captum_fusion._captum import Call, Layer, LayerEvaluation, Reshape, Target, log_usage
from captum_fusion.attr._base import CAM, MaskedCAM, choice, count, documented, scoring
from captum_fusion.attr.region import BackgroundCAM, pairs, table
from captum_fusion.functional import ScoreFn


class ActivationCAM(CAM):
    """Base of the methods that need one forward pass and no gradients: a subclass writes :meth:`_map`."""

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """Explain a batch.

        Args:
            {shared_args}

        Returns:
            {layer_returns}

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> from captum_fusion import LayerEigenCAM
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> LayerEigenCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8)).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(self._maps, inputs, target, additional_forward_args, attribute_to_layer_input)
        return self._result(maps)

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [tuple(self._map(call, a).to(a.dtype) for a in each.activations) for each in evaluations]

    def _map(self, call: Call, activations: Tensor) -> Tensor:
        raise NotImplementedError


class LayerLinearCAM(ActivationCAM):
    r"""CAM, the original: channels weighted by the classifier's weights, for networks made for it.

    The map is ``sum_k W[c, k] A^k``, signed (the paper has no ReLU), in the layer's space, not normalised. It exists
    only where the output is one linear layer on the layer's global average, ``W GAP(A) + b``, as in ResNet,
    MobileNetV2, EfficientNet, GoogLeNet and Inception, or one 1 x 1 convolution whose maps are averaged. This is
    checked on the very inputs; other networks are refused. The mean of the map is the score less its bias.
    Cost: one forward row for each example.

    More details in the paper: B. Zhou, A. Khosla, A. Lapedriza, A. Oliva, A. Torralba, "Learning Deep Features for
    Discriminative Localization", CVPR 2016, https://arxiv.org/abs/1512.04150

    Examples::

        >>> from captum_fusion import LayerLinearCAM
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
        >>> LayerLinearCAM(net, net[0]).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
        torch.Size([2, 1, 6, 6])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        classifier: nn.Module | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the classifier.

        Args:
            {constructor_args}
            classifier (Module, optional): The linear layer or 1 x 1 convolution that makes the output of the layer's
                average.
                Default: None (found among the modules of ``forward_func``, which must then be one)
            {reshape_arg}
        """
        ActivationCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        if classifier is not None and not _is_linear(classifier):
            raise TypeError(f"classifier must be a linear layer or a 1 x 1 convolution, not {classifier!r:.80}")
        if classifier is None and not isinstance(forward_func, nn.Module):
            raise ValueError("classifier must be given where forward_func is not a module whose layers can be searched")
        self.classifier = classifier

    def _map(self, call: Call, activations: Tensor) -> Tensor:
        output = call.output.reshape(len(call.output), -1)
        if call.output.dim() > 2:
            raise ValueError(f"layer: CAM needs an output of shape (N, classes), not {tuple(call.output.shape)}")
        full = {activations.dtype, output.dtype} <= {torch.float32, torch.float64}
        weight = self._weight(activations, formulas.precise(output), 1e-3 if full else 3e-2)
        number = torch.arange(len(weight), device=output.device).expand(output.shape)
        chosen = call.select(number.reshape(call.output.shape))
        weight = weight.to(activations.device)
        return (weight[chosen.to(weight.device)].unsqueeze(1) @ formulas.precise(activations).flatten(2)).reshape(
            len(activations), 1, *activations.shape[2:]
        )

    def _weight(self, activations: Tensor, output: Tensor, tolerance: float) -> Tensor:
        """The matrix (classes, K) of a classifier that makes just this output of the activations' means."""
        means = formulas.precise(activations).flatten(2).mean(2)
        root = self.forward_func
        modules: list[Any] = list(getattr(root, "modules", list)()) if self.classifier is None else [self.classifier]
        shape, near = (output.shape[1], means.shape[1]), []
        for module in modules:
            if not _is_linear(module) or module.weight.shape[:2] != shape:
                continue
            weight = formulas.precise(module.weight.detach()).reshape(shape)
            found = means.to(weight.device) @ weight.T
            found = found if module.bias is None else found + formulas.precise(module.bias.detach())
            differs = (found - output.to(found)).abs().amax(1)
            if (differs <= tolerance * output.abs().amax(1).clamp(min=1e-6).to(found)).all():
                return weight
            near.append(type(module).__name__)
        why = (
            f"its {near[0]} of that size does not give the output when it is put on the mean of the layer's activations"
            if near
            else f"there is no linear layer from the layer's {shape[1]} channels to the {shape[0]} outputs"
        )
        raise ValueError(
            "layer: CAM needs a network that ends in global average pooling of this layer and one linear layer, and "
            f"{why}; choose the last layer before the pooling, or LayerGradCam, which is the same map where CAM exists"
        )


def _is_linear(module: Any) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and all(n == 1 for n in module.kernel_size)
    return isinstance(module, nn.Linear)


class LayerEigenCAM(ActivationCAM):
    r"""Eigen-CAM: the direction in which a layer's activations are strongest, whatever the class.

    With the activations as a matrix of positions by channels, ``A = U S V^T``, the map is ``A v_1``, signed, in the
    layer's space, not normalised. Its sign, which the decomposition leaves open, is chosen so that its sum is
    positive. The map is the same for every target; none need be given.
    Cost: one forward row for each example.

    More details in the paper: M. B. Muhammad, M. Yeasin, "Eigen-CAM: Class Activation Map using Principal Components",
    IJCNN 2020, https://arxiv.org/abs/2008.00299

    Examples::

        >>> from captum_fusion import LayerEigenCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> LayerEigenCAM(model, model.stage4).attribute(demo.preprocess(scene.image)).shape
        torch.Size([1, 1, 12, 12])
    """

    needs_target = False

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        center: bool = False,
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the variant.

        Args:
            {constructor_args}
            center (bool, optional): Subtract each channel's mean first, as pytorch-grad-cam does.
                Default: False
            {reshape_arg}
        """
        ActivationCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.center = center

    def _map(self, call: Call, activations: Tensor) -> Tensor:
        return formulas.principal_component(activations, self.center)


class LayerDecomCAM(BackgroundCAM):
    r"""DecomCAM: the strongest channels of a class, decomposed into a few independent maps, weighted by their scores.

    Of the ``channels`` channels with the largest mean gradient ``a_k`` the maps ``a_k A^k`` are decomposed by a
    principal component analysis of the positions. The positive part of each of the first ``components`` masks the
    input, ``max(x m, blur(x) (1 - m))``, and weighs the score that it leaves (scores below 0.001 count as 0), divided
    by the largest. The map is the weighted sum, in the layer's space, not normalised. A component's sign, which the
    decomposition leaves open, is chosen so that its largest value by magnitude is positive. Scores are raw by default:
    where no component leaves a positive one, the map is all zero.

    ``weighting="softmax"``, with ``channels=100``, is the earlier Decom-CAM (Y. Yang et al., 2023) as its published
    code has it: with ``s`` the score of a component's masked input minus that of the blurred input, it weighs
    ``s softmax(s)``, and the sum is followed by a ReLU.

    Cost for each example: one forward and backward row and one masked row for each component (and one of the blurred
    input for ``"softmax"``).

    More details in the paper: Y. Yang et al., "DecomCAM: Advancing Beyond Saliency Maps through Decomposition and
    Integration", 2024, https://arxiv.org/abs/2405.18882

    Examples::

        >>> from captum_fusion import LayerDecomCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> LayerDecomCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        channels: int = 500,
        components: int = 10,
        weighting: str = "scaled",
        center: bool = True,
        background: str = "blur",
        score_fn: str | ScoreFn = "identity",
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the decomposition.

        Args:
            {constructor_args}
            channels (int, optional): How many channels are decomposed; no more than there are.
                Default: 500
            components (int, optional): Into how many maps; no more than there are channels or positions.
                Default: 10
            weighting (str, optional): ``"scaled"`` scores, or the ``"softmax"`` of differences to the blurred input.
                Default: ``"scaled"``
            center (bool, optional): Subtract each channel's mean first, as the authors' code does and the singular
                value decomposition of the paper does not.
                Default: True
            background (str, optional): What shows where a mask is 0: ``"blur"``, the input under a Gaussian of
                standard deviation 10, or ``"baseline"``, which is ``attribute``'s ``baselines``.
                Default: ``"blur"``
            {score_fn}
                Default: ``"identity"``
            {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.channels, self.components = count("channels", channels), count("components", components)
        self.weighting = choice("weighting", weighting, ("scaled", "softmax"))
        self.center = center
        self._set_background(background)
        self.score_fn = scoring(score_fn)

    _blur = (81, 10.0)

    @property
    def uses_gradients(self) -> bool:
        """True: the channels are chosen by their mean gradients."""
        return True

    def _map(self, call: Call, activations: Tensor, gradients: Tensor | None) -> Tensor:
        assert gradients is not None
        weights = formulas.at_least_float32(gradients).flatten(2).mean(2)
        best = weights.topk(min(self.channels, weights.shape[1]), dim=1).indices
        shape = (*best.shape, *[1] * (activations.dim() - 2))
        examples = torch.arange(len(best), device=best.device)[:, None]
        weighted = weights.gather(1, best).reshape(shape) * activations[examples, best]
        maps = formulas.principal_components(weighted, self.components, self.center).relu()
        live = formulas.live_channels(maps)
        rows, components = pairs(live)

        def masks(some: slice, size: Sequence[int]) -> Tensor:
            picked = maps[rows[some], components[some]].unsqueeze(1)
            return formulas.normalize(formulas.upsample(picked, size, smooth=True).relu())

        def brighter(x: Tensor, base: float | Tensor, mask: Tensor, some: slice) -> Tensor:
            return torch.maximum(x * mask, base * (1 - mask))

        score_fn = formulas.score_function(self.score_fn)
        found = call.masked_scores(masks, rows, score_fn, brighter)
        scores = table(live, rows, components, found)
        if self.weighting == "softmax":
            scores = scores - call.baseline_scores(score_fn).to(scores.device)[:, None]
            return formulas.weighted_activations(maps, scores * formulas.softmax_weights(scores, live))
        scores = torch.where(scores < 1e-3, 0.0, scores)
        largest = scores.amax(1, keepdim=True)
        return formulas.weighted_activations(maps, torch.where(largest > 0, scores / largest.clamp(min=1e-3), 0.0))
