"""Robustness of saved encoders: accuracy of a linear probe, trained once on clean images, on corrupted, perturbed,
augmented and shifted ones.

    python eval_robustness.py runs/*/checkpoint.pt --suite corruptions  # 15 + 4, nothing to download
    python eval_robustness.py A/checkpoint.pt B/checkpoint.pt --suite perturbations augmentations --plot figure.png
    python eval_robustness.py A/checkpoint.pt --suite corruptions --suite-dir IMAGENET-C  # the published files
    python eval_robustness.py A/checkpoint.pt --suite shifts --suite-dir IMAGENET-V2 IMAGENET-R IMAGENET-SKETCH

Flow: checkpoints -> encoders -> linear probes on clean features (eval_probe.py's) -> each batch of test images is
altered once and scored by all -> a table a suite. As soon as a suite is finished its table is printed, and its
results are appended to eval.jsonl beside each checkpoint, with counts for each condition.

Suites
  corruptions    15 corruptions of 5 severities [HD], and 4 more for validation. `mean` is the accuracy over severities
                 and the 15. On ImageNet also mCE and relative mCE, errors relative to AlexNet's, in percent. At 224 px
                 images pass through JPEG of quality 85, as the published ones did.
  perturbations  Sequences of up to 41 frames, 10 types and 4 for validation [HD]. `top-1` is the accuracy over all
                 frames of all types. `flips` is the percentage of pairs of frames between which the prediction changes,
                 mean of the 10; mFR, on ImageNet, is that relative to AlexNet's. `top-5 distance` is how far the first
                 five classes move; AlexNet's are unpublished, so it is not relative.
  augmentations  CLeVER's: jittered colours, flips, rotations by up to 90 degrees, elastic deformations; mean of
                 several passes.
  shifts         Other photographs or drawings of the same classes: ImageNet-V2, -R (also with only its 200 classes to
                 choose from), -Sketch. On `blocks` a stand-in: the test objects painted in opposite hues; on
                 `blocks-views` the sessions seen in training beside the unseen ones.

Clean images, shifts, augmentations and finished sets are cropped as in eval_probe.py, at the encoder's own size.
Corruptions and perturbations are made at the size of their constants and resized to the encoder's: 32 px, as
CIFAR-10-C's, for encoders of less than 96 px, and 224 px, as ImageNet-C's, for others. A line reports where sizes
differ. Every image and condition has its own seed. Results do not depend on the batch size or the number of processes,
except that rounding may change a pixel by one grey level. CPUs and GPUs draw different random numbers.

Sources. [HD] Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261), and their code, the source of all constants; CLeVER (arXiv 2406.00262)
and its code; SER (arXiv 2603.06693), which reports mean accuracies of all.
Known differences. Frost is a texture unless photographs are given (marked *); videos are never compressed; flip rates
are of difficulty 1; the ten types of the mean have snow where CIFAR-10-P's code has spatter."""

import dataclasses
import functools
import io
import math
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import common
import eval_probe
from common import Count

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args(eval_probe.SharedArgs):
    """Which checkpoints, which suites, on which data."""

    suite: tuple[Literal["corruptions", "perturbations", "augmentations", "shifts"], ...] = ("corruptions",)
    """what to test; several share the probes"""
    suite_dir: tuple[str, ...] = ()
    """corruptions: a finished ImageNet-C or CIFAR-10-C; shifts: one or more folders of classes"""
    types: tuple[str, ...] = ()
    """which corruptions or perturbations; default: all"""
    images_per_class: Count | None = None
    """test on the first so many images of each class; default: all"""
    jpeg85: bool = True
    """pass corrupted images of 224 px through JPEG of quality 85, as in the published set"""
    frost_dir: str | None = None
    """photographs of frost, instead of a texture"""
    passes: Count = 3
    """draws of each random augmentation (--suite augmentations)"""
    save_images: str | None = None
    """directory for a contact sheet of each suite of corruptions or perturbations"""


def check(args):
    """Refuse what cannot work, before checkpoints are read."""
    labelled.cache_clear()  # images may have changed since another call of this process
    load_frost.cache_clear()

    # Refuse an empty suite and unknown types.
    types = {"corruptions": CORRUPTIONS, "perturbations": PERTURBATIONS}
    if not args.suite:
        common.die(f"--suite: is empty; name at least one of {', '.join(SUITES)}")
    for suite in set(args.suite) & set(types):
        if odd := [name for name in args.types if name not in types[suite]]:
            common.die(f"--types {odd[0]}: not one of the {suite}; there are {', '.join(types[suite])}")
    for flag, values in (("suite", args.suite), ("types", args.types)):
        if len(set(values)) < len(values):
            common.die(f"--{flag} {' '.join(values)}: name each once")

    # Refuse flags of suites that are not asked for.
    for flag, value, suites in (
        ("types", args.types, types),
        ("save-images", args.save_images, types),
        ("frost-dir", args.frost_dir, ["corruptions"]),
    ):
        if value and not set(suites) & set(args.suite):
            common.die(f"--{flag}: goes with --suite {' or '.join(suites)}")
    one_folder = args.suite == ("corruptions",) and len(args.suite_dir) == 1
    if args.suite_dir and not one_folder and args.suite != ("shifts",):
        common.die("--suite-dir: goes with --suite corruptions (one folder) or --suite shifts (one or more), alone")

    for flag in ("save-images", "frost-dir"):
        if args.suite_dir and getattr(args, flag.replace("-", "_")):
            common.die(f"--{flag}: nothing is made here where --suite-dir gives the images; leave it out")

    # Directories of sets must exist and differ in name; a directory of pictures is made.
    if len({Path(path).resolve().name for path in args.suite_dir} | {"clean"}) <= len(args.suite_dir):
        why = "two folders of one name, or one named clean; rename them, their names head the columns"
        common.die(f"--suite-dir {' '.join(args.suite_dir)}: {why}")
    for flag, folders in (("suite", args.suite_dir), ("frost", (args.frost_dir,) if args.frost_dir else ())):
        if missing := [folder for folder in folders if not os.path.isdir(folder)]:
            common.die(f"--{flag}-dir {missing[0]}: no such directory")
    if args.save_images:
        eval_probe.make_directory("save-images", args.save_images)


def check_sets(args, classes):
    """Refuse published sets that do not fit, before probes are trained."""
    # Shifted sets need folders of known classes.
    if args.suite == ("shifts",):
        for path in args.suite_dir:
            labelled(Path(path), classes)

    # Every condition of a finished set must be there, as a file or as folders of classes.
    if args.suite == ("corruptions",) and args.suite_dir:
        root = Path(args.suite_dir[0])
        for name in args.types or CORRUPTIONS:
            for severity in range(1, 6):
                found = find_finished(root, name, severity)
                if found.suffix == ".npy":
                    finished(root, name, severity, classes)
                else:
                    class_index(found, classes)


SMALL = 96  # px; below it images are small ones, as CIFAR-10's


def side_of(subjects):
    """Side of the images that corruptions and perturbations are made of: 32 px for small encoders, 224 for others."""
    return 32 if size_of(subjects[0]) < SMALL else 224


# ----------------------------------------------------------------------------------------------------------------------
# Corruptions: float32 (B, 3, S, S) in levels 0 to 255 -> the same, not yet clipped (pixelate, JPEG: uint8 -> uint8)
# ----------------------------------------------------------------------------------------------------------------------


