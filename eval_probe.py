"""Probe saved encoders: what do their frozen features know?

    python eval_probe.py runs/*/checkpoint.pt  # k-NN and linear accuracy, one table
    python eval_probe.py A/checkpoint.pt B/checkpoint.pt --tasks knn linear mlp r2 layers --plot probes.png
    python eval_probe.py A/checkpoint.pt --data pets --data-dir PETS --tasks linear finetune --linear lbfgs  # transfer
    python eval_probe.py A/checkpoint.pt timm:vit_small_patch16_224@mine.pt --data cifar10 --data-dir CIFAR
    torchrun --nproc_per_node=8 eval_probe.py A/checkpoint.pt --data imagenet --data-dir IMAGENET --protocol ser

Flow: checkpoints -> encoders -> features of the train and test images, once -> every probe on them -> a table. All
checkpoints are opened and checked before the first is probed. Checkpoints that differ only in their seed share a row,
mean +- sample standard deviation. Each finished task appends a line to eval.jsonl beside its checkpoint (of
timm:NAME: in the current directory), with the protocol and, of linear and MLP probes, the scores on training images. A
task that fails, a damaged checkpoint or a signal costs one line and the exit code; finished results stay.

Features are the final [CLS] of ViTs, the mean of the tokens of recon_xattn.py's encoders, and the mean of the last map
of ResNets and VMamba. Linear probes of ViTs see the [CLS] of the last four blocks, each through the final norm [DINO].
--part selects the invariant or the equivariant dimensions.

Tasks
  knn          20 nearest neighbours by cosine, weights exp(cos / 0.07) [DINO, Caron et al. 2021].
  linear       Softmax regression on raw features, as in the papers. Standardised features or least squares scored about
               2 points more on an encoder that 400 steps of MoCo-v3 had trained.
               --linear sgd: momentum 0.9, no weight decay, cosine to 0. Ten rates are trained together on nine tenths
               of the training images (or objects). The rate that is best on the other tenth is evaluated on the test
               images, once, after the last epoch. Images are centre crops; --augment takes random crops, encoded anew
               each epoch. --linear lbfgs: to the minimum, or for 1,000 iterations, with the best of 45 ridge weights
               [AugSelf, Lee et al. 2021], then on all images. --linear steps: CIPER's schedule, see latents.
  mlp          A 3-layer MLP (D-1024-1024-C, Adam) on standardised features of centre crops.
  fewshot      The linear probe on 1 % and 10 % of each class; its rate (or ridge weight) is chosen as above, on a tenth
               of all labels. Or, with --fewshot finetune, the encoder fine-tuned on them [CLeVER]. --seed draws
               the images; CLeVER takes SimCLR's lists.
  finetune     The encoder trained with a linear layer, SGD, random crops and flips [CLeVER, Song et al. 2024].
  r2           R^2 of an MLP that predicts the transformation between two views from the features of both: 3 layers,
               squared error, Adam [SIE, Garrido et al. 2023]. Features are standardised by the training pairs; SIE's
               are raw and its MLP takes 25 times as many steps. Images: the second view is the first under one family
               of transformations, a probe each, targets standardised. SIE draws anew each epoch, for 300 epochs; here
               one draw per image is encoded once, for 50 epochs. Posed objects: two views of one object; targets are
               the quaternion of q1^-1 q2 (pose) and the differences of the hues (hues).
  layers       Accuracy of an MLP that classifies the quarter turn, or the flip, between two views, after several blocks
               [SER, Table 5].
  equivariance Cosine between the turned, mirrored or rescaled token map of an image and the token map of the turned,
               mirrored or rescaled image [SER].
  rotation     Accuracy of the linear probe on turned test images, and of a linear probe of quarter turns [CLeVER,
               Tables 6 and 7].
  latents      Linear readouts of one image [CIPER, Xu and Triesch 2023]; "lstsq": the same by least squares.
               `object`: its class. `instance` (core50): which of the 50 objects.
               `session` (core50, blocks-views): which test session an image belongs to; trained on four fifths of the
               test images and evaluated on the rest.
               `view err` (tdw, blocks-views): squared error of azimuth, elevation and distance in units of their
               standard deviations, times 100, so that predicting the mean scores 100. (The paper does not define it.)
               Trained on train images and evaluated on test images; where test sessions are new, trained on half of the
               test objects and evaluated on the others. Features are centred and divided by one number.
               SGD, Nesterov 0.9, weight decay 1e-6, 100 epochs, batches of 256, rate 1, times 0.3 every 10 epochs.

--protocol takes a paper's own settings, as far as the paper or its code states them. `clever` has two: linear probes of
DINO and CLeVER learn at 0.001 per 256 images for 100 epochs, those of SimSiam and DDCL at 30 for 200 [DDCL's code;
CLeVER states 0.002 for batches of 512 and names no base].

Known differences
  SIE      No Adam-trained classifier on 3DIEBench. One draw for r2 on images, not one an epoch.
  DDCL     Its rates of few-label and fine-tuning heads are not taken.
  RECON    The paper says only that a linear layer is trained; L-BFGS is [AugSelf]'s, with 1,000 iterations for 5,000.
  SER      Probes train on nine tenths of the images, not on all. Fine-tuning is by SGD, not AdamW. One draw of quarter
           turns, not one an epoch.
  CLeVER   We report the last epoch, not the best, decay the rate per step, train linear transfer for 100 epochs instead
           of 200, and switch stochastic depth off."""

import contextlib
import copy
import csv
import dataclasses
import filecmp
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import common
from common import Count, Natural, Plural, Positive, Seed, ShareAbove0

import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import tyro
from timm.layers import DropPath
from tqdm import tqdm

POSES = ("pose", "hues")
SHARES = (0.01, 0.1)  # of the labels, for fewshot
MLP = dict(batch_size=256, lr=1e-3, hidden=1024, features="standardised per dimension by the training features")

# What the papers say, or their public code does, where it differs from the defaults.
PROTOCOLS = dict(
    default=dict(),
    ser=dict(augment=True, linear_epochs=50),  # rates are swept: neither paper nor code names one
    clever=dict(
        augment=True, linear_epochs=100, linear_lrs=(0.001,), fewshot="finetune", finetune_epochs=200, finetune_lr=0.001
    ),
    ciper=dict(linear="steps"),
    recon=dict(linear="lbfgs", r2_epochs=300, r2_images=50_000),
)
SIMSIAM = dict(linear_lrs=(30.0,), linear_epochs=200)  # `clever` for encoders of SimSiam and DDCL [DDCL's code]


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class SharedArgs:
    """What eval_probe.py and eval_robustness.py both ask."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """checkpoint.pt files written by the method scripts; timm:NAME takes a model of timm with its weights,
    timm:NAME@FILE with yours"""
    _: dataclasses.KW_ONLY  # the flags of a script follow as its positional arguments
    data: str | None = None
    """data set; default: the one the checkpoint was trained on"""
    data_dir: str | None = None
    """its directory; default, for the same data set: the directory that the checkpoint was trained from"""
    part: tuple[Literal["all", "inv", "equi"], ...] = ("all",)
    """dimensions that probes of features see: all, or, of the encoders of recon_xattn.py and
    clever.py, the invariant (first) or the equivariant (last) part"""
    linear: Literal["sgd", "lbfgs", "steps"] = "sgd"
    """how linear probes learn: SGD with several rates side by side; L-BFGS with the best of 45 ridge weights
    (transfer); CIPER's steps"""
    augment: bool = False
    """train them (sgd) on random crops and flips, encoded anew each epoch"""
    linear_epochs: Count = 50
    """their epochs (sgd)"""
    linear_lrs: tuple[Positive, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """their learning rates (sgd), per 256 images"""
    cache_dir: str | None = None
    """keep the features of train and test images here, and use those that are there"""
    format: Literal["table", "markdown", "csv", "json"] = "table"
    """how tables are printed, each a document of its own; csv and json hold all digits"""
    plot: str | None = None
    """also draw the tables into this file (.png, .pdf or .svg), a panel a metric; needs the package matplotlib"""
    seed: Seed = 0
    """seed of the probes' weights, of their batches and of everything random that is done to images"""
    skip_corrupt: bool = False
    """open every image of a folder first and leave out those that cannot be read"""
    workers: Natural | None = None
    """loader processes for image folders; default: as many as this process has cores, at most 16"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU"""
    amp: Literal["auto", "off"] = "auto"
    """auto is bfloat16 autocast on CUDA and float32 elsewhere"""


@dataclasses.dataclass
class Args(SharedArgs):
    """Which checkpoints, which probes, on which data."""

    tasks: tuple[
        Literal["knn", "linear", "mlp", "finetune", "fewshot", "r2", "layers", "equivariance", "rotation", "latents"],
        ...,
    ] = ("knn", "linear")
    """probes to run"""
    protocol: Literal["default", "ser", "clever", "ciper", "recon"] = "default"
    """a paper's own way to probe: it sets other flags, as --help then shows"""
    knn_k: Count = 20
    """neighbours that vote"""
    fewshot: Literal["linear", "finetune"] = "linear"
    """what learns from few labels: a linear probe, or the whole encoder"""
    mlp_epochs: Count = 50
    """epochs of the MLP"""
    finetune_epochs: Count = 20
    """epochs of fine-tuning"""
    finetune_lr: Positive = 0.001
    """its learning rate, of encoder and head, per 256 images"""
    layers: tuple[Count, ...] | None = None
    """blocks (of ResNets and VMamba: stages) after which `layers` looks; default: 1, 3, 6, 9, 12, or all stages"""
    r2_targets: (
        tuple[Literal["rotation", "color", "blur", "translation", "crop", "flip", "pose", "hues"], ...] | None
    ) = None
    """what to regress; default: pose and hues on posed objects, the six families of transformations on other images"""
    r2_epochs: Count = 50
    """epochs of the regression"""
    r2_images: Plural = 10_000
    """training images of the regression, evenly spaced, and half as many test images; a forward pass each per target.
    Of posed objects it takes all"""
    known_fraction: ShareAbove0 = 1.0
    """train the probes on this share of every class, the one that recon_xattn.py --known-fraction knew"""


def arguments(argv, base=None):
    """Command line -> Args: defaults <- the protocol's values <- those for the checkpoint's base <- flags given by
    hand."""

    def values_in_force(first):
        special = SIMSIAM if (first.protocol, base) == ("clever", "simsiam") else {}
        return dict(protocol=first.protocol) | PROTOCOLS[first.protocol] | special

    checkpoints_first(argv, Args)
    return common.parse(Args, values_in_force, argv, description=__doc__)


def checkpoints_first(argv, cls):
    """Refuse checkpoints that stand after a flag of several values, which would take them for its own. cls: the
    dataclass of the flags."""
    several = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(cls) if "tuple" in str(f.type)}
    flag = ""
    for word in sys.argv[1:] if argv is None else argv:
        flag = word if word.startswith("--") else flag
        if flag in several and (word.startswith("timm:") or word.endswith(".pt")):
            right = f"{Path(sys.argv[0]).name} {word} {flag} ..."
            common.die(f"{flag} ... {word}: checkpoints come first, before all flags: {right}")


