"""Networks of convolutions, written here: residual, separable, U-shaped, dense, coders and denoisers."""

import math

import torch
from support.models.model_case import CHANNELS, CLASSES, SIDE, Batch, ModelCase, classes, numbers, own_case
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions around which the input is carried."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """torchvision's BasicBlock."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


def residual_net() -> nn.Module:
    """A small ResNet."""
    stem = nn.Sequential(nn.Conv2d(CHANNELS, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
                         nn.MaxPool2d(3, 2, 1))  # fmt: skip
    blocks = nn.Sequential(Residual(16, 16), Residual(16, 32, 2))
    return Named(nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)))


class Named(nn.Module):
    """Takes its input as `x`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """What the network makes of it."""
        return self.net(x)


class Inverted(nn.Module):
    """MobileNetV2's block with squeeze and excitation."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(width, inside, 1, bias=False), nn.BatchNorm2d(inside), nn.ReLU6(inplace=True),
            nn.Conv2d(inside, inside, 3, 1, 1, groups=inside, bias=False), nn.BatchNorm2d(inside),
            nn.Hardswish())  # fmt: skip
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inside, 8, 1), nn.ReLU(),
                                     nn.Conv2d(8, inside, 1), nn.Hardsigmoid())  # fmt: skip
        self.narrow = nn.Sequential(nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus what the block makes of it."""
        wide = self.wide(x)
        return x + self.narrow(wide * self.squeeze(wide))


def mobile_net() -> nn.Module:
    """A small MobileNet."""
    blocks = nn.Sequential(Inverted(16, 32), Inverted(16, 32))
    return Named(nn.Sequential(nn.Conv2d(CHANNELS, 16, 3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                               nn.Dropout(0.2), nn.Linear(16, CLASSES)))  # fmt: skip


def vgg() -> nn.Module:
    """Convolutions, pooling, and wide layers with dropout."""
    layers: list[nn.Module] = []
    for inside, outside in ((CHANNELS, 16), (16, 32)):
        layers += [nn.Conv2d(inside, outside, 3, 1, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return Named(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 32), nn.ReLU(inplace=True), nn.Dropout(),
                               nn.Linear(32, CLASSES)))  # fmt: skip


class Dense(nn.Module):
    """DenseNet: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, 3 + 8 * i), nn.SiLU(), nn.Conv2d(3 + 8 * i, 8, 3, 1, 1))
            for i in range(3)
        )
        self.drop = nn.Dropout2d(0.1)
        self.head = nn.Linear(27, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        for layer in self.layers:
            x = torch.cat([x, self.drop(layer(x))], 1)
        return self.head(x.mean((2, 3)))


def _double(inside: int, outside: int) -> nn.Module:
    layers = (
        (nn.Conv2d(i, outside, 3, 1, 1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True))
        for i in (inside, outside)
    )
    return nn.Sequential(*(layer for group in layers for layer in group))


class UNet(nn.Module):
    """U-Net of two levels: transposed convolution below, interpolation above."""

    def __init__(self, outside: int = CLASSES) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _double(CHANNELS, 8), _double(8, 16), _double(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.left2, self.left1 = _double(32, 16), _double(24, 8)
        self.head = nn.Conv2d(8, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classes of all pixels."""
        high = self.down1(x)
        low = self.down2(F.max_pool2d(high, 2))
        bottom = self.bottom(F.max_pool2d(low, 2))
        low = self.left2(torch.cat([low, self.up(bottom)], 1))
        up = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.left1(torch.cat([high, up], 1)))


class Coder(nn.Module):
    """Variational or plain autoencoder of images."""

    def __init__(self, *, varies: bool) -> None:
        super().__init__()
        self.varies = varies
        self.encoder = nn.Sequential(nn.Conv2d(CHANNELS, 8, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, 2, 1),
                                     nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 64, 32))  # fmt: skip
        self.decoder = nn.Sequential(nn.Linear(16, 16 * 64), nn.Unflatten(1, (16, 8, 8)), nn.Upsample(scale_factor=2),
                                     nn.Conv2d(16, 8, 3, 1, 1), nn.ELU(), nn.ConvTranspose2d(8, CHANNELS, 4, 2, 1),
                                     nn.Tanh())  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, plus divergence from normal numbers."""
        mean, spread = self.encoder(x).chunk(2, -1)
        if not self.varies:
            return F.mse_loss(self.decoder(mean), x)
        code = mean + torch.exp(spread / 2) * torch.randn_like(spread)
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1).mean()
        return F.mse_loss(self.decoder(code), x, reduction="sum") / x.shape[0] + divergence


class Denoiser(nn.Module):
    """Diffusion: noise of a drawn strength is added, then predicted (Ho et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), 0))
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.enter, self.norm = nn.Conv2d(CHANNELS, 16, 3, 1, 1), nn.GroupNorm(4, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.leave = nn.Conv2d(16, CHANNELS, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The squared error of the predicted noise."""
        when = torch.randint(0, 100, (x.shape[0],), device=x.device)
        noise = torch.randn_like(x)
        kept = self.kept[when][:, None, None, None]
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        rates = torch.exp(torch.arange(8) * -math.log(1e4) / 8).to(x)
        wave = when[:, None] * rates
        time = self.time(torch.cat([wave.sin(), wave.cos()], -1))
        hidden = F.avg_pool2d(F.silu(self.norm(self.enter(noisy)) + time[:, :, None, None]), 4)
        flat = hidden.flatten(2).transpose(1, 2)
        mixed = self.attention(flat, flat, flat, need_weights=False)[0] + flat
        wide = F.interpolate(mixed.transpose(1, 2).reshape(hidden.shape), scale_factor=4)
        return F.mse_loss(self.leave(wide), noise)


class Patches(nn.Module):
    """ConvMixer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(CHANNELS, 32, 4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"deep": nn.Conv2d(32, 32, 3, 1, 1, groups=32), "norm": nn.BatchNorm2d(32),
                           "wide": nn.Conv2d(32, 32, 1), "norm2": nn.BatchNorm2d(32)})
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classes."""
        x = self.enter(x)
        for block in self.blocks:
            x = x + block["norm"](F.gelu(block["deep"](x)))
            x = block["norm2"](F.gelu(block["wide"](x)))
        return self.head(x.mean((-2, -1)))


class Waves(nn.Module):
    """WaveNet-like: dilated convolutions of one dim with gates."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 16, 1)
        self.layers = nn.ModuleList(nn.Conv1d(16, 32, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Conv1d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The next value."""
        x = self.enter(x)
        for layer in self.layers:
            x = x + F.glu(layer(x), 1)
        return self.head(self.norm(x))


def seen(n: int) -> Batch:
    """Images as `x`, and a class of each."""
    return {"x": numbers(n, CHANNELS, SIDE, SIDE), "labels": classes(n)}


def seen_maps(n: int) -> Batch:
    """Images as `x`, and a class of each pixel."""
    return {"x": numbers(n, CHANNELS, SIDE, SIDE), "labels": classes(n, SIDE, SIDE)}


def seen_only(n: int) -> Batch:
    """Images as `x`."""
    return {"x": numbers(n, CHANNELS, SIDE, SIDE)}


def waves(n: int) -> Batch:
    """Waves, and what follows."""
    return {"x": numbers(n, 1, 24), "labels": numbers(n, 1, 24, number=1)}


def cases() -> list[ModelCase]:
    """All of them."""
    return [
        own_case("residual net", "convolutions", residual_net, seen, F.cross_entropy),
        own_case("mobile net", "convolutions", mobile_net, seen, F.cross_entropy),
        own_case("vgg", "convolutions", vgg, seen, F.cross_entropy),
        own_case("dense net", "convolutions", Dense, seen, F.cross_entropy),
        own_case("conv mixer", "convolutions", Patches, seen, F.cross_entropy),
        own_case("u-net", "convolutions", UNet, seen_maps, F.cross_entropy),
        own_case("wave net", "convolutions", Waves, waves, F.smooth_l1_loss),
        own_case("autoencoder", "coder", lambda: Coder(varies=False), seen_only),
        own_case("variational coder", "coder", lambda: Coder(varies=True), seen_only),
        own_case("diffusion", "coder", Denoiser, seen_only),
    ]
