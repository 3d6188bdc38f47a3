"""The networks of the CRD benchmark on CIFAR-100. They load RepDistiller's checkpoints.

    import torch
    from cifar_models import MODELS

    teacher = MODELS["resnet32x4"](num_classes=100)
    teacher.load_state_dict(torch.load("ckpt_epoch_240.pth", map_location="cpu")["model"])
    logits = teacher.eval()(images)  # (N, 3, 32, 32) -> (N, 100)

`MODELS` maps a name to a constructor. Names, state dicts (names, shapes and order), initialisation
and outputs are those of https://github.com/HobbitLong/RepDistiller (Tian et al., "Contrastive
Representation Distillation", ICLR 2020). So you need not train teachers first:
scripts/fetch_pretrained_teachers.sh there downloads wrn_40_2, resnet56, resnet110, resnet32x4,
vgg13 and ResNet50.

The code was written anew and returns logits only. A network is a sequence of named modules, so
`model[:n]` or a forward hook gives features. All networks take images of 32 x 32 pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What the networks share --------------------------------------------------------------------------


def named(**modules: nn.Module) -> nn.Sequential:
    """The modules in order, each under its name."""
    return nn.Sequential(OrderedDict(modules))


def conv(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """Padded so that stride 1 keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias)


def conv_bn_relu(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        conv(inputs, outputs, size, stride, groups, bias),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def stage(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, blocks: int, stride: int
) -> nn.Sequential:
    """A number of blocks. The first one changes the channels and the resolution."""
    return nn.Sequential(
        block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1))
    )


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity if the shape stays the same, otherwise a 1 x 1 convolution."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def initialise_convolutions(model: nn.Module) -> None:
    """Normal, with variance 2 / fan-out (He et al. 2015); biases 0. Not for the ShuffleNets."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_classifier(classifier: nn.Linear) -> None:
    """As in the VGGs and MobileNetV2."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


# ResNets (He et al. 2016) -------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


def resnet(
    num_classes: int, *, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)
) -> nn.Sequential:
    """The ResNet for CIFAR. `widths` are the channels of the stem and of the three stages."""
    blocks = (depth - 2) // 6
    stem, a, b, c = widths
    model = named(
        conv1=conv(3, stem, 3),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(inplace=True),
        layer1=stage(BasicBlock, stem, a, blocks, stride=1),
        layer2=stage(BasicBlock, a, b, blocks, stride=2),
        layer3=stage(BasicBlock, b, c, blocks, stride=2),
        pool=nn.AvgPool2d(8),
        flatten=nn.Flatten(),
        fc=nn.Linear(c, num_classes),
    )
    initialise_convolutions(model)
    return model


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1 = conv(inputs, middle, 1)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def resnet50(num_classes: int) -> nn.Sequential:
    """The ResNet-50 for ImageNet, but with a stem that keeps the resolution."""
    model = named(
        conv1=conv(3, 64, 3),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(inplace=True),
        layer1=stage(Bottleneck, 64, 256, 3, stride=1),
        layer2=stage(Bottleneck, 256, 512, 4, stride=2),
        layer3=stage(Bottleneck, 512, 1024, 6, stride=2),
        layer4=stage(Bottleneck, 1024, 2048, 3, stride=2),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        linear=nn.Linear(2048, num_classes),
    )
    initialise_convolutions(model)
    return model


# Wide ResNets (Zagoruyko & Komodakis 2016) --------------------------------------------------------


class PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        out = self.conv2(out)
        # A convolution in the shortcut starts from the activated x, the identity from x itself.
        return torch.add(out, x if self.convShortcut is None else self.convShortcut(activated))


def wide_resnet(num_classes: int, *, depth: int, width: int) -> nn.Sequential:
    blocks = (depth - 4) // 6
    a, b, c = 16 * width, 32 * width, 64 * width
    model = named(
        conv1=conv(3, 16, 3),
        block1=named(layer=stage(PreActivationBlock, 16, a, blocks, stride=1)),
        block2=named(layer=stage(PreActivationBlock, a, b, blocks, stride=2)),
        block3=named(layer=stage(PreActivationBlock, b, c, blocks, stride=2)),
        bn1=nn.BatchNorm2d(c),
        relu=nn.ReLU(inplace=True),
        pool=nn.AvgPool2d(8),
        flatten=nn.Flatten(),
        fc=(fc := nn.Linear(c, num_classes)),
    )
    initialise_convolutions(model)
    nn.init.zeros_(fc.bias)
    return model


# VGG (Simonyan & Zisserman 2015) ------------------------------------------------------------------


def vgg_block(inputs: int, outputs: int, convolutions: int, *pool: nn.Module) -> nn.Sequential:
    layers = [*conv_bn_relu(inputs, outputs, 3, bias=True)]
    for _ in range(convolutions - 1):
        layers += conv_bn_relu(outputs, outputs, 3, bias=True)
    return nn.Sequential(*layers, *pool)


def vgg(num_classes: int, *, convolutions: tuple[int, int, int, int, int]) -> nn.Sequential:
    """With batch norm. The images are small, so there is no pooling between the last two blocks."""
    model = named(
        block0=vgg_block(3, 64, convolutions[0], nn.MaxPool2d(2)),
        block1=vgg_block(64, 128, convolutions[1], nn.MaxPool2d(2)),
        block2=vgg_block(128, 256, convolutions[2], nn.MaxPool2d(2)),
        block3=vgg_block(256, 512, convolutions[3]),
        block4=vgg_block(512, 512, convolutions[4]),
        pool=nn.AvgPool2d(4),
        flatten=nn.Flatten(),
        classifier=(classifier := nn.Linear(512, num_classes)),
    )
    initialise_convolutions(model)
    initialise_classifier(classifier)
    return model


