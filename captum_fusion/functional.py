"""The formulas: pure tensor functions on maps, activations and gradients.

Nothing here knows a model or captum. Every function treats each example (dimension 0) by itself, computes in at
least float32, returns finite numbers for finite input and never divides by zero.

References:
    [1] H. Dekdegue, M. Garouani, J. Mothe, J. Bernigaud, "Fusion-CAM", arXiv:2603.05386, 2026.
    [2] H. Hu, R. Wang, H. Lin, H. Yu, "UnionCAM", Frontiers in Neurorobotics 18:1490198, 2024.
    [3] H. Wang et al., "Score-CAM", CVPR Workshops 2020, arXiv:1910.01279.
    [4] R. R. Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391.
    [5] R. L. Draelos, L. Carin, "HiResCAM", 2020, arXiv:2011.08891.
    [6] A. Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063.
    [7] R. Fu et al., "Axiom-based Grad-CAM" (XGrad-CAM), BMVC 2020, arXiv:2008.02312.
    [8] P.-T. Jiang et al., "LayerCAM", IEEE TIP 2021, doi:10.1109/TIP.2021.3089943.
    [9] Q. Zhang, L. Rao, Y. Yang, "Group-CAM", 2021, arXiv:2103.13859.
    [10] M. B. Muhammad, M. Yeasin, "Eigen-CAM", IJCNN 2020, arXiv:2008.00299.
    [11] V. Petsiuk, A. Das, K. Saenko, "RISE", BMVC 2018, arXiv:1806.07421.
    [12] P. Morbidelli et al., "Augmented Grad-CAM", ICASSP 2020.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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


def precise(tensor: Tensor) -> Tensor:
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


def upsample(maps: Tensor, size: Sequence[int], smooth: bool = False) -> Tensor:
    """Linear, bilinear or trilinear interpolation to ``size``, with half-pixel centres (``align_corners=False``).

    Args:
        maps (Tensor): Floating point, of shape ``(N, C, *spatial)`` with one to three spatial dimensions.
        size (sequence of int): The wanted spatial size, in pixels.
        smooth (bool): Bicubic for two spatial dimensions, which may leave the range of the values. Default: False

    Returns:
        Tensor: Of shape ``(N, C, *size)``, float32 (float64 if ``maps`` is).

    Examples::

        >>> upsample(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    maps = at_least_float32(maps)
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    mode = {3: "linear", 4: "bicubic" if smooth else "bilinear", 5: "trilinear"}[maps.dim()]
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
    return precise(output).softmax(1)


def _sigmoid(output: Tensor) -> Tensor:
    return precise(output).sigmoid()


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
        return precise(found)

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


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM [5] before any ReLU: activations times their own gradients, summed over channels.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, signed.

    Examples::

        >>> hires_cam(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]))
        tensor([[[-2.,  2.]]])
    """
    return (at_least_float32(activations) * at_least_float32(gradients)).sum(1, keepdim=True)


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM [8]: activations times the positive part of their own gradients, summed over channels, then ReLU.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, not negative.

    Examples::

        >>> layer_cam(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]))
        tensor([[[1., 2.]]])
    """
    return hires_cam(activations, at_least_float32(gradients).relu()).relu()


def fuse_layer_cams(maps: Sequence[Tensor], size: Sequence[int], gamma: float = 2.0) -> Tensor:
    """LayerCAM's fusion of several layers [8]: the maximum of their maps, those of early layers scaled up by a tanh.

    Args:
        maps (sequence of Tensor): Not negative, each ``(N, 1, *spatial)``, in the order of the network.
        size (sequence of int): The wanted spatial size, in pixels.
        gamma (float): Every map but the last is ``tanh(gamma M / max M)``; the last is ``M / max M``. Default: 2

    Returns:
        Tensor: Of shape ``(N, 1, *size)``, in [0, 1].

    Examples::

        >>> early, last = torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[0.0, 4.0, 0.0]]])
        >>> fuse_layer_cams([early, last], (3,))
        tensor([[[0.0000, 1.0000, 0.9640]]])
    """
    shares = []
    for single in maps:
        raised = upsample(single, size)
        largest = raised.amax(tuple(range(1, raised.dim())), keepdim=True)
        shares.append(torch.where(largest > 0, raised / torch.where(largest > 0, largest, 1.0), 0.0))
    scaled = [torch.tanh(gamma * share) for share in shares[:-1]] + shares[-1:]
    return normalize(torch.stack([each.to(scaled[-1].device) for each in scaled]).amax(0))


