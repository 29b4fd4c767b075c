"""Independent reference implementations of the methods other than the fusions, without batches or vectorisation.

They follow the papers' formulas and the public docstrings; this module does not import the package. The conventions are
those of ``tests/reference.py``: maps are numpy arrays in float64. Every function explains ONE example, ``x`` of shape
``(1, ...)``, and returns a map in the layer's space unless stated otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference import (
    TIE,
    Map,
    ScoreFn,
    Target,
    baseline_input,
    difference,
    is_dead,
    layer_pass,
    masked,
    min_max,
    raw_output,
    score,
    upsample,
)

NOTHING = 1e-6  # a sum smaller than this fraction of its terms is treated as 0


# ------------------------------------------------------------------------------------------------------------- network


def positions(channel: Map) -> list[tuple[int, ...]]:
    return list(np.ndindex(*channel.shape))


def layer_output(model: nn.Module, layer: nn.Module, x: Tensor) -> Map:
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    return seen[0][0].double().numpy()


def score_with(
    model: nn.Module, layer: nn.Module, x: Tensor, activations: Map, target: Target, score_fn: ScoreFn
) -> float:
    """The score when the layer returns ``activations`` (K, *spatial)."""
    handle = layer.register_forward_hook(
        lambda module, args, output: torch.from_numpy(activations)[None].to(output.dtype)
    )
    try:
        return score(model, x, target, score_fn)
    finally:
        handle.remove()


def absent(activations: Map, baseline: Any) -> Map:
    """A baseline for activations (K, *spatial): a number, a tensor that broadcasts against (1, K, *spatial), "mean"."""
    if isinstance(baseline, str):
        assert baseline == "mean"
        return np.stack([np.full_like(channel, channel.sum() / channel.size) for channel in activations])
    if isinstance(baseline, Tensor):
        baseline = baseline.double().numpy()
    return np.broadcast_to(np.asarray(baseline, dtype=np.float64), (1, *activations.shape))[0].copy()


def weighted_sum(weights: Map, activations: Map) -> Map:
    total = np.zeros(activations.shape[1:])
    for k in range(len(activations)):
        total += weights[k] * activations[k]
    return total


def relu(values: Map) -> Map:
    return np.maximum(values, 0)


# ----------------------------------------------------------------------------------------------------- gradient methods


def hires_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: Target) -> Map:
    activations, gradients = layer_pass(model, layer, x, target)
    total = np.zeros(activations.shape[1:])
    for p in positions(total):
        for k in range(len(activations)):
            total[p] += gradients[(k, *p)] * activations[(k, *p)]
    return relu(total)


def layer_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: Target) -> Map:
    activations, gradients = layer_pass(model, layer, x, target)
    total = np.zeros(activations.shape[1:])
    for p in positions(total):
        for k in range(len(activations)):
            total[p] += max(gradients[(k, *p)], 0.0) * activations[(k, *p)]
    return relu(total)


def fused_layer_cam(
    model: nn.Module, layers: Sequence[nn.Module], x: Tensor, target: Target, gamma: float = 2.0
) -> Map:
    """Fusion of several layers in the input's space, normalised like every map there (METHODS, section 6)."""
    size = tuple(x.shape[2:])
    fused = np.zeros(size)
    for i, layer in enumerate(layers):
        up = upsample(layer_cam(model, layer, x, target), size)
        share = up / up.max() if up.max() > 0 else np.zeros(size)
        if i < len(layers) - 1:
            share = np.tanh(gamma * share)
        fused = np.maximum(fused, share)
    return min_max(fused)


def xgrad_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: Target) -> tuple[Map, Map]:
    """The map, and the map before the ReLU."""
    activations, gradients = layer_pass(model, layer, x, target)
    weights = np.zeros(len(activations))
    for k in range(len(activations)):
        if abs(activations[k].sum()) > NOTHING * np.abs(activations[k]).sum():
            weights[k] = np.sum(activations[k] * gradients[k]) / np.sum(activations[k])
    total = weighted_sum(weights, activations)
    return relu(total), total


