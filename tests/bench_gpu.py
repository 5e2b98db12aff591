"""Does it run on a GPU, correctly and fast? One GPU, at most nine minutes, one table.

    python tests/bench_gpu.py                   # on the GPU
    python tests/bench_gpu.py --only "speed"    # only the parts whose name contains this text
    python tests/bench_gpu.py --tiny            # toy sizes, for a CPU

Training parts call a script's own main() on random images in memory and read its log.jsonl:

  step     float32 losses on the CPU and on the GPU side by side; then bf16 at a real size: is it finite, where does the
           host wait for the device (file:line, of ten steps without log lines), memory
  speed    images/s, eager and compiled, and the share of the matmul peak that the environment part measured

A part that fails, or for which no time is left, becomes one line of the table; the others go on. What was left out
runs in a second call, with --only. `gpu.json` in the working directory, or in --out, holds the table so far."""

import argparse
import collections
import contextlib
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ciper
import clever
import common
import eval_probe
import eval_robustness
import recon_xattn
import ser

import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

CUDA = torch.cuda.is_available()
TMP = tempfile.TemporaryDirectory()
ROOT = Path(TMP.name)

# Arguments of every training part: a real size for a GPU, and a toy size that runs on a CPU too.
IMAGENET = ["--data", "imagefolder", "--recipe", "imagenet", "--epochs", "100"]
TOY = ["--data", "imagefolder", "--recipe", "cifar10", "--img-size", "16", "--batch-size", "16", "--epochs", "100"]
TOY_VIT = [*TOY, "--arch", "vit_pico", "--patch-size", "4"]
TOY_RESNET = [*TOY, "--arch", "resnet_pico"]
NARROW = ["--proj-hidden", "16"]


def variants(tiny):
    """Yield (name, module, flags of the variant, toy size, real size) of everything that trains."""
    toy = [*TOY_VIT, *NARROW, "--local-size", "8", "--proj-dim", "8", "--equi-dim", "16", "--prototypes", "32"]
    for base, equi in itertools.product(ser.BASES, ser.EQUIS):
        flags = ["--base", base, "--equi", equi]
        yield f"ser {base} {equi}", ser, flags, toy, [*IMAGENET, "--batch-size", "64"]
    for base in ("mocov3", "dino"):
        flags = ["--base", base, "--local-views", "4"]
        yield f"ser {base} 2+4", ser, flags, toy, [*IMAGENET, "--batch-size", "64"]

    toy = [*TOY_VIT, *NARROW, "--neck", "16", "--embed-dim", "8", "--decoder-depth", "2"]
    for objective in ("recon", "sie", "vicreg", "supervised"):
        flags = ["--objective", objective]
        yield f"recon_xattn {objective}", recon_xattn, flags, toy, [*IMAGENET, "--batch-size", "64"]

    real = ["--data", "imagefolder", "--recipe", "cifar10", "--epochs", "100", "--batch-size", "256"]
    for objective in ("ciper", "simclr", "predictive", "essl"):
        yield f"ciper {objective}", ciper, ["--objective", objective], [*TOY_RESNET, *NARROW, "--proj-dim", "8"], real

    heads = ["--local-size", "8", "--head-dim", "16", "--head-dim-equi", "16", "--bottleneck", "8"]
    for (base, equi), arch in itertools.product(
        (("dino", "clever"), ("dino", "none"), ("simsiam", "ddcl"), ("simsiam", "none")),
        ("vit_small", "resnet50", "vmamba_tiny"),
    ):
        flags = ["--base", base, "--equi", equi, "--aug", "complex_plus"]
        small = dict(vit_small=TOY_VIT, resnet50=TOY_RESNET).get(arch, [*TOY, "--arch", arch])
        if not (tiny and arch == "vmamba_tiny"):  # VMamba has no toy size
            real = [*IMAGENET, "--arch", arch, "--batch-size", "16"]
            yield f"clever {base} {equi} {arch}", clever, flags, [*small, *heads], real


# ----------------------------------------------------------------------------------------------------------------------
# One training run, and what is measured around it
# ----------------------------------------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """Ends a part. Scripts survive many exceptions, but not one of this kind."""


