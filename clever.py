"""CLeVER: a representation split into an invariant and an equivariant part, on DINO. DDCL: the same on SimSiam.

Paper: "Contrastive Learning Via Equivariant Representation" (Song et al. 2024, arXiv 2406.00262). DDCL:
"Distortion-Disentangled Contrastive Learning" (Wang et al., WACV 2024, arXiv 2303.05066).

Idea. The first 80 % of the representation learn what all views of an image share, as usual. The rest is trained the
other way: two views of an image should differ in it. It is therefore free to represent what the augmentation did,
however complex, and needs no parameters of it. Nothing else keeps the head of this part from collapsing, so a penalty
ties the norm of its weights to that of the invariant head.

    o = f(x) = [z_IR, z_EF],  d_IR = 0.8 D                          the invariant and the equivariant part
    dino:    students s_v = h_IR(z_IR) of all crops v, teachers t_i of the two global ones, S_v, T_i those of h_EF(z_EF)
             q_i = softmax((t_i - c_IR) / tau_t),  p_v = softmax(s_v / tau);  Q_i, P_v likewise, with their own centre
             L_CL = mean over i != v of -sum_k q_ik log p_vk
             L_Orth = mean over i != v of | mean_batch cos(Q_i, P_v) |
             L_PReg = | |h_EF|^2 - |h_IR|^2 |,  |h|^2: all weights of the student's head, squared and summed
    simsiam: L_CL = -1/2 (cos(p_1, sg z_2) + cos(p_2, sg z_1))      p = predictor(z), z = projector(z_IR)
             L_Orth = | 1/2 mean (cos(P_1, sg Z_2) + cos(P_2, sg Z_1)) |,  of the equivariant projector and predictor
             L_PReg = 1/2 of that difference between the projectors + 1/2 of that between the predictors
    L = alpha L_CL + beta L_Orth + lambda L_PReg          beta = lambda = 0: the base, on 80 % of the representation

Usage
    python clever.py                                                   # CLeVER on DINO, rendered images, CPU, minutes
    python clever.py --base simsiam --equi ddcl                        # DDCL; as first published: --lambda-preg 0
    python clever.py --equi none                                       # DINO, on the whole representation
    python clever.py --data cifar10 --data-dir CIFAR --aug complex     # rotations; complex_plus: and elastic
    torchrun --nproc_per_node=8 clever.py --data imagenet100 --data-dir IMAGENET --arch resnet50 --compile

Where the paper is silent, or its public code differs, this file takes (sources: [C] the code of CLeVER, [DD] that of
DDCL):
  * equation 11 has a plain dot product of softmaxes, which uniform softmaxes almost minimise. [C] has the cosine above.
    One side is the teacher's sharpened and centred output, and only the student has a gradient. `--orth dot` is the
    paper's.
  * as in [DD], the modulus in L_Orth comes after the mean over the batch, so that images of opposite sign cancel. The
    predictor and sg are SimSiam's; equations 2 and 3 lack them, and equation 3 has a plain dot product, not offered.
  * DINO has AdamW with lr 5e-4 per 256 images [C]. The appendix says SGD with 0.001, which is that rate at batch 512.
  * SimSiam has batches of 256 [DD] (the appendix: 512), SGD, 0.05 per 256 images, and weight decay 1e-4 on everything.
    The cosine falls from epoch to epoch; the predictors keep the peak. 30 epochs of warm-up come before and do not
    count [DD]. [DD] repeats one data order in them; here each has its own.
  * d_IR is rounded down (clever) [C] or to the nearest whole number (ddcl) [DD].
  * the norm of a head covers all its trained parameters: weights, biases and the directions of the prototypes, whose
    lengths are frozen. A normalisation follows each head, so rescaling its weights alone can satisfy the penalty. It
    keeps weight decay from shrinking one head alone; strong decay still shrinks both.
  * Table 1 does not define its norms. log_h, of the squared norm, falls as the paper's h does. log_z is of the squared
    norm of a head's output and cannot be compared with the paper's z.
  * the teacher has no stochastic depth (VMamba's has, in [C]). Its batch norm is in training mode, with statistics of
    its own.
  * rotations are nearest-neighbour and filled with black. They come before the colours (dino) [C] or after (simsiam)
    [DD].
  * residual branches start at zero in SimSiam, not in DDCL [DD].
  * positions of small crops are resampled to their grid, without DINO's offset of a tenth of a cell.
  * switches of [C] or [DD] that are not offered: SGD for DINO, stochastic depth in the teacher, a modulus per image in
    L_Orth, a penalty on only some of the weights.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import common
from common import Count, Natural, NonNegative, Plural, Positive, Share, ShareAbove0, ShareBelow1, upcast

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torchvision.models.resnet import BasicBlock, Bottleneck


@dataclasses.dataclass
class Args(common.RunArgs):
    """What CLeVER, DDCL and their bases need, beside the arguments that all scripts share."""

    arch: str = "vit_small"
    """encoder: vit_pico, vit_tiny, vit_small, vit_base, resnet_pico, resnet18, resnet50 or vmamba_tiny"""
    base: Literal["dino", "simsiam"] = "dino"
    """the invariant method underneath"""
    equi: Literal["clever", "ddcl", "none"] = "clever"
    """what makes the rest equivariant: clever (of dino), ddcl (of simsiam); none is exactly the base"""
    aug: Literal["basic", "complex", "complex_plus"] = "basic"
    """basic: the base's own; complex: with rotations by up to 90 degrees; complex_plus: also half the views deformed"""
    inv_ratio: Annotated[float, "(0, 1)"] = 0.8
    """invariant part of the representation, as a share of its width (clever, ddcl)"""
    alpha: NonNegative = 1.0
    """weight of L_CL"""
    beta: NonNegative = 1.0
    """weight of L_Orth (clever, ddcl)"""
    lambda_preg: NonNegative = 0.001
    """lambda, weight of L_PReg; 0 switches it off (clever, ddcl)"""
    orth: Literal["cos", "dot"] = "cos"
    """similarity in L_Orth (dino): cosine of the softmaxes, or their dot product"""
    head_dim: Plural = 65536
    """prototypes of h_IR (dino); width of the embeddings (simsiam)"""
    head_dim_equi: Plural = 65536
    """prototypes of h_EF (dino); width of the equivariant embeddings (simsiam)"""
    proj_hidden: Count = 2048
    """hidden width of the heads (dino) or projectors (simsiam)"""
    bottleneck: Count = 256
    """width before the prototypes (dino), hidden width of the predictors (simsiam)"""
    local_crops: Natural = 8
    """number of small crops of each image, beside the two global ones (dino)"""
    local_size: Count = 96
    """side of the small crops in pixels (dino)"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.4, 1.0)
    """area of the global crops, relative to the image"""
    local_scale: tuple[ShareAbove0, ShareAbove0] = (0.05, 0.4)
    """area of the small crops (dino)"""
    blur: bool = True
    """Gaussian blur and solarisation (both are usual on large images only)"""
    temp: Positive = 0.1
    """tau, temperature of the student (dino)"""
    teacher_temp: tuple[Positive, Positive] = (0.04, 0.04)
    """tau_t, temperature of the teacher: first and last value of its linear warm-up, step by step (dino)"""
    teacher_temp_epochs: NonNegative = 0
    """epochs of the warm-up of the teacher's temperature (dino)"""
    momentum: Share = 0.996
    """momentum of the teacher (dino) at the start; it rises to 1 along half a cosine"""
    freeze_last_epochs: NonNegative = 1
    """epochs at the start in which the prototypes do not learn (dino)"""
    weight_decay: NonNegative = 0.04
    """weight decay at the start: on parameters of two or more dimensions (dino), or on all (simsiam)"""
    weight_decay_end: NonNegative = 0.4
    """weight decay at the end of half a cosine (dino)"""
    warmup_epochs: NonNegative = 10
    """linear warm-up, within the --epochs (dino), or before them, epoch by epoch from almost 0 (simsiam); then the
    learning rate falls along half a cosine"""
    lr_end: NonNegative = 1e-6
    """learning rate at the end"""
    clip: Positive | None = 3.0
    """largest norm of the gradient of each parameter tensor; None: no clipping"""
    drop_path: ShareBelow1 = 0.1
    """stochastic depth of the student (ViT, VMamba)"""


