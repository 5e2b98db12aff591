"""Probe saved encoders: what do their frozen features know?

    python eval_probe.py runs/*/checkpoint.pt                                # k-NN and linear accuracy, one table
    python eval_probe.py A/checkpoint.pt B/checkpoint.pt --tasks knn linear r2
    torchrun --nproc_per_node=8 eval_probe.py A/checkpoint.pt --data imagefolder --data-dir IMAGENET

Flow: checkpoint -> encoder -> features of the train and test images, once -> every probe on those features -> a table.
Checkpoints that differ only in their seed share a row, mean +- sample standard deviation. Each checkpoint's results are
appended to eval.jsonl beside it, with the protocol that gave them.

Tasks
  (the final [CLS]; of recon_xattn.py's encoders the mean of the tokens, of ResNets and VMamba that of the last map)
  knn     20 nearest neighbours by cosine on the final [CLS], weights exp(cos / 0.07)            [DINO, Caron et al. 2021]
  linear  softmax regression on the [CLS] of the last four blocks, each through the final norm    [SER; DINO]; SGD with
          momentum 0.9, no weight decay, cosine to 0; ten learning rates trained together, the one that is best on a held-out
          tenth of the training images is read on the test images, once, after the last epoch. Centre crops, no augmentation:
          the features are extracted a single time.
  mlp     the same with a 3-layer MLP (D-1024-1024-C, Adam)
  fewshot the linear probe, trained on 1 % and on 10 % of each class
  r2      how well the features of two views tell what happened between them: a 3-layer MLP on their concatenation, MSE,
          Adam [SIE, Garrido et al. 2023]. Images: the second view is the first under one family of transformations
          (rotation, color, blur, translation, crop, flip), a probe each, targets standardised. SIE draws anew each epoch, for 300 epochs;
          here one draw per image is encoded once, for 50. Posed objects (blocks): two views
          of one object; targets are the quaternion of q1^-1 q2 (pose) and the differences of the hues (hues), raw.
  latents what a linear readout of one image tells: `object`, its class, learnt on train, read on test images, and `instance`
          (core50), which of the 50 objects; `session` (core50, blocks-views), which of the sessions that never trained, learnt
          and read within those (every fifth image is read); `view err` (tdw, blocks-views), 100 x the squared error of azimuth, elevation and distance, each in units of
          its deviation over the images it was learnt on: 100 is what a constant scores. Learnt on train, read on test images
          (tdw), or, where these also differ in their sessions, learnt on half of the test objects and read on the others
          [CIPER, Xu and Triesch 2023, which leaves "View Err." undefined]. SGD, Nesterov 0.9, weight decay 1e-6, 100 epochs, rate 1,
          times 0.3 every 10 epochs, batches of 256; for views features are centred and divided by one number.
          "lstsq": the same read out by least squares.
"""

import dataclasses
import functools
import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import common
from common import FAMILIES, CenterCrop

POSES = ("pose", "hues")


@dataclasses.dataclass
class Args:
    """Which checkpoints, which probes, on which data."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """checkpoint.pt files written by the method scripts"""
    tasks: tuple[Literal["knn", "linear", "mlp", "fewshot", "r2", "latents"], ...] = ("knn", "linear")
    """probes to run"""
    data: str | None = None
    """data set to probe on; default: the one the checkpoint was trained on"""
    data_dir: str | None = None
    """where it lies; default: where it lay then"""
    knn_k: int = 20
    """neighbours that vote"""
    linear_epochs: int = 50
    """epochs of the linear probe"""
    linear_lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """learning rates of the linear probe, per 256 images"""
    mlp_epochs: int = 50
    """epochs of the MLP"""
    r2_targets: tuple[Literal["rotation", "color", "blur", "translation", "crop", "flip", "pose", "hues"], ...] | None = None
    """what to regress; default: pose and hues on posed objects, the six families of transformations on other images"""
    part: tuple[Literal["all", "inv", "equi"], ...] = ("all",)
    """what all but latents look at: the representation, and of the encoders of recon_xattn.py and clever.py its invariant (first) and
    its equivariant (last) part"""
    known_fraction: float = 1.0
    """train the probes on this share of every class, the one that recon_xattn.py --known-fraction knew"""
    r2_epochs: int = 50
    """epochs of the regression"""
    r2_images: int = 10_000
    """training images of the regression, evenly spaced (test images: half as many); a forward pass each per target"""
    seed: int = 0
    """seed of the probes' weights, of their batches and of the transformations"""
    skip_corrupt: bool = False
    """open every image of a folder first and leave out those that cannot be read"""
    workers: int | None = None
    """loader processes for image folders; default: as many as this process has cores, at most 8"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU"""
    amp: Literal["auto", "off"] = "auto"
    """auto is bfloat16 autocast on CUDA and float32 elsewhere"""


