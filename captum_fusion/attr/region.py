"""Region methods: they weight the channels of a layer by what the network says of the input that each one shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._captum import Baselines, Call, Layer, LayerEvaluation, Target, format_result, log_usage
from captum_fusion.attr._base import CAM, choice, documented
from captum_fusion.functional import ScoreFn


class LayerScoreCAM(CAM, PerturbationAttribution):
    """Score-CAM: each channel's map, stretched to [0, 1], masks the input; the score it leaves is the channel's weight.

    The map is ``ReLU(sum_k w_k A^k)`` in the layer's space, not normalised. The weights ``w`` are

    - ``weighting="softmax"`` (the paper, algorithm 1): the softmax over channels of the raw output under each mask;
    - ``weighting="increase"`` (the authors' code in spirit): ReLU of the increase in score over the baseline.

    Channels that are constant over space (dead ones, say) mask nothing: they cost no row and weigh 0.
    Cost: one forward pass and one masked row for each live channel (and one of the baseline for ``"increase"``).

    More details in the paper: H. Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural
    Networks", CVPR Workshops 2020, https://arxiv.org/abs/1910.01279

    Examples::

        >>> import torch
        >>> from captum_fusion import LayerScoreCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> attribution = LayerScoreCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0])
        >>> attribution.shape
        torch.Size([1, 1, 12, 12])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        weighting: str = "softmax",
        score_fn: str | ScoreFn = "softmax",
    ) -> None:
        """Name the network, the layer and the weighting.

        Args:
            {constructor_args}
            weighting (str, optional): ``"softmax"`` or ``"increase"``.
                Default: ``"softmax"``
            score_fn (str or callable, optional): What ``"increase"`` calls a score: ``"softmax"``, ``"sigmoid"``,
                ``"identity"`` or a function of the raw output, along dimension 1. The softmax weights always use the
                raw output.
                Default: ``"softmax"``
        """
        CAM.__init__(self, forward_func, layer, device_ids)
        self.weighting = choice("weighting", weighting, ("softmax", "increase"))
        formulas.score_function(score_fn)
        self.score_fn = score_fn

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain a batch.

        Args:
            {shared_args}
            {masked_args}

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of shape ``(N, 1, *spatial of the layer)``, not
                negative, in the dtype of the layer's output, detached. Zeros where no channel is live. A tuple if the
                layer returns several tensors; a list of such results for a list of layers.

        Raises:
            {raises}

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> images = torch.rand(2, 3, 8, 8)
            >>> LayerScoreCAM(net, net[0]).attribute(images, target=[3, 7]).shape
            torch.Size([2, 1, 6, 6])
        """
        maps = self._explain(
            self._maps,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            baselines=baselines,
            mask_inputs=mask_inputs,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        return self._per_layer([format_result(each) for each in maps])

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        return [tuple(self._map(call, tensor) for tensor in each.activations) for each in evaluations]

    def _map(self, call: Call, activations: Tensor) -> Tensor:
        live = formulas.live_channels(activations)
        examples, channels = _pairs(live)

        def masks(rows: slice, size: Sequence[int]) -> Tensor:
            picked = activations[examples[rows], channels[rows]].unsqueeze(1)
            return formulas.normalize(formulas.upsample(picked, size))

        score_fn = formulas.score_function("identity" if self.weighting == "softmax" else self.score_fn)
        flat = call.masked_scores(masks, examples, score_fn)
        scores = flat.new_zeros(live.shape).index_put((examples, channels), flat)
        if self.weighting == "softmax":
            weights = formulas.softmax_weights(scores, live)
        else:
            weights = formulas.increase_weights(scores, call.baseline_scores(score_fn).to(scores.device), live)
        return formulas.weighted_activations(activations, weights).to(activations.dtype)


def _pairs(live: Tensor) -> tuple[Tensor, Tensor]:
    """Example and channel of every live channel, perturbation-major: first channels of all examples, then second."""
    examples, channels = live.nonzero(as_tuple=True)
    rank = (live.cumsum(1) - 1)[examples, channels]
    order = rank.argsort(stable=True)
    return examples[order], channels[order]
