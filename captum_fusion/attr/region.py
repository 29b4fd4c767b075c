"""Region methods: maps weighted by the scores of masked inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._arguments import choice, count, percentage, positive
from captum_fusion._types import Layer, Reshape
from captum_fusion.attr._bases import (
    BackgroundCAM,
    Changes,
    ChannelScoresCAM,
    LayerTensor,
    MaskedCAM,
    RepeatedMasksCAM,
    checked_score_fn,
)
from captum_fusion.attr._docs import documented
from captum_fusion.attr._info import MethodInfo
from captum_fusion.attr._search import SearchDetails
from captum_fusion.functional import ScoreFn
from captum_fusion.functional.maps import seeded

__all__ = ["LayerDecomCAM", "LayerGroupCAM", "LayerISCAM", "LayerSSCAM", "LayerScoreCAM", "SearchDetails"]


class LayerScoreCAM(ChannelScoresCAM):
    """Score-CAM: channels weighted by the scores of inputs masked with their upsampled, normalised activations.

    The map is ``ReLU(sum_k w_k A^k)`` in the layer's space, not normalised. The weights ``w`` are

    - ``weighting="softmax"`` (the paper, algorithm 1): the softmax over channels of the raw output under each mask;
    - ``weighting="probability"`` (the authors' code): the score under each mask;
    - ``weighting="increase"`` (of this package): ReLU of the increase in score over the baseline.

    Channels that are constant over space, such as dead ones, cannot mask the input. Their weight is 0, and they take no
    masked sample.
    Cost per example: one forward sample, one masked sample per live channel, and one baseline sample for
    ``"increase"``.

    With ``max_evaluations`` or ``tolerance`` not all channels are scored: a search (active Score-CAM, see
    :class:`captum_fusion.functional.ChannelSearch`) scores the channels that matter most for the map, and predicts the
    scores of the others. The map is the same if the budget covers all live channels. The search takes one backward
    sample.

    More details in the paper: H. Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural
    Networks", CVPR Workshops 2020, https://arxiv.org/abs/1910.01279

    Examples::

        >>> import torch
        >>> from captum_fusion import LayerScoreCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> attribution = LayerScoreCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0])
        >>> attribution.shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("score-cam", "region", "K + 1", "Wang et al., CVPR-W 2020", "https://arxiv.org/abs/1910.01279")
    masks_depend_on = ()

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        weighting: str = "softmax",
        max_evaluations: int | None = None,
        tolerance: float | None = None,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        weighting (str, optional): Channel weights, ``"softmax"``, ``"probability"`` or ``"increase"``.
            Default: ``"softmax"``
        {search_args}
        {score_fn}
            The softmax weights always use the raw output.
            Default: ``"softmax"``
        {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.weighting = choice("weighting", weighting, ("softmax", "probability", "increase"))
        self._set_search(max_evaluations, tolerance)
        self.score_fn = checked_score_fn(score_fn)

    def _evaluator(self, tensor: LayerTensor) -> Callable[[Tensor, Tensor], Tensor]:
        activations = tensor.activations
        score_fn = self._channel_score_fn()

        def evaluate(examples: Tensor, channels: Tensor) -> Tensor:
            def masks(chunk: slice, size: Sequence[int]) -> Tensor:
                maps = activations[examples[chunk], channels[chunk]].unsqueeze(1)
                return formulas.normalize(formulas.upsample(maps, size))

            return tensor.masked_scores(masks, examples, score_fn, share=not self._search.searches)

        return evaluate


#: The largest standard deviation of SS-CAM's noise with ``authors_code=True``; half precision can represent it.
_LARGEST_STDEV = 1e3


class LayerSSCAM(RepeatedMasksCAM):
    r"""SS-CAM: Score-CAM with each channel's score averaged over noise.

    With ``H^k = N(Up(A^k))`` and standard normal noise ``e_i`` of the input's size, the weights are the means over
    ``i`` of ``p(x * (H^k + stdevs e_i))`` for ``noise="map"`` and ``p(x * H^k + stdevs e_i)`` for ``noise="input"``.
    With ``weighting="softmax"`` the mean is of raw outputs, followed by a softmax over the channels. The authors' code
    has no softmax; torchcam, whose documentation states the paper's formulas, has it. The map is ``ReLU(sum_k w_k
    A^k)``, in the layer's space, not normalised. All channels and examples share the same noise. With
    ``authors_code=True`` the standard deviation of the noise is ``(stdevs / r)**2``, at most 1000: for ``"map"``, ``r``
    is the range of ``Up(A^k)``, which is then not normalised; for ``"input"``, ``r`` is the range of ``x * H^k``. Of
    the versions of a masked input, scores that are not finite are replaced by 0. Cost per example: one forward sample
    and ``n_samples`` masked samples per live channel.

    More details in the paper: H. Wang, R. Naidu, J. Michael, S. S. Kundu, "SS-CAM: Smoothed Score-CAM for Sharper
    Visual Feature Localization", 2020, https://arxiv.org/abs/2006.14255

    Examples::

        >>> from captum_fusion import LayerSSCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerSSCAM(model, model.stage4, n_samples=3)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("ss-cam", "region", "35 K + 1", "Wang et al., 2020", "https://arxiv.org/abs/2006.14255")
    masks_depend_on = ("n_samples", "stdevs", "noise", "authors_code", "seed")

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_samples: int = 35,
        stdevs: float = 2.0,
        noise: str = "map",
        weighting: str = "probability",
        authors_code: bool = False,
        max_evaluations: int | None = None,
        tolerance: float | None = None,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_samples (int, optional): Number of noisy versions of each masked input.
            Default: 35
        stdevs (float, optional): Standard deviation of the noise, in units of the normalised map or of the input
            as given.
            Default: 2.0
        noise (str, optional): Where the noise is added: to the ``"map"`` used as mask, or to the masked ``"input"``.
            Default: ``"map"``
        weighting (str, optional): Channel weights, ``"probability"`` or ``"softmax"``.
            Default: ``"probability"``
        {authors_code}
        {search_args}
        {score_fn}
            Default: ``"softmax"``
        seed (int, optional): Seed of the noise. The global random generator is not used.
            Default: 0
        {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.stdevs = count("n_samples", n_samples), positive("stdevs", stdevs, or_zero=True)
        self.noise, self.authors_code = choice("noise", noise, ("map", "input")), authors_code
        self.weighting = choice("weighting", weighting, ("probability", "softmax"))
        self.seed = count("seed", seed, 0)
        self._set_search(max_evaluations, tolerance)
        self.score_fn = checked_score_fn(score_fn)

    @property
    def copies(self) -> int:
        """Number of versions of the input per channel."""
        return self.n_samples

    def _changes(self) -> Changes:
        drawn: dict[tuple[int, ...], Tensor] = {}

        def noisy(signal: Tensor, copies: Tensor) -> Tensor:
            shape = tuple(signal.shape[1:])
            if shape not in drawn:
                drawn[shape] = torch.randn(self.n_samples, *shape, **seeded(self.seed)).to(signal)
            deviation: float | Tensor = self.stdevs
            if self.authors_code:
                low, high = signal.flatten(1).aminmax(dim=1)
                spread = (high - low).reshape(-1, *[1] * (signal.dim() - 1))
                deviation = torch.where(spread > 0, self.stdevs / torch.where(spread > 0, spread, 1.0), 0.0)
                deviation = deviation.clamp(max=_LARGEST_STDEV**0.5) ** 2
            return signal + deviation * drawn[shape][copies.to(signal.device)]

        def masks(maps: Tensor, copies: Tensor, size: Sequence[int]) -> Tensor:
            raised = formulas.upsample(maps, size)
            shown = raised if self.authors_code and self.noise == "map" else formulas.normalize(raised)
            return noisy(shown, copies) if self.noise == "map" else shown

        return Changes(masks, noisy if self.noise == "input" else None)


class LayerISCAM(RepeatedMasksCAM):
    r"""IS-CAM: Score-CAM with each channel's score averaged over masks of increasing strength.

    With ``H^k = N(Up(A^k))`` the weights are ``w_k = mean_i p(x * H^k * i / n_steps)``, ``i = 1, ..., n_steps``, and
    the map is ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised. With ``weighting="softmax"`` the mean is
    of raw outputs, followed by a softmax over the channels. The authors' code has no softmax; torchcam, whose
    documentation states the paper's formulas, has it. With ``authors_code=True`` the masks are accumulated, so that the
    factors of ``x * H^k`` are ``0.1, 0.3, 0.6, ..., 5.5`` for 10 steps. Cost per example: one forward sample and
    ``n_steps`` masked samples per live channel.

    More details in the paper: R. Naidu, A. Ghosh, Y. Maurya, S. R. Nayak K, S. S. Kundu, "IS-CAM: Integrated
    Score-CAM for axiomatic-based explanations", 2020, https://arxiv.org/abs/2010.03023

    Examples::

        >>> from captum_fusion import LayerISCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerISCAM(model, model.stage4, n_steps=3)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("is-cam", "region", "10 K + 1", "Naidu et al., 2020", "https://arxiv.org/abs/2010.03023")
    masks_depend_on = ("n_steps", "authors_code")

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_steps: int = 10,
        weighting: str = "probability",
        authors_code: bool = False,
        max_evaluations: int | None = None,
        tolerance: float | None = None,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        n_steps (int, optional): Number of masks per channel.
            Default: 10
        weighting (str, optional): Channel weights, ``"probability"`` or ``"softmax"``.
            Default: ``"probability"``
        {authors_code}
        {search_args}
        {score_fn}
            Default: ``"softmax"``
        {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_steps, self.authors_code = count("n_steps", n_steps), authors_code
        self.weighting = choice("weighting", weighting, ("probability", "softmax"))
        self._set_search(max_evaluations, tolerance)
        self.score_fn = checked_score_fn(score_fn)

    @property
    def copies(self) -> int:
        """Number of versions of the input per channel."""
        return self.n_steps

    def _changes(self) -> Changes:
        shares = [(i + 1) / self.n_steps for i in range(self.n_steps)]
        if self.authors_code:
            shares = [sum(shares[: i + 1]) for i in range(self.n_steps)]

        def masks(maps: Tensor, copies: Tensor, size: Sequence[int]) -> Tensor:
            share = maps.new_tensor(shares)[copies].reshape(-1, *[1] * (maps.dim() - 1))
            return share * formulas.normalize(formulas.upsample(maps, size))

        return Changes(masks)


class LayerGroupCAM(BackgroundCAM):
    r"""Group-CAM: Grad-CAM maps of groups of channels, weighted by the scores of inputs masked with them.

    With ``a_k`` the mean gradient of channel ``k``, a group's map is ``M_l = ReLU(sum_{k in l} a_k A^k)``. Values up to
    its ``theta`` percentile are set to 0. The map masks the input on a blurred background, and the group's weight is
    ``r_l = p(masked) - p(blurred)``. The result is ``ReLU(sum_l r_l N(M_l))`` in the layer's space, where ``N(M_l)`` is
    normalised by the range of the upsampled group map. Groups whose map is constant take no masked sample. This is the
    authors' code of May and June 2021, which has the paper's denoising. With ``authors_code=True``, group maps are
    neither denoised nor normalised in the sum, and negative weights are set to 0, as in the code since August 2021.
    Cost per example: one forward and one backward sample, one sample of the background and one masked sample per group.

    More details in the paper: Q. Zhang, L. Rao, Y. Yang, "Group-CAM: Group Score-Weighted Visual Explanations for Deep
    Convolutional Networks", 2021, https://arxiv.org/abs/2103.13859

    Examples::

        >>> from captum_fusion import LayerGroupCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> method = LayerGroupCAM(model, model.stage4, groups=16)
        >>> method.attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("group-cam", "region", "34, 1 b", "Zhang et al., 2021", "https://arxiv.org/abs/2103.13859")

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        groups: int = 32,
        grouping: str = "chunks",
        theta: float = 70.0,
        relu_weights: bool = False,
        background: str = "blur",
        authors_code: bool = False,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        groups (int, optional): Number of groups, at most the number of channels.
            Default: 32
        grouping (str, optional): Grouping of channels: ``"chunks"`` of neighbours, or ``"clusters"`` of similar maps
            (:func:`captum_fusion.functional.cluster_channels`).
            Default: ``"chunks"``
        theta (float, optional): Percentile of each group map up to which values are set to 0.
            Default: 70.0
        relu_weights (bool, optional): Whether negative group weights are set to 0. True with ``authors_code=True``.
            Default: False
        background (str, optional): Values where a mask is 0: ``"blur"``, the input blurred by a Gaussian kernel of
            51 pixels and standard deviation 50, or ``"baseline"``, the ``baselines`` of ``attribute``.
            Default: ``"blur"``
        {authors_code}
        {score_fn}
            Default: ``"softmax"``
        {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.groups = count("groups", groups)
        self.grouping = choice("grouping", grouping, tuple(formulas.GROUPINGS))
        self.theta, self.authors_code = percentage("theta", theta), authors_code
        self.relu_weights = relu_weights or authors_code
        self._set_background(background)
        self.score_fn = checked_score_fn(score_fn)

    uses_gradients = True

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations, gradients = tensor.activations, tensor.gradients
        number = min(self.groups, activations.shape[1])
        labels = formulas.GROUPINGS[self.grouping](activations, number)
        weights = formulas.at_least_float32(gradients).flatten(2).mean(2)
        maps = formulas.group_maps(activations, labels, weights, number)
        if not self.authors_code:
            flat = maps.flatten(2)
            maps = torch.where(flat <= formulas.percentile(flat, self.theta), 0.0, flat).reshape(maps.shape)
        live = formulas.live_channels(maps)
        examples, groups = formulas.channel_pairs(live)
        lowest, range_ = maps.new_zeros(len(examples)), maps.new_ones(len(examples))

        def masks(chunk: slice, size: Sequence[int]) -> Tensor:
            raised = formulas.upsample(maps[examples[chunk], groups[chunk]].unsqueeze(1), size)
            low, high = raised.flatten(1).aminmax(dim=1)
            if tuple(size) == tensor.passes.spatial_size:  # for several inputs, the first masked one
                lowest[chunk], range_[chunk] = low, torch.where(high > low, high - low, 1.0)
            return formulas.normalize(raised)

        score_fn = formulas.score_function(self.score_fn)
        scores = formulas.channel_table(live, examples, groups, tensor.masked_scores(masks, examples, score_fn))
        base = tensor.baseline_scores(score_fn).to(scores.device)
        weights = formulas.increase_weights(scores, base, live, signed=not self.relu_weights)
        if not self.authors_code:
            shape = (*live.shape, *[1] * (maps.dim() - 2))
            maps = maps - formulas.channel_table(live, examples, groups, lowest).reshape(shape)
            weights = weights / torch.where(live, formulas.channel_table(live, examples, groups, range_), 1.0)
        return formulas.weighted_activations(maps, weights)


class LayerDecomCAM(BackgroundCAM):
    r"""DecomCAM: the strongest channels of a class, decomposed into components weighted by their scores.

    The maps ``a_k A^k`` of the ``channels`` channels with the largest mean gradient ``a_k`` are decomposed by a
    principal component analysis of the positions, as in the authors' code (the paper has a singular value decomposition
    without centring). The positive part of each of the first ``components`` components masks the input,
    ``max(x m, blur(x) (1 - m))``. A component's weight is the score of its masked input divided by the largest such
    score; scores below 0.001 are set to 0. The map is the weighted sum, in the layer's space, not normalised. The
    decomposition does not determine a component's sign; it is chosen so that the value of largest magnitude is
    positive. Scores are raw outputs by default. If no component has a positive score, the map is all zero.

    ``weighting="softmax"``, with ``channels=100``, is the earlier Decom-CAM (Y. Yang et al., 2023) as in its published
    code: with ``s`` the score of a component's masked input minus that of the blurred input, the weight is
    ``s softmax(s)``, and the sum is followed by a ReLU.

    Cost per example: one forward and one backward sample, one masked sample per component, and one sample of the
    blurred input for ``"softmax"``.

    More details in the paper: Y. Yang et al., "DecomCAM: Advancing Beyond Saliency Maps through Decomposition and
    Integration", 2024, https://arxiv.org/abs/2405.18882

    Examples::

        >>> from captum_fusion import LayerDecomCAM
        >>> from captum_fusion.demo import digits
        >>> model, scene = digits.load_model(), digits.load_scenes()[0]
        >>> LayerDecomCAM(model, model.stage4).attribute(digits.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    info = MethodInfo("decom-cam", "region", "11, 1 b", "Yang et al., 2024", "https://arxiv.org/abs/2405.18882")

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
        background: str = "blur",
        score_fn: str | ScoreFn = "identity",
        reshape: Reshape | None = None,
    ) -> None:
        """Args:
        {constructor_args}
        channels (int, optional): Number of channels to decompose, at most the number of channels of the layer.
            Default: 500
        components (int, optional): Number of components, at most the number of channels and of positions.
            Default: 10
        weighting (str, optional): Weights of the components: ``"scaled"`` scores, or the ``"softmax"`` weights of the
            earlier method.
            Default: ``"scaled"``
        background (str, optional): Values where a mask is 0: ``"blur"``, the input blurred by a Gaussian of standard
            deviation 10, or ``"baseline"``, the ``baselines`` of ``attribute``.
            Default: ``"blur"``
        {score_fn}
            Default: ``"identity"``
        {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.channels, self.components = count("channels", channels), count("components", components)
        self.weighting = choice("weighting", weighting, ("scaled", "softmax"))
        self._set_background(background)
        self.score_fn = checked_score_fn(score_fn)

    _blur = staticmethod(partial(formulas.gaussian_blur, kernel_size=81, sigma=10.0))

    uses_gradients = True

    def _map(self, tensor: LayerTensor) -> Tensor:
        activations, gradients = tensor.activations, tensor.gradients
        weights = formulas.at_least_float32(gradients).flatten(2).mean(2)
        best = weights.topk(min(self.channels, weights.shape[1]), dim=1).indices
        shape = (*best.shape, *[1] * (activations.dim() - 2))
        examples = torch.arange(len(best), device=best.device)[:, None]
        weighted = weights.gather(1, best).reshape(shape) * activations[examples, best]
        maps = formulas.principal_components(weighted, self.components).relu()
        live = formulas.live_channels(maps)
        owners, components = formulas.channel_pairs(live)

        def masks(chunk: slice, size: Sequence[int]) -> Tensor:
            picked = maps[owners[chunk], components[chunk]].unsqueeze(1)
            return formulas.normalize(formulas.upsample(picked, size, smooth=True).relu())

        def brighter(x: Tensor, base: float | Tensor, mask: Tensor, chunk: slice) -> Tensor:
            return torch.maximum(x * mask, base * (1 - mask))

        score_fn = formulas.score_function(self.score_fn)
        scores = tensor.masked_scores(masks, owners, score_fn, brighter)
        scores = formulas.channel_table(live, owners, components, scores)
        if self.weighting == "softmax":
            scores = scores - tensor.baseline_scores(score_fn).to(scores.device)[:, None]
            return formulas.weighted_activations(maps, scores * formulas.softmax_weights(scores, live))
        scores = torch.where(scores < 1e-3, 0.0, scores)
        largest = scores.amax(1, keepdim=True)
        return formulas.weighted_activations(maps, torch.where(largest <= 0, 0.0, scores / largest.clamp(min=1e-3)))
