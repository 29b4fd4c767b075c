"""Region methods that replace a layer's activations and run the rest of the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count, share
from captum_fusion._captum import format_result, log_usage
from captum_fusion._passes.layer_pass import LayerEvaluation
from captum_fusion._passes.passes import Passes
from captum_fusion._types import Attributions, Layer, Reshape, Target, TensorOrTupleOfTensors
from captum_fusion.attr._bases import (
    LayerBaselines,
    LayerTensor,
    ReplacedCAM,
    checked_score_fn,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.functional import ScoreFn
from captum_fusion.functional.maps import varies

__all__ = ["LayerAblationCAM", "LayerFDCAM", "LayerReciproCAM", "LayerShapCAM"]


#: The result of :class:`LayerShapCAM` with ``return_standard_error=True``.
_Pair = tuple[TensorOrTupleOfTensors, TensorOrTupleOfTensors]
AttributionsWithErrors = _Pair | list[_Pair]


class LayerAblationCAM(ReplacedCAM):
    r"""Ablation-CAM: channels weighted by the drop in score when they are removed.

    The weights are ``w_k = y - y_k``, where ``y_k`` is the score with channel ``k`` replaced by the baseline, and the
    map is ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised. The paper divides the weights by ``y``. This
    changes only the scale if ``y`` is positive, and inverts the map if ``y`` is negative.
    With ``groups``, the channels of a group are removed together and share a weight.
    Cost per example: one forward sample, and one sample from the layer on for each channel (or group) that differs from
    the baseline.

    More details in the paper: S. Desai, H. G. Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional
    Network via Gradient-free Localization", WACV 2020, https://doi.org/10.1109/WACV45572.2020.9093360

    Examples::

        >>> from captum_fusion import LayerAblationCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerAblationCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "ablation-cam",
        "region",
        "1, K (layer)",
        "Desai and Ramaswamy, WACV 2020",
        "https://doi.org/10.1109/WACV45572.2020.9093360",
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        groups: int | None = None,
        grouping: str = "clusters",
        score_fn: str | ScoreFn = "identity",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        groups (int, optional): Number of groups of channels to remove.
            Default: None (single channels)
        grouping (str, optional): Grouping of channels: ``"clusters"`` of similar maps, or ``"chunks"`` of neighbours.
            Default: ``"clusters"``
        {score_fn}
            Default: ``"identity"``
        {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.groups = None if groups is None else count("groups", groups)
        self.grouping = choice("grouping", grouping, tuple(formulas.GROUPINGS))
        self.score_fn = checked_score_fn(score_fn)

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations, absent, score_fn = tensor.activations, tensor.absent, formulas.score_function(self.score_fn)
        number = min(self.groups or activations.shape[1], activations.shape[1])
        labels = formulas.GROUPINGS["chunks" if self.groups is None else self.grouping](activations, number)
        matters = (activations != absent).flatten(2).any(2)
        if self.groups is not None:
            matters = formulas.members(labels, number, matters).any(2)
        examples, groups = matters.nonzero(as_tuple=True)

        def without(chunk: slice) -> Tensor:
            removed = labels[examples[chunk]] == groups[chunk, None]
            shape = (*removed.shape, *[1] * (activations.dim() - 2))
            return torch.where(removed.reshape(shape), absent[examples[chunk]], activations[examples[chunk]])

        drops = tensor.clean_scores(score_fn)[examples] - tensor.replaced_scores(without, examples, score_fn)
        return formulas.weighted_activations(
            activations, formulas.channel_table(matters, examples, groups, drops).gather(1, labels)
        )


class LayerReciproCAM(ReplacedCAM):
    r"""Recipro-CAM: each position's value is the score when only its activations are kept.

    For each position, the activations of all channels at all other positions are replaced by the baseline. The map
    holds the resulting scores, in the layer's space, not normalised. With ``gaussian=True`` the neighbours are kept as
    well, weighted by a 3 x 3 kernel (``[1 2 1; 2 4 2; 1 2 1] / 16`` in two dimensions), as in OpenVINO's class for
    vision transformers. The authors' code instead spreads the position's own activations over its neighbours. Cost per
    example: one forward sample, and one sample from the layer on for each position.

    For a vision transformer (ViT-ReciproCAM), use the normalisation layer before the last block's attention, a
    ``reshape`` that keeps the class token, ``gaussian=True`` and ``score_fn="identity"``::

        LayerReciproCAM(
            vit, vit.encoder.layers[-1].ln_1, gaussian=True, score_fn="identity", reshape=layers.TokenGrid()
        )

    More details in the papers: S.-Y. Byun, W. Lee, "Recipro-CAM: Fast gradient-free visual explanations for
    convolutional neural networks", 2022, https://arxiv.org/abs/2209.14074; "ViT-ReciproCAM: Gradient and Attention-Free
    Visual Explanations for Vision Transformer", 2023, https://arxiv.org/abs/2310.02588

    Examples::

        >>> from captum_fusion import LayerReciproCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerReciproCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "recipro-cam", "region", "1, Z (layer)", "Byun and Lee, CVPR-W 2024", "https://arxiv.org/abs/2209.14074"
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        gaussian: bool = False,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        gaussian (bool, optional): Whether to keep a position's neighbours as well, weighted by a Gaussian kernel.
            Default: False
        {score_fn}
            Default: ``"softmax"``
        {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.gaussian = gaussian
        self.score_fn = checked_score_fn(score_fn)

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations, absent, score_fn = tensor.activations, tensor.absent, formulas.score_function(self.score_fn)
        size = tuple(activations.shape[2:])
        positions = math.prod(size)
        examples = torch.arange(len(activations), device=activations.device).repeat_interleave(positions)
        where = torch.arange(positions, device=activations.device).repeat(len(activations))
        difference = activations - absent

        def only(chunk: slice) -> Tensor:
            single = F.one_hot(where[chunk], positions).to(activations.dtype).reshape(-1, 1, *size)
            kept = formulas.smooth_neighbours(single) if self.gaussian else single
            return absent[examples[chunk]] + kept * difference[examples[chunk]]

        return tensor.replaced_scores(only, examples, score_fn).reshape(-1, 1, *size)


class LayerFDCAM(ReplacedCAM):
    r"""FD-CAM: channels weighted by their gradients and by the effect of groups of similar channels on the score.

    A channel's group consists of the channels whose cosine similarity to it exceeds the ``threshold`` quantile of all
    similarities to it. With ``f`` the score, ``s_k = f(group alone) + f(all) - f(all but the group)``. With ``n`` the
    min-max normalisation over channels, the weights are ``w_k = exp(n(s)_k) n(GAP g)_k - 0.5``, and the map is
    ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised.
    Cost per example: one forward and one backward sample, and two samples from the layer on for each channel with a
    group, plus one if any channel has none. The group of a dead channel is empty.

    More details in the paper: H. Li, Z. Li, R. Ma, T. Wu, "FD-CAM: Improving Faithfulness and Discriminability of
    Visual Explanation for CNNs", ICPR 2022, https://arxiv.org/abs/2206.08792

    Examples::

        >>> from captum_fusion import LayerFDCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerFDCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "fd-cam", "region", "1, 1 b, 2 K + 1 (layer)", "Li et al., ICPR 2022", "https://arxiv.org/abs/2206.08792"
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        threshold: float = 0.95,
        score_fn: str | ScoreFn = "identity",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        threshold (float, optional): Quantile of the similarities to a channel above which channels belong to its
            group, 0 to 1.
            Default: 0.95
        {score_fn}
            Default: ``"identity"``
        {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.threshold = share("threshold", threshold)
        self.score_fn = checked_score_fn(score_fn)

    uses_gradients = True

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations, absent, score_fn = tensor.activations, tensor.absent, formulas.score_function(self.score_fn)
        groups = formulas.similar_channels(activations, self.threshold)
        grouped = groups.any(2)
        examples, channels = grouped.nonzero(as_tuple=True)
        empty = (~grouped).any(1).nonzero()[:, 0]
        # The samples of an example: each group alone, all channels but the group, and no channel if a group is empty.
        owners = torch.cat([examples, examples, empty])
        order = owners.argsort(stable=True)
        picked = torch.cat([channels, channels, torch.zeros_like(empty)])[order]
        kind = torch.cat([torch.zeros_like(examples), torch.ones_like(examples), torch.full_like(empty, 2)])[order]
        owners = owners[order]

        def switched(chunk: slice) -> Tensor:
            group = groups[owners[chunk], picked[chunk]]
            on = torch.where(kind[chunk, None] == 1, ~group, group) & (kind[chunk, None] < 2)
            shape = (*on.shape, *[1] * (activations.dim() - 2))
            return torch.where(on.reshape(shape), activations[owners[chunk]], absent[owners[chunk]])

        scores = tensor.replaced_scores(switched, owners, score_fn)
        alone, others = (
            formulas.channel_table(grouped, owners[kind == i], picked[kind == i], scores[kind == i]) for i in (0, 1)
        )
        nothing = scores.new_zeros(len(grouped)).index_put((owners[kind == 2],), scores[kind == 2])
        total = torch.where(grouped, alone + tensor.clean_scores(score_fn)[:, None] - others, nothing[:, None])
        gradients = formulas.at_least_float32(tensor.gradients).flatten(2).mean(2)
        weights = formulas.normalize(total).exp() * formulas.normalize(gradients) - 0.5
        return formulas.weighted_activations(activations, weights)


class LayerShapCAM(ReplacedCAM):
    r"""Shap-CAM: the Shapley value of each position of the layer, over all channels at once.

    The players are the positions. The value of a set of positions is the score with all other positions replaced by the
    baseline, by default each channel's mean over space. The paper's text was not available; a reproduction of it
    (https://github.com/liuktc/ML4CV_XAI) replaces positions by the mean. In a network that ends in global average
    pooling, the values then sum to 0; with ``baselines=0`` they sum to the score minus that of an empty layer. The
    Shapley values are estimated from ``n_samples`` random orders, which are the same for all examples. For any number
    of orders they sum to the score minus the baseline's score. The map is signed, in the layer's space, not normalised.
    Cost per example: one forward sample, and ``n_samples * (positions - 1) + 1`` samples from the layer on.

    More details in the paper: Q. Zheng, Z. Wang, J. Zhou, J. Lu, "Shap-CAM: Visual Explanations for Convolutional
    Neural Networks based on Shapley Value", ECCV 2022, https://arxiv.org/abs/2208.03608

    Examples::

        >>> from captum_fusion import LayerShapCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerShapCAM(model, model.stage4, n_samples=2)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo(
        "shap-cam",
        "region",
        "1, 25 (Z - 1) + 1 (layer)",
        "Zheng et al., ECCV 2022",
        "https://arxiv.org/abs/2208.03608",
        signed=True,
    )

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_samples: int = 25,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_samples (int, optional): Number of random orders of the positions.
            Default: 25
        {score_fn}
            Default: ``"softmax"``
        seed (int, optional): Seed of the orders. The global random generator is not used.
            Default: 0
        {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.seed = count("n_samples", n_samples), count("seed", seed, 0)
        self.score_fn = checked_score_fn(score_fn)

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: LayerBaselines = "mean",
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_standard_error: Literal[False] = False,
    ) -> Attributions: ...

    @overload
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: LayerBaselines = "mean",
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_standard_error: Literal[True],
    ) -> AttributionsWithErrors: ...

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: LayerBaselines = "mean",
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_standard_error: bool = False,
    ) -> Attributions | AttributionsWithErrors:
        """Explain a batch.

        Args:
            {shared_args}
            {replaced_args}
            return_standard_error (bool, optional): Whether to return the standard errors of the estimates as well.
                Default: False

        Returns:
            {layer_returns}
            - **standard errors** (of the same form): With ``return_standard_error=True``, as the second element of a
                pair. NaN if ``n_samples`` is 1.

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> method = LayerShapCAM(net, net[0], n_samples=3)
            >>> values, errors = method.attribute(torch.rand(2, 3, 8, 8), [3, 7], return_standard_error=True)
            >>> values.shape, errors.shape
            (torch.Size([2, 1, 6, 6]), torch.Size([2, 1, 6, 6]))
        """
        pairs = self._explain(
            lambda passes, evaluations: self._estimates(passes, evaluations, baselines),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        results = [tuple(format_result(part) for part in zip(*tensors, strict=True)) for tensors in pairs]
        result: Attributions | AttributionsWithErrors = self._per_layer(
            [pair if return_standard_error else pair[0] for pair in results]
        )
        return result

    def _maps(
        self, passes: Passes, evaluations: list[LayerEvaluation], baselines: LayerBaselines = "mean"
    ) -> list[tuple[Tensor, ...]]:
        return [tuple(value for value, _ in pairs) for pairs in self._estimates(passes, evaluations, baselines)]

    def _estimates(
        self, passes: Passes, evaluations: list[LayerEvaluation], baselines: LayerBaselines
    ) -> list[list[tuple[Tensor, Tensor]]]:
        return [
            [self._estimate(tensor) for tensor in tensors] for tensors in self._tensors(passes, evaluations, baselines)
        ]

    def _estimate(self, tensor: LayerTensor) -> tuple[Tensor, Tensor]:
        """Values and their standard errors, (N, 1, *spatial) each."""
        activations, absent, score_fn = tensor.activations, tensor.absent, formulas.score_function(self.score_fn)
        size, device = tuple(activations.shape[2:]), activations.device
        positions, number = math.prod(size), len(activations)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        orders = torch.stack(
            [torch.randperm(positions, generator=generator, device="cpu") for _ in range(self.n_samples)]
        )
        ranks = orders.argsort(1).to(device)  # (samples, positions): the step at which a position is added
        # The empty set, then each sample's sets of 1 to positions - 1 positions. The score of the full set is known.
        steps = [(0, 0)] + [(sample, n) for sample in range(self.n_samples) for n in range(1, positions)]
        samples, sizes = torch.tensor(steps, device=device).unbind(1)
        examples = torch.arange(number, device=device).repeat_interleave(len(steps))
        samples, sizes = samples.repeat(number), sizes.repeat(number)

        def partly(chunk: slice) -> Tensor:
            present = (ranks[samples[chunk]] < sizes[chunk, None]).reshape(-1, 1, *size)
            return torch.where(present, activations[examples[chunk]], absent[examples[chunk]])

        scores = tensor.replaced_scores(partly, examples, score_fn).reshape(number, -1)
        empty, full = scores[:, :1, None], tensor.clean_scores(score_fn).to(scores.device)[:, None, None]
        between = scores[:, 1:].reshape(number, self.n_samples, positions - 1)
        gains = torch.cat([empty.expand(-1, self.n_samples, 1), between, full.expand(-1, self.n_samples, 1)], 2).diff(
            dim=2
        )
        values = gains.gather(2, ranks.expand(number, -1, -1))
        known = torch.cat([scores, full[:, :, 0]], 1)
        constant = known.isfinite().all(1) & ~varies(known.amin(1), known.amax(1))  # no position changes the score
        values = torch.where(constant[:, None, None], 0.0, values)
        mean = values.mean(1)
        error = values.std(1) / self.n_samples**0.5 if self.n_samples > 1 else torch.full_like(mean, math.nan)
        shape = (number, 1, *size)
        return mean.reshape(shape).to(activations.dtype), error.reshape(shape).to(activations.dtype)