def alpha(d2: float, d3: float, total: float) -> float:
    """Grad-CAM++'s pixel weight, from the second and third derivative and the channel's sum of activations."""
    denominator = 2 * d2 + total * d3
    if abs(denominator) <= NOTHING * (abs(2 * d2) + abs(total * d3)):
        return 0.0
    return d2 / denominator


def alpha_weight(alphas: Map, slopes: Map, normalize: bool) -> float:
    """A channel's weight: alphas times positive slopes. If ``normalize_alpha``, the alphas sum to 1 over these."""
    divisor = 1.0
    if normalize:
        divisor = sum(alphas[p] for p in positions(alphas) if slopes[p] > 0)
        if divisor == 0:
            return 0.0
    return sum(alphas[p] / divisor * slopes[p] for p in positions(alphas) if slopes[p] > 0)


def grad_cam_plus_plus(
    model: nn.Module, layer: nn.Module, x: Tensor, target: Target, normalize_alpha: bool = False
) -> Map:
    return smooth_grad_cam_plus_plus(model, layer, x, target, [torch.zeros_like(x)], normalize_alpha)


def smooth_grad_cam_plus_plus(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    noises: Sequence[Tensor],
    normalize_alpha: bool = False,
) -> Map:
    activations = layer_output(model, layer, x)
    d1, d2, d3 = (np.zeros_like(activations) for _ in range(3))
    for noise in noises:
        _, gradients = layer_pass(model, layer, x + noise, target)
        d1 += gradients / len(noises)
        d2 += gradients**2 / len(noises)
        d3 += gradients**3 / len(noises)
    weights = np.zeros(len(activations))
    for k in range(len(activations)):
        alphas = np.zeros(activations.shape[1:])
        for p in positions(alphas):
            alphas[p] = alpha(d2[(k, *p)], d3[(k, *p)], activations[k].sum())
        weights[k] = alpha_weight(alphas, d1[k], normalize_alpha)
    return relu(weighted_sum(weights, activations))


def integration_rule(method: str, n: int) -> tuple[list[float], list[float]]:
    """Captum's points and weights. Its trapezoidal rule has n points and n intervals of 1/n, not n - 1."""
    if method == "gausslegendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        return [(1 + t) / 2 for t in nodes], [w / 2 for w in weights]
    if method == "riemann_trapezoid":
        return [i / (n - 1) for i in range(n)], [1 / n / (2 if i in (0, n - 1) else 1) for i in range(n)]
    offset = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[method]
    return [(i + offset) / n for i in range(n)], [1 / n] * n


def integrated_grad_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    n_steps: int,
    method: str,
    baseline: Tensor | float = 0.0,
) -> Map:
    start = baseline_input(x, baseline)
    at_start = layer_output(model, layer, start)
    total = np.zeros(at_start.shape[1:])
    for t, step in zip(*integration_rule(method, n_steps), strict=True):
        activations, gradients = layer_pass(model, layer, start + t * (x - start), target)
        weights = np.array([gradients[k].mean() for k in range(len(gradients))])
        total += step * relu(weighted_sum(weights, activations - at_start))
    return total


# ------------------------------------------------------------------------------------------------------- region methods


def is_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    n_steps: int = 10,
    cumulative: bool = False,
    softmax: bool = False,
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
) -> Map:
    activations = layer_output(model, layer, x)
    weights = np.zeros(len(activations))
    for k in range(len(activations)):
        if is_dead(activations[k]):
            continue
        mask, shown, scores = min_max(upsample(activations[k], tuple(x.shape[2:]))), 0.0, []
        for i in range(1, n_steps + 1):
            shown = shown + i / n_steps if cumulative else i / n_steps
            scores.append(score(model, masked(x, shown * mask, baseline), target, score_fn))
        weights[k] = np.mean(scores)
    if softmax:
        live = [k for k in range(len(activations)) if not is_dead(activations[k])]
        powers = np.exp(weights[live] - max(weights[live]))
        weights[live] = powers / powers.sum()
    return relu(weighted_sum(weights, activations))


