"""Independent reference implementations of Score-CAM, Fusion-CAM and UnionCAM, without batches or vectorisation.

They follow the papers' formulas; this module does not import the package. Maps are numpy arrays in float64; tensors are
used only as inputs of the network. Every function explains ONE example, ``x`` of shape ``(1, ...)``, and returns its
map and a dict of intermediate results.

Conventions (``N`` min-max, ``Up`` linear interpolation with half-pixel centres, ``p`` the score of the target, ``X_b``
the baseline): a masked input is ``X_b + m (x - X_b)``; maps are upsampled, then normalised; constant maps become
zeros; values within 1e-6 of the largest magnitude are ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Map = NDArray[np.float64]
Target = int | tuple[int, ...] | None
ScoreFn = str | Callable[[Tensor], Tensor]

TIE = 1e-6
SCORE_NOISE = 3e-5
LEAST_SUM = 3e-4


# ---------------------------------------------------------------------------------------------------------------- maps


def min_max(values: Map) -> Map:
    low, high = np.min(values), np.max(values)
    if high - low <= TIE * max(abs(low), abs(high)):
        return np.zeros_like(values)
    return (values - low) / (high - low)


def is_dead(channel: Map) -> bool:
    return bool(np.ptp(channel) <= TIE * np.max(np.abs(channel)))


def interpolation_matrix(old: int, new: int) -> Map:
    """Contributions of old samples to new ones, one row per new sample. Sample ``i`` is at ``i + 1/2``."""
    matrix = np.zeros((new, old))
    for i in range(new):
        position = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        left = int(np.floor(position))
        right = min(left + 1, old - 1)
        matrix[i, left] += 1 - (position - left)
        matrix[i, right] += position - left
    return matrix


def upsample(values: Map, size: tuple[int, ...]) -> Map:
    for axis, new in enumerate(size):
        along = interpolation_matrix(values.shape[axis], new) @ np.moveaxis(values, axis, 0).reshape(
            values.shape[axis], -1
        )
        rest = [n for i, n in enumerate(values.shape) if i != axis]
        values = np.moveaxis(along.reshape(new, *rest), 0, axis)
    return values


def keep_from_percentile(values: Map, theta: float) -> Map:
    """Values that reach the percentile, ties included; 0 elsewhere."""
    threshold = np.percentile(values, theta)
    return np.where(values >= threshold - TIE * np.max(np.abs(values)), values, 0.0)


# ------------------------------------------------------------------------------------------------------------- network


def raw_output(model: Callable[..., Tensor], x: Tensor, target: Target) -> float:
    with torch.no_grad():
        output = model(x)[0]
    return float(output if target is None else output[target])


def score(model: Callable[..., Tensor], x: Tensor, target: Target, score_fn: ScoreFn = "softmax") -> float:
    """The target's score, computed from the raw output along dimension 1."""
    with torch.no_grad():
        output = model(x)
    if output.dim() > 1:
        if callable(score_fn):
            output = score_fn(output)
        elif score_fn == "softmax":
            output = output.exp() / output.exp().sum(1, keepdim=True)
        elif score_fn == "sigmoid":
            output = 1 / (1 + (-output).exp())
        else:
            assert score_fn == "identity"
    return float(output[0] if target is None else output[0][target])


def layer_pass(model: nn.Module, layer: nn.Module, x: Tensor, target: Target) -> tuple[Map, Map]:
    """Activations and gradients of the raw output, both of shape (K, *spatial)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.enable_grad():
            output = model(x.clone().requires_grad_())[0]
            output = output if target is None else output[target]
            (gradient,) = torch.autograd.grad(output, seen)
    finally:
        handle.remove()
    return seen[0].detach()[0].double().numpy(), gradient[0].double().numpy()


def masked(x: Tensor, mask: Map, baseline: Tensor | float) -> Tensor:
    return baseline + torch.from_numpy(mask).to(x.dtype) * (x - baseline)


def baseline_input(x: Tensor, baseline: Tensor | float) -> Tensor:
    return torch.zeros_like(x) + baseline


# ---------------------------------------------------------------------------------------------------------- components


def grad_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: Target) -> tuple[Map, dict[str, Any]]:
    """ReLU(sum_k mean(g^k) A^k), in the layer's space."""
    activations, gradients = layer_pass(model, layer, x, target)
    weights = np.array([np.mean(gradients[k]) for k in range(len(gradients))])
    total = np.zeros(activations.shape[1:])
    for k in range(len(activations)):
        total += weights[k] * activations[k]
    return np.maximum(total, 0), {"activations": activations, "gradients": gradients, "weights": weights}


