"""CIPER: one head learns what augmentations leave alone, another what they did; SimCLR, predictive only, E-SSL.

Paper: "CIPER: Combining Invariant and Equivariant Representations Using Contrastive and Predictive Learning"
(Xu, Triesch 2023, arXiv 2302.02330).

Idea. A contrastive loss makes the views of an image alike, and lets the encoder forget how they differ. So a second
head reads off the same representation what the augmentation was: from the difference between the representations of
the image itself, the anchor, and of its view, it predicts the parameters. For objects seen from many sides
"augmentation" may be another view of the object, and its parameters the change of the viewpoint, or the session it
was filmed in.

    h = f(x),  h_k = f(t_k(x)),  k = 1, 2                        one encoder f, x without augmentation
    z_k = proj(h_k)                                              the anchor has no part in L_c
    L_c = -mean_i log( exp(u_i u_j / tau) / sum_{l != i} exp(u_i u_l / tau) )
          u = z / |z|, over all 2N rows; j is the other view of i
    p_k = pred(h - h_k),  r_k the parameters of t_k, standardised over both views of the batch
    L_p = 1 / (2 N M) sum_i sum_m (r_1 - p_1)^2 + (r_2 - p_2)^2  M = 10: box (4), flip, colour factors (4), grey
    L = L_c + alpha L_p                                          simclr: L_c;  predictive: alpha L_p

E-SSL ("Equivariant Contrastive Learning", Dangovski et al. 2022, arXiv 2111.00899) predicts which of four quarter
turns a small crop was given: L = InfoNCE(z_1, z_2) + alpha CE(rot(h_3), k), with negatives from the other view only.

Usage
    python ciper.py                                                   # turntable images, CPU, minutes
    python ciper.py --views dataset  # views: the same object from elsewhere, in any session
    python ciper.py --objective simclr --views time  # views: successive images of a walk around an object
    python ciper.py --data cifar10 --data-dir CIFAR                   # the paper's Table 3
    python ciper.py --data core50 --data-dir CORE50 --views dataset   # Table 2
    python ciper.py --drop-aug crop                                   # Figure 4

Views. image: crop, flip, colour jitter, grey, in this order. dataset: any image of the anchor's object, the session
drawn first, then an image of it; its parameters are the change of azimuth, elevation and distance (three numbers,
squared error) and the session it is of (one of 11, cross-entropy), whichever of the two the data knows; of both the
losses are added. time: neighbours in a stream that walks through the views of an object until it jumps to another
("Contrastive Learning Through Time", Schneider et al. 2021, and its successor on CORe50).

Where the paper is silent or contradicts itself this file takes (source in brackets: [E] the repository of E-SSL,
whose recipe the paper builds on; [C] that of Contrastive Learning Through Time, [S] its successor's, both of the same
laboratory):
  * equation 1 prints a minus before L_p; minimising that would maximise the error, so it is a plus here.
  * flips with probability 0.8 [Table 1, though the text says "as SimCLR", which is 0.5]; E-SSL keeps 0.5 [E].
  * jitter 0.4, 0.4, 0.4, 0.1 with probability 0.8 [E]; where it is not applied its parameters are the identity, 1, 1,
    1, 0. The grey parameter is 0 for grey images and 1 for others [Table 1]. The box is left, top, height, width in
    fractions of the image; of a flipped image it is not mirrored.
  * standardisation as in batch norm, without affine map: biased variance, epsilon 1e-5; a parameter that never
    changes is 0.
  * tau = 0.5 [E; SimCLR on CIFAR]; the similarity is the cosine, negatives come from both views [the text].
  * projector d-2048-2048, no biases, batch norm after both layers, the last without affine map [E]; predictor
    d-d-M with layer norm; the gradient also flows through the anchor; each view is a batch of its own for batch norm.
  * coordinates are appended to the finished views, not cropped with them, or they would tell the box; in
    all objectives but E-SSL's.
  * SGD, momentum 0.9, weight decay 5e-4 on everything, lr 0.03 along half a cosine to 0, at any batch size.
    E-SSL: lr 0.12 at batch 512 after 10 epochs of warm-up [E].
  * any change of view within an object, the identity too; azimuths differ by -180 to 180 degrees. If the anchor is of
    the same session, h - h_k cannot tell which one: the paper's target has this floor, and neither small steps alone
    nor other sessions alone are offered.
  * a stream is as long as the data set, goes on with the same object with probability 0.95 and then stays in the
    session with the same probability [S], one step along one axis a time, azimuths wrap around. [C] never steps back in
    azimuth and never starts at the end of an axis; here all directions are equal.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import (
    CenterCrop,
    ColorJitter,
    Compose,
    Count,
    Grayscale,
    HorizontalFlip,
    Natural,
    NonNegative,
    Normalize,
    Plural,
    Positive,
    RandomResizedCrop,
    Share,
    ShareAbove0,
    ShareBelow1,
    upcast,
)


@dataclasses.dataclass
class Args(common.RunArgs):
    """What CIPER and its baselines need, beside the arguments that all scripts share."""

    data: str = "blocks-views"
    """data set: blocks-views, blocks (rendered on the spot); cifar10, cifar100, core50, tdw or imagefolder with
    --data-dir"""
    arch: str = "resnet18"
    """encoder: resnet_pico, resnet18 or resnet50, with a 3x3 stem for small images"""
    img_size: Count = 32
    """side of the (square) training images in pixels"""
    patch_size: Count = 16
    """not used: ResNets have no patches"""
    epochs: Natural = 800
    """passes over the data; the schedules follow it; 0 writes the untrained encoder"""
    batch_size: Plural = 256
    """images per step over all processes together, each in two or three views"""
    lr: NonNegative = 0.03
    """learning rate at its peak, as it is: not scaled with the batch"""
    objective: Literal["ciper", "simclr", "predictive", "essl"] = "ciper"
    """what trains the encoder"""
    views: Literal["image", "dataset", "time"] = "image"
    """what the views of an image are: augmentations of it, other images of its object, the next image of a stream"""
    alpha: NonNegative = 1.0
    """weight of the equivariant part: of L_p, or of the rotations (essl)"""
    drop_aug: tuple[Literal["crop", "flip", "jitter", "gray"], ...] = ()
    """augmentations to leave out; their parameters leave the target"""
    sessions: tuple[Annotated[int, "[1, 11]"], ...] = (1, 2)
    """sessions of core50 to train on, counted from 1; the others test"""
    time_continue: ShareBelow1 = 0.95
    """probability that the next image of the stream (--views time) shows the same object; and then, that it is of the
    same session"""
    temp: Positive = 0.5
    """tau"""
    negatives: Literal["both", "cross"] = "both"
    """what an embedding is told apart from: both views of other images, or only the other view of them"""
    proj_hidden: Count = 2048
    """hidden width of the projector, and of E-SSL's rotation head"""
    proj_dim: Count = 2048
    """width of the embeddings that are contrasted"""
    coords: bool = True
    """give the encoder two more channels that hold the coordinates of the pixels"""
    flip_p: Share = 0.8
    """probability of a flip"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.2, 1.0)
    """area of the random crops, relative to the image"""
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter, applied to 80 % of the views"""
    weight_decay: NonNegative = 5e-4
    """of SGD, on all parameters"""
    warmup_epochs: NonNegative = 0
    """linear warm-up; then the learning rate falls along half a cosine"""


