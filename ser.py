"""SER: soft equivariance regularisation of intermediate tokens, on MoCo-v3, DINO or Barlow Twins.

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

Usage
    python ser.py                                                      # rendered images, CPU, minutes
    python ser.py --base dino --equi none                              # a base alone
    python ser.py --data imagefolder --data-dir DIR --recipe cifar10   # any folder of images
    torchrun --nproc_per_node=8 ser.py --data imagenet --data-dir IMAGENET --compile

Where the paper is silent or at odds with itself, this file takes (source in brackets):
  * equi_ratio 0.01, lambda 1 (DINO: 0.3) [launch commands of the public code, github.com/aitrics-chris/SER]; at least
    8 images. tau is the paper's: 0.3, DINO 0.5.
  * scaling changes the grid of patches: one (h, w) a view and step, area 0.7 to 1.3 of the square grid, aspect 3/4 to
    4/3, positions resampled bicubically [public code]; nothing leaves the image, so there is no mask.
  * x for b2 is one random resized crop, shared by both views, so that g is free of crops [public code]; `--equi-crop
    center` takes the centre of the image instead.
  * gradients flow through both sides and through the gather over processes. The public code gathers without gradient,
    by which L_equiv would train nothing; the paper's ablation (lambda = 0 differs from lambda > 0) rules that out.
  * a LayerNorm before the projector; the projector after rho_g [paper's Algorithm 1]; 6 heads in ViT-S [DINO, timm].
  * MoCo-v3 itself follows github.com/facebookresearch/moco-v3: fixed sin-cos positions, frozen random patch projection,
    weight decay on everything, no clipping. Base lr 3e-4 [SER's public code; the same peak as MoCo-v3's own recipe].
  * DINO (github.com/facebookresearch/dino) and Barlow Twins (github.com/facebookresearch/barlowtwins), on AdamW, with the
    learning rates, clipping per tensor, teacher momentum and crops of SER's public code. DINO's teacher moves by the
    momentum of the coming step, not of the past one.

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
from common import CenterCrop, ColorJitter, Compose, GaussianBlur, Grayscale, GridResize, HorizontalFlip, Normalize, RandomResizedCrop, Rot90, Solarize


@dataclasses.dataclass
class Args(common.RunArgs):
    """What SER, its bases and their views need, beside the arguments that all scripts share."""

    base: Literal["mocov3", "dino", "barlow"] = "mocov3"
    """the invariant method underneath"""
    equi: Literal["ser", "none"] = "ser"
    """the equivariance term; none is exactly the base"""
    equi_layer: int = 3
    """block after which the tokens are made equivariant"""
    cls_layer: int | None = None
    """block after which [CLS] enters; default: --equi-layer with ser, 0 (the input) with none"""
    equi_weight: float = 1.0
    """lambda, the weight of L_equiv (0 keeps the late [CLS] and the views of SER: the paper's control)"""
    equi_ratio: float = 0.01
    """share of the global batch in b2, rounded to a multiple of 8 and never below 8"""
    equi_temp: float = 0.3
    """tau, the temperature of L_equiv"""
    equi_dim: int = 512
    """width of the projector p of the tokens"""
    equi_area: tuple[float, float] = (0.7, 1.3)
    """range of the scaling: number of cells relative to the square grid"""
    equi_crop: Literal["random", "center"] = "random"
    """what b2's views are made of: one random crop shared by both views, or the centre of the image"""
    proj_hidden: int = 4096
    """hidden width of projector and predictor (mocov3, barlow) or of the head (dino)"""
    proj_dim: int = 256
    """width of the embeddings that are contrasted (mocov3), decorrelated (barlow), or of the head's bottleneck (dino)"""
    temp: float = 0.2
    """temperature T of MoCo-v3; of DINO's student"""
    momentum: float = 0.99
    """of the momentum encoder (mocov3) or the teacher (dino) at the start; it rises to 1 along half a cosine"""
    prototypes: int = 65536
    """width K of DINO's output"""
    teacher_temp: tuple[float, float] = (0.04, 0.07)
    """temperature of DINO's teacher: first and last value of its linear warm-up"""
    teacher_temp_epochs: float = 10
    """epochs of that warm-up"""
    freeze_last_epochs: float = 1
    """epochs at the start in which DINO's last layer does not learn"""
    redundancy: float = 0.0051
    """weight of the off-diagonal terms of Barlow Twins"""
    weight_decay: float = 0.1
    """AdamW's at the start: on all parameters (mocov3, barlow), on those of two or more dimensions (dino)"""
    weight_decay_end: float | None = None
    """and at the end of half a cosine; default: it stays as it is"""
    warmup_epochs: float = 10
    """linear warm-up; then the learning rate falls along half a cosine"""
    lr_end: float = 0.0
    """the learning rate at the end, as a share of the peak"""
    clip: float | None = None
    """largest norm of the gradient of each parameter tensor; default: no clipping"""
    drop_path: float = 0.0
    """stochastic depth of the trained encoder"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """of the crops"""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """area of the random crops, relative to the image"""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter, applied to 80 % of the views"""
    blur: tuple[float, float] = (1.0, 0.1)
    """probability of Gaussian blur in view 1 and view 2"""
    solarize: tuple[float, float] = (0.0, 0.2)
    """probability of solarisation in view 1 and view 2"""


RANGES = common.RANGES | dict(
    equi_layer="[1, inf)", cls_layer="[0, inf)", equi_weight="[0, inf)", equi_ratio="[0, 1)", equi_temp="(0, inf)", equi_dim="[1, inf)",
    equi_area="(0, inf)", proj_hidden="[1, inf)", proj_dim="[1, inf)", temp="(0, inf)", momentum="[0, 1]", prototypes="[2, inf)",
    teacher_temp="(0, inf)", teacher_temp_epochs="[0, inf)", freeze_last_epochs="[0, inf)", redundancy="[0, inf)", weight_decay="[0, inf)",
    weight_decay_end="[0, inf)", warmup_epochs="[0, inf)", lr_end="[0, 1]", clip="(0, inf)", drop_path="[0, 1)", crop_scale="(0, 1]",
    jitter="[0, inf)", blur="[0, 1]", solarize="[0, 1]")

# What a base needs: the settings of SER's ImageNet runs [its public code, where the paper only says "as published"].
BASES = dict(
    mocov3=dict(),
    dino=dict(lr=1e-4, lr_end=0.0125, proj_hidden=2048, temp=0.1, momentum=0.982, weight_decay=0.04, weight_decay_end=0.4, clip=0.3,
              drop_path=0.1, crop_scale=(0.25, 1.0), interpolation="bicubic", equi_weight=0.3, equi_temp=0.5),
    barlow=dict(lr=1e-4, lr_end=0.001, proj_hidden=8192, proj_dim=8192, clip=0.3, interpolation="bicubic"),
)
SMALL = dict(img_size=32, blur=(0.0, 0.0), solarize=(0.0, 0.0), crop_scale=(0.2, 1.0), equi_ratio=0.125, drop_path=0.0)
RECIPES = dict(
    imagenet=dict(),  # the paper: ViT-S/16, 100 epochs, batch 2048 = 8 x 256, peak lr 2.4e-3 (DINO, Barlow Twins: 8e-4)
    imagenet100=dict(),  # not in the paper: its ImageNet values
    cifar10=dict(arch="vit_tiny", patch_size=4, epochs=200, batch_size=512, lr=5e-4, proj_hidden=1024, **SMALL),
    blocks=dict(arch="vit_pico", patch_size=8, epochs=4, warmup_epochs=0.5, batch_size=128, lr=4e-3, proj_hidden=512, proj_dim=128,
                momentum=0.9, **SMALL),  # a run this short wants a momentum encoder that keeps up
)
RECIPES["cifar100"] = RECIPES["cifar10"]
SMALL_BASES = dict(  # and what the two small recipes, both ours, change for a base
    mocov3=dict(),
    dino=dict(lr=2e-3, momentum=0.98, prototypes=1024, teacher_temp_epochs=1.0, freeze_last_epochs=0.0, clip=3.0),
    barlow=dict(proj_dim=512, clip=3.0),
)
NORMALISE = dict(blocks=common.BLOCKS, cifar10=common.CIFAR10, cifar100=common.CIFAR100)  # all others: ImageNet's mean and std


def values_in_force(first):
    """The recipe that a first look at the command line asks for, as defaults for the second."""
    name = first.recipe or first.data
    if name not in RECIPES:
        return {}  # `check` will complain
    return dict(recipe=name) | BASES[first.base] | RECIPES[name] | (SMALL_BASES[first.base] if name in ("blocks", "cifar10", "cifar100") else {})


# ----------------------------------------------------------------------------------------------------------------------
# Views: T for b1, T_eq for b2
# ----------------------------------------------------------------------------------------------------------------------


def second_part(batch_size, ratio):
    """n2 = max(8, 8 round(r B / 8)): multiples of 8, so that up to 8 processes share them evenly."""
    return max(8, 8 * round(ratio * batch_size / 8))


def make_policies(args):
    """{name: Compose}: views "1" and "2" of T; with SER also "eq1" and "eq2" of T_eq, on the same photometrics."""
    mean, std = NORMALISE.get(args.recipe, common.IMAGENET)
    crop = RandomResizedCrop(args.img_size, args.crop_scale, interpolation=args.interpolation)
    eq_crop = crop if args.equi_crop == "random" else CenterCrop(args.img_size)
    grid = args.img_size // args.patch_size
    policies = {}
    for i in (0, 1):
        photometric = [ColorJitter(*args.jitter, p=0.8), Grayscale(0.2), GaussianBlur(p=args.blur[i]), Solarize(p=args.solarize[i])]
        policies[f"{i + 1}"] = Compose([crop, *photometric, HorizontalFlip(), Normalize(mean, std)])
        if args.equi == "ser":
            group = [HorizontalFlip(), Rot90(), GridResize(args.patch_size, grid, args.equi_area)]
            policies[f"eq{i + 1}"] = Compose([eq_crop, *photometric, *group, Normalize(mean, std)])
    return policies


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, what its policy draws for them)}. b2's rows lie evenly over the batch, so that the
    contiguous rows of each process hold the same number of them; its two views share one crop."""
    rows = torch.arange(args.batch_size)
    b2 = torch.tensor([], dtype=torch.long)
    if args.equi == "ser":
        n2 = second_part(args.batch_size, args.equi_ratio)
        b2 = torch.arange(n2) * args.batch_size // n2  # (n2,)
    b1 = rows[~torch.isin(rows, b2)]  # (n1,)
    views = {name: (b2 if name.startswith("eq") else b1) for name in policies}
    drawn = {name: (at, policies[name].draw(len(at), generator)) for name, at in views.items()}
    if args.equi == "ser":
        drawn["eq2"][1].update({key: drawn["eq1"][1][key] for key in policies["eq1"].crop.draws})
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

    In normalised coordinates (x right, y down, cell centres, [-1, 1]) g moves a point p to D p, D = R^k F^f, and scaling
    changes nothing but the grid. So output cell p reads z at D^T p, bicubically: an exact permutation of cells wherever
    the permuted input grid is the output grid.
    """
    quarter, flip = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    table = torch.stack([torch.linalg.matrix_power(quarter, i) @ torch.linalg.matrix_power(flip, j) for i in range(4) for j in range(2)])
    D = table.to(z)[(2 * k + f).to(z.device)]  # (n, 2, 2)
    theta = F.pad(D.transpose(1, 2), (0, 1))  # (n, 2, 3): [D^T | 0]
    cells = F.affine_grid(theta, (len(z), z.shape[-1], *size), align_corners=False)  # (n, h2, w2, 2)
    out = F.grid_sample(z.permute(0, 3, 1, 2), cells, "bicubic", "border", align_corners=False)
    return out.permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def dense_nt_xent(z1, z2, tau, chunk=2**23):
    """L_equiv (Section 3.3): z1 = p(rho_g f1(x1)) and z2 = p(f1(x2)), each (n, P, D) on this process, -> scalar.

    Positive: the same cell of the same image on the other side. Negatives: all cells, both sides, of other images of
    all processes; cells of the anchor's own image are neither. One image in all gives 0. Anchors go in chunks of about
    `chunk` logits that are recomputed in the backward pass, so memory does not grow with the square of the cells.
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
        logits[torch.arange(len(own)), :, own] = -torch.inf
        return logits.flatten(2).logsumexp(-1).view(len(own), 2, P)

    c = max(1, chunk // (2 * P * N * 2 * P))
    rest = [checkpoint(other_images, q[i : i + c], torch.arange(first + i, first + min(i + c, n)), use_reentrant=False) for i in range(0, n, c)]
    return (torch.logaddexp(torch.cat(rest), positive) - positive).mean()


def contrast(q, k, T):
    """ctr(q, k) of MoCo-v3: row i of q and k (b, d) is the same image; keys of all processes are negatives. With q and k
    normalised, 2 T times the cross-entropy of q k^T / T against the diagonal."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = q @ common.gather(k).T / T  # (b, B)
    labels = torch.arange(len(q), device=q.device) + common.rank() * len(q)
    return 2 * T * F.cross_entropy(logits, labels)


