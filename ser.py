"""SER: soft equivariance regularisation of intermediate tokens, on MoCo-v3, DINO or Barlow Twins; and what it is
compared to.

Paper: "Soft Equivariance Regularization for Invariant Self-Supervised Learning" (ICLR 2026, arXiv 2603.06693).

Idea. Invariance at the last layer erases what an image's transformation did to it. SER leaves the base loss on the
final [CLS] as it is and asks for equivariance earlier, where the tokens are still a map: transforming the map of one
view by the group element that leads to the other view should give the other view's map, cell by cell.

    f = f2 o f1       f1: patches and the first `equi_layer` blocks, without [CLS]; [CLS] enters at the input of f2
    B = b1 + b2       b1 (most images) takes the base's views T; b2, a share `equi_ratio`, takes
                      T_eq = T without random crop, with rotations by 90 degrees and anisotropic scaling
    x_i = g_i x       for b2: g_i = scaling o rot90^k_i o flip^f_i, after photometrics that do not enter g
    z  = p(rho_g f1(x_1)),  z' = p(f1(x_2)),  g = g_2 g_1^-1                  (n, P, D), P cells of view 2's grid
    l(z_ij) = -s(z_ij, z'_ij) + log( exp s(z_ij, z'_ij) + sum_{m != i, l} exp s(z_ij, z_ml) + exp s(z_ij, z'_ml) )
    L_equiv = mean of l over both sides, s(a, b) = cos(a, b) / tau            (negatives: cells of other images)
    L = L_inv(b1 and b2) + lambda L_equiv(b2)         L_inv: `contrast`, `distill` or `redundancy_reduction`, below

The baselines leave out b2 and predict what happened to a view from [CLS]: after the last norm (`--equi-layer 0`, as
published), or decoupled after block k: AugSelf the differences of the transformations' parameters, STL one image's
transformation in another image, EquiMod a view's embedding from the un-augmented image's, E-SSL a rotation.

Usage
    python ser.py                                                      # rendered images, CPU, minutes
    python ser.py --base dino --equi none                              # a base alone
    python ser.py --equi augself --equi-layer 3                        # a baseline, decoupled
    python ser.py --local-views 4                                      # two global and four local views
    python ser.py --data imagefolder --data-dir DIR --recipe cifar10   # any folder of images
    torchrun --nproc_per_node=8 ser.py --data imagenet --data-dir IMAGENET --compile

Where the paper is silent or at odds with itself, this file takes (source in brackets):
  * equi_ratio 0.01, lambda 1 (DINO: 0.3) [launch commands of the public code, github.com/aitrics-chris/SER]; at least
    8 images. tau is the paper's: 0.3, DINO 0.5.
  * scaling changes the grid of patches: one (h, w) a view and step, area 0.7 to 1.3 of the square grid, aspect 3/4 to
    4/3, positions resampled bicubically [public code]; nothing leaves the image, so there is no mask. Images are
    resized with antialiasing, where the public code has none.
  * pairs follow the paper's Algorithm 1: g1 and g2 are drawn independently, an image each; both views come from the
    online encoder; negatives are the cells of both sides. The public two-view code shares one quarter turn a step,
    makes the second view's flip and half-turn the complement of the first's, and takes momentum keys from one side.
  * x for b2 is one random resized crop, shared by both views, so that g is free of crops [public code]; `--equi-crop
    center` takes the centre of the image instead.
  * gradients flow through both sides and through the gather over processes. The public code gathers without gradient,
    by which L_equiv would train nothing; the paper's ablation (lambda = 0 differs from lambda > 0) rules that out.
  * a LayerNorm before the projector; the projector after rho_g [paper's Algorithm 1]; 6 heads in ViT-S [DINO, timm].
  * MoCo-v3 itself follows github.com/facebookresearch/moco-v3: fixed sin-cos positions (SER's public code learns
    them), frozen random patch projection, weight decay on everything, no clipping. Base lr 3e-4 [SER's public code;
    the same peak as MoCo-v3's own recipe].
  * DINO (github.com/facebookresearch/dino) and Barlow Twins (github.com/facebookresearch/barlowtwins), on AdamW, with
    the learning rates, clipping per tensor, teacher momentum and crops of SER's public code. DINO's teacher moves by
    the momentum of the coming step, not of the past one. Its temperature rises by the step and arrives after
    `teacher_temp_epochs`; DINO's table rises by the epoch and arrives one epoch earlier. The teacher is evaluated, as
    in DINO; SER's public code loads the student.
  * 2+4 views: locals and all of b2's views have jitter and half of them blur, but neither grey nor solarisation; each
    pair of b2 is made of one crop; ten terms of MoCo-v3, summed (DINO: averaged) [public code]. L_equiv is the
    formula above, summed over one global and two local pairs; the public code's offset counts images where it should
    count tokens.
  * AugSelf (github.com/hankook/AugSelf): one head a parameter, 44.2 M parameters where SER's table has 43.7; gradient
    through both views; each view mirrors the centre of its crop with its own flip; the crops of MoCo-v3. Its ImageNet
    views keep AugSelf's photometrics (saturation 0.4, blur 0.5, no solarisation), STL's keep STL's; all rows of the
    two small recipes see the same ones.
  * STL (github.com/jaemyung-u/stl): partners have one box in fractions of their image. EquiMod
    (github.com/ADevillers/EquiMod): a batch norm over both views together standardises the 18 parameters, where
    EquiMod's code has constants of its data set; a projector call a view, as in SER's code (EquiMod's has one for all
    three). E-SSL (github.com/rdangovs/essl): the weight for SimCLR, 0.4; Barlow Twins 8. Heads as wide as in SER's
    table.

Recipes `blocks` and `cifar10` are ours; they raise equi_ratio to 0.125, because 1 % of a small batch is nothing.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils.checkpoint import checkpoint

import common
from common import (
    CenterCrop,
    ColorJitter,
    Compose,
    Count,
    GaussianBlur,
    Grayscale,
    GridResize,
    HorizontalFlip,
    Natural,
    NonNegative,
    Normalize,
    Plural,
    Positive,
    RandomResizedCrop,
    Rot90,
    Share,
    ShareAbove0,
    ShareBelow1,
    Solarize,
    upcast,
)


@dataclasses.dataclass
class Args(common.RunArgs):
    """What SER, its bases and their views need, beside the arguments that all scripts share."""

    base: Literal["mocov3", "dino", "barlow"] = "mocov3"
    """the invariant method underneath"""
    equi: Literal["ser", "none", "augself", "stl", "equimod", "essl"] = "ser"
    """the equivariance term; none is exactly the base"""
    equi_layer: Natural = 3
    """block after which the tokens (ser) or [CLS] (the others) are made equivariant; 0: the final [CLS]"""
    cls_layer: Natural | None = None
    """block after which [CLS] enters; default: --equi-layer with ser, 0 (the input) with all others"""
    equi_weight: NonNegative = 1.0
    """lambda, the weight of L_equiv (0 keeps the late [CLS] and the views of SER: the paper's control)"""
    equi_ratio: ShareBelow1 = 0.01
    """share of the global batch in b2, rounded to a multiple of 8 and never below 8"""
    equi_temp: Positive = 0.3
    """tau, the temperature of L_equiv (ser, stl, equimod)"""
    equi_dim: Count = 512
    """width of the projector p of the tokens"""
    equi_area: tuple[Positive, Positive] = (0.7, 1.3)
    """range of the scaling: number of cells relative to the square grid"""
    equi_crop: Literal["random", "center"] = "random"
    """what b2's two large views are made of: one random crop shared by both, or the centre of the image"""
    equi_params: tuple[Literal["crop", "color", "flip", "blur", "solarize", "rotation"], ...] = ("crop", "color")
    """which parameters AugSelf predicts; rotation also turns the views"""
    equi_trans_weight: NonNegative = 0.1
    """weight of STL's L_trans within its L_equiv"""
    local_views: Literal[0, 4] = 0
    """small crops of each image beside the two large ones"""
    local_size: Count = 96
    """their side in pixels, and that of E-SSL's rotated crop"""
    local_scale: tuple[ShareAbove0, ShareAbove0] = (0.05, 0.25)
    """area of these crops, relative to the image"""
    proj_hidden: Count = 4096
    """hidden width of projector and predictor (mocov3, barlow) or of the head (dino)"""
    proj_dim: Count = 256
    """width of the embeddings that are contrasted (mocov3), decorrelated (barlow), or of the head's bottleneck
    (dino)"""
    temp: Positive = 0.2
    """temperature T of MoCo-v3; of DINO's student"""
    momentum: Share = 0.99
    """of the momentum encoder (mocov3) or the teacher (dino) at the start; it rises to 1 along half a cosine"""
    prototypes: Plural = 65536
    """width K of DINO's output"""
    teacher_temp: tuple[Positive, Positive] = (0.04, 0.07)
    """temperature of DINO's teacher: first and last value of its linear warm-up"""
    teacher_temp_epochs: NonNegative = 10
    """epochs of that warm-up"""
    freeze_last_epochs: NonNegative = 1
    """epochs at the start in which DINO's last layer does not learn"""
    redundancy: NonNegative = 0.0051
    """weight of the off-diagonal terms of Barlow Twins"""
    weight_decay: NonNegative = 0.1
    """AdamW's at the start: on all parameters (mocov3, barlow), on those of two or more dimensions (dino)"""
    weight_decay_end: NonNegative | None = None
    """and at the end of half a cosine; default: it stays as it is"""
    warmup_epochs: NonNegative = 10
    """linear warm-up; then the learning rate falls along half a cosine"""
    lr_end: Share = 0.0
    """the learning rate at the end, as a share of the peak"""
    clip: Positive | None = None
    """largest norm of the gradient of each parameter tensor; default: no clipping"""
    drop_path: ShareBelow1 = 0.0
    """stochastic depth of the trained encoder"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """of the crops"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.08, 1.0)
    """area of the random crops, relative to the image"""
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter, applied to 80 % of the views"""
    blur: tuple[Share, Share] = (1.0, 0.1)
    """probability of Gaussian blur in view 1 and view 2; where both are 0 no other view is blurred either"""
    solarize: tuple[Share, Share] = (0.0, 0.2)
    """probability of solarisation in view 1 and view 2"""


# What a base needs: the settings of SER's ImageNet runs [its public code, where the paper only says "as published"].
BASES = dict(
    mocov3=dict(),
    dino=dict(
        lr=1e-4,
        lr_end=0.0125,
        proj_hidden=2048,
        temp=0.1,
        momentum=0.982,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip=0.3,
        drop_path=0.1,
        crop_scale=(0.25, 1.0),
        interpolation="bicubic",
    ),
    barlow=dict(lr=1e-4, lr_end=0.001, proj_hidden=8192, proj_dim=8192, clip=0.3, interpolation="bicubic"),
)
EQUIS = dict(  # what an equivariance term needs, its own views among it
    ser=dict(),
    none=dict(equi_layer=0),
    augself=dict(equi_layer=0, equi_weight=0.5, jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.5, 0.5), solarize=(0.0, 0.0)),
    stl=dict(equi_layer=0, equi_temp=0.2, crop_scale=(0.2, 1.0), blur=(0.5, 0.5), solarize=(0.0, 0.0)),
    equimod=dict(equi_layer=0, equi_temp=0.2),
    essl=dict(equi_layer=0, equi_weight=0.4, local_scale=(0.05, 0.14)),
)
PAIRS = {("dino", "ser"): dict(equi_weight=0.3, equi_temp=0.5), ("barlow", "essl"): dict(equi_weight=8.0)}
SMALL = dict(
    img_size=32,
    local_size=16,
    local_scale=(0.1, 0.5),
    jitter=(0.4, 0.4, 0.2, 0.1),
    blur=(0.0, 0.0),
    solarize=(0.0, 0.0),
    crop_scale=(0.2, 1.0),
    equi_ratio=0.125,
    drop_path=0.0,
)  # the same views for every row, so that rows differ in their method alone
RECIPES = dict(
    imagenet=dict(),  # the paper: ViT-S/16, 100 epochs, batch 2048 = 8 x 256, peak lr 2.4e-3 (DINO, Barlow Twins: 8e-4)
    imagenet100=dict(),  # not in the paper: its ImageNet values
    cifar10=dict(arch="vit_tiny", patch_size=4, epochs=200, batch_size=512, lr=5e-4, proj_hidden=1024, **SMALL),
    blocks=dict(
        arch="vit_pico",
        patch_size=8,
        epochs=4,
        warmup_epochs=0.5,
        batch_size=128,
        lr=4e-3,
        proj_hidden=512,
        proj_dim=128,
        momentum=0.9,
        **SMALL,
    ),  # a run this short wants a momentum encoder that keeps up
)
RECIPES["cifar100"] = RECIPES["cifar10"]
SMALL_BASES = dict(  # and what the two small recipes, both ours, change for a base
    mocov3=dict(),
    dino=dict(lr=1e-3, prototypes=1024, teacher_temp=(0.04, 0.04), momentum=0.99, freeze_last_epochs=0.0, clip=3.0),
    barlow=dict(proj_dim=512, clip=3.0),
)


def values_in_force(first):
    """The recipe that a first look at the command line asks for, as defaults for the second."""
    name = first.recipe or first.data
    if name not in RECIPES:
        return {}  # `check` will complain
    small = SMALL_BASES[first.base] if RECIPES[name].get("img_size") == 32 else {}
    return (
        dict(recipe=name)
        | BASES[first.base]
        | EQUIS[first.equi]
        | PAIRS.get((first.base, first.equi), {})
        | RECIPES[name]
        | small
    )


# ----------------------------------------------------------------------------------------------------------------------
# Views: T for b1, T_eq for b2
# ----------------------------------------------------------------------------------------------------------------------


def second_part(batch_size, ratio):
    """n2 = max(8, 8 round(r B / 8)): multiples of 8, so that up to 8 processes share them evenly."""
    return max(8, 8 * round(ratio * batch_size / 8))


def make_policies(args):
    """{view: Compose}: "1" and "2" of T, and local views "3" to "6". SER has "eq1" to "eq6" of T_eq beside them,
    EquiMod "plain", the un-augmented image, E-SSL "rotated", the crop that a step will rotate."""
    normalise = Normalize(*common.normalisation(args))
    crop = RandomResizedCrop(args.img_size, args.crop_scale, interpolation=args.interpolation)
    local_crop = RandomResizedCrop(args.local_size, args.local_scale)

    def view(crop, group, gray=0.2, blur=0.0, solarize=0.0):
        return Compose(
            [
                crop,
                ColorJitter(*args.jitter, p=0.8),
                Grayscale(gray),
                GaussianBlur(p=blur),
                Solarize(p=solarize),
                *group,
                normalise,
            ]
        )

    flip = [HorizontalFlip()] + [Rot90()] * (args.equi == "augself" and "rotation" in args.equi_params)
    plainer = dict(gray=0.0, blur=0.5 if any(args.blur) else 0.0)  # photometrics of the 2+4 variant
    policies = {}
    for i in range(2 + args.local_views):
        cut = crop if i < 2 else local_crop
        photometrics = dict(blur=args.blur[i], solarize=args.solarize[i]) if i < 2 else plainer
        policies[f"{i + 1}"] = view(cut, flip, **photometrics)
        if args.equi == "ser":
            eq_cut = (
                CenterCrop(args.img_size, interpolation=args.interpolation)
                if i < 2 and args.equi_crop == "center"
                else cut
            )
            group = [
                HorizontalFlip(),
                Rot90(),
                GridResize(args.patch_size, cut.size // args.patch_size, args.equi_area),
            ]
            policies[f"eq{i + 1}"] = view(eq_cut, group, **(plainer if args.local_views else photometrics))
    if args.equi == "equimod":
        policies["plain"] = Compose([CenterCrop(args.img_size, interpolation=args.interpolation), normalise])
    if args.equi == "essl":
        policies["rotated"] = view(local_crop, flip, blur=0.1 if any(args.blur) else 0.0)
    return policies


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, their params)}. b2's rows lie evenly over the batch, so that the
    contiguous rows of each process hold the same number of them; its views share a crop two by two. STL's rows share
    all but flip, blur and solarisation two by two."""
    rows = torch.arange(args.batch_size)
    n2 = second_part(args.batch_size, args.equi_ratio) if args.equi == "ser" else 0
    b2 = torch.arange(n2) * args.batch_size // max(n2, 1)  # (n2,)
    b1 = rows[~torch.isin(rows, b2)]  # (n1,)
    views = {name: (b2 if name.startswith("eq") else b1) for name in policies}
    drawn = {name: (at, policies[name].sample(len(at), generator)) for name, at in views.items()}
    for name, (_, draws) in drawn.items():
        if name in ("eq2", "eq4", "eq6"):  # the first view's random crop, if it is one
            draws |= {key: value for key, value in drawn[f"eq{int(name[2]) - 1}"][1].items() if key in common.BOX}
        if args.equi == "stl":
            for key in (*common.BOX, "brightness", "contrast", "saturation", "hue", "order", "gray"):
                draws[key] = draws[key][::2].repeat_interleave(2, 0)
            policies[name].crop.place(
                draws, torch.full((args.batch_size, 2), 224)
            )  # one box, in fractions of images of any size
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# The group and its action on token maps
# ----------------------------------------------------------------------------------------------------------------------


def relative(k1, f1, k2, f2):
    """g = g2 g1^-1 for elements (k, f): flip horizontally f times, then rotate k quarter turns counter-clockwise.

    f = f1 xor f2;  k = k2 - k1 if f = 0, k2 + k1 if f = 1 (mod 4). Tensors (n,), integers; f may be bool.
    """
    f = f1.long() ^ f2.long()
    return (k2 - k1 * (1 - 2 * f)) % 4, f


def act(z, k, f, size):
    """rho_g: z (n, h1, w1, D) -> (n, h2, w2, D) with (h2, w2) = `size`, per-sample (k, f) as in `relative`.

    In normalised coordinates (x right, y down, cell centres, [-1, 1]) g moves a point p to D p, D = R^k F^f, and
    scaling changes nothing but the grid. So output cell p reads z at D^T p, bicubically: an exact permutation of
    cells wherever the permuted input grid is the output grid."""
    quarter, flip = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    table = torch.stack(
        [torch.linalg.matrix_power(quarter, i) @ torch.linalg.matrix_power(flip, j) for i in range(4) for j in range(2)]
    )
    D = common.send(table[2 * k + f], z.device).to(z.dtype)  # (n, 2, 2)
    theta = F.pad(D.transpose(1, 2), (0, 1))  # (n, 2, 3): [D^T | 0]
    cells = F.affine_grid(theta, (len(z), z.shape[-1], *size), align_corners=False)  # (n, h2, w2, 2)
    out = F.grid_sample(z.permute(0, 3, 1, 2), cells, "bicubic", "border", align_corners=False)
    return out.permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def nt_xent(z1, z2, tau, chunk=None):
    """L_equiv (Section 3.3): z1 = p(rho_g f1(x1)) and z2 = p(f1(x2)), each (n, P, D) on this process, -> scalar. With
    one cell, P = 1, it is SimCLR's loss over 2 n rows.

    Positive: the same cell of the same image on the other side. Negatives: all cells, both sides, of other images of
    all processes; cells of the anchor's own image are neither. One image in all gives 0. Anchors go in chunks of about
    `chunk` logits (2^27 on a GPU, 2^23 on a CPU) that are recomputed in the backward pass, so memory does not grow with
    the square of the cells.
    """
    n, P, _ = z1.shape
    q = F.normalize(torch.stack([z1, z2], dim=1), dim=-1)  # (n, 2, P, D) anchors
    keys = common.gather(q)  # (N, 2, P, D)
    N, first = len(keys), common.rank() * n
    if N == 1:
        return 0 * q.sum()
    positive = (q[:, 0] * q[:, 1]).sum(-1, keepdim=True).transpose(1, 2) / tau  # (n, 1, P), the same for both sides

    def other_images(anchors, own):  # (c, 2, P, D), (c,) -> log-sum-exp over cells of other images (c, 2, P)
        logits = (anchors.flatten(0, 2) @ keys.flatten(0, 2).T / tau).view(len(own), 2 * P, N, 2 * P)
        logits[torch.arange(len(own), device=own.device), :, own] = -torch.inf
        return logits.flatten(2).logsumexp(-1).view(len(own), 2, P)

    own = torch.arange(first, first + n, device=q.device)  # (n,)
    c = max(1, (chunk or (2**27 if q.is_cuda else 2**23)) // (2 * P * N * 2 * P))
    rest = [checkpoint(other_images, q[i : i + c], own[i : i + c], use_reentrant=False) for i in range(0, n, c)]
    return (torch.logaddexp(torch.cat(rest), positive) - positive).mean()


def contrast(q, k, T):
    """ctr(q, k) of MoCo-v3: row i of q and k (b, d) is the same image; keys of all processes are negatives. With q
    and k normalised, 2 T times the cross-entropy of q k^T / T against the diagonal."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = q @ common.gather(k).T / T  # (b, B)
    labels = torch.arange(len(q), device=q.device) + common.rank() * len(q)
    return 2 * T * F.cross_entropy(logits, labels)


def distill(students, teachers, centre, temp, teacher_temp):
    """DINO: students and teachers are outputs (b, K) of views, in the same order. Cross-entropy of softmax(s / temp)
    against softmax((t - centre) / teacher_temp), mean over the images and over all pairs of a teacher's and another
    student's view."""
    t = [F.softmax((v - centre) / teacher_temp, dim=1) for v in teachers]
    s = [F.log_softmax(v / temp, dim=1) for v in students]
    terms = [-(p * q).sum(1).mean() for i, p in enumerate(t) for j, q in enumerate(s) if i != j]
    return sum(terms) / len(terms)


def redundancy_reduction(z1, z2, weight):
    """Barlow Twins: z1, z2 (b, d), each column standardised over the global batch of B; with c = z1^T z2 / B over all
    processes, sum_i (c_ii - 1)^2 + weight sum_{i != j} c_ij^2."""
    c = common.all_reduce(z1.T @ z2) / (len(z1) * common.world_size())  # (d, d)
    on = (c.diagonal() - 1).square().sum()
    return on + weight * (c.square().sum() - c.diagonal().square().sum())


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def hidden(*dims):
    """Linear-BN-ReLU from each width to the next, no biases."""
    return [
        layer
        for a, b in zip(dims, dims[1:])
        for layer in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))
    ]


