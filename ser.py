"""SER: soft equivariance regularisation of intermediate tokens, on MoCo-v3, DINO or Barlow Twins; with its baselines.

Paper: "Soft Equivariance Regularization for Invariant Self-Supervised Learning" (ICLR 2026, arXiv 2603.06693).

Idea. Invariance at the last layer removes what an image's transformation did to it. SER keeps the base loss on the
final [CLS] and asks for equivariance earlier, where the tokens are still a map. Take the group element that leads from
view 1 to view 2. Applied to the map of view 1, it should give the map of view 2, cell by cell.

    f = f2 o f1       f1: patches and the first `equi_layer` blocks, without [CLS]; [CLS] enters at the input of f2
    B = b1 + b2       b1 (most images) takes the base's views T; b2, a share `equi_ratio`, takes
                      T_eq = T without random crop, with rotations by 90 degrees and anisotropic scaling
    x_i = g_i x       for b2: g_i = scaling o rot90^k_i o flip^f_i, after photometrics that do not enter g
    z  = p(rho_g f1(x_1)),  z' = p(f1(x_2)),  g = g_2 g_1^-1                  (n, P, D), P cells of view 2's grid
    l(z_ij) = -s(z_ij, z'_ij) + log( exp s(z_ij, z'_ij) + sum_{m != i, l} exp s(z_ij, z_ml) + exp s(z_ij, z'_ml) )
    L_equiv = mean of l over both sides, s(a, b) = cos(a, b) / tau            (negatives: cells of other images)
    L = L_inv(b1 and b2) + lambda L_equiv(b2)         L_inv: `contrast`, `distill` or `redundancy_reduction`, below

In the code T makes the views "1", "2" of b1, T_eq makes "eq1", "eq2" of b2, `tokens` is f1(x) and `cls` is f2(f1(x)).

The baselines have no b2. They predict what happened to a view from [CLS], after the last norm (`--equi-layer 0`, as
published) or after block k. AugSelf predicts the differences of the transformations' parameters, STL the effect of one
image's transformation on another image, EquiMod a view's embedding from that of the plain image, E-SSL a rotation.

Usage
    python ser.py                                                      # rendered images, CPU, minutes
    python ser.py --base dino --equi none                              # a base alone
    python ser.py --equi augself --equi-layer 3                        # a baseline, decoupled
    python ser.py --local-views 4                                      # two global and four local views
    python ser.py --data imagefolder --data-dir DIR --recipe cifar10   # any folder of images
    torchrun --nproc_per_node=8 ser.py --data imagenet --data-dir IMAGENET --compile

Where the paper is silent or contradicts itself, this file takes (source in brackets):
  * equi_ratio 0.01, lambda 1 (DINO: 0.3) [launch commands of the public code, github.com/aitrics-chris/SER]; at least
    8 images. tau is the paper's: 0.3, DINO 0.5.
  * Scaling changes the grid of patches. One (h, w) is drawn for a view and step: area 0.7 to 1.3 of the square grid,
    aspect 3/4 to 4/3. Positions are resampled bicubically [public code]. Nothing leaves the image, so there is no mask.
    Images are resized with antialiasing; the public code has none.
  * Pairs follow the paper's Algorithm 1. g1 and g2 are drawn independently for each image, both views come from the
    online encoder, and negatives are the cells of both sides. The public two-view code draws one quarter turn for all
    images of a step, makes view 2's flip and half-turn the complement of view 1's, and takes momentum keys from one
    side.
  * x for b2 is one random resized crop, shared by both views, so that g is free of crops [public code]. `--equi-crop
    center` takes the centre of the image instead.
  * Gradients flow through both sides and through the gather over processes. The public code gathers without gradient,
    so that L_equiv would train nothing.
  * A LayerNorm precedes the projector; the projector follows rho_g [paper's Algorithm 1]. ViT-S has 6 heads [DINO,
    timm].
  * MoCo-v3 itself follows github.com/facebookresearch/moco-v3: fixed sin-cos positions (SER's public code learns
    them), frozen random patch projection, weight decay on everything, no clipping. Base lr 3e-4 [SER's public code;
    the same peak as MoCo-v3's own recipe].
  * DINO (github.com/facebookresearch/dino) and Barlow Twins (github.com/facebookresearch/barlowtwins) train with AdamW
    and take from SER's public code learning rates, clipping per tensor, crops, teacher momentum, the 10 epochs of the
    teacher's temperature, and Barlow Twins' weight decay of 0.1. DINO's teacher moves by the momentum of the coming
    step, not of the past one. Its temperature rises by the step and arrives after `teacher_temp_epochs`; DINO's table
    rises by the epoch and arrives one epoch earlier. The teacher is evaluated, as in DINO; SER's public code loads the
    student.
  * 2+4 views: local views and all views of b2 have jitter, and half of them blur, but neither grey nor solarisation.
    Each pair of b2 is made of one crop. MoCo-v3's ten terms are summed, DINO's are averaged [public code]. L_equiv is
    the formula above, summed over one global and two local pairs. The public code's offset counts images where it
    should count tokens.
  * AugSelf (github.com/hankook/AugSelf) has one head for each kind of parameter: 44.2 M parameters where SER's table
    has 43.7. Gradients flow through both views. Each view mirrors the centre of its crop with its own flip; the crops
    are MoCo-v3's. Its ImageNet views keep AugSelf's photometrics (saturation 0.4, blur 0.5, no solarisation), STL's
    keep STL's crops and blur, with the saturation 0.2 of SER's code. All rows of the two small recipes see the same
    ones. `--equi-params rotation` draws the four quarter turns evenly; AugSelf's code leaves more images upright.
  * STL (github.com/jaemyung-u/stl): partners have one box in fractions of their image.
  * EquiMod (github.com/ADevillers/EquiMod): a batch norm over both views together standardises the 18 parameters, where
    EquiMod's code has constants of its data set. The projector is called once a view, as in SER's code; EquiMod's code
    calls it once for all three.
  * E-SSL (github.com/rdangovs/essl): the weight is 0.4, that for SimCLR, and 8 with Barlow Twins. Heads are as wide as
    in SER's code.

Recipes `blocks` and `cifar10` are ours. They raise equi_ratio to 0.125, because 1 % of a small batch is nothing.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Literal

import common
from common import Count, Natural, NonNegative, Plural, Positive, Share, ShareAbove0, ShareBelow1, upcast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass
class Args(common.RunArgs):
    """What SER, its bases and their views need, beside the arguments that all scripts share."""

    base: Literal["mocov3", "dino", "barlow"] = "mocov3"
    """the invariant method"""
    equi: Literal["ser", "none", "augself", "stl", "equimod", "essl"] = "ser"
    """the equivariance term; with none the base is trained alone"""
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
    """range of the scaling: number of cells relative to the square grid; its aspect ratio is 3/4 to 4/3 in any case"""
    equi_crop: Literal["random", "center"] = "random"
    """what b2's two large views are made of: one random crop shared by both, or the centre of the image"""
    equi_params: tuple[Literal["crop", "color", "flip", "blur", "solarize", "rotation"], ...] = ("crop", "color")
    """which parameters AugSelf predicts; rotation also turns the views"""
    equi_trans_weight: NonNegative = 0.1
    """weight of STL's L_trans within its L_equiv"""
    local_views: Literal[0, 4] = 0
    """number of small crops of each image beside the two large ones"""
    local_size: Count = 96
    """side in pixels of these small crops, and of E-SSL's rotated crop"""
    local_scale: tuple[ShareAbove0, ShareAbove0] = (0.05, 0.25)
    """range of the area of these small crops and of E-SSL's, relative to the image"""
    proj_hidden: Count = 4096
    """hidden width of projector and predictor (mocov3, barlow) or of the head (dino)"""
    proj_dim: Count = 256
    """width of the embeddings that are contrasted (mocov3) or decorrelated (barlow), or of the head's bottleneck
    (dino)"""
    temp: Positive = 0.2
    """temperature of MoCo-v3, or of DINO's student"""
    momentum: Share = 0.99
    """momentum of the momentum encoder (mocov3) or teacher (dino) at the start; it rises to 1 along half a cosine"""
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
    """weight decay at the end of half a cosine; default: it stays as it is"""
    warmup_epochs: NonNegative = 10
    """epochs of linear warm-up; then the learning rate falls along half a cosine"""
    lr_end: Share = 0.0
    """learning rate at the end, as a share of the peak"""
    clip: Positive | None = None
    """largest norm of the gradient of each parameter tensor; default: no clipping"""
    drop_path: ShareBelow1 = 0.0
    """stochastic depth of the trained encoder"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """interpolation of the large crops"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.08, 1.0)
    """range of the area of the large random crops, relative to the image"""
    jitter: tuple[NonNegative, NonNegative, NonNegative, NonNegative] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter, applied to 80 % of the views"""
    blur: tuple[Share, Share] = (1.0, 0.1)
    """probability of Gaussian blur in view 1 and view 2; where both are 0 no other view is blurred either"""
    solarize: tuple[Share, Share] = (0.0, 0.2)
    """probability of solarisation in view 1 and view 2"""


# fmt: off
# What a base needs: the settings of SER's ImageNet runs [its public code; the paper only says: the bases' own].
BASES = dict(
    mocov3=dict(),
    dino=dict(lr=1e-4, lr_end=0.0125, proj_hidden=2048, temp=0.1, momentum=0.982, weight_decay=0.04,
              weight_decay_end=0.4, clip=0.3, drop_path=0.1, crop_scale=(0.25, 1.0), interpolation="bicubic"),
    barlow=dict(lr=1e-4, lr_end=0.001, proj_hidden=8192, proj_dim=8192, clip=0.3, interpolation="bicubic"),
)

# What an equivariance term needs, its own photometrics among it, and what some terms need on some bases.
EQUIS = dict(
    ser=dict(),
    none=dict(equi_layer=0),
    augself=dict(equi_layer=0, equi_weight=0.5, jitter=(0.4, 0.4, 0.4, 0.1), blur=(0.5, 0.5), solarize=(0.0, 0.0)),
    stl=dict(equi_layer=0, equi_temp=0.2, crop_scale=(0.2, 1.0), blur=(0.5, 0.5), solarize=(0.0, 0.0)),
    equimod=dict(equi_layer=0, equi_temp=0.2),
    essl=dict(equi_layer=0, equi_weight=0.4, local_scale=(0.05, 0.14)),
)
PAIRS = {("dino", "ser"): dict(equi_weight=0.3, equi_temp=0.5), ("barlow", "essl"): dict(equi_weight=8.0)}

# At 32 px all methods see the same views, so that the rows of a table differ in their method alone.
SMALL = dict(img_size=32, local_size=16, local_scale=(0.1, 0.5), crop_scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1),
             blur=(0.0, 0.0), solarize=(0.0, 0.0), equi_ratio=0.125, drop_path=0.0)
RECIPES = dict(
    imagenet=dict(),  # the paper: ViT-S/16, 100 epochs, batch 2048 = 8 x 256, peak lr 2.4e-3 (DINO, Barlow Twins: 8e-4)
    imagenet100=dict(),  # not in the paper: its ImageNet values
    cifar10=dict(arch="vit_tiny", patch_size=4, epochs=200, batch_size=512, lr=5e-4, proj_hidden=1024, **SMALL),
    # The momentum encoder of so short a run must keep up.
    blocks=dict(arch="vit_pico", patch_size=8, epochs=4, warmup_epochs=0.5, batch_size=128, lr=4e-3, proj_hidden=512,
                proj_dim=128, momentum=0.9, **SMALL),
)
RECIPES["cifar100"] = RECIPES["cifar10"]

# What recipes of images below 96 px, all ours, change for a base.
SMALL_BASES = dict(
    mocov3=dict(),
    dino=dict(lr=1e-3, prototypes=1024, teacher_temp=(0.04, 0.04), momentum=0.99, freeze_last_epochs=0.0, clip=3.0),
    barlow=dict(proj_dim=512, clip=3.0),
)
# fmt: on


def values_in_force(first):
    """The recipe that a first look at the command line asks for, as defaults for the second."""
    name = first.recipe or first.data
    if name not in RECIPES:
        return {}  # `check` will complain

    # Later settings win. The order is base, equivariance term, both together, recipe, changes of a small recipe.
    values = dict(recipe=name) | BASES[first.base] | EQUIS[first.equi]
    values |= PAIRS.get((first.base, first.equi), {}) | RECIPES[name]
    if RECIPES[name].get("img_size", 224) < 96:
        values |= SMALL_BASES[first.base]
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Views: T for b1, T_eq for b2
# ----------------------------------------------------------------------------------------------------------------------

# Two large views of an image and up to four local ones, of b1 and of b2. L_equiv compares the views of b2 in pairs.
VIEWS = ("1", "2", "3", "4", "5", "6")
EQUI_VIEWS = ("eq1", "eq2", "eq3", "eq4", "eq5", "eq6")
EQUI_PAIRS = (("eq1", "eq2"), ("eq3", "eq4"), ("eq5", "eq6"))


def equi_batch_size(batch_size, ratio):
    """Images of a global batch in b2: max(8, 8 round(r B / 8)), so that up to 8 processes share them evenly."""
    return max(8, 8 * round(ratio * batch_size / 8))


def make_policies(args):
    """{name of a view: the Compose that makes it}.

    T makes the VIEWS. SER has EQUI_VIEWS beside them, which T_eq makes. EquiMod has "plain", the image without
    augmentation, and E-SSL "rotated", the small crop that a step will rotate.
    """
    normalise = common.Normalize(*common.normalisation(args))
    random_crop = common.RandomResizedCrop(args.img_size, args.crop_scale, interpolation=args.interpolation)
    center_crop = common.CenterCrop(args.img_size, interpolation=args.interpolation)
    local_crop = common.RandomResizedCrop(args.local_size, args.local_scale)

    def view(crop, geometry, gray=0.2, blur=0.0, solarize=0.0):
        jitter = common.ColorJitter(*args.jitter, p=0.8)
        photometrics = [jitter, common.Grayscale(gray), common.GaussianBlur(p=blur), common.Solarize(p=solarize)]
        return common.Compose([crop, *photometrics, *geometry, normalise])

    # T flips; T_eq flips, rotates and scales. T rotates too where AugSelf predicts the rotation.
    flip = [common.HorizontalFlip()]
    if args.equi == "augself" and "rotation" in args.equi_params:
        flip.append(common.Rot90())

    # Local views are neither grey nor solarised; nor is b2 where there are local views.
    policies, reduced = {}, dict(gray=0.0, blur=0.5 if any(args.blur) else 0.0)
    for i in range(2 + args.local_views):
        crop, photometrics = local_crop, reduced
        if i < 2:
            crop, photometrics = random_crop, dict(blur=args.blur[i], solarize=args.solarize[i])
        policies[VIEWS[i]] = view(crop, flip, **photometrics)

        if args.equi == "ser":
            # T_eq also resizes to another grid of patches. Large views of b2 may be centre crops.
            scaling = common.GridResize(args.patch_size, crop.size // args.patch_size, args.equi_area)
            if i < 2 and args.equi_crop == "center":
                crop = center_crop
            if args.local_views:
                photometrics = reduced
            policies[EQUI_VIEWS[i]] = view(crop, [common.HorizontalFlip(), common.Rot90(), scaling], **photometrics)

    # EquiMod compares with the image without augmentation; E-SSL rotates a small crop.
    if args.equi == "equimod":
        policies["plain"] = common.Compose([center_crop, normalise])
    if args.equi == "essl":
        policies["rotated"] = view(local_crop, flip, blur=0.1 if any(args.blur) else 0.0)
    return policies


def draw_views(args, policies, generator):
    """{view: (rows of the global batch (n,) that it shows, their params)}, for all processes alike."""
    # b2 is spread evenly over the batch, so that the contiguous rows of each process hold the same number of it.
    batch = torch.arange(args.batch_size)  # (B,)
    n2 = equi_batch_size(args.batch_size, args.equi_ratio) if args.equi == "ser" else 0
    b2 = torch.arange(n2) * args.batch_size // max(n2, 1)  # (n2,)
    b1 = batch[~torch.isin(batch, b2)]  # (n1,)

    # Each view draws parameters for the images of its part of the batch.
    drawn = {}
    for name, policy in policies.items():
        rows = b2 if name in EQUI_VIEWS else b1
        drawn[name] = rows, policy.sample(len(rows), generator)

    # Both views of a pair show the random crop of the first, if it has one.
    for first, second in EQUI_PAIRS:
        if second in drawn:
            params = drawn[first][1]
            drawn[second][1].update({key: params[key] for key in common.BOX if key in params})

    # STL transforms images 2i and 2i + 1 alike, except for flip, blur and solarisation. Their boxes are equal fractions
    # of images of any size.
    if args.equi == "stl":
        for name, (_, params) in drawn.items():
            for key in (*common.BOX, "brightness", "contrast", "saturation", "hue", "order", "gray"):
                params[key] = params[key][::2].repeat_interleave(2, 0)
            policies[name].crop.place(params, torch.full((args.batch_size, 2), 224))
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
    """rho_g: z (n, h1, w1, D) -> (n, h2, w2, D) with (h2, w2) = `size`; k, f (n,) as in `relative`, on the CPU.

    In normalised coordinates (x right, y down, cell centres, [-1, 1]) g moves a point p to D p, D = turn^k mirror^f.
    Scaling changes nothing but the grid. So output cell p reads z at D^T p, bicubically. That is an exact permutation
    of cells wherever the permuted input grid is the output grid.
    """
    # Choose each sample's D among the eight elements of the group.
    turn, mirror = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    power = torch.linalg.matrix_power
    elements = torch.stack([power(turn, i) @ power(mirror, j) for i in range(4) for j in range(2)])  # (8, 2, 2)
    D = common.send(elements[2 * k + f], z.device).to(z.dtype)  # (n, 2, 2)

    # Sample z at D^T p.
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
    all processes; cells of the anchor's own image are neither. With one image in all the loss is 0. Anchors go in
    chunks of about `chunk` logits (2^27 on a GPU, 2^23 on a CPU). The backward pass computes the logits again, so that
    memory does not grow with the square of the cells.
    """
    # The embeddings of all processes are keys. A single image has no negatives.
    n, P, _ = z1.shape
    anchors = F.normalize(torch.stack([z1, z2], dim=1), dim=-1)  # (n, 2, P, D)
    keys = common.gather(anchors)  # (N, 2, P, D)
    N = len(keys)
    if N == 1:
        return 0 * anchors.sum()

    # An anchor and its positive are as similar from either side.
    positive = (anchors[:, 0] * anchors[:, 1]).sum(-1, keepdim=True).transpose(1, 2) / tau  # (n, 1, P)

    def other_images(queries, own):
        """log sum exp s over the cells of other images: queries (c, 2, P, D), their own images (c,) -> (c, 2, P)."""
        logits = (queries.flatten(0, 2) @ keys.flatten(0, 2).T / tau).view(len(own), 2 * P, N, 2 * P)
        logits[torch.arange(len(own), device=own.device), :, own] = -torch.inf
        return logits.flatten(2).logsumexp(-1).view(len(own), 2, P)

    # The images of a process are contiguous rows of the keys.
    own = torch.arange(n, device=keys.device) + common.rank() * n  # (n,)
    if chunk is None:
        chunk = 2**27 if keys.is_cuda else 2**23
    c = max(1, chunk // (2 * P * N * 2 * P))
    slices = [slice(i, i + c) for i in range(0, n, c)]

    # Checkpointing computes the logits of each chunk again in the backward pass, which saves their memory.
    negative = [checkpoint(other_images, anchors[rows], own[rows], use_reentrant=False) for rows in slices]
    return (torch.logaddexp(torch.cat(negative), positive) - positive).mean()


def contrast(q, k, temp):
    """ctr(q, k) of MoCo-v3: row i of q and k (b, d) is the same image; keys of all processes are negatives. With q
    and k normalised, 2 temp times the cross-entropy of q k^T / temp against the diagonal."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = q @ common.gather(k).T / temp  # (b, B)
    labels = torch.arange(len(q), device=q.device) + common.rank() * len(q)
    return 2 * temp * F.cross_entropy(logits, labels)


def distill(students, teachers, centre, temp, teacher_temp):
    """DINO: students and teachers are outputs (b, K) of views, in the same order. Cross-entropy of softmax(s / temp)
    against softmax((t - centre) / teacher_temp), mean over the images and over all pairs of a teacher's and another
    student's view."""
    # Every student's view predicts the teacher's other views, never its own.
    targets = [F.softmax((t - centre) / teacher_temp, dim=1) for t in teachers]
    predictions = [F.log_softmax(s / temp, dim=1) for s in students]
    terms = [-(p * q).sum(1).mean() for i, p in enumerate(targets) for j, q in enumerate(predictions) if i != j]
    return sum(terms) / len(terms)


def redundancy_reduction(z1, z2, weight):
    """Barlow Twins: z1, z2 (b, d), each column standardised over the global batch of B; with c = z1^T z2 / B over all
    processes, sum_i (c_ii - 1)^2 + weight sum_{i != j} c_ij^2."""
    c = common.all_reduce(z1.T @ z2) / (len(z1) * common.world_size())  # (d, d)
    diagonal = (c.diagonal() - 1).square().sum()
    return diagonal + weight * (c.square().sum() - c.diagonal().square().sum())


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def hidden_layers(*dims):
    """Linear-BN-ReLU from each width to the next, no biases."""
    layers = []
    for a, b in zip(dims, dims[1:]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    return layers


def mlp(*dims):
    """Hidden layers, then Linear-BN without affine: MoCo-v3's projector and predictor."""
    layers = hidden_layers(*dims[:-1])
    return nn.Sequential(*layers, nn.Linear(*dims[-2:], bias=False), nn.BatchNorm1d(dims[-1], affine=False))


def moco_init_(backbone):
    """Initial weights of MoCo-v3's ViT: Xavier-uniform, qkv as three square matrices, no biases, [CLS] of std 1e-6; the
    patch projection is uniform and frozen."""
    for name, m in backbone.named_modules():
        if isinstance(m, nn.Linear):
            if name.endswith("qkv"):
                bound = (6 / (2 * m.in_features)) ** 0.5
                nn.init.uniform_(m.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.normal_(backbone.cls_token, std=1e-6)

    # The patch projection stays random and frozen, which makes the training of ViTs more stable.
    projection = backbone.patch_embed.proj
    bound = (6 / (projection.weight[0].numel() + projection.out_channels)) ** 0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)


class Base(nn.Module):
    """What the three bases share: a step. Each adds its heads, its loss `invariance`, the value of that loss by
    `chance`, and a teacher if it has one. `equi` is the equivariance term, or None."""

    evaluated = "backbone"
    last_layer = ()  # parameters that rest for --freeze-last-epochs

    def __init__(self, backbone, args):
        super().__init__()
        self.backbone, self.teacher, self.equi = backbone, None, None
        self.equi_layer, self.equi_weight, self.local_views = args.equi_layer, args.equi_weight, args.local_views
        self.compiled = {}

    def compile_encoder(self):
        """Compile the encoders twice: for views of one shape, and for those of b2, whose grids of patches vary."""
        encoders = [self.backbone]
        if self.teacher is not None:
            encoders.append(self.teacher["backbone"])
        for encoder in encoders:
            for dynamic in (False, True):
                self.compiled[encoder, dynamic] = torch.compile(encoder.trace, dynamic=dynamic)

        # Two encoders, two sizes of views and three kinds of grids (as in training, square, other) exceed the usual 8.
        torch._dynamo.config.recompile_limit = 16

    def encode(self, encoder, name, x, taps=()):
        """View `name` of images, x (n, 3, H, W) -> final [CLS] (n, D), {k: tokens after block k} for `taps`."""
        trace = self.compiled.get((encoder, name in EQUI_VIEWS), encoder.trace)
        return trace(x, taps)

    def forward(self, views, params, epoch=0.0):
        """All of a step's mathematics: views {name: (n, 3, H, W)} and their params -> ({"loss", "L_inv", "L_equiv",
        ...}, y of view 1)."""
        # E-SSL sees its small crop four times, turned by 0, 90, 180 and 270 degrees.
        if "rotated" in views:
            rotated = torch.cat([views["rotated"].rot90(k, (2, 3)) for k in range(4)])  # (4 n, 3, H, W)
            views = views | dict(rotated=rotated)

        # Encode every view; cls is f2(f1(x)), tokens is f1(x). With layer 0 the only token is the final [CLS].
        cls, tokens = {}, {}
        taps = (self.equi_layer,) if self.equi_layer else ()
        for name, x in views.items():
            cls[name], tapped = self.encode(self.backbone, name, x, taps)  # (n, D)
            tokens[name] = tapped[self.equi_layer] if taps else cls[name][:, None]  # (n, N, D)

        # The base takes b1 and b2 as one batch. Its momentum encoder, or teacher, sees the two large views alone.
        y = [whole_batch(cls, i) for i in range(2 + self.local_views)]  # (b, D) each
        t = []
        if self.teacher is not None:
            large = [name for name in (*VIEWS[:2], *EQUI_VIEWS[:2]) if name in views]
            with torch.no_grad():
                teacher_cls = {name: self.encode(self.teacher["backbone"], name, views[name])[0] for name in large}
            t = [whole_batch(teacher_cls, i) for i in range(2)]  # (b, D) each

        # The loss adds the equivariance term to that of the base, L = L_inv + lambda L_equiv.
        L_inv = self.invariance(y, t, epoch)
        out = dict(L_inv=L_inv, loss=L_inv)
        if self.equi is not None:
            with common.full_precision():
                out |= self.equi(tokens, params)
            out["loss"] = L_inv + self.equi_weight * out["L_equiv"]
        return out, y[0]


def whole_batch(cls, i):
    """[CLS] {view: (n, D)} -> (b, D): the i-th view of the images of b1, then of those of b2, if there are any."""
    return torch.cat([cls[name] for name in (VIEWS[i], EQUI_VIEWS[i]) if name in cls])


def teacher_of(backbone, head):
    """A copy of both that no gradient reaches, without stochastic depth: `backbone` and `head` of a ModuleDict."""
    teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, head=head))).requires_grad_(False)
    for m in teacher.modules():
        if isinstance(m, DropPath):
            m.drop_prob = 0.0
    return teacher


