"""Gradient maps: formulas for a layer's activations and gradients, and the fusion of several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_fusion.functional.maps import FLOOR, at_least_float32, normalize, spatial_dims, upsample


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
    return (gradients.mean(spatial_dims(gradients), keepdim=True) * activations).sum(1, keepdim=True)


def hires_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM [5] before its ReLU: activations times their gradients, summed over channels.

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
    """LayerCAM [8]: activations times the positive part of their gradients, summed over channels, followed by a ReLU.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, non-negative.

    Examples::

        >>> layer_cam(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]]))
        tensor([[[1., 2.]]])
    """
    return hires_cam(activations, at_least_float32(gradients).relu()).relu()


def fuse_layer_cams(maps: Sequence[Tensor], size: Sequence[int], gamma: float = 2.0) -> Tensor:
    """LayerCAM's fusion of several layers [8]: the maximum of their maps, with a tanh scaling for early layers.

    Args:
        maps (sequence of Tensor): Non-negative maps, ``(N, 1, *spatial)`` each, in the order of the network.
        size (sequence of int): Spatial size of the result, in pixels.
        gamma (float): Scale of early layers. All maps but the last are scaled to ``tanh(gamma M / max M)``, the last to
            ``M / max M``. Default: 2

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
        shares.append(torch.where(largest <= 0, 0.0, raised / torch.where(largest <= 0, 1.0, largest)))
    scaled = [torch.tanh(gamma * share) for share in shares[:-1]] + shares[-1:]
    return normalize(torch.stack([single.to(scaled[-1].device) for single in scaled]).amax(0))