# What SimSiam changes in Args: training, heads, views.
SIMSIAM = dict(equi="ddcl", arch="resnet50", batch_size=256, lr=0.05, warmup_epochs=30, lr_end=0.0, clip=None)
SIMSIAM |= dict(weight_decay=1e-4, weight_decay_end=1e-4, drop_path=0.0)
SIMSIAM |= dict(head_dim=2048, head_dim_equi=2048, bottleneck=512)
SIMSIAM |= dict(local_crops=0, crop_scale=(0.2, 1.0))
BASES = dict(dino=dict(batch_size=512, lr=5e-4), simsiam=SIMSIAM)

# What images of 32 px change.
SMALL_DINO = dict(arch="vit_tiny", img_size=32, patch_size=4, local_size=16, local_scale=(0.1, 0.4), blur=False)
SMALL_DINO |= dict(drop_path=0.0, momentum=0.99, freeze_last_epochs=0.0, head_dim=1024, head_dim_equi=1024)
SMALL_SIMSIAM = dict(arch="resnet18", img_size=32, patch_size=4, blur=False)

# What a run of minutes on a CPU changes: a teacher with momentum 0.99 hardly moves in its 372 steps.
MINUTES = dict(arch="vit_pico", patch_size=8, epochs=4, batch_size=128, proj_hidden=256)
MINUTES_DINO = MINUTES | dict(lr=2e-3, momentum=0.9, warmup_epochs=0.5, local_crops=4)
MINUTES_SIMSIAM = MINUTES | dict(lr=0.1, warmup_epochs=0, head_dim=256, head_dim_equi=256, bottleneck=64)