def mlp(*dims):
    """`hidden`, then Linear-BN without affine (MoCo-v3's projector and predictor)."""
    return nn.Sequential(*hidden(*dims[:-1]), nn.Linear(*dims[-2:], bias=False), nn.BatchNorm1d(dims[-1], affine=False))


def moco_init_(backbone):
    """Initial weights of MoCo-v3's ViT: Xavier-uniform, qkv as three square matrices, no biases, [CLS] of std 1e-6; the
    patch projection is uniform and stays as it is: a random one trains more stably."""
    for name, m in backbone.named_modules():
        if isinstance(m, nn.Linear):
            if name.endswith("qkv"):
                bound = (6 / (2 * m.in_features)) ** 0.5
                nn.init.uniform_(m.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.normal_(backbone.cls_token, std=1e-6)
    projection = backbone.patch_embed.proj
    bound = (6 / (projection.weight[0].numel() + projection.out_channels)) ** 0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


class Base(nn.Module):
    """What the three bases share: a step. A base is its backbone, its heads, its teacher (if it has one) and
    `invariance`; the equivariance term `equi` stands beside it, or None."""

    last_layer, compiled = (), {}

    def __init__(self, backbone, args):
        super().__init__()
        self.backbone, self.teacher, self.equi = backbone, None, None
        self.equi_layer, self.equi_weight, self.local_views = args.equi_layer, args.equi_weight, args.local_views

    def compile_encoder(self):
        """Compile the encoders for views whose shape never changes, and for those of b2, whose grids do."""
        torch._dynamo.config.recompile_limit = 16  # two encoders, two sizes, grids: square, as in training, other
        encoders = [self.backbone] if self.teacher is None else [self.backbone, self.teacher["backbone"]]
        self.compiled = {
            (b, changes): torch.compile(b.trace, dynamic=changes) for b in encoders for changes in (False, True)
        }

    def forward(self, views, params, epoch=0.0):
        """All of a step's mathematics: views {name: (n, 3, H, W)} and their params -> ({"loss", "L_inv", "L_equiv",
        ...}, y of view 1)."""
        if "rotated" in views:
            views = views | dict(
                rotated=torch.cat([views["rotated"].rot90(k, (2, 3)) for k in range(4)])
            )  # 0, 90, 180, 270 degrees

        def trace(backbone, view, taps=()):
            return self.compiled.get((backbone, view.startswith("eq")), backbone.trace)(views[view], taps)

        # Online encoder: [CLS] of every view, and for the equivariance term all tokens after block `equi_layer`.
        y, e, taps = {}, {}, (self.equi_layer,) if self.equi_layer else ()
        for view in views:
            y[view], tapped = trace(self.backbone, view, taps)  # (n, D), the final [CLS]
            e[view] = tapped[self.equi_layer] if taps else y[view][:, None]  # (n, N, D)

        # Momentum encoder or teacher: [CLS] of views 1 and 2. For the base, b1 and b2 are one batch.
        whole = lambda y, i: torch.cat([y[view] for view in (f"{i}", f"eq{i}") if view in y])  # (b, D): [b1; b2]
        t = None
        if self.teacher is not None:
            with torch.no_grad():
                t = {
                    view: trace(self.teacher["backbone"], view)[0] for view in ("1", "2", "eq1", "eq2") if view in views
                }
                t = [whole(t, 1), whole(t, 2)]
        y = [whole(y, i + 1) for i in range(2 + self.local_views)]

        # The base's loss on all images, and the equivariance term.
        out = dict(L_inv=self.invariance(y, t, epoch))
        out["loss"] = out["L_inv"]
        if self.equi is not None:
            with common.full_precision():
                out |= self.equi(e, params)
            out["loss"] = out["L_inv"] + self.equi_weight * out["L_equiv"]
        return out, y[0]


class MoCoV3(Base):
    """Online encoder, projector and predictor make queries; the momentum encoder and projector make keys."""

    evaluated, positions = "backbone", "sincos"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        moco_init_(backbone)
        self.temp = args.temp
        self.projector = mlp(backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim)
        self.predictor = mlp(args.proj_dim, args.proj_hidden, args.proj_dim)
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, head=self.projector))).requires_grad_(False)

    def invariance(self, y, t, epoch):
        """[CLS] of all views from the online encoder (y) and of views 1 and 2 from the momentum encoder (t), (b, D)
        each -> L_inv, the sum over all pairs of a query and another view's key."""
        q = [self.predictor(self.projector(v)) for v in y]  # (b, d)
        with torch.no_grad():
            k = [self.teacher["head"](v) for v in t]  # (b, d)
        with common.full_precision():
            return sum(
                contrast(upcast(a), upcast(b), self.temp) for i, a in enumerate(q) for j, b in enumerate(k) if i != j
            )

    def chance(self, args):
        return (2 + 2 * args.local_views) * 2 * args.temp * math.log(args.batch_size)