SMALL = dict(
    arch="resnet_pico", epochs=3, batch_size=64, lr=0.03, warmup_epochs=0, proj_hidden=256, proj_dim=128
)  # ours
RECIPES = {
    "cifar10": dict(epochs=800),
    "cifar100": dict(epochs=800),  # not in the paper
    "tdw": dict(img_size=64, epochs=100, batch_size=64, lr=0.03),
    "core50": dict(img_size=128, epochs=100, batch_size=64, lr=0.03),
    "blocks-views": SMALL,
    "blocks": SMALL,
}
OBJECTIVES = {
    "essl": dict(alpha=0.4, negatives="cross", coords=False, flip_p=0.5, lr=0.12, batch_size=512, warmup_epochs=10)
}
VALID = dict(
    ciper=("image", "dataset"), predictive=("image", "dataset"), simclr=("image", "dataset", "time"), essl=("image",)
)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean and std with which [E] normalises it
SESSIONS = 11  # of core50 and blocks-views


def values_in_force(first):
    """What the objective and the recipe, named in a first look at the command line, set as defaults for the second."""
    name = first.recipe or first.data
    return dict(recipe=name) | OBJECTIVES.get(first.objective, {}) | RECIPES.get(name, {})


# ----------------------------------------------------------------------------------------------------------------------
# Views, and what happened between them
# ----------------------------------------------------------------------------------------------------------------------


