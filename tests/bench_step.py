"""Seconds a training step of ser.py takes, each equivariance term beside the base alone, side by side; and of
encoders alone.

    python tests/bench_step.py                                  # vit_pico on random 32-px images, on a CPU
    python tests/bench_step.py --arch vit_small --img-size 224 --patch-size 16 --batch-size 256 --recipe imagenet
    python tests/bench_step.py encoders 96 8  # ViT-S/16, ResNet-50, VMamba-T: size of the images, batch
    python tests/bench_step.py encoders 224 128                 # (on a GPU: bfloat16, all but VMamba compiled)

Takes the arguments of ser.py. Every variant does one step a round, rounds repeat, and the ratio is the median of those
within a round. Views are made beforehand; forward, backward, optimiser and moving average are timed.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import clever
import common
import ser

VARIANTS = {
    "none": [],
    "ser": [],
    "augself": [],
    "stl": [],
    "equimod": [],
    "essl": [],
    "ser 2+4": ["--local-views", "4"],
    "augself, block 3": ["--equi-layer", "3"],
}
SMALL = [
    *"--data imagefolder --recipe cifar10 --arch vit_pico --patch-size 8 --batch-size 64".split(),
    *"--proj-hidden 512 --device cpu".split(),
]


def make_step(argv):
    """Arguments of ser.py -> a function that does one training step on fixed random images."""
    args = common.parse(ser.Args, ser.values_in_force, argv)
    device = common.start(args.device)
    ser.check(args)
    model, policies = ser.build(args, device), ser.make_policies(args)

    # The views of one batch serve all steps.
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=common.rng("bench")).to(device)
    draw = partial(ser.draw_views, args, policies)
    loader = common.Loader(common.ImageSet(images=images), policies, draw, args, device)
    views, params, _ = next(loader.batches([0]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    if args.compile:
        model.compile_encoder()

    def step():
        with common.autocast(device, args.amp):
            out, _ = model(views, params)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        optimizer.step()
        ser.update_teacher(model, 0.99)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def make_encoder_step(arch, size, batch):
    """Forward and backward of an encoder on random images."""
    device = common.start("auto")
    kwargs = dict(patch_size=16, cls_layer=0) if arch in common.VITS else {}
    encoder = common.make_backbone(arch, *common.IMAGENET, size, **kwargs).to(device, memory_format=torch.channels_last)
    x, run = torch.randn(batch, 3, size, size, device=device), encoder
    if device.type == "cuda" and arch not in clever.VMAMBAS:
        run = torch.compile(encoder, dynamic=False)

    def step():
        with common.autocast(device, "auto"):
            loss = run(x).float().square().mean()
        loss.backward()
        encoder.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def race(steps, base, rounds=15):
    """Every step once a round; print its median time and the median of its ratios to `base` within a round."""
    seconds = {name: [] for name in steps}
    for r in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if r >= 2:  # two rounds to warm up
                seconds[name].append(time.perf_counter() - start)
    print(f"| | ms a step | of {base}'s |\n|---|---|---|")
    for name, t in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(t, seconds[base]))
        print(f"| {name} | {1e3 * statistics.median(t):.0f} | {ratio:.2f} |")


def main(argv):
    if argv[:1] == ["encoders"]:
        size, batch = int(argv[1]), int(argv[2])
        encoders = ("vit_small", "resnet50", "vmamba_tiny")
        race({arch: make_encoder_step(arch, size, batch) for arch in encoders}, "vit_small", rounds=7)
        return
    steps = {}
    for name, more in VARIANTS.items():
        equi = name.split()[0].rstrip(",")
        steps[name] = make_step([*SMALL, *argv, "--equi", equi, *more])
    race(steps, "none")


if __name__ == "__main__":
    main(sys.argv[1:])
