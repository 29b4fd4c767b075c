"""The formulas: pure tensor functions on maps, activations and gradients.

Nothing here knows a model or captum. Every function treats each example (dimension 0) by itself, computes in at
least float32, returns finite numbers for finite input and never divides by zero.

References:
    [1] H. Dekdegue, M. Garouani, J. Mothe, J. Bernigaud, "Fusion-CAM", arXiv:2603.05386, 2026.
    [2] H. Hu, R. Wang, H. Lin, H. Yu, "UnionCAM", Frontiers in Neurorobotics 18:1490198, 2024.
    [3] H. Wang et al., "Score-CAM", CVPR Workshops 2020, arXiv:1910.01279.
    [4] R. R. Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: A range or gradient below this share of the magnitude that it stands on is float noise: it counts as 0.
FLOOR = 1e-6
#: The same for differences of scores. On real ImageNet networks in float32 the probability of one and the same image
#: moves by up to 2e-5 of itself with the batch size and the memory layout that it is computed in.
SCORE_FLOOR = 3e-5

ScoreFn = Callable[[Tensor], Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` itself if float32 or float64, else a float32 copy: half types are too coarse to reduce in."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _precise(tensor: Tensor) -> Tensor:
    """``tensor`` in float64 where its device has it: differences of probabilities live in their last digits."""
    return at_least_float32(tensor) if tensor.device.type == "mps" else tensor.double()


def _spatial(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(2, tensor.dim()))


# --------------------------------------------------------------------------------------------------------------- maps


def normalize(maps: Tensor) -> Tensor:
    """Min-max normalisation of each example to [0, 1]; a constant map gives zeros.

    A range of at most 1e-6 times the largest magnitude of the map counts as constant, because stretching it to
    [0, 1] would show nothing but rounding errors. There is no additive epsilon: maps of any scale keep their shape.

    Args:
        maps (Tensor): Floating point, of shape (N, ...).

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``maps`` is), in [0, 1].

    Examples::

        >>> normalize(torch.tensor([[[2e-9, 4e-9, 6e-9]], [[5.0, 5.0, 5.0]]]))
        tensor([[[0.0000, 0.5000, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000]]])
    """
    maps = at_least_float32(maps)
    dims = tuple(range(1, maps.dim()))
    low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
    varies = _varies(low, high)
    return torch.where(varies, (maps - low) / torch.where(varies, high - low, 1.0), 0.0)


def _varies(low: Tensor, high: Tensor) -> Tensor:
    """Whether a range is one, and not just float noise on a constant."""
    span = high - low
    return span.isfinite() & (span > FLOOR * torch.maximum(low.abs(), high.abs()))


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Linear, bilinear or trilinear interpolation to ``size``, with half-pixel centres (``align_corners=False``).

    Args:
        maps (Tensor): Floating point, of shape ``(N, C, *spatial)`` with one to three spatial dimensions.
        size (sequence of int): The wanted spatial size, in pixels.

    Returns:
        Tensor: Of shape ``(N, C, *size)``, float32 (float64 if ``maps`` is).

    Examples::

        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    maps = at_least_float32(maps)
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[maps.dim()]
    return F.interpolate(maps, size=tuple(size), mode=mode, align_corners=False)


def percentile(values: Tensor, theta: float) -> Tensor:
    """The ``theta`` percentile along the last dimension, linearly interpolated as ``numpy.percentile`` does.

    ``torch.quantile`` gives the same but refuses more than 2**24 elements.

    Args:
        values (Tensor): float32 or float64, of shape (..., P).
        theta (float): In percent, 0 to 100.

    Returns:
        Tensor: Of shape (..., 1).

    Examples::

        >>> percentile(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 50.0)
        tensor([[2.5000]])
    """
    position = theta / 100 * (values.shape[-1] - 1)
    below, share = math.floor(position), position - math.floor(position)
    low = values.kthvalue(below + 1, dim=-1, keepdim=True).values
    if share == 0:
        return low
    return torch.lerp(low, values.kthvalue(below + 2, dim=-1, keepdim=True).values, share)


def live_channels(activations: Tensor) -> Tensor:
    """Which channels vary over space. One that does not (all zero after a ReLU, say) can mask nothing.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.

    Returns:
        Tensor: bool, of shape (N, K).

    Examples::

        >>> live_channels(torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 2.0]]]))
        tensor([[False, False,  True]])
    """
    flat = at_least_float32(activations).flatten(2)
    return _varies(flat.amin(2), flat.amax(2))


# ------------------------------------------------------------------------------------------------------------- scores


def _identity(output: Tensor) -> Tensor:
    return output


def _softmax(output: Tensor) -> Tensor:
    if output.shape[1] == 1:
        raise ValueError(
            'score_fn="softmax" over a single output column is 1 for every input; '
            'use score_fn="sigmoid" for a binary head or score_fn="identity" for a regression'
        )
    return _precise(output).softmax(1)


def _sigmoid(output: Tensor) -> Tensor:
    return _precise(output).sigmoid()


_SCORE_FNS: dict[str, ScoreFn] = {"softmax": _softmax, "sigmoid": _sigmoid, "identity": _identity}


def score_function(score_fn: str | ScoreFn) -> ScoreFn:
    """The function that turns a model's raw output into scores, along dimension 1.

    Args:
        score_fn (str or callable): ``"softmax"``, ``"sigmoid"``, ``"identity"``, or a function from the raw output,
            of shape (N, ...) with two or more dimensions, to scores of a shape that the target can index.

    Returns:
        callable: It returns float64 (float32 on devices without it): the contributions of masks are differences of
        scores. A function of your own is given at least float32. An output of shape (N,) is the score itself.

    Raises:
        ValueError: If the name is unknown; when called, for a softmax over a single column.
        TypeError: If ``score_fn`` is neither a name nor callable, or returns anything but a tensor.

    Examples::

        >>> score_function("softmax")(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]], dtype=torch.float64)
    """
    if isinstance(score_fn, str):
        if score_fn not in _SCORE_FNS:
            raise ValueError(f"score_fn must be one of {', '.join(_SCORE_FNS)} or a callable, not {score_fn!r}")
        function = _SCORE_FNS[score_fn]
    elif callable(score_fn):
        function = score_fn
    else:
        raise TypeError(f"score_fn must be a name or a callable, not {type(score_fn).__name__}")

    def scores(output: Tensor) -> Tensor:
        found = function(at_least_float32(output)) if output.dim() > 1 else output
        if not isinstance(found, Tensor):
            raise TypeError(f"score_fn must return a tensor, not {type(found).__name__}")
        return _precise(found)

    return scores


# ------------------------------------------------------------------------------------------- gradient and region maps


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM [4] before its ReLU: channels weighted by their mean gradient, as captum's ``LayerGradCam`` returns it.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, signed.

    Examples::

        >>> grad_cam(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]))
        tensor([[[-0.5000,  2.0000]]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    return (gradients.mean(_spatial(gradients), keepdim=True) * activations).sum(1, keepdim=True)


def weighted_activations(activations: Tensor, weights: Tensor) -> Tensor:
    """ReLU of the sum over channels of weight times activation: the last line of Score-CAM [3] and its kin.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        weights (Tensor): Of shape (N, K).

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, not negative.

    Examples::

        >>> weighted_activations(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[1.0, -0.5]]))
        tensor([[[0., 2.]]])
    """
    activations = at_least_float32(activations)
    weights = weights.to(activations.dtype).reshape(*weights.shape, *[1] * (activations.dim() - 2))
    return (weights * activations).sum(1, keepdim=True).relu()


def softmax_weights(scores: Tensor, live: Tensor) -> Tensor:
    """Score-CAM's weights [3, algorithm 1]: softmax over an example's live channels of their masked scores.

    The paper's increase over the baseline is the same, since the baseline's score cancels in the softmax.

    Args:
        scores (Tensor): Raw score of the input under each channel's mask, of shape (N, K); ignored where not live.
        live (Tensor): bool, of shape (N, K): :func:`live_channels`.

    Returns:
        Tensor: Of shape (N, K), each row summing to 1; zeros for dead channels and for rows without a live one.

    Examples::

        >>> softmax_weights(torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    weights = at_least_float32(scores).masked_fill(~live, -math.inf).softmax(1)
    return torch.where(live, weights, 0.0)


def increase_weights(scores: Tensor, baseline: Tensor, live: Tensor) -> Tensor:
    """ReLU of each live channel's increase in score over the baseline.

    Args:
        scores (Tensor): Score of the input under each channel's mask, of shape (N, K); ignored where not live.
        baseline (Tensor): Score of the baseline, of shape (N,).
        live (Tensor): bool, of shape (N, K): :func:`live_channels`.

    Returns:
        Tensor: Of shape (N, K), not negative.

    Examples::

        >>> increase_weights(torch.tensor([[0.7, 0.1]]), torch.tensor([0.2]), torch.tensor([[True, True]]))
        tensor([[0.5000, 0.0000]])
    """
    return torch.where(live, contribution(scores, baseline[:, None]).relu(), 0.0)


def denoise_gradients(gradients: Tensor, theta: float) -> Tensor:
    """UnionCAM's denoising [2, eq. 1]: in every channel, gradients below its ``theta`` percentile become 0.

    Args:
        gradients (Tensor): Signed, of shape ``(N, K, *spatial)``.
        theta (float): In percent, 0 to 100. 0 changes nothing.

    Returns:
        Tensor: Of the same shape. A spatially constant channel stays as it is, for every ``theta``.

    Examples::

        >>> denoise_gradients(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.3000, 0.4000]]])
    """
    gradients = at_least_float32(gradients)
    flat = gradients.flatten(2)
    return _at_least(flat, percentile(flat, theta)).reshape(gradients.shape)


def union_gradient_map(activations: Tensor, gradients: Tensor, theta: float = 10.0, alpha: str = "sum") -> Tensor:
    """UnionCAM's gradient map [2, eqs. 1 to 3] from denoised gradients, pixel by pixel.

    Eq. 3 of the paper can be read in two ways. ``alpha="sum"``, the reading of every known code, divides the positive
    gradients of a channel by their sum, which gives every channel with a positive gradient the same total weight: for
    a network that ends in global pooling the map hardly depends on the class. ``alpha="count"`` divides by their
    number, the plain meaning of "average coefficient", and keeps the magnitudes.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.
        theta (float): Percentile of :func:`denoise_gradients`, 0 to 100. Default: 10
        alpha (str): ``"sum"`` or ``"count"``. Default: ``"sum"``

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``. Channels whose positive gradients do not exceed 1e-6 of the example's
        largest gradient count as without any.

    Examples::

        >>> activations, gradients = torch.ones(1, 1, 4), torch.tensor([[[-1.0, 1.0, 3.0, 4.0]]])
        >>> union_gradient_map(activations, gradients, theta=0.0)
        tensor([[[0.0000, 0.1250, 0.3750, 0.5000]]])
        >>> union_gradient_map(activations, gradients, theta=0.0, alpha="count")
        tensor([[[0.0000, 0.3333, 1.0000, 1.3333]]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    positive = denoise_gradients(gradients, theta).relu()
    noise = FLOOR * gradients.abs().amax(tuple(range(1, gradients.dim())), keepdim=True)
    positive = torch.where(positive > noise, positive, 0.0)
    divisor = positive if alpha == "sum" else (positive > 0).to(positive.dtype)
    divisor = divisor.sum(_spatial(positive), keepdim=True)
    share = torch.where(divisor > 0, positive / torch.where(divisor > 0, divisor, 1.0), 0.0)
    return (share * activations).sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- fusion


def _at_least(values: Tensor, threshold: Tensor) -> Tensor:
    """``values`` where they reach the threshold, else 0; ties within float noise reach it together."""
    slack = FLOOR * values.abs().amax(-1, keepdim=True)
    return torch.where(values >= threshold - slack, values, 0.0)


def denoise(maps: Tensor, theta: float) -> Tensor:
    """Fusion-CAM's denoising [1]: values of the heat map below its ``theta`` percentile become 0.

    Ties stay. Where more than ``theta`` percent of a map are 0 already, nothing changes.

    Args:
        maps (Tensor): Not negative, of shape ``(N, 1, *spatial)``.
        theta (float): In percent, 0 to 100. 0 changes nothing.

    Returns:
        Tensor: Of the same shape.

    Examples::

        >>> denoise(torch.tensor([[[0.1, 0.2, 0.3, 1.0]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.3000, 1.0000]]])
    """
    flat = at_least_float32(maps).flatten(1)
    return _at_least(flat, percentile(flat, theta)).reshape(maps.shape)


def contribution(score: Tensor, baseline: Tensor) -> Tensor:
    """Score minus the baseline's score [1, 2]; a difference within float noise counts as 0.

    Args:
        score (Tensor): Score of a masked input.
        baseline (Tensor): Score of the baseline, of a shape that broadcasts.

    Returns:
        Tensor: The difference, 0 where it is at most 3e-5 of the larger score's magnitude.

    Examples::

        >>> contribution(torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.25 + 1e-8]))
        tensor([0.5000, 0.0000])
    """
    difference = score - baseline
    noise = SCORE_FLOOR * torch.maximum(score.abs(), baseline.abs())
    return torch.where(difference.abs() <= noise, 0.0, difference)


def contribution_weights(first: Tensor, second: Tensor) -> Tensor:
    """Two contributions as weights that sum to 1: negative ones count as 0, and both are 1/2 where both vanish.

    Args:
        first (Tensor): Of shape (N,).
        second (Tensor): Of shape (N,).

    Returns:
        Tensor: Of shape (N, 2), in [0, 1].

    Examples::

        >>> contribution_weights(torch.tensor([0.3, -0.2, -0.1]), torch.tensor([0.1, 0.4, 0.0]))
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    pair = torch.stack([first, second], 1).relu()
    total = pair.sum(1, keepdim=True)
    return torch.where(total > 0, pair / torch.where(total > 0, total, 1.0), 0.5)