def blur_matrix(length: int, kernel_size: int = 51, sigma: float = 50.0) -> Map:
    """A Gaussian along one axis, with borders reflected without repeating the last pixel."""
    reach = min(kernel_size // 2, length - 1)
    weights = [math.exp(-0.5 * (o / sigma) ** 2) for o in range(-reach, reach + 1)]
    matrix = np.zeros((length, length))
    for i in range(length):
        for o, weight in zip(range(-reach, reach + 1), weights, strict=True):
            j = abs(i + o)
            j = 2 * (length - 1) - j if j > length - 1 else j
            matrix[i, j] += weight / sum(weights)
    return matrix


def blur(x: Tensor) -> Tensor:
    values = x.double().numpy()
    for axis in range(2, values.ndim):
        values = np.moveaxis(np.tensordot(blur_matrix(values.shape[axis]), values, (1, axis)), 0, axis)
    return torch.from_numpy(np.ascontiguousarray(values)).to(x.dtype)


def group_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    groups: Sequence[Sequence[int]],
    theta: float | None = 70.0,
    background: str = "blur",
    signed: bool = True,
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
) -> tuple[Map, dict[str, Any]]:
    """The authors' code of June 2021 (cc85ed2), with ``theta=None, signed=False`` that of August 2021 (a7290b5)."""
    activations, gradients = layer_pass(model, layer, x, target)
    behind = blur(x) if background == "blur" else baseline_input(x, baseline)
    p_b = score(model, behind, target, score_fn)
    total, contributions = np.zeros(activations.shape[1:]), []
    for group in groups:
        group_map = np.zeros(activations.shape[1:])
        for k in group:
            group_map += gradients[k].mean() * activations[k]
        group_map = relu(group_map)
        if theta is not None:
            group_map = np.where(group_map > np.percentile(group_map, theta), group_map, 0.0)
        up = upsample(group_map, tuple(x.shape[2:]))
        low, high = up.min(), up.max()
        if high - low <= TIE * high:
            contributions.append(0.0)
            continue
        p = score(model, masked(x, (up - low) / (high - low), behind), target, score_fn)
        gained = difference(p, p_b, "normalized")
        contributions.append(gained if signed else max(gained, 0.0))
        total += contributions[-1] * (group_map if theta is None else (group_map - low) / (high - low))
    return relu(total), {"contributions": contributions, "baseline_score": p_b}


def rise_masks(size: tuple[int, ...], cells: int, probability: float) -> list[tuple[float, Map]]:
    """EVERY mask that RISE can draw, with its probability: all grids and all shifts by whole pixels."""
    pixels = [math.ceil(n / cells) for n in size]
    shifts = list(itertools.product(*[range(p) for p in pixels]))
    masks = []
    for bits in itertools.product((0.0, 1.0), repeat=cells ** len(size)):
        grid = np.array(bits).reshape([cells] * len(size))
        stretched = upsample(grid, tuple((cells + 1) * p for p in pixels))
        chance = probability ** sum(bits) * (1 - probability) ** (len(bits) - sum(bits)) / len(shifts)
        for shift in shifts:
            cut = stretched[tuple(slice(s, s + n) for s, n in zip(shift, size, strict=True))]
            masks.append((chance, cut))
    return masks


def rise(
    model: nn.Module,
    x: Tensor,
    target: Target,
    masks: list[tuple[float, Map]],
    probability: float,
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
) -> tuple[Map, Map]:
    """The expected map over ``masks`` and the standard deviation of a single mask's term, in the input's space."""
    parts = [score(model, masked(x, mask, baseline), target, score_fn) * mask / probability for _, mask in masks]
    mean = sum(chance * part for (chance, _), part in zip(masks, parts, strict=True))
    variance = sum(chance * (part - mean) ** 2 for (chance, _), part in zip(masks, parts, strict=True))
    return mean, np.sqrt(variance)