def check(args):
    """Refuse what cannot work, before anything is read or computed."""
    load_splits.cache_clear()  # images may have changed since another call of this process

    # Lists must not be empty, and views are augmented for SGD only.
    if not args.checkpoints:
        common.die("no checkpoint given; name at least one, such as runs/ser-mocov3-ser-blocks-s0/checkpoint.pt")
    for name in ("tasks", "part", "linear_lrs"):
        if not getattr(args, name):
            common.die(f"--{name.replace('_', '-')}: is empty; name at least one, or leave the flag out")
    for name in ("tasks", "part"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            common.die(f"--{name} {' '.join(getattr(args, name))}: name each once")
    if args.augment and args.linear != "sgd":
        common.die(f"--augment: goes with --linear sgd; {args.linear} learns from fixed features: give --no-augment")

    # Refuse choices that another kind of probe or another task would use.
    usual = Args(**PROTOCOLS[args.protocol])
    for name in ("linear_epochs", "linear_lrs"):
        if args.linear != "sgd" and getattr(args, name) != getattr(usual, name):
            common.die(f"--{name.replace('_', '-')}: goes with --linear sgd; {args.linear} does not use it")
    for name, task in (("knn_k", "knn"), ("layers", "layers"), ("r2_targets", "r2"), ("fewshot", "fewshot")):
        if getattr(args, name) != getattr(usual, name) and task not in args.tasks:
            common.die(f"--{name.replace('_', '-')}: goes with --tasks {task}")

    # Files and directories that are written at the end must be writable at the start.
    if args.plot:
        check_plot(args.plot)
    if args.cache_dir:
        make_directory("cache-dir", args.cache_dir)

    # Every checkpoint must exist, once.
    if len({p if p.startswith("timm:") else os.path.realpath(p) for p in args.checkpoints}) < len(args.checkpoints):
        common.die("a checkpoint is given twice; name each once")
    for path in args.checkpoints:
        file = file_of(path)
        if file and not os.path.isfile(file):
            common.die(f"{path}: no such {'file ' + file if path.startswith('timm:') else 'checkpoint file'}")
        if path.startswith("timm:") and args.data is None:
            common.die(f"--data: {path} does not say what to probe it on; name a data set")


def make_directory(flag, path):
    """Make the directory of a flag; refuse one that cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        common.die(f"--{flag} {path}: cannot be written ({e.strerror}); choose another directory")


def file_of(path):
    """A checkpoint, or timm:NAME@FILE -> its file; "" for timm:NAME, whose weights timm fetches."""
    return path.partition("@")[2] if path.startswith("timm:") else path


# ----------------------------------------------------------------------------------------------------------------------
# Data sets of transfer
# ----------------------------------------------------------------------------------------------------------------------

TRANSFER = dict(  # torchvision's class; its train and test splits
    food101=("Food101", ("train",), ("test",)),
    dtd=("DTD", ("train", "val"), ("test",)),
    pets=("OxfordIIITPet", ("trainval",), ("test",)),
    aircraft=("FGVCAircraft", ("trainval",), ("test",)),
    flowers102=("Flowers102", ("train",), ("test",)),
    sun397=("SUN397", (), ()),
)


def transfer_set(name, root, split, **_):
    """A data set of TRANSFER as torchvision keeps it, or prepared as an image folder with train/ and test/ (or val/,
    which is not used where test/ is there). sun397 needs the authors' Training_01.txt and Testing_01.txt (19,850 images
    each) beside its folder or in it."""
    if os.path.isdir(root) and "train" in common.split_folders(root)[0]:
        return common.imagefolder(root, split, tested=("test", "val"))

    # torchvision checks the files and reads the splits; SUN397 has none.
    kind, train_parts, test_parts = TRANSFER[name]
    build = getattr(torchvision.datasets, kind)
    try:
        parts = [build(root, split=s) for s in (test_parts if split == "test" else train_parts)] or [build(root)]
    except ModuleNotFoundError as e:
        advice = f"pip install {e.name}, or prepare train/<class>/ and test/<class>/"
        common.die(f"--data {name}: torchvision reads its lists with {e.name}; {advice}")
    except Exception:  # torchvision raises whatever a missing or damaged list makes it raise
        fetch = f"torchvision.datasets.{kind}({str(root)!r}, download=True)"
        common.die(f"--data-dir {root}: holds no {name}; {fetch} would fetch it")

    # torchvision keeps the file names and labels of each part in lists of its own.
    files = "_images" if name == "pets" else "_image_files"
    paths = [str(p) for p in itertools.chain(*(getattr(d, files) for d in parts))]
    labels = list(itertools.chain(*(d._labels for d in parts)))

    # torchvision gives SUN397 whole; the authors' lists say which images train.
    if name == "sun397":
        folder = Path(root) / "SUN397"
        listing = dict(train="Training_01.txt", test="Testing_01.txt")[split]
        found = next((p for p in (Path(root) / listing, folder / listing) if os.path.isfile(p)), None)
        if found is None:
            common.die(f"--data-dir {root}: sun397 needs {listing}, from the authors' Partitions.zip")
        label = dict(zip(paths, labels))
        lines = os.fsdecode(found.read_bytes()).split("\n")
        paths = [str(folder / line.strip().lstrip("/")) for line in lines if line.strip()]
        if unknown := set(paths) - set(label):
            common.die(f"{found}: lists {common.printable(min(unknown))}, which is not there")
        labels = [label[p] for p in paths]

    # Relative paths make the fingerprint independent of the machine.
    paths = common.Paths(root, (os.path.relpath(p, root) for p in paths))
    return common.ImageSet(paths=paths, labels=torch.tensor(labels), classes=tuple(parts[0].classes))


def cub200(root, split, **_):
    """CUB-200-2011 as published: [CUB_200_2011/]images.txt, image_class_labels.txt, train_test_split.txt, classes.txt,
    images/; or prepared as an image folder."""
    if os.path.isdir(root) and "train" in common.split_folders(root)[0]:
        return common.imagefolder(root, split, tested=("test", "val"))

    # The archive may have been unpacked with its folder or without.
    nested = Path(root) / "CUB_200_2011"
    root = nested if os.path.isdir(nested) else Path(root)
    lists = ("images", "image_class_labels", "train_test_split", "classes")
    try:
        # Lines are "<number> <path>", "<number> <class>", "<number> <1: trains>" and "<class> <name>".
        texts = [os.fsdecode((root / f"{name}.txt").read_bytes()) for name in lists]
        images, labels, train, classes = ([line.split() for line in text.splitlines()] for text in texts)
        label, part = dict(labels), dict(train)

        # An image belongs to the training set where its flag is 1.
        chosen = [(path, int(label[i]) - 1) for i, path in images if (part[i] == "1") == (split == "train")]
        classes = tuple(c for _, c in classes)
    except OSError as e:
        common.die(f"--data-dir {root}: cub200 needs {Path(e.filename).name} there ({e.strerror})")
    except (ValueError, KeyError) as e:
        problem = f"{', '.join(lists)}.txt of cub200 do not fit each other ({common.printable(e)})"
        common.die(f"--data-dir {root}: {problem}; copy them again")

    # Class numbers in the lists start at 1.
    paths = common.Paths(root / "images", (path for path, _ in chosen))
    labels = torch.tensor([y for _, y in chosen])
    return common.ImageSet(paths=paths, labels=labels, classes=classes)


common.DATA |= {name: common.DataSet(partial(transfer_set, name), *common.IMAGENET) for name in TRANSFER}
common.DATA["cub200"] = common.DataSet(cub200, *common.IMAGENET)


# ----------------------------------------------------------------------------------------------------------------------
# Loading: encoders, data, and whether they fit the tasks
# ----------------------------------------------------------------------------------------------------------------------


class Timm(nn.Module):
    """A timm model in the shape of our encoders."""

    feature = "final representation"

    def __init__(self, model):
        super().__init__()
        config = model.pretrained_cfg
        self.model, norm = model, getattr(model, "norm", None)
        over_channels = isinstance(norm, (nn.LayerNorm, timm.layers.RmsNorm)) and not isinstance(
            norm, timm.layers.LayerNorm2d
        )
        self.norm = norm if over_channels else nn.Identity()  # of maps (B, h, w, C)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.img_size, self.depth = config["input_size"][-1], len(model.feature_info)
        self.dim, self.inv = getattr(model, "head_hidden_size", None) or model.num_features, None

    def forward(self, x):
        return self.model(x)

    def last_blocks(self, x):
        """The [CLS] of the last four blocks of a ViT, as of our ViTs; of other models the representation."""
        has_cls = getattr(self.model, "cls_token", None) is not None
        if not (has_cls and self.model.global_pool == "token" and hasattr(self.model, "get_intermediate_layers")):
            return self.model(x)
        blocks = self.model.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in blocks], 1)

    def tokens(self, x, after):
        """Maps (B, h, w, C) after one block or stage, counted from 1, or a tuple of them."""
        indices = [k - 1 for k in (after if isinstance(after, tuple) else (after,))]
        how = dict(intermediates_only=True, output_fmt="NCHW", norm=False)
        maps = [z.permute(0, 2, 3, 1) for z in self.model.forward_intermediates(x, indices=indices, **how)]
        return maps if isinstance(after, tuple) else maps[0]


def load(path):
    """A checkpoint, or timm:NAME with timm's weights, or timm:NAME@FILE with those of a file, without classifier ->
    (encoder, state without tensors). A file is read once, so that its `sha256` is of what was loaded."""
    name, file = path.removeprefix("timm:").partition("@")[0], file_of(path)
    try:
        content = io.BytesIO(Path(file).read_bytes()) if file else None
    except OSError as e:
        common.die(f"{path}: cannot be read ({e.strerror})")

    # The state of a timm model looks like that of a checkpoint. Tensors are dropped from the state of a checkpoint.
    if path.startswith("timm:"):
        encoder, own = load_timm(path, name, file, content), dict(data=None, data_dir=None, seed=0, arch=path)
        state = dict(method="timm", step=0, args=own, backbone=dict(arch=name, inv=None), seen=None)
    else:
        encoder, state = common.load_backbone(path, content)
        seen = state["train_state"].get("data")
        state = {k: state[k] for k in ("method", "args", "step", "backbone")} | dict(seen=seen)
    return encoder, state | dict(sha256=hashlib.sha256(content.getbuffer()).hexdigest() if file else path)


def load_timm(path, name, file, content):
    """timm's model NAME, with its own weights or those that `content`, the bytes of a file, holds."""
    if not timm.is_model(name):
        common.die(f"{path}: timm has no model {name}; timm.list_models('*{name[:6]}*') lists similar names")
    notes, weights = read_weights(path, file, content) if file else ({}, None)
    try:
        # The architecture is timm's, with the sizes that our backbone.safetensors states.
        sizes = {k: v for k, v in notes.pop("timm", {}).items() if isinstance(v, (int, float)) and k != "num_classes"}
        create = partial(timm.create_model, name, pretrained=not file, num_classes=0, **sizes)
        try:
            model = create(dynamic_img_size=True)  # ViTs then take images of any size, as ours do
        except TypeError:  # other models have no such argument
            model = create()
        side = notes.pop("img_size", None)
        model.pretrained_cfg |= notes | (dict(input_size=(3, side, side)) if side else {})

        # All weights are loaded but those of the classifier.
        if file:
            classifier = tuple(f"{c}." for c in (model.pretrained_cfg["classifier"], "head") if isinstance(c, str))
            known = model.state_dict()
            model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(classifier) or k in known})
    except Exception as e:  # no network, no such weights, or weights that do not fit: timm and torch differ
        common.die(f"{path}: {'its weights cannot be read safely' if 'weights_only' in str(e) else one_line(e)}")

    if not common.finite(model.state_dict()):
        common.die(f"{path}: its weights hold NaN or infinity")
    return Timm(model).eval().requires_grad_(False)


def read_weights(path, file, content):
    """The bytes of a .safetensors, or of what torch.save writes -> (what our own backbone.safetensors states about
    itself, state dict). Damaged files are refused, and files that only unsafe readers would read."""
    # Files of torch.save may nest the weights. Those of a moving average are preferred.
    try:
        if not file.endswith(".safetensors"):
            held = common.read_tensors(path, content)
            held = next((held[k] for k in ("state_dict_ema", "model_ema", "state_dict", "model") if held.get(k)), held)
            return {}, timm.models.clean_state_dict(held)

        # A .safetensors of ours states its architecture, normalisation and image size in the header.
        content = content.getvalue()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        notes = {k: json.loads(v) for k, v in header.items() if k in ("timm", "mean", "std", "img_size")}
        return notes, safetensors.torch.load(content)
    except Exception:  # a dozen different types
        common.die(f"{path}: {file} is damaged, or neither .safetensors nor a state dict as torch.save writes it today")


@functools.lru_cache(maxsize=2)
def load_splits(name, root, device, *how):
    """Train and test images, on the device where they are held in memory; checkpoints of one call mostly share
    theirs. how: what common.load_data takes after the split."""
    try:
        train, test = (common.load_data(name, root, split, *how) for split in ("train", "test"))
    except OSError as e:
        common.die(f"--data-dir {root}: {e.strerror or e}")
    if test is None:
        common.die(f"--data-dir {root}: has no test split; probes need train/ and val/ or test/{note_of(train)}")

    # Test images that are training images would flatter every probe.
    if common.rank() == 0 and (same := same_files(train, test)):
        say(f"--data-dir {root}: {len(same)} of {len(test):,} test images are training images too, such as {same[0]}")
    return train.to(device), test.to(device)


