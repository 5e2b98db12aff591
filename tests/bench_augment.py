"""Two augmented views of every image: ours beside torchvision's (Pillow, loader workers) and kornia's, side by side.

    python tests/bench_augment.py 32        # in memory at 32 px, as CIFAR: no blur, no solarisation
    python tests/bench_augment.py 224       # 256-px images to 224 px, MoCo-v3's views
    python tests/bench_augment.py 224 --data-dir FOLDER     # how many images a core decodes and crops for a GPU

Every contestant runs once a round, rounds repeat, and the ratio is the median of those within a round; a figure is
good for this machine and this run. kornia takes part where it is installed (pip install kornia).
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

JITTER = (0.4, 0.4, 0.2, 0.1)
VIEWS = {32: dict(blur=(0.0, 0.0), solarize=(0.0, 0.0)), 224: dict(blur=(1.0, 0.1), solarize=(0.0, 0.2))}


class Decoded(common.ImageSet):
    """Images that a loader treats like files, without the cost of decoding, which is the same for everyone."""

    def __getitem__(self, rows):
        return [self.paths[i % len(self.paths)] for i in rows.tolist()]


class Pairs(torch.utils.data.Dataset):
    """What people write with torchvision: one image, two views."""

    def __init__(self, images, transforms, n):
        self.images, self.transforms, self.n = images, transforms, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return [t(self.images[i % len(self.images)]) for t in self.transforms]


def smooth_images(n, size):
    """Colourful uint8 images (n, 3, size, size)."""
    g = torch.Generator().manual_seed(0)
    x = sum(F.interpolate(torch.randn(n, 3, s, s, generator=g), (size, size), mode="bicubic") for s in (3, 9, 27))
    return ((x * 0.18 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def our_policies(size):
    photometric = lambda i: [
        common.ColorJitter(*JITTER),
        common.Grayscale(0.2),
        common.GaussianBlur(p=VIEWS[size]["blur"][i]),
        common.Solarize(p=VIEWS[size]["solarize"][i]),
    ]
    return {
        f"{i + 1}": common.Compose(
            [
                common.RandomResizedCrop(size, (0.2, 1.0)),
                *photometric(i),
                common.HorizontalFlip(),
                common.Normalize(*common.IMAGENET),
            ]
        )
        for i in (0, 1)
    }


def pil_transforms(size):
    return [
        T.Compose(
            [
                T.RandomResizedCrop(size, (0.2, 1.0)),
                T.RandomApply([T.ColorJitter(*JITTER)], 0.8),
                T.RandomGrayscale(0.2),
                T.RandomApply(
                    [lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], VIEWS[size]["blur"][i]
                ),
                T.RandomApply([ImageOps.solarize], VIEWS[size]["solarize"][i]),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(*common.IMAGENET),
            ]
        )
        for i in (0, 1)
    ]


def kornia_transforms(size):
    import kornia.augmentation as K

    def view(blur, solarize):
        ops = [K.RandomResizedCrop((size, size), (0.2, 1.0)), K.ColorJitter(*JITTER, p=0.8), K.RandomGrayscale(p=0.2)]
        ops += [K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur)] * (blur > 0) + [
            K.RandomSolarize(0.0, 0.0, p=solarize)
        ] * (solarize > 0)
        return K.AugmentationSequential(
            *ops, K.RandomHorizontalFlip(), K.Normalize(*map(torch.tensor, common.IMAGENET)), data_keys=["input"]
        )

    return [view(b, s) for b, s in zip(VIEWS[size]["blur"], VIEWS[size]["solarize"])]


def seconds_per_image(batches, batch_size):
    """From the arrival of the first batch on: epochs are longer than the start of a loader's workers."""
    batches = iter(batches)
    next(batches)
    start = time.perf_counter()
    n = sum(batch_size for _ in batches)
    return (time.perf_counter() - start) / n


