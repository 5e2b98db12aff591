"""CIPER: contrastive and predictive learning with one encoder; baselines SimCLR, predictive only, E-SSL.

Paper: "CIPER: Combining Invariant and Equivariant Representations Using Contrastive and Predictive Learning"
(Xu, Triesch 2023, arXiv 2302.02330).

Idea. A contrastive loss makes the views of an image similar, so the encoder forgets how they differ. CIPER adds a head
that predicts the parameters of the augmentation. Its input is the difference between the representations of the image
itself, the anchor, and of its view. For objects seen from many sides, the "augmentation" may be another view of the
object. Its parameters are then the change of the viewpoint, or the session in which the view was filmed.

    h = f(x),  h_k = f(t_k(x)),  k = 1, 2                        one encoder f, x without augmentation
    z_k = proj(h_k)                                              the anchor has no part in L_c
    L_c = -mean_i log( exp(u_i u_j / tau) / sum_{l != i} exp(u_i u_l / tau) )
          u = z / |z|, over all 2N rows; j is the other view of i
    p_k = pred(h - h_k),  r_k the parameters of t_k, standardised over both views of the batch
    L_p = 1 / (2 N M) sum_i sum_m (r_1 - p_1)^2 + (r_2 - p_2)^2  M = 10: box (4), flip, colour factors (4), grey
    L = L_c + alpha L_p                                          simclr: L_c;  predictive: alpha L_p

E-SSL ("Equivariant Contrastive Learning", Dangovski et al. 2022, arXiv 2111.00899) rotates a small crop by each of four
quarter turns and predicts which: L = InfoNCE(z_1, z_2) + alpha CE(rot(h_3), k), negatives from the other view only.

Usage
    python ciper.py                                                   # turntable images, CPU, minutes
    python ciper.py --views dataset                                   # views: other images of the object
    python ciper.py --objective simclr --views time                   # views: next images of a walk around it
    python ciper.py --data cifar10 --data-dir CIFAR                   # the paper's Table 3
    python ciper.py --data core50 --data-dir CORE50 --views dataset   # Table 2
    python ciper.py --drop-aug crop                                   # Figure 4

Views
  * image: crop, flip, colour jitter and greyscale, in this order.
  * dataset: any image of the anchor's object; the session is drawn first, then an image of that session. The parameters
    are the change of azimuth, elevation and distance (three numbers, squared error) and the view's session (one of 11,
    cross-entropy), whichever the data set knows. If it knows both, the losses are added.
  * time: neighbours in a stream that walks through the views of an object until it jumps to another object
    ("Contrastive Learning Through Time", Schneider et al. 2021, and its successor on CORe50).

Where the paper is silent or contradicts itself this file takes (source in brackets: [E] the repository of E-SSL,
whose recipe the paper builds on; [C] that of Contrastive Learning Through Time, [S] its successor's, both of the same
laboratory):
  * equation 1 prints a minus before L_p. Minimising that would maximise the error, so here it is a plus.
  * flips have probability 0.8 [Table 1; the text says "as SimCLR", which is 0.5]. E-SSL keeps 0.5 [E].
  * jitter is 0.4, 0.4, 0.4, 0.1 with probability 0.8 [E]. Images without jitter have the identity as parameters: 1, 1,
    1, 0. The grey parameter is 0 for grey images and 1 for others [Table 1]. The box is left, top, height, width in
    fractions of the image. A flip does not mirror the box.
  * parameters are standardised as in batch norm without affine map: biased variance, epsilon 1e-5. A parameter that
    never changes is 0. Changes of the viewpoint are standardised too, although the paper says so of image augmentations
    only: in degrees their errors would swamp L_c.
  * tau = 0.5 [E; SimCLR on CIFAR]. The similarity is the cosine. Negatives come from both views [the text].
  * the projector is d-2048-2048 without biases, with batch norm after both layers, the last without affine map [E]. The
    predictor is d-d-M with layer norm. The gradient also flows through the anchor. Each view is a batch of its own for
    batch norm.
  * coordinates are appended to the finished views. If they were cropped with the image they would reveal the box. All
    objectives but E-SSL's have them.
  * SGD has momentum 0.9, weight decay 5e-4 on everything, and lr 0.03 along half a cosine to 0, at any batch size.
    E-SSL has lr 0.12 at batch 512 after 10 epochs of warm-up [E].
  * a data-set view may be any view of the object, the anchor too. Azimuths differ by -180 to 180 degrees. When anchor
    and view come from the same session, h - h_k does not show which one, so the session loss cannot reach zero. The
    paper's definition is kept. There is no option to draw only nearby views or only other sessions.
  * a stream is as long as the data set. It stays with an object with probability 0.95, and then with the session with
    the same probability [S]. It moves one step along one axis at a time; azimuths wrap around. [C] never steps back in
    azimuth and never starts at the end of an axis. Here all directions are equally likely.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import common
from common import Count, Natural, NonNegative, Plural, Positive, Share, ShareAbove0, ShareBelow1, upcast

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class Args(common.RunArgs):
    """What CIPER and its baselines need, beside the arguments that all scripts share."""

    data: str = "blocks-views"
    """blocks-views or blocks, rendered on the spot; cifar10, cifar100, core50, tdw or imagefolder with --data-dir"""
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
    """views of an image: augmentations of it, other images of its object, or the next image of a stream"""
    alpha: NonNegative = 1.0
    """weight of the equivariant part: of L_p (ciper, predictive), or of the rotations (essl)"""
    drop_aug: tuple[Literal["crop", "flip", "jitter", "gray"], ...] = ()
    """augmentations to leave out; their parameters leave the target"""
    sessions: tuple[Annotated[int, "[1, 11]"], ...] = (1, 2)
    """sessions of core50 to train on, counted from 1; the others test"""
    time_continue: ShareBelow1 = 0.95
    """probability that the next image of a stream (--views time) keeps the object; the same for keeping the session"""
    temp: Positive = 0.5
    """tau, temperature of the contrastive losses"""
    negatives: Literal["both", "cross"] = "both"
    """negatives of an embedding: both views of all other images, or only the other view"""
    proj_hidden: Count = 2048
    """hidden width of the projector, and of E-SSL's rotation head"""
    proj_dim: Count = 2048
    """width of the embeddings that are contrasted"""
    coords: bool = True
    """give the encoder two more channels that hold the coordinates of the pixels"""
    flip_p: Share = 0.8
    """probability of a flip (--views image)"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.2, 1.0)
    """area of the random crops, relative to the image (--views image)"""
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter, applied to 80 % of the views (--views image)"""
    weight_decay: NonNegative = 5e-4
    """weight decay of SGD, on all parameters"""
    warmup_epochs: NonNegative = 0
    """linear warm-up; then the learning rate falls along half a cosine"""


