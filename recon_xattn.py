"""RECON: equivariant representations by reconstructing one view from the other through cross-attention; its
baselines SIE, VICReg and supervised.

Paper: "Equivariant Representation Learning for Augmentation-based Self-Supervised Learning via Image Reconstruction"
(Wang, Krajsek, Scharr 2024, arXiv 2412.03314).

Idea. VICReg makes half of the representation invariant. From the other half a decoder must draw the second view with
the patches of the first: the query comes from view 2, key and value from view 1. For that the encoder has to keep what
the transformation between the views did. Nobody has to know its parameters.

    tokens t = neck(f(x))  (N, 512) of N patches;  representation y = mean over tokens = [y_inv, y_equi], 256 + 256
    Z_inv = g_inv(y_inv)  (192,)                   Z_equi = g_equi(t[:, 256:])  (N, 192)
    Y = softmax(W_q Z_equi(v2) (W_k Z_equi(v1))^T / sqrt(e)) W_v Z_equi(v1), then 5 self-attention blocks, then pixels
        in heads of e channels: 64, and 96 in the run without arguments
    L = lambda_ssl VICReg(Z_inv(v1), Z_inv(v2)) + lambda_recon mean (v2_hat - v2)^2
    VICReg = 10 mse(Z, Z') + 10 (v(Z) + v(Z')) / 2 + c(Z) + c(Z')
    v(Z) = mean_j max(0, 1 - sqrt(Var_j + 1e-4)),   c(Z) = sum_{i != j} C_ij^2 / d,   C = Cov(Z)

SIE ("Self-supervised learning of Split Invariant Equivariant representations", arXiv 2302.10283) knows the parameters
z of the transformation between the views. A hypernetwork M(z) maps one view's equivariant embedding to the other's:

    L = 10 mse(inv, inv') + 4.5 mse(M(z) equi, equi') + 10 (v(x) + v(x')) / 2 + 10 v(M(z) equi) / 2 + c(x) + c(x')
        x = [inv, equi]

VICReg makes all of y invariant. The supervised encoder learns labels from both views. All four have the same encoder.
In the code the views v1 and v2 are "1" and "2", t1 and t2 their tokens, y1 and y2 their representations.

Usage
    python recon_xattn.py  # rendered objects, two views of each, CPU, minutes
    python recon_xattn.py --objective sie --sie-params rotation color  # parameters known
    python recon_xattn.py --data imagefolder --data-dir DIR --recipe cifar10
    torchrun --nproc_per_node=8 recon_xattn.py --data 3diebench --data-dir 3DIEBENCH --compile

Views. Objects in several poses (blocks, 3diebench): the views are two renderings of one object, as they are. z holds
the quaternion q1^-1 q2 (rotation) or 1, then the differences of floor and light hue (color). Images: view 1 is a random
crop, view 2 = T(view 1): crop, flip, rotation and shift in one warp, colour, blur. z holds 1, then the parameters, of a
rotation (sin, cos - 1). The leading 1 lets a hypernetwork without bias represent the identity.

Where the paper is silent this file takes (source in brackets; [F] is the same authors' follow-up at AAAI 2026, "SSL
Based on Transformed Image Reconstruction for Equivariance-Coherent Feature Representation", arXiv 2503.18753):
  * Tokens are patches [F]. The encoder is ViT-S/16 with learned positions and a linear neck to 512 [F]. There is no
    [CLS]: reconstruction reaches patches only, so the mean of the tokens is what both losses shape and what is
    evaluated.
  * The cross-attention block has no residual from the query, or view 2, its own target, would pass through. Fixed
    sin-cos positions are added behind it. View 2 can say where to look: a bottleneck, not a barrier. Attention has
    heads, the scale, normalised inputs and a linear map of its output, as is usual in a ViT.
  * g_inv is an MLP of three layers with batch norm, like VICReg's expander; g_equi is linear.
  * lambda_ssl = lambda_recon = 1 [F]; VICReg's weights 10, 10, 1 [SIE's repository]; variance and covariance on Z_inv
    only. As a baseline VICReg has an expander of three layers 2048 wide [SIE's repository].
  * The target is the normalised view 2, all pixels.
  * Adam with weight decay 1e-6 and a "linearly scaled" lr of 1e-4 [paper], read as per 256 images [F]; 10 epochs of
    warm-up; half a cosine to 0 [F].
  * Ranges of the transformations: 45 degrees, factors 0.6 to 1.4, hue 0.1, sigma 0.1 to 2, shifts of 10 px at 224 px
    [F] and of 4 px below 64 px, crops of 20 to 100 %; colour in fixed order. CIFAR has all six families too, although
    the paper's Tables 3 and 4 list four.
  * Unknown parameters (Table 3): with `--known-fraction` SIE and the supervised encoder train on that share of every
    class only. RECON and VICReg need to know nothing and see all.
  * All four share encoder, views and optimiser [paper: "all experiments adhere"]; VICReg too is trained here, where
    Table 2 finetunes "a pretrained model". SIE's and VICReg's own recipes (ResNet-18, constant rate; LARS) are not
    offered. Warps fill with zeros, and the black borders show something of the parameters.
"""