def race(title, contestants, batch_size, threads, rounds):
    """contestants: {name: function that iterates over batches}; the first is what the others are compared to."""
    torch.set_num_threads(threads)
    per_image = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name, batches in contestants.items():
            t = seconds_per_image(batches(), batch_size)
            if r:  # the first round warms up
                per_image[name].append(t)
    base = next(iter(per_image.values()))
    print(f"\n| {title} | ms an image (both views) | speed |\n|---|---|---|")
    for name, t in per_image.items():
        print(
            f"| {name} | {1e3 * statistics.median(t):.3f} | {statistics.median(b / a for a, b in zip(t, base)):.2f} |",
            flush=True,
        )


def feed(folder, size, rounds):
    """Images that one core reads, decodes and crops twice for a device that does the rest, in a second."""
    torch.set_num_threads(1)
    data, policies = common.imagefolder(folder, "train"), our_policies(size)
    batch_size = min(64, len(data))
    draw = lambda g: {name: (torch.arange(batch_size), p.sample(batch_size, g)) for name, p in policies.items()}
    args = argparse.Namespace(seed=0, batch_size=batch_size, workers=0, epochs=1)
    loader = common.Loader(data, policies, draw, args, torch.device("meta"))
    transforms = [T.Compose([*t.transforms[:1], T.PILToTensor()]) for t in pil_transforms(size)]
    seconds = {"decoding alone": [], "torchvision on Pillow images": [], "ours": []}
    rows = loader.rows(0)["1"].tolist()
    for _ in range(rounds + 1):
        for name, times in seconds.items():
            begin = time.perf_counter()
            if name == "ours":
                loader[0]
            else:
                for row in rows:
                    image = Image.open(data.paths[row]).convert("RGB")
                    if name != "decoding alone":
                        [t(image) for t in transforms]
            times.append(time.perf_counter() - begin)
    print(f"\n| two {size}-px crops of files, one core | images/s | 8 cores | 16 cores |\n|---|---|---|---|")
    for name, times in seconds.items():
        rate = batch_size / statistics.median(times[1:])  # the first round reads the disk
        print(f"| {name} | {rate:.0f} | {8 * rate:,.0f} | {16 * rate:,.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, choices=VIEWS, help="side of the views in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data-dir", help="time the reading of this folder of images instead")
    options = parser.parse_args()
    if options.data_dir:
        return feed(options.data_dir, options.size, options.rounds)
    size, rounds, device = options.size, options.rounds, common.start("cpu")
    batch_size, held, n = (256, 4096, 8192) if size == 32 else (32, 128, 1024)  # images held in memory, images an epoch
    images = smooth_images(held, 32 if size == 32 else 256).contiguous(
        memory_format=torch.channels_last
    )  # as decoders leave them
    policies, transforms = our_policies(size), pil_transforms(size)

    def draw(generator):
        return {name: (torch.arange(batch_size), p.sample(batch_size, generator)) for name, p in policies.items()}

    def ours(workers):
        data = (
            Decoded(paths=[images[i % held] for i in range(n)])
            if workers
            else common.ImageSet(images=images.repeat(n // held, 1, 1, 1))
        )
        loader = common.Loader(
            data, policies, draw, argparse.Namespace(seed=0, batch_size=batch_size, workers=workers, epochs=1), device
        )
        yield from loader.batches(range(loader.steps_per_epoch))

    def torchvision(workers):
        pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
        yield from torch.utils.data.DataLoader(Pairs(pictures, transforms, n), batch_size, num_workers=workers)

    def kornia(views):
        for rows in torch.arange(n).split(batch_size):
            yield [view(images[rows % held].float().div(255)) for view in views]

    workers = 0 if size == 32 else 2  # small sets live in memory and are cropped in the main process
    race(
        f"{size} px, two cores",
        {"torchvision on Pillow images, 2 loader workers": lambda: torchvision(2), "ours": lambda: ours(workers)},
        batch_size,
        2,
        rounds,
    )
    one = {"torchvision on Pillow images": lambda: torchvision(0), "ours": lambda: ours(0)}
    race(f"{size} px, one thread", one, batch_size, 1, rounds)
    try:
        views = kornia_transforms(size)
    except ImportError:
        print("\nkornia: not installed")
        return
    race(
        f"{size} px, one thread",
        {"kornia, batched": lambda: kornia(views), "ours": lambda: ours(0)},
        batch_size,
        1,
        rounds,
    )


if __name__ == "__main__":
    main()