# Recipes of each base; all but the first two are ours. The tables have 200 epochs (1, 8), 500 (2 to 7), 100 (9).
CIFAR = dict(epochs=200, batch_size=256)
RECIPES = {
    "imagenet100": dict(dino=dict(epochs=200), simsiam=dict(epochs=200)),
    "imagenet": dict(dino=dict(epochs=100), simsiam=dict(epochs=200)),
    "cifar10": dict(dino=SMALL_DINO | CIFAR, simsiam=SMALL_SIMSIAM | CIFAR),
    "cifar100": dict(dino=SMALL_DINO | CIFAR, simsiam=SMALL_SIMSIAM | CIFAR),
    "blocks": dict(dino=SMALL_DINO | MINUTES_DINO, simsiam=SMALL_SIMSIAM | MINUTES_SIMSIAM),
}
VMAMBAS = dict(vmamba_tiny=(96, (2, 2, 8, 2)))  # width of the first stage, blocks of each


def values_in_force(first):
    """What base, recipe and architecture, named in a first look at the command line, set as defaults for the second."""
    name = first.recipe or first.data
    if name not in RECIPES:
        return {}  # `check` will complain
    values = BASES[first.base] | RECIPES[name][first.base]
    if first.arch in VMAMBAS and "drop_path" not in values:
        values["drop_path"] = 0.2
    return dict(recipe=name) | values


# ----------------------------------------------------------------------------------------------------------------------
# Views
# ----------------------------------------------------------------------------------------------------------------------


def make_policies(args):
    """{view: Compose}: "1" and "2" are the global crops, "3", "4", ... the small ones."""
    if args.base == "simsiam":
        return {view: simsiam_policy(args) for view in "12"}
    return {f"{i}": dino_policy(args, i) for i in range(1, 3 + args.local_crops)}


def make_warps(args):
    """The geometric distortions of `--aug`."""
    warps = []
    if args.aug != "basic":
        warps.append(common.Affine(degrees=90, interpolation="nearest"))
    if args.aug == "complex_plus":
        warps.append(common.Elastic(alpha=100))
    return warps


def dino_policy(args, i):
    """The Compose of crop i, counted from 1. The first two are global."""
    size, scale = (args.img_size, args.crop_scale) if i <= 2 else (args.local_size, args.local_scale)
    crop = common.RandomResizedCrop(size, scale, interpolation="bicubic")
    colours = [common.ColorJitter(0.4, 0.4, 0.2, 0.1), common.Grayscale(0.2)]

    # Blur and solarisation differ between the two global crops and the small ones.
    if args.blur and i == 1:
        colours += [common.GaussianBlur(p=1.0)]
    elif args.blur and i == 2:
        colours += [common.GaussianBlur(p=0.1), common.Solarize(p=0.2)]
    elif args.blur:
        colours += [common.GaussianBlur(p=0.5)]

    # Geometric distortions come before the colours [C].
    normalise = common.Normalize(*common.normalisation(args))
    return common.Compose([crop, common.HorizontalFlip(), *make_warps(args), *colours, normalise])