# MobileNetV2 (Sandler et al. 2018) ----------------------------------------------------------------


class InvertedResidual(nn.Module):
    def __init__(self, expansion: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *conv_bn_relu(inputs, middle, 1),
            *conv_bn_relu(middle, middle, 3, stride, groups=middle),
            *(conv(middle, outputs, 1), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


def mobilenet_v2(num_classes: int) -> nn.Sequential:
    """Expansion 6 and half the width, except for the 1280 channels of the last convolution."""
    expanded = partial(InvertedResidual, 6)
    model = named(
        conv1=nn.Sequential(*conv_bn_relu(3, 16, 3, stride=2)),
        blocks=nn.Sequential(
            stage(partial(InvertedResidual, 1), 16, 8, 1, stride=1),
            stage(expanded, 8, 12, 2, stride=1),
            stage(expanded, 12, 16, 3, stride=2),
            stage(expanded, 16, 32, 4, stride=2),
            stage(expanded, 32, 48, 3, stride=1),
            stage(expanded, 48, 80, 3, stride=2),
            stage(expanded, 80, 160, 1, stride=1),
        ),
        conv2=nn.Sequential(*conv_bn_relu(160, 1280, 1)),
        pool=nn.AvgPool2d(2),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(linear := nn.Linear(1280, num_classes)),
    )
    initialise_convolutions(model)
    initialise_classifier(linear)
    return model


# ShuffleNets (Zhang et al. 2018, Ma et al. 2018) --------------------------------------------------


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups."""
    n, channels, height, width = x.shape
    return x.reshape(n, groups, channels // groups, height, width).transpose(1, 2).flatten(1, 2)


class ShuffleV1Block(nn.Module):
    """With stride 2 the pooled input is not added to the output but becomes its last channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        computed = outputs if stride == 1 else outputs - inputs
        middle = computed // 4
        self.groups = 1 if inputs == 24 else 3  # the stem's 24 channels are too few for groups
        self.stride = stride
        self.conv1 = conv(inputs, middle, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride, groups=middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, computed, 1, groups=3)
        self.bn3 = nn.BatchNorm2d(computed)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)))  # the paper has no relu here
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out + x)
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))


def shufflenet_v1(num_classes: int) -> nn.Sequential:
    """Three groups."""
    return named(
        conv1=conv(3, 24, 1),
        bn1=nn.BatchNorm2d(24),
        relu=nn.ReLU(inplace=True),
        layer1=stage(ShuffleV1Block, 24, 240, 4, stride=2),
        layer2=stage(ShuffleV1Block, 240, 480, 8, stride=2),
        layer3=stage(ShuffleV1Block, 480, 960, 4, stride=2),
        pool=nn.AvgPool2d(4),
        flatten=nn.Flatten(),
        linear=nn.Linear(960, num_classes),
    )


class ShuffleV2Block(nn.Module):
    """Half of the channels pass unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        unchanged, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([unchanged, out], 1), groups=2)


class ShuffleV2DownBlock(nn.Module):
    """Two branches halve the resolution: conv1 and conv2, and conv3 to conv5."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = conv(inputs, inputs, 3, stride=2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = conv(inputs, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(inputs, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn1(self.conv1(x))
        short = F.relu(self.bn2(self.conv2(short)))
        long = F.relu(self.bn3(self.conv3(x)))
        long = self.bn4(self.conv4(long))
        long = F.relu(self.bn5(self.conv5(long)))
        return shuffle(torch.cat([short, long], 1), groups=2)


def shufflenet_v2(num_classes: int) -> nn.Sequential:
    """Width 1."""

    def halving(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(
            ShuffleV2DownBlock(inputs, outputs),
            *(ShuffleV2Block(outputs) for _ in range(blocks - 1)),
        )

    return named(
        conv1=conv(3, 24, 1),
        bn1=nn.BatchNorm2d(24),
        relu1=nn.ReLU(inplace=True),
        layer1=halving(24, 116, 4),
        layer2=halving(116, 232, 8),
        layer3=halving(232, 464, 4),
        conv2=conv(464, 1024, 1),
        bn2=nn.BatchNorm2d(1024),
        relu2=nn.ReLU(inplace=True),
        pool=nn.AvgPool2d(4),
        flatten=nn.Flatten(),
        linear=nn.Linear(1024, num_classes),
    )


# Their names in RepDistiller ----------------------------------------------------------------------

MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet8": partial(resnet, depth=8),
    "resnet14": partial(resnet, depth=14),
    "resnet20": partial(resnet, depth=20),
    "resnet32": partial(resnet, depth=32),
    "resnet44": partial(resnet, depth=44),
    "resnet56": partial(resnet, depth=56),
    "resnet110": partial(resnet, depth=110),
    # The stem of the "x4" networks is twice as wide, not 4 times.
    "resnet8x4": partial(resnet, depth=8, widths=(32, 64, 128, 256)),
    "resnet32x4": partial(resnet, depth=32, widths=(32, 64, 128, 256)),
    "ResNet50": resnet50,
    "wrn_16_1": partial(wide_resnet, depth=16, width=1),
    "wrn_16_2": partial(wide_resnet, depth=16, width=2),
    "wrn_40_1": partial(wide_resnet, depth=40, width=1),
    "wrn_40_2": partial(wide_resnet, depth=40, width=2),
    "vgg8": partial(vgg, convolutions=(1, 1, 1, 1, 1)),
    "vgg11": partial(vgg, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": partial(vgg, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, convolutions=(2, 2, 4, 4, 4)),
    "MobileNetV2": mobilenet_v2,
    "ShuffleV1": shufflenet_v1,
    "ShuffleV2": shufflenet_v2,
}
