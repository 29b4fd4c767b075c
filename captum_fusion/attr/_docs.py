"""Docstring paragraphs shared by many methods."""

from __future__ import annotations

from captum_fusion._docstrings import F, fill_docstring

#: The arguments that every ``attribute`` has. They replace ``{shared_args}`` in its docstring.
_SHARED_ARGS = """\
inputs (Tensor or tuple[Tensor, ...]): Inputs to explain. Dimension 0 is the batch of N examples. A tuple if
    the network takes several tensors, which are aligned along dimension 0.
target (int, tuple, Tensor or list, optional): Output to explain, in captum's format. For an output of shape
    (N, classes): an int for all examples, or a list or 1-D tensor with one int per example. For an output of
    higher rank: a tuple of indices for all examples, or a list of such tuples. None is valid only if the
    network returns one score per example.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``: a tuple or a single value.
    Tensors whose first dimension is N belong to the examples, and every masked sample gets the entry of its
    example. All other values are passed on unchanged.
    Default: None
attribute_to_layer_input (bool, optional): Explain at the layer's input instead of its output.
    Default: False"""

_MASKED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): Replacement values where a mask is 0:
    ``baseline + mask * (input - baseline)``. A number, a tensor of an input's shape (or with first
    dimension 1), or a tuple with one of these for each input.
    Default: 0
mask_inputs (sequence of int, optional): Indices of the inputs to mask.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): Maximum number of masked samples per example in one call of the
    network, in the memory layout of the input. None chooses a fast number and layout by timing the first
    samples. The result is the same up to rounding. If a number is given or
    ``torch.use_deterministic_algorithms(True)`` is set, nothing is timed and calls repeat to the last bit.
    Default: None
show_progress (bool, optional): Show a progress bar that counts masked samples.
    Default: False"""

_SAMPLED_ARGS = """\
mask_inputs (sequence of int, optional): Indices of the inputs to perturb.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): Maximum number of perturbed copies of an example in one call of the
    network. None chooses a fast number by timing the first copies. The result is the same up to rounding. Nothing
    is timed if a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None
show_progress (bool, optional): Show a progress bar that counts the copies.
    Default: False"""

_REPLACED_ARGS = """\
baselines (float, Tensor, str, tuple or None, optional): Values of removed activations: a number, a tensor that
    broadcasts against the layer's activations ``(N, K, *spatial)``, or ``"mean"``, each channel's mean over space. If
    the layer returns several tensors, a tuple with a number or tensor for each, or ``"mean"`` for all.
    Default: 0, of :class:`~captum_fusion.LayerShapCAM` ``"mean"``
perturbations_per_eval (int, optional): Maximum number of samples with replaced activations per example in one
    call of the network. None chooses a fast number by timing the first samples. The result is the same up to
    rounding. Nothing is timed if a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None
show_progress (bool, optional): Show a progress bar that counts these samples.
    Default: False"""

_LAYER_RETURNS = """\
*Tensor* or *tuple[Tensor, ...]* of **attributions**:
- **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of shape ``(N, 1, *spatial of the layer)``, not normalised,
    in the dtype of the layer's output, detached (unless ``grad_kwargs`` contains ``create_graph=True``). A tuple
    if the layer returns several tensors; a list of such results for a list of layers. For classes whose map is in
    the input's space, the shape is ``(N, 1, *input spatial)``, the range [0, 1] and the dtype that of the input."""

_FUSION_ARGS = """\
region_kwargs (dict, optional): Further arguments of the region component's ``attribute``.
    Default: None
return_details (bool, optional): Whether to return the intermediate results as well.
    Default: False"""

_FUSION_RETURNS = """\
*Tensor* or *tuple[Tensor, ...]* of **attributions**, and **details** if requested:
- **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of shape ``(N, 1, *input spatial)``, in [0, 1], in the dtype
    of the input, detached (unless ``grad_kwargs`` contains ``create_graph=True``). All zeros if both component maps
    are. A tuple if the layer returns several tensors; a list of such results for a list of layers.
- **details** (:class:`FusionDetails` or a tuple of them): With ``return_details=True``. For a list of layers the
    result is a list of (attributions, details) pairs."""

_GRAD_KWARGS = """\
grad_kwargs (dict, optional): Further arguments of ``torch.autograd.grad``.
    Default: None"""

_RAISES = """\
AssertionError: If the target does not select one output per example. An index out of range raises torch's
    IndexError or RuntimeError.
ValueError: If an argument has an invalid value, the forward pass does not use the layer, or the layer has no
    spatial dimensions. The message names the argument.
TypeError: If an argument has an invalid type, or ``forward_func`` does not return a tensor."""

_CONSTRUCTOR_ARGS = """\
forward_func (callable): Model, or function of the inputs that calls it.
layer (Module or list of Modules): Layer to explain, usually the last convolutional stage. A list of layers
    gives a list of results from one pass.
device_ids (list of int, optional): Order of the devices. Needed only if ``forward_func`` is a function that
    wraps a DataParallel model.
    Default: None"""

_RESHAPE_ARG = """\
reshape (callable, optional): Function that converts the layer's output to ``(N, channels, *spatial)``, for
    example :class:`captum_fusion.layers.TokenGrid` for a vision transformer.
    Default: None"""

_SCORE_FN = """\
score_fn (str or callable, optional): Function that turns the raw output into scores along dimension 1, before the
    target is selected: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a callable. An output of shape (N,) is used
    as the score itself."""


_AUTHORS_CODE = """\
authors_code (bool, optional): Reproduce the authors' published code where it differs from the formulas above.
    Default: False"""

_SEARCH_ARGS = """\
max_evaluations (int, optional): The most channels whose masks are evaluated in each example. The scores of the
    other channels are predicted.
    Default: None (all live channels; 128 with a tolerance)
tolerance (float, optional): End the search when ``1 - correlation`` of the map with the map of all scores is
    expected to be below this, with a margin of :data:`captum_fusion.functional.channel_search.DOUBT`.
    Default: None (evaluate ``max_evaluations`` channels)"""

_PRESET_ARGS = """\
forward_func (callable): As of the constructor.
layer (Module or list of Modules): As of the constructor. Each layer of a list has its own masked samples.
device_ids (list of int, optional): As of the constructor.
    Default: None
options (Any): Other options of the constructor, except ``region_method`` and ``max_evaluations``."""

_PRESET_RAISES = """\
TypeError: If ``options`` contains an option that the preset sets, or that does not exist."""


def documented(function: F) -> F:
    """Fill the shared paragraphs into a docstring."""
    parts = {
        "constructor_args": _CONSTRUCTOR_ARGS,
        "shared_args": _SHARED_ARGS,
        "masked_args": _MASKED_ARGS,
        "sampled_args": _SAMPLED_ARGS,
        "replaced_args": _REPLACED_ARGS,
        "fusion_args": _FUSION_ARGS,
        "fusion_returns": _FUSION_RETURNS,
        "grad_kwargs": _GRAD_KWARGS,
        "layer_returns": _LAYER_RETURNS,
        "reshape_arg": _RESHAPE_ARG,
        "score_fn": _SCORE_FN,
        "authors_code": _AUTHORS_CODE,
        "search_args": _SEARCH_ARGS,
        "preset_args": _PRESET_ARGS,
        "preset_raises": _PRESET_RAISES,
        "raises": _RAISES,
    }
    return fill_docstring(function, parts)
