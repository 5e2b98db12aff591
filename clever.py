"""CLeVER: a representation split into an invariant and an equivariant part, under DINO; DDCL, the same under SimSiam.

Paper: "Contrastive Learning Via Equivariant Representation" (Song et al. 2024, arXiv 2406.00262); DDCL:
"Distortion-Disentangled Contrastive Learning" (Wang et al., WACV 2024, arXiv 2303.05066).

Idea. The first 80 % of the representation learn what all views of an image share, as usual. The rest is pushed the
other way: two views of one image should not look alike in it, so it is free to hold what the augmentation did,
however complex that was and without being told. Nothing else keeps the second head from dying, so a penalty ties the
size of its weights to that of the first.

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
    python clever.py --base simsiam --equi ddcl                        # DDCL; --lambda-preg 0: as published before
    python clever.py --equi none                                       # DINO, on the whole representation
    python clever.py --data cifar10 --data-dir CIFAR --aug complex  # rotations; complex_plus: and elastic
    torchrun --nproc_per_node=8 clever.py --data imagenet100 --data-dir IMAGENET --arch resnet50 --compile

Where the paper is silent, or its public code differs, this file takes (sources: [C] the code of CLeVER, [DD] that of
DDCL):
  * equation 11 has a plain dot product of softmaxes, whose optimum is almost reached by uniform ones; [C] has the
    cosine above, with the teacher's sharpened and centred output on one side and a gradient for the student only.
    `--orth dot` is the paper's.
  * [DD] takes the modulus after the mean over the batch, so that images of opposite sign cancel; so does this file. The
    predictor and sg, missing in the paper's equations 2 and 3, are SimSiam's.
  * AdamW with 5e-4 per 256 images [C]; the appendix says SGD with 0.001, which is what that rate is at batch 512.
    SimSiam: SGD, 0.05 per 256, weight decay 1e-4 on everything, the cosine falls from epoch to epoch and leaves the
    predictors alone; before it 30 epochs of warm-up that do not count [DD]. There its data order stands still; here
    it goes on.
  * d_IR is cut down to a whole number (clever) [C] or rounded (ddcl) [DD].
  * the norms count what is trained: biases, and of the prototypes the directions without their frozen lengths. Before
    use these are normalised, as DDCL's layers are by the batch norm behind them, so scale alone can meet the penalty.
    What that buys is that weight decay cannot carry one head off by itself, down to where epsilons swallow its
    output.
  * the teacher has no stochastic depth (that of VMamba has, in [C]) and batch statistics of its own, as in training.
  * rotations are nearest-neighbour, filled with black, before the colours (dino) or after them (simsiam), as in [C]
    and [DD].
  * SimSiam alone starts with residual branches at zero, DDCL does not [DD].
  * positions of small crops are resampled to their grid, without DINO's offset of a tenth of a cell. SGD for DINO,
    stochastic depth in the teacher, a modulus per image in L_Orth, and a penalty on some of the weights only, all
    switches of one code or the other, are not offered.
"""

import copy
import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torchvision.models.resnet import BasicBlock, Bottleneck

