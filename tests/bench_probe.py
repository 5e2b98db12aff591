"""What ten learning rates of a linear probe cost: trained side by side, beside one, and beside ten runs of a loader.

    python tests/bench_probe.py  # 10,000 features of 384 numbers, 10 and 100 classes; with extraction: ViT-S/16, 224 px

Every contestant runs once a round, rounds repeat, and the ratio is the median of those within a round; a figure is
good for this machine and this run."""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import eval_probe

LRS = eval_probe.Args().linear_lrs
EPOCHS = 2


def with_loader(x, labels, classes, lr, epochs=EPOCHS):
    """The usual way: a loader of features and labels, a linear layer, SGD."""
    layer = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    for _ in range(epochs):
        for f, y in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 256, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(layer(f), y).backward()
            optimizer.step()


def ours(x, labels, classes, lrs, epochs=EPOCHS):
    rows = torch.arange(len(x))
    probe = eval_probe.LinearProbe(x.shape[1], classes, rows, rows[:1], lrs, epochs, common.rng("bench"), x.device)
    for _ in range(epochs):
        probe.epoch(x, labels)


def race(contestants, rounds):
    """{name: function} -> {name: [seconds of each round]}"""
    times = {name: [] for name in contestants}
    for r in range(rounds + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if r:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(a, b):
    """Median over rounds of the ratio of two contestants' times."""
    return statistics.median(x / y for x, y in zip(a, b))


def main():
    g = common.rng("bench")
    print(f"{torch.get_num_threads()} threads, {EPOCHS} epochs of 10,000 features, 384 wide\n")
    print("| classes | ten rates at once, s | one rate, s | ten runs of a loader, s | they cost, of ours |")
    print("|---|---|---|---|---|")
    for classes in (10, 100):
        x, labels = torch.randn(10_000, 384, generator=g), torch.randint(classes, (10_000,), generator=g)
        contestants = {
            "ten": partial(ours, x, labels, classes, LRS),
            "one": partial(ours, x, labels, classes, LRS[:1]),
            "loader": lambda x=x, y=labels, c=classes: [with_loader(x, y, c, lr) for lr in LRS],
        }
        t = race(contestants, 3)
        ten, one, loader = (statistics.median(t[name]) for name in contestants)
        print(f"| {classes} | {ten:.2f} | {one:.2f} | {loader:.2f} | {ratio(t['loader'], t['ten']):.1f} |")

    # With the extraction of the features.
    encoder = common.make_backbone("vit_small", *common.IMAGENET, 224, patch_size=16)
    data = common.ImageSet(images=torch.randint(0, 256, (192, 3, 224, 224), dtype=torch.uint8, generator=g))
    begin = time.perf_counter()
    width = common.features(encoder, data, torch.device("cpu"), encode=encoder.last_blocks, batch_size=32).shape[1]
    extraction = 10_000 * (time.perf_counter() - begin) / len(data)
    x, labels = torch.randn(10_000, width, generator=g), torch.randint(100, (10_000,), generator=g)
    contestants = {"ten": partial(ours, x, labels, 100, LRS), "one": partial(ours, x, labels, 100, LRS[:1])}
    ten, one = (statistics.median(times) / EPOCHS * 50 for times in race(contestants, 2).values())
    print(
        f"\n10,000 images of 224 px, 100 classes, 50 epochs: extraction {extraction:.0f} s; then ten rates "
        f"{ten:.0f} s, one {one:.0f} s: together {(extraction + ten) / (extraction + one):.3f} of one"
    )


if __name__ == "__main__":
    main()