def distill(students, teachers, centre, temp, teacher_temp):
    """DINO: students and teachers are outputs (b, K) of views, in the same order. Cross-entropy of softmax(s / temp) against
    softmax((t - centre) / teacher_temp), mean over the images and over all pairs of a teacher's and another student's view."""
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
# Models: a base is its backbone, its heads, its teacher (if it has one), and `invariance`
# ----------------------------------------------------------------------------------------------------------------------


def mlp(*dims):
    """Linear-BN-ReLU, ..., Linear-BN without affine; no biases (MoCo-v3's projector and predictor)."""
    layers = []
    for i, (a, b) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)] + [nn.ReLU(inplace=True)] * (not last)
    return nn.Sequential(*layers)


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


def equi_modules_(model, args):
    """What SER adds to a base: a LayerNorm and the projector p of the tokens."""
    if args.equi == "ser":
        d = model.backbone.dim
        model.equi_norm = nn.LayerNorm(d, eps=1e-6)
        model.equi_projector = nn.Sequential(nn.Linear(d, args.equi_dim, bias=False), nn.GELU(), nn.Linear(args.equi_dim, args.equi_dim, bias=False))


class MoCoV3(nn.Module):
    """Online encoder, projector and predictor make queries; the momentum encoder and projector make keys."""

    evaluated, positions, last_layer = "backbone", "sincos", ()

    def __init__(self, backbone, args):
        super().__init__()
        moco_init_(backbone)
        self.backbone, self.temp = backbone, args.temp
        self.projector = mlp(backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim)
        self.predictor = mlp(args.proj_dim, args.proj_hidden, args.proj_dim)
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, head=self.projector))).requires_grad_(False)

    def invariance(self, y, t, epoch):
        """[CLS] of views 1 and 2, of the online (y) and the momentum encoder (t), (b, D) each -> L_inv."""
        q = [self.predictor(self.projector(v)) for v in y]  # (b, d)
        with torch.no_grad():
            k = [self.teacher["head"](v) for v in t]  # (b, d)
        with common.full_precision():
            (q1, q2), (k1, k2) = ([common.upcast(v) for v in views] for views in (q, k))
            return contrast(q1, k2, self.temp) + contrast(q2, k1, self.temp)

    def chance(self, args):
        return 4 * args.temp * math.log(args.batch_size)