def simsiam_policy(args):
    """The Compose of both views of SimSiam."""
    crop = common.RandomResizedCrop(args.img_size, args.crop_scale)
    colours = [common.ColorJitter(0.4, 0.4, 0.4, 0.1), common.Grayscale(0.2)]
    if args.blur:
        colours += [common.GaussianBlur(p=0.5)]
    normalise = common.Normalize(*common.normalisation(args))
    return common.Compose([crop, *colours, common.HorizontalFlip(), *make_warps(args), normalise])


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, what its policy draws for them)}: every crop has draws of its own."""
    n = args.batch_size
    return {view: (torch.arange(n), policy.sample(n, generator)) for view, policy in policies.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def over_pairs(term, teachers, students):
    """Mean of term(teacher's i, student's v) over all pairs of a global crop i and another crop v."""
    terms = [term(q, p) for i, q in enumerate(teachers) for v, p in enumerate(students) if i != v]
    return sum(terms) / len(terms)


def cross_entropy(q, log_p):
    """q, log p (b, K) -> -sum_k q log p, mean over the batch."""
    return -(q * log_p).sum(1).mean()


def similarity(q, log_p, form):
    """Similarity of two softmaxes, in [0, 1], mean over the batch. q, log p (b, K); form: "cos", or "dot" product."""
    p = log_p.exp()
    values = F.cosine_similarity(q, p, dim=1) if form == "cos" else (q * p).sum(1)  # (b,)
    return values.mean()


def cosines(p1, p2, z1, z2):
    """1/2 (cos(p_1, sg z_2) + cos(p_2, sg z_1)), mean over the global batch. All (b, d) on this process -> a number."""
    cos = F.cosine_similarity(p1, z2.detach(), dim=1) + F.cosine_similarity(p2, z1.detach(), dim=1)  # (b,)
    return common.all_reduce(cos.mean() / 2) / common.world_size()


def squared_norm(module):
    """|h|^2: the sum of the squares of all trained parameters."""
    return sum(p.square().sum() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def diagnostics(name, head, z):
    """Table 1: log10 of |h|^2, and of the squared norm of its output z (b, d), mean over the global batch. Both are at
    least -37, where float32 ends."""
    log10 = lambda v: v.clamp(min=1e-37).log10()
    norm = common.all_reduce(z.square().sum(1).mean()) / common.world_size()
    return {f"log_h_{name}": log10(squared_norm(head)), f"log_z_{name}": log10(norm)}


# ----------------------------------------------------------------------------------------------------------------------
# VMamba, in plain torch
# ----------------------------------------------------------------------------------------------------------------------


def selective_scan(u, delta, A, B, C, D):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t,  h_0 = 0, along the last axis.

    u, delta (b, k, d, L); A, D (k, d), A < 0; B, C (b, k, L) -> y (b, k, d, L). The sequence is cut into chunks of
    about sqrt(L) steps. Linear in L. Every factor is below 1, so nothing overflows."""
    # Cut the sequence into chunks; steps that pad the last chunk leave the state as it is.
    L = u.shape[3]
    T = math.ceil(math.sqrt(L))  # steps of a chunk
    pad = lambda v, fill: F.pad(v, (0, -L % T), value=fill)
    a = pad(torch.exp(delta * A[..., None]), 1.0).unflatten(3, (-1, T)).unbind(4)  # T of (b, k, d, chunks)
    x = pad(delta * B[:, :, None] * u, 0.0).unflatten(3, (-1, T)).unbind(4)

    # All chunks step through the recurrence side by side, each from 0.
    h, decay = [x[0]], [a[0]]
    for t in range(1, T):
        h.append(a[t] * h[-1] + x[t])
        decay.append(a[t] * decay[-1])

    # The state at the end of a chunk decays through the next one and is added to its states.
    start = [torch.zeros_like(h[0][..., 0])]
    for end, factor in zip(h[-1].unbind(3)[:-1], decay[-1].unbind(3)[:-1]):
        start.append(end + factor * start[-1])
    h = torch.stack(h, 4) + torch.stack(decay, 4) * torch.stack(start, 3)[..., None]  # (b, k, d, chunks, T)
    return C[:, :, None] * h.flatten(3)[..., :L] + D[..., None] * u


class SS2D(nn.Module):
    """VMamba's 2-D selective scan with state size 1 and no gate: rows and columns, each forwards and backwards."""

    def __init__(self, dim):
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim)

        # Each direction has projections to the low rank of delta, to B and to C, and from that rank to delta.
        uniform = lambda *shape, bound: nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
        self.x_proj = uniform(4, self.rank + 2, dim, bound=dim**-0.5)
        self.dt_proj = uniform(4, dim, self.rank, bound=self.rank**-0.5)

        # The bias of delta is the inverse softplus of steps between 0.001 and 0.1, drawn log-uniformly.
        dt = torch.empty(4, dim).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log, self.D = nn.Parameter(torch.zeros(4 * dim, 1)), nn.Parameter(torch.ones(4 * dim))

    def forward(self, x):
        """x (B, H, W, d) -> the same shape."""
        # A depthwise convolution mixes neighbours before the map is read in four directions.
        _, H, W, d = x.shape
        x = F.silu(self.conv(self.in_proj(x).permute(0, 3, 1, 2)))  # (B, d, H, W)
        u = cross_scan(x)  # (B, 4, d, L)

        # The step sizes, B and C depend on the input. The recurrence runs in float32.
        with common.full_precision():
            u, x_proj, dt_proj = upcast(u), upcast(self.x_proj), upcast(self.dt_proj)
            delta, B, C = torch.einsum("bkdl,krd->bkrl", u, x_proj).split([self.rank, 1, 1], dim=2)
            delta = torch.einsum("bkrl,kdr->bkdl", delta, dt_proj) + self.dt_bias[..., None]  # (B, 4, d, L)
            A, D = -torch.exp(self.A_log).view(4, d), self.D.view(4, d)
            y = selective_scan(u, F.softplus(delta), A, B[:, :, 0], C[:, :, 0], D)

        # The four scans are summed, each back in its place on the map.
        return self.out_proj(self.norm(cross_merge(y, H, W).permute(0, 2, 3, 1)))


def cross_scan(x):
    """x (B, d, H, W) -> (B, 4, d, H W): by rows, by columns, and both backwards."""
    both = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)  # (B, 2, d, L)
    return torch.cat([both, both.flip(3)], 1)