class Watch:
    """Around a script's main(): counts the host's waits, or the FLOPs, of some steps of the run."""

    def __init__(self, waits=(), flops=None):
        self.waits, self.flops = waits, flops
        self.step, self.counter, self.places = 0, None, collections.Counter()

    def __enter__(self):
        self.hook = register_optimizer_step_post_hook(self.after_step)
        self.caught = warnings.catch_warnings(record=True)
        self.messages = self.caught.__enter__()
        warnings.simplefilter("always")
        return self

    def after_step(self, *_):
        """Switch what is watched in the coming step on or off."""
        self.step += 1
        if CUDA and self.waits:
            torch.cuda.set_sync_debug_mode("warn" if self.step in self.waits else "default")
        if self.step == self.flops:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
        elif self.counter is not None and self.step == self.flops + 1:
            self.counter.__exit__(None, None, None)

    def __exit__(self, *_):
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(*_)
        self.hook.remove()
        if self.counter is not None and self.step == self.flops:  # a run that broke off
            self.counter.__exit__(None, None, None)
        found = (w for w in self.messages if "called a synchronizing" in str(w.message))
        self.places.update(f"{Path(w.filename).name}:{w.lineno}" for w in found)


def train(module, flags, steps, log_every=1):
    """Run a script's main() on random images; return the lines of its log, and the FLOPs and waits if watched."""
    out = ROOT / f"run{time.monotonic_ns()}"
    run = ["--out", str(out), "--data-dir", str(ROOT), "--max-steps", str(steps), "--log-every", str(log_every)]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.main([*flags, *run, "--workers", "0"])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def random_images(name, root, split, size, *_, **__):
    """In place of common.load_data: 512 random images of two classes to train on, and no test split."""
    if split == "test":
        return None
    images = torch.randint(0, 256, (512, 3, size, size), dtype=torch.uint8, generator=common.rng("bench_gpu"))
    return common.ImageSet(images=images, labels=torch.arange(512) % 2, classes=["a", "b"])


def losses_agree(module, flags, toy, real, tiny):
    """Three float32 steps on CPU and GPU, the largest relative difference of all logged losses; then bf16."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions in TF32 differ by 1e-3
    logs = [train(module, [*toy, *flags, "--device", device, "--amp", "off"], 3) for device in ("cpu", "auto")]
    torch.backends.cudnn.allow_tf32 = True
    pairs = [(a[k], b[k]) for a, b in zip(*logs) for k in a if k.startswith(("loss", "L_"))]
    difference = max(abs(a - b) / max(abs(a), 1e-3) for a, b in pairs)

    # steps 22 to 31 have no log line: the first 20 steps are logged, and every 40th
    with Watch(waits=range(22, 32)) as watch:
        lines = train(module, [*(toy if tiny else real), *flags], 3 if tiny else 33, log_every=40)
    waits = f"{sum(watch.places.values())} waits {dict(watch.places) or ''}"
    memory = lines[-1].get("memory_gb") or 0
    verdict = " DIFFER" if difference > 2e-3 else ""
    return f"losses differ by {difference:.0e}{verdict}, bf16 loss {lines[-1]['loss']:.3f}, {waits}, {memory:.1f} GB"


def speed(module, flags, tiny, peak, flops):
    """Images/s between log lines 20 steps apart; FLOPs of one eager step, kept in `flops` for the compiled run. They
    include the few that run in float32, such as crops; the share is of the bfloat16 peak."""
    steps, every, first = (6, 1, 2) if tiny else (81, 20, 20)  # steps up to the first count as warm-up
    key = str([f for f in flags if f != "--compile"])
    if key not in flops and "--compile" not in flags:
        with Watch(flops=1) as watch:
            train(module, flags, 3)
        flops[key] = watch.counter.get_total_flops()
    began = time.perf_counter()
    lines = train(module, flags, steps, every)
    rate = statistics.median(line["images_per_s"] for line in lines if line["step"] > first)
    batch = int(flags[flags.index("--batch-size") + 1])
    teraflops = flops.get(key, 0) * rate / batch / 1e12
    share = f"{teraflops:.1f} TFLOP/s, {teraflops / peak:.1%} of the bf16 peak" if key in flops else "FLOPs unknown"
    return (
        f"{rate:,.0f} images/s, {1e3 * batch / rate:.1f} ms a step; {share}; {time.perf_counter() - began:.0f} s in all"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Everything that is not a training run
# ----------------------------------------------------------------------------------------------------------------------


def per_second(act, n, rounds=5, warm=1):
    """How many of the n things that act() does are done in a second, after `warm` calls to warm up."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    for _ in range(warm):
        act()
    wait()
    began = time.perf_counter()
    for _ in range(rounds):
        act()
    wait()
    return n * rounds / (time.perf_counter() - began)


def matmul_peak(tiny, device):
    """TFLOP/s of a large bf16 and float32 product, at the clock rate that a GPU keeps up."""
    m = 64 if tiny else 8192
    a, b = (torch.randn(m, m, device=device) for _ in range(2))
    low_a, low_b = a.bfloat16(), b.bfloat16()
    return tuple(2 * m**3 * per_second(act, 1, 50, 50) / 1e12 for act in (lambda: low_a @ low_b, lambda: a @ b))