class DINOHead(nn.Module):
    """D -> hidden -> hidden -> bottleneck, GELU between, L2-normalised, then K prototypes of a weight-normed layer."""

    def __init__(self, dim, hidden, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        for m in self.mlp[::2]:
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last.parametrizations.weight.original0)  # the norms g

    def forward(self, y):  # (b, D) -> (b, K)
        return self.last(F.normalize(self.mlp(y), dim=1))


class DINO(nn.Module):
    """A student learns what its own moving average, the teacher, says of the other view; a centre keeps the teacher from
    saying always the same. The teacher is what is evaluated."""

    evaluated, positions = "teacher.backbone", "learned"

    def __init__(self, backbone, args):
        super().__init__()
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)
        self.backbone, self.temp, self.teacher_temp, self.teacher_temp_epochs = backbone, args.temp, args.teacher_temp, args.teacher_temp_epochs
        self.head = DINOHead(backbone.dim, args.proj_hidden, args.proj_dim, args.prototypes)
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, head=self.head))).requires_grad_(False)
        for m in self.teacher.modules():
            if isinstance(m, DropPath):
                m.drop_prob = 0.0  # stochastic depth is the student's
        self.register_buffer("centre", torch.zeros(args.prototypes))
        self.last_layer = list(self.head.last.parameters())

    def invariance(self, y, t, epoch):
        """[CLS] of views 1 and 2, of the student (y) and the teacher (t), (b, D) each -> L_inv. Moves the centre."""
        first, last = self.teacher_temp
        teacher_temp = last if epoch >= self.teacher_temp_epochs else first + (last - first) * epoch / self.teacher_temp_epochs
        s = [self.head(v) for v in y]  # (b, K)
        with torch.no_grad():
            t = [self.teacher["head"](v) for v in t]  # (b, K)
        with common.full_precision():
            s, t = [common.upcast(v) for v in s], [common.upcast(v) for v in t]
            loss = distill(s, t, self.centre, self.temp, teacher_temp)
            self.centre = 0.9 * self.centre + 0.1 * common.all_reduce(torch.cat(t).mean(0)) / common.world_size()
            return loss

    def chance(self, args):
        return math.log(args.prototypes)