import dataclasses
import math
from functools import partial
from typing import Annotated, Literal

import common
from common import FAMILIES, Count, NonNegative, Plural, ShareAbove0, upcast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Block


@dataclasses.dataclass
class Args(common.RunArgs):
    """What reconstruction and its baselines need, beside the arguments that all scripts share."""

    objective: Literal["recon", "sie", "vicreg", "supervised"] = "recon"
    """what trains the encoder"""
    neck: Plural = 512
    """width of the representation; its first half is the invariant one"""
    embed_dim: Annotated[int, "[4, inf)"] = 192
    """width of the decoder and of Z_inv (recon)"""
    decoder_depth: Count = 6
    """blocks of the decoder; the first is the cross-attention"""
    proj_hidden: Count = 1024
    """width of g_inv (recon), of each of the two projectors (sie); half that of the expander (vicreg)"""
    ssl_weight: NonNegative = 1.0
    """lambda_ssl, weight of VICReg's loss (recon)"""
    recon_weight: NonNegative = 1.0
    """lambda_recon, weight of the reconstruction"""
    sim_weight: NonNegative = 10.0
    """weight of the distance between views"""
    var_weight: NonNegative = 10.0
    """weight of the variance terms"""
    cov_weight: NonNegative = 1.0
    """weight of the covariance terms"""
    equi_factor: NonNegative = 0.45
    """weight of SIE's prediction, relative to --sim-weight"""
    sie_params: tuple[Literal["rotation", "color", "blur", "translation", "crop", "flip", "all"], ...] = ("all",)
    """which transformations lie between the views of sie, and are known; posed objects
    always differ in rotation and color (hues), and this says which of the two are known"""
    sie_single: bool = False
    """only one of these transformations at a time, at random for each image"""
    known_fraction: ShareAbove0 = 1.0
    """share of each class whose parameters (sie) or labels (supervised) are known; these two see no other images"""
    weight_decay: NonNegative = 1e-6
    """weight decay of Adam, as an L2 penalty"""
    warmup_epochs: NonNegative = 10
    """epochs of linear warm-up; then the learning rate falls along half a cosine"""
    crop_scale: tuple[ShareAbove0, ShareAbove0] = (0.2, 1.0)
    """range of the area of view 1, relative to the image; posed objects are not cropped"""


# fmt: off
PAPER = dict(epochs=800, lr=1e-4)  # ViT-S/16, batch 2048: peak lr 8e-4
RECIPES = {
    "imagenet": PAPER,
    "imagenet100": PAPER,  # not in the paper
    "3diebench": PAPER | dict(img_size=256),
    "cifar10": PAPER | dict(img_size=32, patch_size=4),
    "cifar100": PAPER | dict(img_size=32, patch_size=4),  # not in the paper
    # Ours.
    "blocks": dict(arch="vit_pico", img_size=32, patch_size=8, epochs=60, batch_size=128, lr=2e-3, warmup_epochs=3,
                   embed_dim=96, decoder_depth=3, proj_hidden=256),
}
# fmt: on


