"""The one shared file: run -> data -> augmentations -> backbones -> k-NN, in the order in which data flows.

A method script imports this file and nothing else of ours. What makes a method (its losses, heads, targets, loop) is
in its script; what is the same for all of them is here:

  run            arguments, processes, gathering with gradient, schedules, checkpoints, log, stopping and resuming
  data           image sets and the loader: step -> this rank's rows of the global batch
  augmentations  batched ops with per-sample parameters, which they return
  backbones      every encoder that `load_backbone` can rebuild from a checkpoint
  k-NN           features of a data set, and the vote of the neighbours

One rule holds everywhere: a run is defined by its *global* batch. Data order and augmentation parameters are drawn on
the CPU from (seed, step); W processes take contiguous rows of what one process would take, so they train the same
model."""

import atexit
import contextlib
import copy
import ctypes
import dataclasses
import errno
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import types
import zipfile
from array import array
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints


def stopped_while_importing(*_):
    """Say in one line that Ctrl-C arrived while the libraries below were loading; `command` takes over from there."""
    if multiprocessing.parent_process() is None:  # a loader process leaves the line to the process that started it
        print(f"{Path(sys.argv[0]).name}: error: stopped by SIGINT", file=sys.stderr)
    raise SystemExit(130)


# The libraries take seconds to load. Scripts import this file before them, so that Ctrl-C is already answered.
interruptible = threading.current_thread() is threading.main_thread()
if interruptible:
    interrupt_handler = signal.signal(signal.SIGINT, stopped_while_importing)

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import tyro
from PIL import Image, ImageOps
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2.functional import center_crop
from torchvision.utils import save_image
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

if interruptible:
    signal.signal(signal.SIGINT, interrupt_handler)

# ----------------------------------------------------------------------------------------------------------------------
# Run: arguments
#
#   RunArgs, parse          the arguments that every script has; the command line
#   check_run               refuse what no script can work with
#   command, die, one_line  whatever ends a program ends it in one line
# ----------------------------------------------------------------------------------------------------------------------

# Numbers of an argument, with the interval that it must be in.
Natural = Annotated[int, "[0, inf)"]
Count = Annotated[int, "[1, inf)"]
Plural = Annotated[int, "[2, inf)"]
Seed = Annotated[int, "[0, 4294967296)"]
NonNegative = Annotated[float, "[0, inf)"]
Positive = Annotated[float, "(0, inf)"]
Share = Annotated[float, "[0, 1]"]
ShareBelow1 = Annotated[float, "[0, 1)"]
ShareAbove0 = Annotated[float, "(0, 1]"]


@dataclasses.dataclass
class RunArgs:
    """The arguments that every method script has. Values in force: these defaults, then what the method's variant
    needs, then the recipe, then the flags given by hand."""

    data: str = "blocks"
    """data set: blocks, blocks-views (rendered on the spot); cifar10, cifar100, imagenet, imagenet100, 3diebench,
    core50, tdw or imagefolder with --data-dir"""
    data_dir: str | None = None
    """directory of the data set; an image folder is train/ with val/ or test/, or any tree of images"""
    recipe: str | None = None
    """named set of hyper-parameters; default: that with the name of the data set, and without one it must be given"""
    arch: str = "vit_small"
    """encoder: vit_pico, vit_tiny, vit_small or vit_base"""
    img_size: Count = 224
    """side of the (square) training images in pixels"""
    patch_size: Count = 16
    """side of a ViT patch in pixels; must divide --img-size"""
    epochs: Natural = 100
    """passes over the data; the schedules follow it; 0 writes the untrained encoder"""
    batch_size: Plural = 2048
    """images per step over all processes together"""
    lr: NonNegative = 3e-4
    """base learning rate per 256 images: the peak is lr x batch_size / 256"""
    max_steps: Count | None = None
    """stop after this many steps (schedules still follow --epochs)"""
    seed: Seed = 0
    """seed of weights, data order and augmentations"""
    out: str | None = None
    """run directory; default runs/<script>-<variant>-<data>-s<seed>"""
    resume: bool = False
    """continue the run in --out (start it when there is none)"""
    overwrite: bool = False
    """start afresh although --out already holds a checkpoint"""
    workers: Natural | None = None
    """loader processes for image folders; default: as many as this process has cores, at most 16, or 8 where several
    processes share the machine. Results do not depend on it, but for rounding: 0 reads in the main process, which may
    have several threads"""
    skip_corrupt: bool = False
    """open every image of a folder first and leave out those that cannot be read (they are counted and listed)"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU"""
    amp: Literal["auto", "off"] = "auto"
    """auto is bfloat16 autocast on CUDA and float32 elsewhere"""
    compile: bool = False
    """torch.compile the encoder (worth its minutes on a GPU)"""
    save_every: Count = 1000
    """steps between checkpoints; one is written at the end in any case"""
    log_every: Count = 50
    """steps between lines of log.jsonl; the first 20 steps are logged each"""


def parse(Args, values_in_force, argv=None, description=""):
    """Command line -> Args, in two passes. The first reads the choices (--base, --data, --recipe ...), from which
    `values_in_force(first) -> dict` looks up defaults. The second parses over those, and `--help` shows them."""
    # The help ends before the notes on the paper, which are for readers of the file. Only rank 0 shows tyro's messages.
    argv = sys.argv[1:] if argv is None else list(argv)
    description = description.partition("\n\nWhere the paper is silent")[0]
    shown = os.environ.get("RANK", "0") == "0"
    cli = partial(tyro.cli, Args, args=argv, console_outputs=shown)
    try:
        # The first pass leaves unknown flags alone; the second parses all flags over the defaults in force.
        first, _ = cli(return_unknown_args=True, add_help=False)
        args = cli(default=Args(**values_in_force(first)), description=description)
    except SystemExit as e:
        # torchrun ends all ranks once one has ended, so the silent ranks give rank 0 time to print.
        if e.code and not shown:
            die("the command line")
        raise

    # An unset shell variable arrives as an empty string, which no argument means.
    for name, value in vars(args).items():
        if value == "":
            die(f"{flag_name(name)}: is empty (an unset shell variable?); give a value or leave the flag out")
    if isinstance(getattr(args, "data_dir", None), str):
        # The evaluation may start in another directory, so the run stores an absolute path.
        args.data_dir = os.path.abspath(os.path.expanduser(args.data_dir))
    if isinstance(getattr(args, "out", None), str):
        args.out = os.path.expanduser(args.out)  # the shell leaves --out=~/run as it is
    return args


def flag_name(name):
    """A field of Args as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_run(args, recipes, *archs, warmup_within_epochs=True):
    """Refuse what no method script can work with: unknown names, numbers out of range, values that contradict each
    other. `archs` are tables of architectures. Arguments that a script does not have are not checked."""
    # Every name must exist, and every number must be in its interval.
    check_data(args.data)
    if args.recipe not in recipes:
        die(f"--recipe {args.recipe or 'is missing'}: name one of {', '.join(recipes)} (for --data {args.data})")
    check_arch(args.arch, *archs)
    check_ranges(args)

    # A range starts with its lower end; the four strengths of the jitter end with the hue.
    for name in ("crop_scale", "local_scale", "equi_area"):
        low, high = getattr(args, name, (0, 1))
        if low > high:
            die(f"{flag_name(name)} {low} {high}: the lower end comes first")
    jitter = getattr(args, "jitter", (0, 0, 0, 0))
    if jitter[3] > 0.5:
        die(f"--jitter {' '.join(map(str, jitter))}: hue is in turns, at most 0.5")

    # The warm-up must end before the training does, and a ViT needs a whole number of patches.
    warmup = getattr(args, "warmup_epochs", 0)
    if warmup_within_epochs and args.epochs and warmup >= args.epochs:
        die(f"--warmup-epochs {warmup}: must be below --epochs {args.epochs}")
    if args.arch in VITS:
        check_patches(args, "img_size")


def check_patches(args, name):
    """Refuse images, of `args`'s field `name` pixels a side, that are no whole number of patches wide."""
    size, patch = getattr(args, name), args.patch_size
    if size % patch:
        nearest = max(1, round(size / patch)) * patch
        die(f"{flag_name(name)} {size}: not divisible by --patch-size {patch}; the nearest that is: {nearest}")


def interval_of(hint):
    """The interval, such as "[0, 1)", of a type: Count, Count | None, tuple[Share, Share]. None without a number."""
    if get_origin(hint) is Annotated:
        return next((m for m in hint.__metadata__ if isinstance(m, str)), None)
    return next(filter(None, map(interval_of, get_args(hint))), None)


def ranges(Args):
    """{field: interval such as "[0, 1)"} of all numbers among the arguments, from their annotations."""
    hints = get_type_hints(Args, include_extras=True)
    return {name: interval_of(hint) for name, hint in hints.items() if interval_of(hint)}


def check_ranges(args):
    """Refuse numbers outside their range. None is skipped, NaN refused."""
    for name, interval in ranges(type(args)).items():
        value = getattr(args, name)

        # A bracket includes the end of an interval, a parenthesis excludes it.
        low, high = (float(v) for v in interval[1:-1].split(","))
        for v in value if isinstance(value, (tuple, list)) else [value]:
            above = v is None or (v >= low if interval[0] == "[" else v > low)
            below = v is None or (v <= high if interval[-1] == "]" else v < high)
            if not (above and below):
                die(f"{flag_name(name)} {v}: must lie in {interval}")


def command(main):
    """Run a script's main() so that whatever ends it ends in one line: Ctrl-C (130), memory or disk that ran out, a
    process of the group that is gone (1). A reader that leaves (`| head`) or a full disk behind stdout ends nothing."""
    # A closed pipe or a full disk behind the output must not end the training.
    sys.stdout, sys.stderr = (Unfailing(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    try:
        in_one_line(main)
    except BaseException as e:
        # A process that fails may not wait for the others at its exit, as NCCL does when its group is destroyed.
        code = e.code if isinstance(e, SystemExit) else 1
        if code and world_size() > 1 and torch.cuda.is_initialized():
            atexit.register(leave, code)
        raise


def leave(code):
    """End this process at once; all that it has printed is seen."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def in_one_line(main):
    """Run main(); a failure of the machine becomes one line."""
    try:
        main()
    except KeyboardInterrupt:
        die("stopped by SIGINT", 130)
    except (MemoryError, RuntimeError, OSError) as e:
        # A known failure ends in one line; any other keeps its traceback for debugging.
        line = one_line(e)
        if line is None:
            raise
        if line.startswith(GONE):
            # The process that ended first prints a better message, and then torchrun kills the others.
            time.sleep(5)
        die(line, 1, alone=True)


class Unfailing:
    """A text stream that turns silent when it can no longer be written."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.silence()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self):
        """Send the file descriptor to nowhere, so that what is still buffered can be flushed."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def die(message, code=2, alone=False):
    """End the program with one line on stderr and exit code `code` (2: a user's mistake, 1: a run that failed).

    Every rank may call it for the same mistake: rank 0 prints, and the others wait. torchrun kills all processes as
    soon as one ends, so a rank that is still there after the wait made the mistake by itself, and prints. `alone`: it
    is known that no other rank made it."""
    if not alone and os.environ.get("RANK", "0") != "0":
        time.sleep(5)

    # An open progress bar would share its line with the message.
    with contextlib.suppress(OSError):  # nobody may be reading
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


GONE = "another process of the group"


def one_line(error):
    """What an error means that comes from the machine and not from the code, in one line; None for all others."""
    text = " ".join(str(error).split())
    has = lambda *words: any(w in text for w in words)

    # Training most often runs out of memory: of the GPU, of the host, or of a loader process.
    if isinstance(error, torch.OutOfMemoryError) or has("CUDA error: out of memory"):
        return f"out of memory on the GPU: lower --batch-size or --img-size ({text[:120]})"
    if isinstance(error, MemoryError) or has("DefaultCPUAllocator", "out of memory"):
        return f"out of memory: lower --batch-size, --img-size or --workers ({text[:120] or 'MemoryError'})"
    if text.startswith("DataLoader "):  # torch's "DataLoader worker (pid ...) ...", "DataLoader timed out ..."
        advice = "lower --workers (0 reads in the main process), or give it more memory"
        return f"a loader process ended or hangs: {advice} ({text[:200]})"

    # Another process may have ended, a compiler may be missing, or a disk may be full.
    if has("Connection closed by peer", "Connection reset by peer", "gloo", "ncclRemoteError", "Watchdog"):
        return f"{GONE} ended or does not answer ({text[:160]})"
    if has("NCCL"):
        return f"NCCL failed (NCCL_DEBUG=INFO tells more): {text[-200:]}"
    if has("InvalidCxxCompiler", "Failed to find C compiler", "Cannot find a working triton"):
        missing = "torch found no working compiler (g++ or another C++ compiler; on GPUs Triton and a C compiler)"
        return f"--compile: {missing}; install it, or leave the flag out"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Run: processes
#
#   start, rank, world_size                        join the process group, choose the device
#   send                                           a tensor to the device, without waiting for a GPU
#   any_rank, by_rank_0, same_on_all_ranks         what ranks agree on
#   rng, seed_everything                           random numbers from (seed, step)
#   gather, all_reduce, batchnorm_over_ranks       the global batch, with gradient
#   distributed                                    the model under DistributedDataParallel
# ----------------------------------------------------------------------------------------------------------------------


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def from_torchrun():
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE as torchrun sets them; those of one process where it did not."""
    # A launcher or a batch system may have set these variables to something else.
    numbers = []
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal() or name.endswith("SIZE") and int(value) == 0:
            die(
                f"{name}={value!r} in the environment is not one that torchrun sets; start with it, or unset it",
                alone=True,
            )
        numbers.append(int(value))
    global_rank, local_rank, world, local_world = numbers

    # Variables of another program may name a group without its address, or a rank outside its group.
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in os.environ:
            problem = f"WORLD_SIZE={world} is in the environment and {name} is not"
            die(f"{problem}; start with torchrun, or unset WORLD_SIZE", alone=True)
    for name, value, size in (("RANK", global_rank, world), ("LOCAL_RANK", local_rank, max(world, local_world))):
        if value >= size:
            problem = f"{name}={value} is in the environment of {world} processes"
            die(f"{problem}; start with torchrun, or unset it", alone=True)
    return numbers


def start(device="auto", patience=timedelta(minutes=10)):
    """Join the process group when torchrun started us; return the torch.device of this process. Gloo exchanges CPU
    tensors (flags, float64 tests), NCCL those on GPUs. A rank that waits for others longer than `patience` fails."""
    # CUDA is preferred to MPS, and MPS to the CPU.
    _, local_rank, world, local_world = from_torchrun()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        die(f"--device {device}: this machine has none; use --device auto")

    # Loader processes pass tensors as open files, more of them than the usual soft limit of 1,024. macOS refuses its
    # own hard limit, but not 10,240.
    if resource is not None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (hard, max(soft, 10_240)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                break
    keep_freed_memory()

    # Several processes need one GPU each, or share the CPU. NCCL takes the current GPU, so each chooses its own first.
    if world > 1 and device == "mps":
        die("--device mps: several processes need CUDA or the CPU; use --device cpu")
    gpus = torch.cuda.device_count()
    if world > 1 and device == "cuda" and local_world > gpus:
        die(f"--nproc_per_node {local_world}: this machine has {gpus} GPUs; start as many processes")
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=patience)
        atexit.register(dist.destroy_process_group)
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)


def keep_freed_memory():
    """Have glibc keep the memory of freed tensors. It gives large blocks back to the system, and then the next tensor
    pays for new pages: up to a fifth of the time of augmentations at 224 px on a CPU. A process may so keep up to
    512 MB that it has freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
        mallopt(M_MMAP_THRESHOLD, 2**25)  # blocks up to 32 MB, the largest value that all versions take
        mallopt(M_TRIM_THRESHOLD, 2**29)


def send(x, device):
    """The tensor x on `device`. The host does not wait for a GPU: it leaves x in pinned memory and goes on. CUDA takes
    64 kB or less from any memory without a wait. Elsewhere the host waits, because on MPS a copy that nobody waits for
    may read memory that is in use again."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    if x.nbytes > 2**16 and not x.is_pinned():
        x = torch.empty_like(x, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True)


def any_rank(number):
    """The largest of all ranks' whole numbers `number`. So ranks agree on what each has seen for itself, such as a
    signal, a full disk or a file that only one machine has. Every rank must call it, whatever it has seen."""
    number = torch.tensor(int(number))
    if dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def by_rank_0(act):
    """What act() returns on rank 0, on every rank. If act() ends the program there, all ranks end."""
    if world_size() == 1:
        return act()

    # The result of rank 0, or the exit code with which it ended, goes to all ranks.
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = act()
        except SystemExit as e:
            box[1] = e.code
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise SystemExit(box[1])
    return box[0]


def from_all_ranks(value):
    """[value of rank 0, value of rank 1, ...] of any plain values."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def same_on_all_ranks(value, complaint):
    """End the program where ranks hold different plain values. `complaint` is the message, or a function that makes it:
    complaint(value of rank 0, rank that differs, its value)."""
    values = from_all_ranks(value)
    for other, theirs in enumerate(values):
        if theirs != values[0]:
            die(complaint if isinstance(complaint, str) else complaint(values[0], other, theirs))


def number_of(*key):
    """A whole number below 2^56 that depends on `key` alone (on its repr), in every process alike."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def rng(*key):
    """A CPU generator that depends on `key` alone, such as (seed, step): no generator state ever needs saving."""
    return torch.Generator().manual_seed(number_of(*key))


def seed_everything(*key):
    """Reseed torch's global generators (weights, drop-path) from `key`."""
    torch.manual_seed(rng(*key).initial_seed())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x)
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        # Each rank's rows enter the loss of every rank, so their gradients add up.
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad)


def gather(x):
    """(b, ...) on each of W ranks -> (W b, ...) on all, in the order of ranks; the gradient is summed over ranks. If a
    loss is the mean over a rank's own rows, DistributedDataParallel then gives the gradient of the global mean."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce(x):
    """Sum over ranks; the gradient is summed over ranks too."""
    return _AllReduce.apply(x) if world_size() > 1 else x


def distributed(model):
    """The model, under DistributedDataParallel where there are several ranks: its backward pass averages gradients."""
    return nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model


class BatchNormOverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics span all ranks, for CPUs (nn.SyncBatchNorm wants GPUs). Same state keys."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        """x (b, C, ...) -> the same shape, normalised over the global batch and all but the channels."""
        if not self.training:
            return super().forward(x)

        # The global batch is normalised by its biased variance, as in any batch norm that trains.
        dims = [0, *range(2, x.dim())]
        view = lambda v: v.view(1, -1, *[1] * (x.dim() - 2))
        mean = all_reduce(x.mean(dims)) / world_size()  # (C,)
        centred = x - view(mean)
        var = all_reduce((centred * centred).mean(dims)) / world_size()  # (C,)
        y = centred * view((var + self.eps).rsqrt())

        # The running variance is the unbiased one, of n values per channel.
        n = x.numel() // x.shape[1] * world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return y * view(self.weight) + view(self.bias) if self.affine else y


def batchnorm_over_ranks(model, device):
    """Let every batch norm of `model` span all ranks, where there are several: SyncBatchNorm on GPUs, else ours."""
    if world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if world_size() > 1:
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.__class__ = BatchNormOverRanks
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Run: schedules, moving averages, clipping
#
#   cosine, warmup_cosine   schedules
#   ema_update, clip_each_  teacher weights, gradients
#   autocast, full_precision, upcast
# ----------------------------------------------------------------------------------------------------------------------


def cosine(t, first, last):
    """Half a cosine from `first` at t = 0 to `last` at t = 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(max(t, 0.0), 1.0)))