def cross_merge(y, H, W):
    """y (B, 4, d, H W) -> the sum of all four, each back in its place (B, d, H, W)."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(3)).unbind(1)  # (B, d, L) each
    return rows.unflatten(2, (H, W)) + columns.unflatten(2, (W, H)).transpose(2, 3)


class VMambaBlock(nn.Module):
    """Scan and MLP, each on normalised features and added to them."""

    def __init__(self, dim, drop_path):
        super().__init__()
        self.norm1, self.scan = nn.LayerNorm(dim), SS2D(dim)
        self.norm2, self.drop = nn.LayerNorm(dim), DropPath(drop_path)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # (B, H, W, d)
        x = x + self.drop(self.scan(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ChannelsLast(nn.Module):
    """A 3x3 convolution of stride 2 and layer norm on (B, H, W, C)."""

    def __init__(self, before, after):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3, 2, 1), nn.LayerNorm(after)

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMamba(common.Pyramid, nn.Module):
    """VMamba-Tiny [s1l8] (Liu et al. 2024, arXiv 2401.10166, and its public code), in plain torch.

    Four stages of 2, 2, 8, 2 blocks, 96 to 768 wide, with strides 4, 8, 16, 32. The representation is the mean of the
    normalised last map. Images of any size."""

    def __init__(self, arch="vmamba_tiny", img_size=224, drop_path=0.2):
        super().__init__()
        width, depths = VMAMBAS[arch]
        self.dim = 8 * width
        self.stem = nn.Sequential(ChannelsLast(3, width // 2), nn.GELU(), ChannelsLast(width // 2, width))

        # Every stage but the first begins with a convolution that halves the map and doubles the width.
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = width * 2**i
            layers = [VMambaBlock(dim, next(rates)) for _ in range(depth)]
            if i > 0:
                layers.insert(0, ChannelsLast(dim // 2, dim))
            self.stages.append(nn.Sequential(*layers))
        self.norm = nn.LayerNorm(self.dim)

        # Linear layers start as truncated normals; convolutions keep the defaults of torch.
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def timm_arguments(self):
        return "timm has no VMamba"

    def trace(self, x, taps=()):
        """x (B, 3, H, W) -> y (B, dim), and {k: map after stage k (B, h, w, C)} for `taps`."""
        z, tapped = self.stem(x.permute(0, 2, 3, 1)), {}
        for k, stage in enumerate(self.stages, 1):
            z = stage(z)
            if k in taps:
                tapped[k] = z
        return self.norm(z).mean((1, 2)), tapped


common.BACKBONES |= dict.fromkeys(VMAMBAS, VMamba)


# ----------------------------------------------------------------------------------------------------------------------
# Bases: an encoder, a head for each part of the representation, and the losses
# ----------------------------------------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """d -> hidden -> hidden -> bottleneck, GELU between, L2-normalised, then K prototypes of norm 1."""

    def __init__(self, dim, args, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, args.proj_hidden),
            nn.GELU(),
            nn.Linear(args.proj_hidden, args.proj_hidden),
            nn.GELU(),
            nn.Linear(args.proj_hidden, args.bottleneck),
        )
        for m in self.mlp[::2]:
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

        # The prototypes keep norm 1, because their lengths g do not learn.
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(args.bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last.parametrizations.weight.original0)
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, z):  # (b, d) -> (b, K)
        return self.last(F.normalize(self.mlp(z), dim=1))


class DINO(nn.Module):
    """Student and teacher, each with a head for each part, and a centre for each head. The teacher is evaluated.

    `inv`: width of the invariant part."""

    evaluated, compiled = "teacher.backbone", ()

    def __init__(self, backbone, args, inv):
        super().__init__()
        self.args, self.inv = args, inv
        self.backbone, self.diagnosed = backbone, {}

        # The [CLS] of DINO starts with a deviation of 0.02; SimSiam keeps timm's 1e-6.
        if hasattr(backbone, "cls_token"):
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)

        # Each part of the representation has a head of its own. The base alone has one head for all.
        self.heads = nn.ModuleDict(dict(inv=DINOHead(inv, args, args.head_dim)))
        if args.equi != "none":
            self.heads["equi"] = DINOHead(backbone.dim - inv, args, args.head_dim_equi)

        # The teacher starts as the student and has no stochastic depth.
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, heads=self.heads))).requires_grad_(False)
        for m in self.teacher.modules():
            if isinstance(m, DropPath):
                m.drop_prob = 0.0

        # Each head has a centre, which keeps the teacher's outputs from being always the same.
        self.register_buffer("centre_inv", torch.zeros(args.head_dim))
        if args.equi != "none":
            self.register_buffer("centre_equi", torch.zeros(args.head_dim_equi))

    def last_layers(self):
        return [p for head in self.heads.values() for p in head.last.parameters()]

    def compile_encoder(self):
        self.compiled = tuple(torch.compile(m, dynamic=False) for m in (self.backbone, self.teacher["backbone"]))

    def forward(self, views, epoch=0.0, diagnose=True):
        """The losses of a step: views {"1", "2", ...} (b, 3, H, W) -> ({"loss", "L_CL", ...}, representation of view 1
        (b, D)). Moves the centres. Without `diagnose` it returns the diagnostics of an earlier step."""
        args, b, out = self.args, len(views["1"]), {}
        student, teacher = self.compiled or (self.backbone, self.teacher["backbone"])

        # The teacher encodes the global crops, the student all crops. Crops of one size pass together.
        global_crops = torch.cat([views["1"], views["2"]])
        with torch.no_grad():
            o_teacher = teacher(global_crops)  # (2 b, D)
        o = student(global_crops)
        if args.local_crops:
            local_crops = torch.cat([views[f"{v}"] for v in range(3, 3 + args.local_crops)])
            o = torch.cat([o, student(local_crops)])  # (crops b, D)

        # L_CL makes all views agree in the invariant part.
        q, log_p = self.softmaxes("inv", o_teacher[:, : self.inv], o[:, : self.inv], epoch, diagnose)
        out["L_CL"] = over_pairs(cross_entropy, q.split(b), log_p.split(b))
        loss = args.alpha * out["L_CL"]

        # L_Orth makes the equivariant parts of two views differ; L_PReg ties the norms of the two heads.
        if args.equi != "none":
            q, log_p = self.softmaxes("equi", o_teacher[:, self.inv :], o[:, self.inv :], epoch, diagnose)
            out["L_Orth"] = over_pairs(partial(similarity, form=args.orth), q.split(b), log_p.split(b))
            out["L_PReg"] = (squared_norm(self.heads["equi"]) - squared_norm(self.heads["inv"])).abs()
            loss = loss + args.beta * out["L_Orth"] + args.lambda_preg * out["L_PReg"]
        return dict(loss=loss) | out | self.diagnosed, o[:b]

    def softmaxes(self, name, z_teacher, z, epoch, diagnose):
        """A part of the representation, z_teacher (2 b, d) and z (crops b, d), behind its heads: q (2 b, K) of the
        teacher and log p (crops b, K) of the student. Moves the centre, and measures the head if asked to."""
        s = upcast(self.heads[name](z))  # (crops b, K)
        with torch.no_grad():
            t = upcast(self.teacher["heads"][name](z_teacher))  # (2 b, K)

        # The softmaxes are taken in float32. The teacher's outputs are centred and sharpened first.
        with common.full_precision():
            centre = getattr(self, f"centre_{name}")  # (K,)
            q = F.softmax((t - centre) / self.teacher_temp(epoch), dim=1)
            log_p = F.log_softmax(s / self.args.temp, dim=1)

            # The centre is a moving average of the teacher's outputs over the global batch.
            mean = common.all_reduce(t.mean(0)) / common.world_size()  # (K,)
            setattr(self, f"centre_{name}", 0.9 * centre + 0.1 * mean)

            # The diagnostics of Table 1 need the norms of the head and of its output.
            if diagnose:
                self.diagnosed |= diagnostics(name, self.heads[name], s.detach())
        return q, log_p

    def teacher_temp(self, epoch):
        """tau_t at a fractional epoch: linear from the first value of `--teacher-temp` to the last, then constant."""
        (first, last), epochs = self.args.teacher_temp, self.args.teacher_temp_epochs
        return last if epoch >= epochs else first + (last - first) * epoch / epochs

    @torch.no_grad()
    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student, encoder and heads."""
        common.ema_update(self.teacher["backbone"], self.backbone, m)
        common.ema_update(self.teacher["heads"], self.heads, m)