RANGES = dict(known_fraction="(0, 1]", knn_k="[1, inf)", linear_epochs="[1, inf)", linear_lrs="(0, inf)", mlp_epochs="[1, inf)", r2_epochs="[1, inf)", r2_images="[2, inf)",
              seed="[0, 4294967296)", workers="[0, inf)")


# ----------------------------------------------------------------------------------------------------------------------
# Probes: functions of features
# ----------------------------------------------------------------------------------------------------------------------


def linear_probe(train, train_labels, test, classes, lrs, epochs, generator, batch_size=256, held_out=0.1):
    """One softmax regression per learning rate, all trained at once: W (D, L C) makes the logits of L probes in one matmul,
    and the learning rate is a vector. Features (N, D), (M, D), labels (N,) -> (test scores (M, C) of the probe that was best
    on the held-out share of train, its learning rate). Weights start as N(0, 0.01), biases 0; the gradient of the mean
    cross-entropy over a batch is (softmax - onehot) / batch.
    """
    N, L, device = len(train), len(lrs), train.device
    order = torch.randperm(N, generator=generator)
    held, rows = order[: max(1, int(N * held_out))], order[max(1, int(N * held_out)) :]
    W = torch.randn(train.shape[1], classes, generator=generator).mul_(0.01).to(device).repeat(1, L)  # (D, L C)
    b = torch.zeros(L * classes, device=device)
    mW, mb = torch.zeros_like(W), torch.zeros_like(b)
    rate = torch.tensor(lrs, device=device).repeat_interleave(classes) * batch_size / 256  # (L C,)
    steps, step = epochs * -(-len(rows) // batch_size), 0
    for _ in common.progress(range(epochs), desc="linear probe", unit="epoch"):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
            x, y = train[batch], train_labels[batch]  # (n, D), (n,)
            g = torch.addmm(b, x, W).view(len(x), L, classes).softmax(2)  # (n, L, C)
            g[torch.arange(len(x), device=device), :, y] -= 1
            g = g.flatten(1) / len(x)  # (n, L C)
            mW.mul_(0.9).addmm_(x.T, g)
            mb.mul_(0.9).add_(g.sum(0))
            lr = rate * common.cosine(step / steps, 1.0, 0.0)
            W -= lr * mW
            b -= lr * mb
            step += 1
    score = lambda x: torch.addmm(b, x, W).view(len(x), L, classes)  # (n, L, C)
    correct = (score(train[held]).argmax(2) == train_labels[held][:, None]).float().mean(0)  # (L,)
    best = int(correct.argmax())
    return score(test)[:, best], lrs[best]


def linear_schedule(train, target, test, generator, epochs=100, batch_size=256):
    """CIPER's linear readout. Features (N, D), (M, D); target (N,) int64 classes, cross-entropy, or (N, K) numbers, squared
    error -> scores or predictions (M, K)."""
    classes = target.dtype == torch.int64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        readout = nn.Linear(train.shape[1], int(target.max()) + 1 if classes else target.shape[1]).to(train.device)
    optimizer = torch.optim.SGD(readout.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.3)
    for _ in common.progress(range(epochs), desc="linear readout", unit="epoch"):
        for batch in torch.randperm(len(train), generator=generator).split(batch_size):
            batch = batch.to(train.device)
            loss = (F.cross_entropy if classes else F.mse_loss)(readout(train[batch]), target[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return readout(test)


def least_squares(train, target, test):
    """The closed form beside it: features (N, D), (M, D); target (N, K), or (N,) int64 as one-hot -> (M, K), in float64."""
    target = F.one_hot(target) if target.dtype == torch.int64 else target
    with_bias = lambda x: F.pad(x.cpu().double(), (0, 1), value=1.0)
    return with_bias(test) @ torch.linalg.lstsq(with_bias(train), target.cpu().double(), driver="gelsd").solution


def r2_scores(target, predicted):
    """R^2 of (N, K) targets: "flat", SIE's, against one mean over all N K entries, and "uniform", the mean over the K
    dimensions of each one's own R^2. A constant can score above 0 in the first (0.229 on the quaternions of 3DIEBench)."""
    target, predicted = target.cpu().double(), predicted.cpu().double()
    error = (target - predicted).square()
    flat = 1 - error.sum() / (target - target.mean()).square().sum()
    uniform = (1 - error.sum(0) / (target - target.mean(0)).square().sum(0)).mean()
    return dict(flat=flat.item(), uniform=uniform.item())


def mlp_probe(sample, test, outputs, epochs, generator, batch_size=256, lr=1e-3):
    """A 3-layer MLP D-1024-1024-K, ReLU, Adam at a constant rate [SIE]. sample(epoch) -> (features (N, D), targets (N, K), squared
    error, or classes (N,) int64, cross-entropy), the same or others each epoch; test features (M, D) -> (M, K)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        mlp = nn.Sequential(nn.Linear(test.shape[1], 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, outputs)).to(test.device)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=lr)
    for epoch in common.progress(range(epochs), desc="MLP", unit="epoch"):
        x, t = sample(epoch)
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            batch = batch.to(x.device)
            loss = (F.cross_entropy if t.dtype == torch.int64 else F.mse_loss)(mlp(x[batch]), t[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return mlp(test)


def regress(sample, test_pairs, columns, epochs, generator):
    """From pairs of features to what happened between them: sample(epoch) -> (pairs (N, 2, D), targets (N, K)); test_pairs
    (M, 2, D) -> (M, K). Only `columns`, a slice of the D features, are looked at."""
    part = lambda pairs: pairs[..., columns].flatten(1)

    def shown(epoch):
        pairs, targets = sample(epoch)
        return part(pairs), targets

    return mlp_probe(shown, part(test_pairs), sample(0)[1].shape[1], epochs, generator)


def stratified(labels, share, generator):
    """Rows of a share of every class, one at least, at random: (n,)."""
    rows = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[: max(1, round(share * len(r)))]] for r in rows])


# ----------------------------------------------------------------------------------------------------------------------
# What r2 predicts
# ----------------------------------------------------------------------------------------------------------------------


class SecondView:
    """The second views of a set: `view(images, rows)` centre-crops uint8 images and applies a family to them, each with
    parameters of its own, drawn from the seed; `view.target` (N, K) is what was done. A class, so that workers can have it."""

    def __init__(self, name, size, n, seed):
        self.name, self.centre, self.op = name, CenterCrop(size, interpolation="bicubic"), common.family(name, size)
        self.params = self.op.sample(n, common.rng(seed, "r2", name), torch.full((n, 2), size))
        self.target = common.family_target(name, self.params, size)  # (N, K)

    def __call__(self, images, rows):
        x, params = self.centre(images), {key: value[rows] for key, value in self.params.items()}  # uint8 (n, 3, S, S)
        if self.name == "crop":
            return self.op(x, params)
        return (self.op(x.float() / 255, params) * 255).round().clamp(0, 255).to(torch.uint8)


def partners(groups, generator):
    """For every image another view of the same object, at random: (N,) rows."""
    order = torch.argsort(torch.rand(len(groups), generator=generator))
    order = order[torch.argsort(groups[order], stable=True)]  # objects in turn, their views shuffled
    start = torch.searchsorted(groups[order], groups[order])  # first position of each one's object
    end = torch.searchsorted(groups[order], groups[order], right=True)
    position = torch.arange(len(groups))
    return torch.empty_like(order).scatter_(0, order, order[torch.where(position + 1 < end, position + 1, start)])


# ----------------------------------------------------------------------------------------------------------------------
# One checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def accuracies(name, scores, labels):
    """Scores (M, C), labels (M,) -> percent of test images whose class is the first, or among the first five."""
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :5] == labels[:, None].to(scores.device)  # (M, 5)
    out = {name: 100 * top[:, 0].float().mean().item()}
    return out | ({f"{name} top-5": 100 * top.any(1).float().mean().item()} if scores.shape[1] > 5 else {})


@dataclasses.dataclass
class Case:
    """One encoder on one data set: what every task looks at. Features are extracted when a task first asks, and kept."""

    backbone: nn.Module
    state: dict  # of the checkpoint, without its tensors
    train: common.ImageSet
    test: common.ImageSet
    args: Args
    device: torch.device

    def __post_init__(self):
        self.how = dict(device=self.device, amp=self.args.amp, workers=self.args.workers)
        self.rest = self.backbone.dim - (self.backbone.inv or 0)  # width of the equivariant part: the last dimensions, of the last block alone

    @functools.cached_property
    def x(self):
        """What linear probes look at, of train and test images: (N, W), (M, W)."""
        return tuple(common.features(self.backbone, d, encode=self.backbone.last_blocks, **self.how).to(self.device) for d in (self.train, self.test))

    @property
    def y(self):
        """The representation alone: (N, D), (M, D)."""
        return tuple(x[:, -self.backbone.dim :] for x in self.x)

    @property
    def feature(self):
        """What x is, for the protocol."""
        name = {common.NeckViT: "mean of the tokens", common.ResNet: "mean of the last map", common.VMamba: "mean of the last map"}.get(type(self.backbone), "final [CLS]")
        return name if self.x[0].shape[1] == self.backbone.dim else f"[CLS] of the last {self.x[0].shape[1] // self.backbone.dim} blocks"

    def columns(self, width, part):
        return dict(all=slice(None), inv=slice(width - self.rest), equi=slice(width - self.rest, None))[part]

    def parts(self, features):
        """Features of train and test images -> for each --part: how to name its results, and its columns of both."""
        for part in self.args.part:
            columns = self.columns(features[0].shape[1], part)
            yield lambda name, part=part: name if part == "all" else f"{name} ({part})", features[0][:, columns], features[1][:, columns]

    def linear(self, name, x, labels, x_test, classes=None):
        """Test scores of a linear probe, and the learning rate it took."""
        return linear_probe(x, labels.to(self.device), x_test, classes or len(self.train.classes), self.args.linear_lrs, self.args.linear_epochs, common.rng(self.args.seed, name))


def knn(case):
    results = {}
    for named, y, y_test in case.parts(case.y):
        scores = common.knn(y, case.train.labels, y_test, case.args.knn_k, classes=len(case.train.classes))
        results |= accuracies(named("knn"), scores, case.test.labels)
    return results, dict(k=case.args.knn_k, temperature=0.07)


def linear(case):
    results, chosen = {}, {}
    for named, x, x_test in case.parts(case.x):
        scores, chosen[named("linear")] = case.linear("linear", x, case.train.labels, x_test)
        results |= accuracies(named("linear"), scores, case.test.labels)
    return results, dict(epochs=case.args.linear_epochs, batch_size=256, lrs=case.args.linear_lrs, chosen=chosen, held_out=0.1, feature=case.feature)


def mlp(case):
    results, labels = {}, case.train.labels.to(case.device)
    for named, x, x_test in case.parts(case.x):
        scores = mlp_probe(lambda _, x=x: (x, labels), x_test, len(case.train.classes), case.args.mlp_epochs, common.rng(case.args.seed, "mlp"))
        results |= accuracies(named("mlp"), scores, case.test.labels)
    return results, dict(epochs=case.args.mlp_epochs, batch_size=256, lr=1e-3, hidden=1024, feature=case.feature)


def fewshot(case):
    results, images = {}, {}
    for share in (0.01, 0.1):
        rows = stratified(case.train.labels, share, common.rng(case.args.seed, "fewshot", share))
        images[f"{share:.0%}"] = len(rows)
        for named, x, x_test in case.parts(case.x):
            scores, _ = case.linear("fewshot", x[rows.to(x.device)], case.train.labels[rows], x_test)
            results |= accuracies(named(f"fewshot {share:.0%}"), scores, case.test.labels)
    return results, dict(images=images, epochs=case.args.linear_epochs, batch_size=256, lrs=case.args.linear_lrs, held_out=0.1, feature=case.feature)


def r2(case):
    sides, scores, args = ((case.train, case.y[0]), (case.test, case.y[1])), {}, case.args
    for target in args.r2_targets or (POSES if "rotation" in case.train.factors else FAMILIES):
        sample, test_pairs, test_targets = (pairs_of_poses if target in POSES else pairs_of_images)(target, case.backbone, sides, args, case.how)
        for part in args.part:
            predicted = regress(sample, test_pairs, case.columns(case.backbone.dim, part), args.r2_epochs, common.rng(args.seed, "r2", target))
            scores[target if part == "all" else f"{target} ({part})"] = r2_scores(test_targets, predicted)
    return {f"r2 {k}": v["flat"] for k, v in scores.items()}, dict(epochs=args.r2_epochs, batch_size=256, lr=1e-3, images=args.r2_images, both=scores)


TASKS = dict(knn=knn, linear=linear, mlp=mlp, fewshot=fewshot, r2=r2, latents=lambda case: latents(case.train, case.test, *case.y, case.args))


def probe(path, args, device):
    """All tasks on one checkpoint -> (results, protocol, checkpoint)."""
    backbone, state = common.load_backbone(path)
    name, root = args.data or state["args"]["data"], args.data_dir or state["args"]["data_dir"]
    sessions, labelled = state["args"].get("sessions", (1, 2)), set(args.tasks) - {"r2"}
    train, test = (common.load_data(name, root, split, backbone.img_size, args.skip_corrupt, args.workers, sessions) for split in ("train", "test"))
    if test is None:
        common.die(f"--data-dir {root}: has no test split; probes need train/ and val/ or test/")
    if labelled and (train.labels is None or test.labels is None):
        common.die(f"--tasks {' '.join(args.tasks)}: {root} has no classes (one folder per class); only r2 can do without")
    elif labelled and train.classes != test.classes:
        common.die(f"--data-dir {root}: its train and test folders have different classes ({len(train.classes)} and {len(test.classes)})")
    if args.known_fraction < 1:
        if train.labels is None:
            common.die(f"--known-fraction {args.known_fraction}: a share of every class, but {root} has no classes")
        train = common.known_part(train, args.known_fraction, state["args"]["seed"])
    if "rotation" not in train.factors and set(args.r2_targets or ()) & set(POSES):
        common.die(f"--r2-targets {' '.join(args.r2_targets)}: {name} has no poses; choose among {', '.join(FAMILIES)}")
    case = Case(backbone.to(device), state, train.to(device), test.to(device), args, device)
    results, protocol = {}, dict(data=name, data_dir=root, amp=args.amp, device=device.type, train_images=len(train), test_images=len(test), view=f"centre crop {backbone.img_size} px",
                                 dim=backbone.dim, inv=backbone.inv)
    protocol |= dict(sessions=sessions) if name == "core50" else {}
    protocol |= dict(known_fraction=args.known_fraction, known_seed=state["args"]["seed"]) if args.known_fraction < 1 else {}
    for task in args.tasks:
        values, protocol[task] = TASKS[task](case)
        results |= values
    return results, protocol, state


def every_second_object(data):
    """(N,) bool: the images of every second object of each class."""
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for c in data.labels.unique():
        chosen |= torch.isin(data.groups, data.groups[data.labels == c].unique()[1::2])
    return chosen


def latents(train, test, x, x_test, args):
    """What a linear readout of one image tells. Sets and their features (N, D), (M, D) -> (results, protocol)."""
    results, details = {}, {}

    def accuracy(name, x, y, x_test, y_test):
        for suffix, scores in (("", linear_schedule(x, y.to(x.device), x_test, common.rng(args.seed, name))), (" lstsq", least_squares(x, y, x_test))):
            results[name + suffix] = 100 * (scores.argmax(1).cpu() == y_test).float().mean().item()

    accuracy("object", x, train.labels, x_test, test.labels)
    if "frame" in test.factors:  # core50: the same objects in both splits, five of each category
        accuracy("instance", x, train.groups, x_test, test.groups)
    if "session" in test.factors:
        read = torch.arange(len(test)) % 5 == 0  # (M,) bool
        session = test.factors["session"].unique(return_inverse=True)[1]  # (M,) from 0
        accuracy("session", x_test[~read], session[~read], x_test[read], session[read])
    if "view" in test.factors:
        fit, read, f, f_test = train, test, x, x_test
        if "session" in test.factors:
            second = every_second_object(test)  # (M,) bool
            fit, read, f, f_test = test.subset((~second).nonzero()[:, 0]), test.subset(second.nonzero()[:, 0]), x_test[~second], x_test[second]
        view, mean, std = fit.factors["view"], fit.factors["view"].mean(0), fit.factors["view"].std(0, correction=0)
        target, centre = ((view - mean) / std).to(f.device), f.mean(0)
        scale = (f - centre).square().sum(1).mean().sqrt()  # one number keeps what is linear in the features
        a, b = (f - centre) / scale, (f_test - centre) / scale
        for suffix, predicted in (("", linear_schedule(a, target, b, common.rng(args.seed, "view"))), (" lstsq", least_squares(a, target, b))):
            error = predicted.cpu() * std + mean - read.factors["view"]  # (m, 3)
            results["view err" + suffix] = 100 * (error / std).square().mean().item()
            turned = (error[:, 0] + 180) % 360 - 180
            details["rmse" + suffix] = dict(zip(("azimuth", "elevation", "distance"), error.square().mean(0).sqrt().tolist()), azimuth_circular=turned.square().mean().sqrt().item())
    return results, dict(epochs=100, batch_size=256, lr=1.0, session_read="every fifth test image", view_read="every second test object" if "session" in test.factors else "test", **details)


def pairs_of_poses(target, backbone, sides, args, how):
    """Two views of an object and `target` between them. sides: (set, its features (N, D)) of train and test -> sample(epoch) of
    (pairs (n, 2, D), targets (n, K)), test pairs, test targets. Each epoch shows as many random pairs, of different views, as
    there are images, 100,000 at most (SIE: one an object); on test images one fixed draw, the same for every checkpoint."""

    def sample(data, y, *key):
        g = common.rng(args.seed, *key)
        i, j = torch.arange(len(data)), partners(data.groups, g)
        if len(data) > 100_000:
            i = torch.randperm(len(data), generator=g)[:100_000]
            j = j[i]
        return torch.stack([y[i], y[j]], 1), common.pose_target(target, data.factors, i, j).to(y.device)  # (n, 2, D), (n, K)

    return lambda epoch: sample(*sides[0], "pairs", epoch), *sample(*sides[1], "test pairs")


def pairs_of_images(target, backbone, sides, args, how):
    """An image and its transformed self, on evenly spaced images, one draw per image; targets are standardised by the mean
    and deviation of the training draws. Takes and returns what `pairs_of_poses` does."""
    pairs, targets = [], []
    for (data, y), most, seed in zip(sides, (args.r2_images, max(2, args.r2_images // 2)), (args.seed, args.seed + 1)):
        rows = torch.arange(min(most, len(data))) * len(data) // min(most, len(data))  # (n,)
        view = SecondView(target, backbone.img_size, len(data), seed)
        y2 = common.features(backbone, data, transform=view, rows=rows, name=target, **how)  # (n, D)
        pairs.append(torch.stack([y[rows], y2.to(y.device)], 1))  # (n, 2, D)
        targets.append(view.target[rows].to(y.device))  # (n, K)
    mean, std = targets[0].mean(0), targets[0].std(0).clamp(min=1e-6)
    train_targets, test_targets = ((t - mean) / std for t in targets)
    return lambda epoch: (pairs[0], train_targets), pairs[1], test_targets


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def table(results):
    """[(row name, {metric: value})] -> aligned text; rows of one name fold into mean +- sample standard deviation."""
    rows = {}
    for name, values in results:
        rows.setdefault(name, []).append(values)
    columns = list(dict.fromkeys(c for _, values in results for c in values))
    lines = [["", "n", *columns]]
    for name, group in rows.items():
        line = [name, str(len(group))]
        for c in columns:  # data sets differ in what can be asked of them
            v, digits = torch.tensor([g[c] for g in group if c in g], dtype=torch.float64), 3 if c.startswith("r2") else 2
            line.append((f"{v.mean():.{digits}f}" if len(v) else "-") + (f" ± {v.std():.{digits}f}" if len(v) > 1 else ""))
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def row_names(paths, states):
    """A name for each checkpoint, equal for those that differ only in their seed (and in how and where they ran): the run
    directory without its seed. Different runs of the same name are numbered."""
    free = (common.Run.FREE | {"seed"}) - {"data_dir"}
    keys = [json.dumps([s["method"], s["step"], {k: v for k, v in s["args"].items() if k not in free}], sort_keys=True) for s in states]
    names = [re.sub(r"-s\d+$", "", Path(p).resolve().parent.name) for p in paths]
    out, owner = [], {}
    for key, name in zip(keys, names):
        if key not in owner:
            taken = set(owner.values())
            owner[key] = name if name not in taken else next(f"{name} #{i}" for i in range(2, len(keys) + 2) if f"{name} #{i}" not in taken)
        out.append(owner[key])
    return out


def main(argv=None):
    """Probe every checkpoint, append its results to the eval.jsonl beside it, print one table; returns its rows."""
    args = common.parse(Args, lambda first: {}, argv, description=__doc__)
    if not args.checkpoints:
        common.die("no checkpoint given; name at least one, such as runs/ser-mocov3-ser-blocks-s0/checkpoint.pt")
    common.check_ranges(args, RANGES)
    if len(set(args.checkpoints)) < len(args.checkpoints):
        common.die("a checkpoint is given twice; name each once")
    states = [{k: s[k] for k in ("method", "step", "args", "backbone")} for s in map(common.load_checkpoint, args.checkpoints)]  # all, before the first is probed
    whole = [path for path, state in zip(args.checkpoints, states) if "neck" not in state["backbone"] and state["backbone"].get("inv") is None]
    if set(args.part) - {"all"} and whole:
        common.die(f"--part {' '.join(args.part)}: {whole[0]} does not split its representation; only encoders of recon_xattn.py and clever.py do")
    device, results = common.start(args.device), []
    for path, name in zip(args.checkpoints, row_names(args.checkpoints, states)):
        begin = time.monotonic()
        values, protocol, state = probe(path, args, device)
        results.append((name, values))
        if common.rank() == 0:
            where = " ".join(v for v in (protocol["data"], protocol["data_dir"]) if v)
            print(f"{path}: {where}, {time.monotonic() - begin:.0f} s", file=sys.stderr)
            record = dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), checkpoint=Path(path).name, step=state["step"],
                          sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(), torch=str(torch.__version__), results=values, protocol=protocol,
                          seed=args.seed)
            with open(Path(path).parent / "eval.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
    if common.rank() == 0:
        print(table(results))
    return results


if __name__ == "__main__":
    main()
