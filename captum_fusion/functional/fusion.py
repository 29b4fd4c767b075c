"""Fusion: denoising, the union of two maps, similarity-based fusion, and the mean and product of maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_fusion.functional.maps import FLOOR, at_least_float32, normalize, percentile, spatial_dims, upsample
from captum_fusion.functional.scores import SCORE_FLOOR

#: The weights of two contributions whose sum is below this fraction of the scores are shrunk towards 1/2.
WEIGHT_FLOOR = 10 * SCORE_FLOOR


def denoise_gradients(gradients: Tensor, theta: float) -> Tensor:
    """UnionCAM's denoising [2, eq. 1]: gradients below the ``theta`` percentile of their channel are set to 0.

    Args:
        gradients (Tensor): Signed gradients, of shape ``(N, K, *spatial)``.
        theta (float): Percentile, 0 to 100. 0 changes nothing.

    Returns:
        Tensor: Of the same shape. Spatially constant channels are unchanged for every ``theta``.

    Examples::

        >>> denoise_gradients(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.3000, 0.4000]]])
    """
    gradients = at_least_float32(gradients)
    flat = gradients.flatten(2)
    return _at_least(flat, percentile(flat, theta)).reshape(gradients.shape)


def union_gradient_map(activations: Tensor, gradients: Tensor, theta: float = 10.0, alpha: str = "sum") -> Tensor:
    """UnionCAM's gradient map [2, eqs. 1 to 3], computed pixel by pixel from denoised gradients.

    Eq. 3 of the paper can be read in two ways. ``alpha="sum"``, the reading of all known code, divides the positive
    gradients of a channel by their sum. Every channel with a positive gradient then has the same total weight, and for
    a network that ends in global pooling the map hardly depends on the class. ``alpha="count"`` divides by their
    number, the literal meaning of "average coefficient", and keeps the magnitudes.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        gradients (Tensor): d score / d activations, of the same shape.
        theta (float): Percentile of :func:`denoise_gradients`, 0 to 100. Default: 10
        alpha (str): Reading of eq. 3, ``"sum"`` or ``"count"``. Default: ``"sum"``

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``. Positive gradients of at most 1e-6 times the example's largest
        gradient are treated as 0.

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
    positive = torch.where(positive <= noise, 0.0, positive)
    divisor = positive if alpha == "sum" else (positive > 0).to(positive.dtype)
    divisor = divisor.sum(spatial_dims(positive), keepdim=True)
    share = torch.where(divisor == 0, 0.0, positive / torch.where(divisor == 0, 1.0, divisor))
    return (share * activations).sum(1, keepdim=True)


def _at_least(values: Tensor, threshold: Tensor) -> Tensor:
    """``values`` that reach the threshold, 0 elsewhere. Values within rounding noise of the threshold are kept."""
    slack = FLOOR * values.abs().amax(-1, keepdim=True)
    return torch.where(values < threshold - slack, 0.0, values)


def denoise(maps: Tensor, theta: float) -> Tensor:
    """Fusion-CAM's denoising [1]: values of the map below its ``theta`` percentile are set to 0.

    Values equal to the percentile are kept. If more than ``theta`` percent of a map are 0, nothing changes.

    Args:
        maps (Tensor): Non-negative maps, of shape ``(N, 1, *spatial)``.
        theta (float): Percentile, 0 to 100. 0 changes nothing.

    Returns:
        Tensor: Of the same shape.

    Examples::

        >>> denoise(torch.tensor([[[0.1, 0.2, 0.3, 1.0]]]), 50.0)
        tensor([[[0.0000, 0.0000, 0.3000, 1.0000]]])
    """
    flat = at_least_float32(maps).flatten(1)
    return _at_least(flat, percentile(flat, theta)).reshape(maps.shape)