def note_of(*sets):
    """Why a set has no labels or no test split, where its reader noted a reason."""
    return "".join(f" ({data.note})" for data in sets if data.note)


def same_files(train, test, most=1000):
    """Test files, of `most` evenly spaced ones, that equal the training file of the same name and name of folder."""
    if train.paths is None or test.paths is None:
        return []
    name = lambda path: os.sep.join(str(path).rsplit(os.sep, 2)[-2:])
    test_files = {name(test.paths[i]): test.paths[i] for i in common.evenly(len(test), most).tolist()}

    # Names narrow the search, so that only few files are compared byte by byte.
    same = []
    with contextlib.suppress(OSError):  # an unreadable file is reported when it is needed
        for path in train.paths:
            other = test_files.get(name(path))
            if other and filecmp.cmp(path, other, shallow=False):
                same.append(other)
    return same


def open_case(path, encoder, state, args, device):
    """A loaded checkpoint, or timm model, and its data, checked for what the tasks need -> Case."""
    # The data are those of the checkpoint, unless a flag names others. Its directory goes with its own set alone.
    own = state["args"]
    name = args.data or own["data"]
    root = own["data_dir"] if args.data_dir is None and name == own["data"] else args.data_dir
    if args.data_dir is None and name.startswith("blocks"):
        root = None  # older runs kept a directory that rendered sets do not read

    # Only some encoders split their representation.
    if "all" not in args.part and encoder.inv is None:
        splits = "only encoders of recon_xattn.py and clever.py do (beside all, others may stand in the table)"
        common.die(f"--part {' '.join(args.part)}: {path} does not split its representation; {splits}")

    # Another data set is read with the sessions of the checkpoint; its own without the images that training left out.
    sessions = tuple(own.get("sessions", (1, 2)))
    skip_corrupt = args.skip_corrupt or name == own["data"] and own.get("skip_corrupt", False)
    train, test = load_splits(name, root, device, encoder.img_size, skip_corrupt, args.workers, sessions)

    # Most tasks need the same classes in both splits.
    labelled = set(args.tasks) - {"r2", "layers", "equivariance"}
    if labelled and (train.labels is None or test.labels is None):
        without = f"only r2, layers and equivariance can do without{note_of(train, test)}"
        tasks = " ".join(args.tasks)
        common.die(f"--tasks {tasks}: {root} has no classes (one folder per class); {without}")
    if labelled and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        counts = f"{len(train.classes)} and {len(test.classes)}; {odd} is in one of them only"
        common.die(f"--data-dir {root}: its train and test folders have different classes ({counts})")

    # The data must be those that the encoder was trained on, unless others are named.
    if state["seen"] and not args.data and not args.data_dir and state["seen"] != (now := train.fingerprint()):
        changed = f"{root or name} holds now ({common.difference(state['seen'], now)})"
        common.die(f"{path}: was trained on other images than {changed}; --data-dir, given by hand, probes on others")

    # Encoders that know a part of the labels are probed with the same part.
    if args.known_fraction < 1:
        if train.labels is None:
            common.die(f"--known-fraction {args.known_fraction}: a share of every class, but {root} has no classes")
        train = common.known_part(train, args.known_fraction, own["seed"])

    # Flags of single tasks must fit the data and the encoder.
    if "rotation" not in train.factors and set(args.r2_targets or ()) & set(POSES):
        others = ", ".join(common.FAMILIES)
        common.die(f"--r2-targets {' '.join(args.r2_targets)}: {name} has no poses; choose among {others}")
    if args.layers and max(args.layers) > encoder.depth:
        common.die(f"--layers {' '.join(map(str, args.layers))}: {path} has {encoder.depth}")
    tuned = "finetune" in args.tasks or "fewshot" in args.tasks and args.fewshot == "finetune"
    if tuned and common.world_size() > 1 and isinstance(encoder, Timm):
        common.die(f"{path}: models of timm are fine-tuned on one process only; leave torchrun out")
    return Case(encoder.to(device), state | dict(data=name, data_dir=root), train, test, args, device)


def begin(path, args_for, device, evaluation):
    """Open one checkpoint -> Case; None on all ranks if it fails on one. args_for(state of the checkpoint) -> Args."""
    loaded = evaluation.attempt(path, partial(load, path), together=True)

    def opened(encoder, state):
        complaint = lambda a, rank, b: f"{path}: rank {rank} holds another file than rank 0; copy it to all machines"
        common.same_on_all_ranks(state["sha256"], complaint)
        return open_case(path, encoder, state, args_for(state), device)

    return loaded and evaluation.attempt(path, partial(opened, *loaded), together=True)


def open_all(args, args_for, device, evaluation):
    """Open every checkpoint before anything is computed -> [(path, row name, Case)] of those that can be opened. One
    that cannot costs a line and, at the end, the exit code."""
    cases = [(path, begin(path, args_for, device, evaluation)) for path in args.checkpoints]
    cases = [(path, case) for path, case in cases if case is not None]

    # A part of the representation must exist in one encoder at least.
    if cases and set(args.part) != {"all"} and all(case.backbone.inv is None for _, case in cases):
        splits = "only encoders of recon_xattn.py and clever.py do"
        common.die(f"--part {' '.join(args.part)}: none of the checkpoints splits its representation; {splits}")

    names = row_names([path for path, _ in cases], [case.state for _, case in cases])
    return [(path, name, case) for (path, case), name in zip(cases, names)]


# ----------------------------------------------------------------------------------------------------------------------
# Features: one encoder on one data set
# ----------------------------------------------------------------------------------------------------------------------


class SecondView:
    """An op that makes the second views of a set: uint8 images, centre-cropped, then transformed by one of the
    families, by quarter turns, by mirroring, or by free rotations."""

    def __init__(self, name, size):
        self.name, self.size = name, size

        # All transformations begin with the centre crop that the encoder is evaluated on.
        self.centre = common.CenterCrop(size, interpolation="bicubic")
        turns = {f"turn{degrees}": common.Affine(degrees, interpolation="nearest") for degrees in (90, 180)}
        ops = turns | dict(quarters=common.Rot90(), mirror=common.HorizontalFlip())
        self.op = ops[name] if name in ops else common.family(name, size)

    def sample(self, n, seed):
        """Parameters of n images, drawn from the seed."""
        params = self.op.sample(n, common.rng(seed, "r2", self.name))
        if self.name == "crop":
            self.op.place(params, torch.full((n, 2), self.size))
        return params

    def __call__(self, images, params):
        x = self.centre(images)  # uint8 (n, 3, S, S)
        if self.name == "crop":
            return self.op(x, params)
        return (self.op(x.float() / 255, params) * 255).round().clamp(0, 255).to(torch.uint8)


class RandomView:
    """An op: a random crop and flip of each image, the usual augmentation of linear probes."""

    def __init__(self, size):
        self.size, self.view = size, common.Compose([common.RandomResizedCrop(size), common.HorizontalFlip()])

    def __call__(self, images, params):
        return (self.view(images, params) * 255).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass
class Case:
    """One encoder on one data set: what every task sees. Features are extracted when a task first asks, and kept.

    All ranks encode, each its share; rank 0 alone holds the features and trains probes on them. In every task the code
    after `if common.rank()` runs on rank 0 alone, and nothing there waits for the others.
    """

    backbone: nn.Module
    state: dict  # of the checkpoint, without its tensors
    train: common.ImageSet
    test: common.ImageSet
    args: Args
    device: torch.device
    seconds: dict = dataclasses.field(default_factory=dict)  # {task: its duration}

    @functools.cached_property
    def readers(self):
        """Of train and test images: their workers serve all tasks."""
        return tuple(common.Reader(data, self.args.workers) for data in (self.train, self.test))

    def features(self, data, **how):
        """`common.features` of the train or test images: (n, D), on rank 0."""
        return common.features(self.backbone, self.readers[data is self.test], self.device, amp=self.args.amp, **how)

    @functools.cached_property
    def x(self):
        """What linear probes see, of train and test images: (N, W), (M, W)."""
        start = time.monotonic()
        out = tuple(self.kept_features(data).to(self.device) for data in (self.train, self.test))
        self.seconds["features"] = time.monotonic() - start
        return out

    @property
    def y(self):
        """The representation alone: (N, D), (M, D)."""
        return tuple(x[:, -self.backbone.dim :] for x in self.x)

    def kept_features(self, data):
        """The features in --cache-dir, if rank 0 finds them there; otherwise they are extracted and kept."""
        # Only rank 0 reads the cache. The others hold no features, but need their width.
        path = x = None
        if self.args.cache_dir and common.rank() == 0:
            path = Path(self.args.cache_dir) / f"features-{self.fingerprint(data)}.pt"
            with contextlib.suppress(Exception):  # not there, or damaged: extracted anew
                kept = common.read_tensors(path)["x"]
                x = kept if len(kept) == len(data) else None
        width = common.by_rank_0(lambda: None if x is None else x.shape[1])
        if width is not None:
            return torch.empty(0, width) if x is None else x

        # The name is unique until the file is whole, because another evaluation may write the same features.
        x = self.features(data, encode=self.backbone.last_blocks)
        if path:
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            try:
                with open(part, "wb") as f:
                    torch.save(dict(x=x), f)
                os.replace(part, path)
            except (OSError, RuntimeError) as e:  # a full disk is either
                say(f"--cache-dir {self.args.cache_dir}: features are not kept ({one_line(e)})")
            finally:
                part.unlink(missing_ok=True)
        return x

    def fingerprint(self, data):
        """Of all that features depend on: code, weights, architecture, images, arithmetic."""
        # Features change with the code of the encoder, and with the images: files by size and time, arrays by content.
        digest, encoder = hashlib.blake2b(digest_size=12), self.backbone
        for file in sorted({common.__file__, inspect.getsourcefile(type(encoder))}):
            digest.update(Path(file).read_bytes())
        for path in data.paths if data.images is None else ():
            stat = os.stat(path)
            key = os.path.abspath(path), stat.st_size, stat.st_mtime_ns
            digest.update(repr(key).encode(errors="surrogateescape"))
        if data.images is not None:
            digest.update(data.images.cpu().numpy())

        # The 2 is the version of these keys.
        versions = torch.__version__, torchvision.__version__, timm.__version__
        weights = self.state.get("sha256"), self.state.get("backbone")
        key = 2, *weights, encoder.mean, encoder.std, encoder.img_size, self.args.amp, self.device.type, *versions
        digest.update(repr(key).encode())
        return digest.hexdigest()

    def augmented(self, epoch):
        """Features of random crops and flips of the train images (N, W), drawn anew each epoch."""
        op = RandomView(self.backbone.img_size)
        draws = op.view.sample(len(self.train), common.rng(self.args.seed, "augmented", epoch))
        how = dict(encode=self.backbone.last_blocks, view=op, params=draws, name="augmented")
        return self.features(self.train, **how).to(self.device)

    @property
    def feature(self):
        """What x is, for the protocol."""
        width, dim = self.x[0].shape[1], self.backbone.dim
        return self.backbone.feature if width == dim else f"[CLS] of the last {width // dim} blocks"

    def parts(self, width):
        """The --part of features of some width: [(what to add to the names of its results, its columns)]. The
        equivariant part are the last dimensions, of the last block alone; encoders that do not split have none."""
        columns = dict(all=slice(None))
        if self.backbone.inv is not None:
            split = width - (self.backbone.dim - self.backbone.inv)
            columns |= dict(inv=slice(split), equi=slice(split, None))
        return [("" if part == "all" else f" ({part})", columns[part]) for part in self.args.part if part in columns]

    def few(self, share, allowed=None):
        """The rows of a share of each class: (n,)."""
        return stratified(self.train.labels, share, common.rng(self.args.seed, "fewshot", share), allowed)

    @property
    def chooses(self):
        """Whether held-out images choose a setting of linear probes: the weight of L-BFGS, or one of SGD's rates."""
        return self.args.linear == "lbfgs" or self.args.linear == "sgd" and len(self.args.linear_lrs) > 1

    @functools.cached_property
    def heads(self):
        """All linear probes that the tasks ask for, {name: probe}, trained side by side on one pass over the features
        an epoch: by rank 0, for all."""
        args, labels = self.args, self.train.labels.to(self.device)
        held = torch.zeros(len(self.train), dtype=torch.bool)
        if self.chooses:
            held = hold_out(self.train, common.rng(args.seed, "held out"))

        # Each probe learns from its own rows, never from the held-out ones.
        wanted = {}
        if {"linear", "rotation"} & set(args.tasks):
            wanted["linear"] = (~held).nonzero()[:, 0]
        if "fewshot" in args.tasks and args.fewshot == "linear":
            wanted |= {f"fewshot {share:.0%}": self.few(share, ~held) for share in SHARES}

        # Each probe and each part of the representation needs a head. SGD trains all of them together.
        heads = {}
        for name, rows in wanted.items():
            for suffix, columns in self.parts(self.x[0].shape[1]):
                x = self.x[0][:, columns]
                head = self.new_head(name, x.shape[1], rows, held.nonzero()[:, 0], labels)
                if args.linear != "sgd" and common.rank() == 0:
                    head.train(x, labels)
                heads[name + suffix], head.columns = head, columns
        if args.linear == "sgd":
            self.train_together(heads, labels)

        # Rank 0 sends the trained heads to all ranks.
        for head in heads.values() if common.world_size() > 1 else ():
            for name in head.learnt:
                common.dist.broadcast(getattr(head, name), 0)
        return heads

    def new_head(self, name, dim, rows, held, labels):
        """The linear probe `name` of --linear, not yet trained, for features of `dim` numbers."""
        args, classes, generator = self.args, len(self.train.classes), common.rng(self.args.seed, name)
        if args.linear == "steps":
            return StepsProbe(dim, rows, labels, generator)
        if args.linear == "lbfgs":
            return RidgeProbe(dim, classes, rows, held, self.device, refit=name == "linear")
        return LinearProbe(dim, classes, rows, held, args.linear_lrs, args.linear_epochs, generator, self.device)

    def train_together(self, heads, labels):
        """LinearProbes {name: probe}, on the labels (N,) of the train images."""
        args = self.args
        if args.augment:
            views = args.linear_epochs * len(self.train)
            say(f"  {args.linear_epochs} epochs of augmented views: {views:,} images to encode")

        # Rank 0 alone trains; the others help to encode. All heads see the features of an epoch in one pass.
        trained = heads.values() if common.rank() == 0 else ()
        for epoch in common.progress(range(args.linear_epochs), desc="linear probes", unit="epoch"):
            x = self.augmented(epoch) if args.augment else self.x[0]
            for head in trained:
                head.epoch(x[:, head.columns], labels)
        for head in trained:
            head.choose(self.x[0][:, head.columns], labels)

    def fit_probes(self):
        """Train the linear probes, where that has not happened -> how, and their training accuracy, for the protocol;
        flags are recorded too."""
        heads, kind = self.heads, self.args.linear
        how = dict(optimizer=kind, feature=self.feature, held_out=0.1 if self.chooses else 0.0)
        how |= dict(chosen={name: head.chosen for name, head in heads.items()})
        if common.rank() == 0:  # which holds the features
            x, labels = self.x[0], self.train.labels
            how |= dict(train={n: training_accuracy(head, x[:, head.columns], labels) for n, head in heads.items()})
        return how if kind == "lbfgs" else how | dict(batch_size=256)

    def read(self, name, x):
        """Scores of the linear probe `name` on features x (M, W), for each part: {name: (M, C)}."""
        found = {}
        for suffix, columns in self.parts(x.shape[1]):
            found[name + suffix] = self.heads[name + suffix].scores(x[:, columns])
        return found

    @functools.cached_property
    def fine_tuned(self):
        """The encoder fine-tuned on all train images: x -> class scores."""
        return fine_tune(self)

    def tuning(self):
        """How encoders are fine-tuned, for the protocol."""
        how = dict(epochs=self.args.finetune_epochs, batch_size=256, lr=self.args.finetune_lr, weight_decay=1e-4)
        return how | dict(crop_scale=(0.08, 1.0), feature=self.feature)


