"""Small networks for the tests. ``make`` builds them with seeded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Convolution, ReLU, strided convolution, ReLU, global pooling, linear; in 1 to 3 spatial dimensions."""

    def __init__(self, dims: int = 2, inplace: bool = False, channels: int = 3, outputs: int = 5) -> None:
        super().__init__()
        convolution, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
        self.conv1, self.relu1 = convolution(channels, 6, 3, padding=1), nn.ReLU(inplace)
        self.conv2, self.relu2 = convolution(6, 8, 3, padding=1, stride=2), nn.ReLU(inplace)
        self.pool, self.head = pool(1), nn.Linear(8, outputs)

    def forward(self, x: Tensor, scale: Tensor | None = None, power: int = 1) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        x = self.head(self.pool(x).flatten(1))
        return x if scale is None else x * scale**power


class FlatHead(Net):
    """A head with separate weights for each position, so that gradients vary over space. For 8 x 8 inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool, self.head = nn.Identity(), nn.Linear(8 * 4 * 4, 5)


class Score(Net):
    """Returns one score per example, of shape (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class ThreeDimensional(Net):
    """Returns (N, 3, 5)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.stack([y, 2 * y, -y], 1)


class Views(Net):
    """Requires contiguous activations: ``view`` after a convolution raises on channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(x.view(x.shape[0], 8, -1).mean(2))


class TwoInputs(Net):
    """Takes an image, a second image of another size, and features without spatial dimensions."""

    def forward(self, image: Tensor, other: Tensor, features: Tensor) -> Tensor:
        small = nn.functional.interpolate(other, image.shape[2:])
        return super().forward(image + small) + features


class TupleLayer(nn.Module):
    """Has a layer ``branches`` that returns two tensors."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, stride=2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.head = self.Branches(), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([t.relu().mean((2, 3)) for t in self.branches(x)], 1))


class DictLayer(nn.Module):
    """Has a layer ``branches`` that returns a dict."""

    class Branches(nn.Conv2d):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x)}

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.head = self.Branches(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branches(x)["out"].relu().mean((2, 3)))


class WithBatchNorm(nn.Module):
    """Has batch norm and dropout, so that it behaves differently in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Counter:
    """A forward function that counts its calls and forward samples (``rows``), and can fail at a given call."""

    def __init__(self, model: nn.Module, fail_at: int | None = None) -> None:
        self.model, self.calls, self.rows, self.largest, self.fail_at = model, 0, 0, 0, fail_at

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.calls += 1
        self.rows += inputs[0].shape[0]
        self.largest = max(self.largest, inputs[0].shape[0])
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise RuntimeError("the network failed")
        return self.model(*inputs)


def make(kind: type[nn.Module] = Net, seed: int = 1, **options: Any) -> Any:
    """A network in eval mode with seeded weights. The state of the global random generator is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**options).eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlations(first: Tensor, second: Tensor) -> list[float]:
    """Pearson's correlation of each pair of maps; NaN where one of them is constant."""
    first, second = (maps.detach().cpu().double().flatten(1) for maps in (first, second))
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(first, second, strict=True)]


def hooks_on(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def state_of(model: nn.Module, x: Tensor) -> list[Any]:
    """What a call must leave as it is."""
    return [
        hooks_on(model),
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()],
        (x.requires_grad, x.grad is None, x._version),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()),
        torch.get_rng_state().tolist()[:64],
    ]
