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
    return varies(flat.amin(2), flat.amax(2))


def channel_pairs(live: Tensor) -> tuple[Tensor, Tensor]:
    """Example and channel of every live channel: the first of all examples, then the second, and so on.

    Args:
        live (Tensor): bool, of shape (N, K).

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
    """Values of (example, channel) pairs as a table, 0 for all other channels.

    Args:
        live (Tensor): bool, of shape (N, K).
        examples (Tensor): int64, of shape (P,).
        channels (Tensor): int64, of shape (P,).
        values (Tensor): Of shape (P,).

    Returns:
        Tensor: Of shape (N, K), in the dtype of ``values``.

    Examples::

        >>> channel_table(torch.ones(2, 2).bool(), torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([5.0, 7.0]))
        tensor([[0., 5.],
                [7., 0.]])
    """
    return values.new_zeros(live.shape).index_put((examples, channels), values)


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


#: The ways of grouping channels, by name.
GROUPINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"chunks": chunk_channels, "clusters": cluster_channels}


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


def principal_components(activations: Tensor, number: int, center: bool = True) -> Tensor:
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
