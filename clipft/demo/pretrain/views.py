"""Pictures drawn at random from the sources: a drawing on some ground, and scenes of several, seeded by torch's state.

Everything is a batch of float pixels in [0, 1]: [N, 3, SIZE, SIZE], on torch's default device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from clipft.demo.pretrain.sources import SIZE

LAYERS = 3  # drawings in a scene, at most
SCENE = -1


class Views(nn.Module):
    """Draws on the device it is on.

    Args:
        drawings: [D, 4, SIZE, SIZE] uint8, with transparency.
        crops: [C, 3, SIZE, SIZE] uint8, see :func:`crop`.
    """

    drawings: Tensor
    crops: Tensor

    def __init__(self, drawings: Tensor, crops: Tensor) -> None:
        super().__init__()
        self.register_buffer("drawings", drawings)
        self.register_buffer("crops", crops)

    @torch.no_grad()
    def forward(self, which: Tensor) -> Tensor:
        """A view of each drawing ``which`` [N] int64, or a scene of any for those that are ``SCENE``."""
        device = which.device
        with torch.autocast(device.type, enabled=False), device:
            scene = which == SCENE
            pixels = torch.empty(len(which), 3, SIZE, SIZE)
            pixels[~scene] = single_views(self.drawings[which[~scene]], self.crops)
            layers = torch.randint(len(self.drawings), (LAYERS * int(scene.sum()),))
            pixels[scene] = scenes(self.drawings[layers], self.crops)
            return pixels


def single_views(drawings: Tensor, crops: Tensor) -> Tensor:
    """Each drawing [N, 4, SIZE, SIZE] changed a little, half of them mirrored, most of them on white."""
    count = len(drawings)
    scale = torch.empty(count).uniform_(0.6, 1.15)
    angle = torch.empty(count).uniform_(-0.25, 0.25) * (torch.rand(count) < 0.5)
    mirrored = torch.where(chance(count, 0.5), drawings.flip(3), drawings)
    colours, cover = recolour(*move(mirrored, scale, angle))
    kind = torch.rand(count, 1, 1, 1)
    ground = torch.where(kind < 0.45, 1.0, grounds(count, crops))
    return colours + (1 - cover) * torch.where(kind > 0.92, 0.0, ground)


def scenes(drawings: Tensor, crops: Tensor) -> Tensor:
    """N grounds with up to ``LAYERS`` drawings each, from close up to small, then graded as cameras and scanners do.

    Args:
        drawings: [LAYERS * N, 4, SIZE, SIZE] uint8.
        crops: of photographs, for the grounds.
    """
    count = len(drawings) // LAYERS
    scene = grounds(count, crops)
    for layer in drawings.split(count):
        scale = torch.empty(count).uniform_(math.log(0.3), math.log(2.5)).exp()
        colours, cover = recolour(*move(layer, scale, torch.empty(count).uniform_(-math.pi, math.pi)))
        shown = (torch.rand(count, 1, 1, 1) < 0.55).float()
        scene = scene * (1 - cover * shown) + colours * shown
    return graded(scratched(scene))


def scratched(pixels: Tensor, lines: int = 3) -> Tensor:
    """A third with up to ``lines`` straight thin lines, half a pixel to three wide, dark, bright or of any tone."""
    count = len(pixels)
    marked = chance(count, 0.35)
    axis = torch.linspace(0, 1, SIZE)
    at = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)  # [H, W, 2]
    for _ in range(lines):
        start, along = torch.rand(count, 1, 1, 2), torch.randn(count, 1, 1, 2) * 0.4
        part = ((at - start) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
        distance = (at - start - part.clamp(0, 1)[..., None] * along).norm(dim=-1) * SIZE
        cover = (uniform(count, 0.25, 1.5) + 0.5 - distance[:, None]).clamp(0, 1)
        cover = cover * (marked & chance(count, 0.6)) * uniform(count, 0.3, 1)
        pixels = pixels * (1 - cover) + torch.rand(count, 1, 1, 1) * cover
    return pixels


def graded(pixels: Tensor) -> Tensor:
    """Half of them grey, some inverted, every gamma and contrast, blur and noise."""
    count = len(pixels)
    grey = luma(pixels)
    pixels = torch.where(chance(count, 0.5), grey, pixels)
    pixels = torch.where(chance(count, 0.1), 1 - pixels, pixels)
    pixels = pixels.clamp(1e-3, 1) ** uniform(count, -0.6, 0.6).exp()
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = torch.where(chance(count, 0.2), blurred, pixels)
    contrast = uniform(count, 0.5, 1.2)
    pixels = (pixels - 0.5) * contrast + 0.5 + uniform(count, -0.15, 0.15)
    return (pixels + torch.randn_like(pixels) * uniform(count, 0, 0.05) * chance(count, 0.4)).clamp(0, 1)


def luma(pixels: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    red, green, blue = pixels.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def grounds(count: int, crops: Tensor) -> Tensor:
    """A crop of a photograph, a colour, a blur of colours, or clouds (noise of spectrum 1 / f)."""
    kind = torch.rand(count, 1, 1, 1)
    blur = F.interpolate(torch.rand(count, 3, 4, 4), size=SIZE, mode="bilinear")
    found = torch.where(kind < 0.15, torch.rand(count, 3, 1, 1), torch.where(kind < 0.3, blur, clouds(count)))
    return torch.where(kind < 0.45, found, crops[torch.randint(len(crops), (count,))].float() / 255)


def crop(photograph: Tensor) -> Tensor:
    """A square [3, SIZE, SIZE] uint8 of 48 px up to the whole, turned by quarters and mirrored."""
    side = min(photograph.shape[1:])
    size = int(48 * (side / 48) ** float(torch.rand(())))
    top, left = (int(torch.randint(edge - size + 1, ())) for edge in photograph.shape[1:])
    square = v2.functional.resize(photograph[:, top : top + size, left : left + size], [SIZE, SIZE], antialias=True)
    square = torch.rot90(square, int(torch.randint(4, ())), (1, 2))
    return square.flip(2) if torch.rand(()) < 0.5 else square


def clouds(count: int) -> Tensor:
    """Noise of spectrum 1 / f ** p about a colour, p of .8 to 2."""
    frequency = torch.fft.fftfreq(SIZE)[:, None] ** 2 + torch.fft.rfftfreq(SIZE)[None] ** 2
    power = uniform(count, 0.4, 1.0)
    spectrum = torch.randn(count, 3, *frequency.shape, dtype=torch.complex64) / frequency.clamp(min=SIZE**-2) ** power
    noise = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    noise = noise / noise.std((2, 3), keepdim=True) * uniform(count, 0.05, 0.3) + torch.rand(count, 3, 1, 1)
    return noise.clamp(0, 1)


def uniform(count: int, low: float, high: float) -> Tensor:
    """[count, 1, 1, 1]."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def chance(count: int, share: float) -> Tensor:
    """[count, 1, 1, 1] bool, that share of them true."""
    return torch.rand(count, 1, 1, 1) < share