# Ours: rendered images, minutes on a CPU.
SMALL = dict(arch="resnet_pico", epochs=3, batch_size=64, lr=0.03, warmup_epochs=0, proj_hidden=256, proj_dim=128)
RECIPES = {
    "cifar10": dict(epochs=800),
    "cifar100": dict(epochs=800),  # not in the paper
    "tdw": dict(img_size=64, epochs=100, batch_size=64, lr=0.03),
    "core50": dict(img_size=128, epochs=100, batch_size=64, lr=0.03),
    "blocks-views": SMALL,
    "blocks": SMALL,
}
ESSL = dict(alpha=0.4, negatives="cross", coords=False, flip_p=0.5, lr=0.12, batch_size=512, warmup_epochs=10)
VALID_VIEWS = {
    "ciper": ("image", "dataset"),
    "predictive": ("image", "dataset"),
    "simclr": ("image", "dataset", "time"),
    "essl": ("image",),
}
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean and std with which [E] normalises it
SESSIONS = 11  # of core50 and blocks-views


def values_in_force(first):
    """What the objective and the recipe, named in a first look at the command line, set as defaults for the second."""
    name = first.recipe or first.data
    values = dict(recipe=name)
    if first.objective == "essl":
        values |= ESSL
    return values | RECIPES.get(name, {})