def normalisation(args):
    """Mean and std of each channel: the data set's own, but for cifar10."""
    return (
        CIFAR10 if args.recipe == "cifar10" and args.data in ("cifar10", "imagefolder") else common.normalisation(args)
    )


def make_policies(args):
    """{view: Compose}: "1" and "2" are contrasted, "0" is the anchor; "3", half as large, is what E-SSL turns."""

    def view(size, augmented):
        ops = dict(
            crop=RandomResizedCrop(size, args.crop_scale),
            flip=HorizontalFlip(args.flip_p),
            jitter=ColorJitter(*args.jitter),
            gray=Grayscale(),
        )
        ops = {name: op for name, op in ops.items() if augmented and name not in args.drop_aug}
        return Compose([ops.pop("crop", CenterCrop(size, resize=size)), *ops.values(), Normalize(*normalisation(args))])

    policies = {"1": view(args.img_size, args.views == "image"), "2": view(args.img_size, args.views == "image")}
    if args.objective in ("ciper", "predictive"):
        policies["0"] = view(args.img_size, False)
    if args.objective == "essl":
        policies["3"] = view(args.img_size // 2, True)
    return policies


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, what its policy draws for them)}."""
    n = args.batch_size
    return {view: (torch.arange(n), policy.sample(n, generator)) for view, policy in policies.items()}


PARAMETERS = dict(  # Table 1
    crop=lambda p: [p["left"], p["top"], p["height"], p["width"]],
    flip=lambda p: [p["flip"].float()],
    jitter=lambda p: [p["brightness"], p["contrast"], p["saturation"], p["hue"]],
    gray=lambda p: [1 - p["gray"].float()],
)
WIDTH = dict(crop=4, flip=1, jitter=4, gray=1)


def augmentation(params, dropped=()):
    """r of image views: params of a view -> (n, M), M = 10 less the dimensions of the `dropped` ones."""
    return torch.stack(
        [column for name, columns in PARAMETERS.items() if name not in dropped for column in columns(params)], 1
    )


def change(factors, i, j):
    """r of data-set views, from image i to image j of an object, rows (n,) each: the change of the view (n, 3), or
    (n, 0) where views are unknown, and the session of j, (n,), or None."""
    r = torch.zeros(len(i), 0)
    if "view" in factors:
        r = factors["view"][j] - factors["view"][i]  # (n, 3): azimuth, elevation, distance
        r = torch.cat([(r[:, :1] + 180) % 360 - 180, r[:, 1:]], 1)
    return r, factors["session"][j] if "session" in factors else None


class Ragged:
    """Lists of several lengths: groups (n,), from 0, says in which one each of the numbers from 0 to n - 1 is."""

    def __init__(self, groups):
        self.order, self.count = torch.argsort(groups, stable=True), torch.bincount(groups)
        self.first = self.count.cumsum(0) - self.count

    def pick(self, group, u):
        """A member of each list `group` (m,), at u (m,) in [0, 1) of its length."""
        return self.order[self.first[group] + (u * self.count[group]).long()]

    def lists(self):
        return [v.tolist() for v in self.order.split(self.count.tolist())]


class ObjectViews:
    """Data-set views, for the loader: every image is an anchor once in an epoch; "1" and "2" each show its object in
    a session and a view of their own, uniform over the sessions and then over the images of the session."""

    def __init__(self, data):
        self.object = data.groups.unique(return_inverse=True)[1]  # (N,) from 0
        session = data.factors.get("session", torch.zeros_like(self.object))
        cells, self.cell = torch.stack([self.object, session], 1).unique(
            dim=0, return_inverse=True
        )  # (C, 2), (N,): object in session
        self.cells, self.images = Ragged(cells[:, 0]), Ragged(self.cell)

    def __len__(self):
        return len(self.object)

    def __call__(self, items, epoch, generator):
        """Anchors (B,) -> {view: rows (B,)}."""
        u = torch.rand(2, 2, len(items), generator=generator)
        pick = lambda u: self.images.pick(self.cells.pick(self.object[items], u[0]), u[1])
        return {"0": items, "1": pick(u[0]), "2": pick(u[1])}


class TimeStream(ObjectViews):
    """Time views: "1" and "2" are neighbours in a stream, another one each epoch, that wanders through the views of an
    object, with jumps to its other sessions, and on to the next object. As long as the data set."""

    def __init__(self, data, p, seed):
        super().__init__(data)
        self.p, self.seed, self.epoch, self.steps = p, seed, None, neighbours(data.factors, self.cell)

    def walk(self, epoch):
        """The stream of an epoch: (N,) rows."""
        n, generator = len(self), common.rng(self.seed, "stream", epoch)
        cells, images, cell_of = self.cells.lists(), self.images.lists(), self.cell.tolist()
        shuffled = iter(
            torch.cat([torch.randperm(len(cells), generator=generator) for _ in range(n // len(cells) + 1)]).tolist()
        )
        choose = lambda options, u: options[int(u * len(options))]
        thing, k, stream = None, None, []
        for leave, switch, u, v in torch.rand(n, 4, generator=generator).tolist():
            if k is None or leave >= self.p:  # the next object
                thing = next(shuffled)
                k = choose(images[choose(cells[thing], u)], v)
            elif switch >= self.p and len(cells[thing]) > 1:  # another session of it
                k = choose(images[choose([c for c in cells[thing] if c != cell_of[k]], u)], v)
            elif self.steps[k]:
                k = choose(self.steps[k], u)
            stream.append(k)
        return torch.tensor(stream)

    def __call__(self, items, epoch, generator):
        """Positions (B,) -> {view: rows (B,)}; the last image is followed by the first."""
        if epoch != self.epoch:
            self.epoch, self.stream = epoch, self.walk(epoch)
        return {"1": self.stream[items], "2": self.stream[(items + 1) % len(self)]}


def neighbours(factors, cell):
    """For each image the rows of those one step away in its object and session, `cell` (N,): a list of N lists. A
    step goes to the next azimuth (round and round), elevation or distance, or to the next frame."""
    if "view" in factors:
        axes = [v.unique(return_inverse=True) for v in factors["view"].T]
        place, azimuths = torch.stack([inverse for _, inverse in axes], 1), len(axes[0][0])  # (N, 3)
    else:
        order = torch.argsort(factors["frame"], stable=True)
        order, in_cells = order[torch.argsort(cell[order], stable=True)], Ragged(cell)
        place = torch.empty(len(cell), 1, dtype=torch.long)
        place[order, 0] = torch.arange(len(cell)) - in_cells.first[cell[order]]  # (N, 1)
        azimuths = None
    key = lambda place: map(tuple, torch.cat([cell[:, None], place], 1).tolist())
    at, ways = {where: k for k, where in enumerate(key(place))}, [set() for _ in cell]
    for axis in range(place.shape[1]):
        for step in (-1, 1):
            there = place.clone()
            there[:, axis] += step
            if azimuths and axis == 0:
                there[:, 0] %= azimuths
            for k, where in enumerate(key(there)):
                ways[k].add(at.get(where, k))
    return [sorted(w - {k}) for k, w in enumerate(ways)]


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def nt_xent(z1, z2, tau):
    """L_c with both views of other images as negatives: z1, z2 (b, D) on this process -> mean over its 2 b rows."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    every = torch.cat([common.gather(z1), common.gather(z2)])  # (2 B, D)
    sim = torch.cat([z1, z2]) @ every.T / tau  # (2 b, 2 B)
    here = common.rank() * len(z1) + torch.arange(len(z1), device=z1.device)
    itself, other = torch.cat([here, here + len(every) // 2]), torch.cat([here + len(every) // 2, here])
    return F.cross_entropy(sim.scatter(1, itself[:, None], -math.inf), other)


def info_nce(z1, z2, tau):
    """The contrast across views [E]: z1, z2 (b, D) on this process -> mean over its rows and both directions."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    here = common.rank() * len(z1) + torch.arange(len(z1), device=z1.device)
    one = lambda a, b: F.cross_entropy(a @ common.gather(b).T / tau, here)  # (b, B)
    return (one(z1, z2) + one(z2, z1)) / 2


def standardise(r, eps=1e-5):
    """r (n, M) on this process -> (r - mean) / sqrt(var + eps) with the statistics of all processes, biased
    variance."""
    every = common.gather(r)
    return (r - every.mean(0)) / (every.var(0, correction=0) + eps).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """The encoder and the heads that an objective needs. M: width of the predictor's output."""

    evaluated, compiled = "backbone", ()

    def __init__(self, backbone, args, M):
        super().__init__()
        self.backbone, self.args, d, hidden = backbone, args, backbone.dim, args.proj_hidden
        self.projector = self.predictor = self.rotation = None
        if args.objective != "predictive":
            self.projector = nn.Sequential(
                nn.Linear(d, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, args.proj_dim, bias=False),
                nn.BatchNorm1d(args.proj_dim, affine=False),
            )
        if args.objective in ("ciper", "predictive"):
            self.predictor = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d), nn.ReLU(inplace=True), nn.Linear(d, M))
        if args.objective == "essl":
            layer = lambda a, b: (nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU(inplace=True))
            self.rotation = nn.Sequential(*layer(d, hidden), *layer(hidden, hidden), nn.Linear(hidden, 4))

    def compile_encoder(self):
        self.compiled = (torch.compile(self.backbone, dynamic=False),)  # in a tuple, or it would be a second child

    def forward(self, views, r=None, session=None):
        """All of a step's mathematics. views {"1", "2", ...} (b, 3, H, W); r (2 b, M) raw parameters and session (2
        b,), or None, of view 1 and then view 2 -> ({"loss", ...}, h of view 1 (b, d))."""
        args, (encode,) = self.args, self.compiled or (self.backbone,)
        h = {name: encode(view) for name, view in views.items() if name != "3"}  # (b, d) each
        out, loss = {}, 0.0
        if self.projector is not None:
            z1, z2 = upcast(self.projector(h["1"])), upcast(self.projector(h["2"]))  # (b, D)
            with common.full_precision():
                out["L_c"] = (nt_xent if args.negatives == "both" else info_nce)(z1, z2, args.temp)
            loss = loss + out["L_c"]
        if self.predictor is not None:
            p = upcast(self.predictor(torch.cat([h["0"] - h["1"], h["0"] - h["2"]])))  # (2 b, M)
            M = r.shape[1]
            L_p = F.mse_loss(p[:, :M], standardise(r).to(p)) if M else 0.0
            if session is not None:
                out["L_session"] = F.cross_entropy(p[:, M:], session)
                out["session_accuracy"] = (p[:, M:].argmax(1) == session).float().mean()
                L_p = L_p + out["L_session"]
            loss, out["L_p"] = loss + args.alpha * L_p, L_p
        if self.rotation is not None:
            turned = torch.cat([views["3"].rot90(k, (2, 3)) for k in range(4)])  # (4 b, 3, H / 2, W / 2)
            scores = upcast(self.rotation(encode(turned)))  # (4 b, 4)
            k = torch.arange(4, device=scores.device).repeat_interleave(len(views["3"]))
            out["L_rot"], out["rotation_accuracy"] = F.cross_entropy(scores, k), (scores.argmax(1) == k).float().mean()
            loss = loss + args.alpha * out["L_rot"]
        return dict(loss=loss) | out, h["1"]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device, M):
    """The model with its initial weights: seeded, the same on every process. M: width of the predictor's output."""
    common.seed_everything(args.seed, "weights")
    backbone = common.make_backbone(
        args.arch, *normalisation(args), img_size=args.img_size, stem="cifar", coords=args.coords
    )
    return common.batchnorm_over_ranks(Heads(backbone, args, M), device).to(device, memory_format=torch.channels_last)


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    common.check_run(args, RECIPES, common.RESNETS)
    if args.views not in VALID[args.objective]:
        common.die(f"--views {args.views}: {args.objective} goes with {', '.join(VALID[args.objective])}")
    if args.drop_aug and args.views != "image":
        common.die(
            f"--drop-aug {' '.join(args.drop_aug)}: goes with --views image; {args.views} views are not augmented"
        )
    if args.views != "image" and args.data not in ("blocks-views", "core50", "tdw"):
        common.die(
            f"--views {args.views}: {args.data} knows neither views nor sessions of its objects; take "
            "blocks-views, core50 or tdw, or --views image"
        )
    if args.time_continue != 0.95 and args.views != "time":
        common.die(f"--time-continue {args.time_continue}: goes with --views time")
    if len(set(args.drop_aug)) < len(args.drop_aug) or len(args.drop_aug) == len(WIDTH):
        common.die(
            f"--drop-aug {' '.join(args.drop_aug)}: name each once, and leave one of {', '.join(WIDTH)} to tell "
            "the views apart"
        )
    if args.objective == "essl" and args.img_size < 2:
        common.die(f"--img-size {args.img_size}: essl turns crops of half the size; take 2 or more")
    if args.epochs and args.warmup_epochs >= args.epochs:
        common.die(f"--warmup-epochs {args.warmup_epochs} (in force): must be below --epochs {args.epochs}; give both")
    if args.crop_scale[0] > args.crop_scale[1]:
        common.die(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]}: the lower end comes first")
    if args.jitter[3] > 0.5:
        common.die(f"--jitter {' '.join(map(str, args.jitter))}: hue is in turns, at most 0.5")
    if args.sessions != (1, 2) and args.data != "core50":
        common.die(f"--sessions {' '.join(map(str, args.sessions))}: {args.data} has none to choose; leave it out")
    if not args.sessions or len(set(args.sessions)) < len(args.sessions):
        common.die(f"--sessions {' '.join(map(str, args.sessions))}: name those to train on, of 1 to 11, each once")


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)
    load = partial(
        common.load_data,
        args.data,
        args.data_dir,
        size=args.img_size,
        skip_corrupt=args.skip_corrupt,
        workers=args.workers,
        sessions=args.sessions,
    )
    train, test = load(split="train"), load(split="test")
    train = train.to(device)
    policies = make_policies(args)
    sampler = None
    if args.views != "image":
        sampler = ObjectViews(train) if args.views == "dataset" else TimeStream(train, args.time_continue, args.seed)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device, sampler)

    def targets(params, rows):  # of view 1, then of view 2: r (2 b, M), session (2 b,) or None
        if args.views == "image":
            return torch.cat([augmentation(params[v], args.drop_aug) for v in "12"]), None
        r, session = zip(*(change(train.factors, rows["0"], rows[v]) for v in "12"))
        return torch.cat(r), None if session[0] is None else torch.cat(session)

    numbers = (
        3 * ("view" in train.factors) if sampler else sum(WIDTH[name] for name in WIDTH if name not in args.drop_aug)
    )
    sessions = SESSIONS if sampler and "session" in train.factors else 0
    M = numbers + sessions
    model = build(args, device, M)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay, fused=device.type == "cuda"
    )
    run = common.Run(
        args, "-".join([args.objective, args.views] + [f"no-{name}" for name in args.drop_aug]), model, optimizer
    )
    run.restore(train)
    B = args.batch_size
    chance = [f"L_c {math.log(2 * B - 1 if args.negatives == 'both' else B):.2f}"] * (model.projector is not None)
    chance += [f"L_p about {(numbers > 0) + (math.log(sessions) if sessions else 0):.2f}"] * (
        model.predictor is not None
    )
    chance += ["L_rot 1.39"] * (model.rotation is not None)
    run.introduce(train, loader, args.lr, ", ".join(chance))
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, params, rows in run.steps(loader):
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        r, session = targets(params, rows) if model.predictor is not None else (None, None)
        if step == 0:
            run.picture("views.png", [views[v] for v in sorted(views)])
        with common.autocast(device, args.amp):
            out, h = ddp(views, *(v if v is None else v.to(device, non_blocking=True) for v in (r, session)))
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        optimizer.step()
        run.log(step, features=h, lr=lr, epoch=epoch, **out)

    run.finish(build(args, device, M), train, test)


if __name__ == "__main__":
    common.command(main)
