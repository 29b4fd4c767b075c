"""The paragraphs that the docstrings of many metrics share."""

from __future__ import annotations

from captum_fusion._docstrings import F, fill_docstring

_PARTS = {
    "args": """\
forward_func (callable): The model, or any function of the inputs.
inputs (Tensor or tuple[Tensor, ...]): The explained inputs, with dimension 0 counting the N examples.
attributions (Tensor): A map for each example, of shape ``(N, C, *spatial)``. Channels are summed, and the map is
    upsampled to the input's size.
target (int, tuple, Tensor or list, optional): The explained output, with captum's meaning.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
    Default: None""",
    "args_without_network": """\
inputs (Tensor or tuple[Tensor, ...]): The explained inputs, with dimension 0 counting the N examples.
attributions (Tensor): A map for each example, of shape ``(N, C, *spatial)``. Channels are summed, and the map is
    upsampled to the input's size.
target (int, tuple, Tensor or list, optional): The explained output, with captum's meaning.
    Default: None
additional_forward_args (Any, optional): Further arguments of the network, a tuple or a single one.
    Default: None""",
    "masking": """\
baselines (float, Tensor, tuple or None, optional): What shows where the map is 0. None stands for 0.
    Default: 0
mask_inputs (sequence of int, optional): The indices of the inputs that are masked.
    Default: None (the first floating point input with spatial dimensions, and those of its rank)
normalize (bool, optional): Stretch the positive part of each map to [0, 1]. Otherwise the map must be in [0, 1]
    already.
    Default: True""",
    "area": """\
area (float, optional): Raise each mask to the power at which its mean is this, above 0 and below 1, so that maps are
    compared at equal area (:func:`captum_fusion.functional.with_area`, which says what happens to sparse masks).
    Default: None (masks as they are)""",
    "mask_inputs": """\
mask_inputs (sequence of int, optional): The indices of the inputs that are changed, all at the same pixels.
    Default: None (the first floating point input with spatial dimensions, and those of its rank)""",
    "preset": """\
preset (str, optional): ``"rise"``, ``"groupcam"`` or ``"groupcam_head"``: the number of steps, and the blur of
    :func:`insertion`.
    Default: ``"groupcam_head"`` (112 steps; a Gaussian blur of 51 pixels with a standard deviation of 50)
steps (int, optional): The number of steps, instead of the preset's.
    Default: None""",
    "score_fn": """\
score_fn (str or callable, optional): Turns the raw output into scores: ``"softmax"``, ``"sigmoid"``,
    ``"identity"`` or a function.
    Default: ``"softmax"``""",
    "perturbations_per_eval": """\
perturbations_per_eval (int, optional): The most samples of each example in one call of the network. None finds a
    fast number by timing the first samples. The result is the same up to rounding. Nothing is timed, and a call
    repeats to the last bit, if a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None""",
    "explanation": """\
explanation_func (callable): The method that made the attributions, such as
    ``LayerFusionCAM(model, layer).attribute``. It is called as ``explanation_func(inputs, target=target)``, with
    ``additional_forward_args`` if there are any.""",
    "explanation_kwargs": """\
explanation_kwargs (dict, optional): Further arguments of ``explanation_func``.
    Default: None""",
    "attributions": """\
attributions (Tensor): A map for each example, of shape ``(N, C, h, w)``. Channels are summed, and the map is
    upsampled to the size of the masks.""",
    "masks": """\
masks (Tensor): The object's region in each picture, bool, of shape ``(N, H, W)`` or ``(N, 1, H, W)``.""",
    "raises": """\
AssertionError: If the target does not select one output for each example.
ValueError: If the attributions do not fit the inputs, or an option has a bad value. The message names the
    argument.""",
    "raises_shapes": """\
TypeError: If an argument has a bad type.
ValueError: If the shapes do not fit, or an option has a bad value. The message names the argument.""",
}


def documented(function: F) -> F:
    """Fill the shared paragraphs into a docstring."""
    return fill_docstring(function, _PARTS)
