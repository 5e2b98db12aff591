"""The same model on any number of processes: losses and gradients on 1, 2 and 4 gloo ranks, in float64."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import ser

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]


def on_ranks(world, tmp_path, fn, *args):
    """fn(*args) on each of `world` forked gloo processes -> their results, in the order of ranks."""
    if world == 1:
        return [fn(*args)]
    context, rendezvous = multiprocessing.get_context("fork"), tmp_path / f"rendezvous-{world}-{fn.__name__}"
    queue = context.Queue()

    def work(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        try:
            queue.put((rank, fn(*args)))
        except BaseException as e:
            queue.put((rank, repr(e)))
        finally:
            dist.destroy_process_group()

    processes = [context.Process(target=work, args=(r,)) for r in range(world)]
    for p in processes:
        p.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for p in processes:
        p.join(20)
    assert not any(isinstance(r, str) for r in results.values()), results
    return [results[r] for r in range(world)]


def train(base, equi, changes, steps=2):
    """`steps` steps of tiny training in float64 -> (losses, first gradients, teacher and centre), as numpy."""
    args = ser.Args(
        **ser.values_in_force(ser.Args(base=base, equi=equi))
        | dict(
            base=base,
            prototypes=32,
            equi=equi,
            batch_size=16,
            img_size=16,
            patch_size=4,
            proj_hidden=16,
            proj_dim=8,
            equi_dim=16,
            equi_ratio=0.5,
            local_size=8,
        )
        | changes
    )
    ser.check(args)
    device = torch.device("cpu")
    model, policies = ser.build(args, device).double(), ser.make_policies(args)
    data = common.ImageSet(
        images=torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=common.rng("test"))
    )
    loader = common.Loader(data, policies, partial(ser.draw_views, args, policies), args, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.compile:
        model.compile_encoder()
    optimizer, losses, ddp = torch.optim.SGD(parameters, lr=0.01), [], common.distributed(model)
    for step in range(steps):
        ser.update_teacher(model, 0.9)
        views, params, _ = next(loader.batches([step]))
        out, _ = ddp({name: x.double() for name, x in views.items()}, params)
        optimizer.zero_grad()
        out["loss"].backward()
        losses.append([common.all_reduce(v.detach()).item() / common.world_size() for v in out.values()])
        if step == 0:
            gradients = [p.grad.clone().numpy() for p in parameters]
        optimizer.step()
    slow = [v.numpy() for k, v in model.state_dict().items() if k.startswith(("teacher", "centre"))]
    return losses, gradients, slow


@pytest.mark.parametrize(
    "base, equi, changes",
    [(base, equi, {}) for base in ser.BASES for equi in ("ser", "none")]
    + [
        (
            "mocov3",
            "augself",
            dict(
                equi_params=("crop", "color", "flip", "blur", "solarize", "rotation"),
                blur=(0.5, 0.5),
                solarize=(0.5, 0.5),
            ),
        ),
        ("mocov3", "stl", {}),
        ("mocov3", "equimod", {}),
        ("mocov3", "essl", {}),
        ("mocov3", "ser", dict(local_views=4)),
        ("mocov3", "equimod", dict(equi_layer=2)),
        ("mocov3", "none", dict(compile=True)),  # on two processes only
    ],
)
def test_N1_N2_N3_N4_1_2_and_for_ser_4_processes_train_the_same_model(base, equi, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (losses, gradients, _), *_ = on_ranks(1, tmp_path, train, base, equi, changes | dict(compile=False))
    scale = max(abs(g).max() for g in gradients)
    for world in (2, 4) if equi == "ser" and not changes else (2,):
        ranks = on_ranks(world, tmp_path, train, base, equi, changes)
        for other_losses, other_gradients, slow in ranks:
            assert all((a == b).all() for a, b in zip(slow, ranks[0][2])) and bool(slow) == (base != "barlow")
            assert torch.allclose(torch.tensor(other_losses), torch.tensor(losses), rtol=1e-8, atol=0)
            for a, b in zip(gradients, other_gradients):
                assert abs(a - b).max() <= 1e-8 * max(abs(a).max(), 1e-3 * scale)


def collectives():
    """Gradients through gather with a loss whose rows depend on all rows; the same with a gather that keeps only its
    own rows' gradient, which is wrong and must be seen to be; batch norm; features of a set that does not divide
    evenly."""
    W, r = common.world_size(), common.rank()
    g = common.rng("collectives")
    z, x = torch.randn(8, 3, dtype=torch.float64, generator=g), torch.randn(8, 4, 5, dtype=torch.float64, generator=g)
    mine = slice(r * 8 // W, (r + 1) * 8 // W)
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)

    def own_slot(v):
        out = common.gather(v).detach().clone()
        out[mine] = v
        return out

    def gradient(gather, used_twice=False):
        weight.grad = None
        local = z[mine] @ weight
        F.cross_entropy(local @ gather(local).T, torch.arange(8)[mine].roll(0)).backward()
        if used_twice:  # the sum hands one gradient to both of its terms, of which gather must not change the other's
            weight.grad = None
            whole = z @ weight
            (gather(z[mine] @ weight) + whole).square().mean().backward()
        return (common.all_reduce(weight.grad) / common.world_size()).numpy()

    norm = common.batchnorm_over_ranks(nn.BatchNorm1d(4).double(), torch.device("cpu"))
    out = norm(x[mine])
    (out * x[mine].sin()).sum().backward()
    bn = [
        common.gather(out.detach()).numpy(),
        common.all_reduce(norm.weight.grad).numpy(),
        norm.running_mean.numpy(),
        norm.running_var.numpy(),
    ]

    backbone = common.make_backbone(
        "vit_pico", *common.CIFAR10, img_size=16, patch_size=4, cls_layer=0, pos="sincos"
    ).eval()
    images = common.ImageSet(images=torch.randint(0, 256, (13, 3, 16, 16), dtype=torch.uint8, generator=g))
    mean_colour = common.features(
        backbone, images, torch.device("cpu"), encode=lambda v: v.mean((2, 3)), batch_size=4
    ).numpy()
    twice = gradient(common.gather, used_twice=True)
    return (gradient(common.gather), twice), gradient(own_slot), bn, mean_colour, common.any_rank(r)


def test_N1_N2_A10_collectives(tmp_path):
    ((gradient, twice), _, bn, mean_colour, _), *_ = on_ranks(1, tmp_path, collectives)
    for world in (2, 4):
        for (other, other_twice), wrong, other_bn, other_colour, agreed in on_ranks(world, tmp_path, collectives):
            assert abs(other - gradient).max() < 1e-12 and abs(other_twice - twice).max() < 1e-12
            assert abs(wrong - gradient).max() > 1e-3  # a gather without the others' gradient would be noticed
            assert all(abs(a - b).max() < 1e-12 for a, b in zip(bn, other_bn))
            assert (
                mean_colour.shape == (13, 3)
                and len(other_colour) in (0, 13)
                and (other_colour == mean_colour[: len(other_colour)]).all()
            )  # rank 0 has them
            assert agreed == world - 1  # the largest flag of all ranks


@pytest.mark.usefixtures("pico")
def test_N3_C13_S14_torchrun_trains_what_python_trains(tiny, tmp_path):
    argv = [*tiny, "--max-steps", "4"]
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 ser.py".split()]
    command = [*torchrun, *argv, "--out", str(tmp_path / "two")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and not re.search("warn|leak", run.stderr, flags=re.I), run.stderr
    ser.main([*argv, "--out", str(tmp_path / "one")])
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for key in ("loss", "L_inv", "L_equiv", "lr", "feature_std"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    ser.main(
        [*argv, "--out", str(tmp_path / "two"), "--resume", "--max-steps", "5"]
    )  # two processes saved, one goes on


def mistaken(directory):
    """A run whose folder is missing, and where torchrun kills the ranks that wait -> its last exception, its stderr."""
    rank = str(dist.get_rank())
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    common.time = SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        ser.main([*"--data imagefolder --recipe cifar10 --device cpu --data-dir".split(), directory])
    return repr(end.value), stderr.getvalue()


def test_S12_S14_a_mistake_of_all_ranks_is_one_line_of_one(tmp_path):
    (end, line), other = on_ranks(2, tmp_path, mistaken, str(tmp_path / "nowhere"))
    assert end == "SystemExit(2)" and line.count("\n") == line.count("no such directory") == 1
    assert other == ("KeyboardInterrupt()", "")


def seen_by_each(values):
    mine = values[dist.get_rank()]
    common.same_on_all_ranks(["a", 1], "never said")
    with pytest.raises(SystemExit) as end:
        common.same_on_all_ranks(mine, "they differ")
    return common.any_rank(mine), end.value.code


def test_S7_ranks_agree_on_what_each_has_seen(tmp_path):
    assert on_ranks(2, tmp_path, seen_by_each, (0, 3)) == [(3, 2)] * 2
    assert common.any_rank(7) == 7
    common.same_on_all_ranks("alone", "never said")


@pytest.mark.parametrize("device, kind", [("cuda", nn.SyncBatchNorm), ("cpu", common.BatchNormOverRanks)])
def test_A10_batch_norm_spans_the_ranks_of_gpus_and_cpus_under_the_same_keys(device, kind, monkeypatch):
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(4, affine=False))
    keys = list(plain.state_dict())
    alone = common.batchnorm_over_ranks(plain, torch.device(device))
    assert alone is plain and type(plain[0]) is nn.BatchNorm2d
    monkeypatch.setattr(common, "world_size", lambda: 2)
    spans = common.batchnorm_over_ranks(plain, torch.device(device))
    assert all(type(m) is kind for m in spans) and list(spans.state_dict()) == keys