class DINOHead(nn.Module):
    """D -> hidden -> hidden -> bottleneck, GELU between, L2-normalised, then K prototypes of a weight-normed layer."""

    def __init__(self, dim, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for m in self.mlp[::2]:
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last.parametrizations.weight.original0)  # the norms g

    def forward(self, y):  # (b, D) -> (b, K)
        return self.last(F.normalize(self.mlp(y), dim=1))


class DINO(Base):
    """A student learns what its own moving average, the teacher, says of the other view; a centre keeps the teacher
    from saying always the same. The teacher is what is evaluated."""

    evaluated, positions = "teacher.backbone", "learned"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)
        self.temp, self.teacher_temp, self.teacher_temp_epochs = args.temp, args.teacher_temp, args.teacher_temp_epochs
        self.head = DINOHead(backbone.dim, args.proj_hidden, args.proj_dim, args.prototypes)
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, head=self.head))).requires_grad_(False)
        for m in self.teacher.modules():
            if isinstance(m, DropPath):
                m.drop_prob = 0.0  # stochastic depth is the student's
        self.register_buffer("centre", torch.zeros(args.prototypes))
        self.last_layer = list(self.head.last.parameters())

    def invariance(self, y, t, epoch):
        """[CLS] of all views from the student (y) and of views 1 and 2 from the teacher (t), (b, D) each -> L_inv.
        Moves the centre."""
        first, last = self.teacher_temp
        teacher_temp = (
            last if epoch >= self.teacher_temp_epochs else first + (last - first) * epoch / self.teacher_temp_epochs
        )
        s = [self.head(v) for v in y]  # (b, K)
        with torch.no_grad():
            t = [self.teacher["head"](v) for v in t]  # (b, K)
        with common.full_precision():
            s, t = [upcast(v) for v in s], [upcast(v) for v in t]
            loss = distill(s, t, self.centre, self.temp, teacher_temp)
            self.centre = 0.9 * self.centre + 0.1 * common.all_reduce(torch.cat(t).mean(0)) / common.world_size()
            return loss

    def chance(self, args):
        return math.log(args.prototypes)