# ----------------------------------------------------------------------------------------------------------------------
# Probes that classify
# ----------------------------------------------------------------------------------------------------------------------


def hold_out(data, generator, share=0.1):
    """(N,) bool: a share of the images, or of the objects where there are several images of one, on which settings
    are chosen. Every class keeps an object to learn from; where none can be spared, images are held out."""
    images = torch.arange(len(data))
    for groups in (images if data.groups is None else data.groups, images):
        objects = groups.unique()
        order = torch.randperm(len(objects), generator=generator)
        drawn = torch.isin(groups, objects[order[: max(1, int(share * len(objects)))]])

        # A class of which all objects were drawn gets one back.
        held = drawn.clone()
        for c in data.labels.unique() if data.labels is not None else ():
            of_class = data.labels == c
            if held[of_class].all():
                held &= groups != groups[of_class][0]
        if held.any():
            return held
    return drawn  # no class has two images


def stratified(labels, share, generator, allowed=None):
    """Rows of a share of every class, one at least, at random among those `allowed` (N,), or all: (n,)."""
    rows = []
    for c in labels.unique():
        members = labels == c
        there = torch.nonzero(members if allowed is None else members & allowed)[:, 0]
        order = torch.randperm(len(there), generator=generator)
        rows.append(there[order[: max(1, round(share * int(members.sum())))]])
    return torch.cat(rows)


def accuracies(name, scores, labels):
    """Scores (M, C), labels (M,) -> {metric: percent}: images whose class is the first, or among the first five. If
    classes are of unequal size, also the mean of the classes' accuracies, as is usual on pets, aircraft, flowers."""
    # Of classes with equal scores the first one counts, on every device alike.
    labels = labels.to(scores.device)
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :5] == labels[:, None]  # (M, 5)
    out = {name: 100 * top[:, 0].float().mean().item()}
    if scores.shape[1] > 5:
        out[f"{name} top-5"] = 100 * top.any(1).float().mean().item()

    # The accuracy over images favours large classes, where classes are of unequal size.
    sizes = labels.bincount(minlength=scores.shape[1])  # (C,)
    if len(sizes[sizes > 0].unique()) > 1:
        right = labels[top[:, 0]].bincount(minlength=len(sizes))  # (C,)
        out[f"{name} class mean"] = 100 * (right / sizes)[sizes > 0].mean().item()
    return out


class LinearProbe:
    """One softmax regression per learning rate, all trained at once: W (D, L C) makes the logits of L probes in one
    matmul, and the learning rate is a vector. SGD with momentum 0.9, no weight decay, half a cosine to 0; weights
    start as N(0, 0.01), biases 0; the gradient of the mean cross-entropy over a batch is (softmax - onehot) / batch.
    It learns from `rows`, and `choose` finds the rate that is best on the rows `held`."""

    learnt = ("W", "b", "best")  # by rank 0, which sends them to all ranks

    def __init__(self, dim, classes, rows, held, lrs, epochs, generator, device, batch_size=256):
        self.rows, self.held, self.lrs, self.classes = rows, held, lrs, classes
        self.generator, self.batch_size, self.device = generator, batch_size, device

        # All learning rates start at the same weights, and each column of W has the rate of its probe.
        W = torch.randn(dim, classes, generator=generator).mul_(0.01)
        self.W = W.to(device).repeat(1, len(lrs))  # (D, L C)
        self.b = torch.zeros(len(lrs) * classes, device=device)
        self.mW, self.mb = torch.zeros_like(self.W), torch.zeros_like(self.b)
        self.rate = torch.tensor(lrs, device=device).repeat_interleave(classes) * batch_size / 256  # (L C,)
        self.steps, self.step = epochs * math.ceil(len(rows) / batch_size), 0
        self.best = torch.zeros((), dtype=torch.int64, device=device)  # of the rates

    def epoch(self, x, labels):
        """One pass over its rows of x (N, D), labels (N,). A GPU gets the order once, so the host never waits."""
        # The order of the images is drawn on the CPU, so that it does not depend on the device.
        order = self.rows[torch.randperm(len(self.rows), generator=self.generator)]
        for batch in common.send(order, self.device).split(self.batch_size):
            # The gradient is written out for all rates at once. High rates make it so small that CPUs take six times as
            # long; such numbers become 0.
            f, n = x[batch], len(batch)  # (n, D)
            g = self.logits(f).softmax(2)  # (n, L, C)
            g[torch.arange(n, device=self.device), :, labels[batch]] -= 1
            g = F.hardshrink(g.flatten(1), 1e-20) / n  # (n, L C)
            self.mW.mul_(0.9).addmm_(f.T, g)
            self.mb.mul_(0.9).add_(g.sum(0))

            # The step uses the momentum and a cosine schedule, without weight decay.
            lr = -self.rate * common.cosine(self.step / self.steps, 1.0, 0.0)
            self.W.addcmul_(lr, self.mW)
            self.b.addcmul_(lr, self.mb)
            self.step += 1

    def logits(self, x):  # (n, D) -> (n, L, C)
        return torch.addmm(self.b, x, self.W).view(len(x), len(self.lrs), self.classes)

    def choose(self, x, labels):
        """The rate that is best on the held-out rows of x (N, D), labels (N,); of equal ones the lowest. A single one
        is taken."""
        held = self.held.to(self.device)
        if len(self.lrs) > 1:
            self.best = (self.logits(x[held]).argmax(2) == labels[held][:, None]).float().mean(0).argmax()
        return self.chosen

    @property
    def chosen(self):
        return self.lrs[int(self.best)]

    def scores(self, x):  # (M, D) -> (M, C)
        return self.logits(x).index_select(1, self.best[None])[:, 0]  # [:, best] would wait for a GPU


def training_accuracy(head, x, labels):
    """Percent of the images that a linear probe learned from which it gets right, as centre crops. x (N, D), labels
    (N,): of all images. They come in pieces, as the scores of all may be too large."""
    rows, labels = head.rows.to(x.device), labels.to(x.device)
    right = [(head.scores(x[some]).argmax(1).to(x.device) == labels[some]).sum() for some in rows.split(8192)]
    return 100 * sum(right).item() / len(rows)


