"""Channels: weights, groups and decompositions of a layer's channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_fusion.functional.maps import FLOOR, at_least_float32, normalize, percentile, precise, varies
from captum_fusion.functional.scores import contribution


def live_channels(activations: Tensor) -> Tensor:
    """Which channels vary over space. Constant channels, such as those that are all zero after a ReLU, cannot mask.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.

    Returns:
        Tensor: bool, of shape (N, K).

    Examples::

        >>> live_channels(torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 2.0]]]))
        tensor([[False, False,  True]])
    """
    flat = at_least_float32(activations).flatten(2)
    return varies(flat.amin(2), flat.amax(2))


def channel_pairs(live: Tensor) -> tuple[Tensor, Tensor]:
    """Examples and channels of all live channels: first the first live channel of every example, then the second, ...

    Args:
        live (Tensor): Live channels, bool, of shape (N, K).

    Returns:
        tuple[Tensor, Tensor]: Examples and channels, int64, of shape (P,) each.

    Examples::

        >>> channel_pairs(torch.tensor([[True, False, True], [False, True, True]]))
        (tensor([0, 1, 0, 1]), tensor([0, 1, 2, 2]))
    """
    examples, channels = live.nonzero(as_tuple=True)
    rank = (live.cumsum(1) - 1)[examples, channels]
    order = rank.argsort(stable=True)
    return examples[order], channels[order]


def channel_table(live: Tensor, examples: Tensor, channels: Tensor, values: Tensor) -> Tensor:
    """Values of (example, channel) pairs as a table, with 0 for all other channels.

    Args:
        live (Tensor): Live channels, bool, of shape (N, K). Only its shape is used.
        examples (Tensor): Example of each pair, int64, of shape (P,).
        channels (Tensor): Channel of each pair, int64, of shape (P,).
        values (Tensor): Value of each pair, of shape (P,).

    Returns:
        Tensor: Of shape (N, K), in the dtype of ``values``.

    Examples::

        >>> channel_table(torch.ones(2, 2).bool(), torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([5.0, 7.0]))
        tensor([[0., 5.],
                [7., 0.]])
    """
    return values.new_zeros(live.shape).index_put((examples, channels), values)


def weighted_activations(activations: Tensor, weights: Tensor) -> Tensor:
    """ReLU of the sum over channels of weight times activation, the last step of Score-CAM [3] and similar methods.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        weights (Tensor): Channel weights, of shape (N, K).

    Returns:
        Tensor: Of shape ``(N, 1, *spatial)``, non-negative.

    Examples::

        >>> weighted_activations(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[1.0, -0.5]]))
        tensor([[[0., 2.]]])
    """
    activations = at_least_float32(activations)
    weights = weights.to(activations.dtype).reshape(*weights.shape, *[1] * (activations.dim() - 2))
    return (weights * activations).sum(1, keepdim=True).relu()


def softmax_weights(scores: Tensor, live: Tensor) -> Tensor:
    """Score-CAM's weights [3, algorithm 1]: softmax of the masked scores over an example's live channels.

    The paper uses the increase over the baseline. The result is the same, because the baseline's score cancels in the
    softmax.

    Args:
        scores (Tensor): Raw score of the input masked by each channel, of shape (N, K). Ignored for dead channels.
        live (Tensor): Live channels, bool, of shape (N, K), see :func:`live_channels`.

    Returns:
        Tensor: Of shape (N, K). The weights of an example's live channels sum to 1; those of dead channels are 0.

    Examples::

        >>> softmax_weights(torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    weights = at_least_float32(scores).masked_fill(~live, -math.inf).softmax(1)
    return torch.where(live, weights, 0.0)


def increase_weights(scores: Tensor, baseline: Tensor, live: Tensor, signed: bool = False) -> Tensor:
    """Each live channel's increase in score over the baseline; 0 for a decrease, unless ``signed``.

    Args:
        scores (Tensor): Score of the input masked by each channel, of shape (N, K). Ignored for dead channels.
        baseline (Tensor): Score of the baseline, of shape (N,).
        live (Tensor): Live channels, bool, of shape (N, K), see :func:`live_channels`.
        signed (bool): Whether a decrease has a negative weight. Default: False

    Returns:
        Tensor: Of shape (N, K).

    Examples::

        >>> increase_weights(torch.tensor([[0.7, 0.1]]), torch.tensor([0.2]), torch.tensor([[True, True]]))
        tensor([[0.5000, 0.0000]])
    """
    increases = contribution(scores, baseline[:, None])
    return torch.where(live, increases if signed else increases.relu(), 0.0)


def chunk_channels(activations: Tensor, groups: int) -> Tensor:
    """Contiguous groups of channels of nearly equal size, as in Group-CAM [9].

    Args:
        activations (Tensor): Of shape ``(N, K, *spatial)``.
        groups (int): Number of groups, at most the number of channels.

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

    The initialisation is deterministic: the first centre is the channel with the largest norm, and each further centre
    is the channel farthest from the centres before it.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        groups (int): Number of groups, at most the number of channels.
        iterations (int): Maximum number of iterations of Lloyd's algorithm. Default: 20

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
        # |m - c|^2 without |m|^2, which is equal for all centres.
        labels = (centres.square().sum(2)[:, None] - 2 * maps @ centres.transpose(1, 2)).argmin(2)
        if torch.equal(labels, before):
            break
        member = F.one_hot(labels, groups).to(maps.dtype)
        sizes = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ maps / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return labels


#: Functions that group channels, by name.
GROUPINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"chunks": chunk_channels, "clusters": cluster_channels}


def members(labels: Tensor, groups: int, of: Tensor | None = None) -> Tensor:
    """Which channels belong to each group.

    Args:
        labels (Tensor): Group of each channel, int64, of shape (N, K).
        groups (int): Number of groups.
        of (Tensor, optional): Channels to include, bool, of shape (N, K). Default: None (all)

    Returns:
        Tensor: bool, of shape (N, groups, K).

    Examples::

        >>> members(torch.tensor([[0, 1, 0]]), 2)
        tensor([[[ True, False,  True],
                 [False,  True, False]]])
    """
    belongs = labels[:, None] == torch.arange(groups, device=labels.device)[:, None]
    return belongs if of is None else belongs & of[:, None]


def similar_channels(activations: Tensor, quantile: float) -> Tensor:
    """FD-CAM's groups: channels whose cosine similarity to a channel exceeds a quantile of all similarities to it.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        quantile (float): Quantile, 0 to 1.

    Returns:
        Tensor: bool, of shape (N, K, K): whether the second channel is in the first one's group. Channels that are all
        zero have an empty group.

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
    for into, maps in zip(groups, flat, strict=True):  # one at a time, because K * K similarities take much memory
        similarity = maps @ maps.T
        threshold = percentile(similarity, 100 * quantile)
        torch.gt(similarity, threshold + FLOOR * threshold.abs(), out=into)
    return groups


def group_maps(activations: Tensor, labels: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Group-CAM's group maps [9]: ReLU of the weighted sum of each group's channels.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        labels (Tensor): Group of each channel, int64, of shape (N, K).
        weights (Tensor): Mean gradients, of shape (N, K).
        groups (int): Number of groups.

    Returns:
        Tensor: Of shape ``(N, groups, *spatial)``, non-negative.

    Examples::

        >>> activations = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
        >>> group_maps(activations, torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, -0.5, 2.0]]), 2)
        tensor([[[ 0.,  0.],
                 [10., 12.]]])
    """
    activations = at_least_float32(activations)
    member = F.one_hot(labels, groups).to(activations.dtype) * weights.to(activations.dtype)[..., None]
    return (member.transpose(1, 2) @ activations.flatten(2)).relu().reshape(-1, groups, *activations.shape[2:])


def principal_component(activations: Tensor, center: bool = False) -> Tensor:
    """Eigen-CAM [10]: the activations at each position, projected on the first right singular vector.

    The decomposition does not determine the sign of a singular vector. It is chosen so that the sum of the map is
    positive or, if the sum is 0 up to rounding, so that the value of largest magnitude is positive.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        center (bool): Whether to subtract each channel's mean first, as in principal component analysis. Default: False

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