def values_in_force(first):
    """The recipe that a first look at the command line asks for, as defaults for the second."""
    name = first.recipe or first.data
    return dict(recipe=name) | RECIPES.get(name, {})


# ----------------------------------------------------------------------------------------------------------------------
# Views, and what happened between them
# ----------------------------------------------------------------------------------------------------------------------

# fmt: off
# Of each family of transformations: its parameters, and how many numbers of z describe it.
KEYS = dict(
    rotation=("angle",),
    color=("brightness", "contrast", "saturation", "hue"),
    blur=("sigma",),
    translation=("shift_y", "shift_x"),
    crop=("recrop_top", "recrop_left", "recrop_height", "recrop_width"),
    flip=("flip",),
)
WIDTH = dict(rotation=2, color=4, blur=1, translation=2, crop=4, flip=1)

# The value of each parameter where nothing happens.
IDENTITY = dict(recrop_top=0.0, recrop_left=0.0, recrop_height=1.0, recrop_width=1.0, flip=False, angle=0.0,
                shift_y=0.0, shift_x=0.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, sigma=0.0)
# fmt: on


class Recrop:
    """A random crop of a view that is a crop already; parameters `recrop_top`, ..., in fractions of the view."""

    def __init__(self, size):
        self.crop = common.family("crop", size)

    def sample(self, n, generator=None):
        """{"recrop_top", "recrop_left", "recrop_height", "recrop_width": (n,)}."""
        box = self.crop.sample(n, generator)
        self.crop.place(box, torch.full((n, 2), self.crop.size))
        return {f"recrop_{key}": value for key, value in box.items()}

    def __call__(self, x, params):
        """x (n, 3, S, S) in whole levels of 1 / 255 -> the same."""
        box = {key.removeprefix("recrop_"): value for key, value in params.items() if key.startswith("recrop_")}
        return self.crop((x * 255).round().to(torch.uint8), box).float().div_(255)


class Warp(common.Affine):
    """Rotation and translation at once."""

    def __init__(self, size):
        super().__init__(common.family("rotation", size).degrees, common.family("translation", size).translate)


def make_policies(args, posed):
    """{view: Compose}. Renderings of posed objects stay as they are. Of images "1" is a crop, and "2" is view 1 after
    all families of transformations."""
    size, normalise = args.img_size, common.Normalize(*common.normalisation(args))
    if posed:
        return {view: common.Compose([common.CenterCrop(size, resize=size), normalise]) for view in ("1", "2")}

    # Both views begin with the same crop. The workers of a folder of images cut it twice, because decoding costs more.
    crop, family = common.RandomResizedCrop(size, args.crop_scale), partial(common.family, size=size)
    T = [Recrop(size), family("flip"), Warp(size), family("color"), family("blur")]
    return {"1": common.Compose([crop, normalise]), "2": common.Compose([crop, *T, normalise])}


def draw_views(args, policies, families, generator):
    """{view: (rows of the global batch, their params)}. All `families` transform an image, or with --sie-single one of
    them; the others stay at the identity. Of posed objects there are no families."""
    n = args.batch_size
    rows = torch.arange(n)
    params = {view: policy.sample(n, generator) for view, policy in policies.items()}

    # Renderings of posed objects keep the parameters of their policies.
    if not families:
        return {view: (rows, params[view]) for view in params}

    # View 2 transforms the crop that view 1 shows, so that only the transformations differ.
    params["2"] |= {key: params["1"][key] for key in common.BOX}

    # Families that do not transform an image get the parameters of the identity.
    chosen = torch.randint(len(families), (n,), generator=generator)
    for name in FAMILIES:
        happens = torch.full((n,), name in families)
        if args.sie_single and name in families:
            happens = chosen == families.index(name)
        for key in KEYS[name]:
            value = params["2"][key]
            params["2"][key] = torch.where(happens, value, torch.tensor(IDENTITY[key], dtype=value.dtype))
    return {view: (rows, params[view]) for view in params}