class BarlowTwins(nn.Module):
    """One encoder, a wide projector; the cross-correlation of the two views should be the identity."""

    evaluated, positions, last_layer, teacher = "backbone", "learned", (), None

    def __init__(self, backbone, args):
        super().__init__()
        self.backbone, self.redundancy = backbone, args.redundancy
        self.projector = mlp(backbone.dim, args.proj_hidden, args.proj_hidden, args.proj_dim)  # ends in BN without affine

    def invariance(self, y, t, epoch):
        """[CLS] of views 1 and 2, (b, D) each -> L_inv."""
        z1, z2 = (self.projector(v) for v in y)  # (b, d)
        with common.full_precision():
            return redundancy_reduction(common.upcast(z1), common.upcast(z2), self.redundancy)

    def chance(self, args):
        return args.proj_dim  # of c = 0


def update_teacher(model, m):
    """teacher <- m teacher + (1 - m) online, encoder and head."""
    if model.teacher is not None:
        common.ema_update(model.teacher["backbone"], model.backbone, m)
        common.ema_update(model.teacher["head"], model.projector if isinstance(model, MoCoV3) else model.head, m)


def encode(backbone, views, i, layer, compiled=None):
    """View i of a batch -> y (b, D), final [CLS] of [b1; b2], and the map of b2 after block `layer` (n2, h, w, D) or None.
    `compiled` is the compiled backbone, for b1, whose shapes never change."""
    y = (backbone if compiled is None else compiled)(views[f"{i}"])
    if f"eq{i}" not in views:
        return y, None
    x = views[f"eq{i}"]
    y2, tokens = backbone.trace(x, (layer,))
    h, w = backbone.cells(x)
    return torch.cat([y, y2]), tokens[layer][:, -h * w :].unflatten(1, (h, w))