def warmup_cosine(epoch, epochs, warmup, peak, end=0.0):
    """Learning rate at a fractional epoch: linear from 0 to `peak` during the warm-up, then half a cosine to `end`."""
    if epoch < warmup:
        return peak * epoch / warmup
    return cosine((epoch - warmup) / max(epochs - warmup, 1e-9), peak, end)


@torch.no_grad()
def ema_update(target, online, m):
    """target <- m target + (1 - m) online, for parameters; buffers (batch norm statistics) stay the target's own."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - m)


@torch.no_grad()
def clip_each_(parameters, most):
    """Scale down the gradient of every parameter tensor whose norm exceeds `most`: each by itself, as in DINO."""
    # The small constant avoids a division by zero, as in DINO.
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, (most / (norms + 1e-6)).clamp(max=1.0).unbind())


def autocast(device, amp):
    """bfloat16 autocast on CUDA unless switched off."""
    on = amp == "auto" and device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on else contextlib.nullcontext()


def full_precision():
    """A block without autocast, for losses; `upcast` what comes into it."""
    return torch.autocast("cuda", enabled=False)


def upcast(x):
    """bfloat16 -> float32; float32 and float64 stay."""
    return x.float() if x.dtype == torch.bfloat16 else x


# ----------------------------------------------------------------------------------------------------------------------
# Run: checkpoints
#
#   write                             bytes to a file, whole or not at all
#   save_checkpoint, load_checkpoint  dicts of tensors and plain values (KEYS)
# ----------------------------------------------------------------------------------------------------------------------

FORMAT = 1
LOCKS = {}  # run directory -> file descriptor of this process's lock on it
KEYS = {"format", "method", "args", "step", "backbone", "backbone_state", "train_state"}


def write(path, content):
    """Write bytes so that a kill at any moment leaves either the old or the new file: a temporary file in the same
    directory, flushed to the disk, then renamed over the old one (over its target, if `path` is a link)."""
    path = Path(path).resolve()
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(content)
            f.flush()
            sync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise

    # The file is in place; flush its new name too. Not all file systems open or flush directories.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            fd = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def sync(fd):
    """fsync, where the file system has one."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def save_checkpoint(path, state):
    """`write` tensors and plain values, such that `read_tensors` reads them."""
    # The bytes are collected in memory first, so that a full disk raises a plain OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def read_tensors(path, file=None):
    """What `save_checkpoint` wrote, or what an open `file` holds. torch.load does not look at the checksums of the
    zip file, so they are checked first; nothing compressed is inflated, no pickled code is run, and no tensor is
    larger than the file that claims it. Raises whatever a damaged file makes the readers raise."""
    # Compressed members are refused, and the checksums of all others must be right.
    with zipfile.ZipFile(file or path) as z:
        if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()) or z.testzip():
            raise ValueError(f"{path}: damaged")

    def read(device):
        if file:
            file.seek(0)
        return torch.load(file or path, map_location=device, weights_only=True)

    # On the meta device tensors have a size but no memory, so an impossible size is found before it is allocated.
    size = file.seek(0, os.SEEK_END) if file else os.path.getsize(path)
    for t in tensors(read("meta")):
        if max(t.numel() * t.element_size(), t.untyped_storage().nbytes()) > size:
            raise ValueError(f"{path}: claims a tensor larger than itself")
    return read("cpu")


def tensors(state):
    """All tensors in dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def finite(state):
    """Whether no tensor of dicts, lists and tuples holds NaN or infinity."""
    return all(torch.isfinite(t).all() for t in tensors(state) if t.is_floating_point())


def load_checkpoint(path, file=None):
    """Checkpoint, from `file` where it is open -> dict of tensors and plain values (KEYS); or one line and exit 2."""
    path = Path(path)
    if not os.path.isfile(path):
        die(f"{path}: no such checkpoint file")
    try:
        state = read_tensors(path, file)
    except (PermissionError, MemoryError) as e:
        die(f"{path}: cannot be read ({one_line(e)})")
    except Exception:  # a dozen different types
        die(f"{path}: not a checkpoint of this project, or damaged (truncated download? copy it again)")

    # A file of another program, a newer format or diverged weights are refused as well.
    if not isinstance(state, dict) or set(state) != KEYS:
        die(f"{path}: not a checkpoint of this project (expected the keys {', '.join(sorted(KEYS))})")
    if state["format"] != FORMAT:
        die(f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}")
    if not finite(state["backbone_state"]):
        die(f"{path}: the encoder holds NaN or infinity; take an earlier checkpoint")
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Run: from the first step to the last
#
#   Run                begins (__init__, restore, introduce), steps, logs (log, picture), saves, stops and finishes
#   collapse_monitors  whether features still differ
#   progress           the bar on rank 0
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """A training run in its directory: log, progress bar, periodic saving, signals, resuming.

        run = Run(args, "mocov3-ser", model, optimizer)
        run.restore(train)  # always; with --resume it continues
        for step, views, params, rows in run.steps(loader):  # saves every --save-every steps, on a signal, at the end
            ...
            run.log(step, loss=loss, L_inv=L_inv, lr=lr, features=y)
        run.finish(untrained_model, train, test)

    The run is named after the script that defines `args`. `model.evaluated` names the encoder within the model that
    evaluation uses."""

    # Arguments that may differ between the machines of one run. A resumed run may change these and the other FREE
    # ones, which say where and how it runs, never what it computes.
    LOCAL = {"data_dir", "out", "workers"}
    FREE = LOCAL | {"resume", "overwrite", "device", "compile", "max_steps", "save_every", "log_every"}

    def __init__(self, args, variant, model, optimizer):
        self.script = Path(sys.modules[type(args).__module__].__file__)
        self.method = self.script.stem
        self.args, self.model, self.optimizer = args, model, optimizer
        self.encoder = model.get_submodule(model.evaluated)
        self.device = next(model.parameters()).device
        self.out = Path(args.out or f"runs/{self.method}-{variant}-{args.data}-s{args.seed}")
        self.path = self.out / "checkpoint.pt"
        if args.resume and args.overwrite:
            die("--resume and --overwrite: contradict each other; give one of them")

        # All ranks must train with the same arguments, and rank 0 claims the directory for all.
        def complaint(a, other, b):
            name = next(name for name in a if a[name] != b.get(name))
            return f"{flag_name(name)}: {a[name]} on rank 0 and {b[name]} on rank {other}; give all processes the same"

        same_on_all_ranks({k: v for k, v in dataclasses.asdict(args).items() if k not in self.LOCAL}, complaint)
        by_rank_0(self._claim)

        # A signal sets `signal` and interrupts a run that is `waiting` for data; `parent` is the process of torchrun.
        self.signal = None
        self.waiting = False
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

        # Logged values stay on the device in `pending` until a line of the log is due. `logged` steps were in the log
        # when its last line came at `clock`; a full disk may have `torn` that line.
        self.pending = []
        self.logged = 0
        self.clock = 0.0
        self.torn = False

    # ---- the directory and the checkpoint in it ----

    def _claim(self):
        """Make the directory, lock it against a second run, and prove that it can be written."""
        # A file is created and removed, because permissions alone do not say whether a file system is writable.
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if os.name == "posix":
                self._lock()
            probe = self.out / "checkpoint.pt.tmp"
            probe.touch()
            probe.unlink()
        except OSError as e:
            die(f"--out {self.out}: cannot be written ({e.strerror}); choose another directory")

        # An earlier run's checkpoint is replaced only on request.
        if self.path.exists() and not (self.args.resume or self.args.overwrite):
            advice = "add --resume to continue, --overwrite to start afresh, or choose another --out"
            die(f"--out {self.out}: already holds a checkpoint; {advice}")

    def _lock(self):
        """Lock the directory until `finish`, or the end of the process. File systems without locks do without."""
        import fcntl

        # An earlier run of the same process, which was refused or failed, holds the lock already.
        path = self.out.resolve()
        if path in LOCKS:
            return
        LOCKS[path] = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            die(f"--out {self.out}: in use by a running process; wait for it or choose another --out")
        except OSError as e:
            self.say(f"--out {self.out}: cannot be locked there ({e.strerror}); do not start a second run in it")

    def _unlock(self):
        lock = LOCKS.pop(self.out.resolve(), None)
        if lock is not None:
            os.close(lock)

    def restore(self, data):
        """Under --resume take model, optimiser and step from the checkpoint. Then note in the directory what runs:
        args.json, the script and this file, a fresh log.jsonl for a fresh run.

        Rank 0 reads the checkpoint for all. `data` is the training set: all ranks must see the same, and a run goes on
        with nothing else than it began with."""

        def complaint(a, other, b):
            what = f"rank {other} sees other images than rank 0 ({difference(a, b)})"
            return f"--data-dir: {what}; give all machines the same"

        self.data = data.fingerprint()
        same_on_all_ranks(self.data, complaint)

        # Every rank starts from the step of the checkpoint.
        state = by_rank_0(lambda: self._read() if self.args.resume and self.path.exists() else None)
        self.resumed = state is not None
        self.begin = 0
        if self.resumed:
            self.begin = state["step"]
            self._load(state)
            self.say(f"resuming {self.path} at step {self.begin}")
        by_rank_0(self._prepare)

    def _read(self):
        """The checkpoint to resume, if it is of this method, these images and the same arguments wherever they change
        the result."""
        state = load_checkpoint(self.path)
        saved, now = state["args"], dataclasses.asdict(self.args)
        if state["method"] != self.method:
            die(f"--out {self.out}: its checkpoint is of {state['method']}.py; choose another --out")
        for name in sorted(now.keys() & saved.keys() - self.FREE):
            if now[name] != saved[name]:
                there = f"the checkpoint in {self.out} was made with {saved[name]}"
                die(f"{flag_name(name)} {now[name]}: {there}; resume with that or choose another --out")

        # The checkpoint also records the images it was trained on; older checkpoints do not.
        seen = state["train_state"].get("data", self.data)
        if seen != self.data:
            what = f"holds other images than {self.path} has seen ({difference(seen, self.data)})"
            die(f"--data-dir {self.args.data_dir}: {what}; resume with those or choose another --out")
        return state

    def _load(self, state):
        """Take model and optimiser from a checkpoint. Whether the optimiser's kernels are fused is this device's
        choice, not that of the device on which the checkpoint was written."""
        # The encoder is stored under its own names, and is put back into the whole model.
        encoder = {f"{self.model.evaluated}.{k}": v for k, v in state["backbone_state"].items()}
        try:
            optimizer = state["train_state"]["optimizer"]
            for saved, group in zip(optimizer["param_groups"], self.optimizer.param_groups):
                saved.update(fused=group["fused"], foreach=group["foreach"])
            self.model.load_state_dict(state["train_state"]["heads"] | encoder)
            self.optimizer.load_state_dict(optimizer)
        except (KeyError, ValueError, RuntimeError, TypeError) as e:
            reason = " ".join(str(e).split())[:200]
            advice = "take the script that wrote it, or start afresh with --overwrite"
            die(f"{self.path}: its training state does not fit this run ({reason}); {advice}")

    def _prepare(self):
        """What the directory holds before the first step."""
        # An overwritten run leaves files which a reader would take for those of the new run.
        try:
            if not self.resumed:
                names = ["checkpoint.pt", "log.jsonl", "backbone.safetensors", "eval.jsonl"]
                if of_a_run(os.listdir(self.out)):
                    names += ["views.png", "reconstruction.png", "skipped.txt"]
                for name in names:
                    (self.out / name).resolve().unlink(missing_ok=True)

            # The arguments and the source files are kept, so that the run can be understood and repeated later.
            write(self.out / "args.json", (json.dumps(dataclasses.asdict(self.args), indent=1) + "\n").encode())
            for source in {self.script, Path(__file__)}:
                if source.resolve() != (self.out / source.name).resolve():
                    shutil.copyfile(source, self.out / source.name)  # not its mode: it may be read-only

            # Steps after the checkpoint are computed again, so their lines are dropped from the log.
            log = self.out / "log.jsonl"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            kept = [f"{line}\n" for line in lines if 0 <= step_of(line) < self.begin]
            write(log, "".join(kept).encode())
        except OSError as e:
            die(f"--out {self.out}: cannot be written ({e.strerror}); make room, or choose another directory", 1)

    # ---- steps, and signals that end them ----

    def steps(self, loader):
        """Yield (step, views, params, rows), counting from 0, until the epochs (or --max-steps) are done.

        Before each step the global generators are reseeded from (seed, step, rank). SIGTERM, SIGHUP and SIGINT, and
        the end of torchrun, save at the next step boundary, on all ranks at the same one, and exit with 128 + the
        signal's number; a second SIGINT ends at once."""
        begin = self.begin
        total = min(loader.total_steps, self.args.max_steps or loader.total_steps)
        self.total, self.loader = total, loader

        # A signal that the shell has switched off (nohup, a job in the background) stays off.
        handlers = {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            s = getattr(signal, name, None)
            if s is not None and signal.getsignal(s) is not signal.SIG_IGN:
                handlers[s] = signal.signal(s, self._on_signal)

        # A resumed run counts, times and draws from its own first step on.
        self.bar = progress(total=total, initial=min(begin, total), unit="step", leave=True)
        self.logged = begin
        self.clock = time.monotonic()
        batches = loader.batches(range(begin, total))
        try:
            for step in range(begin, total):
                # No batch means that a signal came; otherwise the script computes its step at `yield`.
                batch = self._wait(batches)
                if batch is None:
                    self._stop_if_asked(step)
                seed_everything(self.args.seed, step, rank())
                yield step, *batch
                self.bar.update()

                # A rank whose torchrun has ended stops as if it had received SIGTERM.
                orphan = self.parent is not None and os.getppid() != self.parent
                self._stop_if_asked(step + 1, signal.SIGTERM if orphan else 0)
                if self.due(step) and step + 1 < total:
                    self.save(step + 1)

            # A resumed run may have been complete already. A signal may come while the last checkpoint is written.
            if begin < total or not self.resumed:
                self.save(total, last=True)
                self._stop_if_asked(total)
            else:
                self.say(f"{self.path} is finished: {begin} of {total} steps")
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def due(self, step):
        """Whether a checkpoint is written after this step."""
        return (step + 1) % self.args.save_every == 0 or step + 1 == self.total

    def _wait(self, batches):
        """The next batch; None if a signal came, which need not wait for a loader (but ranks must stay in step)."""
        try:
            self.waiting = world_size() == 1
            return next(batches)
        except KeyboardInterrupt:
            return None
        finally:
            self.waiting = False

    def _on_signal(self, number, frame):
        if self.signal == number == signal.SIGINT:
            raise SystemExit(130)
        self.signal = number
        if self.waiting:
            raise KeyboardInterrupt

    def _stop_if_asked(self, step, number=0):
        """If any rank has had a signal, or `number`, save the state after `step` steps and end as the signal asks."""
        number = any_rank(self.signal or number)
        if number:
            saved = self.save(step)
            self.bar.close()
            if rank():
                raise SystemExit(128 + number)  # rank 0 speaks for all
            what = f"{self.path} is saved, continue with --resume" if saved else f"step {step} could not be saved"
            die(f"stopped by {signal.Signals(number).name} after step {step}; {what}", 128 + number)

    def save(self, step, last=False):
        """Write checkpoint.pt from rank 0; return whether it was written. Weights that are not finite never replace
        those that are. A full disk costs one line during the run, and at its end the exit code."""
        # The encoder is stored apart from the rest, so that evaluation can load it without the script's own classes.
        self.flush()
        heads = {k: v for k, v in self.model.state_dict().items() if not k.startswith(f"{self.model.evaluated}.")}
        train_state = dict(heads=heads, optimizer=self.optimizer.state_dict(), data=self.data)
        state = dict(format=FORMAT, method=self.method, args=dataclasses.asdict(self.args), step=step)
        state |= dict(backbone=self.encoder.description, backbone_state=self.encoder.state_dict())
        state |= dict(train_state=train_state)

        # Weights with NaN or infinity on any rank stop all ranks before a good checkpoint is overwritten.
        if any_rank(not finite(state)):
            die(f"the weights are not finite after step {step - 1}; lower --lr; {self._last_good()}", 1)

        # Only rank 0 writes, but all ranks must learn whether it succeeded.
        error = 0
        if rank() == 0:
            try:
                save_checkpoint(self.path, state)
            except OSError as e:
                error = 1
                self._complain(f"could not save step {step} ({e.strerror}); the older checkpoint is kept")
        error = any_rank(error)
        if error and last:
            raise SystemExit(1)
        return not error

    # ---- what a run prints and logs ----

    def say(self, *lines):
        if rank() == 0:
            tqdm.write("\n".join(lines), file=sys.stdout)
            sys.stdout.flush()

    def _complain(self, text):
        tqdm.write(f"--out {self.out}: {text}", file=sys.stderr)

    def introduce(self, data, loader, peak, chance):
        """Print what is about to run: data, recipe in force, learning rate after scaling, the loss of pure chance."""
        # The recipe shows what is computed, not where.
        recipe = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.args).items() if k not in self.FREE)
        epochs = f"{self.args.epochs} epochs of {loader.steps_per_epoch} steps"
        where = f"on {world_size()} x {self.device.type}, into {self.out}"
        lines = [f"{self.method}: {len(data):,} images of {self.args.data}, {epochs}, {where}", f"  {recipe}"]

        # Training images that are left out are listed by name in the run directory.
        if data.skipped:
            lines.append(f"  {len(data.skipped)} unreadable images are listed in {self.out / 'skipped.txt'}")
            names = os.fsencode("".join(f"{name}\n" for name in data.skipped))
            if rank() == 0:
                self._try("skipped.txt", lambda path: write(path, names))
        if data.note:
            lines.append(f"  {data.note}")

        # The learning rate grows linearly with the batch size, and chance is what the loss should fall below.
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        scaled = "" if peak == self.args.lr else f"{self.args.lr:g} x {self.args.batch_size}/256 = "
        rate = f"learning rate {scaled}{peak:g} at its peak"
        self.say(*lines, f"  {count:,} trainable parameters; {rate}; chance: {chance}")

    def picture(self, name, views, n=8):
        """Write what the model sees: a row of `n` images for each normalised (b, 3, H, W) in `views`."""
        if rank() == 0:
            # The normalisation is undone, and a view with too few images is padded with white.
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.encoder.mean, self.encoder.std))
            side = max(64, self.args.img_size)
            rows = []
            for v in views:
                images = (v[:n].float().cpu() * std + mean).clamp(0, 1)
                images = F.interpolate(images, (side, side))  # (up to n, 3, side, side)
                rows.append(F.pad(images, (0, 0, 0, 0, 0, 0, 0, n - len(images)), value=1.0))  # (n, 3, side, side)
            self._try(name, lambda path: save_image(torch.cat(rows), path, nrow=n))

    def _try(self, name, act):
        """act(path) for a file of the run directory that no run needs. Where it cannot be written, one line says so."""
        try:
            act(self.out / name)
        except OSError as e:
            self._complain(f"could not write {name} ({e.strerror})")

    def log(self, step, features=None, lr=0.0, epoch=0.0, **values):
        """Note scalars (tensors or numbers, this rank's means) of a step; `features` (b, D) feed the collapse monitors.

        Lines of log.jsonl hold global means. On a GPU the values are read only when a line is due, so that the host
        need not wait for the device every step; each is then checked: a value that is not finite ends the run with
        exit code 1, naming the step and the components, and the last good checkpoint stays."""
        self.names = list(values)
        self.pending.append((step, torch.stack([scalar(v, self.device) for v in values.values()])))  # (names,)
        due = is_logged(self.args, step)
        if due or self.device.type == "cpu":
            row = self.flush()
        if not due:
            return

        # Rank 0 alone needs the monitors, whose eigenvalues take long for wide features.
        line = dict(step=step, epoch=round(epoch, 4), **row, lr=lr)
        if features is not None:
            y = gather(features.detach())  # (B, D)
            line |= collapse_monitors(y) if rank() == 0 else {}

        # Throughput and waiting time are averages since the last line of the log.
        now = time.monotonic()
        done, seconds = step + 1 - self.logged, now - self.clock
        line |= dict(images_per_s=round(done * self.args.batch_size / seconds, 1))
        line |= dict(data_wait=round(self.loader.waited / seconds, 4))
        if self.device.type == "cuda":
            line |= dict(memory_gb=round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3))
        self.logged = step + 1
        self.clock = now
        self.loader.waited = 0.0
        if rank() == 0:
            self._append(line)
            self.bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in row.items()), refresh=False)

    def _append(self, line):
        """Add a line to log.jsonl, on a line of its own even if a full disk has torn the one before."""
        begin = "\n" if self.torn else ""
        try:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(begin + json.dumps(line) + "\n")
            self.torn = False
        except OSError as e:
            self.torn = True
            self._complain(f"could not log step {line['step']} ({e.strerror})")

    def flush(self):
        """Average what is pending over ranks, check it, and return the last step's values."""
        if not self.pending:
            return {}
        steps, values = zip(*self.pending)
        self.pending = []
        values = torch.stack(values)  # (steps, names)
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()

        # The first step whose values are not finite ends the run.
        for step, row in zip(steps, values.tolist()):
            if not all(map(math.isfinite, row)):
                what = ", ".join(f"{k} {v:.4g}" for k, v in zip(self.names, row))
                die(f"the loss is not finite at step {step} ({what}); lower --lr; {self._last_good()}", 1)
        return dict(zip(self.names, row))

    def _last_good(self):
        return f"the last good state is in {self.out}" if by_rank_0(self.path.exists) else "nothing was saved yet"

    def finish(self, untrained, train, test):
        """After the last step: export the encoder for timm, score it beside the untrained one, say what is next."""
        encoders = self.encoder, untrained.get_submodule(untrained.evaluated)
        if rank() == 0:
            self.say(export_backbone(self.out / "backbone.safetensors", self.encoder))

        # The k-NN score needs labelled training and test images of the same classes.
        if test is None or train.labels is None or train.classes != test.classes:
            notes = [data.note for data in (train, test) if data is not None and data.note]
            self.say(f"no k-NN score: {'; '.join(notes) or 'the data has no test split with the same classes'}")
        else:
            trained, before = (knn_accuracy(encoder, train, test, self.device, self.args) for encoder in encoders)
            others = f"the untrained encoder: {before:.3f}; chance: {1 / len(train.classes):.3f}"
            self.say(f"k-NN accuracy on test images: {trained:.3f} ({others})")

        # Equivariance needs no labels, so any images serve.
        data = train if test is None else test
        trained, before = (turn_equivariance(encoder, data, self.device, self.args) for encoder in encoders)
        self.say(f"equivariance of the last map, a quarter turn: {trained:.3f} (the untrained encoder: {before:.3f})")
        self.say(f"next: python eval_probe.py {shlex.quote(str(self.path))}")
        self._unlock()