def latent(families, params, size):
    """z of images: params of view 2 -> (n, K): 1, then each family's numbers, a rotation by phi as (sin phi, cos phi
    - 1)."""
    columns = [torch.ones(len(params["angle"]), 1)]

    # A rotation enters as sine and cosine minus 1, which are both 0 where nothing turns.
    for name in families:
        if name == "rotation":
            phi = params["angle"].deg2rad()[:, None]
            columns.append(torch.cat([phi.sin(), phi.cos() - 1], 1))
        else:
            p = {key.removeprefix("recrop_"): params[key] for key in KEYS[name]}
            columns.append(common.family_target(name, p, size))
    return torch.cat(columns, 1)


def pose_latent(families, factors, i, j):
    """z of posed objects, rows (n,) of their two images -> (n, K): the relative quaternion, or 1; then the differences
    of the hues."""
    columns = [torch.ones(len(i), 1)]
    if "rotation" in families:
        columns = [common.pose_target("pose", factors, i, j)]
    if "color" in families:
        columns.append(common.pose_target("hues", factors, i, j))
    return torch.cat(columns, 1)


def latent_width(families, posed):
    """K, the number of columns of z."""
    if posed:
        return (4 if "rotation" in families else 1) + (2 if "color" in families else 0)
    return 1 + sum(WIDTH[name] for name in families)