class BarlowTwins(Base):
    """One encoder, a wide projector; the cross-correlation of the two views should be the identity."""

    evaluated, positions = "backbone", "learned"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        self.redundancy = args.redundancy
        self.projector = mlp(
            backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim
        )  # ends in BN without affine

    def invariance(self, y, t, epoch):
        """[CLS] of views 1 and 2, (b, D) each -> L_inv."""
        z1, z2 = (self.projector(v) for v in y)  # (b, d)
        with common.full_precision():
            return redundancy_reduction(upcast(z1), upcast(z2), self.redundancy)

    def chance(self, args):
        return args.proj_dim  # of c = 0


def update_teacher(model, m):
    """teacher <- m teacher + (1 - m) online, encoder and head."""
    if model.teacher is not None:
        common.ema_update(model.teacher["backbone"], model.backbone, m)
        common.ema_update(model.teacher["head"], model.projector if isinstance(model, MoCoV3) else model.head, m)


# ----------------------------------------------------------------------------------------------------------------------
# Equivariance terms: each maps e, {view: tokens after block `equi_layer` (n, N, D)}, and the views' parameters to
# L_equiv
# ----------------------------------------------------------------------------------------------------------------------


class SER(nn.Module):
    """The map of one view, moved by rho_g, against the map of the other; pairs of views of b2."""

    def __init__(self, dim, args):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.projector = nn.Sequential(
            nn.Linear(dim, args.equi_dim, bias=False), nn.GELU(), nn.Linear(args.equi_dim, args.equi_dim, bias=False)
        )
        self.tau, self.pairs = (
            args.equi_temp,
            [("eq1", "eq2"), ("eq3", "eq4"), ("eq5", "eq6")][: 1 + args.local_views // 2],
        )
        images, sides = second_part(args.batch_size, args.equi_ratio), [args.img_size, args.local_size, args.local_size]
        cells = [sum(args.equi_area) / 2 * (side // args.patch_size) ** 2 for side in sides[: len(self.pairs)]]
        self.chance = sum(math.log1p(2 * (images - 1) * P) for P in cells)

    def forward(self, e, params):
        return dict(L_equiv=sum(self.pair(e[a], params[a], e[b], params[b]) for a, b in self.pairs))

    def pair(self, e1, p1, e2, p2):
        k, f = relative(p1["rot90"], p1["flip"], p2["rot90"], p2["flip"])
        map1, map2 = self.map(e1, p1), self.map(e2, p2)
        moved = act(map1, k, f, map2.shape[1:3])  # (n2, h2, w2, D): rho_g f1(x1)
        z1, z2 = self.projector(moved).flatten(1, 2), self.projector(map2).flatten(1, 2)  # (n2, P, equi_dim)
        return nt_xent(z1, z2, self.tau)

    def map(self, tokens, p):  # (n2, N, D) -> (n2, h, w, D), without [CLS]
        h, w = int(p["grid_h"][0]), int(p["grid_w"][0])
        return self.norm(upcast(tokens[:, -h * w :])).unflatten(1, (h, w))


class Baseline(nn.Module):
    """Reads [CLS] after block `equi_layer` through a LayerNorm of its own; with layer 0 the final one, as it is."""

    chance = None

    def __init__(self, dim, args):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6) if args.equi_layer else nn.Identity()

    def cls(self, tokens):  # (n, N, D) -> (n, D)
        return self.norm(upcast(tokens[:, 0]))


class AugSelf(Baseline):
    """ "Improving Transferability of Representations via Augmentation-Aware Self-Supervision" (arXiv 2111.09613):
    from both views' y predict the difference of their transformations, one head for each kind."""

    outputs = dict(crop=4, color=4, flip=1, blur=1, solarize=1, rotation=4)

    def __init__(self, dim, args):
        super().__init__(dim, args)
        self.heads = nn.ModuleDict(
            {
                kind: nn.Sequential(*hidden(2 * dim, 512, 512), nn.Linear(512, self.outputs[kind]))
                for kind in args.equi_params
            }
        )
        self.spread = torch.tensor([[min(2 * v, 1 + v) for v in args.jitter[:3]] + [2 * args.jitter[3]]]).clamp(
            min=1e-6
        )  # max - min

    def describe(self, p):
        """Parameters of a view -> {kind: (n, .)}: what is compared between the views."""
        column = (p["left"] + p["width"] / 2)[:, None]
        column = torch.where(p["flip"][:, None], 1 - column, column)  # the mirrored image's centre is mirrored
        colour = torch.stack([p["brightness"] - 1, p["contrast"] - 1, p["saturation"] - 1, p["hue"]], 1)
        return dict(
            crop=torch.cat(
                [(p["top"] + p["height"] / 2)[:, None], column, p["height"][:, None], p["width"][:, None]], 1
            ),
            color=colour / self.spread,
            flip=p["flip"][:, None].float(),
            blur=p["sigma"][:, None],
            rotation=p.get("rot90"),
            solarize=torch.where(p["solarize"], 128 / 255, 1.0)[:, None],
        )  # the threshold; 1 changes nothing

    def forward(self, e, params):
        """A loss for each kind: tanh and squared error of the difference, or a classification (flip: same or not;
        rotation: (k1 - k2) mod 4), mean over images and both directions; L_equiv is their sum."""
        y1, y2 = self.cls(e["1"]), self.cls(e["2"])
        y = torch.cat([torch.cat([y1, y2], 1), torch.cat([y2, y1], 1)])  # (2 n, 2 D), both directions
        w1, w2 = self.describe(params["1"]), self.describe(params["2"])
        out = {}
        for kind, head in self.heads.items():
            a, b = torch.cat([w1[kind], w2[kind]]), torch.cat([w2[kind], w1[kind]])  # (2 n, .)
            if kind == "rotation":
                loss = F.cross_entropy(head(y), common.send((a - b) % 4, y.device))
            elif kind == "flip":
                loss = F.binary_cross_entropy_with_logits(head(y), common.send((a == b).to(y.dtype), y.device))
            else:
                loss = F.mse_loss(torch.tanh(head(y)), common.send((a - b).to(y.dtype), y.device))
            out[f"L_{kind}"] = loss
        return out | dict(L_equiv=sum(out.values()))


class STL(Baseline):
    """ "Self-supervised Transformation Learning for Equivariant Representations" (arXiv 2501.08712). Images 2i and 2i
    + 1 are transformed alike, so what the pair of views of one says of the transformation, t, must do to the other's
    y."""

    def __init__(self, dim, args):
        super().__init__(dim, args)
        self.transformation = nn.Sequential(*hidden(2 * dim, 128), nn.Linear(128, 128, bias=False))
        self.hypernetwork = nn.Linear(128, dim * dim, bias=False)
        self.project = nn.Sequential(*hidden(dim, 512), nn.Linear(512, 128, bias=False))
        self.project_t = nn.Sequential(*hidden(128, 128), nn.Linear(128, 128, bias=False))
        self.temp, self.trans_weight = args.equi_temp, args.equi_trans_weight
        self.chance = math.log(4 * args.batch_size - 1) + args.equi_trans_weight * math.log(2 * args.batch_size - 1)

    def forward(self, e, params):
        y1, y2 = self.cls(e["1"]), self.cls(e["2"])  # (n, D)
        t12, t21 = self.transformation(torch.cat([y1, y2], 1)), self.transformation(torch.cat([y2, y1], 1))  # (n, 128)
        y1_hat, y2_hat = self.apply_partners(t21, y2), self.apply_partners(t12, y1)  # (n, D)
        # each view, each prediction and each half of the pairs is a batch of its own to the batch norms [STL's code]
        z = torch.cat([self.project(y1), self.project(y2)])  # (2 n, 128)
        z_hat = torch.cat([self.project(y1_hat), self.project(y2_hat)])  # (2 n, 128)
        t = torch.cat([t12, t21])  # (2 n, 128)
        t_even, t_odd = self.project_t(t[0::2]), self.project_t(t[1::2])  # (n, 128)
        L_trans = nt_xent(t_even[:, None], t_odd[:, None], self.temp)
        return dict(
            L_trans=L_trans, L_equiv=nt_xent(z[:, None], z_hat[:, None], self.temp) + self.trans_weight * L_trans
        )

    def apply_partners(self, t, y):
        """W(t of the partner) y for each row: (n, 128), (n, D) -> (n, D)."""
        partner = torch.arange(len(t), device=t.device) ^ 1
        W = self.hypernetwork(t[partner]).unflatten(1, (y.shape[1], y.shape[1]))  # (n, D, D)
        return (W @ y[:, :, None])[:, :, 0]


class EquiMod(Baseline):
    """ "EquiMod: An Equivariance Module to Improve Visual Instance Discrimination" (arXiv 2211.01244): from the
    embedding u0 of the un-augmented image and a view's parameters predict the view's embedding u, among those of all
    other views."""

    def __init__(self, dim, args):
        super().__init__(dim, args)
        self.project = mlp(dim, dim, dim, 128)
        self.embed = nn.Sequential(
            nn.BatchNorm1d(18, affine=False), nn.Linear(18, 128, bias=False), nn.BatchNorm1d(128)
        )
        self.predict = mlp(256, 128)
        self.temp, self.chance = args.equi_temp, math.log(4 * args.batch_size - 1)

    @staticmethod
    def describe(p):
        """Parameters of a view -> (n, 18): box 4, flip, jitter on, its order 4, factors 4, gray, blur on, sigma,
        solarise."""
        factors = torch.stack([p["brightness"], p["contrast"], p["saturation"], p["hue"]], 1)  # (n, 4)
        jittered = (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
        scalars = lambda *values: torch.stack([v.float() for v in values], 1)
        return torch.cat(
            [
                scalars(p["top"], p["left"], p["height"], p["width"], p["flip"], jittered),
                p["order"].float(),
                factors,
                scalars(p["gray"], p["sigma"] > 0, p["sigma"], p["solarize"]),
            ],
            1,
        )

    def forward(self, e, params):
        u0, u1, u2 = (self.project(self.cls(e[view])) for view in ("plain", "1", "2"))  # (n, 128)
        # both views are one batch to the batch norms: standardised apart, "blur on" would be a constant of its view
        numbers = torch.cat([self.describe(params["1"]), self.describe(params["2"])])  # (2 n, 18)
        a = self.embed(common.send(numbers.to(u0.dtype), u0.device))  # (2 n, 128)
        u, u_hat = torch.cat([u1, u2]), self.predict(torch.cat([u0.repeat(2, 1), a], 1))  # (2 n, 128)
        with torch.no_grad():
            gain = F.cosine_similarity(u, u_hat) - F.cosine_similarity(
                u, u0.repeat(2, 1)
            )  # above 0: better than the identity
        return dict(L_equiv=nt_xent(u[:, None], u_hat[:, None], self.temp), cosine_gain=gain.mean())


class ESSL(Baseline):
    """ "Equivariant Contrastive Learning" (arXiv 2111.00899): by how many quarter turns was a small crop rotated?"""

    chance = math.log(4)

    def __init__(self, dim, args):
        super().__init__(dim, args)
        layer = lambda: [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layer(), *layer(), nn.Linear(dim, 256), nn.LayerNorm(256), nn.Linear(256, 4))

    def forward(self, e, params):
        logits = self.head(self.cls(e["rotated"]))  # (4 n, 4)
        turns = torch.arange(4, device=logits.device).repeat_interleave(len(logits) // 4)
        return dict(
            L_equiv=F.cross_entropy(logits, turns), rotation_accuracy=(logits.argmax(1) == turns).float().mean()
        )


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device):
    """The model with its initial weights: seeded, the same on every process."""
    common.seed_everything(args.seed, "weights")
    base = dict(mocov3=MoCoV3, dino=DINO, barlow=BarlowTwins)[args.base]
    mean, std = common.normalisation(args)
    model = base(
        common.make_backbone(
            args.arch,
            mean,
            std,
            img_size=args.img_size,
            patch_size=args.patch_size,
            cls_layer=args.cls_layer,
            pos=base.positions,
            drop_path=args.drop_path,
        ),
        args,
    )
    equi = dict(none=None, ser=SER, augself=AugSelf, stl=STL, equimod=EquiMod, essl=ESSL)[args.equi]
    model.equi = equi and equi(model.backbone.dim, args)
    return common.batchnorm_over_ranks(model, device).to(device)


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    common.check_run(args, RECIPES, common.VITS)
    for name in ("crop_scale", "equi_area", "local_scale"):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            common.die(
                f"--{name.replace('_', '-')} {' '.join(map(str, getattr(args, name)))}: the lower end comes first"
            )
    if args.jitter[3] > 0.5:
        common.die(f"--jitter {' '.join(map(str, args.jitter))}: hue is in turns, at most 0.5")
    depth = common.VITS[args.arch]["depth"]
    if args.equi == "none":
        args.equi_layer = 0
    if args.equi_layer > depth or args.equi == "ser" and args.equi_layer == 0:
        common.die(
            f"--equi-layer {args.equi_layer}: {args.arch} has {depth} blocks"
            + ", and ser takes the tokens after one of them" * (args.equi == "ser")
        )
    if args.cls_layer is None:
        args.cls_layer = args.equi_layer if args.equi == "ser" else 0
    if args.weight_decay_end is None:
        args.weight_decay_end = args.weight_decay
    if args.cls_layer >= depth:
        common.die(
            f"--cls-layer {args.cls_layer}: {args.arch} has {depth} blocks and [CLS] needs one of them; give "
            "--cls-layer 3, say"
        )
    if args.equi not in ("ser", "none") and 0 < args.equi_layer <= args.cls_layer:
        common.die(
            f"--equi-layer {args.equi_layer}: {args.equi} takes [CLS] there, which enters after block "
            f"{args.cls_layer}; give --cls-layer 0"
        )
    if args.local_views and (args.base == "barlow" or args.equi not in ("ser", "none")):
        common.die(
            f"--local-views {args.local_views}: goes with --base mocov3 or dino (Barlow Twins correlates two "
            "views) and --equi ser or none"
        )
    if (args.local_views or args.equi == "essl") and args.local_size % args.patch_size:
        common.die(f"--local-size {args.local_size}: not divisible by --patch-size {args.patch_size}")
    if args.equi == "stl" and args.batch_size // common.world_size() % 2:
        common.die(
            f"--batch-size {args.batch_size}: stl pairs images, so each of the {common.world_size()} processes "
            "needs an even number"
        )
    if args.equi == "augself" and not args.equi_params:
        common.die("--equi-params: name what augself is to predict, e.g. crop color")
    for kind, flag, strengths in (
        ("color", "jitter", args.jitter),
        ("blur", "blur", args.blur),
        ("solarize", "solarize", args.solarize),
    ):
        if args.equi == "augself" and kind in args.equi_params and not any(strengths):
            common.die(f"--equi-params {kind}: is never applied; give --{flag} values above 0")
    if args.epochs and args.warmup_epochs >= args.epochs:
        common.die(f"--warmup-epochs {args.warmup_epochs}: must be below --epochs {args.epochs}")
    if args.equi == "ser":
        n2 = second_part(args.batch_size, args.equi_ratio)
        if n2 >= args.batch_size:
            common.die(
                f"--batch-size {args.batch_size}: SER's second part takes {n2} of it; raise it (the part is at "
                f"least 8) or lower --equi-ratio {args.equi_ratio}"
            )
        if n2 % common.world_size():
            common.die(
                f"--equi-ratio {args.equi_ratio}: SER's second part of {n2} images does not divide among "
                f"{common.world_size()} processes; start 1, 2, 4 or 8"
            )


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)
    model = build(args, device)
    policies = make_policies(args)
    train, test = (
        common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers)
        for split in ("train", "test")
    )
    train = train.to(device)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if args.base != "dino" or p.ndim > 1]
    rest = [p for p in parameters if args.base == "dino" and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed), dict(params=rest, weight_decay=0.0)], lr=0.0, fused=device.type == "cuda"
    )
    peak = args.lr * args.batch_size / 256

    variant = f"{args.base}-{args.equi}" + "-2+4" * (args.local_views > 0)
    if args.equi_layer != 3 * (args.equi == "ser"):
        variant += f"-{args.equi_layer}"
    run = common.Run(args, variant, model, optimizer)
    run.restore(train)
    chance = f"L_inv {model.chance(args):.2f}"
    if model.equi is not None and model.equi.chance is not None:
        chance += f", L_equiv {model.equi.chance:.2f}"
    run.introduce(train, loader, peak, chance)
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, params, _ in run.steps(loader):
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, peak, args.lr_end * peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = common.cosine(
            epoch / args.epochs, args.weight_decay, args.weight_decay_end
        )
        if step == 0:
            run.picture("views.png", [views[name] for name in sorted(views)])
        with common.autocast(device, args.amp):
            out, y = ddp(views, params, epoch)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        if args.clip is not None:
            common.clip_each_(parameters, args.clip)
        if epoch < args.freeze_last_epochs:
            for p in model.last_layer:
                p.grad = None
        optimizer.step()
        update_teacher(
            model, common.cosine((step + 1) / loader.total_steps, args.momentum, 1.0)
        )  # MoCo-v3's, before its next keys
        run.log(step, features=y, lr=lr, epoch=epoch, **out)

    run.finish(build(args, device), train, test)


if __name__ == "__main__":
    common.command(main)
