"""Probe saved encoders: what do their frozen features know?

    python eval_probe.py runs/*/checkpoint.pt  # k-NN and linear accuracy, one table
    python eval_probe.py A/checkpoint.pt B/checkpoint.pt --tasks knn linear mlp r2 layers
    python eval_probe.py A/checkpoint.pt --data pets --data-dir PETS --tasks linear finetune --linear lbfgs  # transfer
    python eval_probe.py A/checkpoint.pt timm:vit_small_patch16_224@mine.pt --data cifar10 --data-dir CIFAR
    torchrun --nproc_per_node=8 eval_probe.py A/checkpoint.pt --data imagenet --data-dir IMAGENET --protocol ser

Flow: checkpoint -> encoder -> features of the train and test images, once -> every probe on those features -> a table.
Checkpoints that differ only in their seed share a row, mean +- sample standard deviation. As soon as a task is finished
its results are appended to eval.jsonl beside the checkpoint, a line a task, with the protocol that gave them: a later
task that fails, a bad checkpoint or a signal costs a line and the exit code, not what was finished.

Features are the final [CLS]; of recon_xattn.py's encoders the mean of the tokens, of ResNets and VMamba that of the
last map. Linear probes of ViTs see the [CLS] of the last four blocks, each through the final norm [DINO]. --part
takes them apart.

Tasks
  knn          20 nearest neighbours by cosine, weights exp(cos / 0.07) [DINO, Caron et al. 2021].
  linear       Softmax regression. --linear sgd: momentum 0.9, no weight decay, cosine to 0, ten rates trained
               together on nine tenths of the training images (or objects); the one that is best on the other tenth is
               read on the test images, once, after the last epoch. Centre crops, or with --augment random ones,
               encoded anew each epoch. lbfgs: to the minimum, or for 1,000 iterations, with the best of 45 ridge
               weights [AugSelf, Lee et al. 2021], then on all images. steps: CIPER's schedule, see latents.
  mlp          A 3-layer MLP (D-1024-1024-C, Adam) on standardised features of centre crops.
  fewshot      Linear on 1 % and 10 % of each class, the rate chosen on the tenth above; or (--fewshot finetune) the
               encoder with it [CLeVER]. The images are drawn by --seed; CLeVER takes SimCLR's lists.
  finetune     The encoder trained on with a linear layer, SGD, random crops and flips [CLeVER, Song et al. 2024].
  r2           How well the features of two views tell what happened between them: a 3-layer MLP on both, squared
               error, Adam [SIE, Garrido et al. 2023]. Features are standardised by the training pairs; SIE's are raw
               and its MLP takes 25 times as many steps. Images: the second view is the first under one family of
               transformations, a probe each, targets standardised; SIE draws anew each epoch, for 300, here one draw
               per image is encoded once, for 50. Posed objects: two views of one; targets are the quaternion of q1^-1
               q2 (pose), the differences of the hues (hues).
  layers       Which quarter turn, and whether a flip, lies between two views, after several blocks [SER, Table 5]; an
               MLP as in r2.
  equivariance Cosine of the turned, mirrored or rescaled token map of an image and the map of the turned, ... image
               [SER].
  rotation     The linear probe on turned test images; and one that tells quarter turns [CLeVER, Tables 6 and 7].
  latents      What a linear readout of one image tells [CIPER, Xu and Triesch 2023]: `object`, its class, learnt on
               train, read on test images, and `instance` (core50), which of the 50 objects; `session` (core50,
               blocks-views), which of the sessions that never trained, learnt and read within those (every fifth
               image is read); `view err` (tdw, blocks-views), which the paper leaves undefined: 100 x the squared
               error of azimuth, elevation and distance, in units of their deviations, so that a constant scores 100;
               learnt on train, read on test images, or, where these also differ in their sessions, learnt on half of
               the test objects and read on the others. SGD, Nesterov 0.9, weight decay 1e-6, 100 epochs of batches of
               256, rate 1, times 0.3 every 10; for views features are centred and divided by one number. "lstsq": the
               same by least squares.

--protocol takes a paper's own settings, as far as it or its code states them. `clever` has two: linear probes of DINO
and CLeVER learn at 0.001 per 256 images for 100 epochs, those of SimSiam and DDCL at 30 for 200 [DDCL's code; CLeVER
states 0.002 for batches of 512 and names no base]. Otherwise here: no classification by Adam on 3DIEBench [SIE];
DDCL's own rates of few-label and fine-tuning heads; SER's probes learn from all images, ours from nine tenths; the
last epoch and not the best, a cosine that falls step by step, 100 epochs of linear transfer where it has 200, no
stochastic depth [CLeVER]; fine-tuning by SGD, not AdamW [SER]; one draw, not one an epoch, for r2 on images and for
quarter turns."""

import contextlib
import copy
import csv
import dataclasses
import filecmp
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import tyro
from timm.layers import DropPath
from tqdm import tqdm

import common
from common import (
    FAMILIES,
    Affine,
    CenterCrop,
    Compose,
    Count,
    GridResize,
    HorizontalFlip,
    Natural,
    Normalize,
    Plural,
    Positive,
    RandomResizedCrop,
    Rot90,
    Seed,
    ShareAbove0,
)

POSES = ("pose", "hues")
SHARES = (0.01, 0.1)  # of the labels, for fewshot
MLP = dict(batch_size=256, lr=1e-3, hidden=1024, features="standardised per dimension by the training features")
PROTOCOLS = dict(  # what the papers say, or their public code does, where it differs from the defaults
    default=dict(),
    ser=dict(augment=True, linear_epochs=50),  # rates are swept: neither says which
    clever=dict(
        augment=True, linear_epochs=100, linear_lrs=(0.001,), fewshot="finetune", finetune_epochs=200, finetune_lr=0.001
    ),
    ciper=dict(linear="steps"),
    recon=dict(linear="lbfgs", r2_epochs=300, r2_images=50_000),
)
SIMSIAM = dict(
    linear_lrs=(30.0,), linear_epochs=200
)  # and what `clever` takes for encoders of SimSiam and DDCL [DDCL's code]