def augmentations(size, recipe, tiny, device):
    """Images/s of everything behind the crop, for each view of SER."""
    argv = [
        *"--data imagefolder --recipe".split(),
        recipe,
        "--data-dir",
        str(ROOT),
        "--batch-size",
        "16" if tiny else "256",
    ]
    args = common.parse(ser.Args, ser.values_in_force, argv)
    ser.check(args)
    views, rates = ser.make_policies(args), {}
    images = torch.randint(0, 256, (args.batch_size, 3, size, size), dtype=torch.uint8, device=device)
    for name, policy in views.items():
        params = policy.sample(len(images), common.rng(0))
        crops = policy.crop(images, params)
        rates[name] = round(per_second(lambda p=policy, c=crops, q=params: p.augment(c, q), len(images)))
    return f"images/s of each view: {rates}"


def probes(load_data):
    """Every task of eval_probe.py on an encoder that a script has just trained; load_data reads rendered images."""
    train(ser, TOY_VIT, 1)
    common.load_data = load_data
    checkpoint = max(ROOT.glob("run*/checkpoint.pt"), key=os.path.getmtime)
    tasks = ["knn", "linear", "mlp", "finetune", "fewshot", "r2", "layers", "equivariance", "rotation"]
    fast = ["--linear-epochs", "2", "--mlp-epochs", "2", "--finetune-epochs", "1", "--r2-epochs", "2"]
    began = time.perf_counter()
    eval_probe.main([str(checkpoint), "--data", "blocks", "--tasks", *tasks, *fast, "--r2-images", "64"])
    return f"{len(tasks)} tasks in {time.perf_counter() - began:.0f} s"


def large_probes(tiny, device):
    """A linear probe with ten rates and k-NN at a tenth of ImageNet, scaled to all of it."""
    n, dim, classes = (2_000, 64, 10) if tiny else (128_116, 1536, 1000)
    x, y = torch.randn(n, dim, device=device), torch.randint(classes, (n,), device=device)
    rates = eval_probe.Args(checkpoints=("",)).linear_lrs
    probe = eval_probe.LinearProbe(dim, classes, torch.arange(n), torch.arange(100), rates, 1, common.rng(0), device)
    epoch = 1 / per_second(lambda: probe.epoch(x, y), 1, 1)
    neighbours = 1 / per_second(lambda: common.knn(x[:, :384], y.cpu(), x[:2000, :384], classes=classes), 1, 1)
    scale = 1_281_167 / n
    return f"linear, ten rates: {epoch * scale:.1f} s an epoch; k-NN of 50,000: {neighbours * scale * 25:.1f} s"


def write_photographs(folder, n):
    """n JPEG files of 500 x 375 pixels and some 100 kB, as ImageNet's."""
    noise = lambda *shape: torch.randn(shape, generator=common.rng("photographs", *shape))
    smooth = sum(F.interpolate(noise(1, 3, s, s), (375, 500), mode="bicubic")[0] * w for s, w in ((3, 0.2), (27, 0.15)))
    for i in range(n):
        pixels = ((smooth + 0.12 * noise(3, 375, 500)) * 127 + 128).clamp(0, 255).to(torch.uint8)
        (folder / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "train" / str(i % 2) / f"{i}.jpg", quality=92)