def linear_probe(train, labels, test, classes, lrs, epochs, generator, batch_size=256):
    """A LinearProbe from first to last on fixed features (N, D), labels (N,), a tenth of which chooses among several
    rates -> (test scores (M, C), its learning rate, its training accuracy in percent)."""
    tenth = max(1, len(train) // 10) if len(lrs) > 1 else 0
    held, rows = torch.randperm(len(train), generator=generator).split([tenth, len(train) - tenth])
    head = LinearProbe(train.shape[1], classes, rows, held, lrs, epochs, generator, train.device, batch_size)
    for _ in common.progress(range(epochs), desc="linear probe", unit="epoch"):
        head.epoch(train, labels)
    rate = head.choose(train, labels)
    return head.scores(test), rate, training_accuracy(head, train, labels)


class RidgeProbe:
    """Softmax regression by L-BFGS on fixed features: sum of cross-entropies + w |(W, b)|^2, in float64 (on the CPU
    where the device has none). 45 weights w between 1e-6 and 1e5 are tried from the strongest down, each from the
    solution of the last. The w that is best on the rows `held` is chosen, and with `refit` these then train too."""

    learnt = ("weights",)

    def __init__(self, dim, classes, rows, held, device, refit=True, iterations=1000):
        self.refit = refit
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.rows, self.held, self.iterations = rows.to(self.device), held.to(self.device), iterations
        self.weights = torch.zeros(dim + 1, classes, dtype=torch.float64, device=self.device)  # the last row is b
        self.chosen = None

    def fit(self, x, labels, rows, ridge):
        """Minimise on `rows` (n,) of x (N, D), labels (N,), for one weight w, starting at the present weights."""
        # A constant feature of 1 gives the bias.
        f, y = F.pad(x[rows], (0, 1), value=1.0), labels[rows]
        W = self.weights.clone().requires_grad_()
        limits = dict(max_iter=self.iterations, max_eval=2 * self.iterations, tolerance_change=1e-10)
        optimizer = torch.optim.LBFGS([W], line_search_fn="strong_wolfe", **limits)

        # L-BFGS evaluates loss and gradient several times a step.
        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(f @ W, y, reduction="sum") + ridge * W.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = W.detach()

    def train(self, x, labels):
        """x (N, D), labels (N,) -> the chosen w."""
        # Each fit starts at the solution of the previous one, and the best on the held-out rows is kept.
        x, labels = x.to(self.device, torch.float64), labels.to(self.device)
        best, kept = -1.0, None
        for ridge in common.progress(torch.logspace(5, -6, 45).tolist(), desc="L-BFGS", unit="fit"):
            self.fit(x, labels, self.rows, ridge)
            right = (self.scores(x[self.held]).argmax(1) == labels[self.held]).double().mean().item()
            if right > best:
                best, kept = right, (ridge, self.weights)

        # The chosen weight is fitted again, on the held-out rows too. Few labels stay few.
        self.chosen, self.weights = kept
        if self.refit:
            self.fit(x, labels, torch.cat([self.rows, self.held]), self.chosen)
        return self.chosen

    def scores(self, x):  # (M, D) -> (M, C)
        return F.pad(x.to(self.device, torch.float64), (0, 1), value=1.0) @ self.weights


def fit(model, sample, epochs, optimizer, generator, scheduler=None, batch_size=256, desc="MLP"):
    """Train a model on what sample(epoch) gives, features (N, D) and targets: (N,) int64 classes, cross-entropy, or
    (N, K) numbers, squared error. Returns it, frozen."""
    for epoch in common.progress(range(epochs), desc=desc, unit="epoch"):
        x, target = sample(epoch)
        criterion = F.cross_entropy if target.dtype == torch.int64 else F.mse_loss

        # The order is sent once an epoch, so that the host never waits for a GPU.
        order = common.send(torch.randperm(len(x), generator=generator), x.device)
        for batch in order.split(batch_size):
            loss = criterion(model(x[batch]), target[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
    return model.requires_grad_(False)


def linear_schedule(train, target, generator, epochs=100):
    """CIPER's linear readout. Features (N, D); target (N,) int64 classes, cross-entropy, or (N, K) numbers, squared
    error -> a layer: (M, D) -> scores or predictions (M, K)."""
    outputs = int(target.max()) + 1 if target.dtype == torch.int64 else target.shape[1]

    # The generator seeds the initial weights, and the global state of torch stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        readout = nn.Linear(train.shape[1], outputs).to(train.device)
    optimizer = torch.optim.SGD(readout.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.3)
    sample = lambda epoch: (train, target)
    return fit(readout, sample, epochs, optimizer, generator, scheduler, desc="linear readout")


class StepsProbe:
    """`linear_schedule` of classes, on its rows of features (N, D) with labels (N,)."""

    learnt, chosen = ("W", "b"), 1.0

    def __init__(self, dim, rows, labels, generator):
        self.rows, self.generator, classes = rows.to(labels.device), generator, int(labels.max()) + 1
        self.W, self.b = torch.zeros(classes, dim, device=labels.device), torch.zeros(classes, device=labels.device)

    def train(self, x, labels):
        layer = linear_schedule(x[self.rows], labels[self.rows], self.generator)
        self.W, self.b = layer.weight, layer.bias

    def scores(self, x):  # (M, D) -> (M, C)
        return F.linear(x, self.W, self.b)


def least_squares(train, target, test):
    """The least-squares readout in closed form: features (N, D), (M, D); target (N, K), or (N,) int64 as one-hot ->
    predictions (M, K), in float64 on the CPU."""
    target = F.one_hot(target) if target.dtype == torch.int64 else target
    with_bias = lambda x: F.pad(x.cpu().double(), (0, 1), value=1.0)
    return with_bias(test) @ torch.linalg.lstsq(with_bias(train), target.cpu().double(), driver="gelsd").solution


class Standardise(nn.Module):
    """Some `columns` of features (N, ..., D) less their mean, over their standard deviation, flattened: the first
    layer of an MLP.

    Mean and deviation of each dimension are those of `x`, the training features (of pairs (N, 2, D): of both views
    together). An MLP can represent the same functions without them, but Adam does not find them: trained encoders add
    a common offset, and only a few percent of the variance lie between two views. Constant dimensions become 0."""

    def __init__(self, x, columns):
        super().__init__()
        std, mean = torch.std_mean(x[..., columns].flatten(0, -2), 0, correction=0)  # (D,)
        self.columns, self.mean = columns, mean
        self.std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # less is rounding

    def forward(self, x):
        return ((x[..., self.columns] - self.mean) / self.std).flatten(1)


def mlp_probe(sample, outputs, epochs, generator, columns=slice(None)):
    """A 3-layer MLP D-1024-1024-K, ReLU, Adam at a constant rate of 1e-3, batches of 256 [SIE], on `columns` of
    standardised features. sample(epoch) -> (features (N, D) or pairs of them (N, 2, D), targets: (N, K) numbers or
    (N,) int64 classes), the same or others each epoch -> the trained MLP: features (M, ...) -> (M, K)."""
    x = sample(0)[0]
    first = Standardise(x, columns)

    # The generator seeds the initial weights, and the global state of torch stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        hidden = nn.Linear(first(x[:1]).shape[1], 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()
        model = nn.Sequential(first, *hidden, nn.Linear(1024, outputs)).to(x.device)
    fit(model, sample, epochs, torch.optim.Adam(model.parameters(), lr=1e-3), generator)
    return lambda x: torch.cat([model(rows) for rows in x.split(8192)])


def warn_of_few_steps(flag, epochs, images):
    """One line if an MLP takes so few steps that its score may measure the optimiser and not the features."""
    steps = epochs * math.ceil(images / 256)
    if steps < 600:
        say(f"{flag} {epochs}: {steps} steps of the MLP may be too few to converge; 600 or more are safe")


def knn(case):
    """Accuracy of the vote of the nearest neighbours, in percent."""
    # All ranks encode the images; rank 0 finds the neighbours.
    args, classes = case.args, len(case.train.classes)
    y, y_test = case.y
    if common.rank():
        return None

    # The neighbours are found in each part of the representation apart.
    results = {}
    for suffix, columns in case.parts(y.shape[1]):
        scores = common.knn(y[:, columns], case.train.labels, y_test[:, columns], args.knn_k, classes=classes)
        results |= accuracies(f"knn{suffix}", scores, case.test.labels)
    return results, dict(k=args.knn_k, temperature=0.07)


def linear(case):
    """Accuracy of the linear probe on test images, in percent."""
    protocol = case.fit_probes()
    if common.rank():
        return None
    results = {}
    for name, scores in case.read("linear", case.x[1]).items():
        results |= accuracies(name, scores, case.test.labels)
    return results, protocol


def mlp(case):
    """Accuracy of an MLP on the classes, in percent, on test images; in the protocol also on its training images."""
    args, labels, classes = case.args, case.train.labels.to(case.device), len(case.train.classes)
    x, x_test = case.x
    if common.rank():
        return None
    warn_of_few_steps("--mlp-epochs", args.mlp_epochs, len(x))

    # Each part of the representation has an MLP, which is evaluated on both splits.
    results, on_train = {}, {}
    for suffix, columns in case.parts(x.shape[1]):
        sample = lambda epoch: (x, labels)
        model = mlp_probe(sample, classes, args.mlp_epochs, common.rng(args.seed, "mlp"), columns)
        results |= accuracies(f"mlp{suffix}", model(x_test), case.test.labels)
        on_train |= accuracies(f"mlp{suffix}", model(x), case.train.labels)
    return results, dict(epochs=args.mlp_epochs, feature=case.feature, train=on_train) | MLP


def fewshot(case):
    """Accuracy of linear probes, or of fine-tuned encoders, that see a share of the labels, in percent."""
    # All ranks fine-tune the encoders; rank 0 trains the linear probes.
    rows = {f"fewshot {share:.0%}": case.few(share) for share in SHARES}
    scores = {}
    if case.args.fewshot == "finetune":
        details = case.tuning()
        for name, chosen in rows.items():
            scores[name] = case.features(case.test, encode=fine_tune(case, rows=chosen), name=name)
    else:
        details = case.fit_probes()
        for name in rows:
            scores |= case.read(name, case.x[1])
    if common.rank():
        return None

    results = {}
    for name, values in scores.items():
        results |= accuracies(name, values, case.test.labels)
    return results, dict(details, images={name: len(chosen) for name, chosen in rows.items()})


def draw_view(view, n, generator):
    """One view of every image of a batch, for the loader."""
    return {"1": (torch.arange(n), view.sample(n, generator))}


class Classifier(nn.Module):
    """A linear layer on what linear probes see: x -> scores."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        x = common.upcast(self.encoder.last_blocks(x))
        with common.full_precision():  # scores in bfloat16 would tie
            return self.head(x)


def fine_tune(case, quarters=False, rows=None):
    """Train a copy of the encoder with a linear layer on what linear probes see -> x -> scores.

    It classifies all train images, or some `rows`; with `quarters` it classifies their quarter turns. SGD with momentum
    0.9, weight decay 1e-4, cosine to 0, one rate for encoder and layer, random crops and flips [CLeVER]."""
    args, device = case.args, case.device
    train = case.train if rows is None else case.train.subset(rows)
    batch = min(256, len(train)) // common.world_size() * common.world_size()
    if batch < 2:
        common.die(f"--tasks finetune: {len(train)} images are too few for {common.world_size()} processes")

    # The head starts at small weights, drawn without touching the global state of torch.
    with torch.no_grad():
        width = case.backbone.last_blocks(blank(case)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.rng(args.seed, "finetune").initial_seed())
        encoder = copy.deepcopy(case.backbone).requires_grad_(True).train()
        head = nn.Linear(width, 4 if quarters else len(case.train.classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    # Stochastic depth belongs to pre-training; fine-tuning does without it.
    model = common.batchnorm_over_ranks(Classifier(encoder, head), device).to(device)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    encoder, ddp = model.encoder, common.distributed(model)

    # Random crops and flips augment the images. With `quarters` the images are turned, and the turns are the classes.
    ops = [common.RandomResizedCrop(encoder.img_size), common.HorizontalFlip()]
    if quarters:
        ops.append(common.Rot90())
    view = common.Compose([*ops, common.Normalize(encoder.mean, encoder.std)])
    run = SimpleNamespace(seed=args.seed, batch_size=batch, workers=args.workers, epochs=args.finetune_epochs)
    loader = common.Loader(train, {"1": view}, partial(draw_view, view, batch), run, device)
    steps = loader.total_steps

    # Every step has a learning rate on half a cosine.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    batches = common.progress(loader.batches(range(steps)), total=steps, desc="fine-tuning", unit="step")
    for step, (views, params, local_rows) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = common.cosine(step / steps, args.finetune_lr * batch / 256, 0.0)
        with common.autocast(device, args.amp):
            scores = ddp(views["1"])
        labels = params["1"]["rot90"] if quarters else train.labels[local_rows["1"]]
        loss = F.cross_entropy(scores.float(), common.send(labels, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def finetune(case):
    """Accuracy of the fine-tuned encoder on test images, in percent."""
    scores = case.features(case.test, encode=case.fine_tuned, name="fine-tuned")
    how = case.tuning()  # on all ranks, because it may ask for features
    if common.rank():
        return None
    return accuracies("finetune", scores, case.test.labels), how


def rotation(case):
    """CLeVER's Tables 6 and 7, in percent: accuracy of the linear probe on test images turned by up to 90 and by up to
    180 degrees (mean of three draws), and of one that classifies quarter turns (`4-fold`: trained on one of each image,
    evaluated on all four). Beside `finetune` also of encoders fine-tuned for either."""
    # Each test image is turned by angles of three draws, and by every quarter turn.
    args, size = case.args, case.backbone.img_size
    n, m = len(case.train), len(case.test)
    quarters = SecondView("quarters", size)
    answers = quarters.sample(n, args.seed)
    free = [SecondView("turn90", size), SecondView("turn180", size)]
    turns = [(view, view.sample(m, seed)) for view in free for seed in range(args.seed, args.seed + 3)]
    fourfold = [(quarters, dict(rot90=torch.full((m,), k))) for k in range(4)]

    def encoded(data, views, encode=case.backbone.last_blocks):  # (views n, D)
        out = []
        for view, params in views:
            how = dict(encode=encode, view=view, params=params, name=view.name)
            out.append(case.features(data, **how).to(case.device))
        return torch.cat(out)

    # All ranks encode the turned images, with frozen and with fine-tuned encoders.
    x_turned = encoded(case.test, turns)
    x, x_test = encoded(case.train, [(quarters, answers)]), encoded(case.test, fourfold)
    details = case.fit_probes()
    tuned = None
    if "finetune" in args.tasks:
        tuned = encoded(case.test, turns, case.fine_tuned), encoded(case.test, fourfold, fine_tune(case, quarters=True))
    if common.rank():
        return None

    # Of six draws three are turns by up to 90 degrees, and three by up to 180.
    results = {}

    def note_turned(name, suffix, scores):
        right = (scores.argmax(1).cpu().view(6, m) == case.test.labels).float().mean(1)  # of each draw
        results[f"{name} ±90°{suffix}"] = 100 * right[:3].mean().item()
        results[f"{name} ±180°{suffix}"] = 100 * right[3:].mean().item()

    def fourfold_accuracy(scores):
        return 100 * (scores.argmax(1).cpu() == torch.arange(4).repeat_interleave(m)).float().mean().item()

    # The linear probe of the classes reads the turned images.
    for name, scores in case.read("linear", x_turned).items():
        note_turned("linear", name.removeprefix("linear"), scores)

    # A linear probe of quarter turns learns from each part of the representation.
    rates, on_train, labels = {}, {}, answers["rot90"].to(case.device)
    for suffix, columns in case.parts(x.shape[1]):
        name = "4-fold" + suffix
        how = 4, args.linear_lrs, args.linear_epochs, common.rng(args.seed, "4-fold")
        scores, rates[name], on_train[name] = linear_probe(x[:, columns], labels, x_test[:, columns], *how)
        results[name] = fourfold_accuracy(scores)

    # Fine-tuned encoders are evaluated in the same way.
    if tuned:
        note_turned("finetune", "", tuned[0])
        results["4-fold finetune"] = fourfold_accuracy(tuned[1])
    fourfold = dict(optimizer="sgd", augment=False, chosen=rates, train=on_train)
    return results, dict(details, draws=3, fourfold=fourfold)


def latents(case):
    """`readouts_of_latents` for each part of the representation."""
    results, details = {}, {}
    for suffix, columns in case.parts(case.backbone.dim):
        x, x_test = (y[:, columns] for y in case.y)
        if found := readouts_of_latents(case.train, case.test, x, x_test, case.args):
            results |= {name + suffix: value for name, value in found[0].items()}
            details["all" if suffix == "" else suffix[2:-1]] = found[1]
    return None if common.rank() else (results, details)


def readouts_of_latents(train, test, x, x_test, args):
    """Linear readouts of one image. Sets and their features (N, D), (M, D) -> (results, protocol, which holds the same
    values on the images that the readouts learned from); None beside rank 0."""
    if common.rank():
        return None

    results, on_train, details = {}, {}, {}

    def readouts(name, x, y, x_test):
        """What is read from x_test and from x: {"": by the readout that SGD trains, " lstsq": by the one in closed
        form}."""
        readout, both = linear_schedule(x, y.to(x.device), common.rng(args.seed, name)), torch.cat([x_test, x])
        read = {"": readout(both), " lstsq": least_squares(x, y, both)}
        return {suffix: values.cpu().split([len(x_test), len(x)]) for suffix, values in read.items()}

    def note_accuracy(name, x, y, x_test, y_test):
        percent = lambda scores, labels: 100 * (scores.argmax(1) == labels).float().mean().item()
        for suffix, (scores, recalled) in readouts(name, x, y, x_test).items():
            results[name + suffix], on_train[name + suffix] = percent(scores, y_test), percent(recalled, y)

    # Classes are the kind of object, the object itself (on core50, where both splits show it), and the session.
    note_accuracy("object", x, train.labels, x_test, test.labels)
    if "frame" in test.factors:
        note_accuracy("instance", x, train.groups, x_test, test.groups)
    if "session" in test.factors:
        evaluated = torch.arange(len(test)) % 5 == 0  # (M,) bool
        session = test.factors["session"].unique(return_inverse=True)[1]  # (M,) from 0
        note_accuracy("session", x_test[~evaluated], session[~evaluated], x_test[evaluated], session[evaluated])

    # The view is read as numbers, on test objects alone where their sessions are new.
    if "view" in test.factors:
        known, unseen, f, f_test = train, test, x, x_test
        if "session" in test.factors:
            second = torch.zeros(len(test), dtype=torch.bool)  # the images of every second object of each class
            for c in test.labels.unique():
                second |= torch.isin(test.groups, test.groups[test.labels == c].unique()[1::2])
            known, unseen = test.subset((~second).nonzero()[:, 0]), test.subset(second.nonzero()[:, 0])
            f, f_test = x_test[~second], x_test[second]

        # Targets are divided by their deviations; features by one number, which keeps what is linear in them.
        view = known.factors["view"]  # (n, 3)
        mean, std = view.mean(0), view.std(0, correction=0)
        target, centre = ((view - mean) / std).to(f.device), f.mean(0)
        scale = (f - centre).square().sum(1).mean().sqrt()
        a, b = (f - centre) / scale, (f_test - centre) / scale

        # Errors are given in units of the deviations, and in degrees and lengths.
        for suffix, (predicted, recalled) in readouts("view", a, target, b).items():
            error = predicted * std + mean - unseen.factors["view"]  # (m, 3)
            results["view err" + suffix] = 100 * (error / std).square().mean().item()
            on_train["view err" + suffix] = 100 * (recalled - target.cpu()).square().mean().item()
            rmse = dict(zip(("azimuth", "elevation", "distance"), error.square().mean(0).sqrt().tolist()))
            turned = (error[:, 0] + 180) % 360 - 180
            details["rmse" + suffix] = rmse | dict(azimuth_circular=turned.square().mean().sqrt().item())

    # The protocol says which images each readout is evaluated on.
    protocol = dict(epochs=100, batch_size=256, lr=1.0, train=on_train, session_read="every fifth test image")
    protocol["view_read"] = "every second test object" if "session" in test.factors else "test"
    return results, protocol | details


# ----------------------------------------------------------------------------------------------------------------------
# Probes of equivariance
# ----------------------------------------------------------------------------------------------------------------------


def r2_scores(target, predicted):
    """R^2 of (N, K) targets: "flat", SIE's, against one mean over all N K entries, and "uniform", the mean over the K
    dimensions of each one's own R^2. A constant can score above 0 in the first (0.229 on the quaternions of
    3DIEBench)."""
    target, predicted = target.cpu().double(), predicted.cpu().double()
    error = (target - predicted).square()
    flat = 1 - error.sum() / (target - target.mean()).square().sum().clamp(min=1e-12)
    uniform = (1 - error.sum(0) / (target - target.mean(0)).square().sum(0).clamp(min=1e-12)).mean()
    return dict(flat=flat.item(), uniform=uniform.item())


def partners(groups, generator):
    """For every image another view of the same object, at random: (N,) rows."""
    # The images of an object take consecutive positions, from start to end, in random order.
    order = torch.argsort(torch.rand(len(groups), generator=generator))
    order = order[torch.argsort(groups[order], stable=True)]
    start = torch.searchsorted(groups[order], groups[order])
    end = torch.searchsorted(groups[order], groups[order], right=True)

    # The partner of an image is the next one of the object, and the first one after the last.
    position = torch.arange(len(groups))
    following = torch.where(position + 1 < end, position + 1, start)
    return torch.empty_like(order).scatter_(0, order, order[following])


def pairs_of_poses(target, case):
    """Two views of an object and `target` between them, on rank 0: sample(epoch) of (pairs (n, 2, D), targets (n, K)),
    test pairs, test targets. Each epoch shows as many random pairs, of different views, as there are images, 100,000 at
    most (SIE: one an object); test images give one fixed draw, the same for every checkpoint."""
    # Pairs are drawn among the features of all images, so that nothing is encoded twice.
    y, y_test = case.y
    if common.rank():
        return None

    def sample(data, y, *key):
        # Large sets show 100,000 random pairs an epoch, which bounds its time.
        g = common.rng(case.args.seed, *key)
        i, j = torch.arange(len(data)), partners(data.groups, g)
        if len(data) > 100_000:
            i = torch.randperm(len(data), generator=g)[:100_000]
            j = j[i]
        pairs = y[common.send(torch.stack([i, j], 1), y.device)]  # (n, 2, D)
        return pairs, common.send(common.pose_target(target, data.factors, i, j), y.device)  # (n, K)

    return lambda epoch: sample(case.train, y, "pairs", epoch), *sample(case.test, y_test, "test pairs")


def second_views(case, view):
    """Of the train and the test images: (set, evenly spaced rows (n,) of it, parameters of `view` for all its
    images). Each split has a seed of its own."""
    most, seed = case.args.r2_images, case.args.seed
    for data, n, split_seed in ((case.train, most, seed), (case.test, max(2, most // 2), seed + 1)):
        yield data, common.evenly(len(data), n), view.sample(len(data), split_seed)


def pairs_of_images(target, case):
    """An image and its transformed self, on evenly spaced images, one draw per image; targets are standardised by the
    mean and deviation of the training draws. Returns what `pairs_of_poses` does."""
    view = SecondView(target, case.backbone.img_size)

    # Each image is encoded again after its transformation.
    pairs, targets = [], []
    for y, (data, rows, params) in zip(case.y, second_views(case, view)):
        y2 = case.features(data, view=view, params=params, rows=rows, name=target)  # (n, D)
        if common.rank() == 0:
            pairs.append(torch.stack([y[rows], y2.to(y.device)], 1))  # (n, 2, D)
            targets.append(common.family_target(target, params, view.size)[rows].to(y.device))  # (n, K)
    if common.rank():
        return None

    # Test targets are standardised by the training draws too.
    mean, std = targets[0].mean(0), targets[0].std(0).clamp(min=1e-6)
    train_targets, test_targets = ((t - mean) / std for t in targets)
    return lambda epoch: (pairs[0], train_targets), pairs[1], test_targets


def r2(case):
    """R^2 of the transformation between two views, on test pairs; in the protocol also on training pairs. Near 0 on
    both, the probe has not converged or the features hold nothing; high on training pairs alone, it has overfitted."""
    # Posed objects are probed for their poses, images for the families of transformations.
    args, train = case.args, case.train
    targets = args.r2_targets or (POSES if "rotation" in train.factors else common.FAMILIES)
    most = 100_000 if set(targets) <= set(POSES) else args.r2_images
    warn_of_few_steps("--r2-epochs", args.r2_epochs, min(len(train), most))

    # All ranks encode the pairs of a target; rank 0 fits an MLP for each part.
    scores = {}
    for target in targets:
        drawn = pairs_of_poses(target, case) if target in POSES else pairs_of_images(target, case)
        if common.rank():
            continue
        sample, test_pairs, test_targets = drawn
        pairs, answers = sample(0)
        for suffix, columns in case.parts(case.backbone.dim):
            model = mlp_probe(sample, answers.shape[1], args.r2_epochs, common.rng(args.seed, "r2", target), columns)
            on_train = r2_scores(answers, model(pairs))["flat"]
            found = r2_scores(test_targets, model(test_pairs))
            scores[target + suffix] = found | dict(train=on_train, pairs=len(pairs))

    results = {f"r2 {name}": values["flat"] for name, values in scores.items()}
    return results, dict(epochs=args.r2_epochs, both=scores) | MLP


def layers(case):
    """SER's Table 5, in percent: accuracy of an MLP that classifies the quarter turn, or the flip, between two views,
    from the pair of their mean tokens after a block, each token normalised. One draw for each image."""
    # By default every third block is evaluated, and all blocks of a small encoder.
    args, backbone = case.args, case.backbone
    warn_of_few_steps("--r2-epochs", args.r2_epochs, min(len(case.train), args.r2_images))
    chosen = args.layers
    if chosen is None:
        every = range(1, backbone.depth + 1)
        chosen = tuple(k for k in every if backbone.depth <= 5 or k == 1 or k % 3 == 0)

    def mean_tokens(x):  # one (n, D) a block
        return [F.layer_norm(z.float(), z.shape[-1:]).mean((1, 2)) for z in backbone.tokens(x, chosen)]

    with torch.no_grad():
        widths = [z.shape[1] for z in mean_tokens(blank(case))]

    results, on_train = {}, {}
    for name, kind, key, classes in (("rotation", "quarters", "rot90", 4), ("flip", "mirror", "flip", 2)):
        # The features of both views hold the chosen blocks side by side, for train and test images.
        view, splits = SecondView(kind, backbone.img_size), []
        for data, rows, params in second_views(case, view):
            how = dict(encode=lambda x: torch.cat(mean_tokens(x), 1), params=params, rows=rows)
            both = [case.features(data, view=op, name=f"{name} by layer", **how) for op in (None, view)]
            pairs = torch.stack(both, 1).to(case.device)  # (n, 2, sum of widths)
            splits.append((pairs.split(widths, 2), params[key][rows].long().to(case.device)))
        if common.rank():
            continue

        # Each block has an MLP of its own.
        (train_pairs, answers), (test_pairs, test_answers) = splits
        for k, pairs, unseen in zip(chosen, train_pairs, test_pairs):  # (n, 2, D), (m, 2, D)
            sample = lambda epoch, drawn=(pairs, answers): drawn
            model = mlp_probe(sample, classes, args.r2_epochs, common.rng(args.seed, name, k))
            right = lambda x, y, model=model: 100 * (model(x).argmax(1) == y).float().mean().item()
            results[f"{name} @{k}"] = right(unseen, test_answers)
            on_train[f"{name} @{k}"] = right(pairs, answers)
    return results, dict(layers=chosen, epochs=args.r2_epochs, images=args.r2_images, train=on_train) | MLP


def blank(case):
    """One image of the encoder's size, to learn the shapes of its maps: (1, 3, S, S)."""
    side = case.backbone.img_size
    return torch.zeros(1, 3, side, side, device=case.device)


def map_cosines(name, chunks):
    """[(rho_g f(x), rho_g f(another image), f(g x))], maps (n, h, w, D) of one grid each -> {score: mean cosine}: of
    the first and the third, of the second and the third, and the first again with the mean token subtracted."""

    def mean_cosine(a, b):
        return F.cosine_similarity(a, b, dim=3).mean().item()

    # The mean over chunks weights each chunk by its number of images.
    total, sums = 0, [0.0, 0.0, 0.0]
    for moved, other, seen in chunks:
        centred = mean_cosine(moved - moved.mean((0, 1, 2)), seen - seen.mean((0, 1, 2)))
        for i, score in enumerate((mean_cosine(moved, seen), mean_cosine(other, seen), centred)):
            sums[i] += score * len(moved)
        total += len(moved)
    names = f"equi {name}", f"equi {name} shuffled", f"equi {name} centred"
    return {key: value / total for key, value in zip(names, sums)}


def equivariance(case):
    """SER's score: the cosine of rho_g f(x) and f(g x), tokens after the last block and the final norm, mean over
    tokens, images and g: quarter turns and flips other than the identity, and for ViTs of two or more rows other
    grids (images resized with antialiasing), to which rho_g resamples the map.

    The paper draws g1 and g2 at random. If its g = g2 g1^-1 may be the identity, which scores 1, a score s here is
    (1 + 3 s) / 4 there under turns and (1 + s) / 2 under flips. Two controls are reported: the same score against
    another image's map, and after subtracting the mean token from both maps. They expose a constant map, which would
    otherwise score a perfect 1."""
    args, backbone, n = case.args, case.backbone, len(case.test)
    rows, layer = common.evenly(n, 1000), backbone.depth
    generator, norm = common.rng(args.seed, "equivariance"), getattr(backbone, "norm", nn.Identity())
    with torch.no_grad():
        shape = backbone.tokens(blank(case), layer).shape[1:]  # (h, w, D)

    def maps(transform=None, params=None, resize=None, rows=rows, shape=shape):  # (n, h, w, D)
        encode = lambda x: norm(backbone.tokens(x if resize is None else resize(x), layer)).flatten(1)
        how = dict(encode=encode, view=transform, params=params, rows=rows, name="equivariance")
        return case.features(case.test, **how).unflatten(1, shape)

    # Maps of turned, mirrored and original images are encoded on all ranks.
    quarters = 1 + torch.randint(3, (n,), generator=generator)
    turned = maps(SecondView("quarters", backbone.img_size), dict(rot90=quarters))
    mirrored = maps(SecondView("mirror", backbone.img_size), dict(flip=torch.ones(n, dtype=torch.bool)))
    z = maps()

    # ViTs also encode resized images, of 0.7 to 1.3 times the area of training; chunks of 100 share a grid.
    scaled = []
    if hasattr(backbone, "patch_size") and backbone.grid > 1:
        grid = common.GridResize(backbone.patch_size, backbone.grid)
        for chunk in torch.arange(len(rows)).split(100):
            size = square = (backbone.grid, backbone.grid)
            while size == square:
                params = grid.sample(1, generator)
                size = int(params["grid_h"][0]), int(params["grid_w"][0])
            seen = maps(resize=partial(grid, params=params), rows=rows[chunk], shape=(*size, shape[-1]))
            scaled.append((chunk, size, seen))
    if common.rank():
        return None

    # rho_g permutes tokens exactly under turns and flips, and interpolates them for another grid.
    def turn(z):
        return torch.stack([m.rot90(int(k), (0, 1)) for m, k in zip(z, quarters[rows])])

    def resample(z, size):
        return F.interpolate(z.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)

    # Every image is compared with the next one of a random order. In a fixed distance some sets show the same class.
    order = torch.randperm(len(z), generator=common.rng(args.seed, "another image"))
    others = torch.empty_like(z)
    others[order] = z[order.roll(1)]
    results = map_cosines("rotation", [(turn(z), turn(others), turned)])
    results |= map_cosines("flip", [(z.flip(2), others.flip(2), mirrored)])
    if scaled:
        chunks = [(resample(z[chunk], size), resample(others[chunk], size), seen) for chunk, size, seen in scaled]
        results |= map_cosines("scale", chunks)
    return results, dict(images=len(rows), layer=layer, tokens="after the final norm")


# ----------------------------------------------------------------------------------------------------------------------
# How an evaluation ends: finished results are kept
# ----------------------------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal, its number, has come."""


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def stop(number, frame):
    """End the evaluation at the first signal, and the process at the second."""
    for s in STOPPING:
        if signal.getsignal(s) is stop:
            signal.signal(s, lambda number, frame: os._exit(128 + number))
    raise Stopped(number)


def say(line):
    """A line on stderr, above the progress bars, from rank 0, even before the ranks have met."""
    if common.rank() == 0 and os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def one_line(error, lower=""):
    """An exception in one line: what the machine lacks, and what to lower; or where it was raised. lower: a flag of the
    script that a machine without memory calls for."""
    known = common.one_line(error)
    if known and known.startswith("out of memory"):
        less = f"lower {lower}, " if lower else ""
        if "CUDA" in str(error) or "MPS" in str(error):
            return f"out of memory on the GPU; {less}end what else runs there, or take --device cpu"
        return f"out of memory; {less}take fewer --workers or another --device, or an encoder of smaller images"
    *_, at = traceback.extract_tb(error.__traceback__)
    what = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
    return known or f"{what} ({Path(at.filename).name}, line {at.lineno})"


class Evaluation:
    """A block in which a part that fails costs one line and, at the end, exit code 1 (its own where nothing was
    finished), and in which a signal ends everything in one line, code 128 + its number. `at_end` is called in any
    case: there the table is printed and the figure drawn. lower: a flag to lower where memory runs out."""

    def __init__(self, lower=""):
        self.lower, self.codes, self.printed = lower, [], False
        self.at_end, self.handlers = lambda: None, {}

    def __enter__(self):
        on = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]  # nohup switches one off
        self.handlers = {s: signal.signal(s, stop) for s in on}
        return self

    def __exit__(self, kind, error, trace):
        self.at_end()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

        # A signal ends the process with a code of its own.
        if kind is Stopped:
            name = signal.Signals(error.args[0]).name
            kept = "finished results are in the table and in eval.jsonl beside the checkpoints"
            say(f"{Path(sys.argv[0]).name}: stopped by {name}; {kept}")
            raise SystemExit(128 + error.args[0])

        # The exit code is 1 where some results are printed, else that of the first failure.
        if kind is None and self.codes:
            raise SystemExit(1 if self.printed else self.codes[0])

    def start(self, device):
        """`common.start`. Ranks wait for hours, because rank 0 trains large probes alone."""
        return common.start(device, timedelta(hours=3))

    def attempt(self, what, part, together=False):
        """part(), or None if it fails; together: on all ranks if on one. Otherwise a failure of several ranks ends the
        process, except a user's mistake, which every rank finds for itself."""
        # A user's mistake has printed its line already; any other exception costs one line.
        code, out = 0, None
        try:
            out = part()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except Exception as e:
            code = 1
            tqdm.write(f"{Path(sys.argv[0]).name}: error: {what}: {one_line(e, self.lower)}", file=sys.stderr)

        # Ranks agree on the outcome where they were asked to. Otherwise they would wait for each other for ever.
        if together:
            code = common.any_rank(code)
        elif common.world_size() > 1 and code not in (0, 2):
            raise SystemExit(code)
        if code:
            self.codes.append(code)
        return None if code else out

    def table(self, rows, form):
        """Print the rows that have values."""
        rows = [(name, values) for name, values in rows if values]
        self.printed |= bool(rows)
        if rows and common.rank() == 0:
            print(table(rows, form, sys.stdout.encoding or "utf-8"), flush=True)

    def plot(self, path, panels, title):
        """Draw [Panel] into the file of --plot, where it is given and there is anything to see."""
        panels = [panel for panel in panels if panel.rows]
        if path and panels and common.rank() == 0:
            self.attempt(f"--plot {path}", partial(draw, path, panels, title))


# ----------------------------------------------------------------------------------------------------------------------
# The table, and the record beside each checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def row_names(paths, states):
    """A name for each checkpoint, equal for those that differ only in their seed (and in how and where they ran): the
    run directory without its seed. Different runs of the same name are numbered."""
    # Runs are grouped by what makes them and by their directory. A seed that comes twice is of another run, such as one
    # after an edit of the script.
    free = (common.Run.FREE | {"seed"}) - {"data_dir"}
    groups = {}  # {(run, directory, how often its seeds came before): ({seeds}, [places])}
    for place, (path, state) in enumerate(zip(paths, states)):
        args = {k: v for k, v in state["args"].items() if k not in free}
        run, seed = json.dumps([state["method"], state["step"], args], sort_keys=True), state["args"].get("seed")
        again = 0
        while seed in groups.setdefault((run, name_of(path), again), (set(), []))[0]:
            again += 1
        seeds, places = groups[run, name_of(path), again]
        seeds.add(seed)
        places.append(place)

    # Groups of one run and of other seeds share a row, which has the name of the first. A name that is taken gets the
    # next free number.
    names, rows = [""] * len(paths), []
    for (run, directory, _), (seeds, places) in groups.items():
        row = next((row for row in rows if row.run == run and not row.seeds & seeds), None)
        if row is None:
            name, number = directory, 2
            while name in {row.name for row in rows}:
                name, number = f"{directory} #{number}", number + 1
            row = SimpleNamespace(run=run, name=name, seeds=set())
            rows.append(row)
        row.seeds |= seeds
        for place in places:
            names[place] = row.name
    return names


def name_of(path):
    """The run directory of a checkpoint without its seed, or timm:NAME@FILE without FILE's directory."""
    if not path.startswith("timm:"):
        return re.sub(r"-s\d+$", "", Path(path).resolve().parent.name)
    model, at, file = path.partition("@")
    return f"{model}@{Path(file).name}" if at else model


def fold(results):
    """[(row name, {metric: value})] -> {row name: (n, {metric: (mean, sample standard deviation or None, how many of
    the n have it)})}, and all metrics."""
    rows, metrics = {}, list(dict.fromkeys(metric for _, values in results for metric in values))
    for name, values in results:
        rows.setdefault(name, []).append(values)

    # Seeds of a run are folded: mean, deviation, and the number of seeds that have the metric.
    folded = {}
    for name, group in rows.items():
        folded[name] = len(group), {}
        for c in metrics:  # a data set may lack some
            v = torch.tensor([g[c] for g in group if c in g], dtype=torch.float64)
            if len(v):
                folded[name][1][c] = v.mean().item(), v.std().item() if len(v) > 1 else None, len(v)
    return folded, metrics


def table(results, form="table", encoding="utf-8"):
    """[(row name, {metric: value})] -> text: a row per name, mean +- sample standard deviation, and of how many if some
    failed; "table" aligned, or "markdown", "csv", "json" (the last two with all digits). Characters that the encoding
    lacks are written in ASCII."""
    rows, metrics = fold(results)

    # JSON and CSV keep all digits.
    if form == "json":
        cell = lambda n, mean, std, k: dict(mean=mean, std=std) | (dict(n=k) if k < n else {})
        found = {name: dict(n=n, **{c: cell(n, *v) for c, v in values.items()}) for name, (n, values) in rows.items()}
        return json.dumps(finite(found), indent=1)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["", "n", *(f"{c}{suffix}" for c in metrics for suffix in ("", " std"))])
        for name, (n, values) in rows.items():
            writer.writerow([name, n, *(v for c in metrics for v in values.get(c, (None, None))[:2])])
        return written(out.getvalue().strip(), encoding)

    # The other formats have rows of text.
    lines = [["", "n", *metrics]]
    for name, (n, values) in rows.items():
        lines.append([name, str(n), *(cell_text(c, n, values.get(c)) for c in metrics)])
    lines = [[written(cell, encoding) for cell in line] for line in lines]
    if form == "markdown":
        lines.insert(1, ["---" for _ in lines[0]])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    # Names are aligned to the left, numbers to the right.
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = lambda name, *cells: [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))]
    return "\n".join("  ".join(aligned(*line)) for line in lines)