# ------------------------------------------------------------------------------------- methods that replace activations


def ablation_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    score_fn: ScoreFn = "identity",
    baseline: Any = 0.0,
) -> Map:
    activations = layer_output(model, layer, x)
    replacement = absent(activations, baseline)
    weights = np.zeros(len(activations))
    for group in [[k] for k in range(len(activations))] if groups is None else groups:
        without = activations.copy()
        without[group] = replacement[group]
        drop = score(model, x, target, score_fn) - score_with(model, layer, x, without, target, score_fn)
        weights[group] = drop
    return relu(weighted_sum(weights, activations))


def recipro_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    gaussian: bool = False,
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Any = 0.0,
) -> Map:
    activations = layer_output(model, layer, x)
    replacement = absent(activations, baseline)
    result = np.zeros(activations.shape[1:])
    for p in positions(result):
        keep = np.zeros(result.shape)
        for q in positions(result):
            away = [abs(i - j) for i, j in zip(p, q, strict=True)]
            if gaussian:
                keep[q] = math.prod({0: 2 / 4, 1: 1 / 4}.get(d, 0.0) for d in away)
            else:
                keep[q] = float(p == q)
        shown = replacement + keep * (activations - replacement)
        result[p] = score_with(model, layer, x, shown, target, score_fn)
    return result


def shapley_values(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Any = 0.0,
) -> tuple[Map, Map]:
    """Exact Shapley values over all orders of the positions, and the standard deviation of the contributions."""
    activations = layer_output(model, layer, x)
    replacement = absent(activations, baseline)
    places = positions(activations[0])
    values: dict[frozenset[int], float] = {}
    for size in range(len(places) + 1):
        for coalition in itertools.combinations(range(len(places)), size):
            shown = replacement.copy()
            for i in coalition:
                shown[(slice(None), *places[i])] = activations[(slice(None), *places[i])]
            values[frozenset(coalition)] = score_with(model, layer, x, shown, target, score_fn)
    mean, deviation = np.zeros(activations.shape[1:]), np.zeros(activations.shape[1:])
    orders = list(itertools.permutations(range(len(places))))
    for i, place in enumerate(places):
        gains = [values[frozenset(o[: o.index(i) + 1])] - values[frozenset(o[: o.index(i)])] for o in orders]
        mean[place], deviation[place] = np.mean(gains), np.std(gains)
    return mean, deviation


# --------------------------------------------------------------------------------------------------- activation methods


def linear_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: int, weight: Tensor) -> Map:
    return weighted_sum(weight[target].detach().double().flatten().numpy(), layer_output(model, layer, x))


def eigen_cam(model: nn.Module, layer: nn.Module, x: Tensor, center: bool = False) -> Map:
    activations = layer_output(model, layer, x)
    matrix = activations.reshape(len(activations), -1).T.copy()
    if center:
        matrix -= matrix.mean(0)
    _, _, directions = np.linalg.svd(matrix, full_matrices=False)
    flat = matrix @ directions[0]
    leaning = flat.sum()
    if abs(leaning) <= NOTHING * np.abs(flat).sum():
        leaning = flat[np.argmax(np.abs(flat))]
    return (flat if leaning > 0 else -flat).reshape(activations.shape[1:])


# ------------------------------------------------------------------------------------------------------ Integrative CAM


def pure_derivatives(
    model: nn.Module, layer: nn.Module, x: Tensor, smooth: Callable[[Tensor], Tensor]
) -> tuple[Map, Map, Map]:
    """First to third derivative of ``smooth(output)`` with respect to each activation, by autograd through the network.

    No assumptions are made about the network. The derivatives are as exact as those of autograd.
    """
    activations = torch.from_numpy(layer_output(model, layer, x))
    found = [np.zeros(activations.shape) for _ in range(3)]
    for index in np.ndindex(*activations.shape):
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        unit = torch.zeros_like(activations)
        unit[index] = 1.0
        moved = activations + step * unit
        handle = layer.register_forward_hook(lambda module, args, output, moved=moved: moved[None])
        try:
            value = smooth(model(x)[0])
        finally:
            handle.remove()
        for derivatives in found:
            (value,) = torch.autograd.grad(value, step, create_graph=True, materialize_grads=True)
            derivatives[index] = value.item()
            if not value.requires_grad:
                break
    return found[0], found[1], found[2]