def step_of(line):
    """The step of a line of log.jsonl; -1 where a kill or a full disk has torn it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def difference(a, b):
    """In what two fingerprints of image sets differ, in words."""
    if a["images"] != b["images"]:
        return f"{a['images']:,} and {b['images']:,} images"
    if a["classes"] != b["classes"]:
        odd = sorted(set(a["classes"]) ^ set(b["classes"]))
        return f"other classes: {odd[0]}" if odd else "classes in another order"
    return "other file names or labels"


def is_logged(args, step):
    """Whether a step has a line in log.jsonl."""
    return step < 20 or (step + 1) % args.log_every == 0


def scalar(v, device):
    """A number, or a tensor of one value, -> a float32 tensor () on the device, for which no GPU is waited for."""
    return send(v.detach(), device).float() if isinstance(v, torch.Tensor) else torch.full((), float(v), device=device)


def collapse_monitors(y):
    """y (B, D) -> per-dimension standard deviation of the normalised features (1/sqrt(D) is healthy, 0 is collapse) and
    effective rank: the exponential of the entropy of the covariance's eigenvalues (1 is collapse, D the most)."""
    y = F.normalize(y.float(), dim=1)
    y = y - y.mean(0)
    std = float((y * y).mean(0).sqrt().mean())

    # The eigenvalues of wide features take a CPU seconds, so a GPU computes them itself.
    covariance = y.T @ y  # (D, D), times B
    covariance = covariance if y.is_cuda else covariance.cpu()
    try:
        p = torch.linalg.eigvalsh(covariance).clamp(min=0)  # (D,)
        p = p / p.sum().clamp(min=1e-12)
        effective = float(torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()))
    except torch.linalg.LinAlgError:
        # The solver may fail on features that are all alike or not finite, but a monitor must not end a run.
        effective = math.nan

    # JSON has no NaN, so the log writes null.
    monitors = dict(feature_std=std, effective_rank=effective)
    return {name: value if math.isfinite(value) else None for name, value in monitors.items()}