import common
from common import (
    Affine,
    ColorJitter,
    Compose,
    Count,
    Elastic,
    GaussianBlur,
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
    Solarize,
    upcast,
)


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
    """basic: the base's own; complex: with rotations by up to 90 degrees; complex_plus: and elastic deformations of
    half the views"""
    inv_ratio: Annotated[float, "(0, 1)"] = 0.8
    """share of the representation that is the invariant part"""
    alpha: NonNegative = 1.0
    """weight of L_CL"""
    beta: NonNegative = 1.0
    """weight of L_Orth"""
    lambda_preg: NonNegative = 0.001
    """lambda, weight of L_PReg; 0 switches it off"""
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
    """small crops of each image beside the two global ones (dino)"""
    local_size: Count = 96
    """their side in pixels"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.4, 1.0)
    """area of the global crops, relative to the image"""
    local_scale: tuple[ShareAbove0, ShareAbove0] = (0.05, 0.4)
    """area of the small ones"""
    blur: bool = True
    """Gaussian blur and solarisation (both are usual on large images only)"""
    temp: Positive = 0.1
    """tau, temperature of the student (dino)"""
    teacher_temp: tuple[Positive, Positive] = (0.04, 0.04)
    """tau_t, temperature of the teacher: first and last value of its linear warm-up, step by step (dino)"""
    teacher_temp_epochs: NonNegative = 0
    """epochs of that warm-up"""
    momentum: Share = 0.996
    """of the teacher (dino) at the start; it rises to 1 along half a cosine"""
    freeze_last_epochs: NonNegative = 1
    """epochs at the start in which the prototypes do not learn (dino)"""
    weight_decay: NonNegative = 0.04
    """at the start: AdamW's on parameters of two or more dimensions (dino), SGD's on all (simsiam)"""
    weight_decay_end: NonNegative = 0.4
    """and at the end of half a cosine (dino)"""
    warmup_epochs: NonNegative = 10
    """linear warm-up, within the --epochs (dino), or before them, epoch by epoch from almost 0 (simsiam); then the
    learning rate falls along half a cosine"""
    lr_end: NonNegative = 1e-6
    """the learning rate at the end"""
    clip: Positive | None = 3.0
    """largest norm of the gradient of each parameter tensor; none: no clipping"""
    drop_path: ShareBelow1 = 0.1
    """stochastic depth of the student (ViT, VMamba)"""


BASES = dict(
    dino=dict(batch_size=512, lr=5e-4),
    simsiam=dict(
        equi="ddcl",
        arch="resnet50",
        batch_size=256,
        lr=0.05,
        head_dim=2048,
        head_dim_equi=2048,
        bottleneck=512,
        local_crops=0,
        crop_scale=(0.2, 1.0),
        weight_decay=1e-4,
        weight_decay_end=1e-4,
        warmup_epochs=30,
        lr_end=0.0,
        clip=None,
        drop_path=0.0,
    ),
)
SMALL = dict(  # what images of 32 px change; ours, as are all recipes but the first two
    dino=dict(
        arch="vit_tiny",
        img_size=32,
        patch_size=4,
        local_size=16,
        local_scale=(0.1, 0.4),
        blur=False,
        drop_path=0.0,
        momentum=0.99,
        freeze_last_epochs=0.0,
        head_dim=1024,
        head_dim_equi=1024,
    ),
    simsiam=dict(arch="resnet18", img_size=32, patch_size=4, blur=False),
)
MINUTES = dict(arch="vit_pico", patch_size=8, epochs=4, batch_size=128, proj_hidden=256)
RECIPES = {  # for each base; epochs of the tables are 500 (Tables 2 to 7), 200 (Table 8), 100 (ImageNet)
    "imagenet100": dict(dino=dict(epochs=200), simsiam=dict(epochs=200)),
    "imagenet": dict(dino=dict(epochs=100), simsiam=dict(epochs=100)),
    "cifar10": {base: values | dict(epochs=200, batch_size=256) for base, values in SMALL.items()},
    "blocks": dict(
        dino=SMALL["dino"]
        | MINUTES
        | dict(
            lr=2e-3, momentum=0.9, warmup_epochs=0.5, local_crops=4
        ),  # in 372 steps a teacher with 0.99 hardly moves
        simsiam=SMALL["simsiam"]
        | MINUTES
        | dict(lr=0.1, warmup_epochs=0, head_dim=256, head_dim_equi=256, bottleneck=64),
    ),
}
RECIPES["cifar100"] = RECIPES["cifar10"]


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
    normalise = Normalize(*common.normalisation(args))
    warps = [Affine(degrees=90, interpolation="nearest"), Elastic(alpha=100)][
        : dict(basic=0, complex=1, complex_plus=2)[args.aug]
    ]
    if args.base == "simsiam":
        blur = [GaussianBlur(p=0.5)] * args.blur
        crop = RandomResizedCrop(args.img_size, args.crop_scale)
        view = Compose(
            [crop, ColorJitter(0.4, 0.4, 0.4, 0.1), Grayscale(0.2), *blur, HorizontalFlip(), *warps, normalise]
        )
        return {"1": view, "2": view}
    crops = [RandomResizedCrop(args.img_size, args.crop_scale, interpolation="bicubic")] * 2
    crops += [RandomResizedCrop(args.local_size, args.local_scale, interpolation="bicubic")] * args.local_crops
    policies = {}
    for i, crop in enumerate(crops, 1):
        photometrics = (
            [GaussianBlur(p={1: 1.0, 2: 0.1}.get(i, 0.5)), *[Solarize(p=0.2)] * (i == 2)] if args.blur else []
        )
        policies[f"{i}"] = Compose(
            [crop, HorizontalFlip(), *warps, ColorJitter(0.4, 0.4, 0.2, 0.1), Grayscale(0.2), *photometrics, normalise]
        )
    return policies


def draw_views(args, policies, generator):
    """{view: (rows of the global batch, what its policy draws for them)}: every crop by itself."""
    return {
        view: (torch.arange(args.batch_size), policy.sample(args.batch_size, generator))
        for view, policy in policies.items()
    }


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


def alike(q, log_p, form):
    """How alike two softmaxes are, 0 to 1, mean over the batch: their cosine, or their dot product. q, log p (b, K)."""
    p = log_p.exp()
    return (F.cosine_similarity(q, p, dim=1) if form == "cos" else (q * p).sum(1)).mean()


def cosines(p1, p2, z1, z2):
    """1/2 (cos(p_1, sg z_2) + cos(p_2, sg z_1)), mean over the global batch: (b, d) on this process each -> a
    number."""
    mean = (F.cosine_similarity(p1, z2.detach(), dim=1) + F.cosine_similarity(p2, z1.detach(), dim=1)).mean() / 2
    return common.all_reduce(mean) / common.world_size()


def size(module):
    """|h|^2: the sum of the squares of all that is trained in it."""
    return sum(p.square().sum() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def diagnostics(name, head, z):
    """Table 1: log10 of |h|^2, and of the squared norm of its output z (b, d), mean over the global batch. The floor
    is float32's."""
    norm = common.all_reduce(z.square().sum(1).mean()) / common.world_size()
    return {f"log_h_{name}": size(head).clamp(min=1e-37).log10(), f"log_z_{name}": norm.clamp(min=1e-37).log10()}