def cell_text(metric, n, value):
    """(mean, standard deviation, k), of k among n checkpoints, or None -> the text of a cell."""
    if value is None:
        return "-"
    mean, std, k = value
    digits = 3 if metric.startswith(("r2", "equi ")) else 2
    text = f"{mean:.{digits}f}"
    if std is not None:
        text += f" ± {std:.{digits}f}"
    return text if k == n else f"{text} ({k} of {n})"


def written(text, encoding):
    """Text for a stream of this encoding: "+-" where it lacks the sign, escapes for other characters."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.replace("±", "+-").replace("°", " deg").encode(encoding, "backslashreplace").decode(encoding)


def finite(value):
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_record(path, state, args, results, protocol):
    """One line in eval.jsonl beside the checkpoint, from rank 0: the results, and all that it takes to repeat them."""
    file = Path(file_of(path))
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = dict(time=now, checkpoint=path if path.startswith("timm:") else file.name)
    record |= {key: state[key] for key in ("step", "sha256", "backbone")}
    record |= dict(torch=str(torch.__version__), torchvision=str(torchvision.__version__))
    record |= dict(processes=common.world_size(), args=dataclasses.asdict(args))
    record |= dict(results=results, protocol=protocol, seed=args.seed)

    # One write keeps evaluations at the same time apart. A line that a full disk broke off gets no other behind it.
    if common.rank() == 0:
        line = json.dumps(finite(record)).encode() + b"\n"
        try:
            with open(file.parent / "eval.jsonl", "ab+", buffering=0) as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
                if f.read(1) not in (b"", b"\n"):
                    line = b"\n" + line
                f.write(line)
        except OSError as e:
            say(f"{file.parent / 'eval.jsonl'}: could not be written ({e.strerror}); only the table holds the results")


# ----------------------------------------------------------------------------------------------------------------------
# The figure
# ----------------------------------------------------------------------------------------------------------------------

# Colours that the colour-blind can tell apart [Okabe and Ito]; markers of another period, so 56 rows look different.
COLORS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"
MARKERS = "osD^vPX"

UNITS = {  # of metrics that begin so; all others are accuracies
    "r2 ": "R²",
    "equi ": "cosine",
    "view err": "squared error (% of variance)",
    "flips": "changed predictions (% of pairs)",
    "mFR": "% of AlexNet's flip rate",
    "mCE": "% of AlexNet's error",
    "rel mCE": "% of AlexNet's added error",
    "top-5 distance": "distance (ranks)",
}


def figure_class():
    """matplotlib's Figure; --plot alone needs the package."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        common.die("--plot: the package matplotlib is missing; pip install matplotlib, or leave the flag out")
    return Figure


