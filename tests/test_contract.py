"""Every class behaves as captum's layer attributions, and more strictly where captum's own classes are inconsistent.

What holds under unusual conditions is in test_matrix.py.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from captum.attr import Attribution, LayerAttribution, NoiseTunnel, PerturbationAttribution
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_fusion import LayerAugmentedGradCAM, LayerFusionCAM, LayerScoreCAM
from captum_fusion.metrics import explanation_func, to_input_shape
from tests.classes import (
    CLASS_AGNOSTIC,
    FUSE_LAYERS,
    FUSIONS,
    INPUT_SPACE,
    SIGNED,
    options,
    takes,
    with_baselines,
)
from tests.networks import (
    Counter,
    Net,
    Score,
    ThreeDimensional,
    TupleLayer,
    TwoInputs,
    WithBatchNorm,
    hooks_on,
    images,
    make,
)


@pytest.fixture
def x() -> Tensor:
    return images(3, 3, 8, 8)


def same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def one_by_one(method: Any, x: Tensor, targets: list[Any], **kwargs: Any) -> Tensor:
    return torch.cat([method.attribute(x[i : i + 1], targets[i], **kwargs) for i in range(len(targets))])


# ------------------------------------------------------------------------------------------------------------ signature


def test_signature_is_captums(cls: Any) -> None:
    assert issubclass(cls, LayerAttribution)
    assert issubclass(cls, Attribution)
    assert list(inspect.signature(cls.__init__).parameters)[:4] == ["self", "forward_func", "layer", "device_ids"]
    parameters = inspect.signature(cls.attribute).parameters
    order = ["self", "inputs", "target", "additional_forward_args", "attribute_to_layer_input"]
    assert list(parameters)[:5] == order
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters.values())[5:])
    assert hasattr(cls.attribute, "__wrapped__"), "captum unwraps log_usage"


def test_every_argument_is_documented(cls: Any) -> None:
    for function in (cls.__init__, cls.attribute):
        text = inspect.getdoc(function) or ""
        assert "{" not in text.split("Examples::")[0], "a placeholder was not filled in"
        for name in list(inspect.signature(function).parameters)[1:]:
            assert f"\n    {name} (" in text, name
    for section in ("Args:", "Returns:", "Raises:", "Examples::"):
        assert section in (inspect.getdoc(cls.attribute) or "")


def test_name_and_properties(cls: Any) -> None:
    method = cls(make(), nn.ReLU())
    assert method.get_name() == cls.__name__
    assert method.multiplies_by_inputs is issubclass(cls, PerturbationAttribution)
    assert method.has_convergence_delta() is False


# --------------------------------------------------------------------------------------------------------------- result


def test_shape_range_and_detachment(cls: Any) -> None:
    model = make()
    result = cls(model, model.relu2).attribute(images(2, 3, 8, 6), 1)
    assert result.shape == (2, 1, *((8, 6) if cls in INPUT_SPACE else (4, 3)))
    assert result.isfinite().all()
    assert result.abs().amax() > 0
    assert (result >= 0).all() or cls in SIGNED
    assert not result.requires_grad
    assert result.is_contiguous()
    if cls in INPUT_SPACE:
        same(result.amax(tuple(range(1, result.dim()))), torch.ones(2))


def test_batch_equals_one_by_one(cls: Any, x: Tensor) -> None:
    model, targets = make(), [0, 3, 1]
    method = cls(model, model.conv2)
    alone = one_by_one(method, x, targets)
    others = one_by_one(method, x, [1, 0, 3])
    matters = (others - alone).abs().amax() > 1e-3 * alone.abs().amax()
    assert matters == (cls not in CLASS_AGNOSTIC), "the map depends on the target unless the method is class-agnostic"
    for chunk in (None, 1, 2, 7, 1000):
        chunks = {"perturbations_per_eval": chunk} if takes(cls, "perturbations_per_eval") else {}
        # The iterations of the super-resolution amplify rounding errors.
        tolerance = 1e-4 if cls is LayerAugmentedGradCAM else 1e-5
        same(method.attribute(x, targets, **chunks), alone, tolerance)
        same(method.attribute(x, torch.tensor(targets), **chunks), alone, tolerance)


@pytest.mark.parametrize("target", [2, torch.tensor(2), torch.tensor([2])], ids=repr)
def test_one_target_for_all(cls: Any, x: Tensor, target: Any) -> None:
    model = make()
    method = cls(model, model.conv2)
    same(method.attribute(x, target), one_by_one(method, x, [2, 2, 2]))


def test_targets_of_outputs_with_three_dimensions(cls: Any, x: Tensor) -> None:
    model = make(ThreeDimensional)
    method, targets = cls(model, model.conv2), [(0, 2), (1, 4), (2, 0)]
    same(method.attribute(x, targets), one_by_one(method, x, targets))
    same(method.attribute(x, (1, 2)), one_by_one(method, x, [(1, 2)] * 3))


def test_no_target_if_the_output_is_a_score(cls: Any, x: Tensor) -> None:
    model, twin = make(Score), make()
    raw = options(cls, score_fn="identity")
    same(cls(model, model.conv2, **raw).attribute(x), cls(twin, twin.conv2, **raw).attribute(x, 0))
    assert cls(model, model.conv2).attribute(x).isfinite().all(), "no softmax is applied to a score"


@pytest.mark.parametrize("target", [None, (0, 1, 2), torch.tensor([1, 2]), [0, 1], "cat", 1.5], ids=repr)
def test_wrong_target_raises_an_assertion_error(cls: Any, x: Tensor, target: Any) -> None:
    model = make()
    if target is None and cls in CLASS_AGNOSTIC:
        same(cls(model, model.conv2).attribute(x), cls(model, model.conv2).attribute(x, 1))
        return
    with pytest.raises(AssertionError):
        cls(model, model.conv2).attribute(x, target)
    assert hooks_on(model) == 0


def test_additional_arguments_follow_their_examples(cls: Any, x: Tensor) -> None:
    model, scale = make(), torch.tensor([[1.0], [2.0], [3.0]])
    method = cls(model, model.conv2)
    alone = [method.attribute(x[i : i + 1], i, (scale[i : i + 1], 2)) for i in range(3)]
    same(method.attribute(x, [0, 1, 2], (scale, 2)), torch.cat(alone))
    shared = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0])  # five outputs: its first dimension is not the number of examples
    same(method.attribute(x, 1, shared), one_by_one(method, x, [1] * 3, additional_forward_args=shared))


def test_several_inputs(cls: Any, x: Tensor) -> None:
    model, other, features = make(TwoInputs), images(3, 3, 12, 12, seed=5), images(3, 5, seed=6)
    method = cls(model, model.conv2)
    result = method.attribute((x, other, features), [0, 1, 2])
    assert result.shape[2:] == ((8, 8) if cls in INPUT_SPACE else (4, 4)), "the size of the first masked input"
    alone = [method.attribute((x[[i]], other[[i]], features[[i]]), i) for i in range(3)]
    same(result, torch.cat(alone))
    if takes(cls, "mask_inputs"):
        only = method.attribute((x, other, features), 1, mask_inputs=[1])
        assert only.shape[2:] == ((12, 12) if cls in INPUT_SPACE else (4, 4))


@pytest.mark.parametrize("cls", [*FUSIONS, LayerScoreCAM])
def test_masks_reach_every_masked_input(cls: Any) -> None:
    model, seen = make(), []

    def sum_of(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.detach().clone(), b.detach().clone()))
        return model(a + b)

    a, b = torch.ones(1, 3, 8, 8), images(1, 3, 8, 8).abs() + 1
    cls(sum_of, model.conv2).attribute((a, b), 1)
    assert len(seen) > 2
    for masked_a, masked_b in seen[1:]:
        same(masked_a * b, masked_b)
    seen.clear()
    cls(sum_of, model.conv2).attribute((a, b), 1, mask_inputs=[1])
    assert all((masked_a == 1).all() for masked_a, _ in seen)


def test_tuple_layer(cls: Any, x: Tensor) -> None:
    model = make(TupleLayer)
    result = cls(model, model.branches).attribute(x, 1)
    if cls in FUSE_LAYERS and cls in INPUT_SPACE:
        same(result, cls(model, [model.branches.a, model.branches.b]).attribute(x, 1))
        return
    assert isinstance(result, tuple)
    separate = [cls(model, layer).attribute(x, 1) for layer in (model.branches.a, model.branches.b)]
    same(result, tuple(separate))


def test_list_of_layers(cls: Any, x: Tensor) -> None:
    model = make()
    result = cls(model, [model.conv1, model.relu2]).attribute(x, 1)
    if cls in FUSE_LAYERS:
        assert result.shape == (3, 1, 8, 8)
        for layer in (model.conv1, model.relu2):
            assert not torch.allclose(result, cls(model, [layer]).attribute(x, 1), atol=1e-3), "both layers matter"
        return
    assert isinstance(result, list)
    same(result, [cls(model, layer).attribute(x, 1) for layer in (model.conv1, model.relu2)])


def test_layer_input_is_the_output_before(cls: Any, x: Tensor) -> None:
    model = make()
    result = cls(model, model.relu2).attribute(x, 1, attribute_to_layer_input=True)
    same(result, cls(model, model.conv2).attribute(x, 1))


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
def test_in_place_relu_changes_nothing(cls: Any, x: Tensor, layer: str) -> None:
    plain, inplace = make(), make(inplace=True)
    same(cls(plain, getattr(plain, layer)).attribute(x, 1), cls(inplace, getattr(inplace, layer)).attribute(x, 1))


# --------------------------------------------------------------------------------------------------------- side effects


def test_restores_all_state(cls: Any, x: Tensor) -> None:
    model = make(WithBatchNorm)
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    users = model.conv.register_forward_hook(lambda *args: None)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    given = x.clone().requires_grad_()
    version, state = given._version, torch.get_rng_state()
    method = cls(model, model.norm)
    attributes = dict(vars(method))
    method.attribute(given, 1)
    assert vars(method) == attributes, "attribute keeps no state on the object"
    assert hooks_on(model) == 1
    users.remove()
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert (model.head.weight.grad == 7).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert given.grad is None
    assert given.requires_grad
    assert given._version == version
    assert torch.equal(given, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_restores_all_state_if_the_network_fails(cls: Any, x: Tensor, call: int) -> None:
    model = make()
    failing = Counter(model, fail_at=call)
    plain = Counter(model)
    cls(plain, model.conv2).attribute(x, 1)
    if plain.calls < call:
        pytest.skip("the method calls the network fewer times")
    with pytest.raises(RuntimeError, match="the network failed"):
        cls(failing, model.conv2).attribute(x, 1)
    assert hooks_on(model) == 0
    assert torch.is_grad_enabled()


def test_train_mode_is_warned_about_once(cls: Any, x: Tensor) -> None:
    model = make(WithBatchNorm).train()
    with pytest.warns(UserWarning, match=r"train mode.*model\.eval\(\)") as warned:
        result = cls(model, model.norm).attribute(x, 1)
    assert len(warned) == 1
    assert warned[0].filename == __file__, "the warning points at the caller"
    assert result.isfinite().all()


def test_a_layer_with_a_single_position_is_warned_about_once(cls: Any, x: Tensor) -> None:
    model = make()
    with pytest.warns(UserWarning, match=r"layer: the output of pool \(AdaptiveAvgPool2d\) has a single") as warned:
        cls(model, model.pool).attribute(x, 1)
    assert len(warned) == 1
    assert warned[0].filename == __file__, "the warning points at the caller"


def test_the_warning_of_a_single_position_points_at_the_caller(x: Tensor) -> None:
    model = make()
    fusion = LayerFusionCAM(model, model.relu2, region_method=LayerScoreCAM(model, model.pool))
    for call in (
        lambda: LayerScoreCAM(model, model.pool).attribute_targets(x, [1, 2]),
        lambda: fusion.attribute(x, 1),
    ):
        with pytest.warns(UserWarning, match="has a single position") as warned:
            call()
        assert {warning.filename for warning in warned} == {__file__}


def test_two_positions_are_worth_a_warning() -> None:
    model = make(dims=1)
    with pytest.warns(UserWarning, match="has a single position"):
        LayerScoreCAM(model, model.pool).attribute(images(2, 3, 2), 1)


def test_a_layer_with_a_single_position_is_right_for_inputs_with_one() -> None:
    model = make()
    LayerScoreCAM(model, model.conv2).attribute(images(2, 3, 1, 1), 1)


def test_tensors_cached_by_the_model_stay_usable_by_autograd(cls: Any, x: Tensor) -> None:
    class Caches(Net):
        cached: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.cached = self.conv1.weight * 1 if self.cached is None else self.cached
            return super().forward(x) + self.cached.sum()

    model = make(Caches)
    with torch.inference_mode():
        cls(model, model.conv2).attribute(x, 1)
    model(x).sum().backward()
    assert model.conv2.weight.grad is not None


# ------------------------------------------------------------------------------------------------ dtype, layout, device


def test_autocast_is_respected(cls: Any, x: Tensor) -> None:
    model, seen = make(), set()
    model.conv2.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = cls(model, model.conv2).attribute(x, 1)
    assert seen == {torch.bfloat16}
    assert result.isfinite().all()
    assert result.dtype is (torch.float32 if cls in INPUT_SPACE else torch.bfloat16)


def test_autocast_is_for_the_network_alone(cls: Any, x: Tensor) -> None:
    class Precise(Net):
        def forward(self, *arguments: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(*arguments)

    model = make(Precise)
    expected = cls(model, model.conv2).attribute(x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        result = cls(model, model.conv2).attribute(x, 1)
        assert torch.is_autocast_enabled("cpu")
    same(result, expected)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_memory_layouts_of_the_input(cls: Any, x: Tensor, layout: str) -> None:
    model = make()
    given = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    result = cls(model, model.conv2).attribute(given, 1)
    assert result.is_contiguous()
    same(result, cls(model, model.conv2).attribute(given.contiguous(), 1))


def test_creates_no_tensor_on_the_default_device(cls: Any, x: Tensor) -> None:
    model = make()
    expected = cls(model, model.conv2).attribute(x, [0, 1, 2])
    with torch.device("meta"):
        result = cls(model, model.conv2).attribute(x, [0, 1, 2])
    same(result, expected)


def test_data_parallel_on_the_cpu(cls: Any, x: Tensor) -> None:
    model = make()
    same(cls(nn.DataParallel(model), model.conv2).attribute(x, 1), cls(model, model.conv2).attribute(x, 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it while tracing
def test_compiled_model(cls: Any, x: Tensor) -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    same(cls(compiled, model.conv2).attribute(x, 1), cls(model, model.conv2).attribute(x, 1))
    torch._dynamo.reset()


def test_pickle_and_deepcopy(cls: Any, x: Tensor) -> None:
    model = make()
    method = cls(model, model.conv2)
    expected = method.attribute(x, 1)
    for twin in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert twin.layer is twin.forward_func.conv2
        same(twin.attribute(x, 1), expected)


# --------------------------------------------------------------------------------------------------- captum's utilities


def test_noise_tunnel_without_noise_is_the_plain_map(cls: Any, x: Tensor) -> None:
    model = make()
    method = cls(model, model.conv2, **with_baselines(cls))
    kwargs = {"baselines": 0.5} if takes(cls, "baselines") else {}
    result = NoiseTunnel(method).attribute(
        x, nt_type="smoothgrad", nt_samples=5, nt_samples_batch_size=2, stdevs=0.0, target=[0, 1, 2], **kwargs
    )
    same(result, method.attribute(x, [0, 1, 2], **kwargs), tolerance=1e-4)


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(cls: Any, x: Tensor, kind: str) -> None:
    model = make()
    result = NoiseTunnel(cls(model, model.conv2)).attribute(x, nt_type=kind, nt_samples=3, stdevs=0.1, target=1)
    assert result.shape[:2] == (3, 1)
    assert result.isfinite().all()


def test_sensitivity_max(cls: Any, x: Tensor) -> None:
    model = make()
    explain = explanation_func(cls(model, model.conv2))
    scores = sensitivity_max(explain, x, target=torch.tensor([0, 1, 2]), n_perturb_samples=2)
    assert scores.shape == (3,)
    assert (scores >= 0).all()
    assert (scores > 0).any(), "only an all-zero map never changes"


def test_infidelity(cls: Any, x: Tensor) -> None:
    model = make()
    attributions = to_input_shape(cls(model, model.conv2).attribute(x, 1), x)
    scores = infidelity(model, lambda t: (torch.full_like(t, 0.01), t - 0.01), x, attributions, target=1)
    assert scores.shape == (3,)
    assert scores.isfinite().all()


def test_progress_bar_counts_the_masked_samples(cls: Any, x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    if not takes(cls, "show_progress"):
        pytest.skip("one pass needs no progress bar")
    method = cls(model, model.conv2)
    expected = method.attribute(x, 1)
    assert capsys.readouterr().err == ""
    same(method.attribute(x, 1, show_progress=True), expected)
    shown = capsys.readouterr().err
    assert f"{cls.__name__} attribution" in shown
    finished, wanted = map(int, re.findall(r"(\d+)/(\d+)", shown)[-1])
    assert finished == wanted > 0
    if cls in FUSIONS or cls is LayerScoreCAM:
        assert wanted == (24 if cls is LayerScoreCAM else 36)  # eight channels; baseline, two maps and the union