def move(drawings: Tensor, scale: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled (above 1: smaller), turned, stretched and shifted a little.

    Premultiplied colours [N, 3, H, W] and their cover [N, 1, H, W].
    """
    count = len(drawings)
    drawings = drawings.float() / 255
    cover = drawings[:, 3:]
    premultiplied = torch.cat([drawings[:, :3] * cover, cover], 1)
    stretch = torch.empty(count).uniform_(-0.15, 0.15).exp()
    x, y = scale * stretch, scale / stretch
    shift_x, shift_y = ((1 - side).abs() * torch.empty(count).uniform_(-1, 1) for side in (x, y))
    first = torch.stack([x * angle.cos(), -y * angle.sin(), shift_x], 1)
    second = torch.stack([x * angle.sin(), y * angle.cos(), shift_y], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(drawings.shape), align_corners=False)
    moved = F.grid_sample(premultiplied, grid, align_corners=False)
    return moved[:, :3], moved[:, 3:]


def recolour(colours: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
    """Random saturation (one in seven grey), tint, contrast and brightness."""
    count = len(colours)
    grey = luma(colours)
    saturation = uniform(count, 0.5, 1.5) * ~chance(count, 1 / 7)
    tint = torch.where(chance(count, 0.2), torch.rand(count, 3, 1, 1) + 0.2, 1.0)
    contrast, brightness = uniform(count, 0.7, 1.3), uniform(count, -0.1, 0.1)
    changed = (grey + (colours - grey) * saturation) * tint * contrast + cover * ((1 - contrast) / 2 + brightness)
    return torch.minimum(changed.clamp(min=0), cover), cover
