"""Milliseconds an image that corruptions of eval_robustness.py take at 224 px, severity 3, beside the original code's.

    python tests/bench_corrupt.py                   # one thread
    python tests/bench_corrupt.py --device cuda     # images a second there

The original (one image at a time; NumPy, OpenCV, ImageMagick, Pillow) is not installed here: its times were taken
once, on one thread of another machine, and are rescaled by peers that are simple enough to be written down again and
were timed in that run too. A figure is good for this machine and this run."""

import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import eval_robustness

ORIGINAL = dict(  # ms an image, severity 3
    gaussian_noise=2.9,
    shot_noise=9.2,
    impulse_noise=1.9,
    defocus_blur=1.8,
    glass_blur=1002,
    motion_blur=56,
    zoom_blur=60,
    snow=34,
    frost=5.7,
    fog=2.0,
    brightness=11.3,
    contrast=1.8,
    elastic_transform=12.3,
    pixelate=0.43,
    jpeg_compression=0.43,
)


def gaussian_noise(image):
    x = np.array(image) / 255.0
    return np.uint8(np.clip(x + np.random.normal(size=x.shape, scale=0.18), 0, 1) * 255)


def shot_noise(image):
    x = np.array(image) / 255.0
    return np.uint8(np.clip(np.random.poisson(x * 12) / 12.0, 0, 1) * 255)


def contrast(image):
    x = np.array(image) / 255.0
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.uint8(np.clip((x - mean) * 0.2 + mean, 0, 1) * 255)


def pixelate(image):
    return np.uint8(image.resize((89, 89), Image.BOX).resize((224, 224), Image.BOX))


def jpeg_compression(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=15)
    return np.uint8(Image.open(file))


def images(n):
    """Smooth colourful ones."""
    g = common.rng("bench")
    x = sum(
        torch.nn.functional.interpolate(torch.randn(n, 3, s, s, generator=g), (224, 224), mode="bicubic")
        for s in (3, 9, 27)
    )
    return ((x * 0.18 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def main():
    device = torch.device(sys.argv[2] if sys.argv[1:2] == ["--device"] else "cpu")
    torch.set_num_threads(1)
    x = images(16 if device.type == "cpu" else 256).to(device)
    seeds = torch.arange(len(x))
    pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in x[:16]]
    peers = dict(
        gaussian_noise=gaussian_noise,
        shot_noise=shot_noise,
        contrast=contrast,
        pixelate=pixelate,
        jpeg_compression=jpeg_compression,
    )
    ours = {name: [] for name in eval_robustness.CORRUPTIONS}
    theirs = {name: [] for name in peers}

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed(run, n):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        return 1e3 * (time.perf_counter() - begin) / n

    # The first round warms up.
    for r in range(6):
        for name in ours:
            t = timed(lambda name=name: eval_robustness.corrupt(x, name, 3, seeds), len(x))
            if r:
                ours[name].append(t)
        for name, peer in peers.items():
            t = timed(lambda peer=peer: [peer(p) for p in pictures], len(pictures))
            if r:
                theirs[name].append(t)
    ours, theirs = ({k: statistics.median(v) for k, v in times.items()} for times in (ours, theirs))
    if device.type != "cpu":
        for name, ms in ours.items():
            print(f"| {name} | {1e3 / ms:,.0f} images/s |")
        return

    # The original's times, rescaled by the median of the peers.
    factors = {name: theirs[name] / ORIGINAL[name] for name in peers}
    factor = statistics.median(factors.values())
    pairs = ", ".join(f"{name} {theirs[name]:.2f} / {ORIGINAL[name]}" for name in peers)
    print(f"peers, ms here / there: {pairs}; this machine takes {factor:.2f} of the time\n")
    print("| | original, ms | ours, ms | ratio |\n|---|---|---|---|")
    scaled = {name: factor * ms for name, ms in ORIGINAL.items()}
    for name, ms in scaled.items():
        print(f"| {name} | {ms:.2f} | {ours[name]:.2f} | {ms / ours[name]:.1f} |")
    without_glass = [name for name in scaled if name != "glass_blur"]
    for label, names in (("sum of 15", list(scaled)), ("without glass", without_glass)):
        original, here = sum(scaled[name] for name in names), sum(ours[name] for name in names)
        print(f"| {label} | {original:.0f} | {here:.1f} | {original / here:.1f} |")


if __name__ == "__main__":
    main()