def exact(device):
    """The type in which coordinates are computed: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Draws:
    """Random numbers for a batch from one generator an image, so that they do not depend on the rest of the batch."""

    def __init__(self, seeds, device):
        self.device, self.generators = device, [torch.Generator(device).manual_seed(s) for s in seeds.tolist()]

    def normal(self, *shape):  # (B, *shape), N(0, 1)
        return self.fill(shape, lambda out, g: out.normal_(generator=g))

    def uniform(self, low, high, *shape):  # (B, *shape) in [low, high)
        return self.fill(shape, lambda out, g: out.uniform_(low, high, generator=g))

    def integers(self, low, high, *shape):  # (B, *shape) int64 in [low, high)
        return self.uniform(low, high, *shape).floor().long()

    def poisson(self, rates):  # (B, ...) -> (B, ...)
        return torch.stack([torch.poisson(r, generator=g) for r, g in zip(rates, self.generators)])

    def fill(self, shape, draw):
        out = torch.empty(len(self.generators), *shape, device=self.device)
        for row, g in zip(out, self.generators):
            draw(row, g)
        return out


# Added before truncation to uint8, so that a filter that changes nothing does not lose a grey level to rounding.
EPSILON = 1e-3


@functools.lru_cache(maxsize=64)
def constant(values, device, dtype=None):
    """A tensor of nested tuples, copied to a device once."""
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def gaussian_matrix(n, sigma, device, truncate=4.0, border="nearest"):
    """(n, n) that blurs a line of n pixels: int(truncate sigma + 1/2) taps to either side; border "nearest" or
    "symmetric" (dcba|abcd|dcba)."""
    # Taps are Gaussian weights, cut off at `truncate` standard deviations.
    radius = int(truncate * sigma + 0.5)
    t = torch.arange(-radius, radius + 1)
    taps = torch.exp(-(t.double() ** 2) / (2 * sigma**2)) if radius else torch.ones(1, dtype=torch.float64)

    # A tap beyond the border adds its weight to the pixel that repeats or mirrors it.
    columns = torch.arange(n)[:, None] + t  # (n, taps)
    if border == "nearest":
        columns = columns.clamp(0, n - 1)
    else:
        columns = torch.minimum(columns % (2 * n), 2 * n - 1 - columns % (2 * n))
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.scatter_add_(1, columns, (taps / taps.sum()).expand(n, -1)).float().to(device)


def blur(x, sigma, **how):
    """Gaussian blur of (..., S, S)."""
    G = gaussian_matrix(x.shape[-1], sigma, x.device, **how)
    return G @ x @ G.T


def correlate(x, kernels, border):
    """x (B, C, S, S) with kernels (k, k), or one per image (B, 1, k, k), k odd, by FFT; border "reflect" or
    "replicate"."""
    S, r = x.shape[-1], kernels.shape[-1] // 2

    # An FFT is fast where the size has small factors, as multiples of 32 have at 224 and 32 px.
    size = (S + 2 * r + 31) // 32 * 32

    # One reflection adds at most S - 1 pixels, so that wide borders need a second one.
    if border == "reflect" and r >= S:
        x, r = F.pad(x, (S - 1,) * 4, border), r - S + 1
    y = F.pad(x, (r,) * 4, border)
    y = torch.fft.rfft2(y, s=(size, size)) * torch.fft.rfft2(kernels, s=(size, size)).conj()
    return torch.fft.irfft2(y, s=(size, size))[..., :S, :S]


@functools.lru_cache(maxsize=64)
def disk(radius, sigma, device):
    """Kernel of a lens out of focus: a disk whose edge is smoothed a little. As in the original the smoothing mirrors
    the borders, so the largest kernels sum to more than 1."""
    side = torch.arange(-8, 9) if radius <= 8 else torch.arange(-radius, radius + 1)
    k = (side[:, None] ** 2 + side**2 <= radius**2).double()
    m = 1 if radius <= 8 else 2
    g = torch.exp(-0.5 * (torch.arange(-m, m + 1).double() / sigma) ** 2)
    g = g / g.sum()
    k = F.conv2d(F.pad((k / k.sum())[None, None], (m,) * 4, "reflect"), (g[:, None] * g)[None, None])
    return k[0, 0].float().to(device)


def motion(x, radius, sigma, degrees):
    """Blur of x (B, C, S, S), 8 bits, along a half line at an angle (B,): one-sided Gaussian weights, taps at the
    nearest pixel, borders repeated; the result is truncated after 16 bits as ImageMagick's is."""
    w = 2 * radius + 1
    i, angle = torch.arange(w, device=x.device), degrees.to(exact(x.device)).deg2rad()[:, None]  # (w,), (B, 1)
    taps = torch.exp(-(i**2) / (2 * sigma**2))
    dx, dy = (i * angle.cos() - 0.5).ceil().long(), (i * angle.sin() - 0.5).ceil().long()  # (B, w)

    # Taps that round to the same pixel add up their weights.
    side = 2 * w - 1
    kernels = torch.zeros(len(x), side * side, device=x.device)
    kernels.scatter_add_(1, (w - 1 + dy) * side + w - 1 + dx, (taps / taps.sum()).float().expand(len(x), -1))
    y = correlate(x, kernels.view(-1, 1, side, side), "replicate")
    return ((257 * y).round() / 257).floor()


def centre_zoom(x, z):
    """The centre of x (B, C, S, S) magnified z times."""
    S = x.shape[-1]
    crop = math.ceil(S / z)
    side, top = round(crop * z), (S - crop) // 2
    y = F.interpolate(x[..., top : top + crop, top : top + crop], (side, side), mode="bilinear", align_corners=True)
    o = (side - S) // 2
    return y[..., o : o + S, o : o + S]


def gaussian_noise(x, draws, sigma):
    return draws.normal(*x.shape[1:]).mul_(255 * sigma).add_(x)


def shot_noise(x, draws, photons):
    return draws.poisson(x * (photons / 255)) * (255 / photons)


def impulse_noise(x, draws, p):
    u = draws.uniform(0, 1, *x.shape[1:])
    return x.masked_fill(u < p / 2, 0).masked_fill(u >= 1 - p / 2, 255)


def speckle_noise(x, draws, sigma):
    return x + x * draws.normal(*x.shape[1:]) * sigma


def gaussian_blur(x, draws, sigma):
    return blur(x, sigma) + EPSILON


def defocus_blur(x, draws, radius, sigma):
    return correlate(x, disk(radius, sigma, x.device), "reflect")


def glass_blur(x, draws, sigma, delta, iterations):
    """Every pixel, from the last to the first, takes the colour that its neighbour at a random offset has at that
    moment (the original means to swap the two, but copies).

    As a graph: new(p) points to new(q) where q came before p, and to old(q) elsewhere; following pointers of pointers
    until they no longer change resolves a pass at once. A GPU's host waits once a round, 4 to 6 rounds a pass."""
    # Visit pixels from the last to the first, without a border of `delta` pixels.
    S, n = x.shape[-1], x.shape[-1] - 2 * delta
    y = (blur(x, sigma) + EPSILON).floor().flatten(2)  # (B, 3, S S)
    visited = torch.arange(S - delta, delta, -1, device=x.device)  # (n,) rows and columns in their order
    p = (visited[:, None] * S + visited).flatten()  # (n n,)
    inside = torch.zeros(S * S, dtype=torch.bool, device=x.device).index_fill_(0, p, True)

    # Node p of the graph is new(p), node S S + p is old(p).
    old = S * S + torch.arange(S * S, device=x.device).expand(len(x), -1)  # (B, S S)

    for _ in range(iterations):
        # Draw the neighbour of each pixel; one that was visited before has its new colour, others the old one.
        dx, dy = draws.integers(-delta, delta, n * n, 2).unbind(2)  # (B, n n) in the order of the visits
        q = p + dy * S + dx
        pointers = torch.cat([old, old], 1)  # (B, 2 S S)
        pointers[:, p] = torch.where(inside[q] & (q > p), q, q + S * S)

        # Follow pointers of pointers until all of them end at old colours.
        new = pointers[:, : S * S]
        while True:
            further = pointers.gather(1, new)
            if torch.equal(further, new):
                break
            new.copy_(further)
        y = y.gather(2, (new - S * S)[:, None].expand(-1, 3, -1))
    return blur(y.view_as(x), sigma) + EPSILON


def motion_blur(x, draws, radius, sigma):
    return motion(x, radius, sigma, draws.uniform(-45, 45))


def zoom_blur(x, draws, step, count):
    """Mean of the image and `count` magnifications of it, by 1, 1 + step, 1 + 2 step, ..."""
    # The original's range steps by (1 + step) - 1, which is rounded; one size at 32 px depends on it.
    total = 2 * x  # also the magnification by 1
    for i in range(1, count):
        total += centre_zoom(x, 1 + i * ((1 + step) - 1))
    return total / (count + 1)


def snow(x, draws, mean, std, zoom, threshold, radius, sigma, mix):
    flakes = centre_zoom(draws.normal(1, *x.shape[2:]) * std + mean, zoom)
    return snow_on(x, flakes, threshold, radius, sigma, draws.uniform(-135, -45), mix)


def snow_on(x, flakes, threshold, radius, sigma, degrees, mix):
    """Flakes (B, 1, S, S), those above a threshold, blurred along their fall at (B,) degrees, on a bleached image."""
    flakes = (255 * flakes.masked_fill(flakes < threshold, 0).clamp(0, 1)).floor()
    flakes = motion(flakes, radius, sigma, degrees)
    winter = torch.maximum(x, 1.5 * common.luma(x) + 127.5)
    return mix * x + (1 - mix) * winter + flakes + flakes.rot90(2, (2, 3))


def frost(x, draws, scene, ice, photographs=()):
    """scene x + ice F. F is a random crop of one of the photographs, uint8 (3, H, W), or, without any, a texture."""
    S = x.shape[-1]
    if not photographs:
        return scene * x + ice * frost_texture(draws, S, x.device)

    # Each image has a photograph and a crop of its own.
    crops = []
    for i, (top, left) in zip(draws.integers(0, len(photographs)).tolist(), draws.uniform(0, 1, 2).tolist()):
        photograph = photographs[i]
        top, left = int(top * (photograph.shape[1] - S)), int(left * (photograph.shape[2] - S))
        crops.append(photograph[:, top : top + S, left : left + S])
    return scene * x + ice * torch.stack(crops).to(x)


def frost_texture(draws, S, device):
    """Smooth noise of spectrum |k|^-beta, (B, 3, S, S), with the colours, contrast and beta of one of FROST."""
    # Each image has the statistics of one photograph.
    kinds = constant(FROST, device)[draws.integers(0, len(FROST))]  # (B, 7)
    mean, std, beta = kinds[:, :3], kinds[:, 3:6], kinds[:, 6]

    # Amplitudes fall with the frequency, white noise gives the phases, and f has unit variance.
    ky, kx = torch.fft.fftfreq(S, device=device)[:, None], torch.fft.rfftfreq(S, device=device)
    k = (ky**2 + kx**2).sqrt()
    amplitude = torch.where(k > 0, k, 1.0) ** (-beta / 2)[:, None, None] * (k > 0)  # (B, S, S / 2 + 1)
    z = torch.fft.rfft2(draws.normal(S, S))
    f = torch.fft.irfft2(z / z.abs().clamp(min=1e-12) * amplitude, s=(S, S))
    f = f / f.std((1, 2), correction=0, keepdim=True)
    return (mean[:, :, None, None] + std[:, :, None, None] * f[:, None]).clamp(0, 255).floor()