class ObjectPairs:
    """Posed objects, for the loader: an epoch visits every object once, in two of its images, a random one and
    another."""

    def __init__(self, groups):
        self.by_object = torch.argsort(groups, stable=True)  # (N,)
        self.count = groups.unique(return_counts=True)[1]  # (objects,)
        single = int((self.count < 2).sum())
        if single:
            common.die(f"--data-dir: {single} objects have a single image, and pairs need two of each")

    def __len__(self):
        return len(self.count)

    def __call__(self, objects, epoch, generator):
        """Objects (B,) -> {view: rows (B,)}."""
        u = torch.rand(len(objects), 2, generator=generator)
        count, first = self.count[objects], (self.count.cumsum(0) - self.count)[objects]  # (B,) each

        # The second image comes 1 to count - 1 places after the first, in a circle, so the two always differ.
        i = (u[:, 0] * count).long()
        j = (i + 1 + (u[:, 1] * (count - 1)).long()) % count
        return {"1": self.by_object[first + i], "2": self.by_object[first + j]}


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def variance(z):
    """v(Z): z (n, d), all of the global batch -> mean over dimensions of max(0, 1 - standard deviation)."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance(z):
    """c(Z): z (n, d), all of the global batch -> sum of the squared off-diagonal covariances, over d."""
    z = z - z.mean(0)
    C = z.T @ z / (len(z) - 1)  # (d, d)
    return (C.square().sum() - C.diagonal().square().sum()) / z.shape[1]


def vicreg(z1, z2, args):
    """Embeddings of both views on this process, (b, d) each -> {"L_sim", "L_var", "L_cov"}, unweighted, and their
    weighted sum "L_ssl". Variance and covariance are over the global batch."""
    all1, all2 = common.gather(z1), common.gather(z2)  # (B, d)
    L_sim = F.mse_loss(z1, z2)
    L_var = (variance(all1) + variance(all2)) / 2
    L_cov = covariance(all1) + covariance(all2)
    L_ssl = args.sim_weight * L_sim + args.var_weight * L_var + args.cov_weight * L_cov
    return dict(L_sim=L_sim, L_var=L_var, L_cov=L_cov, L_ssl=L_ssl)


def split_loss(inv1, inv2, equi1, equi2, predicted, args):
    """SIE: embeddings of both views and M(z) equi1, (b, d) each on this process -> the terms and their weighted sum
    "loss"."""
    # SIE keeps views alike in one part, and predicts the other part of view 2 from that of view 1.
    x1, x2 = common.gather(torch.cat([inv1, equi1], 1)), common.gather(torch.cat([inv2, equi2], 1))  # (B, 2 d)
    L_sim = F.mse_loss(inv1, inv2)
    L_equi = F.mse_loss(predicted, equi2)

    # Variance and covariance of the global batch keep both parts, and the prediction, from collapsing.
    L_var = (variance(x1) + variance(x2)) / 2
    L_var_predicted = variance(common.gather(predicted)) / 2
    L_cov = covariance(x1) + covariance(x2)

    loss = args.sim_weight * (L_sim + args.equi_factor * L_equi) + args.cov_weight * L_cov
    loss = loss + args.var_weight * (L_var + L_var_predicted)
    return dict(L_sim=L_sim, L_equi=L_equi, L_var=L_var, L_var_predicted=L_var_predicted, L_cov=L_cov, loss=loss)


# ----------------------------------------------------------------------------------------------------------------------
# The encoder, and the objectives: each maps the tokens of both views to a loss
# ----------------------------------------------------------------------------------------------------------------------


class NeckViT(common.ViT):
    """A ViT without [CLS] and with a linear neck on every normalised patch token. The representation is the mean of the
    tokens; its first half is meant to be invariant, its second equivariant."""

    feature = "mean of the tokens"

    def __init__(self, neck=512, **kwargs):
        super().__init__(cls_layer=None, **kwargs)
        self.neck, self.dim, self.inv = nn.Linear(self.embed_dim, neck), neck, neck // 2

    def timm_arguments(self):
        return "timm has no ViT with a neck"

    def patches(self, x):
        """x (B, 3, H, W) -> tokens (B, h w, neck)."""
        return upcast(self.neck(self.run_blocks(x)[0]))

    def trace(self, x, taps=()):
        """x (B, 3, H, W) -> the representation (B, neck), and the tokens after the blocks in `taps`."""
        z, tapped = self.run_blocks(x, taps)
        return upcast(self.neck(z)).mean(1), tapped

    def last_blocks(self, x, n=1):
        """The representation: there is no [CLS] to take from other blocks."""
        return self(x)


common.BACKBONES["neck"] = NeckViT


def expander(*dims):
    """VICReg's: Linear-BN-ReLU from each width to the next, the last one Linear without bias."""
    layers = []
    for a, b in zip(dims[:-2], dims[1:]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(*dims[-2:], bias=False))


