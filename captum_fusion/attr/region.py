"""Region methods: they ask the network what it makes of parts of its input, or of parts of a layer's activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_fusion import functional as formulas
from captum_fusion._captum import (
    Baselines,
    Call,
    Layer,
    LayerEvaluation,
    Reshape,
    Target,
    format_result,
    log_usage,
    no_inference_mode,
    progress_bar,
)
from captum_fusion.attr._base import (
    MASKING_OPTIONS,
    MaskedCAM,
    ReplacedCAM,
    Replacing,
    choice,
    count,
    documented,
    percentage,
    positive,
    scoring,
)
from captum_fusion.functional import ScoreFn


class LayerScoreCAM(MaskedCAM):
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
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the weighting.

        Args:
            {constructor_args}
            weighting (str, optional): ``"softmax"`` or ``"increase"``.
                Default: ``"softmax"``
            {score_fn}
                The softmax weights always use the raw output.
                Default: ``"softmax"``
            {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.weighting = choice("weighting", weighting, ("softmax", "increase"))
        self.score_fn = scoring(score_fn)

    @property
    def _masks_are(self) -> tuple[Any, ...]:
        return ("score-cam",)

    def _map(self, call: Call, activations: Tensor, gradients: Tensor | None) -> Tensor:
        live = formulas.live_channels(activations)
        examples, channels = pairs(live)

        def masks(rows: slice, size: Sequence[int]) -> Tensor:
            return formulas.normalize(formulas.upsample(activations[examples[rows], channels[rows]].unsqueeze(1), size))

        score_fn = formulas.score_function("identity" if self.weighting == "softmax" else self.score_fn)
        scores = table(live, examples, channels, call.masked_scores(masks, examples, score_fn))
        if self.weighting == "softmax":
            weights = formulas.softmax_weights(scores, live)
        else:
            weights = formulas.increase_weights(scores, call.baseline_scores(score_fn).to(scores.device), live)
        return formulas.weighted_activations(activations, weights)


def table(live: Tensor, examples: Tensor, channels: Tensor, values: Tensor) -> Tensor:
    """Values of (example, channel) pairs as (N, K), 0 for all others."""
    return values.new_zeros(live.shape).index_put((examples, channels), values)


def pairs(live: Tensor) -> tuple[Tensor, Tensor]:
    """Example and channel of every live channel, perturbation-major: first channels of all examples, then second."""
    examples, channels = live.nonzero(as_tuple=True)
    rank = (live.cumsum(1) - 1)[examples, channels]
    order = rank.argsort(stable=True)
    return examples[order], channels[order]


class _RepeatedMasks(MaskedCAM):
    """Score-CAM's kin: a channel weighs the mean score of several versions of the input that it shows."""

    score_fn: str | ScoreFn

    @property
    def copies(self) -> int:
        """Versions of the input for each channel."""
        raise NotImplementedError

    def _map(self, call: Call, activations: Tensor, gradients: Tensor | None) -> Tensor:
        live = formulas.live_channels(activations)
        examples, channels = pairs(live)
        copies = self.copies
        rows = examples.repeat_interleave(copies)
        which = torch.arange(copies, device=rows.device).repeat(len(examples))
        picked = channels.repeat_interleave(copies)
        change = self._changes()

        def masks(some: slice, size: Sequence[int]) -> Tensor:
            return change.masks(activations[rows[some], picked[some]].unsqueeze(1), which[some], size)

        def compose(x: Tensor, base: float | Tensor, mask: Tensor, some: slice) -> Tensor:
            assert change.rows is not None
            return change.rows(base + mask * (x - base), which[some])

        score_fn = formulas.score_function(self.score_fn)
        scores = call.masked_scores(masks, rows, score_fn, None if change.rows is None else compose)
        scores = torch.where(scores.isfinite(), scores, 0.0)
        weights = table(live, examples, channels, scores.reshape(-1, copies).mean(1))
        return formulas.weighted_activations(activations, weights)

    def _changes(self) -> _Changes:
        raise NotImplementedError


class _Changes(NamedTuple):
    """What the versions of a masked input are.

    Attributes:
        masks: ``masks(maps, copies, size)``: masks of the input's size from low-resolution maps (R, 1, *spatial).
        rows: ``rows(masked, copies)``: further changes of the masked rows, or None.
    """

    masks: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    rows: Callable[[Tensor, Tensor], Tensor] | None = None