# Our fit to the original's five photographs: mean of red, green, blue; their deviations; beta.
FROST = (
    (78, 149, 166, 27, 16.5, 15, 1.86),
    (201, 205, 214.5, 21, 22, 22.6, 1.59),
    (201, 205, 214.5, 21, 22, 22.6, 1.59),
    (138, 153, 165, 28.5, 28.5, 30, 1.19),
    (112, 123, 135, 44, 43, 42, 1.81),
)


def plasma(u, decay):
    """A cloud by diamond-square on a torus: noise u (B, n n - 1) in [-1, 1) -> (B, n, n) in [0, 1]. From one point
    on, the middles of the squares and then those of their sides are the mean of four neighbours plus noise, whose
    size falls by decay^2 from scale to scale (the original multiplies by the amplitude twice)."""
    B, side = len(u), math.isqrt(u.shape[1] + 1)
    corners, amplitude, used = u.new_zeros(B, 1, 1), 100.0, 0
    while (m := corners.shape[1]) < side:
        # A square has four corners; a side has two corners and the two nearest middles.
        noise = amplitude**2 * u[:, used : used + 3 * m * m].view(B, 3, m, m)
        right, down = corners.roll(-1, 2), corners.roll(-1, 1)
        middle = (corners + right + down + right.roll(-1, 1)) / 4 + noise[:, 0]
        row = (corners + right + middle + middle.roll(1, 1)) / 4 + noise[:, 1]
        column = (corners + down + middle + middle.roll(1, 2)) / 4 + noise[:, 2]

        # Interleave corners and middles to a grid of twice the side.
        quads = torch.stack([torch.stack([corners, row], 3), torch.stack([column, middle], 3)], 2)
        corners = quads.reshape(B, 2 * m, 2 * m)
        amplitude, used = amplitude / decay, used + 3 * m * m
    low = corners.amin((1, 2), True)
    return (corners - low) / (corners.amax((1, 2), True) - low)


def fog(x, draws, thickness, decay):
    S, top = x.shape[-1], x.amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    side = 2 ** math.ceil(math.log2(S))
    cloud = 255 * thickness * plasma(draws.uniform(-1, 1, side * side - 1), decay)[:, None, :S, :S]
    return (x + cloud) * top / (top + 255 * thickness)


def brightness(x, draws, c):
    """Raise the value V of HSV, the largest channel, without leaving RGB; black becomes grey."""
    V = x.amax(1, keepdim=True)
    new = (V + 255 * c).clamp(0, 255)
    return torch.where(V > 0, x * new / V.clamp(min=1), new)


def saturate(x, draws, factor, offset):
    V, m = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    S = (V - m) / V.clamp(min=1)
    new = (factor * S + offset).clamp(0, 1)

    # Grey has hue 0, which is red.
    grey = torch.cat([V, V * (1 - new), V * (1 - new)], 1)
    return torch.where(S > 0, V - (V - x) * new / torch.where(S > 0, S, 1), grey)


def contrast(x, draws, c):
    mean = x.mean((2, 3), keepdim=True, dtype=exact(x.device))  # of each channel
    return ((x - mean) * c + mean).float()


def elastic_transform(x, draws, alpha, sigma, amplitude):
    """An affine map that moves three points at random, coordinates in steps of 1/32 px as OpenCV's, then smooth
    displacements."""
    # Three points and their random moves determine an affine map.
    B, _, S, _ = x.shape
    q, t = S // 2, S // 3
    corners = (q + t, q + t), (q + t, q - t), (q - t, q - t)
    points = constant(corners, x.device, exact(x.device))  # (3, 2) x, y
    moved = (points + draws.uniform(-amplitude, amplitude, 3, 2)).float().to(points.dtype)  # (B, 3, 2)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), points.expand(B, 3, 2))  # (B, 3, 2)

    # Pixel (x, y) comes from [x y 1] back, in the fixed-point coordinates of OpenCV.
    line = torch.arange(S, device=x.device, dtype=points.dtype)
    across = (1024 * back[:, 0, None] * line[:, None]).round()  # (B, S, 2), from the column
    along = (1024 * (back[:, 1, None] * line[:, None] + back[:, 2, None])).round() + 16  # from the row
    source = ((along[:, :, None] + across[:, None]) / 32).floor() / 32  # (B, S, S, 2) x, y in pixels
    x = F.grid_sample(x, (2 * source / (S - 1) - 1).float(), "bilinear", "reflection", align_corners=True)

    # Each pixel is then moved by its own smooth displacement.
    if alpha:
        noise = blur(draws.uniform(-1, 1, 2, S, S), sigma, truncate=3.0, border="symmetric")
        shift = alpha * noise.permute(0, 2, 3, 1)
        source = torch.stack(torch.meshgrid(line, line, indexing="xy"), 2).float() + shift  # (B, S, S, 2)
        x = F.grid_sample(x, (2 * source + 1) / S - 1, "bilinear", "reflection", align_corners=False)
    return x


def pixelate(x, draws, share):
    S = x.shape[-1]
    side = int(S * share)
    small = by_pillow(x, side, lambda image: image.resize((side, side), Image.BOX))

    # The box filter enlarges by repeating pixels.
    source = ((torch.arange(S, dtype=torch.float64) + 0.5) * (side / S)).long().to(x.device)
    return small.index_select(3, source).index_select(2, source)


def jpeg_compression(x, draws, quality):
    """uint8 (B, 3, S, S) compressed and decoded by Pillow: exact where GPU encoders are not."""

    def compressed(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file, formats=["JPEG"])

    return by_pillow(x, x.shape[-1], compressed)


def by_pillow(x, side, change):
    """uint8 (B, 3, S, S) -> (B, 3, side, side): change(image) of each image in Pillow's form, on the CPU, one thread a
    core."""
    planes, out = x.cpu().contiguous().numpy(), np.empty((len(x), side, side, 3), np.uint8)
    as_band = lambda plane: Image.frombuffer("L", plane.shape, plane, "raw", "L", 0, 1)  # shares the memory

    def convert(i):
        out[i] = change(Image.merge("RGB", [as_band(plane) for plane in planes[i]]))

    # A single thread needs no pool.
    threads = 1 if x.device.type == "cpu" and torch.get_num_threads() == 1 else common.default_workers(None)
    if threads == 1:
        for i in range(len(out)):
            convert(i)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(convert, range(len(out))))
    return common.send(torch.from_numpy(out).permute(0, 3, 1, 2), x.device)


def spatter(x, draws, mean, std, sigma, threshold, strength, mud):
    drops = blur(draws.normal(1, *x.shape[2:]) * std + mean, sigma)
    drops = drops.masked_fill(drops < threshold, 0)  # (B, 1, S, S)

    # Water adds light; mud covers the image with brown.
    if not mud:
        return x + water(drops, strength)
    mask = blur((drops > threshold).float(), strength)
    mask = mask.masked_fill(mask < 0.8, 0)
    return x * (1 - mask) + mask * constant((63.0, 42.0, 20.0), x.device).view(3, 1, 1)


def water(drops, strength):
    """The light, (B, 3, S, S), that drops of water (B, 1, S, S) add, brightest along their rims: an edge map, the
    distance to it, equalised and embossed, each as in OpenCV."""
    drops = (255 * drops).clamp(0, 255).floor()
    rims = mean3(distance(canny(drops))).floor()
    emboss = constant(((-2.0, -1, 0), (-1, 1, 1), (0, 1, 2)), drops.device)
    rims = F.conv2d(F.pad(equalize(rims), (1,) * 4, "reflect"), emboss[None, None]).clamp(0, 255)

    # Drops are brightest along their rims, and the brightest point of an image has `strength`.
    light = drops * mean3(rims).round()
    light = light / light.amax((2, 3), True).clamp(min=1e-12) * strength
    return light * constant((175.0, 238.0, 238.0), drops.device).view(3, 1, 1)


def mean3(x):
    return F.avg_pool2d(F.pad(x, (1,) * 4, "reflect"), 3, 1)


def canny(x, low=50, high=150):
    """Edges of x (B, 1, S, S), levels: Sobel gradients, |gx| + |gy|, thinned along the gradient, weak ones kept where
    they touch strong ones. A GPU's host waits once a round of growing."""
    sobel = constant(((-1.0, 0, 1), (-2, 0, 2), (-1, 0, 1)), x.device)
    gradients = F.conv2d(F.pad(x, (1,) * 4, "replicate"), torch.stack([sobel, sobel.T])[:, None])
    gx, gy = gradients.round().long().split(1, 1)  # (B, 1, S, S) each
    m, S = gx.abs() + gy.abs(), x.shape[-1]
    around = F.pad(m, (1,) * 4)

    # Look up the magnitudes of the neighbours at an offset.
    def at(dy, dx):
        return around[..., 1 + dy : 1 + dy + S, 1 + dx : 1 + dx + S]

    # A gradient is flat below 22.5 degrees and steep above 67.5; tangents are multiplied by 2^15.
    flat = (gy.abs() << 15) < gx.abs() * 13573
    steep = (gy.abs() << 15) > gx.abs() * (13573 + 2**16)
    falling = (gx ^ gy) >= 0

    # An edge is a maximum along its gradient.
    across = (m > at(0, -1)) & (m >= at(0, 1))
    down = (m > at(-1, 0)) & (m >= at(1, 0))
    diagonal = torch.where(falling, (m > at(-1, -1)) & (m > at(1, 1)), (m > at(-1, 1)) & (m > at(1, -1)))
    thin = torch.where(flat, across, torch.where(steep, down, diagonal))

    # Strong edges grow along weak ones until nothing changes.
    weak = thin & (m > low)
    edges = weak & (m > high)
    while True:
        grown = weak & (F.max_pool2d(edges.float(), 3, 1, 1) > 0)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def distance(edges, most=20):
    """To the nearest edge of (B, 1, S, S), by steps of 1, 1.4 (diagonal) and 2.1969 (a knight's), capped."""
    # Lengths of steps are those of OpenCV's 5 x 5 mask, by the square of the step.
    lengths = {1: 1.0, 2: 1.4, 5: 2.1969}
    offsets = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if dy * dy + dx * dx in lengths]
    S, d = edges.shape[-1], torch.where(edges, 0.0, float(most))

    # A path below the cap has at most `most` steps; a CPU stops early, where a GPU would wait for its host.
    for _ in range(most):
        around = F.pad(d, (2,) * 4, value=most)
        nearer = d
        for dy, dx in offsets:
            there = around[..., 2 + dy : 2 + dy + S, 2 + dx : 2 + dx + S]
            nearer = torch.minimum(nearer, there + lengths[dy * dy + dx * dx])
        if d.device.type == "cpu" and torch.equal(nearer, d):
            break
        d = nearer
    return d


