"""The paragraphs that the docstrings of many methods share."""

from __future__ import annotations

from captum_fusion._docstrings import F, fill_docstring

#: The Args entries that every ``attribute`` shares, filled into ``{shared_args}`` of its docstring.
_SHARED_ARGS = """\
inputs (Tensor or tuple[Tensor, ...]): What to explain, with dimension 0 counting the N examples. A tuple
    where the network takes several tensors; its tensors are aligned along dimension 0.
target (int, tuple, Tensor or list, optional): Which output to explain, with captum's meaning. For an
    output of shape (N, classes): an int for all examples, or a list or 1-D tensor with one int for each.
    For an output of higher rank: a tuple of indices for all examples, or a list of such tuples. None only
    where the network returns one score for each example.
    Default: None
additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple or a single one.
    Tensors whose first dimension is N belong to the examples and follow them into masked samples; anything
    else is passed on as it is.
    Default: None
attribute_to_layer_input (bool, optional): Explain at the layer's input instead of its output.
    Default: False"""

_MASKED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): What shows where a mask is 0:
    ``baseline + mask * (input - baseline)``. A number, a tensor of an input's shape (or with first
    dimension 1), or a tuple with one of these for each input.
    Default: 0
mask_inputs (sequence of int, optional): Which of several inputs are masked.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): The most masked samples per example in one call of the network, in
    the input's own memory layout. None finds a fast number and layout by timing the first samples. The result is
    the same up to rounding. Nothing is timed, and a call repeats to the last bit, if a number is given or
    ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None
show_progress (bool, optional): Show a bar that counts masked samples.
    Default: False"""

_SAMPLED_ARGS = """\
mask_inputs (sequence of int, optional): Which of several inputs are changed.
    Default: None (the floating point inputs with as many spatial dimensions as the layer)
perturbations_per_eval (int, optional): The most changed copies of each example in one call of the network.
    None finds a fast number by timing the first copies. The result is the same up to rounding. Nothing is timed if
    a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None
show_progress (bool, optional): Show a bar that counts the copies.
    Default: False"""

_REPLACED_ARGS = """\
baselines (float, Tensor, tuple or None, optional): The value of absent activations: a number, or a tensor
    that broadcasts against the layer's activations ``(N, K, *spatial)``; a tuple with one of these for each tensor of a
    layer that returns several.
    Default: 0
perturbations_per_eval (int, optional): The most replaced samples per example in one call of the network.
    None finds a fast number by timing the first samples. The result is the same up to rounding. Nothing is timed
    if a number is given or ``torch.use_deterministic_algorithms(True)`` is set.
    Default: None
show_progress (bool, optional): Show a bar that counts replaced samples.
    Default: False"""

_LAYER_RETURNS = """\
*Tensor* or *tuple[Tensor, ...]* of **attributions**:
- **attributions** (*Tensor* or *tuple[Tensor, ...]*): Of shape ``(N, 1, *spatial of the layer)``, not normalised,
    in the dtype of the layer's output, detached (unless ``grad_kwargs`` asks to create a graph). A tuple if the
    layer returns several tensors; a list of such results for a list of layers. Where the class says that its map is
    in the input's space, it is ``(N, 1, *input spatial)``, in [0, 1], in the dtype of the input."""

_GRAD_KWARGS = """\
grad_kwargs (dict, optional): Further arguments of ``torch.autograd.grad``.
    Default: None"""

_RAISES = """\
AssertionError: If the target does not select one output for each example (IndexError or RuntimeError from
    torch for an index out of range).
ValueError: If an argument has a bad value, the forward pass does not use the layer, or the layer has no
    spatial dimensions; the message names the argument.
TypeError: If an argument has a bad type, or ``forward_func`` does not return a tensor."""

_CONSTRUCTOR_ARGS = """\
forward_func (callable): The model, or any function of the inputs that calls it.
layer (Module or list of Modules): Where to explain, usually the last convolutional stage. A list gives a
    list of results, from one pass.
device_ids (list of int, optional): The order of devices; needed only if ``forward_func`` is a function
    around a DataParallel model.
    Default: None"""

_RESHAPE_ARG = """\
reshape (callable, optional): Turns what the layer returns into ``(N, channels, *spatial)``, for example
    :class:`captum_fusion.layers.TokenGrid` for a vision transformer.
    Default: None"""

_SCORE_FN = """\
score_fn (str or callable, optional): How raw outputs become scores: ``"softmax"``, ``"sigmoid"``, ``"identity"`` or a
    function of the raw output, along dimension 1, before the target is selected. An output of shape (N,) is
    the score itself."""


_AUTHORS_CODE = """\
authors_code (bool, optional): Reproduce the authors' published code where it differs from the formulas above.
    Default: False"""


def documented(function: F) -> F:
    """Fill the paragraphs that all methods share into a docstring."""
    parts = {
        "constructor_args": _CONSTRUCTOR_ARGS,
        "shared_args": _SHARED_ARGS,
        "masked_args": _MASKED_ARGS,
        "sampled_args": _SAMPLED_ARGS,
        "replaced_args": _REPLACED_ARGS,
        "grad_kwargs": _GRAD_KWARGS,
        "layer_returns": _LAYER_RETURNS,
        "reshape_arg": _RESHAPE_ARG,
        "score_fn": _SCORE_FN,
        "authors_code": _AUTHORS_CODE,
        "raises": _RAISES,
    }
    return fill_docstring(function, parts)