def score_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    weighting: str = "softmax",
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
) -> tuple[Map, dict[str, Any]]:
    """ReLU(sum_k alpha_k A^k), in the layer's space; the softmax is over channels that vary over space."""
    activations, _ = layer_pass(model, layer, x, target)
    size = tuple(x.shape[2:])
    nothing = baseline_input(x, baseline)
    raw_b, p_b = raw_output(model, nothing, target), score(model, nothing, target, score_fn)
    weights = np.zeros(len(activations))
    increases: dict[int, float] = {}
    for k in range(len(activations)):
        if is_dead(activations[k]):
            continue
        shown = masked(x, min_max(upsample(activations[k], size)), baseline)
        if weighting == "softmax":
            increases[k] = raw_output(model, shown, target) - raw_b
        else:
            increases[k] = difference(score(model, shown, target, score_fn), p_b, "normalized")
    if weighting == "softmax":
        top = max(increases.values(), default=0.0)
        total = sum(np.exp(c - top) for c in increases.values())
        for k, c in increases.items():
            weights[k] = np.exp(c - top) / total
    else:
        assert weighting == "increase"
        for k, c in increases.items():
            weights[k] = max(c, 0.0)
    result = np.zeros(activations.shape[1:])
    for k in range(len(activations)):
        result += weights[k] * activations[k]
    return np.maximum(result, 0), {"weights": weights, "live": sorted(increases), "activations": activations}


def union_gradient_map(
    model: nn.Module, layer: nn.Module, x: Tensor, target: Target, theta: float, alpha: str
) -> tuple[Map, dict[str, Any]]:
    """L_Den = sum_k alpha^k o ReLU(Wbar^k) o A^k, in the layer's space."""
    activations, gradients = layer_pass(model, layer, x, target)
    total, changed = np.zeros(activations.shape[1:]), 0
    for k in range(len(activations)):
        denoised = keep_from_percentile(gradients[k], theta)
        active = denoised > 0
        changed += int(np.sum(np.maximum(gradients[k], 0) != np.maximum(denoised, 0)))
        divisor = np.sum(denoised[active]) if alpha == "sum" else np.count_nonzero(active)
        if divisor > 0:
            coefficient = active / divisor
            total += coefficient * np.maximum(denoised, 0) * activations[k]
    return total, {"activations": activations, "gradients": gradients, "removed": changed}


# ------------------------------------------------------------------------------------------------------------- fusions


def difference(p: float, p_b: float, weighting: str) -> float:
    """A contribution. Differences within rounding noise are 0, except in the literal readings of the papers."""
    if weighting == "normalized" and abs(p - p_b) <= SCORE_NOISE * max(abs(p), abs(p_b)):
        return 0.0
    return p - p_b


def shares(p: float, q: float, p_b: float) -> tuple[float, float]:
    """Weights of two scores over a baseline, clamped at 0, that sum to 1.

    From ``SCORE_NOISE`` to ``LEAST_SUM`` of the scores, a straight line from equal weights to the shares.
    """
    first, second = max(p - p_b, 0.0), max(q - p_b, 0.0)
    scale, total = max(abs(p), abs(q), abs(p_b)), first + second
    if total <= SCORE_NOISE * scale:
        return 0.5, 0.5
    share, way = first / total, min((total / scale - SCORE_NOISE) / (LEAST_SUM - SCORE_NOISE), 1.0)
    return 0.5 + way * (share - 0.5), 0.5 - way * (share - 0.5)


def official_shares(first: float, second: float) -> tuple[float, float]:
    return first / (first + second + 1e-8), second / (first + second + 1e-8)