#: The largest standard deviation of SS-CAM's noise, which half precision can still hold.
_LOUDEST = 1e3


class LayerSSCAM(_RepeatedMasks):
    r"""SS-CAM: a channel weighs the score of the input that it shows, averaged over noise.

    With ``H^k = N(Up(A^k))`` and standard normal noise ``e_i`` of the input's size, the weights are the means over
    ``i`` of ``p(x * (H^k + stdev e_i))`` for ``noise="map"`` and ``p(x * H^k + stdev e_i)`` for ``noise="input"``. The
    map is ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised. All channels and examples get the same noise.
    ``official=True`` reproduces the authors' code, where the noise has the standard deviation ``(stdev / r)**2``, here
    at most 1000, and a channel whose noisy input gives no finite score weighs 0: for
    ``"map"``, ``r`` is the range of ``Up(A^k)``, which is not normalised then; for ``"input"`` that of ``x * H^k``.
    Cost for each example: one forward row and ``n_samples`` masked rows for each live channel.

    More details in the paper: H. Wang, R. Naidu, J. Michael, S. S. Kundu, "SS-CAM: Smoothed Score-CAM for Sharper
    Visual Feature Localization", 2020, https://arxiv.org/abs/2006.14255

    Examples::

        >>> from captum_fusion import LayerSSCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> method = LayerSSCAM(model, model.stage4, n_samples=3)
        >>> method.attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_samples: int = 35,
        stdev: float = 2.0,
        noise: str = "map",
        official: bool = False,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the noise.

        Args:
            {constructor_args}
            n_samples (int, optional): The number of noisy versions of each masked input.
                Default: 35
            stdev (float, optional): The noise's standard deviation, in units of the normalised map or of the
                (normalised) input.
                Default: 2.0
            noise (str, optional): What is noisy, the ``"map"`` that masks or the masked ``"input"``.
                Default: ``"map"``
            official (bool, optional): Scale the noise as the authors' code does.
                Default: False
            {score_fn}
                Default: ``"softmax"``
            seed (int, optional): Of the noise; the global generator is not touched.
                Default: 0
            {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.stdev = count("n_samples", n_samples), positive("stdev", stdev, or_zero=True)
        self.noise, self.official = choice("noise", noise, ("map", "input")), official
        self.seed = count("seed", seed, 0)
        self.score_fn = scoring(score_fn)

    @property
    def copies(self) -> int:
        """Versions of the input for each channel."""
        return self.n_samples

    @property
    def _masks_are(self) -> tuple[Any, ...]:
        return "ss-cam", self.n_samples, self.stdev, self.noise, self.official, self.seed

    def _changes(self) -> _Changes:
        drawn: dict[tuple[int, ...], Tensor] = {}

        def noisy(signal: Tensor, copies: Tensor) -> Tensor:
            shape = tuple(signal.shape[1:])
            if shape not in drawn:
                generator = torch.Generator("cpu").manual_seed(self.seed)
                drawn[shape] = torch.randn(self.n_samples, *shape, generator=generator, device="cpu").to(signal)
            deviation: float | Tensor = self.stdev
            if self.official:
                low, high = signal.flatten(1).aminmax(dim=1)
                spread = (high - low).reshape(-1, *[1] * (signal.dim() - 1))
                deviation = torch.where(spread > 0, self.stdev / torch.where(spread > 0, spread, 1.0), 0.0)
                deviation = deviation.clamp(max=_LOUDEST**0.5) ** 2
            return signal + deviation * drawn[shape][copies.to(signal.device)]

        def masks(maps: Tensor, copies: Tensor, size: Sequence[int]) -> Tensor:
            raised = formulas.upsample(maps, size)
            shown = raised if self.official and self.noise == "map" else formulas.normalize(raised)
            return noisy(shown, copies) if self.noise == "map" else shown

        return _Changes(masks, noisy if self.noise == "input" else None)


class LayerISCAM(_RepeatedMasks):
    r"""IS-CAM: a channel weighs the score of the input that it shows, averaged while the mask is turned up.

    With ``H^k = N(Up(A^k))`` the weights are ``w_k = mean_i p(x * H^k * i / n_steps)``, ``i = 1, ..., n_steps``, and
    the map ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised. ``cumulative=True`` reproduces the published
    code, which adds up the masks, so that the input is scaled by ``0.1, 0.3, 0.6, ..., 5.5``.
    Cost for each example: one forward row and ``n_steps`` masked rows for each live channel.

    More details in the paper: R. Naidu, A. Ghosh, Y. Maurya, S. R. Nayak K, S. S. Kundu, "IS-CAM: Integrated
    Score-CAM for axiomatic-based explanations", 2020, https://arxiv.org/abs/2010.03023

    Examples::

        >>> from captum_fusion import LayerISCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> method = LayerISCAM(model, model.stage4, n_steps=3)
        >>> method.attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        n_steps: int = 10,
        cumulative: bool = False,
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and the path.

        Args:
            {constructor_args}
            n_steps (int, optional): The number of points on the path.
                Default: 10
            cumulative (bool, optional): Add the masks up, as the published code does, instead of a straight path.
                Default: False
            {score_fn}
                Default: ``"softmax"``
            {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_steps, self.cumulative = count("n_steps", n_steps), cumulative
        self.score_fn = scoring(score_fn)

    @property
    def copies(self) -> int:
        """Versions of the input for each channel."""
        return self.n_steps

    @property
    def _masks_are(self) -> tuple[Any, ...]:
        return "is-cam", self.n_steps, self.cumulative

    def _changes(self) -> _Changes:
        shares = [(i + 1) / self.n_steps for i in range(self.n_steps)]
        if self.cumulative:
            shares = [sum(shares[: i + 1]) for i in range(self.n_steps)]

        def masks(maps: Tensor, copies: Tensor, size: Sequence[int]) -> Tensor:
            share = maps.new_tensor(shares)[copies].reshape(-1, *[1] * (maps.dim() - 1))
            return share * formulas.normalize(formulas.upsample(maps, size))

        return _Changes(masks)


class BackgroundCAM(MaskedCAM):
    """Base of the methods that blur what their masks hide, unless told to show the baseline there."""

    background: str
    _blur = (51, 50.0)  # kernel size and standard deviation in pixels

    def _set_background(self, background: str) -> None:
        self.background = choice("background", background, ("blur", "baseline"))
        if background == "blur":
            self.call_options = MASKING_OPTIONS - {"baselines"}

    def _check_baselines(self, baselines: Baselines) -> None:
        given = baselines if isinstance(baselines, tuple) else (baselines,)
        plain = all(each is None or (not isinstance(each, Tensor) and each == 0) for each in given)
        if self.background == "blur" and not plain:
            raise ValueError('baselines are shown only with background="baseline"; here the input is blurred instead')

    def _maps(self, call: Call, evaluations: list[LayerEvaluation]) -> list[tuple[Tensor, ...]]:
        if self.background == "blur":
            call = call.blurred(*self._blur)
        return MaskedCAM._maps(self, call, evaluations)


class LayerGroupCAM(BackgroundCAM):
    r"""Group-CAM: Grad-CAM maps of groups of channels, each weighted by what the network says of the part it shows.

    With ``a_k`` the mean gradient of channel ``k``, a group's map is ``M_l = ReLU(sum_{k in l} a_k A^k)``, of which
    values up to the ``theta`` percentile become 0. It masks the input, with a blurred one behind it, and the group
    weighs ``r_l = ReLU(p(masked) - p(blurred))``. The map is ``ReLU(sum_l r_l N(M_l))`` in the layer's space, where
    ``N(M_l)`` is normalised by the range of the upsampled group map. A group without a live map costs no row.
    ``theta=None`` is the authors' later code: no denoising, and group maps summed as they are.
    Cost for each example: one forward and backward row, one row of the background and one for each group.

    More details in the paper: Q. Zhang, L. Rao, Y. Yang, "Group-CAM: Group Score-Weighted Visual Explanations for Deep
    Convolutional Networks", 2021, https://arxiv.org/abs/2103.13859

    Examples::

        >>> from captum_fusion import LayerGroupCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> method = LayerGroupCAM(model, model.stage4, groups=16)
        >>> method.attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        device_ids: list[int] | None = None,
        *,
        groups: int = 32,
        grouping: str = "chunks",
        theta: float | None = 70.0,
        background: str = "blur",
        score_fn: str | ScoreFn = "softmax",
        reshape: Reshape | None = None,
    ) -> None:
        """Name the network, the layer and how channels are grouped.

        Args:
            {constructor_args}
            groups (int, optional): How many groups; no more than there are channels.
                Default: 32
            grouping (str, optional): ``"chunks"`` of neighbouring channels, or ``"clusters"`` of similar maps
                (:func:`captum_fusion.functional.cluster_channels`).
                Default: ``"chunks"``
            theta (float or None, optional): Percentile of each group map up to which it is set to 0; None denoises
                nothing and sums the group maps as they are.
                Default: 70.0
            background (str, optional): What shows where a mask is 0: ``"blur"``, the input under a Gaussian of
                51 pixels and standard deviation 50, or ``"baseline"``, which is ``attribute``'s ``baselines``.
                Default: ``"blur"``
            {score_fn}
                Default: ``"softmax"``
            {reshape_arg}
        """
        MaskedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.groups = count("groups", groups)
        self.grouping = choice("grouping", grouping, tuple(_GROUPINGS))
        self.theta = None if theta is None else percentage("theta", theta)
        self._set_background(background)
        self.score_fn = scoring(score_fn)

    @property
    def uses_gradients(self) -> bool:
        """True: channels are weighted by their mean gradients."""
        return True

    def _map(self, call: Call, activations: Tensor, gradients: Tensor | None) -> Tensor:
        assert gradients is not None
        number = min(self.groups, activations.shape[1])
        labels = _GROUPINGS[self.grouping](activations, number)
        weights = formulas.at_least_float32(gradients).flatten(2).mean(2)
        maps = formulas.group_maps(activations, labels, weights, number)
        if self.theta is not None:
            flat = maps.flatten(2)
            maps = torch.where(flat > formulas.percentile(flat, self.theta), flat, 0.0).reshape(maps.shape)
        live = formulas.live_channels(maps)
        examples, groups = pairs(live)
        lowest, range_ = maps.new_zeros(len(examples)), maps.new_ones(len(examples))

        def masks(rows: slice, size: Sequence[int]) -> Tensor:
            raised = formulas.upsample(maps[examples[rows], groups[rows]].unsqueeze(1), size)
            low, high = raised.flatten(1).aminmax(dim=1)
            if tuple(size) == call.spatial_size:  # of several inputs, the first masked one's
                lowest[rows], range_[rows] = low, torch.where(high > low, high - low, 1.0)
            return formulas.normalize(raised)

        score_fn = formulas.score_function(self.score_fn)
        scores = table(live, examples, groups, call.masked_scores(masks, examples, score_fn))
        weights = formulas.increase_weights(scores, call.baseline_scores(score_fn).to(scores.device), live)
        if self.theta is not None:
            shape = (*live.shape, *[1] * (maps.dim() - 2))
            maps = maps - table(live, examples, groups, lowest).reshape(shape)
            weights = weights / torch.where(live, table(live, examples, groups, range_), 1.0)
        return formulas.weighted_activations(maps, weights)


_GROUPINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "chunks": formulas.chunk_channels,
    "clusters": formulas.cluster_channels,
}


class LayerAblationCAM(ReplacedCAM):
    r"""Ablation-CAM: a channel weighs the drop in score when it is taken away.

    The weights are ``w_k = y - y_k``, where ``y_k`` is the score with channel ``k`` replaced by the baseline, and the
    map is ``ReLU(sum_k w_k A^k)``, in the layer's space, not normalised. The paper divides by ``y``, which changes
    nothing but the scale where ``y`` is positive, and turns the map upside down where it is not.
    With ``groups`` several channels are taken away together and share a weight.
    Cost for each example: one forward row, and for each channel (or group) that differs from the baseline a row of
    the network from the layer on.

    More details in the paper: S. Desai, H. G. Ramaswamy, "Ablation-CAM: Visual Explanations for Deep Convolutional
    Network via Gradient-free Localization", WACV 2020, https://doi.org/10.1109/WACV45572.2020.9093360

    Examples::

        >>> from captum_fusion import LayerAblationCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> LayerAblationCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

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
        """Name the network, the layer and what is taken away at once.

        Args:
            {constructor_args}
            groups (int, optional): How many groups of channels are taken away, instead of single channels.
                Default: None (single channels)
            grouping (str, optional): ``"clusters"`` of similar maps, or ``"chunks"`` of neighbouring channels.
                Default: ``"clusters"``
            {score_fn}
                Default: ``"identity"``
            {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.groups = None if groups is None else count("groups", groups)
        self.grouping = choice("grouping", grouping, tuple(_GROUPINGS))
        self.score_fn = scoring(score_fn)

    def _map(self, part: Replacing) -> Tensor:
        activations, absent = part.activations, part.absent
        number = min(self.groups or activations.shape[1], activations.shape[1])
        labels = _GROUPINGS["chunks" if self.groups is None else self.grouping](activations, number)
        matters = (activations != absent).flatten(2).any(2)
        if self.groups is not None:
            matters = formulas.members(labels, number, matters).any(2)
        examples, groups = matters.nonzero(as_tuple=True)

        def without(rows: slice) -> Tensor:
            taken = labels[examples[rows]] == groups[rows, None]
            shape = (*taken.shape, *[1] * (activations.dim() - 2))
            return torch.where(taken.reshape(shape), absent[examples[rows]], activations[examples[rows]])

        drops = part.score[examples] - part.scores(without, examples)
        return formulas.weighted_activations(activations, table(matters, examples, groups, drops).gather(1, labels))


class LayerReciproCAM(ReplacedCAM):
    r"""Recipro-CAM: a position weighs the score that the layer's activations at this position alone leave.

    For every position the activations elsewhere, in all channels, are replaced by the baseline; the map holds the
    scores, in the layer's space, not normalised. ``gaussian=True`` keeps the neighbours, too, each weighted by a 3 x 3
    kernel (``[1 2 1; 2 4 2; 1 2 1] / 16`` in two dimensions), as OpenVINO's code does; the authors' spreads the
    position's own activations over its neighbours.
    Cost for each example: one forward row, and for each position a row of the network from the layer on.

    For a vision transformer (ViT-ReciproCAM), give the norm in front of the last block's attention, a
    ``reshape`` that keeps the class token, ``gaussian=True`` and ``score_fn="identity"``::

        LayerReciproCAM(
            vit, vit.encoder.layers[-1].ln_1, gaussian=True, score_fn="identity", reshape=layers.TokenGrid()
        )

    More details in the papers: S.-Y. Byun, W. Lee, "Recipro-CAM: Fast gradient-free visual explanations for
    convolutional neural networks", 2022, https://arxiv.org/abs/2209.14074; "ViT-ReciproCAM: Gradient and Attention-Free
    Visual Explanations for Vision Transformer", 2023, https://arxiv.org/abs/2310.02588

    Examples::

        >>> from captum_fusion import LayerReciproCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> LayerReciproCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

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
        """Name the network, the layer and what is kept.

        Args:
            {constructor_args}
            gaussian (bool, optional): Keep the neighbours of a position, too, weighted by a Gaussian.
                Default: False
            {score_fn}
                Default: ``"softmax"``
            {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.gaussian = gaussian
        self.score_fn = scoring(score_fn)

    def _map(self, part: Replacing) -> Tensor:
        activations, absent = part.activations, part.absent
        size = tuple(activations.shape[2:])
        positions = math.prod(size)
        examples = torch.arange(len(activations), device=activations.device).repeat_interleave(positions)
        where = torch.arange(positions, device=activations.device).repeat(len(activations))
        difference = activations - absent

        def only(rows: slice) -> Tensor:
            spots = F.one_hot(where[rows], positions).to(activations.dtype).reshape(-1, 1, *size)
            kept = formulas.smooth_neighbours(spots) if self.gaussian else spots
            return absent[examples[rows]] + kept * difference[examples[rows]]

        return part.scores(only, examples).reshape(-1, 1, *size)


class LayerFDCAM(ReplacedCAM):
    r"""FD-CAM: channels weighted by their gradients and by what similar channels do to the score together.

    The group of a channel are the channels whose cosine similarity to it exceeds the ``threshold`` quantile of all.
    With ``f`` the score, ``s_k = f(group alone) + f(all) - f(all but the group)``; with ``n`` the min-max normalisation
    over channels the weights are ``w_k = exp(n(s)_k) n(GAP g)_k - 0.5``, and the map is ``ReLU(sum_k w_k A^k)``, in the
    layer's space, not normalised.
    Cost for each example: one forward and backward row, and for each channel that is not dead 2 rows of the network
    from the layer on (and 1 more where there are dead ones).

    More details in the paper: H. Li, Z. Li, R. Ma, T. Wu, "FD-CAM: Improving Faithfulness and Discriminability of
    Visual Explanation for CNNs", ICPR 2022, https://arxiv.org/abs/2206.08792

    Examples::

        >>> from captum_fusion import LayerFDCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> LayerFDCAM(model, model.stage4).attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

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
        """Name the network, the layer and how similar a group is.

        Args:
            {constructor_args}
            threshold (float, optional): Quantile of the similarities to a channel above which others belong to its
                group, 0 to 1.
                Default: 0.95
            {score_fn}
                Default: ``"identity"``
            {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.threshold = positive("threshold", threshold, or_zero=True)
        if self.threshold > 1:
            raise ValueError(f"threshold must be a quantile from 0 to 1, not {threshold!r}")
        self.score_fn = scoring(score_fn)

    @property
    def uses_gradients(self) -> bool:
        """True: channels are weighted by their mean gradients."""
        return True

    def _map(self, part: Replacing) -> Tensor:
        activations, absent = part.activations, part.absent
        assert part.gradients is not None
        groups = formulas.similar_channels(activations, self.threshold)
        found = groups.any(2)
        examples, channels = found.nonzero(as_tuple=True)
        empty = (~found).any(1).nonzero()[:, 0]
        # For each example: its groups alone, everything but them, and nothing at all where a group is empty.
        rows = torch.cat([examples, examples, empty])
        order = rows.argsort(stable=True)
        picked = torch.cat([channels, channels, torch.zeros_like(empty)])[order]
        kind = torch.cat([torch.zeros_like(examples), torch.ones_like(examples), torch.full_like(empty, 2)])[order]
        rows = rows[order]

        def switched(some: slice) -> Tensor:
            group = groups[rows[some], picked[some]]
            on = torch.where(kind[some, None] == 1, ~group, group) & (kind[some, None] < 2)
            shape = (*on.shape, *[1] * (activations.dim() - 2))
            return torch.where(on.reshape(shape), activations[rows[some]], absent[rows[some]])

        scores = part.scores(switched, rows)
        alone, others = (table(found, rows[kind == i], picked[kind == i], scores[kind == i]) for i in (0, 1))
        nothing = scores.new_zeros(len(found)).index_put((rows[kind == 2],), scores[kind == 2])
        total = torch.where(found, alone + part.score[:, None] - others, nothing[:, None])
        gradients = formulas.at_least_float32(part.gradients).flatten(2).mean(2)
        weights = formulas.normalize(total).exp() * formulas.normalize(gradients) - 0.5
        return formulas.weighted_activations(activations, weights)


class LayerShapCAM(ReplacedCAM):
    r"""Shap-CAM: the Shapley value of every position of the layer, all of its channels together.

    The players are the positions; the value of a set of them is the score with the others replaced by the baseline.
    The values are estimated from ``n_samples`` random orders, the same for every example, and add up to the score
    minus that of the baseline whatever their number. The map holds them signed, in the layer's space, not normalised.
    Cost for each example: 2 rows and ``n_samples * (positions - 1)`` rows of the network from the layer on.

    More details in the paper: Q. Zheng, Z. Wang, J. Zhou, J. Lu, "Shap-CAM: Visual Explanations for Convolutional
    Neural Networks based on Shapley Value", ECCV 2022, https://arxiv.org/abs/2208.03608

    Examples::

        >>> from captum_fusion import LayerShapCAM, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> method = LayerShapCAM(model, model.stage4, n_samples=2)
        >>> method.attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 1, 12, 12])
    """

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
        """Name the network, the layer and the sampling.

        Args:
            {constructor_args}
            n_samples (int, optional): How many random orders of the positions.
                Default: 25
            {score_fn}
                Default: ``"softmax"``
            seed (int, optional): Of the orders; the global generator is not touched.
                Default: 0
            {reshape_arg}
        """
        ReplacedCAM.__init__(self, forward_func, layer, device_ids, reshape=reshape)
        self.n_samples, self.seed = count("n_samples", n_samples), count("seed", seed, 0)
        self.score_fn = scoring(score_fn)

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
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        return_standard_error: bool = False,
    ) -> Any:
        """Explain a batch.

        Args:
            {shared_args}
            {replaced_args}
            return_standard_error (bool, optional): Also return the standard error of each estimate.
                Default: False

        Returns:
            {layer_returns}
            - **standard errors** (of the same form): With ``return_standard_error=True``, as the second of a pair;
                NaN for a single sample.

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
            lambda call, evaluations: self._estimates(call, evaluations, baselines),
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
        )
        results = [tuple(format_result(each) for each in zip(*tensors, strict=True)) for tensors in pairs]
        return self._per_layer([pair if return_standard_error else pair[0] for pair in results])

    def _maps(
        self, call: Call, evaluations: list[LayerEvaluation], baselines: Baselines = 0
    ) -> list[tuple[Tensor, ...]]:
        return [tuple(value for value, _ in pairs) for pairs in self._estimates(call, evaluations, baselines)]

    def _estimates(
        self, call: Call, evaluations: list[LayerEvaluation], baselines: Baselines
    ) -> list[list[tuple[Tensor, Tensor]]]:
        return [
            [self._estimate(part) for part in self._parts(call, layer, evaluation, baselines)]
            for layer, evaluation in zip(self._layers, evaluations, strict=True)
        ]

    def _estimate(self, part: Replacing) -> tuple[Tensor, Tensor]:
        """Values and their standard errors, each (N, 1, *spatial)."""
        activations, absent = part.activations, part.absent
        size, device = tuple(activations.shape[2:]), activations.device
        positions, number = math.prod(size), len(activations)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        orders = torch.stack(
            [torch.randperm(positions, generator=generator, device="cpu") for _ in range(self.n_samples)]
        )
        ranks = orders.argsort(1).to(device)  # (samples, positions): when a position joins
        # The empty set, then every sample's sets of 1 to positions - 1; the full set's score is known.
        steps = [(0, 0)] + [(sample, n) for sample in range(self.n_samples) for n in range(1, positions)]
        samples, sizes = torch.tensor(steps, device=device).unbind(1)
        examples = torch.arange(number, device=device).repeat_interleave(len(steps))
        samples, sizes = samples.repeat(number), sizes.repeat(number)

        def partly(rows: slice) -> Tensor:
            present = (ranks[samples[rows]] < sizes[rows, None]).reshape(-1, 1, *size)
            return torch.where(present, activations[examples[rows]], absent[examples[rows]])

        found = part.scores(partly, examples).reshape(number, -1)
        empty, full = found[:, :1, None].expand(-1, self.n_samples, 1), part.score.to(found.device)[:, None, None]
        between = found[:, 1:].reshape(number, self.n_samples, positions - 1)
        gains = torch.cat([empty, between, full.expand(-1, self.n_samples, 1)], 2).diff(dim=2)
        values = gains.gather(2, ranks.expand(number, -1, -1))
        mean = values.mean(1)
        error = values.std(1) / self.n_samples**0.5 if self.n_samples > 1 else torch.full_like(mean, math.nan)
        shape = (number, 1, *size)
        return mean.reshape(shape).to(activations.dtype), error.reshape(shape).to(activations.dtype)