def weigh(maps: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of shape ``(N, 1, *spatial)``, each times its column of ``weights`` of shape (N, 2).

    Examples::

        >>> weigh((torch.ones(1, 1, 2), torch.ones(1, 1, 2)), torch.tensor([[0.25, 0.75]]))
        (tensor([[[0.2500, 0.2500]]]), tensor([[[0.7500, 0.7500]]]))
    """
    first, second = weights.to(maps[0].dtype).reshape(-1, 2, *[1] * (maps[0].dim() - 1)).unbind(1)
    return maps[0] * first, maps[1] * second


def similarity_fusion(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Fusion-CAM's last step [1]: the maximum where two weighted maps agree, sliding to their mean where they do not.

    With the similarity ``s = clip(1 - |first - second|, 0, 1)`` it is ``s max + (1 - s) mean``, which for
    differences of at most 1 is ``max - (first - second)**2 / 2``.

    Args:
        first (Tensor): A weighted map.
        second (Tensor): A weighted map of the same shape.

    Returns:
        tuple[Tensor, Tensor]: The fused map, not normalised, and the similarity in [0, 1]; both of that shape.

    Examples::

        >>> similarity_fusion(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0]))
        (tensor([0.5000, 0.5000]), tensor([1., 0.]))
    """
    similarity = (1 - (first - second).abs()).clamp(0, 1)
    return similarity * torch.maximum(first, second) + (1 - similarity) * (first + second) / 2, similarity