def losses(model, views, params, args, epoch=0.0, compiled=(None, None)):
    """All of a step's mathematics: views {name: (n, 3, H, W)} and their params -> ({"loss", "L_inv", "L_equiv"}, y). `compiled`
    holds the compiled online and teacher backbones."""
    y1, map1 = encode(model.backbone, views, 1, args.equi_layer, compiled[0])  # (b, D), (n2, h1, w1, D)
    y2, map2 = encode(model.backbone, views, 2, args.equi_layer, compiled[0])  # (b, D), (n2, h2, w2, D)
    t = None
    if model.teacher is not None:
        with torch.no_grad():
            t = [encode(model.teacher["backbone"], views, i, args.equi_layer, compiled[1])[0] for i in (1, 2)]  # (b, D)
    out = dict(L_inv=model.invariance((y1, y2), t, epoch))
    out["loss"] = out["L_inv"]
    if map1 is not None:
        with common.full_precision():
            k, f = relative(params["eq1"]["rot90"], params["eq1"]["flip"], params["eq2"]["rot90"], params["eq2"]["flip"])
            map1, map2 = model.equi_norm(common.upcast(map1)), model.equi_norm(common.upcast(map2))
            moved = act(map1, k, f, map2.shape[1:3])  # (n2, h2, w2, D): rho_g f1(x1)
            z1, z2 = model.equi_projector(moved).flatten(1, 2), model.equi_projector(map2).flatten(1, 2)  # (n2, P, equi_dim)
            out["L_equiv"] = dense_nt_xent(z1, z2, args.equi_temp)
            out["loss"] = out["L_inv"] + args.equi_weight * out["L_equiv"]
    return out, y1


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_each_(parameters, most):
    """Scale down the gradient of every parameter tensor whose norm exceeds `most` (DINO clips each tensor by itself)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    scale = [(most / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)]
    torch._foreach_mul_(grads, scale)


def build(args, device):
    """The model with its initial weights: seeded, the same on every process."""
    common.seed_everything(args.seed, "weights")
    base = dict(mocov3=MoCoV3, dino=DINO, barlow=BarlowTwins)[args.base]
    mean, std = NORMALISE.get(args.recipe, common.IMAGENET)
    model = base(common.make_backbone(args.arch, mean, std, img_size=args.img_size, patch_size=args.patch_size, cls_layer=args.cls_layer,
                                      pos=base.positions, drop_path=args.drop_path), args)
    equi_modules_(model, args)
    return common.batchnorm_over_ranks(model, device).to(device)


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    common.check_data(args.data)
    if args.recipe not in RECIPES:
        common.die(f"--recipe {args.recipe or 'is missing'}: name one of {', '.join(RECIPES)} (for --data {args.data})")
    common.check_ranges(args, RANGES)
    for name in ("crop_scale", "equi_area"):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            common.die(f"--{name.replace('_', '-')} {' '.join(map(str, getattr(args, name)))}: the lower end comes first")
    if args.jitter[3] > 0.5:
        common.die(f"--jitter {' '.join(map(str, args.jitter))}: hue is in turns, at most 0.5")
    depth = common.vit_size(args.arch)["depth"]
    if args.equi_layer > depth:
        common.die(f"--equi-layer {args.equi_layer}: {args.arch} has {depth} blocks")
    if args.cls_layer is None:
        args.cls_layer = args.equi_layer if args.equi == "ser" else 0
    if args.weight_decay_end is None:
        args.weight_decay_end = args.weight_decay
    if args.cls_layer >= depth:
        common.die(f"--cls-layer {args.cls_layer}: {args.arch} has {depth} blocks and [CLS] needs one of them; give --cls-layer 3, say")
    if args.epochs and args.warmup_epochs >= args.epochs:
        common.die(f"--warmup-epochs {args.warmup_epochs}: must be below --epochs {args.epochs}")
    if args.equi == "ser":
        n2 = second_part(args.batch_size, args.equi_ratio)
        if n2 >= args.batch_size:
            common.die(f"--batch-size {args.batch_size}: SER's second part takes {n2} of it (--equi-ratio {args.equi_ratio}, at least 8); raise it")
        if n2 % common.world_size():
            common.die(f"--equi-ratio {args.equi_ratio}: SER's second part of {n2} images does not divide among {common.world_size()} processes; start 1, 2, 4 or 8")


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)
    model = build(args, device)
    encoder = model.get_submodule(model.evaluated)
    policies = make_policies(args)
    train, test = (common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers) for split in ("train", "test"))
    train = train.to(device)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if args.base != "dino" or p.ndim > 1]
    rest = [p for p in parameters if args.base == "dino" and p.ndim <= 1]
    optimizer = torch.optim.AdamW([dict(params=decayed), dict(params=rest, weight_decay=0.0)], lr=0.0, fused=device.type == "cuda")
    peak = args.lr * args.batch_size / 256

    run = common.Run("ser", args, f"{args.base}-{args.equi}", device)

    def dump():
        heads = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{model.evaluated}.")}
        return encoder, dict(heads=heads, optimizer=optimizer.state_dict())

    def load(train_state, backbone_state):
        model.load_state_dict(train_state["heads"] | {f"{model.evaluated}.{k}": v for k, v in backbone_state.items()})
        optimizer.load_state_dict(train_state["optimizer"])

    begin = run.restore(load)
    n2 = second_part(args.batch_size, args.equi_ratio)
    chance = f"L_inv {model.chance(args):.2f}"
    if args.equi == "ser":
        chance += f", L_equiv {math.log1p(2 * (n2 - 1) * model.backbone.grid**2):.2f}"
    run.introduce(train, loader, model, peak, chance)
    compiled = [torch.compile(b) if args.compile and b is not None else None for b in (model.backbone, model.teacher["backbone"] if model.teacher else None)]

    for step, batch in run.steps(loader, dump, begin):
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, peak, args.lr_end * peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = common.cosine(epoch / args.epochs, args.weight_decay, args.weight_decay_end)
        views, params = loader.finish(batch)
        if step == 0:
            run.picture("views.png", [views[name] for name in sorted(views)], encoder)
        with common.autocast(device, args.amp):
            out, y = losses(model, views, params, args, epoch, compiled)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        common.average_gradients(parameters)
        if args.clip is not None:
            clip_each_(parameters, args.clip)
        if epoch < args.freeze_last_epochs:
            for p in model.last_layer:
                p.grad = None
        optimizer.step()
        update_teacher(model, common.cosine((step + 1) / loader.total_steps, args.momentum, 1.0))  # MoCo-v3's, before its next keys
        run.log(step, features=y, lr=lr, epoch=epoch, **out)

    run.finish(encoder, build(args, device).get_submodule(model.evaluated), train, test)


if __name__ == "__main__":
    main()