def xgrad_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM's weights [7]: a channel's gradients, averaged with its activations as weights.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.

    Returns:
        Tensor: Of shape (N, K); 0 for channels whose activations sum to 0 up to rounding.

    Examples::

        >>> xgrad_cam_weights(torch.tensor([[[1.0, 3.0], [2.0, -2.0]]]), torch.tensor([[[1.0, 2.0], [1.0, 1.0]]]))
        tensor([[1.7500, 0.0000]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    dims = spatial_dims(activations)
    total, noise = activations.sum(dims), FLOOR * activations.abs().sum(dims)
    nothing = total.abs() <= noise
    return torch.where(nothing, 0.0, (activations * gradients).sum(dims) / torch.where(nothing, 1.0, total))


def pixel_alphas(second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """Grad-CAM++'s pixel weights [6, eqs. 10 and 19], ``D2 / (2 D2 + D3 sum_ab A_ab)``.

    Args:
        second (Tensor): Second derivatives of the score with respect to the activations, ``(N, K, *spatial)``.
        third (Tensor): Third derivatives, of the same shape.
        activations (Tensor): Activations, of the same shape. They are summed over space for each channel.

    Returns:
        Tensor: Of the same shape; 0 where the denominator is 0 up to rounding.

    Examples::

        >>> pixel_alphas(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor([[[0.2500, 0.5000]]])
    """
    left = 2 * second
    right = third * at_least_float32(activations).sum(spatial_dims(activations), keepdim=True).to(third.dtype)
    nothing = (left + right).abs() <= FLOOR * (left.abs() + right.abs())
    return torch.where(nothing, 0.0, second / torch.where(nothing, 1.0, left + right))


def grad_cam_plus_plus_weights(activations: Tensor, gradients: Tensor, normalize_alpha: bool = False) -> Tensor:
    """Grad-CAM++'s channel weights [6]: positive gradients, weighted by :func:`pixel_alphas` for ``Y = exp(score)``.

    With the gradient ``g`` of the score, the derivatives of the exponential are
    ``g exp(s), g**2 exp(s), g**3 exp(s)`` (eq. 19, exact if the network is locally linear). The common factor
    ``exp(s)`` is left out. This changes only the scale of the map and avoids overflow.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.
        normalize_alpha (bool): Whether the pixel weights of positive gradients sum to 1 in each channel, as in the
            authors' code. Default: False

    Returns:
        Tensor: Of shape (N, K).

    Examples::

        >>> grad_cam_plus_plus_weights(torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, -1.0]]]))
        tensor([[0.2500]])
    """
    activations, gradients = at_least_float32(activations), at_least_float32(gradients)
    # Numerator and denominator are divided by g**2, which could underflow.
    alphas = pixel_alphas(torch.ones_like(gradients), gradients, activations)
    return sum_of_alphas(alphas, gradients, normalize_alpha)


def sum_of_alphas(alphas: Tensor, gradients: Tensor, normalize_alpha: bool = False) -> Tensor:
    """Channel weights ``sum_ij alpha_ij ReLU(g_ij)`` [6, eq. 5].

    Args:
        alphas (Tensor): Pixel weights, ``(N, K, *spatial)``.
        gradients (Tensor): Gradients, of the same shape.
        normalize_alpha (bool): Whether to divide the alphas by their sum over a channel's positive gradients.
            Default: False

    Returns:
        Tensor: Of shape (N, K).

    Examples::

        >>> alphas, gradients = torch.tensor([[[0.25, 0.75, 0.5]]]), torch.tensor([[[1.0, 2.0, -1.0]]])
        >>> sum_of_alphas(alphas, gradients), sum_of_alphas(2 * alphas, gradients, normalize_alpha=True)
        (tensor([[1.7500]]), tensor([[1.7500]]))
    """
    dims = spatial_dims(gradients)
    if normalize_alpha:
        alphas = torch.where(gradients > 0, alphas, 0.0)
        total = alphas.sum(dims, keepdim=True)
        nothing = total.abs() <= FLOOR * alphas.abs().sum(dims, keepdim=True)
        alphas = torch.where(nothing, 0.0, alphas / torch.where(nothing, 1.0, total))
    return (alphas * gradients.relu()).sum(dims)


#: Second and third derivatives of smooth functions of the score, without common factors.
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
    """Derivatives of ``phi(score)`` with respect to the activations, up to common factors.

    The score is assumed to depend linearly on the activations. With its gradient ``g`` and the derivatives
    ``p1, p2, p3`` of ``phi`` they are ``p1 g``, ``p2 g**2`` and ``p3 g**3``. In the first, ``p1`` is replaced by its
    sign. The other two are divided by ``g**2``, which does not change :func:`pixel_alphas`. If ``p2`` is 0 up to
    rounding in comparison with ``p3``, all pixels get the same alpha.

    Args:
        phi (str or callable): Name in ``SMOOTH_FUNCTIONS``, or function from (N,) to (N,).
        score (Tensor): Scores, of shape (N,).
        gradients (Tensor): Gradients of the score, of shape ``(N, K, *spatial)``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: First, second and third derivatives, of the gradients' shape.

    Raises:
        ValueError: If a callable does not return one number per score, or autograd cannot differentiate it.

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
        factor.to(gradients).reshape(-1, *[1] * (gradients.dim() - 1)) for factor in (sign, second, third)
    )
    return sign * gradients, second.expand_as(gradients), third * gradients


def _three_derivatives(phi: Callable[[Tensor], Tensor], score: Tensor) -> list[Tensor]:
    derivatives = [torch.zeros_like(score) for _ in range(3)]
    with torch.inference_mode(False), torch.enable_grad():
        variable = score.detach().clone().requires_grad_()
        value: Any = phi(variable)
        if not isinstance(value, Tensor) or value.shape != score.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"phi must return a tensor of the scores' shape {tuple(score.shape)}, not {shape}")
        if not value.requires_grad:
            raise ValueError("phi must depend on the scores in a way that autograd can differentiate")
        for into in derivatives:
            (value,) = torch.autograd.grad(value.sum(), variable, create_graph=True, allow_unused=True)
            if value is None or not value.requires_grad:
                into += 0 if value is None else value
                break
            into += value.detach()
    return derivatives


def softmax_derivatives(probabilities: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of the first class's softmax with respect to the activations, without the factor ``p_1``.

    All scores are assumed to depend linearly on the activations. With ``m``, ``V`` and ``k`` the mean, variance and
    third central moment of the classes' gradients under their probabilities, and ``u = g_1 - m``, the derivatives are
    ``u``, ``u**2 - V`` and ``u**3 - 3 u V - k``.

    Args:
        probabilities (Tensor): Probabilities, of shape (N, m). They sum to 1.
        gradients (Tensor): Gradients of each class's score, of shape ``(m, N, K, *spatial)``.

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
    """Non-negative values, (N, L), divided by their sum; zeros where the sum is 0.

    Examples::

        >>> shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    total = values.sum(1, keepdim=True)
    return torch.where(total <= 0, 0.0, values / torch.where(total <= 0, 1.0, total))


def layer_weights(gradient: Tensor, activation: Tensor, weighting: str = "mean", balance: float = 0.5) -> Tensor:
    """Weights of several layers, from the mean magnitudes of their gradients and activations.

    Args:
        gradient (Tensor): Mean absolute gradient of each layer, of shape (N, L).
        activation (Tensor): Mean absolute activation, of the same shape.
        weighting (str): ``"mean"`` of both shares, their ``"product"``, or ``"uniform"``. Default: ``"mean"``
        balance (float): Weight of the gradient share in the mean. Default: 0.5

    Returns:
        Tensor: Of shape (N, L). The weights of an example sum to 1; they are uniform if all weights would be 0.

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
    return torch.where(weights.sum(1, keepdim=True) <= 0, 1 / weights.shape[1], weights)


def distinct_maps(maps: Tensor, weights: Tensor, threshold: float | None) -> Tensor:
    """Which maps to fuse: all that are not constant, and among similar ones only that with the largest weight.

    Args:
        maps (Tensor): Normalised maps, of shape ``(N, L, *spatial)``.
        weights (Tensor): Weights of the maps, of shape (N, L).
        threshold (float, optional): Mean absolute difference below which two maps are similar. None keeps all maps
            that are not constant.

    Returns:
        Tensor: bool, of shape (N, L).

    Examples::

        >>> maps = torch.tensor([[[0.0, 1.0], [0.0, 0.9], [1.0, 0.0], [0.0, 0.0]]])
        >>> distinct_maps(maps, torch.tensor([[0.2, 0.3, 0.1, 0.4]]), 0.1)
        tensor([[False,  True,  True, False]])
    """
    kept = ~(maps.flatten(2).amax(2) <= 0)  # a map that is NaN is kept, so that the result is NaN
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