def equalize(x):
    """Levels of x (B, 1, S, S) spread so that their histogram is flat; the lowest becomes 0."""
    level = x.long().flatten(1)  # (B, S S)
    ones = torch.ones_like(level, dtype=torch.float32)
    counts = torch.zeros(len(x), 256, device=x.device).scatter_add_(1, level, ones)
    first = counts.gather(1, level.amin(1, True))  # (B, 1)
    table = ((counts.cumsum(1) - first) * (255 / (level.shape[1] - first).clamp(min=1))).round()
    return table.gather(1, level).view_as(x)


# fmt: off
CORRUPTIONS = {  # name: function, its constants for severities 1 to 5 at 224 px, and at 32 px [HD]
    "gaussian_noise": (gaussian_noise, (.08, .12, .18, .26, .38), (.04, .06, .08, .09, .10)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (.03, .06, .09, .17, .27), (.01, .02, .03, .05, .07)),
    "defocus_blur": (defocus_blur, ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    "glass_blur": (glass_blur, ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((.01, 12), (.01, 16), (.02, 11), (.02, 13), (.03, 11)),
                  ((.01, 7), (.01, 12), (.01, 16), (.01, 21), (.01, 26))),
    "snow": (snow, ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
             (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
             (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8))),
    "frost": (frost, ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
              ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    "contrast": (contrast, (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "elastic_transform": (elastic_transform, ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88),
                          (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
                          ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96))),
    "pixelate": (pixelate, (.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "speckle_noise": (speckle_noise, (.15, .2, .35, .45, .6), (.06, .1, .12, .16, .2)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6), (.4, .6, .7, .8, 1)),
    "spatter": (spatter, ((.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)),
                ((.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1))),
    "saturate": (saturate, ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
                 ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2))),
}
# fmt: on
BENCHMARK = tuple(CORRUPTIONS)[:15]  # the other four are for validation
CODECS = (pixelate, jpeg_compression)  # map uint8 to uint8


def corrupt(x, name, severity, seeds, photographs=()):
    """One corruption of ImageNet-C or CIFAR-10-C.

    x: uint8 (B, 3, S, S) on any device. name: one of CORRUPTIONS. severity: 1 to 5. seeds: (B,) integers, one an
    image, on which alone its random numbers depend. Sides below 96 px take the constants for 32 px, others those for
    224. photographs: of frost, uint8 (3, H, W). Returns uint8 (B, 3, S, S), truncated as the originals are, without
    the JPEG-85 that ImageNet-C was saved with. Raises KeyError for an unknown name, ValueError for a severity."""
    function, large, small = CORRUPTIONS[name]
    if severity not in range(1, 6):
        raise ValueError(f"severity {severity}: there are 1 to 5")
    constants = (small if x.shape[-1] < SMALL else large)[severity - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    more = dict(photographs=photographs) if name == "frost" else {}

    # Codecs map uint8 to uint8 and draw no random numbers.
    if function in CODECS:
        return function(x, None, *constants)

    # Chunks that fit into the caches of a CPU are faster.
    chunk = 8 if x.device.type == "cpu" and x.shape[-1] >= SMALL else len(x)
    parts = []
    for part, part_seeds in zip(x.split(chunk), seeds.split(chunk)):
        parts.append(levels(function(part.float(), Draws(part_seeds, x.device), *constants, **more)))
    return torch.cat(parts)


def levels(x):
    """Float levels, which it overwrites, -> uint8, clipped and truncated."""
    return x.clamp_(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Perturbations: generators of frames. x is the whole image, float (B, 3, H, W) in levels, y its centre (B, 3, S, S)
# ----------------------------------------------------------------------------------------------------------------------


def repeated(corruption):
    """The clean image, then 30 independent draws of a corruption."""

    def frames(x, y, draws, *constants):
        yield y
        for _ in range(30):
            yield corruption(y, draws, *constants)

    return frames


def motion_frames(x, y, draws, radius, sigma, step, n):
    for i in range(n):
        yield motion(y, radius, sigma, torch.full((len(y),), float(step * (i - n + 1)), device=y.device))


def zoom_frames(x, y, draws):
    total = 0
    for i in range(31):
        total = total + centre_zoom(y, 1 + 0.004 * i)
        yield total / (i + 1)


def snow_frames(x, y, draws, zoom, radius, sigma):
    flakes = centre_zoom(draws.normal(1, *y.shape[2:]) * 0.3 + 0.05, zoom)
    for i in range(31):
        yield snow_on(y, flakes, 0.5, radius, sigma, torch.full((len(y),), 4.0 * i - 150, device=y.device), 0.85)


def brightness_frames(x, y, draws, step):
    for i in range(31):
        yield brightness(y, draws, step * (i - 15))


def blur_frames(x, y, draws, first, step, truncate):
    for i in range(31):
        yield blur(y, first + step * i, truncate=truncate) + EPSILON


def spatter_frames(x, y, draws, mean, std, sigma, threshold, runs):
    """Drops that run down, a column convolved with `runs` from frame to frame."""
    drops = blur(draws.normal(1, *y.shape[2:]) * std + mean, sigma)
    drops, above = drops.masked_fill(drops < threshold, 0), len(runs) // 2
    for _ in range(31):
        yield y + water(drops, 0.6)
        padded = F.pad(drops, (0, 0, above, len(runs) - 1 - above))
        drops = sum(padded[:, :, j : j + y.shape[2]] * share for j, share in enumerate(runs[::-1]))


def warped(move, interpolation="bilinear", opencv=False):
    """Frames that warp the whole image with the 3 x 3 matrix move(i, W, H, *constants), from source to frame in
    pixels, and crop the centre; outside is black. `opencv=True` imitates OpenCV: coordinates in steps of 1/32 px,
    borders blended into black, results rounded. Otherwise Pillow: results truncated."""

    def frames(x, y, draws, n, *constants):
        """n frames (B, 3, S, S) of x (B, 3, H, W), S the side of y."""
        # A frame shows the centre of the image; its pixels are in homogeneous coordinates.
        (H, W), S = x.shape[2:], y.shape[-1]
        top, left = round((H - S) / 2), round((W - S) / 2)
        v, u = torch.meshgrid(torch.arange(S) + top, torch.arange(S) + left, indexing="ij")
        pixels = torch.stack([u, v, torch.ones_like(u)], 2).double()  # (S, S, 3)

        # Map each pixel of a frame to its place in the source, in pixels and then from -1 to 1.
        for i in range(n):
            back = pixels @ torch.linalg.inv(move(i, W, H, *constants)).T  # (S, S, 3) homogeneous, in the source
            source = back[..., :2] / back[..., 2:]
            source = (32 * source).round() / 32 if opencv else source
            grid = ((2 * source + 1) / torch.tensor([W, H]) - 1).float()
            grid = common.send(grid, x.device).expand(len(x), -1, -1, -1)

            # OpenCV blends the border into black, Pillow cuts it off.
            if opencv:
                yield F.grid_sample(x, grid, interpolation, "zeros", align_corners=False).round()
            else:
                moved = F.grid_sample(x, grid, interpolation, "border", align_corners=False)
                yield (moved + EPSILON) * (grid.abs() < 1).all(3)[:, None]

    return frames


def about_centre(W, H, matrix):
    """A linear map (2, 2) of pixels about the centre of the image, as a (3, 3)."""
    M, centre = torch.eye(3, dtype=torch.float64), torch.tensor([(W - 1) / 2, (H - 1) / 2], dtype=torch.float64)
    M[:2, :2] = torch.tensor(matrix, dtype=torch.float64)
    M[:2, 2] = centre - M[:2, :2] @ centre
    return M


def translate(i, W, H, middle):
    return torch.tensor([[1.0, 0, i - middle], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)


def rotate(i, W, H):
    a = math.radians(i - 15)  # clockwise
    return about_centre(W, H, [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def resize(i, W, H, first, step):
    return about_centre(W, H, [[first + step * i, 0], [0, first + step * i]])


def shear(i, W, H):
    return about_centre(W, H, [[1, -math.tan(math.radians(i - 15))], [0, 1]])


def tilt(i, W, H, step):
    """Turned in space about both axes, seen by a camera at distance f with focal length f, the diagonal. As in the
    original the plane is at depth 1, so the middle frame is a little smaller than the image."""
    a, f = math.radians(step * (i - 15)), math.hypot(W, H)
    c, s = math.cos(a), math.sin(a)
    matrix = lambda rows: torch.tensor(rows, dtype=torch.float64)

    # Move the centre to the origin, turn the plane about both axes, move it away by f, and project it.
    to_centre = matrix([[1, 0, -W / 2], [0, 1, -H / 2], [0, 0, 1]])
    about_x = matrix([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_y = matrix([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    away = matrix([[0, 0, 0], [0, 0, 0], [0, 0, f]])
    camera = matrix([[f, 0, W / 2], [0, f, H / 2], [0, 0, 1]])
    return camera @ (about_x @ about_y @ to_centre + away)


# fmt: off
PERTURBATIONS = {  # name: frames, their constants at 224 px, and at 32 px [HD]; ten to test on, four to validate on
    "gaussian_noise": (repeated(gaussian_noise), (.03,), (.02,)),
    "shot_noise": (repeated(shot_noise), (300,), (700,)),
    "motion_blur": (motion_frames, (10, 3, 4, 31), (6, 1.8, 9, 21)),
    "zoom_blur": (zoom_frames, (), ()),
    "snow": (snow_frames, (3, 14, 4), (2, 10, 2)),
    "brightness": (brightness_frames, (.02,), (.015,)),
    "translate": (warped(translate, "nearest"), (41, 20), (16, 7)),
    "rotate": (warped(rotate), (31,), (31,)),
    "tilt": (warped(tilt, opencv=True), (31, 1), (31, .75)),
    "scale": (warped(resize), (31, .4, .025), (31, .7, .02)),
    "speckle_noise": (repeated(speckle_noise), (.05,), (.05,)),
    "gaussian_blur": (blur_frames, (.25, .035, 6), (.3, .015, 7)),
    "spatter": (spatter_frames, (.65, .27, 3.7, .69, (.05, .1, .15, .7)), (.6, .265, 1.75, .7, (.2, .8))),
    "shear": (warped(shear), (31,), (31,)),
}
# fmt: on
TEST_PERTURBATIONS = tuple(PERTURBATIONS)[:10]  # the other four are for validation
ALL_PERTURBATIONS = tuple(PERTURBATIONS)[:14]


def perturb(x, name, seeds, size):
    """One sequence of ImageNet-P or CIFAR-10-P.

    x: uint8 (B, 3, H, W), the whole image, its short side 256 px for frames of 224, so that moving frames show what
    is beside the centre. name: one of PERTURBATIONS. seeds: (B,) integers, as for `corrupt`. size: S, side of the
    frames, H and W at most. Returns uint8 (B, n, 3, S, S), n 31, 41 or less, never compressed; of noises the first
    frame is clean."""
    function, large, small = PERTURBATIONS[name]
    constants = small if size < SMALL else large
    top, left = round((x.shape[2] - size) / 2), round((x.shape[3] - size) / 2)

    # Chunks bound the memory of the frames.
    chunk = 8 if x.device.type == "cpu" else 64
    out = []
    for image, image_seeds in zip(x.split(chunk), seeds.split(chunk)):
        image = image.float()
        y = image[:, :, top : top + size, left : left + size]
        frames = function(image, y, Draws(image_seeds, x.device), *constants)
        out.append(torch.stack([levels(frame) for frame in frames], 1))
    return torch.cat(out)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------

ALEXNET_CLEAN = 0.43478  # errors of torchvision's AlexNet, for severities 1 to 5 [HD, issue 10]
# fmt: off
ALEXNET = dict(
    gaussian_noise=(.69528, .82542, .93554, .98138, .99452), shot_noise=(.71224, .85108, .93574, .98182, .99146),
    impulse_noise=(.78374, .89808, .94870, .98720, .99548),
    defocus_blur=(.65624, .73202, .85036, .91364, .94714), glass_blur=(.64308, .75054, .88806, .91622, .93344),
    motion_blur=(.58430, .70048, .82108, .89750, .92638),
    zoom_blur=(.70008, .76992, .80784, .84198, .87198), snow=(.71726, .88392, .86468, .91870, .94952),
    frost=(.61390, .79734, .88790, .89942, .93430),
    fog=(.67474, .76050, .84378, .87260, .94500), brightness=(.45140, .48502, .54048, .62166, .72440),
    contrast=(.64548, .76150, .88874, .97760, .99270),
    elastic_transform=(.52596, .70116, .55686, .64076, .80554), pixelate=(.52218, .54620, .73728, .87092, .91262),
    jpeg_compression=(.51002, .54718, .57294, .65458, .74778))
ALEXNET_FLIPS = dict(  # its flip probabilities [assembled-cnn]
    gaussian_noise=.23653, shot_noise=.30062, motion_blur=.09297, zoom_blur=.05942, snow=.11928,
    brightness=.04889, translate=.11007, rotate=.13104, tilt=.07050, scale=.23531)
# fmt: on


def mean_corruption_error(errors, clean_error=None):
    """errors {corruption: of severities 1 to 5} in [0, 1] -> mCE in percent: those of the 15 corruptions, summed over
    severities, relative to AlexNet's. With the clean error, relative mCE: the error that corruption adds, relative to
    the error that it adds to AlexNet's."""
    ours, alexnet = (0.0, 0.0) if clean_error is None else (clean_error, ALEXNET_CLEAN)
    ratios = [sum(e - ours for e in errors[name]) / sum(e - alexnet for e in ALEXNET[name]) for name in BENCHMARK]
    return 100 * sum(ratios) / len(ratios)


def mean_flip_rate(flips):
    """flips {perturbation: probability that the prediction changes} -> mFR in percent: the ten test types, relative
    to AlexNet's."""
    return 100 * sum(flips[name] / ALEXNET_FLIPS[name] for name in TEST_PERTURBATIONS) / len(TEST_PERTURBATIONS)


def ranking(scores):
    """Scores (..., C) -> classes from best to worst; of equal ones the lower first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def count_right(condition, scores, labels):
    """Scores (B, C), labels (B,) -> (3,) int64, whatever the condition: images, those right, those with the class
    among the first five. Nothing here makes a GPU's host wait."""
    right = ranking(scores)[:, :5] == labels[:, None]
    images = labels.new_full((), len(labels))
    return torch.stack([images, right[:, 0].sum(), right.sum()])


def count_changes(scores, noise):
    """Scores (B, n, C) of sequences -> (3,) int64: pairs of frames, those whose predictions differ, sum of their
    top-5 distances.

    Pairs are a frame and the one before it, of noises a frame and the first. Top-5 distance: sum over the first five
    classes i of one frame, counted from 1, of | min(i - 1, 5) - min(rank in the other frame - 1, 5) |, 0 to 15."""
    order = ranking(scores)  # (B, n, C)
    ranks = order.argsort(-1)  # (B, n, C) of every class, from 0
    before = order[:, :1].expand(-1, scores.shape[1] - 1, -1) if noise else order[:, :-1]  # (B, n - 1, C)

    # Compare places 1 to 5 of a frame with the ranks of the same classes in the other frame.
    after = ranks[:, 1:].gather(2, before[..., :5]).clamp(max=5)  # (B, n - 1, 5)
    moved = (after - torch.arange(after.shape[2], device=scores.device)).abs().sum()
    changed = before[..., 0] != order[:, 1:, 0]  # (B, n - 1)
    return torch.stack([order.new_full((), changed.numel()), changed.sum(), moved])


# ----------------------------------------------------------------------------------------------------------------------
# Suites: images and conditions, what is counted, and how counts become a row of the table
# ----------------------------------------------------------------------------------------------------------------------


class Source:
    """What a suite starts from, uint8: the centre of the images (n, 3, S, S), short side scaled to 256/224 S before;
    or `whole` images, (n, 3, H, W) or, where their sizes differ, a list of (3, H, W). Below 96 px nothing is cut off;
    images that are S x S already are not changed."""

    def __init__(self, size, whole=False, interpolation="bilinear"):
        self.size, self.whole = size, whole
        self.centre = common.CenterCrop(size, interpolation=interpolation)

    def __call__(self, images, params=None):
        if not self.whole:
            return self.centre(images)

        # Scale the short side as it is before the crop. Images of different sizes stay apart.
        short, out = self.centre.resize, []
        for x in [images] if isinstance(images, torch.Tensor) else [image[None] for image in images]:
            H, W = x.shape[2:]
            if min(H, W) != short and not H == W == self.size:
                x = common.resize(x, (short * H // min(H, W), short * W // min(H, W)), "bilinear")
            out.append(x)
        return torch.cat(out) if len({x.shape[2:] for x in out}) == 1 else [x[0] for x in out]


@dataclasses.dataclass
class Subject:
    """A checkpoint with the linear probes, one a part, that were trained on its clean features."""

    name: str
    path: str
    case: eval_probe.Case
    probe: dict | None = None  # how they were trained

    @torch.no_grad()
    def scores(self, x):
        """uint8 (B, 3, S, S) -> {part: (B, C)}; images of another size than the encoder's are resized."""
        backbone, side = self.case.backbone, self.case.backbone.img_size
        if x.shape[-1] != side:
            x = common.resize(x, (side, side), "bicubic")
        normalise = common.Normalize(backbone.mean, backbone.std)
        features = []

        # Chunks of 256 images bound the memory of the encoder; all probes read the same features.
        for chunk in x.split(256):
            with common.autocast(self.case.device, self.case.args.amp):
                features.append(backbone.last_blocks(normalise(chunk.float() / 255)).float())
        scores = self.case.read("linear", torch.cat(features))
        return {name.removeprefix("linear"): part_scores for name, part_scores in scores.items()}


def size_of(subject):
    return subject.case.backbone.img_size


@dataclasses.dataclass
class Job:
    """Images that are read once, and what is made of them for some of the subjects."""

    name: str
    read: Callable  # subject -> ImageSet, the same for all subjects
    source: Callable  # op that crops
    conditions: list
    subjects: list
    make: Callable = lambda x, rows, condition: x  # uint8 images
    batch_size: int = 256
    images: int = 0  # how many there are,
    done: int = 0  # and how many have been shown


@dataclasses.dataclass
class Suite:
    """Conditions, and jobs that show them. count(condition, scores, labels) -> (k,) int64. row(counts (conditions,
    k)) -> (results in percent, counts for the record). details: its own part of the protocol; notes: lines that are
    printed beside its table. curves(counts), where there is one, -> {"NAME @k": percent} for lines of the figure."""

    conditions: list
    jobs: list
    count: Callable
    k: int
    row: Callable
    details: dict = dataclasses.field(default_factory=dict)
    notes: list = dataclasses.field(default_factory=list)
    curves: Callable | None = None


def zeros(suite, subjects):
    """No counts yet: {path of a subject: {part: (conditions, k) int64}}."""
    none = lambda case: torch.zeros(len(suite.conditions), suite.k, dtype=torch.int64, device=case.device)
    return {subject.path: {part: none(subject.case) for part, _ in subject.case.parts(0)} for subject in subjects}


def measure(suite, sums, args):
    """Do a suite's jobs, each condition made once for all subjects. Counts are added to `sums` as they come, and summed
    over ranks at the end."""
    reader = None
    for job in suite.jobs:
        data, device = job.read(job.subjects[0]), job.subjects[0].case.device

        # Jobs on the same images share a reader; ranks share the images.
        if reader is None or reader.data is not data:
            reader = common.Reader(data, args.workers)
        local_rows = first_of_classes(data, args.images_per_class)[common.rank() :: common.world_size()]
        job.images = len(local_rows)

        # Make every condition of a batch once, and score it with all subjects.
        for rows, x in reader.batches(job.source, local_rows, batch_size=job.batch_size, name=job.name):
            x = [image.to(device) for image in x] if isinstance(x, list) else common.send(x, device)
            labels = common.send(data.labels[rows], device)
            for condition in job.conditions:
                y, c = job.make(x, rows, condition), suite.conditions.index(condition)
                for subject in job.subjects:
                    for part, scores in subject.scores(y).items():
                        sums[subject.path][part][c] += suite.count(condition, scores, labels)
            job.done += len(rows)
    for parts in sums.values():
        for part, n in parts.items():
            parts[part] = common.all_reduce(n)


def at_own_size(name, read, condition, subjects):
    """A job for each size of encoder: images cropped as in eval_probe.py."""
    crop = partial(common.CenterCrop, interpolation="bicubic")
    groups = groupby(sorted(subjects, key=size_of), size_of)
    return [Job(name, read, crop(size), [condition], list(group)) for size, group in groups]


def clean(subjects, condition):
    """The jobs that show unaltered test images."""
    return at_own_size("clean", lambda subject: subject.case.test, condition, subjects)


def resized(what, size, subjects):
    """A line about encoders of another size than the images are made at, if there are any."""
    others = [f"{subject.name} ({size_of(subject)} px)" for subject in subjects if size_of(subject) != size]
    if not others:
        return []
    line = f"{what} are made at {size} px, the size of their constants, and resized for {', '.join(others)}"
    return [f"{line}; clean images are seen at the encoder's own size"]


def first_of_classes(data, most):
    """Rows of the first `most` images of each class, or of all."""
    if most is None:
        return torch.arange(len(data))
    return torch.cat([(data.labels == c).nonzero()[:most, 0] for c in data.labels.unique()]).sort().values


def seeds_of(data, *key):
    """(N,) int64, an image's seed for one condition."""
    return torch.randint(2**62, (len(data),), generator=common.rng(*key))


def mean_over(values, names):
    """Mean of {name: value} over some names."""
    return sum(values[name] for name in names) / len(names)


def on_imagenet(size, data):
    """Whether AlexNet's errors are those of these images: large ones of 1,000 classes, named by their WordNet ids."""
    return size >= SMALL and len(data.classes) == 1000 and all(re.fullmatch(r"n\d{8}", c) for c in data.classes)


def batch_of(size, device, small, large, gpu):
    """Images a batch. On a CPU what fits into its caches, of small and of large images."""
    if device.type != "cpu":
        return gpu
    return small if size < SMALL else large


def corruptions(subjects, data, args):
    """The 15 corruptions and the 4 of validation, 5 severities each."""
    names, size = args.types or tuple(CORRUPTIONS), side_of(subjects)
    photographs = load_frost(args.frost_dir, size)
    jpeg85 = args.jpeg85 and size >= SMALL

    # The seeds of a condition do not depend on the other conditions. ImageNet-C was saved as JPEG of quality 85.
    conditions = [("clean", 0), *((name, severity) for name in names for severity in range(1, 6))]
    seeds = {c: seeds_of(data, args.seed, *c) for c in conditions}

    def make(x, rows, condition):
        y = corrupt(x, *condition, seeds[condition][rows], photographs)
        return jpeg_compression(y, None, 85) if jpeg85 else y

    # Read each published file by itself, or make all conditions from one reading of the clean images.
    if args.suite_dir:
        root, jobs = Path(args.suite_dir[0]), []
        for c in conditions[1:]:
            read = lambda subject, c=c: finished(root, *c, data.classes)
            jobs += at_own_size(f"{c[0]} {c[1]}", read, c, subjects)
        small = any(find_finished(root, *c).suffix == ".npy" for c in conditions[1:])  # CIFAR-10-C's
        notes = resized(f"the corruptions in {root}", 32, subjects) if small else []
    else:
        batch = batch_of(size, subjects[0].case.device, small=256, large=64, gpu=256)
        jobs = [Job("corruptions", lambda subject: data, Source(size), conditions[1:], subjects, make, batch)]
        notes = resized("corruptions", size, subjects)

    # A star marks results whose frost is not the published one.
    star, frost_from = "", "photographs" if photographs else None
    if "frost" in names and not photographs and not args.suite_dir:
        star, frost_from = "*", "procedural"
        notes.append(f"{FROST_NOTE}; --frost-dir takes photographs")

    def row(n):
        """Counts (conditions, 3): images, right, right among five -> results in percent, and the counts for the
        record."""
        accuracy = (100 * (n[:, 1:].double() / n[:, :1])).T.tolist()  # top-1, top-5
        top1, top5 = (dict(zip(conditions, values)) for values in accuracy)
        over_severities = lambda top, name: [top[name, severity] for severity in range(1, 6)]
        mean = {name: sum(over_severities(top1, name)) / 5 for name in names}

        # Means come before the single corruptions, and need all corruptions of the benchmark.
        values = dict(clean=top1["clean", 0])
        if set(BENCHMARK) <= set(names):
            values[f"mean{star}"] = mean_over(mean, BENCHMARK)
            if len(data.classes) > 5:
                every = [v for name in BENCHMARK for v in over_severities(top5, name)]
                values[f"mean top-5{star}"] = sum(every) / len(every)
            if star:
                values["without frost"] = mean_over(mean, [name for name in BENCHMARK if name != "frost"])

            # AlexNet's errors are known on ImageNet only.
            if on_imagenet(size, data):
                errors = {name: [1 - v / 100 for v in over_severities(top1, name)] for name in BENCHMARK}
                values[f"mCE{star}"] = mean_corruption_error(errors)
                values[f"rel mCE{star}"] = mean_corruption_error(errors, 1 - values["clean"] / 100)

        # The table has the mean over severities, the record the counts of each.
        values |= {name + star if name == "frost" else name: mean[name] for name in names}
        right = {f"{name} {s}".removesuffix(" 0"): counts[1:].tolist() for (name, s), counts in zip(conditions, n)}
        return values, dict(images=n[0, 0].item(), right=right)

    # The record says where images and frost come from.
    source = "files" if args.suite_dir else "made here"
    details = dict(jpeg85=jpeg85 and not args.suite_dir, frost=frost_from, source=source)
    jobs = clean(subjects, conditions[0]) + jobs
    return Suite(conditions, jobs, count_right, 3, row, details, notes, partial(over_severity, conditions, star))


def over_severity(conditions, star, n):
    """Counts (conditions, 3) of `corruptions` -> {"fog @1": accuracy in percent, ...}; severity 0 is clean, and the
    star goes to frost."""
    accuracy = dict(zip(conditions, (100 * n[:, 1].double() / n[:, 0]).tolist()))
    curves = {}
    for name, severity in conditions[1:]:
        title = f"{name}{star}" if name == "frost" else name
        curves[f"{title} @0"] = accuracy[conditions[0]]
        curves[f"{title} @{severity}"] = accuracy[name, severity]
    return curves


def perturbations(subjects, data, args):
    """The 10 sequences, and the 4 of validation: top-1 accuracy over all frames, how often predictions change, and
    how far the first five classes move."""
    names, size = args.types or tuple(PERTURBATIONS), side_of(subjects)
    seeds = {name: seeds_of(data, args.seed, "sequence", name) for name in names}

    # Whole images that differ in size are perturbed one by one.
    def make(x, rows, name):
        whole = [image[None] for image in x] if isinstance(x, list) else [x]
        part_seeds = seeds[name][rows].split([len(images) for images in whole])
        frames = [perturb(images, name, image_seeds, size) for images, image_seeds in zip(whole, part_seeds)]
        return torch.cat(frames).flatten(0, 1)  # (B n, 3, S, S)

    # Frames are scored as images, and compared within their sequence.
    def count(name, scores, labels):
        n = len(scores) // len(labels)
        right = count_right(name, scores, labels.repeat_interleave(n))
        return torch.cat([right, count_changes(scores.unflatten(0, (-1, n)), name.endswith("noise"))])

    def row(n):
        """Counts n (names, 6) -> ({metric: percent, mFR or distance} of the table, the rest for the record)."""
        frames, right, right5, pairs, changes, distances = n.double().T
        by_name = lambda values: dict(zip(names, values.tolist()))
        top1, top5 = by_name(100 * right / frames), by_name(100 * right5 / frames)
        flips, moved = by_name(changes / pairs), by_name(distances / pairs)

        # A mean needs all of its types.
        summary = {}
        if set(ALL_PERTURBATIONS) <= set(names):
            summary = {"top-1": mean_over(top1, ALL_PERTURBATIONS), "top-5": mean_over(top5, ALL_PERTURBATIONS)}
        if set(TEST_PERTURBATIONS) <= set(names):
            summary["flips"] = 100 * mean_over(flips, TEST_PERTURBATIONS)
            if on_imagenet(size, data):
                summary["mFR"] = mean_flip_rate(flips)
            summary["top-5 distance"] = mean_over(moved, TEST_PERTURBATIONS)

        # With five classes or fewer, top-5 metrics say nothing.
        if len(data.classes) <= 5:
            summary = {k: v for k, v in summary.items() if not k.startswith("top-5")}
        record = dict(frames=n[0, 0].item(), top1=top1, top5=top5, flip_probability=flips, top5_distance=moved)
        return summary | top1, record

    # An image becomes up to 41 frames, so that batches are small.
    batch = batch_of(size, subjects[0].case.device, small=32, large=8, gpu=64)
    jobs = [Job("perturbations", lambda subject: data, Source(size, whole=True), names, subjects, make, batch)]
    details = dict(codec="none", flips_over=TEST_PERTURBATIONS)
    return Suite(names, jobs, count, 6, row, details, resized("perturbations", size, subjects))


def augmentations(subjects, data, args):
    """CLeVER's test images: unaltered; with colours jittered; and flipped, turned by up to 90 degrees, or turned and
    deformed as well."""
    # Each condition applies its operations in order; random ones are repeated in several passes.
    jitter, turn = common.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1), common.Affine(90, interpolation="nearest")
    ops = {
        "Orig": [],
        "CJ": [jitter],
        "CJ+Flip": [common.HorizontalFlip(1), jitter],
        "CJ+Ro": [turn, jitter],
        "CJ+Ro+ET": [turn, jitter, common.Elastic(100, p=1)],
    }
    conditions = [(name, k) for name in ops for k in range(args.passes if ops[name] else 1)]

    # Parameters are drawn for the whole set, so that they do not depend on batches.
    params = {}  # {condition: [parameters (N, ...) of an op]}
    for condition in conditions:
        g = common.rng(args.seed, "augmentations", *condition)
        params[condition] = [op.sample(len(data), g) for op in ops[condition[0]]]

    def make(x, rows, condition):
        y = x.float() / 255
        for op, p in zip(ops[condition[0]], params[condition]):
            y = op(y, {k: v[rows] for k, v in p.items()})
        return (255 * y).round().clamp(0, 255).to(torch.uint8)

    def row(n):  # (conditions, 3)
        top1 = [100 * v for v in (n[:, 1].double() / n[:, 0]).tolist()]
        passes = {name: [v for v, c in zip(top1, conditions) if c[0] == name] for name in ops}
        means = {name: sum(values) / len(values) for name, values in passes.items()}
        return means, dict(images=n[0, 0].item(), passes=passes)

    # Each size of encoder has a job of clean images and one of augmented ones.
    jobs = []
    for job in clean(subjects, conditions[0]):
        batch = batch_of(job.source.size, subjects[0].case.device, small=256, large=64, gpu=256)
        how = Source(job.source.size), conditions[1:], job.subjects, make, batch
        jobs += [job, Job("augmentations", job.read, *how)]
    return Suite(conditions, jobs, count_right, 3, row)


def shifts(subjects, data, args):
    """Other images of the same classes: folders named after the classes; of `blocks` rendered stand-ins."""
    classes = {"clean": data.labels.unique()}  # of each set

    # Published sets are read from folders; `blocks` has rendered stand-ins.
    if args.suite_dir:
        jobs = []
        for path in args.suite_dir:
            name, shifted = Path(path).resolve().name, labelled(Path(path), data.classes)
            jobs += at_own_size(name, lambda subject, shifted=shifted: shifted, name, subjects)
            classes[name] = shifted.labels.unique()
    else:
        data_set = subjects[0].case.state["data"]
        name, split = ("hues (stand-in)", "hues") if data_set == "blocks" else ("sessions seen (stand-in)", "seen")
        read = lambda subject: common.load_data(data_set, None, split, size_of(subject))
        jobs = at_own_size(name, read, name, subjects)
        classes[name] = read(subjects[0]).labels.unique()

    # Count twice, with all classes to choose from and with those of the set alone.
    def count(name, scores, labels):
        kept = common.send(classes[name], scores.device)
        masked = torch.full_like(scores, -math.inf).index_copy(1, kept, scores[:, kept])
        return torch.cat([count_right(name, scores, labels), count_right(name, masked, labels)[1:]])

    def row(n):
        """Counts n (sets, 5) -> ({set: percent} of the table, {set: its counts} for the record)."""
        values, details = {}, {}
        for name, counts in zip(classes, n.tolist()):
            images, top1, top5, masked, masked5 = counts
            record = dict(images=images, top1=top1, top5=top5, masked=masked, masked_top5=masked5)
            details[name] = record | dict(classes=len(classes[name]))

            # Accuracy over the classes of the set is shown where the set lacks some.
            percent = [100 * right / images if images else math.nan for right in (top1, top5, masked)]
            values[name] = percent[0]
            if len(data.classes) > 5:
                values[f"{name} top-5"] = percent[1]
            if len(classes[name]) < len(data.classes):
                values[f"{name} ({len(classes[name])} classes)"] = percent[2]
        return values, details

    return Suite(list(classes), clean(subjects, "clean") + jobs, count, 5, row)


FROST_NOTE = "* with frost drawn by a procedure, not from photographs: not comparable with published figures"
SUITES = dict(corruptions=corruptions, perturbations=perturbations, augmentations=augmentations, shifts=shifts)


# ----------------------------------------------------------------------------------------------------------------------
# Files: published sets, photographs of frost, contact sheets
# ----------------------------------------------------------------------------------------------------------------------


def class_index(folder, classes, names=None):
    """Names of class folders, by default those of a folder -> their classes: of the same name, or of that number."""
    if names is None:
        names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(names) < 2:
        common.die(f"--suite-dir {folder}: holds no class folders; one folder a class is expected")

    # ImageNet-V2 numbers its folders in the order of the classes.
    numbers = all(name.isdigit() for name in names) and not set(names) <= set(classes)
    unknown = [name for name in names if (int(name) >= len(classes) if numbers else name not in classes)]
    if unknown:
        why = f"{unknown[0]} is no class of the training images"
        common.die(f"--suite-dir {folder}: {why}; folders are named like {classes[0]}, or 0 to {len(classes) - 1}")
    return torch.tensor([int(name) if numbers else classes.index(name) for name in names])


@functools.lru_cache
def labelled(folder, classes):
    """A tree of one folder a class, labelled by their names."""
    class_index(folder, classes)  # before all files are listed
    data = common.imagefolder(folder, "train")
    return dataclasses.replace(data, labels=class_index(folder, classes, data.classes)[data.labels], classes=classes)


def finished(root, name, severity, classes):
    """One condition of a published set: ROOT/[GROUP/]NAME/SEVERITY/CLASS/* of ImageNet-C, or ROOT/NAME.npy of
    CIFAR-10-C."""
    file = find_finished(root, name, severity)
    if file.suffix != ".npy":
        return labelled(file, classes)
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
        labels = torch.from_numpy(np.load(root / "labels.npy", allow_pickle=False)).long()
    except (OSError, ValueError) as e:
        common.die(f"--suite-dir {root}: {name}.npy and labels.npy cannot be read ({e})")

    # The five severities follow one another in the file, which is mapped into memory.
    n = len(images) // 5
    part = slice((severity - 1) * n, severity * n)
    labels = labels[part]
    if images.shape[1:] != (32, 32, 3) or len(labels) != n or int(labels.max()) >= len(classes):
        expected = f"5 x N images of 32 x 32 x 3 and labels.npy their classes below {len(classes)}"
        common.die(f"--suite-dir {root}: {name}.npy should hold {expected}; found {images.shape}")
    pixels = torch.from_numpy(images[part].copy()).permute(0, 3, 1, 2)
    return common.ImageSet(images=pixels, labels=labels, classes=classes)


def find_finished(root, name, severity):
    """The file or folder of one condition of a published set."""
    array = root / f"{name}.npy"
    if array.is_file():
        return array

    # ImageNet-C's archives group corruptions in folders, such as noise and blur.
    for place in (root / name / f"{severity}", *sorted(root.glob(f"*/{name}/{severity}"))):
        if place.is_dir():
            return place
    why = f"has neither {name}/{severity}/ nor {name}.npy"
    common.die(f"--suite-dir {root}: {why}; --types names the corruptions that are there")


@functools.lru_cache
def load_frost(folder, size):
    """The photographs in a folder, uint8 (3, H, W), shrunk to a fifth for small images. The original has six and
    never takes the last."""
    if folder is None:
        return ()
    try:
        paths = [p for p in common.Paths(folder, common.image_names(folder)) if Path(p).stem != "frost6"]
        images = [common.open_image(p) for p in paths]
    except OSError as e:
        common.die(f"--frost-dir {folder}: {e}")

    # Photographs shrink without antialiasing, as OpenCV does it. A crop must fit into each.
    if size < SMALL:
        fifth = lambda x: F.interpolate(x[None].float(), (x.shape[1] // 5, x.shape[2] // 5), mode="bilinear")[0]
        images = [fifth(x).round().to(torch.uint8) for x in images]
    if not images or min(min(x.shape[1:]) for x in images) < size:
        least = size if size >= SMALL else 5 * size
        common.die(f"--frost-dir {folder}: photographs of at least {least} px are needed, found {len(images)} images")
    return tuple(images)


def contact_sheet(path, rows, side=96):
    """{label: [uint8 (3, S, S)]} -> a picture, a row a label."""
    # The margin has room for the longest label.
    columns, margin = max(map(len, rows.values())), 8 * max(map(len, rows)) + 8
    sheet = Image.new("RGB", (margin + columns * (side + 2), len(rows) * (side + 2)), "white")
    for i, (label, images) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((4, i * (side + 2) + side // 2 - 6), label, fill="black")
        for j, x in enumerate(images):
            # Small images keep sharp pixels when they grow; large ones are averaged when they shrink.
            tile = Image.fromarray(x.permute(1, 2, 0).contiguous().cpu().numpy())
            tile = tile.resize((side, side), Image.NEAREST if x.shape[-1] <= side else Image.BOX)
            sheet.paste(tile, (margin + j * (side + 2), i * (side + 2)))
    sheet.save(path)


def save_sheet(suite, data, size, args):
    """A contact sheet of a suite's versions of the first image of the test set."""
    first = torch.zeros(1, dtype=torch.long)
    x = Source(size, whole=suite == "perturbations")(data[first], first)  # (1, 3, H, W)
    photographs, rows = load_frost(args.frost_dir, size), {}

    # Each type has a row, of the clean image and five severities, or of every fifth frame.
    if suite == "corruptions":
        for name in args.types or CORRUPTIONS:
            rows[name] = [x[0]]
            for severity in range(1, 6):
                seed = seeds_of(data, args.seed, name, severity)[:1]
                y = corrupt(x, name, severity, seed, photographs)
                rows[name].append((jpeg_compression(y, None, 85) if args.jpeg85 and size >= SMALL else y)[0])
    else:
        for name in args.types or PERTURBATIONS:
            frames = perturb(x, name, seeds_of(data, args.seed, "sequence", name)[:1], size)[0]
            rows[name] = list(frames[::5])

    # A picture that cannot be written costs a line, not the evaluation.
    try:
        contact_sheet(Path(args.save_images) / f"{suite}.png", rows)
    except OSError as e:
        eval_probe.say(f"--save-images {args.save_images}: no picture of {suite} ({e.strerror})")


# ----------------------------------------------------------------------------------------------------------------------
# From checkpoints to the tables
# ----------------------------------------------------------------------------------------------------------------------


def run(name, subjects, data, args, evaluation, protocol, panels):
    """A suite -> the rows of its table, which is printed, and `panels` of the figure; a record a checkpoint. A suite
    that breaks off prints what it has counted."""
    start = time.monotonic()
    suite = SUITES[name](subjects, data, args)
    sums = zeros(suite, subjects)

    def show():
        """Print the table of what is counted so far, keep its panels for --plot; returns the rows."""
        for note in suite.notes:
            eval_probe.say(note)

        # A part of a subject is a row of the table; metrics that are not finite are left out.
        rows, curves = [], []
        for subject in subjects:
            for part, n in sums[subject.path].items():
                values, _ = suite.row(n.cpu())
                rows.append((subject.name + part, {k: v for k, v in values.items() if math.isfinite(v)}))
                if suite.curves:
                    curves.append((subject.name + part, suite.curves(n.cpu())))
        evaluation.table(rows, args.format)
        panels.extend(panels_of(f" ({name})", rows, curves))
        return rows

    # An interruption, also by a signal, prints the counts so far, and is then passed on.
    try:
        measure(suite, sums, args)
    except BaseException:
        partial_jobs = [job for job in suite.jobs if job.done < job.images]
        seen = ", ".join(f"{job.done:,} of {job.images:,} ({job.name})" for job in partial_jobs)
        eval_probe.say(f"{name} broke off; of some conditions the table counts a part of the images: {seen or 'none'}")
        show()
        raise

    # Append a record beside each checkpoint, then print the table.
    seconds = time.monotonic() - start
    for subject in subjects:
        parts = {part: suite.row(n.cpu()) for part, n in sums[subject.path].items()}
        results = {part or "all": values for part, (values, _) in parts.items()}
        own = dict(suite=name, probe=subject.probe, seconds=seconds, **suite.details)
        own |= dict(details={part: record for part, (_, record) in parts.items()})
        eval_probe.append_record(subject.path, subject.case.state, args, results, protocol | own)
    eval_probe.say(f"{name}: {seconds:.1f} s")
    return show()


def panels_of(suffix, rows, curves):
    """Panels of a suite's table. A metric of which there are curves is drawn over severity and not as bars."""
    drawn = {metric.partition(" @")[0] for _, values in curves for metric in values}
    bars = [(name, {k: v for k, v in values.items() if k not in drawn}) for name, values in rows]
    panels = eval_probe.make_panels(bars, suffix=suffix)
    return panels + eval_probe.make_panels(curves, "severity (0: clean)", suffix)


def main(argv=None):
    """Run every suite on every checkpoint, append the results to the eval.jsonl beside each, print a table a suite;
    returns {suite: rows}."""
    panels, data = [], []  # of the figure; names of the sets
    with eval_probe.Evaluation() as evaluation:
        # Refuse impossible calls before checkpoints are read.
        eval_probe.checkpoints_first(argv, Args)
        args = common.parse(Args, lambda first: {}, argv, description=__doc__)
        common.check_ranges(args)
        check(args)

        # Probes are trained as in eval_probe.py, by the flags that both scripts have.
        shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(eval_probe.SharedArgs)}
        probing = eval_probe.Args(tasks=("linear",), **shared)
        eval_probe.check(probing)
        device = evaluation.start(args.device)
        torch.set_float32_matmul_precision("highest")  # corruptions need float32; containers may have chosen TF32

        # The figure is drawn in any case, even after an error.
        def at_end():
            title = f"Linear probes of clean features on altered images of {', '.join(dict.fromkeys(data))}"
            if any("*" in panel.title for panel in panels):
                title += f"; {FROST_NOTE}"
            evaluation.plot(args.plot, panels, title)

        # Open all checkpoints that can be read, and evaluate them together.
        evaluation.at_end = at_end
        cases = eval_probe.open_all(probing, lambda state: probing, device, evaluation)
        subjects = [Subject(name, path, case) for path, name, case in cases]
        data += [subject.case.state["data"] for subject in subjects]
        return evaluate(subjects, args, evaluation, panels) if subjects else {}


def sessions_of(case):
    """The sessions of core50 that a checkpoint was trained on; the others test."""
    return tuple(case.state["args"].get("sessions", (1, 2)))


def evaluate(subjects, args, evaluation, panels):
    """All suites on all subjects -> {suite: rows of its table}; their panels are added to `panels`."""
    first = subjects[0].case
    size, device = side_of(subjects), first.device
    name, root = first.state["data"], first.state["data_dir"]
    if "shifts" in args.suite and not args.suite_dir and not name.startswith("blocks"):
        common.die(f"--suite-dir: name the folders of the shifted sets, such as ImageNet-V2's; {name} has no stand-in")

    # All checkpoints need the same test images, as each batch is altered once for all of them.
    for subject in subjects:
        same = (subject.case.state["data"], subject.case.state["data_dir"]) == (name, root)
        same &= name != "core50" or sessions_of(subject.case) == sessions_of(first)
        if side_of([subject]) != size or not same or subject.case.train.classes != first.train.classes:
            why = f"was trained on other data or sessions, or for images of another size, than {subjects[0].path}"
            common.die(f"{subject.path}: {why}; name --data and --data-dir, or run them apart")

    # Read all data before probes are trained, so that missing or unsuitable data end the evaluation early.
    data = common.load_data(name, root, "test", size) if name.startswith("blocks") else first.test
    load_frost(args.frost_dir, size)
    check_sets(args, data.classes)
    if args.save_images and common.rank() == 0:
        for suite in set(args.suite) & {"corruptions", "perturbations"}:
            save_sheet(suite, data, size, args)

    # Train probes on clean features, once for all suites, and release the features.
    for subject in list(subjects):
        subject.probe = evaluation.attempt(subject.path, subject.case.fit_probes)
        if subject.probe is None:
            subjects.remove(subject)
        for large in {"x", "readers"} & set(vars(subject.case)):
            delattr(subject.case, large)

    # A suite that fails does not stop the others.
    protocol = dict(size=size, data=name, data_dir=root, device=device.type)
    tables = {}
    for suite in args.suite if subjects else ():
        rows = evaluation.attempt(suite, partial(run, suite, subjects, data, args, evaluation, protocol, panels))
        if rows is not None:
            tables[suite] = rows
    return tables


if __name__ == "__main__":
    common.command(main)