# ----------------------------------------------------------------------------------------------------------------------
# Views
# ----------------------------------------------------------------------------------------------------------------------


def normalisation(args):
    """Mean and std of each channel: those of E-SSL's code for cifar10, else the data set's own."""
    if args.recipe == "cifar10" and args.data in ("cifar10", "imagefolder"):
        return CIFAR10
    return common.normalisation(args)


def make_policies(args):
    """{view: Compose}. "1" and "2" are contrasted, "0" is the anchor; "3", half as large, is what E-SSL rotates."""
    augmented = args.views == "image"
    policies = {view: make_policy(args, args.img_size, augmented) for view in "12"}
    if args.objective in ("ciper", "predictive"):
        policies["0"] = make_policy(args, args.img_size, augmented=False)
    if args.objective == "essl":
        policies["3"] = make_policy(args, args.img_size // 2, augmented=True)
    return policies


def make_policy(args, size, augmented):
    """The Compose of one view of `size` px: all augmentations that are not dropped, or a centre crop alone."""
    crop = common.CenterCrop(size, resize=size)
    if augmented and "crop" not in args.drop_aug:
        crop = common.RandomResizedCrop(size, args.crop_scale)

    # Dropping an augmentation leaves the order of the others as it is.
    flip, jitter = common.HorizontalFlip(args.flip_p), common.ColorJitter(*args.jitter)
    ops = dict(flip=flip, jitter=jitter, gray=common.Grayscale())
    kept = [op for name, op in ops.items() if augmented and name not in args.drop_aug]
    return common.Compose([crop, *kept, common.Normalize(*normalisation(args))])


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, what its policy draws for them)}."""
    n = args.batch_size
    return {view: (torch.arange(n), policy.sample(n, generator)) for view, policy in policies.items()}


class Ragged:
    """Lists of different lengths. `groups` (n,), from 0, says in which list each of the numbers 0 to n - 1 is."""

    def __init__(self, groups):
        self.order = torch.argsort(groups, stable=True)
        self.count = torch.bincount(groups)
        self.first = self.count.cumsum(0) - self.count

    def pick(self, group, u):
        """A member of each of the lists `group` (m,), at the fraction u (m,) in [0, 1) of its length -> (m,)."""
        return self.order[self.first[group] + (u * self.count[group]).long()]

    def lists(self):
        """All lists, as Python lists of integers."""
        return [members.tolist() for members in self.order.split(self.count.tolist())]


class ObjectViews:
    """Data-set views, a sampler for the loader. An epoch visits every image once, as the anchor. Views "1" and "2" each
    show the anchor's object: a session is drawn uniformly, then an image of that session."""

    def __init__(self, data):
        self.object = data.groups.unique(return_inverse=True)[1]  # (N,) from 0
        session = data.factors.get("session", torch.zeros_like(self.object))

        # A cell holds the images of one object in one session.
        pairs = torch.stack([self.object, session], 1)  # (N, 2)
        cells, self.cell = pairs.unique(dim=0, return_inverse=True)  # (C, 2), (N,)
        self.cells_of_object = Ragged(cells[:, 0])
        self.images_of_cell = Ragged(self.cell)

    def __len__(self):
        return len(self.object)

    def __call__(self, items, epoch, generator):
        """Anchors (B,) -> {view: rows (B,)}."""
        # Drawing the session first gives sessions of few images as much weight as others.
        rows = {"0": items}
        for view, (u, v) in zip("12", torch.rand(2, 2, len(items), generator=generator)):
            cell = self.cells_of_object.pick(self.object[items], u)  # (B,)
            rows[view] = self.images_of_cell.pick(cell, v)
        return rows