class MoCoV3(Base):
    """Online encoder, projector and predictor make queries; the momentum encoder and projector make keys."""

    positions = "sincos"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        moco_init_(backbone)

        # The momentum encoder starts as a copy of encoder and projector, without a predictor.
        self.temp = args.temp
        self.projector = mlp(backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim)
        self.predictor = mlp(args.proj_dim, args.proj_hidden, args.proj_dim)
        self.teacher = teacher_of(backbone, self.projector)

    def invariance(self, y, t, epoch):
        """[CLS] of all views from the online encoder (y) and of views 1 and 2 from the momentum encoder (t), (b, D)
        each -> L_inv, the sum over all pairs of a query and another view's key."""
        queries = [self.predictor(self.projector(v)) for v in y]  # (b, d)
        with torch.no_grad():
            keys = [self.teacher["head"](v) for v in t]  # (b, d)

        # Each query is compared with the keys of the other views alone.
        pairs = [(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j]
        with common.full_precision():
            return sum(contrast(upcast(q), upcast(k), self.temp) for q, k in pairs)

    def chance(self, args):
        return (2 + 2 * args.local_views) * 2 * args.temp * math.log(args.batch_size)


class DINOHead(nn.Module):
    """dim -> width -> width -> bottleneck, GELU between, L2-normalised, then a weight-normed layer of K prototypes."""

    def __init__(self, dim, width, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, bottleneck)
        )
        for m in self.mlp[::2]:
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

        # The prototypes have norm 1 at the start.
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last.parametrizations.weight.original0)  # the norms g

    def forward(self, y):
        """y (b, D) -> (b, K)."""
        return self.last(F.normalize(self.mlp(y), dim=1))