def fusion_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    theta: float = 10.0,
    weighting: str = "normalized",
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
    region_weighting: str = "softmax",
) -> tuple[Map, dict[str, Any]]:
    size = tuple(x.shape[2:])

    def p(mask: Map) -> float:
        return score(model, masked(x, mask, baseline), target, score_fn)

    gradient = min_max(upsample(grad_cam(model, layer, x, target)[0], size))
    denoised = keep_from_percentile(gradient, theta)
    region_low, _ = score_cam(model, layer, x, target, region_weighting, score_fn=score_fn, baseline=baseline)
    region = min_max(upsample(region_low, size))

    p_b = score(model, baseline_input(x, baseline), target, score_fn)
    p_d, p_r = p(denoised), p(region)
    b_d, b_r = difference(p_d, p_b, weighting), difference(p_r, p_b, weighting)
    if weighting == "normalized":
        w_d, w_r = shares(p_d, p_r, p_b)
    elif weighting == "raw":
        w_d, w_r = b_d, b_r
    else:
        w_d, w_r = official_shares(b_d, b_r)

    union = min_max(w_d * denoised + w_r * region)
    p_u = p(union)
    b_u = difference(p_u, p_b, weighting)
    if weighting == "normalized":
        v_u, v_r = shares(p_u, p_r, p_b)
    elif weighting == "raw":
        v_u, v_r = b_u, b_r
    else:
        v_u, v_r = official_shares(b_u, w_r)  # as published: the weight of the first stage (METHODS, D2)

    one, other = v_u * union, v_r * region
    similarity = np.clip(1 - np.abs(one - other), 0, 1)
    fused = similarity * np.maximum(one, other) + (1 - similarity) * (one + other) / 2
    return min_max(fused), {
        "gradient_map": gradient,
        "denoised_map": denoised,
        "region_map": region,
        "union_map": union,
        "score": score(model, x, target, score_fn),
        "baseline_score": p_b,
        "gradient_contribution": b_d,
        "region_contribution": b_r,
        "union_contribution": b_u,
        "union_weights": (w_d, w_r),
        "fusion_weights": (v_u, v_r),
        "similarity_map": similarity,
        "selected": None,
    }


def union_cam(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Target,
    theta: float = 10.0,
    alpha: str = "sum",
    weighting: str = "normalized",
    *,
    score_fn: ScoreFn = "softmax",
    baseline: Tensor | float = 0.0,
    region_weighting: str = "softmax",
) -> tuple[Map, dict[str, Any]]:
    size = tuple(x.shape[2:])

    def p(mask: Map) -> float:
        return score(model, masked(x, mask, baseline), target, score_fn)

    gradient_low, _ = union_gradient_map(model, layer, x, target, theta, alpha)
    gradient = min_max(upsample(np.maximum(gradient_low, 0), size))
    region_low, _ = score_cam(model, layer, x, target, region_weighting, score_fn=score_fn, baseline=baseline)
    region = min_max(upsample(region_low, size))

    p_b = score(model, baseline_input(x, baseline), target, score_fn)
    p_den, p_reg = p(gradient), p(region)
    b_den, b_reg = difference(p_den, p_b, weighting), difference(p_reg, p_b, weighting)
    w_den, w_reg = shares(p_den, p_reg, p_b) if weighting == "normalized" else (b_den, b_reg)
    union = min_max(w_den * gradient + w_reg * region)
    b_dr = difference(p(union), p_b, weighting)

    selected = b_dr > b_reg
    result = union if selected else region
    if weighting == "official":
        result = min_max((b_dr if selected else b_reg) * result)
    return result, {
        "gradient_map": gradient,
        "denoised_map": gradient,
        "region_map": region,
        "union_map": union,
        "score": score(model, x, target, score_fn),
        "baseline_score": p_b,
        "gradient_contribution": b_den,
        "region_contribution": b_reg,
        "union_contribution": b_dr,
        "union_weights": (w_den, w_reg),
        "fusion_weights": (1.0, 0.0) if selected else (0.0, 1.0),
        "similarity_map": None,
        "selected": selected,
    }