def num_heads(dim):
    """As many attention heads as 64 dimensions fit into `dim`, at least one."""
    return max(1, dim // 64)


class CrossBlock(nn.Module):
    """Cross-attention and an MLP. The query's tokens are not added to the result, which starts from positions alone."""

    def __init__(self, dim, positions):
        super().__init__()
        self.num_heads = num_heads(dim)
        self.norm_q, self.norm_kv, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.register_buffer("positions", positions, persistent=False)  # (1, N, dim)

    def forward(self, z2, z1):
        """Query from z2, key and value from z1, (B, N, dim) each -> (B, N, dim)."""
        q = self.q(self.norm_q(z2))
        k, v = self.kv(self.norm_kv(z1)).chunk(2, dim=2)
        heads = (self.num_heads, -1)
        q, k, v = (x.unflatten(2, heads).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, dim / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, dim)

        # Positions replace the residual from the query, through which view 2 would reach the decoder.
        h = self.positions + self.out(h)
        return h + self.mlp(self.norm(h))


class Objective(nn.Module):
    """What the four objectives share: the encoder, and a step. Each adds its heads, and `terms` that maps the tokens t1
    and t2 of both views, (B, N, 512), to {"loss", ...}."""

    evaluated = "backbone"
    compiled = None

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def compile_encoder(self):
        self.compiled = torch.compile(self.backbone.patches, dynamic=False)

    def forward(self, views, z=None, labels=None):
        """All of a step's mathematics: views {"1", "2"} (B, 3, H, W), z (B, K) for sie, labels (B,) -> ({"loss",
        ...}, y of view 1)."""
        encode = self.backbone.patches if self.compiled is None else self.compiled
        t1, t2 = encode(views["1"]), encode(views["2"])  # (B, N, 512)
        return self.terms(t1, t2, x2=views["2"], z=z, labels=labels), t1.mean(1)


class Recon(Objective):
    """g_inv, g_equi and the decoder."""

    def __init__(self, backbone, args, _):
        super().__init__(backbone)
        self.args, d = args, args.embed_dim
        self.half, self.patch = args.neck // 2, args.patch_size

        # The invariant half has an expander, the equivariant half a linear map of each token.
        self.g_inv = expander(self.half, args.proj_hidden, args.proj_hidden, d)
        self.g_equi = nn.Linear(args.neck - self.half, d)

        # The decoder is one block of cross-attention, blocks of self-attention, and a linear map to pixels.
        self.cross = CrossBlock(d, common.sincos_positions(backbone.grid, backbone.grid, d))
        blocks = [Block(d, num_heads(d), qkv_bias=True) for _ in range(args.decoder_depth - 1)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(d))
        self.pixels = nn.Linear(d, 3 * self.patch**2)

    def decode(self, t1, t2):
        """Tokens of both views (B, N, 512) -> view 2 as the decoder draws it (B, 3, H, W)."""
        e1, e2 = self.g_equi(t1[..., self.half :]), self.g_equi(t2[..., self.half :])  # (B, N, d)
        return unpatchify(self.pixels(self.blocks(self.cross(e2, e1))), self.patch)

    def terms(self, t1, t2, x2, **_):
        """L = lambda_ssl VICReg(Z_inv(v1), Z_inv(v2)) + lambda_recon mean (v2_hat - v2)^2."""
        # The decoder reconstructs all pixels of the normalised view 2.
        x2_hat = self.decode(t1, t2)  # (B, 3, H, W)
        self.drawn = x2_hat[:8].detach()  # for the picture
        L_recon = F.mse_loss(upcast(x2_hat), x2)

        # VICReg acts on the invariant half of the mean token alone.
        y1_inv, y2_inv = t1.mean(1)[:, : self.half], t2.mean(1)[:, : self.half]  # (B, 256)
        z1, z2 = upcast(self.g_inv(y1_inv)), upcast(self.g_inv(y2_inv))  # (B, d)
        with common.full_precision():
            out = vicreg(z1, z2, self.args)
        return out | dict(L_recon=L_recon, loss=self.args.ssl_weight * out["L_ssl"] + self.args.recon_weight * L_recon)


def unpatchify(t, p):
    """Patches (B, N, 3 p p), row by row, each channel by channel -> square images (B, 3, H, W)."""
    side = math.isqrt(t.shape[1])
    return t.view(-1, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(len(t), 3, side * p, side * p)


class SIE(Objective):
    """Two projectors and the hypernetwork: M(z) = sum_k z_k W_k."""

    def __init__(self, backbone, args, latents):
        super().__init__(backbone)
        self.args, self.half, d = args, args.neck // 2, args.proj_hidden

        # Each half has a projector; W holds one matrix for each number of z.
        self.inv, self.equi = expander(self.half, d, d, d), expander(args.neck - self.half, d, d, d)
        self.W = nn.Linear(latents, d * d, bias=False)  # weight (d_out d_in, K)

    def predict(self, equi, z):
        """M(z) equi: (B, d), (B, K) -> (B, d), without making M(z)."""
        d = equi.shape[1]
        return torch.einsum("bi,oik,bk->bo", equi, self.W.weight.view(d, d, -1), z)

    def terms(self, t1, t2, z, **_):
        y1, y2 = t1.mean(1), t2.mean(1)  # (B, 512)
        inv1, inv2 = upcast(self.inv(y1[:, : self.half])), upcast(self.inv(y2[:, : self.half]))  # (B, d)
        equi1, equi2 = upcast(self.equi(y1[:, self.half :])), upcast(self.equi(y2[:, self.half :]))  # (B, d)

        # The hypernetwork maps the equivariant embedding of view 1 to that of view 2.
        z = common.send(z, equi1.device).to(equi1.dtype)  # (B, K)
        with common.full_precision():
            return split_loss(inv1, inv2, equi1, equi2, self.predict(equi1, z), self.args)


class VICReg(Objective):
    """The expander on the whole representation."""

    def __init__(self, backbone, args, _):
        super().__init__(backbone)
        self.args, d = args, 2 * args.proj_hidden
        self.expander = expander(args.neck, d, d, d)

    def terms(self, t1, t2, **_):
        z1, z2 = upcast(self.expander(t1.mean(1))), upcast(self.expander(t2.mean(1)))  # (B, d)
        with common.full_precision():
            out = vicreg(z1, z2, self.args)
        return out | dict(loss=out["L_ssl"])


class Supervised(Objective):
    """A linear classifier on both views."""

    def __init__(self, backbone, args, classes):
        super().__init__(backbone)
        self.head = nn.Linear(args.neck, classes)

    def terms(self, t1, t2, labels, **_):
        scores = upcast(self.head(torch.cat([t1.mean(1), t2.mean(1)])))  # (2 B, classes)
        labels = common.send(labels, scores.device).repeat(2)  # (2 B,)
        return dict(loss=F.cross_entropy(scores, labels), accuracy=(scores.argmax(1) == labels).float().mean())


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def known_families(args, posed):
    """What happens between the views: all that can, or for sie what --sie-params says."""
    possible = ("rotation", "color") if posed else FAMILIES
    if args.objective != "sie" or "all" in args.sie_params:
        return possible
    if not set(args.sie_params) <= set(possible) or not args.sie_params:
        common.die(f"--sie-params {' '.join(args.sie_params)}: {args.data} has {' '.join(possible)}")
    return tuple(name for name in possible if name in args.sie_params)


def build(args, device, outputs):
    """The model with its initial weights: seeded, the same on every process. `outputs`: latents of sie, or classes."""
    common.seed_everything(args.seed, "weights")

    # The encoder is a ViT with a linear neck; all objectives share it.
    mean, std = common.normalisation(args)
    encoder = dict(img_size=args.img_size, patch_size=args.patch_size, neck=args.neck)
    backbone = common.make_backbone(args.arch, mean, std, **encoder)
    objective = dict(recon=Recon, sie=SIE, vicreg=VICReg, supervised=Supervised)[args.objective]
    return common.batchnorm_over_ranks(objective(backbone, args, outputs), device).to(device)


def check(args):
    """Refuse what cannot work, in one line each, before anything is made."""
    common.check_run(args, RECIPES, common.VITS)

    # Heads of 64 dimensions must share the width evenly, and positions need a multiple of 4.
    multiple = 4 * num_heads(args.embed_dim)
    if args.embed_dim % multiple:
        common.die(f"--embed-dim {args.embed_dim}: must be a multiple of {multiple}; take a multiple of 64")
    if args.img_size == args.patch_size:
        common.die(f"--patch-size {args.patch_size}: leaves a single patch, so that attention has no choice; lower it")

    # Only SIE and the supervised encoder use known parameters or labels.
    objective = args.objective
    if args.known_fraction < 1 and objective not in ("sie", "supervised"):
        needs = f"{objective} needs to know nothing and sees all"
        common.die(f"--known-fraction {args.known_fraction}: {needs}; leave it out")

    # Only SIE chooses which transformations are known.
    if objective != "sie" and (args.sie_single or args.sie_params != ("all",)):
        flag = "--sie-single" if args.sie_single else "--sie-params"
        common.die(f"{flag}: goes with --objective sie; {objective} sees all transformations at once")


def chance_of(args, outputs):
    """The loss of pure chance, or of a collapse, in words."""
    if args.objective == "recon":
        return "L_recon about 1 (the mean colour)"
    if args.objective == "supervised":
        return f"loss {math.log(max(outputs, 1)):.2f}"
    return f"L_var {1 - 0.01:.2f} (collapse)"


def main(argv=None):
    """Train: arguments -> model, data, optimiser -> steps -> checkpoint, picture and a k-NN score."""
    args = common.parse(Args, values_in_force, argv, description=__doc__)
    device = common.start(args.device)
    check(args)

    # The data are posed objects or images. The supervised encoder and a known fraction need classes.
    train, test = (
        common.load_data(args.data, args.data_dir, split, args.img_size, args.skip_corrupt, args.workers)
        for split in ("train", "test")
    )
    if train.labels is None and (args.objective == "supervised" or args.known_fraction < 1):
        needs = "--known-fraction" if args.known_fraction < 1 else "supervised"
        common.die(f"--data-dir {args.data_dir}: has no classes (one folder per class), which {needs} needs")

    # Renderings have fixed poses and are neither transformed nor cropped.
    posed = "rotation" in train.factors
    if posed and args.sie_single:
        common.die(f"--sie-single: {args.data} shows objects in poses; nothing is transformed")
    if posed and args.crop_scale != Args.crop_scale:
        common.die(f"--crop-scale: {args.data} shows objects in poses; nothing is cropped")

    # SIE and the supervised encoder learn from the known part of the data alone.
    train = train.to(device)
    known = train if args.known_fraction == 1 else common.known_part(train, args.known_fraction, args.seed)

    # The loader pairs two renderings of an object, or transforms view 1 of an image into view 2.
    families = known_families(args, posed)
    policies = make_policies(args, posed)
    draw = partial(draw_views, args, policies, () if posed else families)
    loader = common.Loader(known, policies, draw, args, device, ObjectPairs(known.groups) if posed else None)

    # SIE needs a width for z, the supervised encoder one for its classes. The schedule sets the learning rate.
    outputs = latent_width(families, posed) if args.objective == "sie" else len(train.classes)
    model = build(args, device, outputs)
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=fused)
    peak = args.lr * args.batch_size / 256

    # The run directory is named after what differs from the usual.
    variant = [args.objective]
    if args.sie_params != ("all",):
        variant += families
    if args.sie_single:
        variant.append("single")
    if args.known_fraction < 1:
        variant.append(f"known{args.known_fraction:g}")

    # A resumed run continues from its checkpoint; every run prints its settings before it starts.
    run = common.Run(args, "-".join(variant), model, optimizer)
    run.restore(train)
    run.introduce(known, loader, peak, chance_of(args, outputs))
    if args.compile:
        model.compile_encoder()
    ddp = common.distributed(model)

    for step, views, params, rows in run.steps(loader):
        # The learning rate follows a warm-up and then half a cosine.
        epoch = step / loader.steps_per_epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.warmup_epochs, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step == 0:
            run.picture("views.png", [views["1"], views["2"]])

        # SIE knows the parameters of the transformations, the supervised encoder the labels.
        z = labels = None
        if args.objective == "supervised":
            labels = known.labels[rows["1"]]  # (b,)
        elif args.objective == "sie" and posed:
            z = pose_latent(families, known.factors, rows["1"], rows["2"])  # (b, K)
        elif args.objective == "sie":
            z = latent(families, params["2"], args.img_size)  # (b, K)

        # DistributedDataParallel averages the gradients over processes in the backward pass.
        with common.autocast(device, args.amp):
            out, y = ddp(views, z, labels)
        optimizer.zero_grad(set_to_none=True)
        out["loss"].backward()
        optimizer.step()

        # A picture shows how well the decoder reconstructs view 2.
        run.log(step, features=y, lr=lr, epoch=epoch, **out)
        if args.objective == "recon" and run.due(step):
            run.picture("reconstruction.png", [views["1"], views["2"], model.drawn])

    # An untrained encoder with the same initial weights is the baseline of the final k-NN score.
    run.finish(build(args, device, outputs), train, test)


if __name__ == "__main__":
    common.command(main)