def principal_components(activations: Tensor, number: int, center: bool = True) -> Tensor:
    """The activations at each position, projected on the first right singular vectors.

    The decomposition does not determine the signs. They are chosen so that each map's value of largest magnitude is
    positive; among values whose magnitudes are equal up to rounding, the first one.

    Args:
        activations (Tensor): Floating point, of shape ``(N, K, *spatial)``.
        number (int): Number of components, at most the number of channels and of positions.
        center (bool): Whether to subtract each channel's mean first. Default: True

    Returns:
        Tensor: Of shape ``(N, min(number, K, positions), *spatial)``, in descending order of singular values; NaN for
        examples that are not finite.

    Examples::

        >>> principal_components(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), 2, center=False)
        tensor([[[3., 0.],
                 [0., 2.]]])
    """
    activations = at_least_float32(activations)
    table = precise(activations).flatten(2).transpose(1, 2)  # (N, positions, K)
    broken = ~table.isfinite().flatten(1).all(1)[:, None, None]  # examples that have no decomposition
    table = table.masked_fill(broken, 0.0)
    if center:
        table = table - table.mean(1, keepdim=True)
    left, values, _ = torch.linalg.svd(table, full_matrices=False)
    maps: Tensor = (left * values[:, None])[:, :, :number].transpose(1, 2)
    magnitudes = maps.abs()
    peaks = magnitudes >= (1 - 1e-4) * magnitudes.amax(2, keepdim=True)  # two positions have opposite values
    maps = maps * maps.gather(2, peaks.int().argmax(2, keepdim=True)).sign()
    maps = maps.masked_fill(broken, math.nan)
    return maps.reshape(*maps.shape[:2], *activations.shape[2:]).to(activations.dtype)