def integrative_layer_map(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: int,
    smooth: Callable[[Tensor], Tensor],
    slope: float,
    normalize_alpha: bool,
    bias: str,
    offsets: Map | None = None,
) -> tuple[Map, Map, float]:
    """A layer's map, the map before its ReLU, and the fraction of clipped alphas.

    ``smooth`` computes Y from the output (C,); ``slope`` is its positive common factor, which the weights leave out;
    ``offsets`` are the biases of the layer's channels.
    """
    activations, gradients = layer_pass(model, layer, x, target)
    d1, d2, d3 = pure_derivatives(model, layer, x, smooth)
    flat = not d2.any() and not d3.any()  # for the identity all pixels have the same weight
    weights, cut, counted = np.zeros(len(activations)), 0, 0
    for k in range(len(activations)):
        alphas = np.zeros(activations.shape[1:])
        for p in positions(alphas):
            value = 0.5 if flat else alpha(d2[(k, *p)], d3[(k, *p)], activations[k].sum())
            alphas[p] = min(max(value, 0.0), 1.0)
            if d1[(k, *p)] > 0:
                counted += 1
                cut += not 0 <= value <= 1
        weights[k] = alpha_weight(alphas, d1[k] / slope, normalize_alpha)
    total = weighted_sum(weights, activations)
    if bias == "residual":
        total = total + (raw_output(model, x, target) - total.sum()) / total.size
    elif bias == "layer":
        assert offsets is not None
        total = total + sum(weights[k] * offsets[k] for k in range(len(weights)))
    elif bias == "fullgrad":
        assert offsets is not None
        for k in range(len(weights)):
            total = total + offsets[k] * gradients[k]
    else:
        assert bias == "none"
    return relu(total), total, cut / counted if counted else 0.0


def layer_weights(
    model: nn.Module, layers: Sequence[nn.Module], x: Tensor, target: Target, weighting: str, balance: float
) -> Map:
    g, q = [], []
    for layer in layers:
        activations, gradients = layer_pass(model, layer, x, target)
        g.append(np.mean(np.abs(gradients)))
        q.append(np.mean(np.abs(activations)))
    if weighting == "uniform":
        return np.full(len(layers), 1 / len(layers))
    if weighting == "product":
        products = [a * b for a, b in zip(g, q, strict=True)]
        return np.array([p / sum(products) for p in products])
    assert weighting == "mean"
    return np.array([balance * a / sum(g) + (1 - balance) * b / sum(q) for a, b in zip(g, q, strict=True)])


def fuse_layers(
    maps: Sequence[Map], weights: Map, size: tuple[int, ...], redundancy_threshold: float | None = None
) -> tuple[Map, dict[str, Any]]:
    """The fused map in the input's space, and the intermediate results for each layer."""
    shown = [min_max(upsample(m, size)) for m in maps]
    kept: list[int] = []
    for i in sorted(range(len(maps)), key=lambda i: -weights[i]):
        if not shown[i].any():
            continue
        if redundancy_threshold is not None and any(
            np.mean(np.abs(shown[i] - shown[j])) < redundancy_threshold for j in kept
        ):
            continue
        kept.append(i)
    total = sum(weights[i] for i in kept)
    final = np.array([weights[i] / total if i in kept else 0.0 for i in range(len(maps))])
    fused = sum((final[i] * shown[i] for i in kept), np.zeros(size))
    return min_max(fused), {"layer_maps": shown, "layer_weights": final, "kept": [i in kept for i in range(len(maps))]}