class RISE(PerturbationAttribution):
    r"""RISE: an input's pixels weigh the mean score of random masks that let them show. Needs no layer.

    A mask is a random grid of zeros and ones, stretched to slightly more than the input's size and shifted at random:
    ``L = sum_i p(x * m_i) m_i / (n_masks E[m])``. All examples get the same masks, which are made a few at a time.
    Cost for each example: one forward row and ``n_masks`` masked rows.

    More details in the paper: V. Petsiuk, A. Das, K. Saenko, "RISE: Randomized Input Sampling for Explanation of
    Black-box Models", BMVC 2018, https://arxiv.org/abs/1806.07421

    Examples::

        >>> from captum_fusion import RISE, demo
        >>> model, scene = demo.load_model(), demo.load_scenes()[0]
        >>> RISE(model, n_masks=100).attribute(demo.preprocess(scene.image), scene.labels[0]).shape
        torch.Size([1, 3, 96, 96])
    """

    @documented
    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        n_masks: int = 4000,
        grid_size: int = 7,
        probability: float = 0.5,
        score_fn: str | ScoreFn = "softmax",
        seed: int = 0,
    ) -> None:
        """Name the network and the masks.

        Args:
            forward_func (callable): The model, or any function of the inputs.
            n_masks (int, optional): How many masks; the paper has 4000 for VGG-16 and 8000 for ResNet-50.
                Default: 4000
            grid_size (int, optional): Cells of the random grid along each spatial dimension.
                Default: 7
            probability (float, optional): Of a cell to show the input.
                Default: 0.5
            {score_fn}
                Default: ``"softmax"``
            seed (int, optional): Of the masks; the global generator is not touched.
                Default: 0
        """
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, not {type(forward_func).__name__}")
        PerturbationAttribution.__init__(self, forward_func)
        self.n_masks, self.grid_size = count("n_masks", n_masks), count("grid_size", grid_size)
        self.probability, self.seed = positive("probability", probability), count("seed", seed, 0)
        if self.probability > 1:
            raise ValueError(f"probability must be at most 1, not {probability!r}")
        self.score_fn = scoring(score_fn)

    @classmethod
    def get_name(cls) -> str:
        """The class's name."""
        return cls.__name__

    @log_usage()
    @documented
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baselines = 0,
        mask_inputs: Sequence[int] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Explain a batch.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples. A tuple
                where the network takes several tensors; its tensors are aligned along dimension 0.
            target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning.
                Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
                Tensors whose first dimension is N belong to the examples and follow them into masked rows.
                Default: None
            baselines (float, Tensor, tuple or None, optional): What shows where a mask is 0: a number, a tensor of an
                input's shape (or with first dimension 1), or a tuple with one of these for each input.
                Default: 0
            mask_inputs (sequence of int, optional): Which of several inputs are masked, all by the same masks.
                Default: None (the first floating point input with spatial dimensions, and those of its rank)
            perturbations_per_eval (int, optional): At most this many masked rows per example in one call of the
                network. None times the first rows to find a fast chunk and layout.
                Default: None
            show_progress (bool, optional): Show a bar that counts masked rows.
                Default: False

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of the inputs' shapes and dtypes, detached, the
                same in every channel; zeros for inputs that are not masked. A tuple if ``inputs`` is one.

        Raises:
            AssertionError: If the target does not select one output for each example.
            ValueError: If an argument has a bad value, or no input has spatial dimensions.
            TypeError: If an argument has a bad type, or ``forward_func`` does not return a tensor.

        Examples::

            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
            >>> RISE(net, n_masks=50, grid_size=3).attribute(torch.rand(2, 3, 8, 8), target=[3, 7]).shape
            torch.Size([2, 3, 8, 8])
        """
        with progress_bar(show_progress, self.get_name()) as bar, no_inference_mode():
            call = Call.without_layer(
                self.forward_func,
                inputs,
                target,
                additional_forward_args,
                baselines=baselines,
                mask_inputs=mask_inputs,
                perturbations_per_eval=perturbations_per_eval,
                bar=bar,
            )
            maps = self._maps(call)
        found = tuple(
            maps[i].to(x.dtype).expand_as(x).contiguous() if i in maps else torch.zeros_like(x)
            for i, x in enumerate(call.inputs)
        )
        return found if isinstance(inputs, tuple) else found[0]

    def _maps(self, call: Call) -> dict[int, Tensor]:
        """The map of each masked input, (N, 1, *spatial), by its index."""
        sizes = {i: tuple(call.inputs[i].shape[2:]) for i in call.masked_indices}
        device, number = call.inputs[call.first_masked].device, call.examples
        grids, shifts = self._draw(len(call.spatial_size))
        totals = {
            i: formulas.precise(call.inputs[i].new_zeros(0)).new_zeros(number, 1, *size) for i, size in sizes.items()
        }
        rows = torch.arange(number, device=device).repeat(self.n_masks)
        which = torch.arange(self.n_masks, device="cpu").repeat_interleave(number)

        newest: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}  # of one chunk, which is masked and then weighed

        def masks(some: slice, size: Sequence[int]) -> Tensor:
            key = some.start, some.stop, tuple(size)
            if key not in newest:
                for old in [old for old in newest if old[:2] != key[:2]]:
                    del newest[old]
                picked, each = torch.unique_consecutive(which[some], return_inverse=True)
                newest[key] = formulas.rise_masks(grids[picked].to(device), shifts[picked], size)[each.to(device)]
            return newest[key]

        for some, scores in call.iterate_scores(masks, rows, formulas.score_function(self.score_fn)):
            for i, size in sizes.items():
                total = totals[i]
                shape = (-1, *[1] * (total.dim() - 1))
                weighted = masks(some, size).to(total) * scores.to(total).reshape(shape)
                total.index_add_(0, rows[some].to(total.device), weighted)
        return {i: total / (self.n_masks * self.probability) for i, total in totals.items()}

    def _draw(self, dims: int) -> tuple[Tensor, Tensor]:
        """Grids (n_masks, 1, *cells) of zeros and ones, and shifts (n_masks, dims) in shares of a cell."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        shape = (self.n_masks, 1, *[self.grid_size] * dims)
        grids = (torch.rand(shape, generator=generator, device="cpu") < self.probability).float()
        return grids, torch.rand(self.n_masks, dims, generator=generator, device="cpu")