# ----------------------------------------------------------------------------------------------------------------------
# VMamba, in plain torch
# ----------------------------------------------------------------------------------------------------------------------


def selective_scan(u, delta, A, B, C, D):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t,  h_0 = 0, along the last axis.

    u, delta (b, k, d, L); A, D (k, d), A < 0; B, C (b, k, L) -> y (b, k, d, L). In chunks of about sqrt(L): all
    chunks step through their recurrence side by side from 0, then what each inherits from those before it is added.
    Linear in L, and no exponential of a sum can overflow, since every factor is below 1."""
    L = u.shape[3]
    T = math.ceil(math.sqrt(L))  # steps of a chunk
    chunked = lambda v, fill: (
        F.pad(v, (0, -L % T), value=fill).unflatten(3, (-1, T)).unbind(4)
    )  # T times (b, k, d, chunks)
    a, x = chunked(torch.exp(delta * A[..., None]), 1.0), chunked(delta * B[:, :, None] * u, 0.0)
    h, decay = [x[0]], [a[0]]
    for t in range(1, T):
        h.append(a[t] * h[-1] + x[t])
        decay.append(a[t] * decay[-1])
    carry = [torch.zeros_like(h[0][..., 0])]  # the state that each chunk starts from
    for end, kept in zip(h[-1].unbind(3)[:-1], decay[-1].unbind(3)[:-1]):
        carry.append(end + kept * carry[-1])
    h = torch.stack(h, 4) + torch.stack(decay, 4) * torch.stack(carry, 3)[..., None]  # (b, k, d, chunks, T)
    return C[:, :, None] * h.flatten(3)[..., :L] + D[..., None] * u


class SS2D(nn.Module):
    """VMamba's 2-D selective scan with state size 1 and no gate: rows and columns, each forwards and backwards."""

    def __init__(self, dim):
        super().__init__()
        self.rank = rank = math.ceil(dim / 16)
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.x_proj = nn.Parameter(
            torch.empty(4, rank + 2, dim).uniform_(-(dim**-0.5), dim**-0.5)
        )  # to the rank of delta, B and C
        self.dt_proj = nn.Parameter(torch.empty(4, dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.empty(4, dim).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log, self.D = nn.Parameter(torch.zeros(4 * dim, 1)), nn.Parameter(torch.ones(4 * dim))

    def forward(self, x):
        """x (B, H, W, d) -> the same shape."""
        _, H, W, d = x.shape
        x = F.silu(self.conv(self.in_proj(x).permute(0, 3, 1, 2)))  # (B, d, H, W)
        u = cross_scan(x)  # (B, 4, d, L)
        with common.full_precision():
            u = upcast(u)
            delta, B, C = torch.einsum("bkdl,krd->bkrl", u, upcast(self.x_proj)).split([self.rank, 1, 1], dim=2)
            delta = F.softplus(
                torch.einsum("bkrl,kdr->bkdl", delta, upcast(self.dt_proj)) + self.dt_bias[..., None]
            )  # (B, 4, d, L)
            y = selective_scan(u, delta, -torch.exp(self.A_log).view(4, d), B[:, :, 0], C[:, :, 0], self.D.view(4, d))
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
        self.norm1, self.scan, self.norm2, self.drop = (
            nn.LayerNorm(dim),
            SS2D(dim),
            nn.LayerNorm(dim),
            DropPath(drop_path),
        )
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
    """VMamba-Tiny [s1l8] (Liu et al. 2024, arXiv 2401.10166; its public code), in plain torch: four stages of 2, 2,
    8, 2 blocks, 96 to 768 wide, with strides 4, 8, 16, 32; representation: mean of the normalised last map. Images of
    any size."""

    def __init__(self, arch="vmamba_tiny", img_size=224, drop_path=0.2):
        super().__init__()
        width, depths = VMAMBAS[arch]
        self.dim = 8 * width
        rates = iter(np.linspace(0, drop_path, sum(depths)).tolist())
        self.stem = nn.Sequential(ChannelsLast(3, width // 2), nn.GELU(), ChannelsLast(width // 2, width))
        self.stages = nn.ModuleList()
        for i, n in enumerate(depths):
            blocks = [VMambaBlock(width * 2**i, next(rates)) for _ in range(n)]
            self.stages.append(nn.Sequential(*([ChannelsLast(width * 2**i // 2, width * 2**i)] if i else []), *blocks))
        self.norm = nn.LayerNorm(self.dim)
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
# Bases: an encoder, one or two heads, and `losses`
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
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(args.bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last.parametrizations.weight.original0)  # the lengths g
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, z):  # (b, d) -> (b, K)
        return self.last(F.normalize(self.mlp(z), dim=1))


class DINO(nn.Module):
    """Student, teacher, a head for each part and a centre for each head. The teacher is what is evaluated."""

    evaluated, compiled = "teacher.backbone", ()

    def __init__(self, backbone, args, inv):
        super().__init__()
        if hasattr(backbone, "cls_token"):
            nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # DINO's; timm's 1e-6 stays with SimSiam
        self.args, self.inv, self.backbone = args, inv, backbone
        self.heads = nn.ModuleDict(dict(inv=DINOHead(inv, args, args.head_dim)))
        if args.equi != "none":
            self.heads["equi"] = DINOHead(backbone.dim - inv, args, args.head_dim_equi)
        self.teacher = copy.deepcopy(nn.ModuleDict(dict(backbone=backbone, heads=self.heads))).requires_grad_(False)
        for m in self.teacher.modules():
            if isinstance(m, DropPath):
                m.drop_prob = 0.0
        for name in self.heads:
            self.register_buffer(f"centre_{name}", torch.zeros(args.head_dim if name == "inv" else args.head_dim_equi))

    def last_layers(self):
        return [p for head in self.heads.values() for p in head.last.parameters()]

    def compile_encoder(self):
        self.compiled = tuple(torch.compile(m, dynamic=False) for m in (self.backbone, self.teacher["backbone"]))

    def forward(self, views, epoch=0.0):
        """All of a step's mathematics: views {"1", "2", ...} (b, 3, H, W) -> ({"loss", "L_CL", ...}, representation
        of view 1 (b, D)). Moves the centres."""
        args, b = self.args, len(views["1"])
        student, teacher = self.compiled or (self.backbone, self.teacher["backbone"])
        first, last = args.teacher_temp
        teacher_temp = (
            last if epoch >= args.teacher_temp_epochs else first + (last - first) * epoch / args.teacher_temp_epochs
        )
        both = torch.cat([views["1"], views["2"]])
        with torch.no_grad():
            t = teacher(both)  # (2 b, D)
        o = [student(both)]  # all crops of one size in one pass
        if args.local_crops:
            o.append(student(torch.cat([views[f"{v}"] for v in range(3, 3 + args.local_crops)])))
        o, out = torch.cat(o), {}  # (crops b, D)
        for name, head in self.heads.items():
            part = slice(None, self.inv) if name == "inv" else slice(self.inv, None)
            s = upcast(head(o[:, part]))  # (crops b, K)
            with torch.no_grad():
                outputs = upcast(self.teacher["heads"][name](t[:, part]))  # (2 b, K)
            with common.full_precision():
                centre = getattr(self, f"centre_{name}")
                q = F.softmax((outputs - centre) / teacher_temp, dim=1).split(b)
                log_p = F.log_softmax(s / args.temp, dim=1).split(b)
                if name == "inv":
                    out["L_CL"] = over_pairs(cross_entropy, q, log_p)
                else:
                    out["L_Orth"] = over_pairs(partial(alike, form=args.orth), q, log_p)
                setattr(
                    self,
                    f"centre_{name}",
                    0.9 * centre + 0.1 * common.all_reduce(outputs.mean(0)) / common.world_size(),
                )
                out |= diagnostics(name, head, s.detach())
        loss = args.alpha * out["L_CL"]
        if "equi" in self.heads:
            out["L_PReg"] = (size(self.heads["equi"]) - size(self.heads["inv"])).abs()
            loss = loss + args.beta * out["L_Orth"] + args.lambda_preg * out["L_PReg"]
        return dict(loss=loss) | out, o[:b]

    @torch.no_grad()
    def update_teacher(self, m):
        """teacher <- m teacher + (1 - m) student, encoder and heads."""
        common.ema_update(self.teacher["backbone"], self.backbone, m)
        common.ema_update(self.teacher["heads"], self.heads, m)


class SimSiam(nn.Module):
    """One encoder; projector and predictor for each part."""

    evaluated, compiled = "backbone", ()

    def __init__(self, backbone, args, inv):
        super().__init__()
        self.args, self.inv, self.backbone = args, inv, backbone
        self.projectors, self.predictors = nn.ModuleDict(), nn.ModuleDict()
        hidden = lambda a, b: (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True))
        h, parts = args.proj_hidden, dict(inv=(inv, args.head_dim), equi=(backbone.dim - inv, args.head_dim_equi))
        for name in ("inv",) if args.equi == "none" else ("inv", "equi"):
            dim, d = parts[name]
            self.projectors[name] = nn.Sequential(
                *hidden(dim, h), *hidden(h, h), nn.Linear(h, d), nn.BatchNorm1d(d, affine=False)
            )
            self.predictors[name] = nn.Sequential(*hidden(d, args.bottleneck), nn.Linear(args.bottleneck, d))
        if args.equi == "none":  # plain SimSiam
            self.projectors["inv"][-2].bias.requires_grad_(False)
            for m in backbone.modules():
                if isinstance(m, (BasicBlock, Bottleneck)):
                    nn.init.zeros_((m.bn2 if isinstance(m, BasicBlock) else m.bn3).weight)

    def last_layers(self):
        return []

    def compile_encoder(self):
        self.compiled = (torch.compile(self.backbone, dynamic=False),)

    def forward(self, views, epoch=0.0):
        """All of a step's mathematics: views {"1", "2"} (b, 3, H, W) -> ({"loss", "L_CL", ...}, representation of
        view 1 (b, D))."""
        args, out = self.args, {}
        (student,) = self.compiled or (self.backbone,)
        o1, o2 = (student(views[v]) for v in "12")  # (b, D) each
        for name, projector in self.projectors.items():
            part = slice(None, self.inv) if name == "inv" else slice(self.inv, None)
            z1, z2 = projector(o1[:, part]), projector(o2[:, part])  # (b, d) each
            p1, p2 = self.predictors[name](z1), self.predictors[name](z2)  # (b, d) each
            with common.full_precision():
                cos = cosines(*map(upcast, (p1, p2, z1, z2)))
                out |= {"L_CL": -cos} if name == "inv" else {"L_Orth": cos.abs()}
                out |= diagnostics(name, projector, upcast(z1).detach())
        loss = args.alpha * out["L_CL"]
        if "equi" in self.projectors:
            out["L_PReg"] = (
                sum((size(h["equi"]) - size(h["inv"])).abs() for h in (self.projectors, self.predictors)) / 2
            )
            loss = loss + args.beta * out["L_Orth"] + args.lambda_preg * out["L_PReg"]
        return dict(loss=loss) | out, o1


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(args, device):
    """The model with its initial weights: seeded, the same on every process."""
    common.seed_everything(args.seed, "weights")
    mean, std = common.normalisation(args)
    if args.arch in common.VITS:
        kwargs = dict(patch_size=args.patch_size, cls_layer=0, pos="learned", drop_path=args.drop_path)
    elif args.arch in common.RESNETS:
        kwargs = dict(stem="cifar" if args.img_size < 64 else "imagenet")
    else:
        kwargs = dict(drop_path=args.drop_path)
    backbone = common.make_backbone(args.arch, mean, std, args.img_size, **kwargs)
    inv = dict(clever=math.floor, ddcl=round, none=lambda _: backbone.dim)[args.equi](backbone.dim * args.inv_ratio)
    if args.equi != "none":
        if not 0 < inv < backbone.dim:
            common.die(
                f"--inv-ratio {args.inv_ratio}: gives {inv} of {backbone.dim} dimensions to the invariant part; "
                "both parts need some"
            )
        backbone.inv = backbone.description["inv"] = inv  # only now is the width known that it is a share of
    model = dict(dino=DINO, simsiam=SimSiam)[args.base](backbone, args, inv)
    return common.batchnorm_over_ranks(model, device).to(device, memory_format=torch.channels_last)


def make_optimizer(model, args, device):
    """DINO: AdamW, weight decay in group 0, none on biases and vectors. SimSiam: SGD, the predictors in group 1."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if args.base == "dino":
        plain = lambda n, p: n.endswith(".bias") or p.ndim == 1
        groups = [
            dict(params=[p for n, p in named if not plain(n, p)]),
            dict(params=[p for n, p in named if plain(n, p)], weight_decay=0.0),
        ]
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay, fused=device.type == "cuda")
    groups = [dict(params=[p for n, p in named if n.startswith("predictors") == last]) for last in (False, True)]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay, fused=device.type == "cuda")


def learning_rates(args, step, per_epoch, warmup):
    """Learning rates of the two groups at a step, of which `warmup` warm up. dino: linear from 0 to the peak, both
    ends included, then half a cosine to --lr-end, step by step. simsiam: epoch by epoch, after the warm-up; the
    predictors stay at the peak."""
    peak, total = args.lr * args.batch_size / 256, args.epochs * per_epoch
    if args.base == "simsiam":
        if step < warmup:
            return [peak * (step // per_epoch) / args.warmup_epochs + 1e-9] * 2
        return [common.cosine((step - warmup) // per_epoch / args.epochs, peak, args.lr_end), peak]
    if step < warmup:
        return [peak * step / max(warmup - 1, 1)] * 2
    return [common.cosine((step - warmup) / (total - warmup), peak, args.lr_end)] * 2


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    within = args.base == "dino"  # SimSiam's warm-up comes before the epochs
    common.check_run(args, RECIPES, common.VITS, common.RESNETS, VMAMBAS, warmup_within_epochs=within)
    if args.equi not in dict(dino=("clever", "none"), simsiam=("ddcl", "none"))[args.base]:
        common.die(f"--equi {args.equi}: goes with --base {'dino' if args.equi == 'clever' else 'simsiam'}")
    for name in ("crop_scale", "local_scale"):
        if getattr(args, name)[0] > getattr(args, name)[1]:
            common.die(
                f"--{name.replace('_', '-')} {' '.join(map(str, getattr(args, name)))}: the lower end comes first"
            )
    if args.base == "dino" and args.epochs and args.warmup_epochs >= args.epochs:
        common.die(f"--warmup-epochs {args.warmup_epochs}: must be below --epochs {args.epochs}")
    if args.base == "simsiam" and args.orth != "cos":
        common.die(f"--orth {args.orth}: is a choice of --base dino; simsiam compares embeddings by their cosine")
    if args.base == "simsiam" and args.local_crops:
        common.die(f"--local-crops {args.local_crops}: simsiam compares two views; leave it out")
    if args.local_crops and args.arch in common.VITS and args.local_size % args.patch_size:
        common.die(f"--local-size {args.local_size}: not divisible by --patch-size {args.patch_size}")


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
    warmup = round(args.warmup_epochs * loader.steps_per_epoch) if args.epochs else 0
    extra = warmup if args.base == "simsiam" else 0  # steps before the epochs
    loader.total_steps += extra
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, args, device)
    run = common.Run(
        args, "-".join([args.base, args.equi, args.arch] + [args.aug] * (args.aug != "basic")), model, optimizer
    )
    run.restore(train)
    chance = f"L_CL {math.log(args.head_dim):.2f}" if args.base == "dino" else "L_CL 0"
    run.introduce(train, loader, args.lr * args.batch_size / 256, chance)
    run.say(
        *[f"  {args.warmup_epochs:g} epochs of warm-up come before these; the log counts them below 0"] * (extra > 0)
    )
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, *_ in run.steps(loader):
        epoch = (step - extra) / loader.steps_per_epoch
        rates = learning_rates(args, step, loader.steps_per_epoch, warmup)
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr
        if args.base == "dino":
            optimizer.param_groups[0]["weight_decay"] = common.cosine(
                step / loader.total_steps, args.weight_decay, args.weight_decay_end
            )
        if extra and step == extra:
            optimizer.state.clear()  # the warm-up has a momentum of its own
        if step == 0:
            run.picture("views.png", [views[v] for v in sorted(views, key=int)])
        with common.autocast(device, args.amp):
            out, y = ddp(views, epoch)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        if args.clip is not None:
            common.clip_each_(parameters, args.clip)
        if epoch < args.freeze_last_epochs:
            for p in model.last_layers():
                p.grad = None
        optimizer.step()
        if args.base == "dino":
            model.update_teacher(common.cosine(step / loader.total_steps, args.momentum, 1.0))
        run.log(step, features=y, lr=rates[0], epoch=epoch, **out)

    run.finish(build(args, device), train, test)


if __name__ == "__main__":
    common.command(main)