def check_plot(path):
    """Refuse a --plot that could not be drawn or written, before anything is computed."""
    figure_class()
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        common.die(f"--plot {path}: name a file that ends in .png, .pdf or .svg")

    # A file that is opened to append keeps its content; a new one is removed again.
    try:
        there = os.path.exists(path)
        open(path, "ab").close()
        if not there:
            Path(path).unlink(missing_ok=True)  # another rank may have been quicker
    except OSError as e:
        common.die(f"--plot {path}: cannot be written ({e.strerror}); name a file in a directory that is there")


@dataclasses.dataclass
class Panel:
    """One picture of a figure: a bar a row of the table, or, where `over` names an axis, a line a row."""

    title: str
    unit: str
    over: str
    rows: dict  # {row name: [(position on the axis, mean, standard deviation or None)]}


def make_panels(results, over="block", suffix=""):
    """[(row name, {metric: value})] -> [Panel], one a metric, seeds folded as in the table. Metrics "NAME @k" of
    several numbers k share a panel with the axis `over`. The suffix is added to the titles."""
    rows, metrics = fold([(name, values) for name, values in results if values])
    panels = {}
    for metric in metrics:
        title, sign, position = metric.rpartition(" @")
        if not (sign and position.isdecimal()):
            title, position = metric, ""

        # A panel has a point or a bar for each row that has the metric.
        unit = next((unit for start, unit in UNITS.items() if metric.startswith(start)), "accuracy (%)")
        panel = panels.setdefault(title, Panel(title + suffix, unit, over if position else "", {}))
        for name, (n, values) in rows.items():
            mean, std, _ = values.get(metric, (math.nan, None, 0))
            label = name if n == 1 else f"{name} (n = {n})"
            if math.isfinite(mean):
                panel.rows.setdefault(label, []).append((float(position or 0), mean, std))
    return list(panels.values())