def contribution_weights(first: Tensor, second: Tensor, scale: Tensor | None = None) -> Tensor:
    """Weights that sum to 1, from two contributions. Negative contributions are set to 0; two zeros give 1/2 each.

    A sum of contributions of at most 3e-5 times ``scale`` (``SCORE_FLOOR``) is rounding noise and gives 1/2 each. From
    there to 3e-4 (``WEIGHT_FLOOR``) the weights go linearly from 1/2 to the contributions' shares, so that noise cannot
    switch them.

    Args:
        first (Tensor): First contribution, of shape (N,).
        second (Tensor): Second contribution, of shape (N,).
        scale (Tensor, optional): Largest magnitude of the scores that the contributions are differences of, of shape
            (N,). Default: None (0)

    Returns:
        Tensor: Of shape (N, 2), in [0, 1].

    Examples::

        >>> contribution_weights(torch.tensor([0.3, -0.2, -0.1]), torch.tensor([0.1, 0.4, 0.0]))
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000],
                [0.5000, 0.5000]])
        >>> contribution_weights(torch.tensor([4e-4, 1.65e-4, 3e-5]), torch.zeros(3), scale=torch.ones(3))
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.5000, 0.5000]])
    """
    pair = torch.stack([first, second], 1).relu()
    total = pair.sum(1, keepdim=True)
    share = torch.where(total == 0, 0.5, pair / torch.where(total == 0, 1.0, total))
    if scale is None:
        return share
    low, high = (floor * scale[:, None] for floor in (SCORE_FLOOR, WEIGHT_FLOOR))
    return torch.where(total >= high, share, 0.5 + ((total - low) / (high - low)).clamp(min=0) * (share - 0.5))


def weigh(maps: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply two maps of shape ``(N, 1, *spatial)`` by the columns of ``weights`` of shape (N, 2).

    Examples::

        >>> weigh((torch.ones(1, 1, 2), torch.ones(1, 1, 2)), torch.tensor([[0.25, 0.75]]))
        (tensor([[[0.2500, 0.2500]]]), tensor([[[0.7500, 0.7500]]]))
    """
    first, second = weights.to(maps[0].dtype).reshape(-1, 2, *[1] * (maps[0].dim() - 1)).unbind(1)
    return maps[0] * first, maps[1] * second


def similarity_fusion(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Fusion-CAM's last step [1]: the maximum of two weighted maps where they agree, their mean where they differ.

    With the similarity ``s = clip(1 - |first - second|, 0, 1)`` the fused map is ``s max + (1 - s) mean``. For
    differences of at most 1 this equals ``max - (first - second)**2 / 2``.

    Args:
        first (Tensor): First weighted map.
        second (Tensor): Second weighted map, of the same shape.

    Returns:
        tuple[Tensor, Tensor]: The fused map, not normalised, and the similarity in [0, 1]; both of the maps' shape.

    Examples::

        >>> similarity_fusion(torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0]))
        (tensor([0.5000, 0.5000]), tensor([1., 0.]))
    """
    similarity = (1 - (first - second).abs()).clamp(0, 1)
    return similarity * torch.maximum(first, second) + (1 - similarity) * (first + second) / 2, similarity


def mean_map(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The mean of the normalised maps of several layers or methods, normalised.

    Args:
        maps (sequence of Tensor): Maps of shape ``(N, 1, *spatial)``, which may differ in their spatial size.
        size (sequence of int): Spatial size of the result, in pixels.

    Returns:
        Tensor: Of shape ``(N, 1, *size)``, in [0, 1], on the device of the first map. A constant map counts as 0.

    Raises:
        ValueError: If ``maps`` is empty.

    Examples::

        >>> mean_map([torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[0.0, 4.0, 4.0]]])], (3,))
        tensor([[[0.0000, 0.7500, 1.0000]]])
    """
    return normalize(torch.stack(_comparable(maps, size)).mean(0))


def product_map(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """RefineCAM: the product of the normalised maps of several layers, normalised.

    What one layer excludes stays excluded, so late layers choose the object and early layers its outline.

    More details in the paper: L. Domeniconi, A. Stramiglio, M. Lombardi, S. Salti, "How to Evaluate and Refine your
    CAM", 2026, https://arxiv.org/abs/2605.14641. As in the authors' code, maps are upsampled before they are
    normalised.

    Args:
        maps (sequence of Tensor): Maps of shape ``(N, 1, *spatial)``, which may differ in their spatial size.
        size (sequence of int): Spatial size of the result, in pixels.

    Returns:
        Tensor: Of shape ``(N, 1, *size)``, in [0, 1], on the device of the first map. 0 everywhere if a map is
        constant.

    Raises:
        ValueError: If ``maps`` is empty.

    Examples::

        >>> product_map([torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[0.0, 4.0, 1.0]]])], (3,))
        tensor([[[0.0000, 1.0000, 0.5000]]])
    """
    return normalize(torch.stack(_comparable(maps, size)).prod(0))


def _comparable(maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
    """The maps at one size and in [0, 1], on the device of the first."""
    if len(maps) == 0:
        raise ValueError("maps must have at least one map")
    return [normalize(upsample(single, size)).to(maps[0].device) for single in maps]