class SimSiam(nn.Module):
    """One encoder, with a projector and a predictor for each part. `inv`: width of the invariant part."""

    evaluated, compiled = "backbone", ()

    def __init__(self, backbone, args, inv):
        super().__init__()
        self.args, self.inv = args, inv
        self.backbone, self.diagnosed = backbone, {}

        # Each part of the representation has a projector and a predictor.
        self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict()
        self.add_heads("inv", inv, args.head_dim)
        if args.equi != "none":
            self.add_heads("equi", backbone.dim - inv, args.head_dim_equi)
            return

        # SimSiam alone has no bias before the last batch norm, and residual branches that start at zero.
        self.projectors["inv"][-2].bias.requires_grad_(False)
        for m in backbone.modules():
            if isinstance(m, BasicBlock):
                nn.init.zeros_(m.bn2.weight)
            elif isinstance(m, Bottleneck):
                nn.init.zeros_(m.bn3.weight)

    def add_heads(self, name, dim, d):
        """Projector of three layers, dim -> d, and predictor of two, d -> d."""
        hidden = lambda a, b: (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))
        h, bottleneck = self.args.proj_hidden, self.args.bottleneck
        self.projectors[name] = nn.Sequential(
            *hidden(dim, h), *hidden(h, h), nn.Linear(h, d), nn.BatchNorm1d(d, affine=False)
        )
        self.predictors[name] = nn.Sequential(*hidden(d, bottleneck), nn.Linear(bottleneck, d))

    def last_layers(self):
        return []

    def compile_encoder(self):
        self.compiled = (torch.compile(self.backbone, dynamic=False),)

    def forward(self, views, epoch=0.0, diagnose=True):
        """The losses of a step: views {"1", "2"} (b, 3, H, W) -> ({"loss", "L_CL", ...}, representation of view 1
        (b, D)). Without `diagnose` it returns the diagnostics of an earlier step."""
        args, out = self.args, {}
        (student,) = self.compiled or (self.backbone,)
        o1, o2 = student(views["1"]), student(views["2"])  # (b, D) each

        # L_CL makes both views agree in the invariant part.
        out["L_CL"] = -self.compare("inv", o1[:, : self.inv], o2[:, : self.inv], diagnose)
        loss = args.alpha * out["L_CL"]

        # L_Orth makes the equivariant parts differ; L_PReg ties the norms of projectors, and of predictors.
        if args.equi != "none":
            out["L_Orth"] = self.compare("equi", o1[:, self.inv :], o2[:, self.inv :], diagnose).abs()
            differences = [squared_norm(h["equi"]) - squared_norm(h["inv"]) for h in (self.projectors, self.predictors)]
            out["L_PReg"] = sum(difference.abs() for difference in differences) / 2
            loss = loss + args.beta * out["L_Orth"] + args.lambda_preg * out["L_PReg"]
        return dict(loss=loss) | out | self.diagnosed, o1

    def compare(self, name, o1, o2, diagnose):
        """A part of the representation of both views, (b, d_part) each -> the cosine behind projector and predictor.
        Measures the projector if asked to."""
        projector, predictor = self.projectors[name], self.predictors[name]

        # Each view is a batch of its own for batch norm.
        z1, z2 = projector(o1), projector(o2)  # (b, d) each
        p1, p2 = predictor(z1), predictor(z2)  # (b, d) each
        with common.full_precision():
            if diagnose:
                self.diagnosed |= diagnostics(name, projector, upcast(z1).detach())
            return cosines(upcast(p1), upcast(p2), upcast(z1), upcast(z2))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device):
    """The model with its initial weights: seeded, the same on every process."""

    common.seed_everything(args.seed, "weights")

    # The arguments of an encoder depend on its family. Small images get a stem without pooling.
    mean, std = common.normalisation(args)
    if args.arch in common.VITS:
        kwargs = dict(patch_size=args.patch_size, cls_layer=0, pos="learned", drop_path=args.drop_path)
    elif args.arch in common.RESNETS:
        kwargs = dict(stem="cifar" if args.img_size < 64 else "imagenet")
    else:
        kwargs = dict(drop_path=args.drop_path)
    backbone = common.make_backbone(args.arch, mean, std, args.img_size, **kwargs)

    # Only now is the width known, of which the invariant part is a share.
    inv = backbone.dim
    if args.equi != "none":
        inv = backbone.dim * args.inv_ratio
        inv = math.floor(inv) if args.equi == "clever" else round(inv)
        if not 0 < inv < backbone.dim:
            gives = f"gives {inv} of {backbone.dim} dimensions to the invariant part"
            common.die(f"--inv-ratio {args.inv_ratio}: {gives}; both parts need some")
        backbone.inv = backbone.description["inv"] = inv

    # The base adds the heads of both parts to the encoder.
    base = DINO if args.base == "dino" else SimSiam
    model = common.batchnorm_over_ranks(base(backbone, args, inv), device)
    return model.to(device, memory_format=torch.channels_last)