@dataclasses.dataclass
class Args:
    """Which checkpoints, which probes, on which data."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]] = ()
    """checkpoint.pt files written by the method scripts; timm:NAME takes a model of timm with its weights,
    timm:NAME@FILE with yours"""
    tasks: tuple[
        Literal["knn", "linear", "mlp", "finetune", "fewshot", "r2", "layers", "equivariance", "rotation", "latents"],
        ...,
    ] = ("knn", "linear")
    """probes to run"""
    data: str | None = None
    """data set to probe on; default: the one the checkpoint was trained on"""
    data_dir: str | None = None
    """where it lies; default, of the same data set: where it lay then"""
    knn_k: Count = 20
    """neighbours that vote"""
    protocol: Literal["default", "ser", "clever", "ciper", "recon"] = "default"
    """a paper's own way to probe: it sets the flags below, as --help then shows"""
    cache_dir: str | None = None
    """keep the features of train and test images here, and use those that are there"""
    linear: Literal["sgd", "lbfgs", "steps"] = "sgd"
    """how linear probes learn: SGD with several rates side by side; L-BFGS with the best of 45 ridge weights
    (transfer); CIPER's steps"""
    augment: bool = False
    """train them (sgd) on random crops and flips, encoded anew each epoch"""
    fewshot: Literal["linear", "finetune"] = "linear"
    """what learns from few labels: a linear probe, or the whole encoder"""
    linear_epochs: Count = 50
    """epochs of the linear probe (sgd)"""
    linear_lrs: tuple[Positive, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """learning rates of the linear probe (sgd), per 256 images"""
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
    part: tuple[Literal["all", "inv", "equi"], ...] = ("all",)
    """what knn, linear, mlp, fewshot, r2 and rotation look at: the representation, and of the encoders of
    recon_xattn.py and clever.py its invariant (first) and its equivariant (last) part"""
    known_fraction: ShareAbove0 = 1.0
    """train the probes on this share of every class, the one that recon_xattn.py --known-fraction knew"""
    r2_epochs: Count = 50
    """epochs of the regression"""
    r2_images: Plural = 10_000
    """training images of the regression, evenly spaced (test images: half as many); a forward pass each per target"""
    format: Literal["table", "markdown", "csv", "json"] = "table"
    """how the table is printed; csv and json hold all digits"""
    seed: Seed = 0
    """seed of the probes' weights, of their batches and of the transformations"""
    skip_corrupt: bool = False
    """open every image of a folder first and leave out those that cannot be read"""
    workers: Natural | None = None
    """loader processes for image folders; default: as many as this process has cores, at most 8"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU"""
    amp: Literal["auto", "off"] = "auto"
    """auto is bfloat16 autocast on CUDA and float32 elsewhere"""


# ----------------------------------------------------------------------------------------------------------------------
# Probes: functions of features
# ----------------------------------------------------------------------------------------------------------------------


class Shared:
    """A linear probe: rank 0 trains it, all ranks may read it then. `learnt` names the tensors that they are given."""

    def share(self):
        for value in (getattr(self, name) for name in self.learnt if common.world_size() > 1):
            common.dist.broadcast(value, 0)


class LinearProbe(Shared):
    """One softmax regression per learning rate, all trained at once: W (D, L C) makes the logits of L probes in one
    matmul, and the learning rate is a vector. SGD with momentum 0.9, no weight decay, half a cosine to 0; weights
    start as N(0, 0.01), biases 0; the gradient of the mean cross-entropy over a batch is (softmax - onehot) / batch.
    It learns from `rows`, and `choose` finds the rate that is best on the rows `held`."""

    learnt = ("W", "b", "best")

    def __init__(self, dim, classes, rows, held, lrs, epochs, generator, device, batch_size=256):
        self.held, self.rows, self.classes, self.lrs, self.generator, self.batch_size, self.device = (
            held,
            rows,
            classes,
            lrs,
            generator,
            batch_size,
            device,
        )
        self.W = torch.randn(dim, classes, generator=generator).mul_(0.01).to(device).repeat(1, len(lrs))  # (D, L C)
        self.b = torch.zeros(len(lrs) * classes, device=device)
        self.mW, self.mb = torch.zeros_like(self.W), torch.zeros_like(self.b)
        self.rate = torch.tensor(lrs, device=device).repeat_interleave(classes) * batch_size / 256  # (L C,)
        self.steps, self.step = epochs * -(-len(self.rows) // batch_size), 0
        self.best = torch.zeros((), dtype=torch.int64, device=device)  # of the rates

    def epoch(self, x, labels):
        """One pass over its rows of x (N, D), labels (N,)."""
        for batch in self.rows[torch.randperm(len(self.rows), generator=self.generator)].split(self.batch_size):
            batch = batch.to(self.device)
            f = x[batch]  # (n, D)
            g = self.logits(f).softmax(2)  # (n, L, C)
            g[torch.arange(len(f), device=self.device), :, labels[batch]] -= 1
            g = F.hardshrink(g.flatten(1), 1e-20) / len(
                f
            )  # (n, L C); high rates leave numbers so small that CPUs take six times as long
            self.mW.mul_(0.9).addmm_(f.T, g)
            self.mb.mul_(0.9).add_(g.sum(0))
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
        return self.logits(x)[:, self.best]


def linear_probe(train, labels, test, classes, lrs, epochs, generator, batch_size=256):
    """A LinearProbe from first to last on fixed features (N, D), labels (N,), a tenth of which chooses the rate ->
    (test scores (M, C), its learning rate)."""
    held, rows = torch.randperm(len(train), generator=generator).split(
        [max(1, len(train) // 10), len(train) - max(1, len(train) // 10)]
    )
    probe = LinearProbe(train.shape[1], classes, rows, held, lrs, epochs, generator, train.device, batch_size)
    for _ in common.progress(range(epochs), desc="linear probe", unit="epoch"):
        probe.epoch(train, labels)
    rate = probe.choose(train, labels)
    return probe.scores(test), rate


class RidgeProbe(Shared):
    """Softmax regression by L-BFGS on fixed features: sum of cross-entropies + w |(W, b)|^2, in float64 (on the CPU
    where the device has none). Of 45 weights w between 1e-6 and 1e5, from the strongest down and each started where
    the last ended, the one that is best on the rows `held` is taken; then these train too."""

    learnt = ("weights",)

    def __init__(self, dim, classes, rows, held, device, iterations=1000):
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.held, self.rows, self.iterations = held.to(self.device), rows.to(self.device), iterations
        self.weights = torch.zeros(
            dim + 1, classes, dtype=torch.float64, device=self.device
        )  # the last row is the bias
        self.chosen = None

    def fit(self, x, labels, rows, ridge):
        """Go on from the present weights to the minimum on `rows` (n,) of x (N, D), labels (N,), for one weight w."""
        f, y, W = F.pad(x[rows], (0, 1), value=1.0), labels[rows], self.weights.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [W],
            max_iter=self.iterations,
            max_eval=2 * self.iterations,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(f @ W, y, reduction="sum") + ridge * W.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        self.weights = W.detach()

    def train(self, x, labels):
        """x (N, D), labels (N,) -> the chosen w."""
        x, labels, best, kept = x.to(self.device, torch.float64), labels.to(self.device), -1.0, None
        for ridge in common.progress(torch.logspace(5, -6, 45).tolist(), desc="L-BFGS", unit="fit"):
            self.fit(x, labels, self.rows, ridge)
            right = (self.scores(x[self.held]).argmax(1) == labels[self.held]).double().mean().item()
            if right > best:
                best, kept = right, (ridge, self.weights)
        self.chosen, self.weights = kept
        self.fit(x, labels, torch.cat([self.rows, self.held]), self.chosen)
        return self.chosen

    def scores(self, x):  # (M, D) -> (M, C)
        return F.pad(x.to(self.device, torch.float64), (0, 1), value=1.0) @ self.weights


def fit(model, sample, epochs, optimizer, generator, scheduler=None, batch_size=256, desc="MLP"):
    """Train a model on what sample(epoch) gives, features (N, D) and targets: (N,) int64 classes, cross-entropy, or
    (N, K) numbers, squared error."""
    for epoch in common.progress(range(epochs), desc=desc, unit="epoch"):
        x, target = sample(epoch)
        for batch in torch.randperm(len(x), generator=generator).split(batch_size):
            batch = batch.to(x.device)
            loss = (F.cross_entropy if target.dtype == torch.int64 else F.mse_loss)(model(x[batch]), target[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
    return model.requires_grad_(False)


def linear_schedule(train, target, generator, epochs=100):
    """CIPER's linear readout. Features (N, D); target (N,) int64 classes, cross-entropy, or (N, K) numbers, squared
    error -> a layer: (M, D) -> scores or predictions (M, K)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        readout = nn.Linear(
            train.shape[1], int(target.max()) + 1 if target.dtype == torch.int64 else target.shape[1]
        ).to(train.device)
    optimizer = torch.optim.SGD(readout.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-6)
    return fit(
        readout,
        lambda _: (train, target),
        epochs,
        optimizer,
        generator,
        torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.3),
        desc="linear readout",
    )


class StepsProbe(Shared):
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
    """The closed form beside it: features (N, D), (M, D); target (N, K), or (N,) int64 as one-hot -> (M, K), in
    float64."""
    target = F.one_hot(target) if target.dtype == torch.int64 else target
    with_bias = lambda x: F.pad(x.cpu().double(), (0, 1), value=1.0)
    return with_bias(test) @ torch.linalg.lstsq(with_bias(train), target.cpu().double(), driver="gelsd").solution


def r2_scores(target, predicted):
    """R^2 of (N, K) targets: "flat", SIE's, against one mean over all N K entries, and "uniform", the mean over the K
    dimensions of each one's own R^2. A constant can score above 0 in the first (0.229 on the quaternions of
    3DIEBench)."""
    target, predicted = target.cpu().double(), predicted.cpu().double()
    error = (target - predicted).square()
    flat = 1 - error.sum() / (target - target.mean()).square().sum().clamp(min=1e-12)
    uniform = (1 - error.sum(0) / (target - target.mean(0)).square().sum(0).clamp(min=1e-12)).mean()
    return dict(flat=flat.item(), uniform=uniform.item())


class Standardise(nn.Module):
    """Some `columns` of features (N, ..., D) less their mean, over their standard deviation, flattened: the first
    layer of an MLP.

    Mean and deviation of each dimension are those of `x`, the training features (of pairs (N, 2, D): of both views
    together). An MLP can represent the same functions without them, but Adam does not find them: trained encoders add
    a common offset and leave what differs between two views a few percent of the variance. Dimensions that do not
    vary are left out."""

    def __init__(self, x, columns):
        super().__init__()
        std, mean = torch.std_mean(x[..., columns].flatten(0, -2), 0, correction=0)  # (D,)
        self.columns, self.mean = columns, mean
        self.std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # less is rounding

    def forward(self, x):
        return ((x[..., self.columns] - self.mean) / self.std).flatten(1)


def mlp_probe(sample, outputs, epochs, generator, columns=slice(None)):
    """A 3-layer MLP D-1024-1024-K, ReLU, Adam at a constant rate of 1e-3, batches of 256 [SIE], on `columns` of
    standardised features (SIE's are raw; it takes 25 times as many steps). sample(epoch) -> (features (N, D) or pairs
    of them (N, 2, D), targets: (N, K) numbers or (N,) int64 classes), the same or others each epoch -> the trained
    MLP: features (M, ...) -> (M, K)."""
    x = sample(0)[0]
    first = Standardise(x, columns)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        layers = (
            nn.Linear(first(x[:1]).shape[1], 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, outputs),
        )
    mlp = nn.Sequential(first, *layers).to(x.device)
    fit(mlp, sample, epochs, torch.optim.Adam(mlp.parameters(), lr=1e-3), generator)
    return lambda x: torch.cat([mlp(rows) for rows in x.split(8192)])


def warn_of_few_steps(flag, epochs, images):
    """One line where an MLP takes so few steps that its score may tell of the optimiser and not of the features."""
    steps = epochs * -(-images // 256)
    if steps < 600 and common.rank() == 0:
        print(
            f"{flag} {epochs}: {steps} steps of the MLP may be too few to converge; 600 or more are safe",
            file=sys.stderr,
        )


def stratified(labels, share, generator, allowed=None):
    """Rows of a share of every class, one at least, at random among those `allowed` (N,), or all: (n,)."""
    rows = []
    for c in labels.unique():
        there = torch.nonzero((labels == c) & (True if allowed is None else allowed))[:, 0]
        rows.append(
            there[torch.randperm(len(there), generator=generator)[: max(1, round(share * int((labels == c).sum())))]]
        )
    return torch.cat(rows)


def hold_out(data, generator, share=0.1):
    """(N,) bool: a share of the images, or of the objects where there are several images of one, on which settings
    are chosen."""
    groups = torch.arange(len(data)) if data.groups is None else data.groups
    objects = groups.unique()
    return torch.isin(
        groups, objects[torch.randperm(len(objects), generator=generator)[: max(1, int(share * len(objects)))]]
    )


# ----------------------------------------------------------------------------------------------------------------------
# What r2 predicts
# ----------------------------------------------------------------------------------------------------------------------


class SecondView:
    """An op that makes the second views of a set: uint8 images, centre-cropped and then transformed as one of the
    families does, by quarter turns, by mirroring, or by free rotations."""

    def __init__(self, name, size):
        self.name, self.size, self.centre = name, size, CenterCrop(size, interpolation="bicubic")
        turns = dict(
            quarters=Rot90,
            mirror=HorizontalFlip,
            turn90=partial(Affine, 90, interpolation="nearest"),
            turn180=partial(Affine, 180, interpolation="nearest"),
        )
        self.op = turns[name]() if name in turns else common.family(name, size)

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
        self.size, self.view = size, Compose([RandomResizedCrop(size), HorizontalFlip()])

    def __call__(self, images, params):
        return (self.view(images, params) * 255).round().clamp(0, 255).to(torch.uint8)


def evenly(n, most):
    """At most `most` of n rows, evenly spaced."""
    return torch.arange(min(most, n)) * n // min(most, n)


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
    """Scores (M, C), labels (M,) -> percent of test images whose class is the first, or among the first five; where
    classes hold unequally many images also the mean of the classes' own, as is usual on pets, aircraft and
    flowers."""
    labels = labels.to(scores.device)
    top = scores.sort(dim=1, descending=True, stable=True).indices[:, :5] == labels[:, None]  # (M, 5)
    sizes = labels.bincount(minlength=scores.shape[1])  # (C,)
    out = {name: 100 * top[:, 0].float().mean().item()}
    if scores.shape[1] > 5:
        out[f"{name} top-5"] = 100 * top.any(1).float().mean().item()
    if len(sizes[sizes > 0].unique()) > 1:
        out[f"{name} class mean"] = (
            100 * (labels[top[:, 0]].bincount(minlength=len(sizes)) / sizes)[sizes > 0].mean().item()
        )
    return out


@dataclasses.dataclass
class Case:
    """One encoder on one data set: what every task looks at. Features are extracted when a task first asks, and kept.

    All ranks encode, each its share; rank 0 alone holds the features and trains probes on them. In every task what
    follows `if common.rank()` is rank 0's, and nothing there waits for the others.
    """

    backbone: nn.Module
    state: dict  # of the checkpoint, without its tensors
    train: common.ImageSet
    test: common.ImageSet
    args: Args
    device: torch.device

    def __post_init__(self):
        self.seconds = {}  # what took how long

    @functools.cached_property
    def readers(self):
        """Of train and test images: their workers serve all tasks."""
        return tuple(common.Reader(data, self.args.workers) for data in (self.train, self.test))

    def features(self, data, **how):
        """`common.features` of the train or test images: (n, D), on rank 0."""
        return common.features(self.backbone, self.readers[data is self.test], self.device, amp=self.args.amp, **how)

    @functools.cached_property
    def x(self):
        """What linear probes look at, of train and test images: (N, W), (M, W)."""
        begin = time.monotonic()
        out = tuple(self.kept_features(data).to(self.device) for data in (self.train, self.test))
        self.seconds["features"] = time.monotonic() - begin
        return out

    def kept_features(self, data):
        """Those of --cache-dir, where there is one and it has them; rank 0 looks for all. Else they are extracted and
        kept."""
        path = x = None
        if self.args.cache_dir and common.rank() == 0:
            path = Path(self.args.cache_dir) / f"features-{self.fingerprint(data)}.pt"
            with contextlib.suppress(Exception):  # not there, or damaged: extracted anew
                kept = common.read_tensors(path)["x"]
                x = kept if len(kept) == len(data) else None
        width = common.by_rank_0(lambda: None if x is None else x.shape[1])
        if width is not None:
            return torch.empty(0, width) if x is None else x
        x = self.features(data, encode=self.backbone.last_blocks)
        if path:
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # another evaluation may write the same features
            try:
                with open(part, "wb") as f:
                    torch.save(dict(x=x), f)
                os.replace(part, path)
            except (OSError, RuntimeError) as e:  # a full disk is either
                part.unlink(missing_ok=True)
                say(f"--cache-dir {self.args.cache_dir}: features are not kept ({one_line(e)})")
        return x

    def fingerprint(self, data):
        """Of all that features depend on: code, weights, architecture, images, arithmetic."""
        digest, encoder = hashlib.blake2b(Path(common.__file__).read_bytes(), digest_size=12), self.backbone
        for path in data.paths if data.images is None else ():
            stat = os.stat(path)
            key = os.path.abspath(path), stat.st_size, stat.st_mtime_ns
            digest.update(repr(key).encode(errors="surrogateescape"))
        if data.images is not None:
            digest.update(data.images.cpu().numpy())
        versions = torch.__version__, torchvision.__version__, timm.__version__
        weights = self.state.get("sha256"), self.state.get("backbone")
        key = 2, *weights, encoder.mean, encoder.std, encoder.img_size, self.args.amp, self.device.type, *versions
        digest.update(repr(key).encode())
        return digest.hexdigest()

    @functools.cached_property
    def heads(self):
        """All linear probes that the tasks ask for, {name: probe}, trained side by side on one pass over the features
        an epoch: by rank 0, for all."""
        args, labels, width, heads, wanted = self.args, self.train.labels.to(self.device), self.x[0].shape[1], {}, {}
        choosing = args.linear == "lbfgs" or args.linear == "sgd" and len(args.linear_lrs) > 1
        held = (
            hold_out(self.train, common.rng(args.seed, "held out"))
            if choosing
            else torch.zeros(len(self.train), dtype=torch.bool)
        )
        if {"linear", "rotation"} & set(args.tasks):
            wanted["linear"] = (~held).nonzero()[:, 0]
        if "fewshot" in args.tasks and args.fewshot == "linear":
            wanted |= {f"fewshot {share:.0%}": self.few(share, ~held) for share in SHARES}
        for (name, rows), (suffix, columns) in itertools.product(wanted.items(), self.parts(width)):
            x, generator, chooses = self.x[0][:, columns], common.rng(args.seed, name), held.nonzero()[:, 0]
            if args.linear == "sgd":
                head = LinearProbe(
                    x.shape[1],
                    len(self.train.classes),
                    rows,
                    chooses,
                    args.linear_lrs,
                    args.linear_epochs,
                    generator,
                    self.device,
                )
            elif args.linear == "lbfgs":
                head = RidgeProbe(x.shape[1], len(self.train.classes), rows, chooses, self.device)
            else:
                head = StepsProbe(x.shape[1], rows, labels, generator)
            if args.linear != "sgd" and common.rank() == 0:
                head.train(x, labels)
            heads[name + suffix], head.columns = head, columns
        if args.linear == "sgd":
            self.train_together(heads, labels)
        for head in heads.values():
            head.share()
        return heads

    def train_together(self, heads, labels):
        """LinearProbes {name: probe}, on the labels (N,) of the train images."""
        args = self.args
        if args.augment and common.rank() == 0:
            print(
                f"  {args.linear_epochs} epochs of augmented views: {args.linear_epochs * len(self.train):,} "
                "images to encode",
                file=sys.stderr,
            )
        for epoch in common.progress(range(args.linear_epochs), desc="linear probes", unit="epoch"):
            x = self.augmented(epoch) if args.augment else self.x[0]
            for head in heads.values() if common.rank() == 0 else ():
                head.epoch(x[:, head.columns], labels)
        for head in heads.values() if common.rank() == 0 else ():
            head.choose(self.x[0][:, head.columns], labels)

    def augmented(self, epoch):
        """Features of random crops and flips of the train images (N, W), others each epoch."""
        op = RandomView(self.backbone.img_size)
        draws = op.view.sample(len(self.train), common.rng(self.args.seed, "augmented", epoch))
        how = dict(encode=self.backbone.last_blocks, transform=op, params=draws, name="augmented")
        return self.features(self.train, **how).to(self.device)

    def few(self, share, allowed=None):
        """The rows of a share of each class: (n,)."""
        return stratified(self.train.labels, share, common.rng(self.args.seed, "fewshot", share), allowed)

    @property
    def y(self):
        """The representation alone: (N, D), (M, D)."""
        return tuple(x[:, -self.backbone.dim :] for x in self.x)

    @property
    def feature(self):
        """What x is, for the protocol."""
        name = self.backbone.feature
        return (
            name
            if self.x[0].shape[1] == self.backbone.dim
            else f"[CLS] of the last {self.x[0].shape[1] // self.backbone.dim} blocks"
        )

    @functools.cached_property
    def tuned(self):
        """The fine-tuned encoder: x -> class scores."""
        return fine_tune(self)

    @property
    def tuning(self):
        args = self.args
        return dict(
            epochs=args.finetune_epochs,
            batch_size=256,
            lr=args.finetune_lr,
            weight_decay=1e-4,
            crop_scale=(0.08, 1.0),
            feature=self.feature,
        )

    def parts(self, width):
        """What --part asks for of features of some width: [(what to add to the names of its results, its columns)].
        The equivariant part are the last dimensions, of the last block alone; encoders that do not split have
        none."""
        rest = self.backbone.dim - (self.backbone.inv or 0)
        columns = dict(all=slice(None)) | (
            {} if self.backbone.inv is None else dict(inv=slice(width - rest), equi=slice(width - rest, None))
        )
        return [("" if part == "all" else f" ({part})", columns[part]) for part in self.args.part if part in columns]

    @property
    def fitting(self):
        """How linear probes were trained, for the protocol; the flags are recorded as well."""
        return dict(
            optimizer=self.args.linear,
            batch_size=256,
            feature=self.feature,
            held_out=0.1,
            chosen={name: head.chosen for name, head in self.heads.items()},
        )

    def read(self, name, x):
        """What the linear probe `name` says of features x (M, W), for each part: {name: (M, C)}."""
        return {
            name + suffix: self.heads[name + suffix].scores(x[:, columns]) for suffix, columns in self.parts(x.shape[1])
        }


def knn(case):
    results, (y, y_test) = {}, case.y
    if common.rank():
        return None
    for suffix, columns in case.parts(y.shape[1]):
        scores = common.knn(
            y[:, columns], case.train.labels, y_test[:, columns], case.args.knn_k, classes=len(case.train.classes)
        )
        results |= accuracies(f"knn{suffix}", scores, case.test.labels)
    return results, dict(k=case.args.knn_k, temperature=0.07)


def linear(case):
    results, _ = {}, case.heads
    if common.rank():
        return None
    for name, scores in case.read("linear", case.x[1]).items():
        results |= accuracies(name, scores, case.test.labels)
    return results, case.fitting


def mlp(case):
    """Accuracy of an MLP on the classes, in percent, on test images; in the protocol also on those that train it."""
    results, on_train, labels, (x, x_test) = {}, {}, case.train.labels.to(case.device), case.x
    if common.rank():
        return None
    warn_of_few_steps("--mlp-epochs", case.args.mlp_epochs, len(x))
    for suffix, columns in case.parts(x.shape[1]):
        probe = mlp_probe(
            lambda _: (x, labels),
            len(case.train.classes),
            case.args.mlp_epochs,
            common.rng(case.args.seed, "mlp"),
            columns,
        )
        results |= accuracies(f"mlp{suffix}", probe(x_test), case.test.labels)
        on_train |= accuracies(f"mlp{suffix}", probe(x), case.train.labels)
    return results, dict(epochs=case.args.mlp_epochs, feature=case.feature, train=on_train) | MLP


def fewshot(case):
    images = {f"fewshot {share:.0%}": len(case.few(share)) for share in SHARES}
    results, scores, tuned = {}, {}, case.args.fewshot == "finetune"
    for name, share in zip(images, SHARES if tuned else ()):
        scores[name] = case.features(case.test, encode=fine_tune(case, rows=case.few(share)), name=name)
    details = case.tuning if tuned else case.fitting
    if common.rank():
        return None
    for name in () if tuned else images:
        scores |= case.read(name, case.x[1])
    for name, values in scores.items():
        results |= accuracies(name, values, case.test.labels)
    return results, dict(details, images=images)


def r2(case):
    """R^2 of what lies between two views, on test pairs; beside it, in the protocol, on training pairs: near 0 in
    both is not fitted or not there, high on training pairs alone is overfitted."""
    scores, args = {}, case.args
    targets = args.r2_targets or (POSES if "rotation" in case.train.factors else FAMILIES)
    warn_of_few_steps(
        "--r2-epochs", args.r2_epochs, min(len(case.train), 100_000 if set(targets) <= set(POSES) else args.r2_images)
    )
    for target in targets:
        drawn = (pairs_of_poses if target in POSES else pairs_of_images)(target, case)
        if common.rank():
            continue
        sample, test_pairs, test_targets = drawn
        pairs, answers = sample(0)
        for suffix, columns in case.parts(case.backbone.dim):
            probe = mlp_probe(sample, answers.shape[1], args.r2_epochs, common.rng(args.seed, "r2", target), columns)
            scores[target + suffix] = r2_scores(test_targets, probe(test_pairs)) | dict(
                train=r2_scores(answers, probe(pairs))["flat"]
            )
    return {f"r2 {k}": v["flat"] for k, v in scores.items()}, dict(
        epochs=args.r2_epochs, images=args.r2_images, both=scores
    ) | MLP


def layers(case):
    """SER's Table 5: which quarter turn, and whether a flip, lies between two views, by an MLP on the pair of their
    mean tokens after a block, each token normalised. One draw for each image."""
    args, backbone, results, on_train = case.args, case.backbone, {}, {}
    warn_of_few_steps("--r2-epochs", args.r2_epochs, min(len(case.train), args.r2_images))
    chosen = args.layers or tuple(
        k for k in range(1, backbone.depth + 1) if backbone.depth <= 5 or k == 1 or k % 3 == 0
    )
    mean_tokens = lambda z: F.layer_norm(z.float(), z.shape[-1:]).mean((1, 2))  # (n, h, w, D) -> (n, D)
    encode = lambda x: torch.cat([mean_tokens(z) for z in backbone.tokens(x, chosen)], 1)
    with torch.no_grad():
        widths = [
            z.shape[-1]
            for z in backbone.tokens(
                torch.zeros(1, 3, backbone.img_size, backbone.img_size, device=case.device), chosen
            )
        ]
    for name, kind, key, classes in (("rotation", "quarters", "rot90", 4), ("flip", "mirror", "flip", 2)):
        sides = []
        for data, most, seed in (
            (case.train, args.r2_images, args.seed),
            (case.test, max(2, args.r2_images // 2), args.seed + 1),
        ):
            rows, view = evenly(len(data), most), SecondView(kind, backbone.img_size)
            params = view.sample(len(data), seed)
            how = dict(encode=encode, params=params, rows=rows, name=f"{name} by layer")
            views = [case.features(data, transform=t, **how).to(case.device) for t in (None, view)]
            sides.append((torch.stack(views, 1), params[key][rows].long().to(case.device)))  # (n, 2, sum of D), (n,)
        if common.rank():
            continue
        for k, (pairs, answers), (test_pairs, test_answers) in zip(
            chosen, *([(z, t) for z in pairs.split(widths, 2)] for pairs, t in sides)
        ):
            probe = mlp_probe(
                lambda _, side=(pairs, answers): side, classes, args.r2_epochs, common.rng(args.seed, name, k)
            )
            right = lambda x, y, probe=probe: 100 * (probe(x).argmax(1) == y).float().mean().item()
            results[f"{name} @{k}"], on_train[f"{name} @{k}"] = right(test_pairs, test_answers), right(pairs, answers)
    return results, dict(layers=chosen, epochs=args.r2_epochs, images=args.r2_images, train=on_train) | MLP


def equivariance(case):
    """SER's score: the cosine of rho_g f(x) and f(g x), tokens after the last block and the final norm, mean over
    tokens, images and g: quarter turns and flips other than the identity, and for ViTs other grids (images resized
    with antialiasing), to which rho_g resamples the map. The paper draws g1 and g2 at random; if its g = g2 g1^-1 may
    be the identity, which scores 1, a score s here is (1 + 3 s) / 4 there under turns and (1 + s) / 2 under flips.
    Beside it, with f of another image, and with the mean token taken off both sides: a map that is the same
    everywhere scores 1, and these tell."""
    args, backbone, results = case.args, case.backbone, {}
    rows, n, layer = evenly(len(case.test), 1000), len(case.test), backbone.depth
    generator, norm = common.rng(args.seed, "equivariance"), getattr(backbone, "norm", nn.Identity())
    tokens = lambda x: norm(backbone.tokens(x, layer))

    def maps(transform=None, params=None, act=lambda x: x, rows=rows, shape=None):
        how = dict(transform=transform, params=params, rows=rows, name="equivariance")
        flat = case.features(case.test, encode=lambda x: tokens(act(x)).flatten(1), **how)
        return flat.unflatten(1, shape or here)  # (n, h, w, D)

    with torch.no_grad():
        blank = torch.zeros(1, 3, backbone.img_size, backbone.img_size, device=case.device)
        here = backbone.tokens(blank, layer).shape[1:]
    quarters = 1 + torch.randint(3, (n,), generator=generator)
    turn = lambda z: torch.stack([m.rot90(int(k), (0, 1)) for m, k in zip(z, quarters[rows])])
    turned = maps(SecondView("quarters", backbone.img_size), dict(rot90=quarters))
    mirrored, z = maps(SecondView("mirror", backbone.img_size), dict(flip=torch.ones(n, dtype=torch.bool))), maps()
    scaled = []  # maps on any grid of patches: the area 0.7 to 1.3 times that of training, one for 100 images
    for chunk in torch.arange(len(rows)).split(100) if hasattr(backbone, "patch_size") else ():
        grid = GridResize(backbone.patch_size, backbone.grid)
        params = grid.sample(1, generator)
        size = tuple(int(params[name][0]) for name in ("grid_h", "grid_w"))
        scaled.append((chunk, size, maps(act=partial(grid, params=params), rows=rows[chunk], shape=(*size, here[-1]))))
    if common.rank():
        return None
    others = z.roll(len(z) // 2, 0)  # far away in a sorted set: another object, mostly another class
    cosine = lambda a, b: F.cosine_similarity(a, b, dim=3).mean().item()

    def note(name, pairs):  # [(rho_g f(x), rho_g f(other image), f(g x))] in chunks of one grid each
        share = lambda score: sum(score(*maps) * len(maps[0]) for maps in pairs) / len(rows)
        results.update(
            {
                f"equi {name}": share(lambda moved, other, there: cosine(moved, there)),
                f"equi {name} shuffled": share(lambda moved, other, there: cosine(other, there)),
                f"equi {name} centred": share(
                    lambda moved, other, there: cosine(moved - moved.mean((0, 1, 2)), there - there.mean((0, 1, 2)))
                ),
            }
        )

    note("rotation", [(turn(z), turn(others), turned)])
    note("flip", [(z.flip(2), others.flip(2), mirrored)])
    if scaled:
        resample = lambda m, size: F.interpolate(m.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)
        moved = lambda maps, chunk, size: resample(maps[chunk], size)
        note("scale", [(moved(z, *at), moved(others, *at), there) for *at, there in scaled])
    return results, dict(images=len(rows), layer=layer, tokens="after the final norm")


def draw_view(view, n, generator):
    """One view of every image of a batch, for the loader."""
    return {"1": (torch.arange(n), view.sample(n, generator))}


class Classifier(nn.Module):
    """A linear layer on what linear probes look at: x -> scores."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return self.head(self.encoder.last_blocks(x))


def fine_tune(case, quarters=False, rows=None):
    """The encoder trained on with a linear layer on what linear probes look at, for the classes of all images or of
    some `rows`, or to tell quarter turns: SGD with momentum 0.9, weight decay 1e-4, cosine to 0, one rate for both,
    random crops and flips [CLeVER] -> x -> scores."""
    args, device, train = case.args, case.device, case.train if rows is None else case.train.subset(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.rng(args.seed, "finetune").initial_seed())
        model = copy.deepcopy(case.backbone).requires_grad_(True).train()
        head = nn.Linear(case.x[0].shape[1], 4 if quarters else len(case.train.classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    model = common.batchnorm_over_ranks(Classifier(model, head), device).to(device)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    batch = min(256, len(train)) // common.world_size() * common.world_size()
    if batch < 2:
        common.die(f"--tasks finetune: {len(train)} images are too few for {common.world_size()} processes")
    encoder, ddp = model.encoder, common.distributed(model)
    view = Compose(
        [
            RandomResizedCrop(encoder.img_size),
            HorizontalFlip(),
            *[Rot90()] * quarters,
            Normalize(encoder.mean, encoder.std),
        ]
    )
    run = SimpleNamespace(seed=args.seed, batch_size=batch, workers=args.workers, epochs=args.finetune_epochs)
    loader = common.Loader(train, {"1": view}, partial(draw_view, view, batch), run, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    batches = common.progress(
        loader.batches(range(loader.total_steps)), total=loader.total_steps, desc="fine-tuning", unit="step"
    )
    for step, (views, params, rows) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = common.cosine(step / loader.total_steps, args.finetune_lr * batch / 256, 0.0)
        with common.autocast(device, args.amp):
            scores = ddp(views["1"])
        labels = params["1"]["rot90"] if quarters else train.labels[rows["1"]]
        loss = F.cross_entropy(scores.float(), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


def finetune(case):
    scores = case.features(case.test, encode=case.tuned, name="fine-tuned")
    return None if common.rank() else (accuracies("finetune", scores, case.test.labels), case.tuning)


def rotation(case):
    """CLeVER's Tables 6 and 7: accuracy of the linear probe on test images turned by up to 90 and 180 degrees (mean
    of three draws), and of one that tells the quarter turn of an image (`4-fold`: trained on one of each image, read
    on all four). Beside `finetune` also of encoders fine-tuned for either."""
    args, size, results, n, m = case.args, case.backbone.img_size, {}, len(case.train), len(case.test)
    seeds = range(args.seed, args.seed + 3)
    views = SecondView("turn90", size), SecondView("turn180", size)
    draws = [(view, view.sample(m, seed)) for view in views for seed in seeds]
    quarters, tuned = SecondView("quarters", size), ()
    fourfold = [(quarters, dict(rot90=torch.full((m,), k))) for k in range(4)]
    answers = quarters.sample(n, args.seed)

    def seen(data, views, encode=case.backbone.last_blocks):  # (views n, D)
        how = [dict(encode=encode, transform=view, params=params, name=view.name) for view, params in views]
        return torch.cat([case.features(data, **h).to(case.device) for h in how])

    x_turned, x, x_test = seen(case.test, draws), seen(case.train, [(quarters, answers)]), seen(case.test, fourfold)
    details = case.fitting
    if "finetune" in args.tasks:
        tuned = seen(case.test, draws, case.tuned), seen(case.test, fourfold, fine_tune(case, quarters=True))
    if common.rank():
        return None

    def note(name, suffix, scores):
        right = (scores.argmax(1).cpu().view(6, m) == case.test.labels).float().mean(1)  # of each draw
        results[f"{name} ±90°{suffix}"], results[f"{name} ±180°{suffix}"] = (
            100 * right[:3].mean().item(),
            100 * right[3:].mean().item(),
        )

    share = lambda scores: 100 * (scores.argmax(1).cpu() == torch.arange(4).repeat_interleave(m)).float().mean().item()
    rates, k = {}, answers["rot90"].to(case.device)
    for name, scores in case.read("linear", x_turned).items():
        note("linear", name.removeprefix("linear"), scores)
    for suffix, columns in case.parts(x.shape[1]):
        scores, rates["4-fold" + suffix] = linear_probe(
            x[:, columns],
            k,
            x_test[:, columns],
            4,
            args.linear_lrs,
            args.linear_epochs,
            common.rng(args.seed, "4-fold"),
        )
        results["4-fold" + suffix] = share(scores)
    if tuned:
        note("finetune", "", tuned[0])
        results["4-fold finetune"] = share(tuned[1])
    return results, dict(details, draws=3, fourfold=dict(optimizer="sgd", augment=False, chosen=rates))


TASKS = dict(
    knn=knn,
    linear=linear,
    mlp=mlp,
    finetune=finetune,
    fewshot=fewshot,
    r2=r2,
    layers=layers,
    equivariance=equivariance,
    rotation=rotation,
    latents=lambda case: latents(case.train, case.test, *case.y, case.args),
)


class Timm(nn.Module):
    """A timm model in the shape of our encoders."""

    feature = "final representation"

    def __init__(self, model):
        super().__init__()
        config = model.pretrained_cfg
        self.model, self.dim, self.inv, self.mean, self.std = (
            model,
            model.num_features,
            None,
            tuple(config["mean"]),
            tuple(config["std"]),
        )
        self.img_size, self.depth, self.norm = (
            config["input_size"][-1],
            len(model.feature_info),
            getattr(model, "norm", nn.Identity()),
        )

    def forward(self, x):
        return self.model(x)

    def last_blocks(self, x):
        """The [CLS] of the last four blocks of a ViT, as of ours; of other models the representation."""
        if getattr(self.model, "cls_token", None) is None or getattr(self.model, "global_pool", "") != "token":
            return self.model(x)
        return torch.cat(
            [
                prefix[:, 0]
                for _, prefix in self.model.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
            ],
            1,
        )

    def tokens(self, x, after):
        """As of our encoders: maps (B, h, w, C) after blocks or stages, counted from 1."""
        layers = after if isinstance(after, tuple) else (after,)
        maps = self.model.forward_intermediates(
            x, indices=[k - 1 for k in layers], intermediates_only=True, output_fmt="NCHW", norm=False
        )
        maps = [z.permute(0, 2, 3, 1) for z in maps]
        return maps if isinstance(after, tuple) else maps[0]


def load(path):
    """A checkpoint, or timm:NAME with timm's weights, or timm:NAME@FILE with those of a file, without classifier ->
    (encoder, state without tensors). A file is read once, so that its `sha256` is of what was loaded."""
    name, _, file = path.removeprefix("timm:").partition("@") if path.startswith("timm:") else (None, None, path)
    try:
        content = io.BytesIO(Path(file).read_bytes()) if file else None
    except OSError as e:
        common.die(f"{path}: cannot be read ({e.strerror})")
    if name is None:
        encoder, state = common.load_backbone(path, content)
        seen = state["train_state"].get("data")
        state = {k: state[k] for k in ("method", "args", "step", "backbone")} | dict(seen=seen)
    else:
        encoder, own = load_timm(path, name, file, content), dict(data=None, data_dir=None, seed=0, arch=path)
        state = dict(method="timm", step=0, args=own, backbone=dict(arch=name, inv=None), seen=None)
    return encoder, state | dict(sha256=hashlib.sha256(content.getbuffer()).hexdigest() if file else path)


def load_timm(path, name, file, content):
    """timm's model NAME, with its own weights or those that `content`, the bytes of a file, holds."""
    if not timm.is_model(name):
        common.die(
            f"{path}: timm has no model {name}; timm.list_models('*{name[:6]}*') lists those that are called alike"
        )
    notes, weights = read_weights(path, file, content) if file else ({}, None)
    try:
        sizes = {k: v for k, v in notes.pop("timm", {}).items() if isinstance(v, (int, float)) and k != "num_classes"}
        create = partial(timm.create_model, name, pretrained=not file, num_classes=0, **sizes)
        try:
            model = create(dynamic_img_size=True)  # ViTs then take images of any size, as ours do
        except TypeError:  # other models have no such argument
            model = create()
        side = notes.pop("img_size", None)
        model.pretrained_cfg |= notes | (dict(input_size=(3, side, side)) if side else {})
        if file:
            classifier = tuple(f"{c}." for c in (model.pretrained_cfg["classifier"], "head") if isinstance(c, str))
            model.load_state_dict(
                {k: v for k, v in weights.items() if not k.startswith(classifier) or k in model.state_dict()}
            )
    except Exception as e:  # no network, no such weights, or weights that do not fit: timm and torch differ
        common.die(f"{path}: {'its weights cannot be read safely' if 'weights_only' in str(e) else one_line(e)}")
    if not common.finite(model.state_dict()):
        common.die(f"{path}: its weights hold NaN or infinity")
    return Timm(model).eval().requires_grad_(False)


def read_weights(path, file, content):
    """The bytes of a .safetensors, or of what torch.save writes -> (what our own backbone.safetensors says of itself,
    state dict). Damaged files are refused, and those that only unsafe readers would read."""
    try:
        if not file.endswith(".safetensors"):
            held = common.read_tensors(path, content)
            held = next((held[k] for k in ("state_dict_ema", "model_ema", "state_dict", "model") if held.get(k)), held)
            return {}, timm.models.clean_state_dict(held)
        content = content.getvalue()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        notes = {k: json.loads(v) for k, v in header.items() if k in ("timm", "mean", "std", "img_size")}
        return notes, safetensors.torch.load(content)
    except Exception:  # a dozen different types
        common.die(f"{path}: {file} is damaged, or neither .safetensors nor a state dict as torch.save writes it today")


@functools.lru_cache(maxsize=2)
def load_splits(name, root, *how):
    """Train and test images; checkpoints of one call mostly share theirs."""
    try:
        train, test = (common.load_data(name, root, split, *how) for split in ("train", "test"))
    except OSError as e:
        common.die(f"--data-dir {root}: {e.strerror or e}")
    if test is None:
        common.die(f"--data-dir {root}: has no test split; probes need train/ and val/ or test/{note_of(train)}")
    if common.rank() == 0 and (same := same_files(train, test)):
        say(f"--data-dir {root}: {len(same)} of {len(test):,} test images are training images too, such as {same[0]}")
    return train, test


def note_of(*sets):
    """Why a set has no labels or no test split, where it says so."""
    return "".join(f" ({data.note})" for data in sets if data.note)


def same_files(train, test, most=1000):
    """Test files, of `most` evenly spaced ones, that equal the training file of the same name and name of folder."""
    if train.paths is None or test.paths is None:
        return []
    name = lambda path: os.sep.join(str(path).rsplit(os.sep, 2)[-2:])
    there, same = {name(test.paths[i]): test.paths[i] for i in evenly(len(test), most).tolist()}, []
    with contextlib.suppress(OSError):  # what cannot be read is named when it is needed
        for path in train.paths:
            other = there.get(name(path))
            if other and filecmp.cmp(path, other, shallow=False):
                same.append(other)
    return same


def open_case(path, encoder, state, args, device):
    """A loaded checkpoint, or timm model, and its data, checked for what the tasks need -> Case."""
    name = args.data or state["args"]["data"]
    root = args.data_dir or (
        state["args"]["data_dir"] if name == state["args"]["data"] else None
    )  # another set lies elsewhere
    sessions, labelled = state["args"].get("sessions", (1, 2)), set(args.tasks) - {"r2", "layers", "equivariance"}
    if "all" not in args.part and encoder.inv is None:
        common.die(
            f"--part {' '.join(args.part)}: {path} does not split its representation; only encoders of recon_xattn.py"
            " and clever.py do (beside all, others may stand in the table)"
        )
    train, test = load_splits(name, root, encoder.img_size, args.skip_corrupt, args.workers, tuple(sessions))
    if labelled and (train.labels is None or test.labels is None):
        common.die(
            f"--tasks {' '.join(args.tasks)}: {root} has no classes (one folder per class); only r2, layers and"
            f" equivariance can do without{note_of(train, test)}"
        )
    elif labelled and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        common.die(
            f"--data-dir {root}: its train and test folders have different classes ({len(train.classes)} and "
            f"{len(test.classes)}; {odd} is in one of them only)"
        )
    if state["seen"] and not args.data and not args.data_dir and state["seen"] != (there := train.fingerprint()):
        common.die(
            f"{path}: was trained on other images than {root or name} holds now"
            f" ({common.difference(state['seen'], there)}); --data-dir, given by hand, probes on others"
        )
    if args.known_fraction < 1:
        if train.labels is None:
            common.die(f"--known-fraction {args.known_fraction}: a share of every class, but {root} has no classes")
        train = common.known_part(train, args.known_fraction, state["args"]["seed"])
    if "rotation" not in train.factors and set(args.r2_targets or ()) & set(POSES):
        common.die(f"--r2-targets {' '.join(args.r2_targets)}: {name} has no poses; choose among {', '.join(FAMILIES)}")
    if args.layers and max(args.layers) > encoder.depth:
        common.die(f"--layers {' '.join(map(str, args.layers))}: {path} has {encoder.depth}")
    if "finetune" in (*args.tasks, args.fewshot) and common.world_size() > 1 and isinstance(encoder, Timm):
        common.die(f"{path}: models of timm are fine-tuned on one process only; leave torchrun out")
    state |= dict(data=name, data_dir=root)
    return Case(encoder.to(device), state, train.to(device), test.to(device), args, device)


def begin(path, args_for, device, evaluation):
    """The Case of a checkpoint, args_for(what it says of itself) what is asked of it; None on all ranks where it
    fails on one."""
    loaded = evaluation.attempt(path, partial(load, path), together=True)

    def opened(encoder, state):
        complaint = lambda a, rank, b: f"{path}: rank {rank} holds another file than rank 0; copy it to all machines"
        common.same_on_all_ranks(state["sha256"], complaint)
        return open_case(path, encoder, state, args_for(state), device)

    return loaded and evaluation.attempt(path, partial(opened, *loaded), together=True)


def run_task(name, case):
    """What rank 0 finds, on every rank: (results, what the protocol says)."""
    found = TASKS[name](case)
    return common.by_rank_0(lambda: found)


def probe(path, case, evaluation, row):
    """All tasks on one checkpoint: each adds to the `row` of the table, and leaves a record, as soon as it is
    finished."""
    backbone, state, args, seconds = case.backbone, case.state, case.args, case.seconds
    protocol = dict(
        protocol=args.protocol,
        data=state["data"],
        data_dir=state["data_dir"],
        amp=args.amp,
        device=case.device.type,
        train_images=len(case.train),
        test_images=len(case.test),
        view=f"centre crop {backbone.img_size} px",
        dim=backbone.dim,
        inv=backbone.inv,
    )
    protocol |= dict(sessions=state["args"].get("sessions", (1, 2))) if state["data"] == "core50" else {}
    protocol |= (
        dict(known_fraction=args.known_fraction, known_seed=state["args"]["seed"]) if args.known_fraction < 1 else {}
    )
    for task in args.tasks:
        begin, before = time.monotonic(), seconds.get("features", 0.0)
        finished = evaluation.attempt(f"{path}: {task}", partial(run_task, task, case))
        if finished is None:
            continue
        values, details = finished
        row |= values
        seconds[task] = time.monotonic() - begin - (seconds.get("features", 0.0) - before)
        took = {k: v for k, v in seconds.items() if k in ("features", task)}
        append_record(path, state, args, values, protocol | {task: details, "seconds": took})
    if row:
        where = " ".join(v for v in (state["data"], state["data_dir"]) if v)
        say(f"{path}: {where}; {', '.join(f'{k} {v:.1f} s' for k, v in seconds.items())}")


def every_second_object(data):
    """(N,) bool: the images of every second object of each class."""
    chosen = torch.zeros(len(data), dtype=torch.bool)
    for c in data.labels.unique():
        chosen |= torch.isin(data.groups, data.groups[data.labels == c].unique()[1::2])
    return chosen


def latents(train, test, x, x_test, args):
    """What a linear readout of one image tells. Sets and their features (N, D), (M, D) -> (results, protocol)."""
    results, details = {}, {}
    if common.rank():
        return None

    def accuracy(name, x, y, x_test, y_test):
        for suffix, scores in (
            ("", linear_schedule(x, y.to(x.device), common.rng(args.seed, name))(x_test)),
            (" lstsq", least_squares(x, y, x_test)),
        ):
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
            fit, read, f, f_test = (
                test.subset((~second).nonzero()[:, 0]),
                test.subset(second.nonzero()[:, 0]),
                x_test[~second],
                x_test[second],
            )
        view, mean, std = fit.factors["view"], fit.factors["view"].mean(0), fit.factors["view"].std(0, correction=0)
        target, centre = ((view - mean) / std).to(f.device), f.mean(0)
        scale = (f - centre).square().sum(1).mean().sqrt()  # one number keeps what is linear in the features
        a, b = (f - centre) / scale, (f_test - centre) / scale
        for suffix, predicted in (
            ("", linear_schedule(a, target, common.rng(args.seed, "view"))(b)),
            (" lstsq", least_squares(a, target, b)),
        ):
            error = predicted.cpu() * std + mean - read.factors["view"]  # (m, 3)
            results["view err" + suffix] = 100 * (error / std).square().mean().item()
            turned = (error[:, 0] + 180) % 360 - 180
            details["rmse" + suffix] = dict(
                zip(("azimuth", "elevation", "distance"), error.square().mean(0).sqrt().tolist()),
                azimuth_circular=turned.square().mean().sqrt().item(),
            )
    return results, dict(
        epochs=100,
        batch_size=256,
        lr=1.0,
        session_read="every fifth test image",
        view_read="every second test object" if "session" in test.factors else "test",
        **details,
    )


def pairs_of_poses(target, case):
    """Two views of an object and `target` between them, on rank 0: sample(epoch) of (pairs (n, 2, D), targets (n, K)),
    test pairs, test targets. Each epoch shows as many random pairs, of different views, as there are images, 100,000 at
    most (SIE: one an object); on test images one fixed draw, the same for every checkpoint."""
    y, y_test = case.y
    if common.rank():
        return None

    def sample(data, y, *key):
        g = common.rng(case.args.seed, *key)
        i, j = torch.arange(len(data)), partners(data.groups, g)
        if len(data) > 100_000:
            i = torch.randperm(len(data), generator=g)[:100_000]
            j = j[i]
        return torch.stack([y[i], y[j]], 1), common.pose_target(target, data.factors, i, j).to(
            y.device
        )  # (n, 2, D), (n, K)

    return lambda epoch: sample(case.train, y, "pairs", epoch), *sample(case.test, y_test, "test pairs")


def pairs_of_images(target, case):
    """An image and its transformed self, on evenly spaced images, one draw per image; targets are standardised by the
    mean and deviation of the training draws. Returns what `pairs_of_poses` does."""
    args, view, pairs, targets = case.args, SecondView(target, case.backbone.img_size), [], []
    shares = args.r2_images, max(2, args.r2_images // 2)
    for data, y, most, seed in zip((case.train, case.test), case.y, shares, (args.seed, args.seed + 1)):
        rows, params = evenly(len(data), most), view.sample(len(data), seed)  # (n,), of all N
        y2 = case.features(data, transform=view, params=params, rows=rows, name=target)  # (n, D)
        if common.rank() == 0:
            pairs.append(torch.stack([y[rows], y2.to(y.device)], 1))  # (n, 2, D)
            targets.append(common.family_target(target, params, view.size)[rows].to(y.device))  # (n, K)
    if common.rank():
        return None
    mean, std = targets[0].mean(0), targets[0].std(0).clamp(min=1e-6)
    train_targets, test_targets = ((t - mean) / std for t in targets)
    return lambda epoch: (pairs[0], train_targets), pairs[1], test_targets


# ----------------------------------------------------------------------------------------------------------------------
# How an evaluation ends: what was finished is kept
# ----------------------------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal, its number, has come."""


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def stop(number, frame):
    """End the evaluation at the first signal, and the process at the second."""
    for s in STOPPING:
        signal.signal(s, lambda number, frame: os._exit(128 + number))
    raise Stopped(number)


def say(line):
    """A line on stderr, above the progress bars, from rank 0."""
    if common.rank() == 0:
        tqdm.write(line, file=sys.stderr)


def one_line(error):
    """An exception in one line: what the machine lacks, and what to lower; or where it was raised."""
    known = common.one_line(error)
    if known and known.startswith("out of memory"):
        return "out of memory; take fewer --workers or another --device, or an encoder of smaller images"
    *_, at = traceback.extract_tb(error.__traceback__)
    what = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
    return known or f"{what} ({Path(at.filename).name}, line {at.lineno})"


class Evaluation:
    """A block in which a part that fails costs one line and, at the end, exit code 1 (its own where nothing was
    finished), and in which a signal ends everything in one line, code 128 + its number. `at_end` is called in any
    case: there the table is printed."""

    def __init__(self):
        self.codes, self.printed, self.at_end, self.handlers = [], False, lambda: None, {}

    def __enter__(self):
        on = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]  # nohup switches one off
        self.handlers = {s: signal.signal(s, stop) for s in on}
        return self

    def __exit__(self, kind, error, trace):
        self.at_end()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if kind is Stopped:
            name = signal.Signals(error.args[0]).name
            kept = "what was finished is in the table and in eval.jsonl beside the checkpoints"
            say(f"{Path(sys.argv[0]).name}: stopped by {name}; {kept}")
            raise SystemExit(128 + error.args[0])
        if kind is None and self.codes:
            raise SystemExit(1 if self.printed else self.codes[0])

    def attempt(self, what, part, together=False):
        """part(), or None where it fails; together: on all ranks if on one. Otherwise several ranks cannot go on, but
        for a user's mistake, which all of them see."""
        code, out = 0, None
        try:
            out = part()
        except SystemExit as e:  # common.die has said why
            code = e.code
        except Exception as e:
            code = 1
            tqdm.write(f"{Path(sys.argv[0]).name}: error: {what}: {one_line(e)}", file=sys.stderr)
        if common.world_size() > 1 and together:
            code = common.any_rank(code)
        elif common.world_size() > 1 and code not in (0, 2):
            raise SystemExit(code)
        if code:
            self.codes.append(code)
        return None if code else out

    def table(self, rows, form):
        """Print what there is."""
        rows = [(name, values) for name, values in rows if values]
        self.printed |= bool(rows)
        if rows and common.rank() == 0:
            print(table(rows, form, sys.stdout.encoding or "utf-8"), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------


def fold(results):
    """[(row name, {metric: value})] -> {row name: (n, {metric: (mean, sample standard deviation or None, how many of
    the n have it)})}, and all metrics."""
    rows, metrics = {}, list(dict.fromkeys(metric for _, values in results for metric in values))
    for name, values in results:
        rows.setdefault(name, []).append(values)
    folded = {}
    for name, group in rows.items():
        folded[name] = len(group), {}
        for c in metrics:  # data sets differ in what can be asked of them
            v = torch.tensor([g[c] for g in group if c in g], dtype=torch.float64)
            if len(v):
                folded[name][1][c] = v.mean().item(), v.std().item() if len(v) > 1 else None, len(v)
    return folded, metrics


def table(results, form="table", encoding="utf-8"):
    """[(row name, {metric: value})] -> text: a row per name, mean +- sample standard deviation, and of how many where
    some failed; "table" aligned, or "markdown", "csv", "json" (the last two with all digits). What the encoding lacks
    is written in ASCII."""
    rows, metrics = fold(results)
    if form == "json":
        cell = lambda n, mean, std, k: dict(mean=mean, std=std) | (dict(n=k) if k < n else {})
        found = {name: dict(n=n, **{c: cell(n, *v) for c, v in values.items()}) for name, (n, values) in rows.items()}
        return json.dumps(finite(found), indent=1)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["", "n", *(f"{c}{suffix}" for c in metrics for suffix in ("", " std"))])
        for name, (n, values) in rows.items():
            cells = [v for c in metrics for v in values.get(c, (None, None))[:2]]
            writer.writerow([name, n, *("" if v is None else v for v in cells)])
        return written(out.getvalue().strip(), encoding)
    lines = [["", "n", *metrics]]
    for name, (n, values) in rows.items():
        line = [name, str(n)]
        for c in metrics:
            mean, std, k = values.get(c, (None, None, n))
            digits = 3 if c.startswith(("r2", "equi ")) else 2
            deviation = "" if std is None else f" ± {std:.{digits}f}"
            line.append("-" if mean is None else f"{mean:.{digits}f}{deviation}" + (f" ({k} of {n})" if k < n else ""))
        lines.append(line)
    lines = [[written(cell, encoding) for cell in line] for line in lines]
    if form == "markdown":
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def written(text, encoding):
    """Text that a stream of this encoding takes: "+-" where it lacks the sign, escapes for other characters."""
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


def row_names(paths, states):
    """A name for each checkpoint, equal for those that differ only in their seed (and in how and where they ran): the
    run directory without its seed. Different runs of the same name are numbered."""
    free = (common.Run.FREE | {"seed"}) - {"data_dir"}
    keys = [
        json.dumps([s["method"], s["step"], {k: v for k, v in s["args"].items() if k not in free}], sort_keys=True)
        for s in states
    ]
    names = [
        p.partition("@")[0] + (f"@{Path(p.partition('@')[2]).name}" if "@" in p else "")
        if p.startswith("timm:")
        else re.sub(r"-s\d+$", "", Path(p).resolve().parent.name)
        for p in paths
    ]
    out, owner = [], {}
    for key, name in zip(keys, names):
        if key not in owner:
            taken = set(owner.values())
            owner[key] = (
                name
                if name not in taken
                else next(f"{name} #{i}" for i in range(2, len(keys) + 2) if f"{name} #{i}" not in taken)
            )
        out.append(owner[key])
    return out


def append_record(path, state, args, results, protocol):
    """One line in eval.jsonl beside the checkpoint, from rank 0: what came out, and all that it takes to have it
    again."""
    file = Path(path.partition("@")[2] if path.startswith("timm:") else path)
    record = dict(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        checkpoint=path if path.startswith("timm:") else file.name,
        step=state["step"],
        sha256=state["sha256"],
        backbone=state["backbone"],
        torch=str(torch.__version__),
        torchvision=str(torchvision.__version__),
        processes=common.world_size(),
        args=dataclasses.asdict(args),
        results=results,
        protocol=protocol,
        seed=args.seed,
    )
    if common.rank() == 0:
        line = json.dumps(finite(record)).encode()
        try:
            with open(file.parent / "eval.jsonl", "ab+", buffering=0) as f:
                f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
                torn = f.read(1) not in (b"", b"\n")  # a line that a full disk broke off stays alone
                f.write(b"\n" * torn + line + b"\n")  # one write: evaluations at the same time do not mix
        except OSError as e:
            say(f"{file.parent / 'eval.jsonl'}: could not be written ({e.strerror}); the table is all there is")


def check(args):
    """Refuse what cannot work, before anything is computed."""
    load_splits.cache_clear()  # images may have changed since another call of this process
    if not args.checkpoints:
        common.die("no checkpoint given; name at least one, such as runs/ser-mocov3-ser-blocks-s0/checkpoint.pt")
    for name in ("tasks", "part", "linear_lrs"):
        if not getattr(args, name):
            common.die(f"--{name.replace('_', '-')}: is empty; name at least one, or leave the flag out")
    if args.augment and args.linear != "sgd":
        common.die(f"--augment: goes with --linear sgd; {args.linear} learns from fixed features")
    if args.cache_dir:
        try:
            Path(args.cache_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.cache_dir).close()
        except OSError as e:
            common.die(f"--cache-dir {args.cache_dir}: cannot be written ({e.strerror}); choose another directory")
    if len({p if p.startswith("timm:") else os.path.realpath(p) for p in args.checkpoints}) < len(args.checkpoints):
        common.die("a checkpoint is given twice; name each once")
    for path in args.checkpoints:  # all, before the first is probed
        file = path.partition("@")[2] if path.startswith("timm:") else path
        if file and not os.path.isfile(file):
            common.die(f"{path}: no such {'file ' + file if path.startswith('timm:') else 'checkpoint file'}")
        if path.startswith("timm:") and args.data is None:
            common.die(f"--data: {path} does not say what to probe it on; name a data set")


def arguments(argv, base=None):
    """Command line -> Args: defaults <- the protocol's values <- those for the checkpoint's base <- flags given by
    hand."""

    def values_in_force(first):
        special = SIMSIAM if (first.protocol, base) == ("clever", "simsiam") else {}
        return dict(protocol=first.protocol) | PROTOCOLS[first.protocol] | special

    checkpoints_first(argv, Args)
    return common.parse(Args, values_in_force, argv, description=__doc__)


def checkpoints_first(argv, Args):
    """A flag that takes several values takes the checkpoints after it for its own: say so."""
    flag, several = "", {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Args) if "tuple" in str(f.type)}
    for word in sys.argv[1:] if argv is None else argv:
        flag = word if word.startswith("--") else flag
        if flag in several and word.startswith("timm:") or flag in several and word.endswith(".pt"):
            right = f"{Path(sys.argv[0]).name} {word} {flag} ..."
            common.die(f"{flag} ... {word}: checkpoints come first, before all flags: {right}")


def main(argv=None):
    """Probe every checkpoint, append its results to the eval.jsonl beside it, print one table; returns its rows."""
    rows, opened = [], []  # of the table; (path, state) of the checkpoints so far
    with Evaluation() as evaluation:
        args = arguments(argv)
        common.check_ranges(args)
        check(args)
        device = common.start(args.device)
        evaluation.at_end = lambda: evaluation.table(rows, args.format)

        args_for = lambda state: arguments(argv, state["args"].get("base"))
        for path in args.checkpoints:
            case = begin(path, args_for, device, evaluation)
            if case is not None:
                opened.append((path, case.state))
                rows.append((row_names(*zip(*opened))[-1], {}))
                probe(path, case, evaluation, rows[-1][1])
    return rows


if __name__ == "__main__":
    common.command(main)