def feeding(workers, tiny, device):
    """Images/s that loader processes decode and crop from JPEG files. Their batches come in waves, one from each
    worker; the third and fourth wave are timed."""
    folder, steps = ROOT / "photographs", 4 * workers
    if not folder.exists():
        write_photographs(folder, 32 if tiny else 512)
    argv = [*IMAGENET, "--data-dir", str(folder), "--batch-size", "16" if tiny else "256", "--workers", str(workers)]
    args = common.parse(ser.Args, ser.values_in_force, argv)
    ser.check(args)
    views = ser.make_policies(args)
    data = common.imagefolder(folder, "train")
    loader = common.Loader(data, views, partial(ser.draw_views, args, views), args, device)
    for i, _ in enumerate(loader.batches(range(steps))):
        if i == steps // 2 - 1:  # the end of the second wave
            began = time.perf_counter()
    return f"{args.batch_size * (steps - steps // 2) / (time.perf_counter() - began):,.0f} images/s, two views each"


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--only", default="", help="the parts whose name contains this text")
    parser.add_argument("--seconds", type=float, default=525, help="no part begins after this time")
    parser.add_argument("--out", type=Path, default=Path("."), help="where gpu.json goes")
    options = parser.parse_args(argv)
    tiny, began, results = options.tiny, time.monotonic(), {}
    os.environ["XDG_CACHE_HOME"] = TMP.name  # sets rendered here must not stay in the user's cache
    common.N_OBJECTS.update(train=20 if tiny else 200, test=12 if tiny else 100)  # a small rendered set for the probes
    common.load_data, load_data = random_images, common.load_data
    device = common.start("auto")
    peak, float32 = matmul_peak(tiny, device)

    def part(name, act, limit=60):
        """Run a part, record what it returns or how it failed, and go on."""
        left, start = options.seconds - (time.monotonic() - began), time.monotonic()
        if options.only not in name:
            return
        if left < 5:
            results[name] = "SKIPPED: no time left"
            return

        def too_long(*_):
            raise OutOfTime("no more time")

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(int(min(limit, left)) + 1)
        try:
            results[name] = act()
        except (Exception, SystemExit, OutOfTime) as error:
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            text = " ".join(str(error).split())[:160]
            results[name] = f"FAILED {type(error).__name__}: {text} at {' < '.join(frames[:-4:-1])}"
        signal.alarm(0)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        print(f"{name:44s} {time.monotonic() - start:6.1f} s  {results[name]}", flush=True)
        (options.out / "gpu.json").write_text(json.dumps(results, indent=1))

    name = torch.cuda.get_device_name() if CUDA else "CPU"
    rates = f"bf16 {peak:.0f}, float32 {float32:.0f} TFLOP/s"
    part("environment", lambda: f"{name}, torch {torch.__version__}, {os.cpu_count()} cores, {rates}")

    # speed comes first: it is what a short loan of a GPU is for
    vit = TOY_VIT if tiny else [*IMAGENET, "--batch-size", "256"]
    resnet = ["--data", "imagefolder", "--recipe", "cifar10", "--epochs", "200", "--batch-size", "256"]
    races = {
        "MoCo-v3 ViT-S/16 224 px": (ser, [*vit, "--equi", "none"]),
        "SER ViT-S/16 224 px": (ser, vit),
        "SimCLR ResNet-18 32 px": (ciper, [*(TOY_RESNET if tiny else resnet), "--objective", "simclr"]),
    }
    flops = {}
    for (label, (module, flags)), how in itertools.product(races.items(), ([], ["--compile"])):
        if not (tiny and how):  # compiling on a CPU takes longer than all the rest
            title = " ".join(["speed", label, *how])
            limit = 20 if tiny else 240 if how else 120  # SER compiles two encoders twice
            part(title, partial(speed, module, [*flags, *how], tiny, peak, flops), limit)

    # every variant, correct
    chosen = list(variants(tiny))
    for name, module, flags, toy, real in chosen[::5] if tiny and not options.only else chosen:
        part(f"step {name}", partial(losses_agree, module, flags, toy, real, tiny), 40)

    # what is not training
    x = torch.randint(0, 256, (2, 3, 32, 32) if tiny else (64, 3, 224, 224), dtype=torch.uint8, device=device)
    seeds, size = torch.arange(len(x)), 24 if tiny else 192
    corrupt = lambda kind: round(per_second(lambda: eval_robustness.corrupt(x, kind, 3, seeds), len(x), 1))
    part("corruptions, images/s", lambda: {kind: corrupt(kind) for kind in eval_robustness.CORRUPTIONS}, 90)
    frames = lambda kind: 31 * round(per_second(lambda: eval_robustness.perturb(x[:8], kind, seeds[:8], size), 8, 1))
    part("perturbations, frames/s", lambda: {kind: frames(kind) for kind in eval_robustness.PERTURBATIONS}, 90)
    part("augmentations behind the crop, 224 px", partial(augmentations, 224, "imagenet", tiny, device))
    part("augmentations behind the crop, 32 px", partial(augmentations, 32, "cifar10", tiny, device))
    for workers in (2,) if tiny else (8, 16):
        part(f"feeding, {workers} workers", partial(feeding, workers, tiny, device))
    part("probes at ImageNet's size", partial(large_probes, tiny, device))
    part("eval_probe.py, nine tasks", partial(probes, load_data), 120)

    having = lambda *words: [name for name, text in results.items() if any(word in str(text) for word in words)]
    bad, skipped = having("FAILED", "DIFFER"), having("SKIPPED")
    (options.out / "gpu.json").write_text(json.dumps(results, indent=1))
    print(f"\n{len(results) - len(skipped)} parts in {time.monotonic() - began:.0f} s")
    print(f"{len(bad)} to look at: {', '.join(bad) or 'none'}")
    print(f"{len(skipped)} without time, for a call with --only: {', '.join(skipped) or 'none'}")
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