def make_optimizer(model, args, device):
    """DINO: AdamW, weight decay in group 0, none on biases and vectors. SimSiam: SGD, the predictors in group 1."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    # The second group has no weight decay (dino), or keeps the peak of the learning rate (simsiam).
    if args.base == "dino":
        second = lambda name, p: name.endswith(".bias") or p.ndim == 1
    else:
        second = lambda name, p: name.startswith("predictors")
    groups = [dict(params=[p for name, p in named if second(name, p) == i]) for i in (False, True)]

    options = dict(lr=0.0, weight_decay=args.weight_decay, fused=device.type == "cuda")
    if args.base == "simsiam":
        return torch.optim.SGD(groups, momentum=0.9, **options)
    groups[1]["weight_decay"] = 0.0
    return torch.optim.AdamW(groups, **options)


def learning_rates(args, step, per_epoch, warmup):
    """Learning rates of the two groups at a step; the first `warmup` steps warm up.

    dino: linear from 0 to the peak, both ends included, then half a cosine to --lr-end, step by step. simsiam: epoch by
    epoch, the cosine after the warm-up; the predictors stay at the peak."""
    peak, total = args.lr * args.batch_size / 256, args.epochs * per_epoch

    # The learning rate of SimSiam changes between epochs alone, and its predictors keep the peak.
    if args.base == "simsiam":
        if step < warmup:
            return [peak * (step // per_epoch) / args.warmup_epochs + 1e-9] * 2
        return [common.cosine((step - warmup) // per_epoch / args.epochs, peak, args.lr_end), peak]

    # The learning rate of DINO changes with every step, for both groups alike.
    if step < warmup:
        return [peak * step / max(warmup - 1, 1)] * 2
    return [common.cosine((step - warmup) / (total - warmup), peak, args.lr_end)] * 2


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    within = args.base == "dino"  # SimSiam's warm-up comes before the epochs
    common.check_run(args, RECIPES, common.VITS, common.RESNETS, VMAMBAS, warmup_within_epochs=within)

    # VMamba cannot be compiled, DDCL needs SimSiam, and small crops must divide into patches.
    if args.compile and args.arch in VMAMBAS:
        common.die(f"--compile: the scan of {args.arch} is unrolled, too long to compile; leave the flag out")
    if args.base == "dino" and args.equi == "ddcl":
        common.die("--equi ddcl: goes with --base simsiam")
    if args.local_crops and args.arch in common.VITS:
        common.check_patches(args, "local_size")

    # SimSiam compares two views by their cosine.
    if args.base == "simsiam" and args.equi == "clever":
        common.die("--equi clever: goes with --base dino")
    if args.base == "simsiam" and args.orth != "cos":
        common.die(f"--orth {args.orth}: is a choice of --base dino; simsiam compares embeddings by their cosine")
    if args.base == "simsiam" and args.local_crops:
        common.die(f"--local-crops {args.local_crops}: simsiam compares two views; leave it out")
    if args.base == "simsiam" and args.momentum != Args.momentum:
        common.die(f"--momentum {args.momentum}: is the teacher's, of --base dino; the SGD of simsiam has 0.9")

    # Without epochs to warm up, the teacher would have its last temperature from the start.
    first, last = args.teacher_temp
    if first != last and not args.teacher_temp_epochs:
        common.die(f"--teacher-temp {first} {last}: needs --teacher-temp-epochs, the epochs from one to the other")


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes

    # The model comes first. The loader then makes every crop with random draws of its own, new in every epoch.
    model = build(args, device)
    train, test = (
        common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers)
        for split in ("train", "test")
    )
    train = train.to(device)
    policies = make_policies(args)
    loader = common.Loader(train, policies, partial(draw_views, args, policies), args, device)

    # SimSiam's warm-up comes before the epochs and adds steps to them.
    warmup = round(args.warmup_epochs * loader.steps_per_epoch) if args.epochs else 0
    extra = warmup if args.base == "simsiam" else 0
    loader.total_steps += extra

    # The run directory is named after base, equivariant part and architecture.
    variant = f"{args.base}-{args.equi}-{args.arch}"
    if args.aug != "basic":
        variant += f"-{args.aug}"

    # Frozen parameters, such as the lengths of the prototypes, are neither optimised nor clipped.
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, args, device)

    # A resumed run continues from its checkpoint; every run prints its settings before it starts.
    run = common.Run(args, variant, model, optimizer)
    run.restore(train)
    chance = f"{math.log(args.head_dim):.2f}" if args.base == "dino" else "0"
    run.introduce(train, loader, args.lr * args.batch_size / 256, f"L_CL {chance}")
    if extra > 0:
        run.say(f"  {args.warmup_epochs:g} epochs of warm-up come before these; the log counts them below 0")
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, *_ in run.steps(loader):
        if step == 0:
            run.picture("views.png", [views[view] for view in sorted(views, key=int)])

        # Learning rates and weight decay follow their schedules.
        epoch, progress = (step - extra) / loader.steps_per_epoch, step / loader.total_steps
        rates = learning_rates(args, step, loader.steps_per_epoch, warmup)
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr
        if args.base == "dino":
            decay = common.cosine(progress, args.weight_decay, args.weight_decay_end)
            optimizer.param_groups[0]["weight_decay"] = decay

        # The momentum of SGD starts anew after SimSiam's warm-up.
        if extra and step == extra:
            optimizer.state.clear()

        # The diagnostics cost time, so only steps that are logged compute them.
        with common.autocast(device, args.amp):
            out, o = ddp(views, epoch, diagnose=not model.diagnosed or common.is_logged(args, step))
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        if args.clip is not None:
            common.clip_each_(parameters, args.clip)

        # The prototypes learn only after the first epochs.
        if epoch < args.freeze_last_epochs:
            for p in model.last_layers():
                p.grad = None

        # The teacher follows the student after every step of the optimiser.
        optimizer.step()
        if args.base == "dino":
            model.update_teacher(common.cosine(progress, args.momentum, 1.0))
        run.log(step, features=o, lr=rates[0], epoch=epoch, **out)

    # An untrained encoder with the same initial weights is the baseline of the final k-NN score.
    run.finish(build(args, device), train, test)


if __name__ == "__main__":
    common.command(main)