def progress(iterable=None, leave=False, **kwargs):
    """A tqdm bar on rank 0; where stderr is a file it writes a line every half minute instead of ten a second."""
    slow = 0.1 if sys.stderr.isatty() else 30
    times = dict(mininterval=slow, maxinterval=max(10, slow))
    return tqdm(iterable, leave=leave, disable=rank() != 0, file=sys.stderr, dynamic_ncols=True, **times, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# Data: image sets
#
#   Paths, ImageSet                     file names; one split of a data set
#   open_image, visible                 one file; one folder
#   imagefolder                         any folder of images
#   cifar, threediebench, core50, tdw   published sets
#   known_part, without_unreadable      parts of a set
#   cached                              what takes long is kept
# ----------------------------------------------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of each channel, of images in [0, 1]
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
BLOCKS = ((0.39, 0.39, 0.39), (0.14, 0.14, 0.14))
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# wnids of ImageNet-100 [CMC]
# fmt: off
IMAGENET100 = """
    01558993 01692333 01729322 01735189 01749939 01773797 01820546 01855672 01978455 01980166 01983481 02009229
    02018207 02085620 02086240 02086910 02087046 02089867 02089973 02090622 02091831 02093428 02099849 02100583
    02104029 02105505 02106550 02107142 02108089 02109047 02113799 02113978 02114855 02116738 02119022 02123045
    02138441 02172182 02231487 02259212 02326432 02396427 02483362 02488291 02701002 02788148 02804414 02859443
    02869837 02877765 02974003 03017168 03032252 03062245 03085013 03259280 03379051 03424325 03492542 03494278
    03530642 03584829 03594734 03637318 03642806 03764736 03775546 03777754 03785016 03787032 03794056 03837869
    03891251 03903868 03930630 03947888 04026417 04067472 04099969 04111531 04127249 04136333 04229816 04238763
    04336792 04418357 04429376 04435653 04485082 04493381 04517823 04589890 04592741 07714571 07715103 07753275
    07831146 07836838 13037406 13040303
"""
# fmt: on


class Paths(Sequence):
    """File names below one folder, as two tensors: the relative names in one uint8 `text`, a NUL after each, and the
    int64 places `ends` (N,) of these. So a name costs its own length and 9 bytes; forked workers copy none, spawned
    ones share all."""

    def __init__(self, root, names):
        """root: the folder; names: an iterable of relative names, "/" between their parts, in the order to keep."""
        # Names are joined in portions, so that a million of them are never a million Python strings at once.
        names = iter(names)
        text = bytearray()
        while some := list(itertools.islice(names, 4096)):
            text += os.fsencode("\0".join(some)) + b"\0"
        self.root = str(root)
        self.text = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        self.ends = (self.text == 0).nonzero()[:, 0]  # (N,)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        return os.path.join(self.root, self.name(i))

    def name(self, i):
        """The name of row i, relative to the folder."""
        i = range(len(self))[i]
        text, ends = self.text.numpy(), self.ends.numpy()  # several times faster to read than tensors
        return os.fsdecode(text[ends[i - 1] + 1 if i else 0 : ends[i]].tobytes())

    def subset(self, rows):
        """The names of some rows (n,), in their order."""
        return Paths(self.root, map(self.name, rows.tolist()))

    def digest(self):
        """A hash of all relative names and their order, wherever the folder is."""
        return hashlib.blake2b(self.text.numpy(), digest_size=16).hexdigest()


@dataclasses.dataclass
class ImageSet:
    """One split of a data set. Small sets hold all their pixels; folders hold paths and decode on request."""

    images: torch.Tensor | None = None  # uint8 (N, 3, H, W), or
    paths: Paths | None = None  # N files
    labels: torch.Tensor | None = None  # int64 (N,)
    classes: tuple = ()
    factors: dict = dataclasses.field(default_factory=dict)  # name -> (N,) or (N, d): how each image was made
    groups: torch.Tensor | None = None  # int64 (N,): images with the same number show the same object
    masks: torch.Tensor | None = None  # bool (N, H, W), where the object is
    skipped: tuple = ()  # files that could not be read and are left out
    boxes: torch.Tensor | None = None  # (N, 4): its top, left, height, width in fractions of the image
    note: str = ""  # why labels or a test split are missing, for whoever misses them

    def __len__(self):
        return len(self.paths) if self.images is None else len(self.images)

    def __getitem__(self, rows):
        """rows (b,) -> uint8 pixels: one (b, 3, H, W) tensor, or a list of (3, H_i, W_i) for a folder."""
        if self.images is None:
            return [open_image(self.paths[i]) for i in rows.tolist()]
        return self.images.index_select(0, send(rows, self.images.device))

    def subset(self, rows):
        """The set of some of its images, rows (n,)."""
        pick = lambda v: v if v is None else v[rows.to(v.device)]
        parts = {name: pick(getattr(self, name)) for name in ("images", "labels", "groups", "masks", "boxes")}
        factors = {name: pick(v) for name, v in self.factors.items()}
        return dataclasses.replace(self, paths=self.paths and self.paths.subset(rows), factors=factors, **parts)

    def to(self, device):
        return self if self.images is None else dataclasses.replace(self, images=self.images.to(device))

    def fingerprint(self):
        """What a run remembers of its data, wherever they are: dict(images=their number, classes=their names,
        hash=str). The hash is of labels and relative paths, or of labels and image shape (pixels are rendered a little
        differently by another processor)."""
        what = tuple(self.images.shape[1:]) if self.paths is None else self.paths.digest()
        labels = b"" if self.labels is None else self.labels.cpu().numpy().tobytes()
        digest = hashlib.blake2b(repr(what).encode() + labels, digest_size=16).hexdigest()
        return dict(images=len(self), classes=list(self.classes), hash=digest)


def printable(text):
    """A file name as one line that any terminal takes: what is not printable or not UTF-8 is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


UNREADABLE = "cannot be read as an image"


def open_image(path):
    """File -> uint8 (3, H, W), RGB. Orientation tags are applied, 16-bit greys rescaled, transparency laid over black.
    Greys of another range (floats, signed, 12 or 32 bits) are refused, because no file says which value is white."""
    try:
        with Image.open(path) as image:
            # In a TIFF, tag 258 gives the bits per sample, and tag 339 their format (1: unsigned).
            tags = getattr(image, "tag_v2", {})
            wide = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")  # 0 to 65535
            if image.mode[0] in "IF" and not wide or 12 in tags.get(258, ()) or {2, 3} & set(tags.get(339, ())):
                raise ValueError("neither 8-bit nor 16-bit greys of 0 to 65535; scale and convert it to one of these")

            # Orientation, depth and transparency are brought to upright 8-bit RGB.
            image = ImageOps.exif_transpose(image)
            if wide:
                image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    except Exception as e:  # Pillow raises whatever a damaged file makes it raise
        raise OSError(f"{printable(path)}: {UNREADABLE} ({printable(e)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def visible(folder):
    """(sorted names of folders, names of image files) in a folder; nothing that is hidden, no pictures of a run."""
    folders, images, others = [], [], []
    try:
        with os.scandir(folder) as entries:
            for e in entries:
                name = e.name
                if name[0] == ".":
                    continue
                if e.is_dir(follow_symlinks=False) or e.is_symlink() and os.path.isdir(e.path):
                    folders.append(name)
                elif name[name.rfind(".") :].lower() in SUFFIXES:
                    images.append(name)
                else:
                    others.append(name)
    except OSError as e:
        reason = f"this folder cannot be listed ({e.strerror or e})"
        die(f"{printable(folder)}: {reason}; change its permissions or move it away")
    return sorted(folders), [] if of_a_run(others) else images


def of_a_run(names):
    """Whether these are the names in the directory of one of our runs."""
    return "args.json" in names and ("checkpoint.pt" in names or "log.jsonl" in names)


def image_names(root, below="", above=()):
    """Yield the image files below `root`, relative to it, whatever the depth, in the order of their whole paths. Links
    are followed, but not back to a folder that holds them."""
    here = os.path.realpath(f"{root}/{below}")
    if here in above:
        return

    # A folder sorts with a slash at its end, as its files sort in the list of all paths.
    folders, files = visible(f"{root}/{below}"[:-1])
    for name in sorted([*(f"{f}/" for f in folders), *files]):
        if name[-1] == "/":
            yield from image_names(root, below + name, (*above, here))
        else:
            yield below + name


SPLITS = dict(train=("train", "training"), val=("val", "valid", "validation"), test=("test", "testing"))
LAYOUT = "train/<class>/*.jpg with val/ or test/ beside train/, or any tree of images"


def split_folders(root):
    """(splits, folders): all folders directly below `root`, and which of them are splits, such as dict(train="Train",
    val="validation"); an empty dict where all of it is one tree of images.

    A split is a folder with a name of SPLITS, in letters of any case. One such folder without another may as well be a
    class that is called so (CIFAR-100 has a train). It is a split where no other images are, or where it alone holds
    folders of images. It is a class where it holds none, and images are beside it or right in another folder. Else the
    tree is refused."""
    folders, loose = visible(root)

    # A name such as Train/ or validation/ marks a split, and no split may have two folders.
    named = {kind: [f for f in folders if f.lower() in names] for kind, names in SPLITS.items()}
    found = {kind: some[0] for kind, some in named.items() if some}
    if twice := next((some for some in named.values() if len(some) > 1), None):
        die(f"--data-dir {root}: {twice[0]}/ and {twice[1]}/ name the same split; keep one of them")
    if len(found) != 1:
        return found, folders

    # One folder has the name of a split. A path below it has two slashes or more where its images are in class folders.
    ((kind, name),) = found.items()
    below = lambda f: image_names(root, f"{f}/")
    nested = lambda f: any(n.count("/") > 1 for n in below(f))
    others = [f for f in folders if f != name and next(below(f), None)]

    # The position of the other images decides whether the folder is a split or a class.
    if not others and not loose:
        return found if kind == "train" or nested(name) else {}, folders
    if nested(name) and not any(map(nested, others)):
        return found, folders
    if not nested(name) and (loose or any(visible(f"{root}/{f}")[1] for f in others)):
        return {}, folders
    problem = f"{name}/ may be a split or a class, beside {printable(others[0])}/"
    die(f"--data-dir {root}: {problem}; rename or move one of them: an image folder is {LAYOUT}")


def imagefolder(root, split, classes=None, tested=("val", "test")):
    """A folder of images: root/train/<class>/... with root/val or root/test (`split_folders` says which names these may
    have; the first of `tested` that is there is "test"), or any tree (then all of it is "train").

    A class is a folder directly below the split's, `classes` the only ones to take (default: all). One without images
    is refused. Images outside of such folders leave the set without labels, and its `note` says so. Returns None when
    the split does not exist; the note of "train" says what was looked for."""
    root = Path(root)
    if not os.path.isdir(root):
        die(f"--data-dir {root}: no such directory, or none that may be entered; an image folder is {LAYOUT}")

    # A tree without splits is one training set; a tree with splits needs train/.
    splits, folders = split_folders(root)
    holds = f"{root} holds {', '.join(f'{printable(f)}/' for f in folders[:8]) or 'no folders'}"
    if splits and "train" not in splits:
        die(f"--data-dir {root}: has no train/; {holds}; an image folder is {LAYOUT}")
    found = next((splits[name] for name in tested if name in splits), None)
    name = found if split == "test" else splits.get("train", "")
    if name is None:
        return None
    folder = root / name

    # Classes are numbered as they appear while the names are read (None for images outside class folders).
    index, labels = {}, array("q")

    def noted(names):
        for name in names:
            c, inside, _ = name.partition("/")
            if classes is None or inside and c in classes:
                labels.append(index.setdefault(c if inside else None, len(index)))
                yield name

    paths = Paths(folder, noted(image_names(folder)))
    if not paths:
        die(f"--data-dir {folder}: holds no images ({', '.join(sorted(SUFFIXES))})")

    # Missing splits and labels are no error, but the note explains them to whoever needs them.
    notes = []
    if split == "train" and len(splits) < 2:
        notes.append(f"no test split: {holds}; val/ or test/ is expected beside train/")
    if None in index:
        stray, count = printable(paths[labels.index(index[None])]), labels.count(index[None])
        where = f"{count} of {len(paths)} images lie in no class folder, such as {stray}"
        notes.append(f"no labels: {where}; move them into {folder}/<class>/")
    elif len(index) < 2:
        notes.append(f"no labels: {folder} holds images in one class folder, {printable(*index)}/; two are needed")

    # An empty class folder among full ones is a mistake, except for the directory of a run.
    if None not in index and (splits or len(index) > 1):
        for c in sorted(set(visible(folder)[0]) - set(index)):
            ours = any(of_a_run(files) for _, _, files in os.walk(folder / c))
            if not ours and (classes is None or c in classes):
                problem = f"a class folder without images ({', '.join(sorted(SUFFIXES))})"
                die(f"{printable(folder / c)}: {problem}; fill it, remove it or move it away")
    if None in index or len(index) < 2:
        return ImageSet(paths=paths, note="; ".join(notes))

    # Labels are renumbered by sorted class name, because paths sort differently (a-b/1.png comes before a/1.png).
    found = sorted(index)
    labels = torch.tensor([found.index(c) for c in index])[torch.frombuffer(labels, dtype=torch.int64)]  # (N,)
    return ImageSet(paths=paths, labels=labels, classes=tuple(found), note="; ".join(notes))


def cifar(name, root, split, **_):
    """CIFAR-10 or -100 as torchvision keeps it: 50,000 and 10,000 images of 32 x 32 px."""
    kind = name.upper()
    try:
        data = getattr(torchvision.datasets, kind)(root, train=split == "train")
    except (RuntimeError, OSError):
        fetch = f"torchvision.datasets.{kind}({str(root)!r}, download=True)"
        die(f"--data-dir {root}: holds no {kind}; {fetch} would fetch it")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images=images, labels=torch.tensor(data.targets), classes=tuple(data.classes))


def threediebench(root, split, workers=None, skip_corrupt=False, **_):
    """3DIEBench (Garrido et al. 2023) as published: root/<synset>/<object>/image_0..49.jpg and latent_0..49.npy, and
    beside them (or in root/data) the split's train_ or val_images.npy and _labels.npy. A latent is three angles
    (extrinsic xyz, radians), floor hue, two angles of the light, its hue. All are read once and kept in the cache
    directory, until one of these files changes. No view may be missing, but with `skip_corrupt`."""
    root, part = Path(root), dict(train="train", test="val")[split]

    def load(name, kinds, what):
        # The lists are beside the object folders, or in data/ as in the repository of SIE.
        path = next((p for p in (root / name, root / "data" / name) if os.path.isfile(p)), None)
        if path is None:
            source = "from the data folder of SIE's repository (github.com/facebookresearch/SIE)"
            die(f"--data-dir {root}: 3diebench needs {name} there, {source}")
        try:
            values = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        except Exception as e:  # numpy raises whatever a damaged file makes it raise
            die(f"{path}: cannot be read ({printable(e)}); copy it again")
        if values.ndim != 1 or values.dtype.kind not in kinds or not len(values):
            die(f"{path}: holds {values.dtype} of shape {values.shape}; a list of {what} is expected")
        return values

    # The two lists must fit each other, and be the same on all machines.
    objects = [str(o).strip("/") for o in load(f"{part}_images.npy", "U", "names")]
    labels = torch.from_numpy(load(f"{part}_labels.npy", "iu", "whole numbers").astype(np.int64))
    if len(objects) != len(labels):
        counts = f"{part}_images.npy names {len(objects)} objects, {part}_labels.npy has {len(labels)} labels"
        die(f"--data-dir {root}: {counts}")
    for i in ((labels < 0) | (labels > 54)).nonzero()[:1, 0].tolist():
        found = f"{part}_labels.npy says {labels[i]} at index {i} ({objects[i]})"
        die(f"--data-dir {root}: {found}; 3DIEBench has the classes 0 to 54")
    problem = f"{part}_images.npy or {part}_labels.npy differs between machines; copy the set anew"
    same_on_all_ranks(number_of(objects, labels.tolist()), f"--data-dir {root}: {problem}")

    def of_objects(look):
        """look(object's folder) of every object: (objects, ...). Of W ranks each looks at every W-th object."""
        local = [root / name for name in objects[rank() :: world_size()]]
        share = []
        for z in progress(in_workers(look, local, workers), desc=f"latents of {split}", unit="object"):
            if isinstance(z, str):
                die(z, alone=True)
            share.append(z.clone())  # the tensor of a worker keeps a file open
        out = [None] * len(objects)
        for r, found in enumerate(from_all_ranks(share)):
            out[r :: world_size()] = found
        return torch.stack(out)

    # The cached latents are valid as long as no file of the data set has changed.
    stamps = of_objects(partial(stamp_of, complete=not skip_corrupt))  # (objects,)
    key = number_of(str(root.resolve()), objects, code_of(latents_of))
    make = lambda: dict(stamps=stamps, latents=of_objects(latents_of))  # (objects, 50, 7)
    kept = cached(f"3diebench-{key:x}", make, lambda kept: torch.equal(kept["stamps"], stamps))
    z = kept["latents"].flatten(0, 1)  # (N, 7)

    # Views of one object share its label and group, and factors describe how each view was rendered.
    paths = Paths(root, (f"{name}/image_{v}.jpg" for name in objects for v in range(50)))
    classes = tuple(f"{i:02d}" for i in range(int(labels.max()) + 1))
    labels, groups = (v.repeat_interleave(50) for v in (labels, torch.arange(len(objects))))  # (N,) each
    factors = dict(rotation=quaternion_from_angles(z[:, :3]), floor_hue=z[:, 3], light_hue=z[:, 6])
    return ImageSet(paths=paths, labels=labels, classes=classes, groups=groups, factors=factors)


def stamp_of(folder, complete):
    """A number () from sizes and times of the latents in the folder of an object of 3DIEBench, which change with them;
    or what is wrong there. `complete`: no image may be missing."""
    latents = [f"latent_{v}.npy" for v in range(50)]
    images = [f"image_{v}.jpg" for v in range(50)] if complete else []
    try:
        there = set(os.listdir(folder))
        for name in latents + images:
            if name not in there:
                return f"{folder}/{name}: missing; 3DIEBench has image_0..49.jpg and latent_0..49.npy of each object"
        stamp = [(file.st_size, file.st_mtime_ns) for file in (os.stat(f"{folder}/{name}") for name in latents)]
    except OSError as e:
        return f"{folder}: cannot be listed ({e.strerror or e}); 3DIEBench has a folder there, copy it again"
    return torch.tensor(number_of(stamp))


def latents_of(folder):
    """The latents (50, 7) in the folder of an object of 3DIEBench, or what is wrong with the first that is none."""
    out = torch.empty(50, 7)
    for v in range(50):
        path = f"{folder}/latent_{v}.npy"

        # A file without seven numbers leaves NaN, which the check below refuses.
        z = np.full(7, np.nan)
        with contextlib.suppress(Exception):  # numpy raises whatever a damaged file makes it raise
            read = np.load(path, mmap_mode="r", allow_pickle=False)
            if read.shape == (7,) and read.dtype.kind in "fiu":
                z = np.array(read, np.float32)

        # The ranges also catch latents in degrees, or in another order.
        if not np.isfinite(z).all():
            return f"{path}: not 7 numbers, all finite; copy it again"
        if abs(z[:3]).max() > math.pi / 2 + 1e-3 or abs(z[[3, 6]] - 0.5).max() > 0.5 + 1e-3:
            return f"{path}: numbers 0 to 2 must be angles from -pi/2 to pi/2 (radians), 3 and 6 hues from 0 to 1"
        out[v] = torch.from_numpy(z)
    return out


CORE50_CLASSES = "plug adapter, mobile phone, scissors, light bulb, can, glasses, ball, marker, cup, remote control"


def core50(root, split, sessions=(1, 2), **_):
    """CORe50 (Lomonaco and Maltoni 2017) as published:
    [core50_128x128/]s1..s11/o1..o50/C_<session>_<object>_<frame>.png.

    "train" are the frames of `sessions` (numbers from 1), "test" those of all others. Labels are the 10 categories of
    five objects each, groups the objects, factors session and frame (N,) int64; sessions count from 0 there."""
    # Every session belongs to the training or the test set, and neither set may be empty.
    nested = Path(root) / "core50_128x128"
    root = nested if os.path.isdir(nested) else Path(root)
    folders = visible(root)[0] if os.path.isdir(root) else ()
    there = {int(f[1:]): f for f in folders if f[0] == "s" and f[1:].isdecimal()}
    if set(sessions) - set(there) or not set(there) - set(sessions):
        found = f"found the sessions {' '.join(map(str, sorted(there))) or 'none'}"
        wanted = f"to train on {' '.join(map(str, sessions))}, test on the rest"
        die(f"--data-dir {root}: core50 is s1/o1/C_01_01_000.png ... s11/; {found}, {wanted}")

    # The name of a frame gives its session, object and number; other files do not belong to the set.
    found = []
    for s, folder in there.items():
        if (s in sessions) != (split == "train"):
            continue
        for name in image_names(root, f"{folder}/"):
            frame = re.fullmatch(r"[^/]+/o([^/]*)/C_([^/]*)_([^/]*)_([^/]*)\.png", name)
            if frame is None:
                continue
            place, *numbers = (int(v) if v.isdecimal() else -1 for v in frame.groups())
            if not 1 <= place <= 50 or numbers[:2] != [s, place] or numbers[2] < 0:
                right = "s<session>/o<object>/C_<session>_<object>_<frame>.png with objects 1 to 50"
                die(f"{printable(root / name)}: not a frame of CORe50, {right}")
            found.append((*numbers, name))

        # Every object folder of a session must hold frames.
        objects = {f for f in visible(root / folder)[0] if re.fullmatch(r"o\d+", f)}
        if bare := objects - {f"o{number}" for session, number, *_ in found if session == s}:
            die(f"{root / folder / min(bare)}: this folder of CORe50 has no frames C_*_*_*.png; unpack it again")

    # Each training session needs frames, and the test set needs some from any session.
    if split == "train":
        empty = set(sessions) - {session for session, *_ in found}
    else:
        empty = set() if found else set(there) - set(sessions)
    if empty:
        names = ", ".join(f"s{s}" for s in sorted(empty))
        die(f"--data-dir {root}: no frames o1/C_*_01_*.png in {names}; unpack it again")

    # Five consecutive objects form a category.
    session, number, frame, names = zip(*sorted(found))
    session, number, frame = (torch.tensor(v) for v in (session, number, frame))  # (N,) each
    factors = dict(session=session - 1, frame=frame)
    paths, labels, classes = Paths(root, names), (number - 1) // 5, tuple(CORE50_CLASSES.split(", "))
    return ImageSet(paths=paths, labels=labels, classes=classes, groups=number - 1, factors=factors)


TDW_CLASSES = "cup, comb, scissor, hammer, book, calculator, goblet, candle, headphones, screwdriver, cassette, bottle"


def tdw(root, split, skip_corrupt=False, **_):
    """The toys of CLTT (Schneider et al. 2021) as published: train/ and test/ with 12,096 images each, in the order of
    12 objects x 4 distances x 7 elevations x 36 azimuths. Factor view (N, 3): azimuth, elevation (degrees), metres."""
    if skip_corrupt:
        die("--skip-corrupt: tdw identifies images by their number, so none can be left out; leave the flag out")

    # An image's place in the sorted names identifies its view, so none may be missing.
    nested = Path(root) / "spherical_photoreal_64x64_DoF" / split
    folder = nested if os.path.isdir(nested) and not os.path.isdir(Path(root) / split) else Path(root) / split
    paths = [folder / name for name in sorted(visible(folder)[1])] if os.path.isdir(folder) else []
    if len(paths) != 12_096:
        right = "tdw has 12,096 images in train/ and in test/, numbered by the order of their names"
        die(f"--data-dir {folder}: {right}; found {len(paths):,}")

    # The toys are small enough to keep all images in memory.
    try:
        images = [open_image(p) for p in progress(paths, desc=f"reading {split}", unit="image")]
    except OSError as e:
        die(str(e))
    if len({image.shape for image in images}) > 1:
        die(f"--data-dir {folder}: images of several sizes; tdw's are 64 x 64")

    # The place in the list gives the object, distance, elevation and azimuth, the last changing fastest.
    i = torch.arange(12_096)
    view = torch.stack([i % 36 * 10.0, i // 36 % 7 * 10 + 10.0, i // 252 % 4 * 0.1 + 0.3], 1)  # (N, 3)
    images, objects, classes = torch.stack(images), i // 1008, tuple(TDW_CLASSES.split(", "))
    return ImageSet(images=images, labels=objects, classes=classes, groups=objects, factors=dict(view=view))


def known_part(data, fraction, seed):
    """A share of every class, at random from the seed, of whole objects where there are several images of one: an
    ImageSet. For experiments in which the parameters or the labels of only some images are known. Classes of a single
    object cannot be shared, and end the program."""
    groups = torch.arange(len(data)) if data.groups is None else data.groups
    g, kept = rng(seed, "known"), []
    for c in data.labels.unique():
        objects = groups[data.labels == c].unique()
        if data.groups is not None and len(objects) == 1:
            die(f"--known-fraction {fraction}: class {data.classes[int(c)]} has a single object; it cannot be shared")
        kept.append(objects[torch.randperm(len(objects), generator=g)[: max(1, round(fraction * len(objects)))]])
    return data.subset(torch.isin(groups, torch.cat(kept)).nonzero()[:, 0])


def unreadable(data, rows):
    """Those of some rows whose files cannot be read, as a list."""
    bad = []
    for row in rows:
        try:
            open_image(data.paths[row])
        except OSError:
            bad.append(row)
    return bad


def without_unreadable(data, workers):
    """Open every image once, each rank its share, and move those that cannot be read to `skipped`."""
    rows = range(rank(), len(data), world_size())
    chunks = [rows[i : i + 256] for i in range(0, len(rows), 256)]
    found = progress(in_workers(partial(unreadable, data), chunks, workers), desc="opening images", unit="x 256")
    bad = sorted(set().union(*from_all_ranks({row for rows in found for row in rows})))
    keep = torch.tensor(sorted(set(range(len(data))) - set(bad)), dtype=torch.long)
    if not len(keep):
        die(f"--data-dir {data.paths.root}: none of the {len(data)} images can be read")
    if bad and rank() == 0:
        what = f"{len(bad)} of {len(data)} images cannot be read and are left out"
        tqdm.write(f"--data-dir {data.paths.root}: {what}, such as {printable(data.paths[bad[0]])}", file=sys.stderr)
    return dataclasses.replace(data.subset(keep), skipped=tuple(data.paths[i] for i in bad))


def cached(name, make, current=lambda kept: True):
    """make(), a dict of tensors and plain values, kept as a file in the user's cache directory, where there is one.
    What is read there must be what was written, by its digest, and `current`. If one rank finds it otherwise, all make
    it: make() may gather."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(home) / "equivariant-ssl" / f"{name}.pt"
    value = None
    with contextlib.suppress(Exception):  # no such file yet, or a damaged one
        kept = read_tensors(path)
        value = kept if kept.pop("digest") == digest_of(kept) and current(kept) else None

    # All ranks make the value when one lacks it; rank 0 stores it. A user without a home directory has a "~" in `home`.
    if any_rank(value is None):
        value = make()
        if rank() == 0 and os.path.isabs(home):
            with contextlib.suppress(OSError):  # nowhere to keep it
                path.parent.mkdir(parents=True, exist_ok=True)
                save_checkpoint(path, value | dict(digest=digest_of(value)))
    return value


def digest_of(value):
    """A hash of a tensor, of a plain value, or of a dict of them: of names, types, shapes and contents."""
    content = b""
    if isinstance(value, dict):
        value = [(name, digest_of(v)) for name, v in value.items()]
    elif isinstance(value, torch.Tensor):
        value, content = (value.dtype, value.shape), value.reshape(-1).contiguous().numpy()
    out = hashlib.blake2b(repr(value).encode(), digest_size=16)
    out.update(content)
    return out.hexdigest()


def code_of(function):
    """A hash of the source of a function of this file, and of all functions and constants of this file that it uses."""
    # Every name that a function uses is followed to the function or constant behind it.
    names, text = [function.__name__], {}
    for name in names:  # grows as it goes
        value = globals().get(name)
        if name not in text and inspect.isfunction(value):
            text[name] = inspect.getsource(value)
            codes = [value.__code__]

            # Nested functions and comprehensions have code objects of their own.
            for code in codes:
                names += code.co_names
                codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        elif isinstance(value, (int, float, str, tuple, dict, range)):
            text[name] = repr(value)
    return f"{number_of(sorted(text.items())):x}"


# ----------------------------------------------------------------------------------------------------------------------
# Data: blocks, rendered on the spot
#
#   blocks, blocks_views   the two sets: random rotations; a grid of views in sessions
#   render_blocks          scenes of boxes -> images and masks
#   multiply, pose_target  quaternions, and what a rotation predicts
# ----------------------------------------------------------------------------------------------------------------------

# Five boxes a class: centre x, y, z, width, height, depth, in arbitrary units. No class is its own
# rotated or mirrored copy, so no two rotations of an object are the same.
# fmt: off
BLOCK_CLASSES = {
    "chair":  [(0, 0, 0, 1.4, .4, 1.4), (0, .7, -.5, 1.4, 1.2, .35), (-.5, -.55, 0, .35, .9, 1.4),
               (.5, -.5, .5, .4, .8, .4), (.55, .35, .2, .3, .5, .9)],
    "table":  [(0, .45, 0, 2.2, .4, 1.8), (-.85, -.25, .6, .45, 1.2, .45), (.85, -.25, .6, .45, 1.2, .45),
               (.85, -.25, -.6, .45, 1.2, .45), (-.6, -.05, -.3, .8, .8, .9)],
    "arch":   [(-.75, -.2, 0, .6, 1.7, .9), (.75, -.2, 0, .7, 1.7, .9), (0, .8, 0, 2.3, .6, .9),
               (.6, 1.25, .15, .6, .5, .6), (-.8, -.8, .65, .6, .5, .6)],
    "stairs": [(-.75, -.6, 0, .6, .4, 1.4), (-.25, -.4, 0, .6, .8, 1.4), (.25, -.2, 0, .6, 1.2, 1.4),
               (.75, 0, 0, .6, 1.6, 1.4), (.7, .95, .4, .6, .5, .6)],
    "hammer": [(0, -.3, 0, .6, 1.6, .6), (0, .7, 0, .8, .8, .8), (.7, .7, 0, .8, 1.2, 1.2),
               (-.7, .85, 0, .8, .5, .9), (0, -1, .2, .9, .5, 1)],
    "plane":  [(0, 0, 0, 2.2, .5, .6), (.1, 0, .7, 1, .25, 1), (.1, 0, -.7, 1, .25, 1),
               (-.8, .5, 0, .6, .7, .3), (.25, -.25, .7, .7, .45, .5)],
    "dog":    [(0, 0, 0, 1.5, .7, .8), (.9, .5, .05, .8, .8, .7), (.55, -.6, 0, .45, .7, .8),
               (-.55, -.6, -.1, .45, .7, .6), (-.75, .6, .2, .3, .7, .3)],
    "crane":  [(-.4, -.9, 0, 1.3, .5, 1.3), (-.4, 0, 0, .7, 1.5, .7), (.25, .8, 0, 1.9, .6, .7),
               (.9, .2, 0, .6, .9, .6), (-.4, .5, .55, .6, .6, .6)],
    "snake":  [(-.7, -.7, 0, .8, 1, .8), (0, -.35, 0, 1, .8, .8), (.5, .2, 0, .8, .9, .8),
               (.5, .5, .65, .8, .8, .9), (1, .5, .95, .7, .8, .8)],
    "truck":  [(-.3, .25, 0, 1.6, 1.2, 1.1), (.75, 0, .1, .7, .8, .9), (-.6, -.5, 0, .5, .5, 1.3),
               (.7, -.5, 0, .5, .5, 1.3), (.5, .65, -.4, .4, .7, .4)],
}
# fmt: on
N_OBJECTS = {"train": 1500, "test": 500}
N_VIEWS = 8  # images of each object
CAMERA_DISTANCE, HALF_VIEW = 4.0, 0.26  # tangent of half the angle of view
LIGHT_DIRECTION = (1 / 3, 2 / 3, 2 / 3)  # unit vector, towards the light
AMBIENT, DIFFUSE = 0.45, 0.75  # white and coloured light


def hsv_to_rgb(h, s, v):
    """Hue, saturation, value, each broadcastable to (...,), in [0, 1] -> RGB (..., 3) in [0, 1]."""
    h, s, v = torch.broadcast_tensors(*(torch.as_tensor(a)[..., None] for a in (h, s, v)))  # (..., 1)
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * h) % 6  # (..., 3)
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)


def quaternion_from_angles(angles):
    """Extrinsic xyz Tait-Bryan angles (n, 3), radians -> unit quaternions (n, 4), scalar last."""
    (cx, cy, cz), (sx, sy, sz) = (angles / 2).cos().unbind(1), (angles / 2).sin().unbind(1)  # (n,)
    x, y = sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz
    z, w = cx * cy * sz - sx * sy * cz, cx * cy * cz + sx * sy * sz
    return torch.stack([x, y, z, w], 1)


def rotation_matrix(q):
    """Unit quaternions (n, 4), scalar last -> R (n, 3, 3), from the object's axes to the world's."""
    x, y, z, w = q.unbind(1)  # (n,) each
    row_x = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    row_y = [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    row_z = [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]
    return torch.stack([*row_x, *row_y, *row_z], 1).view(-1, 3, 3)


def render_chunk(boxes, colors, rotation, floor_hue, light_hue, distance, size):
    """`render_blocks` for the few images whose rays fit in the cache."""
    # One ray passes through each quarter of a pixel.
    n, S = len(boxes), 2 * size  # 2x2 rays a pixel, P = S * S
    u = ((torch.arange(S) + 0.5) / S * 2 - 1) * HALF_VIEW  # (S,)
    y, x = torch.meshgrid(-u, u, indexing="ij")  # (S, S)
    rays = torch.stack([x, y, -torch.ones_like(x)]).view(3, -1)  # (3, P)

    # The camera and the light are turned instead of the object, so that the object's boxes are axis-aligned.
    to_object = rotation_matrix(rotation).mT  # (n, 3, 3)
    d = to_object @ rays  # (n, 3, P)
    d = torch.where(d.abs() < 1e-9, 1e-9, d)
    camera = to_object[..., 2] * distance[:, None]  # (n, 3)
    light = (to_object @ torch.tensor(LIGHT_DIRECTION))[..., None]  # (n, 3, 1)

    # Along each axis, camera + t d is between the two faces of a box for t in midway -+ reach. The ray hits the box if
    # it enters the last of the three slabs before it leaves the first.
    centre = boxes[..., :3] - camera[:, None]  # (n, K, 3)
    half = boxes[..., 3:] / 2
    midway = centre[..., None] / d[:, None]  # (n, K, 3, P)
    reach = half[..., None] / d.abs()[:, None]
    enter = (midway - reach).amax(2)  # (n, K, P)
    leave = (midway + reach).amin(2)
    t, part = torch.where(enter < leave, enter, torch.inf).min(1, keepdim=True)  # (n, 1, P)
    hit = t < torch.inf

    # The visible face is across the axis that the ray entered last; its normal opposes d, its shading is Lambert's.
    part = part.expand(-1, 3, -1)  # (n, 3, P)
    near_face = centre.mT.gather(2, part) - half.mT.gather(2, part) * d.sign()  # (n, 3, P)
    axis = (near_face / d).max(1, keepdim=True).indices  # (n, 1, P), ten times as fast as argmax
    lambert = (-d.sign() * light).gather(1, axis).clamp(min=0)
    light_rgb = hsv_to_rgb(light_hue, 0.5, 1.0)[..., None]  # (n, 3, 1)
    surface = colors.mT.gather(2, part) * (AMBIENT + DIFFUSE * light_rgb * lambert)  # (n, 3, P)

    # The floor gets darker towards the corners.
    floor = hsv_to_rgb(floor_hue, 0.35, 0.6)[..., None]  # (n, 3, 1)
    floor = floor * (AMBIENT + DIFFUSE * light_rgb * LIGHT_DIRECTION[2])
    vignette = 1 - 2 * (x**2 + y**2).view(-1)  # (P,)
    rgb = torch.where(hit, surface, floor * vignette).clamp(max=1).view(n, 3, S, S)

    # The four rays of a pixel are averaged.
    images = (F.avg_pool2d(rgb, 2) * 255).round().to(torch.uint8)  # (n, 3, size, size)
    masks = F.avg_pool2d(hit.view(n, S, S).float(), 2) >= 0.5  # (n, size, size)
    return images, masks


def render_blocks(boxes, colors, rotation, floor_hue, light_hue, size, distance=None, rays_per_chunk=2**17):
    """Trace n scenes of K boxes each, exactly, with 2x2 supersampling.

    boxes: (n, K, 6) centre x, y, z and width, height, depth in the object's own axes, within the sphere of radius 1.
    colors: (n, K, 3) RGB in [0, 1]. rotation: (n, 4) unit quaternions, scalar last. floor_hue, light_hue: (n,) in
    [0, 1). size: height and width of the images in pixels. distance: (n,), of the camera from the origin, default 4, at
    which the sphere fills the image. Returns images (n, 3, size, size) uint8 and masks (n, size, size) bool, true where
    the object covers at least half of the pixel."""
    distance = torch.full((len(boxes),), CAMERA_DISTANCE) if distance is None else distance  # (n,)
    scenes = (boxes, colors, rotation, floor_hue, light_hue, distance)
    n_chunk = max(1, rays_per_chunk // (2 * size) ** 2)
    chunks = [render_chunk(*chunk, size) for chunk in zip(*(a.split(n_chunk) for a in scenes))]
    return tuple(map(torch.cat, zip(*chunks)))


def bounding_boxes(masks):
    """Masks (n, size, size) bool, none empty -> (n, 4) top, left, height, width over the size."""
    size = masks.shape[1]
    profiles = torch.stack([masks.any(2), masks.any(1)], 1).int()  # (n, 2, size)
    first, last = profiles.argmax(2), size - profiles.flip(2).argmax(2)  # (n, 2)
    return torch.cat([first, last - first], 1) / size  # (n, 4)


def random_objects(labels, generator, turn=0.0):
    """Labels (m,) int64 -> boxes (m, K, 6), colors (m, K, 3): variants of the classes, all hues turned by `turn`."""
    parts = torch.tensor(list(BLOCK_CLASSES.values()), dtype=torch.float32)[labels]  # (m, K, 6)
    m, K = parts.shape[:2]
    between = lambda low, high, *shape: low + (high - low) * torch.rand(m, *shape, generator=generator)

    # Each object is a stretched copy of its class with moved and thickened boxes, scaled to the sphere of radius 1.
    stretch = between(0.85, 1.2, 1, 3)  # (m, 1, 3)
    centre = (parts[..., :3] + between(-0.05, 0.05, K, 3)) * stretch  # (m, K, 3)
    extent = parts[..., 3:] * between(1.0, 1.3, K, 3) * stretch  # (m, K, 3)

    # Centring before scaling makes the object fill the sphere.
    low, high = (centre - extent / 2).amin(1, True), (centre + extent / 2).amax(1, True)  # (m, 1, 3)
    centre = centre - (low + high) / 2
    radius = (centre.abs() + extent / 2).norm(dim=2).amax(1)[:, None, None]  # (m, 1, 1)
    boxes = torch.cat([centre, extent], 2) / radius  # (m, K, 6)

    # Each part keeps the typical hue of its class, up to some noise.
    typical = torch.rand(len(BLOCK_CLASSES), K, generator=rng("paint"))[labels]  # (m, K)
    hue = (typical + 0.08 * torch.randn(m, K, generator=generator) + turn) % 1
    return boxes, hsv_to_rgb(hue, between(0.35, 0.7, K), between(0.7, 1.0, K))


def photographed(labels, boxes, colors, groups, factors, **scene):
    """N views of m objects of `labels` (m,), `boxes` and `colors`; `groups` (N,) says which object each view shows, and
    `scene` is what `render_blocks` wants beside. Returns the fields of an ImageSet."""
    images, masks = render_blocks(boxes[groups], colors[groups], **scene)
    out = dict(images=images, labels=labels[groups], classes=tuple(BLOCK_CLASSES), groups=groups, factors=factors)
    return out | dict(masks=masks, boxes=bounding_boxes(masks))


def blocks(split, size=32, seed=0):
    """`split` "train", 1,500 objects, or "test", 500 others; 8 views of each, next to each other; "hues" is the test
    split with all paint of the opposite hue, so that it misleads.

    Returns the fields of an ImageSet, labels balanced, boxes those of the masks; factors are rotation (N, 4) unit
    quaternions, scalar last, floor_hue (N,) and light_hue (N,) in [0, 1). The scenes do not depend on the size."""
    # The "hues" split draws the same scenes as "test", so that only the paint differs.
    scenes = "train" if split == "train" else "test"
    generator, m = rng("blocks", scenes, seed), N_OBJECTS[scenes]
    labels = torch.arange(m) % len(BLOCK_CLASSES)  # (m,)
    boxes, colors = random_objects(labels, generator, 0.5 if split == "hues" else 0.0)  # (m, K, 6), (m, K, 3)
    groups = torch.arange(m).repeat_interleave(N_VIEWS)  # (N,)

    # All views of an object differ in rotation, floor and light.
    angles = (torch.rand(len(groups), 3, generator=generator) - 0.5) * math.pi  # (N, 3)
    hues = torch.rand(2, len(groups), generator=generator)  # (2, N)
    factors = dict(rotation=quaternion_from_angles(angles), floor_hue=hues[0], light_hue=hues[1])
    return photographed(labels, boxes, colors, groups, factors, size=size, **factors)


AZIMUTHS, ELEVATIONS, DISTANCES = range(0, 360, 30), (10, 30, 50), (4.0, 5.0, 6.0)  # degrees, degrees, as above
BLOCK_SESSIONS = {"train": (0, 1), "seen": (0, 1), "test": range(2, 11)}  # each with a floor and a light of its own


def blocks_views(split, size=32, seed=0):
    """Upright objects on a turntable: `split` "train", 50 objects in 2 sessions, 108 views of each; "test", 20 others
    in the 9 other sessions, 36 views of each; "seen", these 20 in the 2 sessions that train.

    Returns what `blocks` does, object by object, session by session; factors are view (N, 3), azimuth and elevation in
    degrees and distance, and session (N,) int64. The grid of views has 12 azimuths, 3 elevations and 3 distances; the
    light turns with the camera. A session is a hue of the floor and one of the light, plus a little noise."""
    # The "seen" and the test split draw the same objects.
    generator = rng("blocks-views", "train" if split == "train" else "test", seed)
    m = 50 if split == "train" else 20
    labels = torch.arange(m) % len(BLOCK_CLASSES)  # (m,)
    boxes, colors = random_objects(labels, generator)  # (m, K, 6), (m, K, 3)

    # Every object is seen in every session, but a test object shows only a third of the views in each.
    axes = (torch.tensor(list(axis), dtype=torch.float32) for axis in (AZIMUTHS, ELEVATIONS, DISTANCES))
    grid = torch.cartesian_prod(*axes)  # (108, 3)
    places = torch.arange(m), torch.tensor(BLOCK_SESSIONS[split]), torch.arange(len(grid))
    groups, session, view = torch.cartesian_prod(*places).unbind(1)  # (N,) each
    if split != "train":
        kept = (groups + session + view // 9 + view // 3 + view) % 3 == 0
        groups, session, view = groups[kept], session[kept], view[kept]
    view = grid[view]  # (N, 3)

    # The object is turned about its axis by the azimuth, then tilted towards the camera by the elevation.
    azimuth, elevation = view[:, :2].deg2rad().T / 2  # (N,) each; half angles
    zero = torch.zeros(len(view))
    turn = torch.stack([zero, azimuth.sin(), zero, azimuth.cos()], 1)  # (N, 4)
    tilt = torch.stack([elevation.sin(), zero, zero, elevation.cos()], 1)  # (N, 4)

    # The hue of the floor covers the whole circle over the sessions, and that of the light only its warm fifth.
    hues = torch.stack([session / 11, 5 * session % 11 / 55])  # (2, N)
    floor_hue, light_hue = (hues + 0.02 * torch.randn(2, len(view), generator=generator)) % 1
    scene = dict(rotation=multiply(tilt, turn), floor_hue=floor_hue, light_hue=light_hue, distance=view[:, 2])
    return photographed(labels, boxes, colors, groups, dict(view=view, session=session), size=size, **scene)


def multiply(p, q):
    """Hamilton product of quaternions (n, 4), scalar last."""
    v, w, u, s = p[:, :3], p[:, 3:], q[:, :3], q[:, 3:]
    return torch.cat([w * u + s * v + torch.linalg.cross(v, u), w * s - (v * u).sum(1, keepdim=True)], 1)


def pose_target(name, factors, i, j):
    """What happened from view i to view j of an object, rows (n,) each. "pose": the quaternion q_i^-1 q_j (n, 4), its
    sign as it comes; "hues": the differences of floor and light hue (n, 2), not wrapped."""
    if name == "pose":
        conjugate = factors["rotation"][i] * torch.tensor([-1.0, -1.0, -1.0, 1.0])
        return multiply(conjugate, factors["rotation"][j])
    return torch.stack([factors[k][j] - factors[k][i] for k in ("floor_hue", "light_hue")], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Data: the table of all sets
#
#   DATA, load_data   name -> ImageSet
#   normalisation     mean and std of the channels
# ----------------------------------------------------------------------------------------------------------------------


def imagenet(wnids, root, split, **_):
    """An ImageNet in folders: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, of some `wnids`, or (None) of all 1,000."""
    # A set of other classes is easier or harder, so its accuracy must not pass for that of ImageNet.
    name, expected = ("imagenet100", len(wnids)) if wnids else ("imagenet", 1000)
    data = imagefolder(root, split, wnids)
    if data is None or len(data.classes) != expected:
        found = f"{len(data.classes)}{data.note and f' ({data.note})'}" if data else f"no {split}"
        right = f"{name} is train/<wnid>/*.JPEG and val/<wnid>/*.JPEG with {expected} classes"
        die(f"--data-dir {root}: {right}, found {found}; or use --data imagefolder")
    return data


def rendered(render, root, split, size, **_):
    """A set that is drawn on the spot, at `size` px, and kept in the cache."""
    name = render.__name__.replace("_", "-")
    return ImageSet(**cached(f"{name}-{size}-{split}-{code_of(render)}", lambda: render(split, size)))


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A row of DATA. read(root, split, size=, sessions=, workers=, skip_corrupt=) -> ImageSet of the "train" or
    "test" split, or None where the set has no such split; mean and std of each channel, of images in [0, 1]."""

    read: Callable
    mean: tuple
    std: tuple


# To add a data set, write its reader above and its row here. eval_probe.py adds the sets of transfer.
DATA = {
    "blocks": DataSet(partial(rendered, blocks), *BLOCKS),
    "blocks-views": DataSet(partial(rendered, blocks_views), *BLOCKS),
    "cifar10": DataSet(partial(cifar, "cifar10"), *CIFAR10),
    "cifar100": DataSet(partial(cifar, "cifar100"), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": DataSet(partial(imagenet, None), *IMAGENET),
    "imagenet100": DataSet(partial(imagenet, {f"n{wnid}" for wnid in IMAGENET100.split()}), *IMAGENET),
    "3diebench": DataSet(threediebench, (0.5016, 0.5037, 0.5060), (0.1030, 0.0999, 0.0969)),
    "core50": DataSet(core50, (0.6000, 0.5681, 0.5411), (0.1817, 0.1944, 0.2039)),
    "tdw": DataSet(tdw, (0.7709, 0.7642, 0.7470), (0.0835, 0.0842, 0.0840)),
    "imagefolder": DataSet(lambda root, split, **_: imagefolder(root, split), *IMAGENET),
}


def check_data(name):
    if name not in DATA:
        die(f"--data {name}: unknown data set; there are {', '.join(DATA)}")


def normalisation(args):
    """Mean and std of each channel: those of the data set; a folder of images takes those of its recipe's, and
    ImageNet's with a recipe of your own."""
    row = DATA[args.recipe if args.data == "imagefolder" and args.recipe in DATA else args.data]
    return row.mean, row.std


def load_data(name, root, split, size, skip_corrupt=False, workers=None, sessions=(1, 2)):
    """The "train" or "test" split of a data set as an ImageSet; None when it has no such split. `size` is the side at
    which `blocks` and `blocks-views` are rendered; everything else keeps its own. `skip_corrupt` opens every file first
    and leaves out the ones that cannot be read. `sessions`: those of core50 that train."""
    check_data(name)

    # Only the rendered sets do without files. A folder that cannot be listed ends the program, whatever the set.
    if name.startswith("blocks"):
        if root is not None:
            die(f"--data-dir {root}: {name} is rendered; name a data set such as --data imagefolder, or leave it out")
    else:
        if root is None:
            die(f"--data-dir: {name} needs the directory of its images")
        if os.path.isdir(root):
            visible(root)

    # A split must exist on all machines or on none. Sets which were loaded whole have no unreadable files left.
    data = DATA[name].read(root, split, size=size, sessions=sessions, workers=workers, skip_corrupt=skip_corrupt)
    problem = f"some machines have a {split} split there, others have none; copy the data set anew"
    same_on_all_ranks(data is None, f"--data-dir {root}: {problem}")

    # `Run.restore` compares the training images. Test images that differ would give a wrong score in silence.
    if split == "test" and data is not None:

        def complaint(a, other, b):
            differs = f"rank {other} has another test split than rank 0 ({difference(a, b)})"
            return f"--data-dir {root}: {differs}; copy the data set anew"

        same_on_all_ranks(data.fingerprint(), complaint)
    if skip_corrupt and data is not None and data.images is None:
        return without_unreadable(data, workers)
    return data


# ----------------------------------------------------------------------------------------------------------------------
# Data: the loader
#
#   Loader       step -> this rank's views of the global batch
#   unbroken     what a broken file or worker ends with
#   in_workers   function(item) of many items, by loader processes (default_workers, check_shared_memory, detach_worker)
# ----------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def order_of_epoch(n, seed, epoch):
    """The order in which an epoch visits n items: a permutation (n,)."""
    return torch.randperm(n, generator=rng(seed, "order", epoch))


class Loader:
    """step -> this rank's views of the global batch.

    `policies[view]` is the Compose that makes a view. `draw(generator)` samples for all ranks alike: {view: (rows of
    the global batch (n,), params)}. Whole images are opened and cropped on the device where the set lives there,
    otherwise in worker processes, each of which makes whole batches; all after the crop is batched on the device, or,
    where there is no other device, done by the workers too. Nothing depends on how many workers or ranks there are.

    An epoch visits every image once, but for an incomplete last batch, and all its views show it. With a `sampler` they
    show what that says: `len(sampler)` items are visited in an epoch, and `sampler(items, epoch, generator)` maps a
    batch of them, (B,), to {view: rows of the data set (B,)}."""

    def __init__(self, data, policies, draw, args, device, sampler=None):
        # Worker processes have no process group, so rank and share are noted while there is one.
        B, world = args.batch_size, world_size()
        self.data, self.sampler = data, sampler
        self.policies, self.draw = policies, draw
        self.device, self.workers = device, args.workers
        self.seed, self.batch_size = args.seed, B
        self.rank, self.share = rank(), B // world

        # Where a GPU does the rest, or the set is in memory, only the crop is made at first.
        self.crop_only = data.images is not None or device.type != "cpu"
        self.items = len(data if sampler is None else sampler)
        self.steps_per_epoch = self.items // B  # the incomplete last batch is dropped
        self.total_steps = args.epochs * self.steps_per_epoch
        self.waited = 0.0  # seconds

        # An epoch has at least one batch, and every rank an equal part of it.
        if self.items < B and args.epochs:
            what = "objects" if self.items < len(data) else "images"
            die(f"--batch-size {B}: larger than the data set ({self.items} {what}); lower it")
        if B % world:
            nearest = max(1, B // world) * world
            die(f"--batch-size {B}: not divisible by the {world} processes; the nearest that is: {nearest}")

    def rows(self, step):
        """What this rank's views show: {view: rows of the data set (b,)}."""
        # The order of an epoch is cut into batches, which are copied: a slice would keep the whole order in memory.
        epoch, k = divmod(step, self.steps_per_epoch)
        items = order_of_epoch(self.items, self.seed, epoch)[k * self.batch_size :][: self.batch_size]  # (B,)
        rows = dict.fromkeys(self.policies, items)
        if self.sampler is not None:
            rows = self.sampler(items, epoch, rng(self.seed, "pairs", step))
        return {view: r[self.rank * self.share :][: self.share].clone() for view, r in rows.items()}

    def __getitem__(self, step):
        """The batch of a step, {view: (crops or finished images, params)} and {view: rows of the data set (b,)}."""
        # Without a sampler all views share the same images, which are opened once.
        rows = self.rows(step)
        if self.sampler is None:
            opened = self.data[next(iter(rows.values()))]  # (b, 3, H, W), or b images of any size

        # The parameters are drawn for the global batch, so that they do not depend on the number of ranks. A rank takes
        # those rows of a view, and their parameters, which belong to its part of the batch.
        made, first = {}, self.rank * self.share
        for view, (batch_rows, params) in self.draw(rng(self.seed, "views", step)).items():
            local = ((batch_rows >= first) & (batch_rows < first + self.share)).nonzero()[:, 0]
            params = {name: value[local] for name, value in params.items()}
            places = batch_rows[local] - first  # (n,)

            # Only the crops are cut out where the device does the rest; otherwise the whole view is made.
            images = opened if self.sampler is None else self.data[rows[view]]
            if isinstance(images, list):
                images = [images[i] for i in places.tolist()]
            else:
                images = images.index_select(0, send(places, images.device))
            policy = self.policies[view]
            made[view] = (policy.crop if self.crop_only else policy)(images, params), params
        return made, rows

    def batches(self, steps):
        """Yield (views {name: float (n, 3, H, W)}, {name: params}, {name: rows of the data set (b,)}) for each of
        `steps`. Views are on the device, all else on the CPU."""
        # The bytes of a batch are estimated with a margin for larger grids and for parameters.
        size = 0
        for view, (rows, _) in self.draw(rng(self.seed, "views", 0)).items():
            size += len(rows) // world_size() * 3 * self.policies[view].crop.size ** 2
        size *= 1.5 if self.crop_only else 6

        # One pass covers all steps, so that the workers live as long as the run. `waited` sums the seconds in which the
        # device had nothing else to do.
        files = self.data.images is None
        workers = self.workers if files else 0
        pin = self.device.type == "cuda" and files
        batches = unbroken(in_workers(self.__getitem__, steps, workers, size, pin_memory=pin))
        self.waited = 0.0
        while True:
            begin = time.monotonic()
            made, rows = next(batches, (None, None))
            self.waited += time.monotonic() - begin
            if made is None:
                return

            # What the workers have not done is done on the device.
            views, params = {}, {}
            for view, (images, p) in made.items():
                x = send(images, self.device)
                views[view] = self.policies[view].augment(x, p) if self.crop_only else x
                params[view] = p
            yield views, params, rows


def unbroken(loader):
    """What a loader yields; an image that cannot be read ends the run with one line that names it, exit code 1."""
    try:
        yield from loader
        return
    except (OSError, RuntimeError) as e:
        if isinstance(e, OSError):
            # A worker's error starts with its traceback and ends with the line that names the image.
            *_, line = str(e).splitlines() or [type(e).__name__]
            line = line.removeprefix("OSError: ")
            if UNREADABLE not in line:
                raise
            message = f"{line}; repair or remove the file; --skip-corrupt leaves it out of training and probes"
        elif str(e).startswith("DataLoader "):  # a worker was killed or hangs
            message = one_line(e)
        else:
            raise

        # The traceback refers to itself and to the workers, which would stay until it is collected.
        e.__traceback__ = None
    die(message, 1, alone=True)


class _Each(torch.utils.data.Dataset):
    """item -> function(item), for loader workers."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def in_workers(function, items, workers, size=0, **how):
    """function(item) of all items, in their order, by loader workers: an iterable that has a length. workers: as in
    `default_workers`; size: bytes of a result; how: what else a DataLoader takes."""
    workers = default_workers(workers, size)
    check_shared_memory(workers, size)
    how |= dict(num_workers=workers, worker_init_fn=detach_worker, timeout=600 if workers else 0)
    return torch.utils.data.DataLoader(_Each(function), batch_size=None, sampler=items, **how)


def free_shared_memory():
    """Bytes that are free in /dev/shm; infinity where loader processes do not use it."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf


def default_workers(workers, batch=0):
    """--workers; by default this process's share of the cores, at most 16, or 8 where several processes share the
    machine, and no more than can keep two batches of `batch` bytes each in shared memory."""
    if workers is not None:
        return workers

    # A container or a batch system may give the process fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    *_, local = from_torchrun()  # processes on this machine
    fit = free_shared_memory() / (2 * local * max(batch, 1))
    return int(max(1, min(16 if local == 1 else 8, cores // local, fit)))


def check_shared_memory(workers, batch):
    """Refuse to start loader processes of all ranks of this machine whose prefetched batches, of `batch` bytes each,
    do not fit into /dev/shm: they would hang, or die of a bus error."""
    *_, local = from_torchrun()
    free, need = free_shared_memory(), 2 * workers * local * batch
    if need > free:
        need, free = need / 2**20, free / 2**20
        sizes = f"their batches need {need:.0f} MB of shared memory and /dev/shm has {free:.0f} MB"
        advice = "give --workers 0, or docker run --shm-size=8g"
        die(f"--workers {workers}: {sizes}; {advice}", 2 if world_size() == 1 else 1)  # other ranks may have room


def detach_worker(_):
    """A loader worker leaves the process group, so that a SIGTERM to all of it lets the main process save first. It
    lets go of the run's lock, which would outlive a killed main process in it."""
    # One thread per worker avoids more threads than cores.
    torch.set_num_threads(1)
    keep_freed_memory()
    while LOCKS:
        os.close(LOCKS.popitem()[1])
    if os.name == "posix":
        os.setsid()


# ----------------------------------------------------------------------------------------------------------------------
# Augmentations
#
#   RandomResizedCrop, CenterCrop                                uint8 images to uint8 (n, 3, S, S)
#   HorizontalFlip, Rot90, Affine, Elastic, GridResize           where things are
#   ColorJitter, Grayscale, GaussianBlur, Solarize, Normalize    how they look
#   Compose                                                      one view
#   family, family_target                                        the papers' transformations, as ops and as numbers
#
# An op has two verbs. `params = op.sample(n, generator)` is a dict of CPU tensors of first dimension n that holds every
# random choice as a raw value. `x = op(x, params)` is deterministic and batched, on the device of x, in place where it
# can. After the crop x is float in [0, 1]. Laws and arithmetic are those of torchvision's transforms on tensors. What
# an op leaves alone has the identity's parameters (brightness 1, hue 0, sigma 0, ...). Which samples an op changes is
# decided on the CPU, so that no op waits for a GPU.
# ----------------------------------------------------------------------------------------------------------------------


def uniform(shape, low, high, generator=None):
    """Random numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def column(v, x):
    """Per-sample values (n,) on the CPU -> (n, 1, 1, 1) like x, without waiting for the device."""
    return send(v.to(x.dtype), x.device).view(-1, 1, 1, 1)


def change_rows(x, chosen, fn):
    """x[chosen] = fn(x[chosen]) in place. chosen: (n,) bool on the CPU, where counting the rows costs no wait."""
    rows = send(chosen.nonzero()[:, 0], x.device)  # (m,)
    return x.index_copy_(0, rows, fn(x.index_select(0, rows))) if len(rows) else x


def luma(x):
    """ITU-R 601 luma with torchvision's weights: (n, 3, H, W) -> (n, 1, H, W)."""
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def resize(x, shape, interpolation):
    """Antialiased resize of uint8 (n, 3, h, w) to uint8 (n, 3, *shape); the uint8 kernel exists on CPUs only."""
    x = x if x.device.type == "cpu" else x.float()
    x = F.interpolate(x, shape, mode=interpolation, antialias=True)
    return x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8)


def resize_weights(offset, length, full, size, interpolation):
    """Antialiased resize of one axis as one matrix per sample: (n, size, full), rows sum to 1.

    Row i weighs the `full` source pixels for output pixel i when the pixels [offset, offset + length) become `size`:
    a triangle, or a cubic (a = -0.5), stretched when shrinking. offset, length: (n,) float, in pixels."""
    offset, length = offset.view(-1, 1, 1), length.view(-1, 1, 1)  # (n, 1, 1) each
    scale = length / size  # source pixels per output pixel

    # The distance between output and source pixels is in units of the filter, which widens when the image shrinks.
    centre = (torch.arange(size, device=offset.device)[:, None] + 0.5) * scale  # (n, size, 1)
    pixel = torch.arange(full, device=offset.device) + 0.5 - offset  # (n, 1, full)
    t = (pixel - centre).abs_().div_(scale.clamp(min=1))  # (n, size, full)
    if interpolation == "bilinear":
        w = (1 - t).clamp_(min=0)
    else:
        w = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2) * (t < 2)
    w *= (pixel > 0) & (pixel < length)  # nothing from outside the box
    return w.div_(w.sum(2, keepdim=True))


def crop_resize(images, boxes, size, interpolation="bilinear"):
    """Cut one box out of each image and resize it to size x size with antialiasing: torchvision's `resized_crop`.

    images: uint8 (n, 3, H, W), fastest in channels_last order on a CPU, or a list of n uint8 (3, H_i, W_i).
    boxes:  (n, 4) int64 on the CPU: top, left, height, width in pixels.
    Returns uint8 (n, 3, size, size). Two matmuls do the whole batch on a GPU and for small outputs; otherwise a CPU is
    several times faster image by image, with its uint8 kernel. The two ways agree within one level of 255."""
    if isinstance(images, torch.Tensor) and (images.device.type != "cpu" or size <= 40):
        H, W = images.shape[2:]
        top, left, h, w = send(boxes.float(), images.device).unbind(1)  # (n,) each
        rows = resize_weights(top, h, H, size, interpolation)  # (n, size, H)
        columns = resize_weights(left, w, W, size, interpolation)  # (n, size, W)
        x = (images.float().flatten(1, 2) @ columns.mT).clamp_(0, 255)  # (n, 3 * H, size) as uint8 would overflow
        x = rows[:, None] @ x.unflatten(1, (3, H))  # (n, 3, size, size)
        return x.round_().clamp_(0, 255).to(torch.uint8)

    resized = []
    for image, (top, left, h, w) in zip(images, boxes.tolist()):
        crop = image[None, :, top : top + h, left : left + w]  # (1, 3, h, w)
        resized.append(resize(crop, (size, size), interpolation))
    return torch.cat(resized)


def image_sizes(images):
    """Heights and widths (n, 2) of a batch (n, 3, H, W), or of a list of (3, H_i, W_i)."""
    if isinstance(images, torch.Tensor):
        return torch.tensor(images.shape[-2:]).expand(len(images), 2)
    return torch.tensor([image.shape[-2:] for image in images]).view(-1, 2)


BOX = ("area", "aspect", "corner")  # what a random crop samples, before it knows the sizes of the images


class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to size x size: torchvision.transforms.RandomResizedCrop.

    scale: range of the box's share of the image area, uniform. ratio: range of width / height, log-uniform.
    Params `top`, `left`, `height`, `width`: (n,) float in [0, 1], fractions of the image's height or width. They follow
    from the sampled `area`, `aspect`, `corner` and the sizes of the images, which the op first sees when it is applied:
    then `place` puts them in the place of these. A box that is in the params already is taken as it is."""

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bilinear"):
        self.size, self.scale, self.ratio, self.interpolation = size, scale, ratio, interpolation

    def sample(self, n, generator=None, tries=10):
        """Candidates `area` and `aspect`, (n, 10) float: torchvision tries ten times; `corner`, (n, 2) in [0, 1)."""
        log_aspect = uniform((n, tries), math.log(self.ratio[0]), math.log(self.ratio[1]), generator)
        area = uniform((n, tries), *self.scale, generator)
        return {"area": area, "aspect": log_aspect.exp(), "corner": torch.rand(n, 2, generator=generator)}

    def place(self, params, sizes):
        """Replace the candidates in `params` by the first box that fits into images of `sizes` (n, 2), in pixels."""
        if "top" in params:
            return

        H, W = sizes.double().unbind(1)  # (n,) each
        area = params.pop("area") * (H * W)[:, None]  # (n, 10)
        aspect = params.pop("aspect").double()
        h, w = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
        fits = (0 < h) & (h <= H[:, None]) & (0 < w) & (w <= W[:, None])
        first = fits.int().argmax(1, keepdim=True)  # (n, 1)
        h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]  # (n,) each
        top, left = (params.pop("corner") * torch.stack([H - h + 1, W - w + 1], 1)).floor().unbind(1)

        # Where no candidate fits, the box is central, as large as the allowed aspect ratios permit.
        none = ~fits.any(1)  # (n,) bool
        h = torch.where(none, torch.minimum(H, (W / self.ratio[0]).round()), h)
        w = torch.where(none, torch.minimum(W, (H * self.ratio[1]).round()), w)
        top, left = torch.where(none, (H - h) // 2, top), torch.where(none, (W - w) // 2, left)
        box = {"top": top / H, "left": left / W, "height": h / H, "width": w / W}
        params |= {name: fraction.float() for name, fraction in box.items()}

    def __call__(self, images, params):
        """uint8 (n, 3, H, W), or a list of uint8 (3, H_i, W_i) -> uint8 (n, 3, size, size)."""
        sizes = image_sizes(images)  # (n, 2)
        self.place(params, sizes)
        boxes = torch.stack([params[name] for name in ("top", "left", "height", "width")], 1)  # (n, 4) fractions
        return crop_resize(images, (boxes * sizes.double().repeat(1, 2)).round().long(), self.size, self.interpolation)


def middle(x):
    """Images (n, 3, H, W) as they are; of strips more than 64 times as long as wide the middle that is 64 times as
    long, because scaled up whole they might fill the memory."""
    for axis in (2, 3):
        cut = max(0, x.shape[axis] - 64 * min(x.shape[2:])) // 2
        x = x.narrow(axis, cut, x.shape[axis] - 2 * cut)
    return x


class CenterCrop:
    """The evaluation view: short side to `resize`, then the central size x size: torchvision's Resize and CenterCrop.

    No parameters. Images that are size x size already come back unchanged. `resize`, the short side, defaults to
    256/224 of the size, as usual on ImageNet; below 96 px to the size itself, so that nothing is cut off. Of long
    strips `middle` alone is scaled."""

    def __init__(self, size, resize=None, interpolation="bilinear"):
        self.size, self.interpolation = size, interpolation
        self.resize = resize or (size if size < 96 else round(size * 256 / 224))

    def sample(self, n, generator=None):
        return {}

    def __call__(self, images, params=None):
        """uint8 (n, 3, H, W), resized together, or a list of uint8 (3, H_i, W_i) -> uint8 (n, 3, size, size)."""
        crops = []
        for x in [images] if isinstance(images, torch.Tensor) else [image[None] for image in images]:
            x = middle(x)
            H, W = x.shape[2:]
            if (H, W) != (self.size, self.size):
                shape = (self.resize * H // min(H, W), self.resize * W // min(H, W))
                x = center_crop(resize(x, shape, self.interpolation), [self.size])
            crops.append(x)  # (1 or n, 3, size, size)
        return torch.cat(crops)


class HorizontalFlip:
    """Mirror left and right: torchvision.transforms.RandomHorizontalFlip. Param `flip`: (n,) bool."""

    def __init__(self, p=0.5):
        self.p = p

    def sample(self, n, generator=None):
        return {"flip": torch.rand(n, generator=generator) < self.p}

    def __call__(self, x, params):
        return change_rows(x, params["flip"], lambda y: y.flip(3))


class Rot90:
    """Turn square images by k quarter turns counter-clockwise: torch.rot90. Param `rot90`: (n,) int64 k, 0 to 3."""

    def sample(self, n, generator=None):
        return {"rot90": torch.randint(4, (n,), generator=generator)}

    def __call__(self, x, params):
        for k in (1, 2, 3):
            x = change_rows(x, params["rot90"] == k, lambda y, k=k: y.rot90(k, (2, 3)))
        return x


class Affine:
    """Rotate about the centre, then shift, in one warp filled with 0: torchvision's `affine`.

    degrees: rotations are uniform in +-degrees. translate: shifts are uniform in +-translate pixels. interpolation:
    "bilinear" or "nearest". Params `angle`, (n,) float, degrees, clockwise; `shift_y`, `shift_x`, (n,) float, pixels
    down and right."""

    def __init__(self, degrees=0.0, translate=0.0, interpolation="bilinear"):
        self.degrees, self.translate, self.interpolation = degrees, translate, interpolation

    def sample(self, n, generator=None):
        angle = uniform(n, -self.degrees, self.degrees, generator)
        shift_y, shift_x = uniform((2, n), -self.translate, self.translate, generator)
        return {"angle": angle, "shift_y": shift_y, "shift_x": shift_x}

    def __call__(self, x, params):
        H, W = x.shape[2:]
        a = params["angle"].to(x.dtype).deg2rad()  # (n,)
        shift = torch.stack([params["shift_x"], params["shift_y"]], 1).to(x.dtype)  # (n, 2)

        # The inverse map goes from output to input pixels, and then to half sides, the unit of affine_grid.
        inverse = torch.stack([a.cos(), a.sin(), -a.sin(), a.cos()], 1).view(-1, 2, 2)  # (n, 2, 2)
        half = torch.tensor([W / 2, H / 2], dtype=x.dtype)
        linear = inverse * half / half[:, None]
        offset = (-inverse @ shift[..., None]) / half[:, None]  # (n, 2, 1)
        theta = send(torch.cat([linear, offset], 2), x.device)  # (n, 2, 3)
        grid = F.affine_grid(theta, x.shape, align_corners=False)  # (n, H, W, 2)
        return F.grid_sample(x, grid, self.interpolation, "zeros", align_corners=False)


class Elastic:
    """Shift every pixel by smooth noise, bilinear, with black behind the border: torchvision's `elastic_transform`
    without a fill, with probability p.

    The shift along each axis is uniform noise in [-1, 1), blurred with a Gaussian of `sigma` pixels (8 sigma + 1
    taps), times alpha / 2 pixels: 1.6 px in standard deviation for alpha = 100, sigma = 5, far from the borders; more
    near them, and on sides below 21 px, where the kernel is cut to 2 side - 1 taps. Param `elastic`: (n,) int64, the
    seed of the noise; 0 where not applied."""

    def __init__(self, alpha=100.0, sigma=5.0, p=0.5):
        self.alpha, self.p = alpha, p
        self.smooth = GaussianBlur((sigma, sigma), kernel=int(8 * sigma + 1))

    def sample(self, n, generator=None):
        on = torch.rand(n, generator=generator) < self.p  # (n,) bool
        return {"elastic": torch.randint(1, 2**31, (n,), generator=generator) * on}

    def __call__(self, x, params):
        seed = params["elastic"]
        return change_rows(x, seed > 0, lambda y: self.warp(y, seed[seed > 0]))

    def warp(self, x, seed):
        """x (m, 3, H, W), seed (m,) -> (m, 3, H, W)."""
        # Blurred noise gives neighbouring pixels similar shifts of the points at which the image is sampled.
        m, _, H, W = x.shape
        noise = hash_noise(send(seed, x.device), 2 * H * W).view(m, 2, H, W).to(x.dtype) * 2 - 1
        shift = self.smooth.blur(noise, torch.full((m,), self.smooth.sigma[0]))  # (m, 2, H, W) along x and y
        scale = send((self.alpha / torch.tensor([W, H])).to(shift.dtype), x.device)  # (2,) from pixels to half sides
        eye = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(m, 2, 3)
        grid = F.affine_grid(eye, x.shape, align_corners=False)  # (m, H, W, 2), from -1 to 1
        grid = grid + shift.permute(0, 2, 3, 1) * scale
        return F.grid_sample(x, grid, "bilinear", "zeros", align_corners=False)


def hash_noise(seed, n):
    """Seeds (m,) int64 -> (m, n) in [0, 1), the same on every device: lowbias32 (Wellons 2018) of seed and place."""
    h = (seed[:, None] + torch.arange(n, device=seed.device) * 0x9E3779B9) & 0xFFFFFFFF  # (m, n)
    for factor, shift in ((1, 16), (0x7FEB352D, 15), (0x846CA68B, 16)):
        h = h * factor & 0xFFFFFFFF
        h = h ^ (h >> shift)
    return (h >> 8).float() / 2**24


class GridResize:
    """Resize the whole batch to one random grid of patches, bicubic with antialiasing: torchvision's `resize`.

    The area is A ~ U(area) * grid^2 patches, the aspect ratio width / height a is log-uniform in `ratio`, and the grid
    has round(sqrt(A / a)) rows and round(sqrt(A * a)) columns. Params `grid_h`, `grid_w`: (n,) int64, in patches, the
    same for all n. A cubic may leave [0, 1] by a little at edges."""

    def __init__(self, patch, grid, area=(0.7, 1.3), ratio=(3 / 4, 4 / 3)):
        self.patch, self.grid, self.area, self.ratio = patch, grid, area, ratio

    def sample(self, n, generator=None):
        A = uniform(1, *self.area, generator) * self.grid**2  # (1,)
        a = uniform(1, math.log(self.ratio[0]), math.log(self.ratio[1]), generator).exp()  # (1,)
        h, w = ((A * ratio).sqrt().round().long().clamp(min=1) for ratio in (1 / a, a))  # (1,) each
        return {"grid_h": h.repeat(n), "grid_w": w.repeat(n)}

    def __call__(self, x, params):
        h, w = (self.patch * int(params[name][0]) for name in ("grid_h", "grid_w"))
        return F.interpolate(x, (h, w), mode="bicubic", antialias=True)  # (n, 3, patch * grid_h, patch * grid_w)


def shift_hue_(x, turns):
    """Shift the hue of x (n, 3, H, W) in place by `turns`, (n,) on the CPU, in turns of the colour circle.

    Value and chroma stay, so only the hue is computed, in sixths of a turn, and each channel is read off its ramp:
    red is full up to a distance of 1 from hue 0 and empty from 2 on, green so around hue 2, and blue around hue 4."""
    r, g, b = x.unbind(1)  # (n, H, W) each
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low

    # The hue is first computed times the chroma, then divided by it, shifted, and wrapped into [0, 6).
    in_green = (b - r).add_(chroma, alpha=2)
    in_blue = (r - g).add_(chroma, alpha=4)
    h = torch.where(high == r, g - b, torch.where(high == g, in_green, in_blue))
    h.div_(chroma.clamp(min=1e-8)).add_(6 * column(turns, x)[:, 0])
    h.sub_(torch.floor(h / 6), alpha=6)
    ramps = (h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()
    for channel, ramp in zip((r, g, b), ramps):
        torch.addcmul(low, ramp.clamp_(0, 1), chroma, out=channel)


class ColorJitter:
    """Brightness, contrast, saturation, hue in random order: torchvision's RandomApply([ColorJitter(...)], p).

    brightness, contrast, saturation: a number v, for factors uniform in [max(0, 1 - v), 1 + v], or a tuple (low,
    high). hue: a number v, for shifts uniform in [-v, v], or a tuple; in turns, within [-0.5, 0.5]. shuffle: else in
    this order. Params `brightness`, `contrast`, `saturation`, `hue`: (n,) float; `order`: (n, 4) int64, the steps of
    each sample from first to last, 0 brightness, 1 contrast, 2 saturation, 3 hue."""

    def __init__(self, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=0.8, shuffle=True):
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: v if isinstance(v, tuple) else (max(0, 1 - v), 1 + v) for name, v in factors.items()}
        self.ranges["hue"] = hue if isinstance(hue, tuple) else (-hue, hue)
        self.p, self.shuffle = p, shuffle

    def sample(self, n, generator=None):
        on = torch.rand(n, generator=generator) < self.p  # (n,) bool
        order = torch.rand(n, 4, generator=generator).argsort(1)  # (n, 4)
        params = {"order": torch.where(on[:, None] & self.shuffle, order, torch.arange(4))}
        for name, (low, high) in self.ranges.items():
            value = uniform(n, low, high, generator)
            params[name] = torch.where(on, value, 0.0 if name == "hue" else 1.0)
        return params

    def __call__(self, x, params):
        """Each sample in its own order, with no step done twice.

        Brightness, contrast and saturation are one blend f * x + (1 - f) * target, with target 0, the mean luma or the
        luma. So the batch makes three blends, each sample with its own targets, and the hue step comes before, between
        or after them: with the samples sorted by its turn, those due before a given blend are a slice."""
        factor = torch.stack([params["brightness"], params["contrast"], params["saturation"]], 1)  # (n, 3)
        hue, order = params["hue"], params["order"]

        # The hue step of a sample has turn 0 to 3, 4 without a shift, or 5 if nothing changes. ends[t] samples have at
        # most turn t.
        turn = torch.where(hue != 0, (order == 3).int().argmax(1), 4)  # (n,)
        turn[(factor == 1).all(1) & (hue == 0)] = 5
        ends = torch.bincount(turn, minlength=6).cumsum(0).tolist()

        # The samples are sorted by their turn, and their factors put in the order of use.
        rows = turn.argsort()[: ends[4]]  # (m,)
        hue = hue[rows]  # (m,)
        blends = order[rows][order[rows] != 3].view(-1, 3)  # (m, 3)
        factor = factor[rows].gather(1, blends)  # (m, 3)
        rows = send(rows, x.device)
        y = x.index_select(0, rows)  # (m, 3, S, S)

        # Each step shifts the hues that are due, then blends with black (kind 0), the mean luma (1) or the luma (2).
        for step, (first, end) in enumerate(zip([0, *ends], ends[:4])):
            if first < end:
                shift_hue_(y[first:end], hue[first:end])
            if step < 3:
                f, kind = factor[:, step], blends[:, step]  # (m,) each
                target = luma(y)  # (m, 1, S, S)
                mean = target.mean((2, 3), keepdim=True)  # (m, 1, 1, 1)
                target.mul_(column((1 - f) * (kind == 2), x)).add_(mean * column((1 - f) * (kind == 1), x))
                torch.addcmul(target, y, column(f, x), out=y).clamp_(0, 1)
        return x.index_copy_(0, rows, y)


class Grayscale:
    """Put the luma in all three channels: torchvision.transforms.RandomGrayscale. Param `gray`: (n,) bool."""

    def __init__(self, p=0.2):
        self.p = p

    def sample(self, n, generator=None):
        return {"gray": torch.rand(n, generator=generator) < self.p}

    def __call__(self, x, params):
        return change_rows(x, params["gray"], lambda y: luma(y).expand_as(y))


class GaussianBlur:
    """Gaussian blur with reflected borders: torchvision's RandomApply([GaussianBlur(kernel, sigma)], p).

    sigma: range of the standard deviation, uniform, in pixels. kernel: taps per axis, odd; None cuts each Gaussian at
    three times its sigma. A side of s pixels reflects once, so it takes at most 2 s - 1 taps.
    Param `sigma`: (n,) float, 0 where not applied."""

    def __init__(self, sigma=(0.1, 2.0), p=0.5, kernel=None):
        self.sigma, self.p, self.kernel = sigma, p, kernel

    def sample(self, n, generator=None):
        on = torch.rand(n, generator=generator) < self.p  # (n,) bool
        return {"sigma": torch.where(on, uniform(n, *self.sigma, generator), 0.0)}

    def __call__(self, x, params):
        sigma = params["sigma"]
        return change_rows(x, sigma > 0, lambda y: self.blur(y, sigma[sigma > 0]))

    def blur(self, x, sigma):
        """x (m, C, H, W), sigma (m,) on the CPU -> (m, C, H, W), axis by axis."""
        m, C, H, W = x.shape
        radius = (3 * sigma).ceil() if self.kernel is None else torch.full_like(sigma, self.kernel // 2)  # (m,)

        # A CPU takes large images one by one: each stays in the cache and has no more taps than its sigma needs.
        alone = self.kernel is None and x.device.type == "cpu" and H * W > 2**14
        if alone and m > 1:
            return torch.cat([self.blur(*one) for one in zip(x.split(1), sigma.split(1))])

        # Every plane is a channel with its own kernel. In double precision the longest one does not round the others.
        ry, rx = min(int(radius.max()), H - 1), min(int(radius.max()), W - 1)
        x = F.pad(x.reshape(1, C * m, H, W), (rx, rx, ry, ry), mode="reflect")  # (1, C * m, H + 2 * ry, W + 2 * rx)
        for r, dim, taps in ((rx, 3, (1, -1)), (ry, 2, (-1, 1))):
            t = torch.arange(-r, r + 1, dtype=torch.float64)
            k = -0.5 * (t / sigma[:, None]) ** 2  # (m, 2 * r + 1)
            k = k.masked_fill(t.abs() > radius[:, None], -torch.inf).softmax(1)
            if alone:
                first, *others = (x.narrow(dim, i, x.shape[dim] - 2 * r) for i in range(2 * r + 1))
                x = first * k[0, 0]
                for shifted, weight in zip(others, k[0, 1:].tolist()):
                    x.add_(shifted, alpha=weight)
            else:
                k = send(k.to(x.dtype).repeat_interleave(C, 0), x.device).view(C * m, 1, *taps)
                x = F.conv2d(x, k, groups=C * m)  # without the padding of the axis
        return x.reshape(m, C, H, W)


class Solarize:
    """Invert the values >= threshold: torchvision.transforms.RandomSolarize. Param `solarize`: (n,) bool."""

    def __init__(self, threshold=128 / 255, p=0.2):
        self.threshold, self.p = threshold, p

    def sample(self, n, generator=None):
        return {"solarize": torch.rand(n, generator=generator) < self.p}

    def __call__(self, x, params):
        # Rounding puts level 128 just above or below 128 / 255, depending on the device, so the threshold is lower.
        low = self.threshold - 1e-6
        return change_rows(x, params["solarize"], lambda y: torch.where(y >= low, 1 - y, y))


class Normalize:
    """(x - mean) / std per channel: torchvision.transforms.Normalize. No parameters. torchvision copies mean and std to
    the device, and waits for it; numbers need no copy."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def sample(self, n, generator=None):
        return {}

    def __call__(self, x, params=None):
        for channel, mean, std in zip(x.unbind(1), self.mean, self.std):
            channel.sub_(mean).div_(std)
        return x


class Compose:
    """One view: ops in order, itself an op, with all their parameters in one flat dict. The same params give the same
    pixels.

    If the first op is a crop it is also `compose.crop`, and compose(images, params) is compose.augment(crops, params)
    with crops = compose.crop(images, params). So a loader worker, which sees the full images, may do the crop alone."""

    def __init__(self, ops):
        self.crop, self.ops = None, list(ops)
        if isinstance(ops[0], (RandomResizedCrop, CenterCrop)):
            self.crop = self.ops.pop(0)

    def sample(self, n, generator=None):
        """{name: (n, ...)} of all ops."""
        params = {}
        for op in [self.crop, *self.ops] if self.crop else self.ops:
            params |= op.sample(n, generator)
        return params

    def __call__(self, images, params):
        """uint8 (n, 3, H, W), or for a crop also a list of n uint8 (3, H_i, W_i) -> float32 (n, 3, S, S)."""
        if isinstance(self.crop, RandomResizedCrop):
            self.crop.place(params, image_sizes(images))
        return self.run(images, params, self.crop)

    def augment(self, x, params):
        """All but the crop: uint8 (n, 3, S, S), or float in [0, 1] -> float (n, 3, S, S); x itself stays as it is."""
        return self.run(x, params, None)

    def run(self, images, params, crop):
        """On a GPU all at once; on a CPU in chunks that stay in its cache, which makes it twice as fast."""
        # A chunk holds about 2^18 pixels, which is little enough for the cache.
        n, side = len(images), crop.size if crop else images.shape[3]
        chunk = max(8, 2**18 // side**2) if images[0].device.type == "cpu" else n
        out = None
        for first in range(0, n, chunk):
            # The crop comes first, on uint8 pixels, and every other op follows on floats in [0, 1].
            part = slice(first, first + chunk)
            x, p = images[part], {name: v[part] for name, v in params.items()}  # (chunk, ...)
            x = crop(x, p) if crop else x  # (chunk, 3, S, S)
            x = x.contiguous().float().div_(255) if x.dtype == torch.uint8 else x.clone()
            for op in self.ops:
                x = op(x, p)
            out = x.new_empty(n, *x.shape[1:]) if out is None else out  # (n, 3, S, S)
            out[part] = x
        return out


FAMILIES = ("rotation", "color", "blur", "translation", "crop", "flip")


def most_shift(size):
    """Pixels: 10 at 224 px, in proportion; 4 on small images."""
    return 4.0 if size < 64 else 10 * size / 224


def family(name, size):
    """A family of transformations of images of `size` px: +-45 degrees; factors 1 +- 0.4 and hue +- 0.1 in fixed order;
    sigma 0.1 to 2 px; shifts of `most_shift`; crops of 20 % to all of the image; flips of every second image."""
    return dict(
        rotation=Affine(degrees=45),
        color=ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0, shuffle=False),
        blur=GaussianBlur((0.1, 2.0), p=1.0, kernel=23 if size >= 64 else 9),
        translation=Affine(translate=most_shift(size)),
        crop=RandomResizedCrop(size, (0.2, 1.0)),
        flip=HorizontalFlip(),
    )[name]


def family_target(name, p, size):
    """Parameters p of a family -> numbers that describe them (n, K): the box of a crop in fractions of the image; of
    other families the parameters, divided by the largest, and 0 where nothing is done."""
    if name == "rotation":
        columns = [p["angle"] / 45]
    elif name == "color":
        columns = [(p[k] - 1) / 0.4 for k in ("brightness", "contrast", "saturation")] + [p["hue"] / 0.1]
    elif name == "blur":
        columns = [p["sigma"] / 2]
    elif name == "translation":
        columns = [p[k] / most_shift(size) for k in ("shift_y", "shift_x")]
    elif name == "crop":
        centre = [p["top"] + p["height"] / 2 - 0.5, p["left"] + p["width"] / 2 - 0.5]
        columns = [*centre, p["height"] - 1, p["width"] - 1]
    else:
        columns = [p[name].float()]
    return torch.stack(columns, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Backbones
#
#   ViT, ResNet                       the encoders; scripts add their own to BACKBONES
#   make_backbone, load_backbone      from arguments; from a checkpoint
#   export_backbone                   for timm
# ----------------------------------------------------------------------------------------------------------------------

VITS = dict(  # the sizes of DeiT / DINO (6 heads for ViT-S), and one for CPUs
    vit_pico=dict(embed_dim=128, depth=6, num_heads=4),
    vit_tiny=dict(embed_dim=192, depth=12, num_heads=3),
    vit_small=dict(embed_dim=384, depth=12, num_heads=6),
    vit_base=dict(embed_dim=768, depth=12, num_heads=12),
)
RESNETS = dict(  # block, blocks of each stage, width of the first stage
    resnet_pico=(BasicBlock, (2, 2, 2, 2), 16),
    resnet18=(BasicBlock, (2, 2, 2, 2), 64),
    resnet50=(Bottleneck, (3, 4, 6, 3), 64),
)


def check_arch(arch, *families):
    """Refuse an architecture that is not in `families`, such as VITS and RESNETS."""
    known = list(itertools.chain(*families))
    if arch not in known:
        die(f"--arch {arch}: not one of {', '.join(known)}")


def sincos_positions(h, w, dim):
    """Fixed 2-D positions of MoCo-v3: (1, h w, dim). With d = dim/4 frequencies w_i = 10000^(-i/d) the vector of the
    cell in row a, column b is [sin(a w), cos(a w), sin(b w), cos(b w)]."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (d,)
    a, b = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    a, b = a.flatten()[:, None] * omega, b.flatten()[:, None] * omega  # (h w, d)
    return torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1)[None].float()


class ViT(VisionTransformer):
    """timm's VisionTransformer, with timm's parameter names, for any grid of patches and with a late [CLS].

    cls_layer: [CLS] enters after this block (0: at the input, as usual; None: there is none); before it the tokens
    are a map. pos: "learned", or "sincos" (fixed). A late [CLS] has no position; at the input a sin-cos one is zero."""

    feature = "final [CLS]"

    def __init__(self, arch="vit_small", img_size=224, patch_size=16, cls_layer=0, pos="learned", drop_path=0.0):
        # timm builds the encoder; a class token may enter later than in timm, so it has no position there.
        has_cls = cls_layer is not None
        cls = dict(class_token=has_cls, global_pool="token" if has_cls else "avg", no_embed_class=cls_layer != 0)
        sizes = dict(img_size=img_size, patch_size=patch_size, num_classes=0, **VITS[arch])
        super().__init__(drop_path_rate=drop_path, fc_norm=False, **cls, **sizes)
        self.cls_layer = cls_layer
        self.patch_size, self.grid = patch_size, img_size // patch_size
        self.dim, self.depth = self.embed_dim, len(self.blocks)

        # The fixed table replaces timm's learned one and gets no gradient.
        if pos == "sincos":
            table = sincos_positions(self.grid, self.grid, self.dim)
            self.pos_embed.data = F.pad(table, (0, 0, int(cls_layer == 0), 0))  # a row of zeros for [CLS]
            self.pos_embed.requires_grad_(False)

    def positions(self, h, w):
        """The positions of an h x w grid of patches (1, h w, dim): the table, resampled where its grid is another."""
        # timm's resample_abs_pos_embed(..., antialias=False) does the same, in float32 alone.
        table = self.pos_embed[:, -(self.grid**2) :]
        if (h, w) == (self.grid, self.grid):
            return table
        table = table.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        return F.interpolate(table, (h, w), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def cells(self, x):
        """The grid of patches (h, w) of x (B, 3, H, W)."""
        return tuple(side // self.patch_size for side in x.shape[2:])

    def run_blocks(self, x, taps=()):
        """x (B, 3, H, W) -> z, the normalised tokens after the last block, and {k: tokens after block k} for `taps`,
        all (B, N, embed_dim). From block cls_layer + 1 on (from 0 if cls_layer is 0) [CLS] is row 0."""
        # [CLS] joins the map of patches at its own block, and only an input [CLS] has a position.
        z = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.positions(*self.cells(x))  # (B, h w, embed_dim)
        tapped = {}
        for k, block in enumerate(self.blocks):
            if k == self.cls_layer:
                cls = self.cls_token + self.pos_embed[:, :1] if k == 0 else self.cls_token
                z = torch.cat([cls.expand(len(z), -1, -1), z], dim=1)  # (B, 1 + h w, embed_dim)
            z = block(z)
            if k + 1 in taps:
                tapped[k + 1] = z
        return self.norm(z), tapped

    def trace(self, x, taps=()):
        """x (B, 3, H, W) -> y (B, dim), the normalised final [CLS], and the tokens after the blocks in `taps`."""
        z, tapped = self.run_blocks(x, taps)
        return z[:, 0], tapped

    def forward(self, x):
        return self.trace(x)[0]

    def last_blocks(self, x, n=4):
        """x (B, 3, H, W) -> the [CLS] after each of the last n blocks that have one, each through the final norm,
        side by side (B, n dim); the last of them is `forward(x)`. What linear probes of ViTs look at."""
        layers = range(max(self.depth - n, self.cls_layer) + 1, self.depth + 1)
        tapped = self.trace(x, layers)[1]
        return torch.cat([self.norm(tapped[k][:, 0]) for k in layers], dim=1)

    def timm_arguments(self):
        """Arguments of the timm model with these features, or why there is none."""
        if self.cls_layer > 0:
            return "timm has no ViT whose [CLS] enters after a block"
        d = self.description
        sizes = dict(img_size=d["img_size"], patch_size=d["patch_size"], **VITS[d["arch"]])
        return dict(model_name="vit_small_patch16_224", num_classes=0, **sizes)

    def tokens(self, x, after):
        """x (B, 3, H, W) -> tokens after block `after`, un-normalised, as a map (B, h, w, dim); of several: a list."""
        h, w = self.cells(x)
        layers = after if isinstance(after, tuple) else (after,)
        tapped = self.trace(x, layers)[1]
        maps = [tapped[k][:, -h * w :].unflatten(1, (h, w)) for k in layers]
        return maps if isinstance(after, tuple) else maps[0]


class Pyramid:
    """What encoders of four stages have in common, beside their `trace`."""

    depth, feature = 4, "mean of the last map"

    def forward(self, x):
        return self.trace(x)[0]

    def last_blocks(self, x, n=1):
        """The representation, as `forward`: what linear probes of such encoders look at."""
        return self(x)

    def tokens(self, x, after):
        """x (B, 3, H, W) -> the map after stage `after`, of 4 (B, h, w, C); after several: a list."""
        layers = after if isinstance(after, tuple) else (after,)
        tapped = self.trace(x, layers)[1]
        return [tapped[k] for k in layers] if isinstance(after, tuple) else tapped[after]


class ResNet(Pyramid, torchvision.models.ResNet):
    """torchvision's ResNet, with its parameter names and initial values, without classifier: for small images and for
    any width.

    stem: "imagenet" (7x7 convolution of stride 2, max-pool), or "cifar" (3x3, no pool). coords: two channels are
    appended to the (normalised, augmented) input, the column's and the row's position in [-1, 1] [CoordConv, Liu et
    al. 2018]."""

    def __init__(self, arch="resnet18", img_size=224, stem="imagenet", coords=False):
        # The last of four stages is eight times as wide as the first, times the expansion of a block.
        block, layers, width = RESNETS[arch]
        super().__init__(block, layers)
        self.coords, self.fc = coords, nn.Identity()
        self.dim = 8 * width * block.expansion

        # torchvision's constructor is fixed to width 64 and the ImageNet stem, so other layers replace its own.
        if width != 64:
            self.inplanes, self.bn1 = width, nn.BatchNorm2d(width)
            for i, n in enumerate(layers):
                setattr(self, f"layer{i + 1}", self._make_layer(block, width * 2**i, n, stride=2 if i else 1))
        channels = 5 if coords else 3
        if stem == "cifar":
            self.conv1, self.maxpool = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)

        # All convolutions draw torchvision's initial values again.
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def timm_arguments(self):
        """Arguments of the timm model with these features, or why there is none."""
        d = self.description
        if d.get("stem") == "cifar" or self.coords or d["arch"] == "resnet_pico":
            return "timm has no ResNet with a 3x3 stem, coordinate channels or of this width"
        return dict(model_name=d["arch"], num_classes=0)

    def trace(self, x, taps=()):
        """x (B, 3, H, W) -> y (B, dim), the mean over the last map, in float32 also under autocast, and {k: map after
        stage k (B, h, w, C)} for `taps`."""
        if self.coords:
            B, _, H, W = x.shape
            across, down = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (W, H))
            position = torch.stack([across.expand(H, W), down[:, None].expand(H, W)])  # (2, H, W): x, y
            x = torch.cat([x, position.expand(B, 2, H, W)], 1)  # (B, 5, H, W)

        tapped = {}
        z = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for k, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            z = stage(z)  # (B, C, h, w)
            if k in taps:
                tapped[k] = z.permute(0, 2, 3, 1)
        return upcast(z).mean((2, 3)), tapped


# Architecture -> class of the encoder. A script adds its own, under the name of an architecture, or of an option that
# no other encoder has. An encoder has `feature`, `dim`, `depth`, `trace`, `tokens`, `last_blocks` and `timm_arguments`.
BACKBONES = dict.fromkeys(VITS, ViT) | dict.fromkeys(RESNETS, ResNet)
METHODS = "ser", "recon_xattn", "ciper", "clever"  # scripts that may add to it; loading a checkpoint imports no other


def make_backbone(arch, mean, std, img_size, inv=None, **kwargs):
    """The encoder that a checkpoint's "backbone" describes. It keeps that description, and in `mean`, `std`,
    `img_size` what it expects as input; `dim` is the width of `backbone(x)`, `inv` that of its invariant part, which
    comes first (None: it is not split)."""
    # A name of an option chooses a script's own encoder, before the architecture does.
    check_arch(arch, BACKBONES)
    kind = next(name for name in (*kwargs, arch) if name in BACKBONES)
    backbone = BACKBONES[kind](arch=arch, img_size=img_size, **kwargs)
    backbone.mean, backbone.std, backbone.img_size = mean, std, img_size
    backbone.inv = getattr(backbone, "inv", inv)
    backbone.description = dict(arch=arch, mean=list(mean), std=list(std), img_size=img_size, inv=inv, **kwargs)
    return backbone


def load_backbone(path, file=None):
    """Checkpoint, from `file` where it is open -> (frozen encoder in eval mode, checkpoint). All weights must fit."""
    # A script with encoders of its own registers them when imported.
    state = load_checkpoint(path, file)
    if state["method"] in METHODS:
        importlib.import_module(state["method"])
    try:
        backbone = make_backbone(**state["backbone"])
        backbone.load_state_dict(state["backbone_state"])
    except (RuntimeError, TypeError) as e:
        die(f"{path}: its weights do not fit {state['backbone'].get('arch')} ({str(e).splitlines()[-1].strip()[:200]})")
    return backbone.eval().requires_grad_(False), state


def export_backbone(path, backbone):
    """Write backbone.safetensors with timm's keys where timm's model gives the same features (to 1e-5); return a line
    that says so, or why not. `timm.create_model(**json.loads(metadata["timm"]), checkpoint_path=path)` loads it."""
    d, arguments = backbone.description, backbone.timm_arguments()
    if isinstance(arguments, str):
        return f"{path.name}: not written, {arguments}"

    # timm's twin and the encoder must agree on a random image, or the export is refused.
    backbone = copy.deepcopy(backbone).cpu().eval()
    twin = timm.create_model(**arguments).eval()
    twin.load_state_dict(backbone.state_dict())
    x = torch.randn(2, 3, d["img_size"], d["img_size"], generator=rng("export"))
    with torch.no_grad():
        error = (twin(x) - backbone(x)).abs().max().item()
    if not error <= 1e-5:
        return f"{path.name}: not written, timm's features differ by {error:.1e}"

    # The metadata holds timm's arguments and the normalisation of the images.
    metadata = dict(timm=json.dumps(arguments)) | {name: json.dumps(d[name]) for name in ("img_size", "mean", "std")}
    try:
        weights = {k: v.contiguous() for k, v in backbone.state_dict().items()}
        write(path, safetensors.torch.save(weights, metadata))
    except OSError as e:
        return f"{path.name}: not written ({e.strerror})"
    return f"{path}: the encoder for timm.create_model, whose arguments are in its metadata"


# ----------------------------------------------------------------------------------------------------------------------
# Features and k-NN
#
#   Reader, features    views of a set, batch by batch; their features
#   knn, knn_accuracy   the vote of the neighbours
#   turn_equivariance   whether the last map turns with the image
# ----------------------------------------------------------------------------------------------------------------------


def view_of(data, item):
    """(op, rows, params) -> op(images of these rows, params), in a worker of a Reader."""
    op, rows, params = item
    return op(data[torch.from_numpy(rows)], {name: torch.from_numpy(value) for name, value in params.items()})


class Reader:
    """Views of the images of a set, batch by batch. The workers that open the files of a folder start with the first
    pass and serve all later ones, as long as the reader lives; what is in memory needs none."""

    def __init__(self, data, workers=None):
        self.data, self.workers = data, workers
        self.loader, self.items = None, []

    def batches(self, op, rows, params=None, batch_size=256, name="images", pin=False):
        """Yield (rows (b,), op(their images, their parameters)) in the order of `rows` (n,), behind a progress bar.
        op can be pickled and makes images of `op.size` px; params: a dict of (N, ...) for the whole set. `pin`: in
        pinned memory, for a GPU."""
        # The loader starts once, for batches of the first pass's size, and its item list is refilled for each pass.
        if self.loader is None:
            files = self.data.images is None
            workers = self.workers if files else 0
            how = dict(pin_memory=pin and files, persistent_workers=files and workers != 0)
            size = 1.5 * batch_size * 3 * op.size**2
            self.loader = in_workers(partial(view_of, self.data), self.items, workers, size, **how)

        # Arrays, unlike tensors, take no shared memory on their way to a worker.
        chunks = rows.split(batch_size) if len(rows) else ()
        part = lambda chunk: {key: value[chunk].numpy() for key, value in (params or {}).items()}
        self.items[:] = [(op, chunk.numpy(), part(chunk)) for chunk in chunks]

        # A pass which breaks off leaves workers in an unknown state, so the next one starts new ones.
        try:
            for x, chunk in zip(progress(unbroken(self.loader), total=len(chunks), desc=name, unit="batch"), chunks):
                yield chunk, x
        except BaseException:
            self.loader = None
            raise


@torch.no_grad()
def features(
    backbone, data, device, view=None, params=None, encode=None, rows=None, amp="auto", batch_size=256, name="features"
):
    """Encode a set once: (N, D) float32 on the CPU of rank 0, in the order of `rows` (default: all); the other ranks,
    which encode their share, get (0, D).

    data: an ImageSet, or a Reader of one, whose workers then stay. view(images, params of their rows) -> uint8
    (n, 3, S, S), default the centre crop; params: a dict of (N, ...). encode(x) -> (n, D) for normalised x, default the
    backbone. Each of W ranks encodes every W-th row; the backbone runs in eval mode, without gradient.

    Batches go straight to their place on rank 0, where 1.28 million images of D = 1,536 take 4 N D = 7.9 GB. A GPU
    collects 16 batches first, because it waits for each copy: 16 * 4 * 256 W D = 200 MB on W = 8 ranks."""
    reader = data if isinstance(data, Reader) else Reader(data)
    view = view or CenterCrop(backbone.img_size, interpolation="bicubic")
    normalise = Normalize(backbone.mean, backbone.std)
    encode = backbone if encode is None else encode

    # Every rank encodes equally many rows, because gathering needs equal sizes; surplus rows are dropped.
    rows = torch.arange(len(reader.data)) if rows is None else rows
    world = world_size()
    even = math.ceil(len(rows) / world) * world
    local = rows[torch.arange(even) % len(rows)][rank() :: world]

    # Batches are encoded in eval mode; a GPU keeps several in `encoded` before it copies them to `out`.
    out = None
    begin, encoded = 0, []
    gpu = device.type == "cuda"
    training = backbone.training
    backbone.eval()
    for _, x in reader.batches(view, local, params, batch_size, name, pin=gpu):
        x = normalise(send(x, device).float() / 255)
        with autocast(device, amp):
            encoded.append(encode(x).float())
        done = begin // world + sum(map(len, encoded))
        if gpu and len(encoded) < 16 and done < len(local):
            continue

        # Rank 0 gathers what all ranks encoded; rank r has the rows r, r + W, and so on.
        y = torch.cat(encoded)  # (b, D)
        encoded = []
        parts = [y]
        if world > 1:
            parts = [torch.empty_like(y) for _ in range(world)] if rank() == 0 else None
            dist.gather(y, parts)

        # The output is allocated once the width of the features is known.
        if out is None:
            out = torch.empty(0 if rank() else len(rows), y.shape[1])
        for r, part in enumerate(parts or ()):
            place = out[begin + r : begin + world * len(y) : world]
            place.copy_(part[: len(place)])
        begin += world * len(y)
    backbone.train(training)
    return out


def evenly(n, most):
    """At most `most` of n rows, evenly spaced."""
    return torch.arange(min(most, n)) * n // min(most, n)


@torch.no_grad()
def knn(train, train_labels, test, k=20, temperature=0.07, *, classes):
    """Weighted k-nearest-neighbour vote of DINO: cosine similarity, weights exp(sim / T). Features (N, D) and (M, D),
    labels (N,) -> class scores (M, classes); the highest wins, ties go to the lower class. k is cut to N."""
    # A chunk's similarities take 512 x N numbers, so that memory stays bounded.
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    train_labels = send(train_labels, train.device)
    scores = []
    for chunk in test.split(512):
        sim, index = (chunk @ train.T).topk(min(k, len(train)), dim=1)  # (m, k)
        votes = torch.zeros(len(chunk), classes, device=train.device)
        scores.append(votes.scatter_add_(1, train_labels[index], (sim / temperature).exp()))
    return torch.cat(scores)


def knn_accuracy(backbone, train, test, device, args, most=(8_000, 2_000)):
    """The score at the end of a run: 20-NN on test images; of larger sets `most` images, to stay quick."""
    # Evenly spaced rows keep the shares of the classes in a set that is sorted by class.
    rows, rows_test = (evenly(len(data), n) for data, n in zip((train, test), most))
    encoded = partial(features, backbone, device=device, amp=args.amp, name="k-NN")
    x, x_test = encoded(Reader(train, args.workers), rows=rows), encoded(Reader(test, args.workers), rows=rows_test)

    def accuracy():
        scores = knn(x, train.labels[rows], x_test, classes=len(train.classes))
        return (scores.argmax(1) == test.labels[rows_test]).float().mean().item()

    return by_rank_0(accuracy)


def turn_equivariance(backbone, data, device, args, most=400):
    """The second score at the end of a run: does the last map turn with the image?

    Mean cosine between f(x) turned by 90 degrees and f(x turned by 90 degrees), where f gives the tokens after the
    last block and the final norm, less their mean. 1: the map turns with the image; 0: the two maps are unrelated.
    `eval_probe.py --tasks equivariance` measures the same over more images, angles and groups."""
    norm = getattr(backbone, "norm", nn.Identity())
    shape = []  # h, w, D of a map, known after the first batch

    def maps_of(x):
        """Both maps of each image, from one pass over the set: (n, 2 h w D)."""
        maps = [norm(backbone.tokens(v, backbone.depth)) for v in (x, torch.rot90(x, 1, (2, 3)))]  # (n, h, w, D) each
        shape[:] = maps[0].shape[1:]
        return torch.stack(maps, 1).flatten(1)

    how = dict(rows=evenly(len(data), most), amp=args.amp, name="equivariance")
    maps = features(backbone, Reader(data, args.workers), device, encode=maps_of, **how).unflatten(1, (2, *shape))

    # Without their mean, maps that are alike everywhere do not count as equivariant. Rank 0 alone has the maps.
    def cosine():
        moved, there = torch.rot90(maps[:, 0], 1, (1, 2)), maps[:, 1]
        centred = (z - z.mean((0, 1, 2)) for z in (moved, there))
        return F.cosine_similarity(*centred, dim=3).mean().item()

    return by_rank_0(cosine)