class TimeStream(ObjectViews):
    """Time views: "1" and "2" are neighbours in a stream, which is as long as the data set and new in every epoch. It
    walks through the views of an object, with jumps to its other sessions, and then goes on to the next object."""

    def __init__(self, data, p, seed):
        super().__init__(data)
        self.p, self.seed, self.epoch = p, seed, None
        self.steps = neighbours(data.factors, self.cell)

    def walk(self, epoch):
        """The stream of an epoch: (N,) rows."""
        n, generator = len(self), common.rng(self.seed, "stream", epoch)
        cells, images = self.cells_of_object.lists(), self.images_of_cell.lists()
        cell_of = self.cell.tolist()
        choose = lambda options, u: options[int(u * len(options))]

        # All objects come once, in random order, before any comes again.
        orders = [torch.randperm(len(cells), generator=generator) for _ in range(n // len(cells) + 1)]
        objects = iter(torch.cat(orders).tolist())

        # The next image shows another object, another session of the same object, or the view one step away.
        row, stream = None, []
        for leave, switch, u, v in torch.rand(n, 4, generator=generator).tolist():
            if row is None or leave >= self.p:
                own_cells = cells[next(objects)]
                row = choose(images[choose(own_cells, u)], v)
            elif switch >= self.p and len(own_cells) > 1:
                other_cells = [cell for cell in own_cells if cell != cell_of[row]]
                row = choose(images[choose(other_cells, u)], v)
            elif self.steps[row]:
                row = choose(self.steps[row], u)
            stream.append(row)
        return torch.tensor(stream)

    def __call__(self, items, epoch, generator):
        """Positions (B,) -> {view: rows (B,)}; the first image follows the last."""
        if epoch != self.epoch:
            self.epoch, self.stream = epoch, self.walk(epoch)
        return {"1": self.stream[items], "2": self.stream[(items + 1) % len(self)]}


def places(factors, cell):
    """Where each image is on the grid of views, (N, 3) whole numbers along azimuth, elevation and distance. Without
    views it is the place of its frame in its cell (N, 1)."""
    if "view" in factors:
        return torch.stack([axis.unique(return_inverse=True)[1] for axis in factors["view"].T], 1)

    # Without views, images of a cell follow each other in the order of their frames.
    order = torch.argsort(factors["frame"], stable=True)
    order = order[torch.argsort(cell[order], stable=True)]  # (N,) by cell, then by frame
    place = torch.empty(len(cell), 1, dtype=torch.long)
    place[order, 0] = torch.arange(len(cell)) - Ragged(cell).first[cell[order]]
    return place


def neighbours(factors, cell):
    """For each image the rows of those one step away in its object and session, `cell` (N,): a list of N lists. A step
    goes to the next azimuth (which wraps around), elevation or distance, or to the next frame."""
    # Each image has a key, its cell and its place, by which its neighbours are found.
    place = places(factors, cell)  # (N, 3) or (N, 1)
    keys = lambda place: [tuple(key) for key in torch.cat([cell[:, None], place], 1).tolist()]
    row_at = {key: row for row, key in enumerate(keys(place))}

    # Shift all images by one step along each axis, and look up which image is there.
    found = [set() for _ in cell]
    for axis in range(place.shape[1]):
        for step in (-1, 1):
            shifted = place.clone()
            shifted[:, axis] += step
            if "view" in factors and axis == 0:
                shifted[:, 0] %= place[:, 0].max() + 1
            for row, key in enumerate(keys(shifted)):
                found[row].add(row_at.get(key, row))
    return [sorted(rows - {row}) for row, rows in enumerate(found)]


# ----------------------------------------------------------------------------------------------------------------------
# Targets: what happened between anchor and view
# ----------------------------------------------------------------------------------------------------------------------

PARAMETERS = {  # Table 1
    "crop": ("left", "top", "height", "width"),
    "flip": ("flip",),
    "jitter": ("brightness", "contrast", "saturation", "hue"),
    "gray": ("gray",),
}


def augmentation(params, dropped=()):
    """r of image views: params of a view, (n,) each -> (n, M), M = 10 less the columns of the `dropped` ones."""
    kept = [name for op, names in PARAMETERS.items() if op not in dropped for name in names]

    # Table 1 defines the grey parameter as 0 for grey images.
    columns = {name: params[name].float() for name in kept}
    if "gray" in columns:
        columns["gray"] = 1 - columns["gray"]
    return torch.stack(list(columns.values()), 1)


def change(factors, i, j):
    """r of data-set views, from image i to image j of an object, rows (n,) each.

    Returns the change of azimuth (in [-180, 180) degrees), elevation and distance (n, 3), or (n, 0) where views are
    unknown, and the session of j (n,), or None where sessions are unknown."""
    r, session = torch.zeros(len(i), 0), None
    if "view" in factors:
        r = factors["view"][j] - factors["view"][i]  # (n, 3)
        r[:, 0] = (r[:, 0] + 180) % 360 - 180
    if "session" in factors:
        session = factors["session"][j]
    return r, session


def targets(args, factors, params, rows):
    """What the predictor is to predict, of view 1 and then of view 2: r (2 b, M), and session (2 b,) or None."""
    if args.views == "image":
        return torch.cat([augmentation(params[view], args.drop_aug) for view in "12"]), None
    r1, session1 = change(factors, rows["0"], rows["1"])
    r2, session2 = change(factors, rows["0"], rows["2"])
    session = None if session1 is None else torch.cat([session1, session2])
    return torch.cat([r1, r2]), session


def target_sizes(args, factors):
    """(number of parameters M, number of sessions) in the target."""
    if args.views == "image":
        return sum(len(names) for op, names in PARAMETERS.items() if op not in args.drop_aug), 0
    return 3 if "view" in factors else 0, SESSIONS if "session" in factors else 0


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def nt_xent(z1, z2, tau):
    """L_c with both views of other images as negatives: z1, z2 (b, D) on this process -> mean over its 2 b rows."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    u = torch.cat([common.gather(z1), common.gather(z2)])  # (2 B, D)
    sim = torch.cat([z1, z2]) @ u.T / tau  # (2 b, 2 B)

    # The similarity of a row to itself is left out. The positive is the other view.
    B, first = len(u) // 2, common.rank() * len(z1)
    rows = first + torch.arange(len(z1), device=z1.device)  # (b,)
    itself, other = torch.cat([rows, rows + B]), torch.cat([rows + B, rows])  # (2 b,) each
    return F.cross_entropy(sim.scatter(1, itself[:, None], -math.inf), other)


def info_nce(z1, z2, tau):
    """The contrast across views [E]: z1, z2 (b, D) on this process -> mean over its rows and both directions."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    positive = common.rank() * len(z1) + torch.arange(len(z1), device=z1.device)  # (b,)
    contrast = lambda a, b: F.cross_entropy(a @ common.gather(b).T / tau, positive)  # of (b, B) similarities
    return (contrast(z1, z2) + contrast(z2, z1)) / 2


def standardise(r, eps=1e-5):
    """r (n, M) on this process -> (r - mean) / sqrt(var + eps); biased variance, statistics of all processes."""
    gathered = common.gather(r)
    return (r - gathered.mean(0)) / (gathered.var(0, correction=0) + eps).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The encoder and the heads that an objective needs. `outputs`: width of the predictor's output."""

    evaluated, compiled = "backbone", ()

    def __init__(self, backbone, args, outputs):
        super().__init__()
        self.backbone, self.args = backbone, args
        self.projector = self.predictor = self.rotation = None

        # All objectives but the predictive one contrast projections.
        d, hidden = backbone.dim, args.proj_hidden
        if args.objective != "predictive":
            self.projector = nn.Sequential(
                nn.Linear(d, hidden, bias=False),
                nn.BatchNorm1d(hidden),
                nn.ReLU(inplace=True),
                nn.Linear(hidden, args.proj_dim, bias=False),
                nn.BatchNorm1d(args.proj_dim, affine=False),
            )

        # One predictor gives the parameters, and then a score for each session.
        if args.objective in ("ciper", "predictive"):
            self.predictor = nn.Sequential(
                nn.Linear(d, d), nn.LayerNorm(d), nn.ReLU(inplace=True), nn.Linear(d, outputs)
            )

        # E-SSL predicts one of four quarter turns.
        if args.objective == "essl":
            layer = lambda before, after: (nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU(inplace=True))
            self.rotation = nn.Sequential(*layer(d, hidden), *layer(hidden, hidden), nn.Linear(hidden, 4))

    def compile_encoder(self):
        self.compiled = (torch.compile(self.backbone, dynamic=False),)  # in a tuple, or it would be a second child

    def forward(self, views, r=None, session=None):
        """The losses of a step: views {"1", "2", ...} (b, 3, H, W) -> ({"loss", ...}, h of view 1 (b, d)).

        r (2 b, M): raw parameters of view 1 and then of view 2; session (2 b,) likewise, or None."""
        args, out, loss = self.args, {}, 0.0
        (encode,) = self.compiled or (self.backbone,)
        h = {name: encode(view) for name, view in views.items() if name != "3"}  # (b, d) each

        # L_c contrasts the two views; the anchor has no part in it.
        if self.projector is not None:
            z1, z2 = upcast(self.projector(h["1"])), upcast(self.projector(h["2"]))  # (b, D) each
            contrast = nt_xent if args.negatives == "both" else info_nce
            with common.full_precision():
                out["L_c"] = contrast(z1, z2, args.temp)
            loss = loss + out["L_c"]

        # L_p predicts the parameters from the difference to the anchor, taken in float32.
        if self.predictor is not None:
            h0, h1, h2 = (upcast(h[view]) for view in "012")
            p = upcast(self.predictor(torch.cat([h0 - h1, h0 - h2])))  # (2 b, M + sessions)
            M = r.shape[1]
            L_p = F.mse_loss(p[:, :M], standardise(r).to(p)) if M else 0.0

            # The session is a class, so its error is a cross-entropy that joins the squared error.
            if session is not None:
                out["L_session"] = F.cross_entropy(p[:, M:], session)
                out["session_accuracy"] = (p[:, M:].argmax(1) == session).float().mean()
                L_p = L_p + out["L_session"]
            out["L_p"] = L_p
            loss = loss + args.alpha * L_p

        # L_rot predicts by which of four quarter turns the small view was rotated.
        if self.rotation is not None:
            rotated = torch.cat([views["3"].rot90(k, (2, 3)) for k in range(4)])  # (4 b, 3, H / 2, W / 2)
            scores = upcast(self.rotation(encode(rotated)))  # (4 b, 4)
            k = torch.arange(4, device=scores.device).repeat_interleave(len(views["3"]))  # (4 b,)
            out["L_rot"] = F.cross_entropy(scores, k)
            out["rotation_accuracy"] = (scores.argmax(1) == k).float().mean()
            loss = loss + args.alpha * out["L_rot"]
        return dict(loss=loss) | out, h["1"]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device, outputs):
    """The model with its initial weights: seeded, the same on every process. `outputs`: the predictor's width."""
    common.seed_everything(args.seed, "weights")

    # The stem suits small images; coordinates of the pixels are further channels of the input.
    mean, std = normalisation(args)
    backbone = common.make_backbone(args.arch, mean, std, args.img_size, stem="cifar", coords=args.coords)
    model = common.batchnorm_over_ranks(Model(backbone, args, outputs), device)
    return model.to(device, memory_format=torch.channels_last)


def losses_of_chance(args, numbers, sessions):
    """The losses that chance would give, in words."""
    losses = []

    # NT-Xent has all other rows as candidates, InfoNCE the rows of the other view.
    if args.objective != "predictive":
        candidates = 2 * args.batch_size - 1 if args.negatives == "both" else args.batch_size
        losses.append(f"L_c {math.log(candidates):.2f}")

    # Standardised parameters have a variance of 1, which is the error of a constant prediction.
    if args.objective in ("ciper", "predictive"):
        error = 1 if numbers else 0
        losses.append(f"L_p about {error + math.log(sessions or 1):.2f}")
    if args.objective == "essl":
        losses.append("L_rot 1.39")
    return ", ".join(losses)


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    common.check_run(args, RECIPES, common.RESNETS)
    valid = VALID_VIEWS[args.objective]
    dropped, sessions = " ".join(args.drop_aug), " ".join(map(str, args.sessions))

    # Each objective goes with some views, and each kind of view with some data sets.
    if args.views not in valid:
        common.die(f"--views {args.views}: {args.objective} goes with {', '.join(valid)}")
    if args.drop_aug and args.views != "image":
        common.die(f"--drop-aug {dropped}: goes with --views image; {args.views} views are not augmented")
    if args.views != "image" and args.data not in ("blocks-views", "core50", "tdw"):
        takes = "take blocks-views, core50 or tdw, or --views image"
        common.die(f"--views {args.views}: {args.data} knows neither views nor sessions of its objects; {takes}")

    # --time-continue is for streams alone. E-SSL rotates a crop of half the side, which needs a pixel.
    if args.time_continue != 0.95 and args.views != "time":
        common.die(f"--time-continue {args.time_continue}: goes with --views time")
    if args.objective == "essl" and args.img_size < 2:
        common.die(f"--img-size {args.img_size}: essl rotates crops of half the size; take 2 or more")

    # Dropped augmentations are named once, and one at least stays.
    if len(set(args.drop_aug)) < len(args.drop_aug) or len(args.drop_aug) == len(PARAMETERS):
        names = ", ".join(PARAMETERS)
        common.die(f"--drop-aug {dropped}: name each once, and leave one of {names} to tell the views apart")

    # Training sessions are named once, and exist on core50 only.
    if args.sessions != (1, 2) and args.data != "core50":
        common.die(f"--sessions {sessions}: {args.data} has none to choose; leave it out")
    if not args.sessions or len(set(args.sessions)) < len(args.sessions):
        common.die(f"--sessions {sessions}: name those to train on, of 1 to 11, each once")


def main(argv=None):
    """Train: arguments -> data, model, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes

    # The test split of core50 holds the sessions that are not named for training.
    train, test = (
        common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers, args.sessions)
        for split in ("train", "test")
    )
    train = train.to(device)

    # The sampler draws which images are the views of an anchor; without one, views are augmentations of one image.
    sampler = None
    if args.views == "dataset":
        sampler = ObjectViews(train)
    elif args.views == "time":
        sampler = TimeStream(train, args.time_continue, args.seed)
    policies = make_policies(args)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device, sampler)

    # The predictor has an output for each parameter and each session. The schedule sets the learning rate.
    numbers, sessions = target_sizes(args, train.factors)
    model = build(args, device, numbers + sessions)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay, fused=device.type == "cuda"
    )

    # The run directory is named after objective and views. A resumed run continues from its checkpoint.
    variant = "-".join([args.objective, args.views] + [f"no-{name}" for name in args.drop_aug])
    run = common.Run(args, variant, model, optimizer)
    run.restore(train)
    run.introduce(train, loader, args.lr, losses_of_chance(args, numbers, sessions))
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, params, rows in run.steps(loader):
        # The learning rate follows a warm-up and then half a cosine.
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step == 0:
            run.picture("views.png", [views[view] for view in sorted(views)])

        # The targets of the predictor are raw parameters; the model standardises them over the global batch.
        r = session = None
        if model.predictor is not None:
            r, session = targets(args, train.factors, params, rows)
            r = common.send(r, device)
        if session is not None:
            session = common.send(session, device)

        # DistributedDataParallel averages the gradients over processes in the backward pass.
        with common.autocast(device, args.amp):
            out, h = ddp(views, r, session)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        optimizer.step()
        run.log(step, features=h, lr=lr, epoch=epoch, **out)

    # An untrained encoder with the same initial weights is the baseline of the final k-NN score.
    run.finish(build(args, device, numbers + sessions), train, test)


if __name__ == "__main__":
    common.command(main)