def xgrad_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM's weights [7]: a channel's gradients averaged with its activations as weights.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape (N, K). A channel whose activations sum to 0 up to rounding weighs 0.

    Examples::

        >>> xgrad_cam_weights(torch.tensor([[[1.0, 3.0], [2.0, -2.0]]]), torch.tensor([[[1.0, 2.0], [1.0, 1.0]]]))
        tensor([[1.7500, 0.0000]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    dims = _spatial(activations)
    total, noise = activations.sum(dims), FLOOR * activations.abs().sum(dims)
    counts = total.abs() > noise
    return torch.where(counts, (activations * gradients).sum(dims) / torch.where(counts, total, 1.0), 0.0)


def pixel_alphas(second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """Grad-CAM++'s pixel weights [6, eqs. 10 and 19], ``D2 / (2 D2 + D3 sum_ab A_ab)``.

    Args:
        second (Tensor): Second derivatives of the score by the activations, ``(N, K, *spatial)``.
        third (Tensor): Third derivatives, of the same shape.
        activations (Tensor): Of the same shape; their sum over space is taken for each channel.

    Returns:
        Tensor: Of the same shape; 0 where the denominator is 0 up to rounding.

    Examples::

        >>> pixel_alphas(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor([[[0.2500, 0.5000]]])
    """
    left = 2 * second
    right = third * at_least_float32(activations).sum(_spatial(activations), keepdim=True).to(third.dtype)
    counts = (left + right).abs() > FLOOR * (left.abs() + right.abs())
    return torch.where(counts, second / torch.where(counts, left + right, 1.0), 0.0)


def grad_cam_plus_plus_weights(activations: Tensor, gradients: Tensor, normalize_alpha: bool = False) -> Tensor:
    """Grad-CAM++'s channel weights [6]: positive gradients, weighted by :func:`pixel_alphas` for ``Y = exp(score)``.

    For the exponential the derivatives are ``g exp(s), g**2 exp(s), g**3 exp(s)`` of the score's gradient ``g``
    (eq. 19, exact where the network is locally linear). The common factor ``exp(s)`` is left out, which changes no
    more than the scale of the map and never overflows.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.
        normalize_alpha (bool): Let the pixel weights of positive gradients sum to 1 in each channel, as the authors'
            code does. Default: False

    Returns:
        Tensor: Of shape (N, K).

    Examples::

        >>> grad_cam_plus_plus_weights(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, -1.0]]]))
        tensor([[0.2500]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    # Both sides of the quotient are divided by g**2, which could underflow.
    alphas = pixel_alphas(torch.ones_like(gradients), gradients, activations)
    return sum_of_alphas(alphas, gradients, normalize_alpha)


def sum_of_alphas(alphas: Tensor, gradients: Tensor, normalize_alpha: bool = False) -> Tensor:
    """Channel weights ``sum_ij alpha_ij ReLU(g_ij)`` [6, eq. 5].

    Args:
        alphas (Tensor): Pixel weights, ``(N, K, *spatial)``.
        gradients (Tensor): Gradients, of the same shape.
        normalize_alpha (bool): Divide the alphas by their sum over a channel's positive gradients. Default: False

    Returns:
        Tensor: Of shape (N, K).

    Examples::

        >>> alphas, gradients = torch.tensor([[[0.25, 0.75, 0.5]]]), torch.tensor([[[1.0, 2.0, -1.0]]])
        >>> sum_of_alphas(alphas, gradients), sum_of_alphas(2 * alphas, gradients, normalize_alpha=True)
        (tensor([[1.7500]]), tensor([[1.7500]]))
    """
    dims = _spatial(gradients)
    if normalize_alpha:
        alphas = torch.where(gradients > 0, alphas, 0.0)
        total = alphas.sum(dims, keepdim=True)
        counts = total.abs() > FLOOR * alphas.abs().sum(dims, keepdim=True)
        alphas = torch.where(counts, alphas / torch.where(counts, total, 1.0), 0.0)
    return (alphas * gradients.relu()).sum(dims)


#: Of some smooth functions of the score, the second and third derivatives, without common factors.
SMOOTH_FUNCTIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "exp": lambda s: (torch.ones_like(s), torch.ones_like(s)),
    "softplus": lambda s: (torch.ones_like(s), -torch.tanh(s / 2)),
    "sigmoid": lambda s: (-torch.tanh(s / 2), 1 - 6 * torch.sigmoid(s) * torch.sigmoid(-s)),
    "square": lambda s: (torch.ones_like(s), torch.zeros_like(s)),
    "identity": lambda s: (torch.zeros_like(s), torch.zeros_like(s)),
}


def smooth_derivatives(
    phi: str | Callable[[Tensor], Tensor], score: Tensor, gradients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ``phi(score)`` by activations on which the score depends linearly, up to common factors.

    With the score's gradient ``g`` and the derivatives ``p1, p2, p3`` of ``phi`` they are ``p1 g``, ``p2 g**2`` and
    ``p3 g**3``. Of the first only the sign of ``p1`` is kept, and the others are divided by ``g**2``, which changes
    none of :func:`pixel_alphas`. Where ``p2`` is 0 (up to rounding, beside ``p3``) every pixel counts the same.

    Args:
        phi (str or callable): A name in ``SMOOTH_FUNCTIONS``, or a function from (N,) to (N,).
        score (Tensor): Of shape (N,).
        gradients (Tensor): Of shape ``(N, K, *spatial)``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: First, second and third derivatives, of the gradients' shape.

    Raises:
        ValueError: If a callable does not return one number for each score, or none that autograd follows.

    Examples::

        >>> gradients = torch.tensor([[[2.0, -1.0]]])
        >>> smooth_derivatives(lambda s: s**3, torch.tensor([1.0]), gradients)
        (tensor([[[ 2., -1.]]]), tensor([[[6., 6.]]]), tensor([[[12., -6.]]]))
    """
    if isinstance(phi, str):
        sign, (second, third) = torch.ones_like(score), SMOOTH_FUNCTIONS[phi](score)
        if phi == "square":
            sign = score.sign()
    else:
        first, second, third = _three_derivatives(phi, score)
        sign = first.sign()
    uniform = second.abs() <= FLOOR * third.abs()
    second, third = torch.where(uniform, 1.0, second), torch.where(uniform, 0.0, third)
    sign, second, third = (
        each.to(gradients).reshape(-1, *[1] * (gradients.dim() - 1)) for each in (sign, second, third)
    )
    return sign * gradients, second.expand_as(gradients), third * gradients


def _three_derivatives(phi: Callable[[Tensor], Tensor], score: Tensor) -> list[Tensor]:
    found = [torch.zeros_like(score) for _ in range(3)]
    with torch.inference_mode(False), torch.enable_grad():
        variable = score.detach().clone().requires_grad_()
        value: Any = phi(variable)
        if not isinstance(value, Tensor) or value.shape != score.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"phi must return a tensor of the scores' shape {tuple(score.shape)}, not {shape}")
        if not value.requires_grad:
            raise ValueError("phi must depend on the scores in a way that autograd can differentiate")
        for into in found:
            (value,) = torch.autograd.grad(value.sum(), variable, create_graph=True, allow_unused=True)
            if value is None or not value.requires_grad:
                into += 0 if value is None else value
                break
            into += value.detach()
    return found


def softmax_derivatives(probabilities: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the first class's softmax by activations on which all scores depend linearly, without ``p_1``.

    With ``u = g_1 - m``, ``m``, ``V`` and ``k`` the mean, variance and third central moment of the classes' gradients
    under their probabilities: ``u``, ``u**2 - V`` and ``u**3 - 3 u V - k``.

    Args:
        probabilities (Tensor): Of shape (N, m); they sum to 1.
        gradients (Tensor): Of each class's score, of shape ``(m, N, K, *spatial)``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: First, second and third derivatives, of shape ``(N, K, *spatial)``.

    Examples::

        >>> softmax_derivatives(torch.tensor([[0.5, 0.5]]), torch.tensor([[[[2.0]]], [[[0.0]]]]))
        (tensor([[[1.]]]), tensor([[[0.]]]), tensor([[[-2.]]]))
    """
    weights = probabilities.T.to(gradients).reshape(*gradients.shape[:2], *[1] * (gradients.dim() - 2))
    centred = gradients - (weights * gradients).sum(0)
    variance, third = ((weights * centred**power).sum(0) for power in (2, 3))
    first = centred[0]
    return first, first**2 - variance, first**3 - 3 * first * variance - third


def shares(values: Tensor) -> Tensor:
    """Values that are not negative, (N, L), divided by their sum; zeros where it is 0.

    Examples::

        >>> shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    total = values.sum(1, keepdim=True)
    return torch.where(total > 0, values / torch.where(total > 0, total, 1.0), 0.0)


def layer_weights(gradient: Tensor, activation: Tensor, weighting: str = "mean", balance: float = 0.5) -> Tensor:
    """What each of several layers weighs, from the mean magnitudes of its gradients and activations.

    Args:
        gradient (Tensor): Mean absolute gradient of each layer, of shape (N, L).
        activation (Tensor): Mean absolute activation, of the same shape.
        weighting (str): The ``"mean"`` of both shares, their ``"product"``, or ``"uniform"``. Default: ``"mean"``
        balance (float): What the gradient's share counts in the mean. Default: 0.5

    Returns:
        Tensor: Of shape (N, L), each row summing to 1; uniform where nothing tells the layers apart.

    Examples::

        >>> layer_weights(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([[0.3750, 0.6250]])
    """
    by_gradient, by_activation = shares(gradient), shares(activation)
    if weighting == "mean":
        weights = shares(balance * by_gradient + (1 - balance) * by_activation)
    elif weighting == "product":
        weights = shares(by_gradient * by_activation)
    else:
        weights = torch.ones_like(by_gradient) / by_gradient.shape[1]
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, 1 / weights.shape[1])


def distinct_maps(maps: Tensor, weights: Tensor, threshold: float | None) -> Tensor:
    """Which of several maps to fuse: not the constant ones, and of similar ones that with the largest weight.

    Args:
        maps (Tensor): Normalised, of shape ``(N, L, *spatial)``.
        weights (Tensor): Of shape (N, L).
        threshold (float, optional): Two maps are similar if they differ by less than this on average; None finds none.

    Returns:
        Tensor: bool, of shape (N, L).

    Examples::

        >>> maps = torch.tensor([[[0.0, 1.0], [0.0, 0.9], [1.0, 0.0], [0.0, 0.0]]])
        >>> distinct_maps(maps, torch.tensor([[0.2, 0.3, 0.1, 0.4]]), 0.1)
        tensor([[False,  True,  True, False]])
    """
    kept = maps.flatten(2).amax(2) > 0
    if threshold is None:
        return kept
    flat = maps.flatten(2)
    differences = torch.stack([(flat - flat[:, layer : layer + 1]).abs().mean(2) for layer in range(flat.shape[1])], 2)
    for example, order in enumerate(weights.argsort(dim=1, descending=True, stable=True).tolist()):
        chosen: list[int] = []
        for layer in order:
            near = any(differences[example, layer, other] < threshold for other in chosen)
            if kept[example, layer] and not near:
                chosen.append(layer)
            else:
                kept[example, layer] = False
    return kept


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


def chunk_channels(activations: Tensor, groups: int) -> Tensor:
    """Contiguous groups of channels, as equal as can be: Group-CAM's [9].

    Args:
        activations (Tensor): Of shape ``(N, K, *spatial)``.
        groups (int): How many groups; no more than there are channels.

    Returns:
        Tensor: int64, of shape (N, K): the group of each channel, from 0 to ``min(groups, K) - 1``.

    Examples::

        >>> chunk_channels(torch.zeros(1, 5, 2), 2)
        tensor([[0, 0, 0, 1, 1]])
    """
    channels = activations.shape[1]
    groups = min(groups, channels)
    return (torch.arange(channels, device=activations.device) * groups // channels).expand(activations.shape[:2])


def cluster_channels(activations: Tensor, groups: int, iterations: int = 20) -> Tensor:
    """Groups of channels with similar maps: k-means on the maps normalised to [0, 1].

    The first centre is the channel with the largest norm, each further one the channel farthest from those before,
    so that nothing is random.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        groups (int): How many groups; no more than there are channels.
        iterations (int): Of Lloyd's algorithm, at most. Default: 20

    Returns:
        Tensor: int64, of shape (N, K): the group of each channel.

    Examples::

        >>> cluster_channels(torch.tensor([[[0.0, 1.0], [3.0, 0.0], [0.0, 5.0], [1.0, 0.0]]]), 2)
        tensor([[0, 1, 0, 1]])
    """
    channels = activations.shape[1]
    flat = activations.flatten(2)
    maps = precise(normalize(flat.flatten(0, 1))).reshape(flat.shape)
    groups = min(groups, channels)
    norms = maps.square().sum(2)
    chosen = norms.argmax(1, keepdim=True)
    distances = torch.full_like(norms, math.inf)
    for _ in range(groups - 1):
        newest = maps.gather(1, chosen[:, -1:, None].expand(-1, -1, maps.shape[2]))
        distances = torch.minimum(distances, (maps - newest).square().sum(2))
        chosen = torch.cat([chosen, distances.argmax(1, keepdim=True)], 1)
    centres = maps.gather(1, chosen[..., None].expand(-1, -1, maps.shape[2]))
    labels = torch.full_like(norms, -1, dtype=torch.long)
    for _ in range(iterations):
        before = labels
        # |m - c|^2 without |m|^2, which is the same for all centres.
        labels = (centres.square().sum(2)[:, None] - 2 * maps @ centres.transpose(1, 2)).argmin(2)
        if torch.equal(labels, before):
            break
        member = F.one_hot(labels, groups).to(maps.dtype)
        sizes = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ maps / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return labels


def rise_masks(grids: Tensor, shifts: Tensor, size: Sequence[int]) -> Tensor:
    """RISE's masks [11]: random grids, stretched to one cell more than the input, of which a shifted part is cut.

    Args:
        grids (Tensor): Floating point, of shape ``(R, 1, *cells)``, zeros and ones.
        shifts (Tensor): Of shape (R, spatial dimensions), in shares of a cell, 0 to 1.
        size (sequence of int): The spatial size of a mask, in pixels.

    Returns:
        Tensor: Of shape ``(R, 1, *size)``, in [0, 1].

    Examples::

        >>> rise_masks(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0.0]]), (4,))
        tensor([[[0.0000, 0.0000, 0.3333, 0.6667]]])
    """
    cells = [-(-pixels // n) for pixels, n in zip(size, grids.shape[2:], strict=True)]
    stretched = upsample(grids, [(n + 1) * cell for n, cell in zip(grids.shape[2:], cells, strict=True)])
    starts = (shifts.to("cpu", torch.float64) * torch.tensor(cells, device="cpu")).long().tolist()
    parts = []
    for mask, start in zip(stretched, starts, strict=True):
        for dim, (first, pixels) in enumerate(zip(start, size, strict=True)):
            mask = mask.narrow(dim + 1, first, pixels)
        parts.append(mask)
    return torch.stack(parts)


def members(labels: Tensor, groups: int, of: Tensor | None = None) -> Tensor:
    """Which channels belong to each group.

    Args:
        labels (Tensor): int64, of shape (N, K): the group of each channel.
        groups (int): How many groups there are.
        of (Tensor, optional): bool, of shape (N, K): count these channels only. Default: None

    Returns:
        Tensor: bool, of shape (N, groups, K).

    Examples::

        >>> members(torch.tensor([[0, 1, 0]]), 2)
        tensor([[[ True, False,  True],
                 [False,  True, False]]])
    """
    found = labels[:, None] == torch.arange(groups, device=labels.device)[:, None]
    return found if of is None else found & of[:, None]


def smooth_neighbours(maps: Tensor) -> Tensor:
    """Each value spread over its neighbours by the kernel ``[1 2 1] / 4`` along every spatial dimension.

    Args:
        maps (Tensor): Floating point, of shape ``(N, 1, *spatial)``.

    Returns:
        Tensor: Of the same shape and dtype. What falls over the border is lost.

    Examples::

        >>> smooth_neighbours(torch.tensor([[[0.0, 4.0, 0.0, 0.0]]]))
        tensor([[[1., 2., 1., 0.]]])
    """
    for dim in _spatial(maps):
        moved = F.pad(maps.movedim(dim, -1), (1, 1))
        maps = ((moved[..., :-2] + 2 * moved[..., 1:-1] + moved[..., 2:]) / 4).movedim(-1, dim)
    return maps


def similar_channels(activations: Tensor, quantile: float) -> Tensor:
    """FD-CAM's groups: the channels whose cosine similarity to a channel exceeds a quantile of all similarities to it.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        quantile (float): From 0 to 1.

    Returns:
        Tensor: bool, of shape (N, K, K): whether the second channel is in the first one's group. The group of a
        channel that is all zero is empty.

    Examples::

        >>> similar_channels(torch.tensor([[[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]]), 0.5)
        tensor([[[False, False, False],
                 [False, False, False],
                 [False, False,  True]]])
    """
    flat = precise(activations).flatten(2)
    norms = flat.norm(dim=2, keepdim=True)
    flat = torch.where(norms > 0, flat / torch.where(norms > 0, norms, 1.0), 0.0)
    groups = torch.empty(*flat.shape[:2], flat.shape[1], dtype=torch.bool, device=flat.device)
    for into, maps in zip(groups, flat, strict=True):  # one at a time: K * K numbers are many
        similarity = maps @ maps.T
        threshold = percentile(similarity, 100 * quantile)
        torch.gt(similarity, threshold + FLOOR * threshold.abs(), out=into)
    return groups


def group_maps(activations: Tensor, labels: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Group-CAM's group maps [9]: ReLU of the weighted sum of each group's channels.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        labels (Tensor): int64, of shape (N, K): the group of each channel.
        weights (Tensor): Of shape (N, K), the mean gradients.
        groups (int): How many groups there are.

    Returns:
        Tensor: Of shape ``(N, groups, *spatial)``, not negative.

    Examples::

        >>> activations = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
        >>> group_maps(activations, torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, -0.5, 2.0]]), 2)
        tensor([[[ 0.,  0.],
                 [10., 12.]]])
    """
    activations = at_least_float32(activations)
    member = F.one_hot(labels, groups).to(activations.dtype) * weights.to(activations.dtype)[..., None]
    return (member.transpose(1, 2) @ activations.flatten(2)).relu().reshape(-1, groups, *activations.shape[2:])


def gaussian_blur(x: Tensor, kernel_size: int = 51, sigma: float = 50.0) -> Tensor:
    """Gaussian blur over all spatial dimensions, with reflected borders.

    Args:
        x (Tensor): Floating point, of shape ``(N, C, *spatial)``.
        kernel_size (int): In pixels, odd. Where the input is too small to be reflected so far, as large as can be.
            Default: 51
        sigma (float): Standard deviation in pixels. Default: 50

    Returns:
        Tensor: Of the same shape, float32 (float64 if ``x`` is).

    Examples::

        >>> gaussian_blur(torch.tensor([[[0.0, 0.0, 3.0, 0.0, 0.0]]]), 3, 1e6)
        tensor([[[0., 1., 1., 1., 0.]]])
    """
    x = at_least_float32(x)
    for dim in _spatial(x):
        pixels = x.shape[dim]
        half = min(kernel_size // 2, pixels - 1)
        offsets = torch.arange(-half, half + 1, device=x.device)
        kernel = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma) ** 2)
        sources = (torch.arange(pixels, device=x.device)[:, None] + offsets).abs()
        sources = torch.where(sources < pixels, sources, 2 * (pixels - 1) - sources)
        matrix = x.new_zeros(pixels, pixels).scatter_add_(1, sources, (kernel / kernel.sum()).expand(pixels, -1))
        x = (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    return x


def principal_component(activations: Tensor, center: bool = False) -> Tensor:
    """Eigen-CAM [10]: the activations' positions, projected on the first right singular vector of their channels.

    A singular vector has no sign of its own. It is chosen so that the map's sum is positive, or, where the sum is 0
    up to rounding, so that its largest value by magnitude is.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        center (bool): Subtract each channel's mean first, as in a principal component analysis. Default: False

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, signed.

    Examples::

        >>> principal_component(torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]))
        tensor([[[5., 0.]]])
    """
    maps = principal_components(activations, 1, center)
    flat = maps.flatten(2)
    total = flat.sum(2, keepdim=True)
    downward = total < -1e-4 * flat.abs().sum(2, keepdim=True)
    return torch.where(downward, -flat, flat).reshape(maps.shape)


def principal_components(activations: Tensor, number: int, center: bool) -> Tensor:
    """The positions of the activations in the directions of their first singular vectors.

    A singular vector has no sign of its own; each map's largest value by magnitude is made positive.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        number (int): How many; no more than there are channels or positions.
        center (bool): Subtract each channel's mean first.

    Returns:
        Tensor: Of shape ``(N, min(number, K, positions), *spatial)``, in the order of falling singular values.

    Examples::

        >>> principal_components(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), 2, center=False)
        tensor([[[3., 0.],
                 [0., 2.]]])
    """
    activations = at_least_float32(activations)
    table = precise(activations).flatten(2).transpose(1, 2)  # (N, positions, K)
    if center:
        table = table - table.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(table, full_matrices=False)
    found: Tensor = (left * values[:, None])[:, :, :number].transpose(1, 2)
    found = found * found.gather(2, found.abs().argmax(2, keepdim=True)).sign()
    return found.reshape(*found.shape[:2], *activations.shape[2:]).to(activations.dtype)


def affine_grids(angles: Tensor, moves: Tensor, size: Sequence[int]) -> Tensor:
    """Sampling grids of rotations about the centre followed by shifts, for ``torch.nn.functional.grid_sample``.

    Args:
        angles (Tensor): In radians, of shape (L,).
        moves (Tensor): Shifts in x and y, in shares of the width and the height, of shape (L, 2).
        size (sequence of int): Height and width in pixels. They may differ; the rotation is one in pixels.

    Returns:
        Tensor: Of shape (L, height, width, 2).

    Examples::

        >>> affine_grids(torch.zeros(1), torch.zeros(1, 2), (2, 2))[0, 0]
        tensor([[-0.5000, -0.5000],
                [ 0.5000, -0.5000]])
    """
    height, width = size
    cos, sin, aspect = angles.cos(), angles.sin(), height / width
    rows = [torch.stack([cos, -sin * aspect], 1), torch.stack([sin / aspect, cos], 1)]
    matrices = torch.cat([torch.stack(rows, 1), 2 * moves[..., None]], 2)
    return F.affine_grid(matrices, [len(angles), 1, height, width], align_corners=False)


def coarsening(grids: Tensor, cells: Sequence[int]) -> Tensor:
    """What a fine map looks like, moved and averaged over coarse cells, as one sparse matrix.

    Args:
        grids (Tensor): Sampling grids, of shape (L, height, width, 2): :func:`affine_grids`. Zeros lie outside.
        cells (sequence of int): Rows h and columns w of the coarse map.

    Returns:
        Tensor: Sparse CSR, in the dtype of ``grids``, of shape (L * h * w, height * width).

    Examples::

        >>> matrix = coarsening(affine_grids(torch.zeros(1), torch.zeros(1, 2), (1, 4)), (1, 2))
        >>> matrix.to_dense()
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000]])
    """
    height, width = grids.shape[1:3]
    sides = [
        torch.arange(pixels, device=grids.device) * n // pixels
        for pixels, n in zip((height, width), cells, strict=True)
    ]
    cell = sides[0][:, None] * cells[1] + sides[1]
    share = (1 / torch.bincount(cell.flatten()).to(grids.dtype))[cell]
    parts = []
    for grid in grids:  # one at a time, because the entries of all of them before they are summed would be many
        at = ((grid + 1) * grid.new_tensor([width, height]) - 1) / 2
        rows, columns, values = [], [], []
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pixel = at.floor() + grid.new_tensor(corner)
            inside = ((pixel >= 0) & (pixel < grid.new_tensor([width, height]))).all(-1)
            x, y = pixel[inside].unbind(-1)
            rows.append(cell[inside])
            columns.append((y * width + x).long())
            values.append(((1 - (at - pixel).abs()).prod(-1) * share)[inside])
        indices = torch.stack([torch.cat(rows), torch.cat(columns)])
        size = (cells[0] * cells[1], height * width)
        part = torch.sparse_coo_tensor(indices, torch.cat(values), size, device=grids.device, check_invariants=False)
        parts.append(part.coalesce())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # CSR is called a beta in every release
        return torch.cat(parts).coalesce().to_sparse_csr()


def super_resolve(
    maps: Tensor, grids: Tensor, tv_weight: float, energy_weight: float, iterations: int = 200, rate: float = 1e-3
) -> Tensor:
    """Augmented Grad-CAM's super-resolution [12]: the fine map whose moved, coarsened copies fit the maps best.

    It minimises ``sum_l |D T_l h - g_l|^2 + tv_weight TV(h) + energy_weight |h|^2`` from ``h = 0`` by Adam, where
    ``T_l`` samples ``h`` at the l-th grid, ``D`` averages over the cells of the coarse map, and ``TV`` is the
    anisotropic total variation, smoothed, ``sqrt(d**2 + 0.003**2)`` for a difference ``d``, because the kink of
    ``|d|`` would blow up rounding errors. Each example is minimised by itself.

    Args:
        maps (Tensor): Coarse maps, floating point, of shape (N, L, h, w); NaN maps are left out.
        grids (Tensor): Of shape (L, height, width, 2): :func:`affine_grids`.
        tv_weight (float): Of the total variation.
        energy_weight (float): Of the squared norm.
        iterations (int): Steps of Adam. Default: 200
        rate (float): Adam's learning rate. Default: 0.001

    Returns:
        Tensor: Of shape (N, 1, height, width), float64 (float32 on devices without it).

    Examples::

        >>> grids = affine_grids(torch.zeros(1), torch.zeros(1, 2), (2, 4))
        >>> super_resolve(torch.tensor([[[[0.0, 1.0]]]]), grids, 0.0, 0.0, iterations=200, rate=0.05) > 0.5
        tensor([[[[False, False,  True,  True],
                  [False, False,  True,  True]]]])
    """
    maps, grids, size = precise(maps), precise(grids), grids.shape[1:3]
    with torch.inference_mode(False), torch.no_grad(), maps.device:  # Adam makes a tensor on the default device
        counts = maps.isfinite().flatten(1).T  # (L * h * w, N)
        wanted = torch.where(maps.isfinite(), maps, 0.0).flatten(1).T
        forward: Any = coarsening(grids, maps.shape[2:])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse")
            backward = forward.to_sparse_coo().t().coalesce().to_sparse_csr()
        fine = maps.new_zeros(size[0] * size[1], len(maps))
        optimizer = torch.optim.Adam([fine], lr=rate)
        for _ in range(iterations):
            gradient = 2 * (backward @ (counts * (forward @ fine - wanted))) + 2 * energy_weight * fine
            image = fine.reshape(*size, -1)
            for dim in (0, 1):
                steps = image.diff(dim=dim)
                signs = steps / (steps.square() + 3e-3**2).sqrt()
                edge = torch.zeros_like(image.narrow(dim, 0, 1))
                slope = torch.cat([edge, signs], dim) - torch.cat([signs, edge], dim)
                gradient += tv_weight * slope.reshape(fine.shape)
            fine.grad = gradient
            optimizer.step()
    return fine.T.reshape(-1, 1, *size)


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


def drop(whole: Tensor, part: Tensor) -> Tensor:
    """Average Drop, example by example: ``100 max(0, Y - O) / Y``; 0 where ``Y = 0``, and for differences within noise.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: In percent of ``Y``.

    Examples::

        >>> drop(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.5]))
        tensor([50.,  0.,  0.])
    """
    return torch.where(whole != 0, 100 * contribution(whole, part).relu() / torch.where(whole != 0, whole, 1.0), 0.0)


def increase(whole: Tensor, part: Tensor) -> Tensor:
    """Average Increase, example by example: 100 where ``O > Y`` by more than noise, else 0.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: 0 or 100.

    Examples::

        >>> increase(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]))
        tensor([  0., 100.])
    """
    return 100 * (contribution(part, whole) > 0).to(whole.dtype)


def gain(whole: Tensor, part: Tensor) -> Tensor:
    """Average Gain, example by example: ``100 max(0, O - Y) / (1 - Y)``; 0 where ``Y = 1``. For probabilities.

    Args:
        whole (Tensor): ``Y``, the score of the input as it is.
        part (Tensor): ``O``, the score of its highlighted part.

    Returns:
        Tensor: In percent of ``1 - Y``.

    Examples::

        >>> gain(torch.tensor([0.5, 1.0]), torch.tensor([0.75, 1.0]))
        tensor([50.,  0.])
    """
    room = 1 - whole
    return torch.where(room > 0, 100 * contribution(part, whole).relu() / torch.where(room > 0, room, 1.0), 0.0)


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