class DINO(Base):
    """A student predicts what its own moving average, the teacher, makes of the other view. A centre, subtracted from
    the teacher's outputs, keeps them from being always the same. The teacher is evaluated."""

    evaluated = "teacher.backbone"
    positions = "learned"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)
        self.temp = args.temp
        self.teacher_temp, self.teacher_temp_epochs = args.teacher_temp, args.teacher_temp_epochs
        self.head = DINOHead(backbone.dim, args.proj_hidden, args.proj_dim, args.prototypes)
        self.last_layer = list(self.head.last.parameters())
        self.register_buffer("centre", torch.zeros(args.prototypes))

        # The teacher starts as the student.
        self.teacher = teacher_of(backbone, self.head)

    def invariance(self, y, t, epoch):
        """[CLS] of all views from the student (y) and of views 1 and 2 from the teacher (t), (b, D) each -> L_inv.
        Moves the centre."""
        # The temperature of the teacher changes linearly during its warm-up.
        first, teacher_temp = self.teacher_temp
        if epoch < self.teacher_temp_epochs:
            teacher_temp = first + (teacher_temp - first) * epoch / self.teacher_temp_epochs

        students = [self.head(v) for v in y]  # (b, K)
        with torch.no_grad():
            teachers = [self.teacher["head"](v) for v in t]  # (b, K)

        # Student and teacher are compared in float32.
        with common.full_precision():
            students, teachers = [upcast(s) for s in students], [upcast(t) for t in teachers]
            loss = distill(students, teachers, self.centre, self.temp, teacher_temp)

            # The centre is a moving average of the teacher's outputs over the global batch.
            mean = common.all_reduce(torch.cat(teachers).mean(0)) / common.world_size()  # (K,)
            self.centre = 0.9 * self.centre + 0.1 * mean
            return loss

    def chance(self, args):
        return math.log(args.prototypes)


