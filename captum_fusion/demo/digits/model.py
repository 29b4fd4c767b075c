"""The network for digit scenes."""

from torch import Tensor, nn


class DigitSceneNet(nn.Module):
    """A plain convolutional network that classifies the handwritten digits of a scene.

    It has four stages of convolution, batch normalisation and ReLU, and halves a 96 x 96 image three times. The last
    stage, ``stage4``, has 96 channels of 12 x 12 cells. The receptive field of a cell is 61 x 61 pixels: a whole digit,
    but less than the whole scene. Global average pooling and one linear layer follow.

    Example::

        >>> import torch
        >>> model = DigitSceneNet().eval()
        >>> model(torch.zeros(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(*_convolution(3, 24, size=5, stride=2), *_convolution(24, 24))
        self.stage2 = nn.Sequential(*_convolution(24, 48, stride=2), *_convolution(48, 48))
        self.stage3 = nn.Sequential(*_convolution(48, 80, stride=2), *_convolution(80, 80))
        self.stage4 = nn.Sequential(*_convolution(80, 96))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores of the ten digits.

        Args:
            images: float (N, 3, 96, 96), normalised as :func:`captum_fusion.demo.digits.preprocess` does.

        Returns:
            Logits, float (N, 10).
        """
        features = self.stage4(self.stage3(self.stage2(self.stage1(images))))
        logits: Tensor = self.classifier(self.flatten(self.pool(features)))
        return logits


def _convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