def draw(path, panels, title):
    """A figure of [Panel], none of them empty, into a file. Rows have one order and one colour in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.rows))
    shown = {name: f" {name}".replace("$", r"\$") for name in names}  # a leading underscore would hide it, $ is TeX
    if any(std is not None for panel in panels for points in panel.rows.values() for *_, std in points):
        title += "; means over n seeds, error bars: standard deviation"
    looks = {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    lines = any(panel.over for panel in panels)

    # The size in inches leaves room for names on the left, bars, title and the legend of the lines.
    columns = 3 if len(panels) in (5, 6, 9) else min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    longest = max(map(len, shown.values()))
    width = 0.08 * longest + 3.1 * columns
    title_lines = textwrap.wrap(title, int(11 * width))
    height = rows * max(2.4 if lines else 1.5, 0.9 + 0.27 * len(names))
    legend_columns = max(1, int(40 * columns / (longest + 8)))
    height += 0.25 * math.ceil(len(names) / legend_columns) if lines else 0.0
    size = width, 0.4 + 0.2 * len(title_lines) + height
    figure = figure_class()(figsize=size, dpi=150, layout="constrained")
    figure.suptitle("\n".join(title_lines), fontsize=11)

    # The bars of a panel are named in its first column, or where the panel before has lines.
    handles = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title("\n".join(textwrap.wrap(panel.title, 34)), fontsize=10)
        axes.grid(axis="y" if panel.over else "x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        if panel.over:
            handles |= draw_lines(axes, panel, looks)
        else:
            draw_bars(axes, panel, shown, looks, named=i % columns == 0 or bool(panels[i - 1].over))

    # Lines share one legend for all panels.
    if handles:
        order = [name for name in names if name in handles]
        labels = [shown[name] for name in order]
        where = dict(loc="outside lower center", ncols=legend_columns, fontsize=8)
        figure.legend([handles[name] for name in order], labels, **where)
    figure.savefig(path)


def draw_lines(axes, panel, looks):
    """A line a row over the panel's axis, with error bars where seeds are folded. Returns {row name: what its legend
    shows}."""
    # Rows are shifted a little, so that their error bars stay apart.
    handles = {}
    ticks = sorted({x for points in panel.rows.values() for x, *_ in points})
    apart = 0.01 * (ticks[-1] - ticks[0])
    for i, (name, points) in enumerate(panel.rows.items()):
        x, mean, std = zip(*points)
        shifted = [v + apart * (i - (len(panel.rows) - 1) / 2) for v in x]
        color, marker = looks[name]
        style = dict(color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2)
        handles[name] = axes.errorbar(shifted, mean, yerr=None if None in std else std, **style)

    axes.set_xticks(ticks)
    axes.set_xlabel(panel.over, fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    return handles


def draw_bars(axes, panel, shown, looks, named):
    """A bar a row from top to bottom, its number at the end; a dash where a row lacks the metric."""
    digits = 3 if panel.unit in ("R²", "cosine") else 1
    for i, name in enumerate(shown):
        ((_, mean, std),) = panel.rows.get(name, [(0, 0.0, None)])
        bar = axes.barh(i, mean, xerr=std, color=looks[name][0], edgecolor="black", linewidth=0.4, capsize=2)
        axes.bar_label(bar, [f"{mean:.{digits}f}" if name in panel.rows else "-"], padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), shown.values() if named else ["" for _ in shown])
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(panel.unit, fontsize=8)


# ----------------------------------------------------------------------------------------------------------------------
# From checkpoints to the table
# ----------------------------------------------------------------------------------------------------------------------

PROBES = (knn, linear, mlp, finetune, fewshot, r2, layers, equivariance, rotation, latents)
TASKS = {task.__name__: task for task in PROBES}


def probe(path, case, evaluation, row):
    """All tasks on one checkpoint: each adds to the `row` of the table, and leaves a record, as soon as it is
    finished."""
    # All tasks share the data, the encoder and the arithmetic.
    backbone, state, args, seconds = case.backbone, case.state, case.args, case.seconds
    protocol = dict(protocol=args.protocol, data=state["data"], data_dir=state["data_dir"])
    protocol |= dict(amp=args.amp, device=case.device.type, train_images=len(case.train), test_images=len(case.test))
    protocol |= dict(view=f"centre crop {backbone.img_size} px", dim=backbone.dim, inv=backbone.inv)

    # Sessions and known labels are recorded where they are in force.
    if state["data"] == "core50":
        protocol |= dict(sessions=state["args"].get("sessions", (1, 2)))
    if args.known_fraction < 1:
        protocol |= dict(known_fraction=args.known_fraction, known_seed=state["args"]["seed"])

    def run(task):
        found = TASKS[task](case)  # None beside rank 0
        return common.by_rank_0(lambda: found)

    # The time of features that a task was the first to ask for is noted apart from its own.
    for task in args.tasks:
        start, before = time.monotonic(), seconds.get("features", 0.0)
        finished = evaluation.attempt(f"{path}: {task}", partial(run, task))
        if finished is None:
            continue

        # A finished task is recorded at once, so that a later failure loses nothing.
        values, details = finished
        row |= values
        seconds[task] = time.monotonic() - start - (seconds.get("features", 0.0) - before)
        took = {k: v for k, v in seconds.items() if k in ("features", task)}
        append_record(path, state, args, values, protocol | {task: details, "seconds": took})

    # A line names the data and the seconds of each task.
    if row:
        where = " ".join(v for v in (state["data"], state["data_dir"]) if v)
        say(f"{path}: {where}; {', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())}")


def main(argv=None):
    """Probe every checkpoint, append its results to the eval.jsonl beside it, print one table; returns its rows."""
    rows, data = [], []  # of the table; names of the sets
    with Evaluation() as evaluation:
        args = arguments(argv)
        common.check_ranges(args)
        check(args)
        device = evaluation.start(args.device)

        # The table is printed and the figure drawn in any case.
        def at_end():
            evaluation.table(rows, args.format)
            title = f"Probes of frozen features on {', '.join(dict.fromkeys(data))}"
            evaluation.plot(args.plot, make_panels(rows), title)

        # All checkpoints are opened before the first is evaluated.
        evaluation.at_end = at_end
        cases = open_all(args, lambda state: arguments(argv, state["args"].get("base")), device, evaluation)

        # A case leaves the list when its turn comes, so that its features do not stay until the end.
        while cases:
            path, name, case = cases.pop(0)
            data.append(case.state["data"])
            rows.append((name, {}))
            probe(path, case, evaluation, rows[-1][1])
    return rows


if __name__ == "__main__":
    common.command(main)