class BarlowTwins(Base):
    """One encoder, a wide projector; the cross-correlation of the two views should be the identity."""

    positions = "learned"

    def __init__(self, backbone, args):
        super().__init__(backbone, args)
        self.redundancy = args.redundancy

        # The last batch norm of the projector standardises the columns, as the loss asks.
        self.projector = mlp(backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim)

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
        head = model.projector if isinstance(model, MoCoV3) else model.head
        common.ema_update(model.teacher["backbone"], model.backbone, m)
        common.ema_update(model.teacher["head"], head, m)


# ----------------------------------------------------------------------------------------------------------------------
# Equivariance terms. Each maps {view: tokens after block `equi_layer` (n, N, D)} and the views' params to L_equiv.
# ----------------------------------------------------------------------------------------------------------------------


class SER(nn.Module):
    """The map of one view, moved by rho_g, against the map of the other, for the pairs of views of b2."""

    def __init__(self, dim, args):
        super().__init__()

        # A projector without batch norm acts on each cell.
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        d = args.equi_dim
        self.projector = nn.Sequential(nn.Linear(dim, d, bias=False), nn.GELU(), nn.Linear(d, d, bias=False))
        self.tau = args.equi_temp
        self.pairs = EQUI_PAIRS[: 1 + args.local_views // 2]

        # By chance each cell is as similar to its positive as to every cell, of both sides, of all other images.
        other_images = equi_batch_size(args.batch_size, args.equi_ratio) - 1
        sides = [args.img_size, args.local_size, args.local_size][: len(self.pairs)]
        cells = [sum(args.equi_area) / 2 * (side // args.patch_size) ** 2 for side in sides]
        self.chance = sum(math.log1p(2 * other_images * P) for P in cells)

    def forward(self, tokens, params):
        """L_equiv, summed over the pairs."""
        return dict(L_equiv=sum(self.pair(tokens[a], params[a], tokens[b], params[b]) for a, b in self.pairs))

    def pair(self, tokens1, params1, tokens2, params2):
        """f1(x_1) and f1(x_2), (n2, N, D) each, and the params of both views -> L_equiv of the pair."""
        k, f = relative(params1["rot90"], params1["flip"], params2["rot90"], params2["flip"])

        # rho_g moves the map of view 1 to the grid of view 2, so that equal cells show the same part of the image.
        map1, map2 = self.token_map(tokens1, params1), self.token_map(tokens2, params2)
        moved = act(map1, k, f, map2.shape[1:3])  # (n2, h2, w2, D): rho_g f1(x_1)
        z1, z2 = self.projector(moved).flatten(1, 2), self.projector(map2).flatten(1, 2)  # (n2, P, equi_dim)
        return nt_xent(z1, z2, self.tau)

    def token_map(self, tokens, params):
        """(n2, N, D) -> (n2, h, w, D), normalised, without [CLS]."""
        h, w = int(params["grid_h"][0]), int(params["grid_w"][0])
        return self.norm(upcast(tokens[:, -h * w :])).unflatten(1, (h, w))


class Baseline(nn.Module):
    """Reads [CLS] after block `equi_layer` through a LayerNorm of its own; with layer 0 the final one, as it is."""

    chance = None

    def __init__(self, dim, args):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6) if args.equi_layer else nn.Identity()

    def cls(self, tokens):
        """(n, N, D) -> (n, D)."""
        return self.norm(upcast(tokens[:, 0]))


class AugSelf(Baseline):
    """AugSelf, "Improving Transferability of Representations via Augmentation-Aware Self-Supervision" (arXiv
    2111.09613): from both views' y predict the difference of their transformations, one head for each kind."""

    outputs = dict(crop=4, color=4, flip=1, blur=1, solarize=1, rotation=4)

    def __init__(self, dim, args):
        super().__init__(dim, args)

        # Each kind of transformation has a head on both views.
        self.heads = nn.ModuleDict()
        for kind in args.equi_params:
            self.heads[kind] = nn.Sequential(*hidden_layers(2 * dim, 512, 512), nn.Linear(512, self.outputs[kind]))

        # The factors of the jitter are not negative. Colours are divided by the widths of their ranges.
        widths = [min(2 * strength, 1 + strength) for strength in args.jitter[:3]] + [2 * args.jitter[3]]
        self.widths = torch.tensor([widths]).clamp(min=1e-6)  # (1, 4)

    def describe(self, params):
        """Parameters of a view -> {kind: (n, .)}: what is compared between the views."""
        # The centre of a mirrored crop is mirrored too.
        centre_y, centre_x = params["top"] + params["height"] / 2, params["left"] + params["width"] / 2
        centre_x = torch.where(params["flip"], 1 - centre_x, centre_x)

        # Colours are differences from the identity. A threshold of 1 solarises nothing.
        color = [params["brightness"] - 1, params["contrast"] - 1, params["saturation"] - 1, params["hue"]]
        threshold = torch.where(params["solarize"], 128 / 255, 1.0)
        return dict(
            crop=torch.stack([centre_y, centre_x, params["height"], params["width"]], 1),
            color=torch.stack(color, 1) / self.widths,
            flip=params["flip"][:, None].float(),
            blur=params["sigma"][:, None],
            rotation=params.get("rot90"),
            solarize=threshold[:, None],
        )

    def forward(self, tokens, params):
        """A loss for each kind: tanh and squared error of the difference, or a classification (flip: same or not;
        rotation: (k1 - k2) mod 4), mean over images and both directions; L_equiv is their sum."""
        # The heads read both orders of the views.
        y1, y2 = self.cls(tokens["1"]), self.cls(tokens["2"])  # (n, D)
        y = torch.cat([torch.cat([y1, y2], 1), torch.cat([y2, y1], 1)])  # (2 n, 2 D), both directions
        w1, w2 = self.describe(params["1"]), self.describe(params["2"])

        # The targets of both directions are computed on the CPU, where the parameters are.
        losses = {}
        for kind, head in self.heads.items():
            a, b = torch.cat([w1[kind], w2[kind]]), torch.cat([w2[kind], w1[kind]])  # (2 n, .)
            if kind == "rotation":
                turns = common.send((a - b) % 4, y.device)
                loss = F.cross_entropy(head(y), turns)
            elif kind == "flip":
                same = common.send((a == b).to(y.dtype), y.device)
                loss = F.binary_cross_entropy_with_logits(head(y), same)
            else:
                difference = common.send((a - b).to(y.dtype), y.device)
                loss = F.mse_loss(torch.tanh(head(y)), difference)
            losses[f"L_{kind}"] = loss
        return losses | dict(L_equiv=sum(losses.values()))


class STL(Baseline):
    """STL, "Self-supervised Transformation Learning for Equivariant Representations" (arXiv 2501.08712). Images 2i and
    2i + 1 are transformed alike. A network reads their transformation t from both views of one image. Applied to y of a
    view of the other image, t must give y of its other view."""

    def __init__(self, dim, args):
        super().__init__(dim, args)

        # The transformation t has 128 numbers, which the hypernetwork turns into a D x D matrix.
        self.transformation = nn.Sequential(*hidden_layers(2 * dim, 128), nn.Linear(128, 128, bias=False))
        self.hypernetwork = nn.Linear(128, dim * dim, bias=False)

        # Representations and transformations have projectors of their own.
        self.project = nn.Sequential(*hidden_layers(dim, 512), nn.Linear(512, 128, bias=False))
        self.project_t = nn.Sequential(*hidden_layers(128, 128), nn.Linear(128, 128, bias=False))
        self.temp, self.trans_weight = args.equi_temp, args.equi_trans_weight
        self.chance = math.log(4 * args.batch_size - 1) + args.equi_trans_weight * math.log(2 * args.batch_size - 1)

    def forward(self, tokens, params):
        """L_equiv: the predictions against the views, and, weighted, L_trans: the transformations of partners."""
        # The transformation of an image must map a view of its partner to the partner's other view.
        y1, y2 = self.cls(tokens["1"]), self.cls(tokens["2"])  # (n, D)
        t12 = self.transformation(torch.cat([y1, y2], 1))  # (n, 128)
        t21 = self.transformation(torch.cat([y2, y1], 1))  # (n, 128)
        y1_hat, y2_hat = self.apply_partners(t21, y2), self.apply_partners(t12, y1)  # (n, D)

        # Each view, each prediction and each half of the pairs is a batch of its own for batch norm [STL's code].
        z = torch.cat([self.project(y1), self.project(y2)])  # (2 n, 128)
        z_hat = torch.cat([self.project(y1_hat), self.project(y2_hat)])  # (2 n, 128)
        t = torch.cat([t12, t21])  # (2 n, 128)
        t_even, t_odd = self.project_t(t[0::2]), self.project_t(t[1::2])  # (n, 128)

        # Partners have the same transformation, and predictions match the views of their own image.
        L_trans = nt_xent(t_even[:, None], t_odd[:, None], self.temp)
        L_predicted = nt_xent(z[:, None], z_hat[:, None], self.temp)
        return dict(L_trans=L_trans, L_equiv=L_predicted + self.trans_weight * L_trans)

    def apply_partners(self, t, y):
        """W(t of the partner) y for each row: (n, 128), (n, D) -> (n, D)."""
        partner = torch.arange(len(t), device=t.device) ^ 1
        W = self.hypernetwork(t[partner]).unflatten(1, (y.shape[1], y.shape[1]))  # (n, D, D)
        return (W @ y[:, :, None])[:, :, 0]


class EquiMod(Baseline):
    """EquiMod, "EquiMod: An Equivariance Module to Improve Visual Instance Discrimination" (arXiv 2211.01244): from the
    embedding u0 of the image without augmentation and a view's parameters predict the view's embedding u, among those
    of all other views."""

    def __init__(self, dim, args):
        super().__init__(dim, args)
        self.project = mlp(dim, dim, dim, 128)
        layers = nn.BatchNorm1d(18, affine=False), nn.Linear(18, 128, bias=False), nn.BatchNorm1d(128)
        self.embed = nn.Sequential(*layers)
        self.predict = mlp(256, 128)
        self.temp, self.chance = args.equi_temp, math.log(4 * args.batch_size - 1)

    @staticmethod
    def describe(params):
        """Parameters of a view -> (n, 18): box 4, flip, jitter on, its order 4, factors 4, gray, blur on, sigma,
        solarise."""
        box = [params[key] for key in ("top", "left", "height", "width")]
        factors = [params[key] for key in ("brightness", "contrast", "saturation", "hue")]
        jittered = (torch.stack(factors, 1) != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)

        # Jitter and blur come with a number for whether they happened.
        columns = [*box, params["flip"], jittered, *params["order"].unbind(1), *factors]
        columns += [params["gray"], params["sigma"] > 0, params["sigma"], params["solarize"]]
        return torch.stack([column.float() for column in columns], 1)

    def forward(self, tokens, params):
        """L_equiv, and by how much the prediction is closer to u than u0 is: above 0, better than the identity."""
        u0, u1, u2 = (self.project(self.cls(tokens[view])) for view in ("plain", "1", "2"))  # (n, 128)
        u, u0 = torch.cat([u1, u2]), u0.repeat(2, 1)  # (2 n, 128)

        # Both views are one batch for batch norm. Standardised apart, "blur on" would be a constant of its view.
        numbers = torch.cat([self.describe(params["1"]), self.describe(params["2"])])  # (2 n, 18)
        embedded = self.embed(common.send(numbers.to(u.dtype), u.device))  # (2 n, 128)
        u_hat = self.predict(torch.cat([u0, embedded], 1))  # (2 n, 128)

        # The gain is positive where the prediction is closer to u than the embedding without augmentation.
        with torch.no_grad():
            gain = F.cosine_similarity(u, u_hat) - F.cosine_similarity(u, u0)  # (2 n,)
        return dict(L_equiv=nt_xent(u[:, None], u_hat[:, None], self.temp), cosine_gain=gain.mean())


class ESSL(Baseline):
    """E-SSL, "Equivariant Contrastive Learning" (arXiv 2111.00899): how many quarter turns was a small crop rotated
    by?"""

    chance = math.log(4)

    def __init__(self, dim, args):
        super().__init__(dim, args)
        layers = []
        for _ in range(2):
            layers += [nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers, nn.Linear(dim, 256), nn.LayerNorm(256), nn.Linear(256, 4))

    def forward(self, tokens, params):
        """L_equiv, and the share of rotations that are recognised."""
        logits = self.head(self.cls(tokens["rotated"]))  # (4 n, 4)
        turns = torch.arange(4, device=logits.device).repeat_interleave(len(logits) // 4)  # (4 n,)
        accuracy = (logits.argmax(1) == turns).float().mean()
        return dict(L_equiv=F.cross_entropy(logits, turns), rotation_accuracy=accuracy)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device):
    """The model with its initial weights: seeded, the same on every process."""
    common.seed_everything(args.seed, "weights")

    # Bases differ in the positions of their ViT; the equivariance term decides where [CLS] enters.
    base = dict(mocov3=MoCoV3, dino=DINO, barlow=BarlowTwins)[args.base]
    encoder = dict(img_size=args.img_size, patch_size=args.patch_size, drop_path=args.drop_path)
    encoder |= dict(cls_layer=args.cls_layer, pos=base.positions)
    mean, std = common.normalisation(args)
    model = base(common.make_backbone(args.arch, mean, std, **encoder), args)

    # The equivariance term is a part of the model, so that it is trained and saved with it.
    if args.equi != "none":
        term = dict(ser=SER, augself=AugSelf, stl=STL, equimod=EquiMod, essl=ESSL)[args.equi]
        model.equi = term(model.backbone.dim, args)
    return common.batchnorm_over_ranks(model, device).to(device)


def check(args):
    """Fill in defaults that follow from other values, and refuse what cannot work, before anything is made."""
    common.check_run(args, RECIPES, common.VITS)
    if args.weight_decay_end is None:
        args.weight_decay_end = args.weight_decay

    # SER takes tokens after a block. [CLS] enters there by default.
    depth = common.VITS[args.arch]["depth"]
    blocks = f"{args.arch} has {depth} blocks"
    if args.equi == "none" and args.equi_layer:
        late = f"for a late [CLS] alone give --cls-layer {args.equi_layer}"
        common.die(f"--equi-layer {args.equi_layer}: --equi none makes nothing equivariant; {late}")
    if args.cls_layer is None:
        args.cls_layer = args.equi_layer if args.equi == "ser" else 0

    # Blocks are counted from 1 to the depth of the encoder.
    if args.equi == "ser" and not 0 < args.equi_layer <= depth:
        common.die(f"--equi-layer {args.equi_layer}: {blocks}, and ser takes the tokens after one of them")
    if args.equi_layer > depth:
        common.die(f"--equi-layer {args.equi_layer}: {blocks}")
    if args.cls_layer >= depth:
        common.die(f"--cls-layer {args.cls_layer}: {blocks} and [CLS] needs one of them; give --cls-layer 3, say")

    # The baselines read [CLS], which exists only after the block where it enters.
    if args.equi not in ("ser", "none") and 0 < args.equi_layer <= args.cls_layer:
        enters = f"which enters after block {args.cls_layer}"
        common.die(f"--equi-layer {args.equi_layer}: {args.equi} takes [CLS] there, {enters}; give --cls-layer 0")

    # Two bases with SER, or alone, take local views. Small crops must divide into patches.
    if args.local_views and (args.base == "barlow" or args.equi not in ("ser", "none")):
        common.die(f"--local-views {args.local_views}: goes with --base mocov3 or dino, and with --equi ser or none")
    if args.local_views or args.equi == "essl":
        common.check_patches(args, "local_size")

    # STL pairs the images of a process.
    batch_size, world = args.batch_size, common.world_size()
    if args.equi == "stl" and batch_size // world % 2:
        common.die(f"--batch-size {batch_size}: stl pairs images, so each of {world} processes needs an even number")

    # AugSelf needs something to predict.
    if args.equi == "augself":
        if not args.equi_params:
            common.die("--equi-params: name what augself is to predict, e.g. crop color")
        for kind, flag in (("color", "jitter"), ("blur", "blur"), ("solarize", "solarize")):
            if kind in args.equi_params and not any(getattr(args, flag)):
                common.die(f"--equi-params {kind}: is never applied; give --{flag} values above 0")

    # b2 leaves images for b1, and all processes hold the same number of it.
    if args.equi == "ser":
        n2, flag = equi_batch_size(batch_size, args.equi_ratio), f"--equi-ratio {args.equi_ratio}"
        if n2 >= batch_size:
            common.die(f"--batch-size {batch_size}: SER's second part (b2) takes {n2} of it; raise it or lower {flag}")
        if n2 % world:
            step = math.lcm(8, world)
            share = step * math.ceil(n2 / step) / batch_size
            ways = "start 1, 2, 4 or 8, or " + (f"give --equi-ratio {share:.3g}" if share < 1 else "raise --batch-size")
            common.die(f"{flag}: b2, {n2} images, does not divide among {world} processes; {ways}")


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)

    # The equivariance term adds views to those of the base.
    model = build(args, device)
    policies = make_policies(args)
    train, test = (
        common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers)
        for split in ("train", "test")
    )
    train = train.to(device)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device)

    # DINO does not decay biases, norms and other parameters of one dimension.
    parameters = [p for p in model.parameters() if p.requires_grad]
    undecayed = [p for p in parameters if args.base == "dino" and p.ndim <= 1]
    decayed = [p for p in parameters if args.base != "dino" or p.ndim > 1]
    groups = [dict(params=decayed), dict(params=undecayed, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=device.type == "cuda")
    peak = args.lr * args.batch_size / 256

    # The run directory is named after base, term, local views and layer; other variants need --out.
    variant = f"{args.base}-{args.equi}"
    if args.local_views:
        variant += "-2+4"
    if args.equi_layer != (3 if args.equi == "ser" else 0):
        variant += f"-{args.equi_layer}"

    # A resumed run continues from its checkpoint; every run prints the loss of pure chance before it starts.
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
        # Learning rate and weight decay follow their schedules.
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, peak, args.lr_end * peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        decay = common.cosine(epoch / args.epochs, args.weight_decay, args.weight_decay_end)
        optimizer.param_groups[0]["weight_decay"] = decay
        if step == 0:
            run.picture("views.png", [views[name] for name in sorted(views)])

        # DistributedDataParallel averages the gradients over processes in the backward pass.
        with common.autocast(device, args.amp):
            out, y = ddp(views, params, epoch)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        if args.clip is not None:
            common.clip_each_(parameters, args.clip)

        # The prototypes learn only after the first epochs.
        if epoch < args.freeze_last_epochs:
            for p in model.last_layer:
                p.grad = None
        optimizer.step()

        # The momentum encoder moves before it makes the next keys, as in MoCo-v3.
        update_teacher(model, common.cosine((step + 1) / loader.total_steps, args.momentum, 1.0))
        run.log(step, features=y, lr=lr, epoch=epoch, **out)

    # An untrained encoder with the same initial weights is the baseline of the final k-NN score.
    run.finish(build(args, device), train, test)


if __name__ == "__main__":
    common.command(main)
