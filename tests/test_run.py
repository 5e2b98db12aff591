"""The run: checkpoints that survive anything, schedules, collectives, stopping and resuming."""

import io
import json
import math
import os
import random
import re
import signal
import time
import types
import zipfile

import common
import eval_probe
import ser

import pytest
import torch
import torch.nn as nn


def state(value=0.0, n=1000):
    return dict(
        format=common.FORMAT,
        method="ser",
        args={},
        step=int(value),
        backbone={},
        backbone_state={"w": torch.full((n,), float(value))},
        train_state={"v": torch.full((n,), float(value))},
    )


def refused(capsys, call, *words):
    """`call` ends with exit code 2 and one line on stderr that holds `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    assert all(w in lines[0] for w in words), lines
    return lines[0]


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_C1_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    path, rnd = tmp_path / "checkpoint.pt", random.Random(0)
    common.save_checkpoint(path, state(0))
    for _ in range(30):
        child = os.fork()
        if child == 0:
            for value in range(1, 10_000):
                common.save_checkpoint(path, state(value))
            os._exit(0)
        time.sleep(rnd.uniform(0.001, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        read = common.load_checkpoint(path)
        assert (read["backbone_state"]["w"] == read["step"]).all() and (read["train_state"]["v"] == read["step"]).all()
    assert {p.name for p in tmp_path.iterdir()} <= {"checkpoint.pt", "checkpoint.pt.tmp"}  # nothing piles up


def test_C2_C18_order_of_a_save_and_a_full_disk(tmp_path, monkeypatch):
    """write < fsync < replace < fsync of the directory; an error at any of them leaves the old bytes and no rest."""
    path, calls = tmp_path / "checkpoint.pt", []
    common.save_checkpoint(path, state(1))
    old, fsync, replace = path.read_bytes(), os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    common.save_checkpoint(path, state(2))
    assert calls == ["fsync", "replace", "fsync"] and path.read_bytes() != old
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m, pytest.raises(OSError):
            m.setattr(os, name, full)
            common.save_checkpoint(path, state(3))
        assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_C3_what_an_earlier_kill_left_is_overwritten_and_never_loaded(tiny, tmp_path, capsys):
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a save")
    ser.main([*tiny, "--epochs", "0", "--resume", "--out", str(tmp_path)])  # nothing to resume yet: it starts
    assert "resuming" not in capsys.readouterr().out and common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a save" * 10**4)
    common.save_checkpoint(tmp_path / "checkpoint.pt", state(5))
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5 and not list(tmp_path.glob("*.tmp*"))


def test_C21_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "checkpoint.pt"
    link.symlink_to(tmp_path / "real" / "c.pt")
    common.save_checkpoint(link, state(4))
    assert link.is_symlink() and common.load_checkpoint(tmp_path / "real" / "c.pt")["step"] == 4


def test_C5_600_bit_flips_give_no_wrong_load(tmp_path, capsys):
    good, path, rnd, refusals = tmp_path / "good.pt", tmp_path / "bad.pt", random.Random(1), 0
    torch.manual_seed(0)
    original = state(7, n=300)
    original["backbone_state"]["w"] = torch.randn(300)
    common.save_checkpoint(good, original)
    data = good.read_bytes()
    for _ in range(600):
        flipped = bytearray(data)
        flipped[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        path.write_bytes(flipped)
        try:
            read = common.load_checkpoint(path)
        except SystemExit as end:
            assert end.code == 2
            refusals += 1
            continue
        assert torch.equal(read["backbone_state"]["w"], original["backbone_state"]["w"]) and torch.equal(
            read["train_state"]["v"], original["train_state"]["v"]
        )
        assert read["step"] == 7 and read["method"] == "ser"
    assert refusals > 300  # most flips hit something
    assert "Traceback" not in capsys.readouterr().err


def test_C4_truncated_at_any_length(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, state(1))
    data = path.read_bytes()
    for length in [0, 1, 10, *range(100, len(data), 997), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:length])
        refused(capsys, lambda: common.load_checkpoint(path), str(path), "damaged")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("force", [False, True])
def test_C7_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, capsys, monkeypatch, force):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save(state() | dict(train_state=Payload(str(marker))), path)
    line = refused(capsys, lambda: common.load_checkpoint(path), str(path))
    assert not marker.exists() and "weights_only" not in line


def spoiled(path, how):
    """Write to `path` something that is no checkpoint."""
    import pickle

    from PIL import Image

    good = state()
    if how == "text":
        path.write_text("hello")
    elif how == "picture":
        Image.new("RGB", (8, 8)).save(path, "PNG")
    elif how == "bare pickle":
        path.write_bytes(pickle.dumps(dict(step=1)))
    elif how == "legacy format":
        torch.save(good, path, _use_new_zipfile_serialization=False)
    elif how == "deflated":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("archive/data.pkl", b"0" * 10**6)
    elif how == "list":
        torch.save([torch.zeros(3)], path)
    elif how == "other keys":
        torch.save({"model": torch.zeros(3)}, path)
    elif how == "other format":
        torch.save(good | dict(format=99), path)
    elif how in common.KEYS:
        del good[how]
        torch.save(good, path)
    else:
        good["backbone_state"]["w"][3] = dict(NaN=math.nan, infinity=-math.inf)[how]
        torch.save(good, path)


@pytest.mark.parametrize(
    "how, words",
    [
        *(
            pytest.param(how, ["damaged"], id=f"C6 {how}")
            for how in ("text", "picture", "bare pickle", "legacy format")
        ),
        pytest.param("deflated", ["damaged"], id="C8 deflated"),
        *(pytest.param(how, ["keys"], id=f"C6 {how}") for how in ("list", "other keys")),
        *(pytest.param(key, ["keys", key], id=f"C15 no {key}") for key in sorted(common.KEYS)),
        pytest.param("other format", ["99", f"reads {common.FORMAT}"], id="C12 other format"),
        *(pytest.param(how, ["NaN or infinity"], id=f"C11 {how}") for how in ("NaN", "infinity")),
    ],
)
def test_what_is_no_checkpoint(how, words, tmp_path, capsys, monkeypatch):
    opened, read = [], zipfile.ZipFile.open
    spoiled(tmp_path / "bad.pt", how)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, *a, **k: opened.append(a) or read(self, *a, **k))
    refused(capsys, lambda: common.load_checkpoint(tmp_path / "bad.pt"), "bad.pt", *words)
    assert not opened or how != "deflated"  # nothing is inflated


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("missing.pt", id="C6 missing"),
        pytest.param("", id="C6 directory"),
        pytest.param("/dev/null", id="C6 device"),
    ],
)
def test_what_is_no_file(path, tmp_path, capsys):
    refused(capsys, lambda: common.load_checkpoint(tmp_path / path), str(tmp_path / path), "no such checkpoint file")


# ---- schedules and moving averages ----------------------------------------------------------------


def test_N5_learning_rate_of_the_paper():
    for epoch, lr in ((0, 0), (5, 1.2e-3), (10, 2.4e-3), (55, 1.2e-3), (100, 0)):
        assert common.warmup_cosine(epoch, 100, 10, 2.4e-3) == pytest.approx(lr, abs=1e-12)


def test_N4_N5_momentum_of_moco_v3():
    for epoch, m in ((0, 0.99), (25, 0.991464), (50, 0.995), (75, 0.998536), (100, 1)):
        assert common.cosine(epoch / 100, 0.99, 1.0) == pytest.approx(m, abs=1e-6)


def test_N4_T5_ema_over_many_steps():
    """Constant online weights s: after k updates m^k t + (1 - m^k) s; buffers stay."""
    target, online = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(online.weight, 2.0)
    online.running_mean.fill_(5.0)
    for _ in range(10):
        common.ema_update(target, online, 0.9)
    assert (
        torch.allclose(target.weight, torch.tensor(0.9**10 * 1 + (1 - 0.9**10) * 2))
        and target.running_mean.abs().max() == 0
    )


def test_T6_collapse_monitors():
    d = 16
    assert common.collapse_monitors(torch.ones(8, d))["feature_std"] == pytest.approx(0, abs=1e-6)
    healthy = common.collapse_monitors(torch.randn(4096, d, generator=common.rng(0)))
    assert healthy["feature_std"] == pytest.approx(d**-0.5, rel=0.02) and healthy["effective_rank"] == pytest.approx(
        d, rel=0.02
    )
    line = torch.randn(64, 1) @ torch.randn(1, d)
    assert common.collapse_monitors(line)["effective_rank"] == pytest.approx(1, abs=0.01)


# ---- whole runs -----------------------------------------------------------------------------------


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def content(path):
    c = common.load_checkpoint(path)
    return {k: c[k] for k in ("step", "backbone", "backbone_state", "train_state")}


@pytest.mark.parametrize(
    "how, base, equi",
    [
        (signal.SIGKILL, "mocov3", "ser"),
        (signal.SIGTERM, "mocov3", "ser"),
        (signal.SIGINT, "mocov3", "ser"),
        (signal.SIGKILL, "dino", "ser"),
        (signal.SIGKILL, "barlow", "ser"),
        *((signal.SIGKILL, "mocov3", equi) for equi in ("augself", "stl", "equimod", "essl")),
    ],
)
def test_N7_C15_S1_S2_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(tiny, tmp_path, how, base, equi):
    """A child trains and gets the signal in the middle of step 3 of 6; its successor ends where an undisturbed run
    ends. DINO's temperature, weight decay and frozen last layer are then in mid-schedule."""
    tiny = [
        *tiny,
        "--base",
        base,
        "--equi",
        equi,
        *"--prototypes 32 --teacher-temp-epochs 2 --freeze-last-epochs 1".split(),
    ]
    ser.main([*tiny, "--out", str(tmp_path / "whole")])
    child = os.fork()
    if child == 0:
        forward, steps = ser.Base.forward, []

        def interrupted(*a, **k):
            steps.append(1)
            if len(steps) == 4:
                os.kill(os.getpid(), how)
            return forward(*a, **k)

        ser.Base.forward, code = interrupted, 1
        try:
            ser.main([*tiny, "--out", str(tmp_path / "killed"), "--save-every", "1"])
        except SystemExit as end:
            code = end.code
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if how == signal.SIGKILL:
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        assert os.WEXITSTATUS(status) == 128 + how
    assert content(tmp_path / "killed" / "checkpoint.pt")["step"] == (3 if how == signal.SIGKILL else 4)
    ser.main([*tiny, "--out", str(tmp_path / "killed"), "--resume"])
    whole, killed = (content(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert same(whole, killed)
    killed["train_state"]["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1.0
    assert not same(whole, killed)  # the comparison sees what it should


def test_C15_N7_resume_without_a_momentum_encoder_would_show(tiny, tmp_path, monkeypatch):
    """Negative control: the same resume, but the momentum encoder restarted, ends elsewhere."""
    ser.main([*tiny, "--out", str(tmp_path / "whole")])
    ser.main([*tiny, "--out", str(tmp_path / "part"), "--max-steps", "3"])
    part = common.load_checkpoint(tmp_path / "part" / "checkpoint.pt")
    for key, value in part["train_state"]["heads"].items():
        if key.startswith("teacher.head") and value.is_floating_point():
            value.mul_(1.01)
    common.save_checkpoint(tmp_path / "part" / "checkpoint.pt", part)
    ser.main([*tiny, "--out", str(tmp_path / "part"), "--resume"])
    assert not same(*(content(tmp_path / name / "checkpoint.pt") for name in ("whole", "part")))


def test_N8_results_do_not_depend_on_workers(tiny, tmp_path):
    for workers in ("0", "2"):
        ser.main([*tiny, "--out", str(tmp_path / workers), "--workers", workers, "--max-steps", "2"])
    assert same(*(content(tmp_path / workers / "checkpoint.pt") for workers in ("0", "2")))


def test_C16_a_finished_run_is_left_alone(tiny, tmp_path, capsys):
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "1"])
    seen = lambda: (
        (tmp_path / "checkpoint.pt").stat().st_mtime_ns,
        (tmp_path / "checkpoint.pt").read_bytes(),
        (tmp_path / "log.jsonl").read_bytes(),
    )
    before = seen()
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "1", "--resume"])
    assert seen() == before and "is finished: 1 of 1 steps" in capsys.readouterr().out


def test_T1_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny, tmp_path, capsys, monkeypatch
):
    forward, steps = ser.Base.forward, []

    def poisoned(*a, **k):
        out, y = forward(*a, **k)
        steps.append(1)
        if len(steps) == 4:
            out["L_equiv"] = out["L_equiv"] * math.nan
            out["loss"] = out["L_inv"] + out["L_equiv"]
        return out, y

    monkeypatch.setattr(ser.Base, "forward", poisoned)
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path), "--save-every", "1"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "not finite at step 3" in err and "L_equiv nan" in err
    good = common.load_checkpoint(tmp_path / "checkpoint.pt")
    assert good["step"] == 3 and all(torch.isfinite(v).all() for v in good["backbone_state"].values())


def test_what_a_run_leaves_behind(tiny, tmp_path, capsys):
    ser.main([*tiny, "--equi", "none", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {
        "args.json",
        "log.jsonl",
        "views.png",
        "ser.py",
        "common.py",
        "checkpoint.pt",
        "backbone.safetensors",
    }
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert set(lines[0]) == {
        "step",
        "epoch",
        "loss",
        "L_inv",
        "lr",
        "images_per_s",
        "data_wait",
        "feature_std",
        "effective_rank",
    }
    assert json.loads((tmp_path / "args.json").read_text())["recipe"] == "cifar10"
    out = capsys.readouterr().out
    assert "equivariance of the last map, a quarter turn: " in out
    assert "k-NN accuracy" in out and f"python eval_probe.py {tmp_path}/checkpoint.pt" in out


def test_C18_a_full_disk_costs_one_line_during_the_run_and_the_exit_code_at_its_end(
    tiny, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "save_checkpoint", full)
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path), "--save-every", "3"])
    assert end.value.code == 1 and capsys.readouterr().err.count("No space left on device") == 2


@pytest.mark.parametrize(
    "kwargs",
    [dict(arch="vit_pico", img_size=16, patch_size=4, cls_layer=0, pos="sincos"), dict(arch="resnet18", img_size=16)],
)
def test_exported_backbone_gives_the_same_features_in_timm(kwargs, tmp_path):
    import timm
    from safetensors import safe_open

    backbone = common.make_backbone(mean=common.CIFAR10[0], std=common.CIFAR10[1], **kwargs).eval()
    common.export_backbone(tmp_path / "backbone.safetensors", backbone)
    with safe_open(tmp_path / "backbone.safetensors", "pt") as f:
        model = timm.create_model(
            **json.loads(f.metadata()["timm"]), checkpoint_path=tmp_path / "backbone.safetensors"
        ).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert (model(x) - backbone(x)).abs().max() <= 1e-5


def test_what_timm_does_not_know_is_not_exported(tmp_path):
    late = common.make_backbone("vit_pico", *common.CIFAR10, img_size=16, patch_size=4, cls_layer=3, pos="sincos")
    small = common.make_backbone("resnet18", *common.CIFAR10, img_size=16, stem="cifar")
    for encoder in (late, small):
        assert (
            "not written" in common.export_backbone(tmp_path / "x.safetensors", encoder)
            and not (tmp_path / "x.safetensors").exists()
        )


def test_C5_torch_save_is_what_we_think_it_is():
    """The CRC check relies on torch writing uncompressed zip members with checksums."""
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    with zipfile.ZipFile(buffer) as z:
        assert z.testzip() is None and all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_image_stops_the_run_with_its_name_or_is_left_out(tiny, folder, tmp_path, capsys, workers):
    import shutil

    shutil.copytree(folder, tmp_path / "data")
    shutil.copy(folder / "train" / "left" / "03.png", tmp_path / "data" / "train" / "left" / "99.png")  # 25 images
    (tmp_path / "data" / "train" / "left" / "03.png").write_bytes(b"\x89PNG nothing more")
    argv = [*tiny, "--data-dir", str(tmp_path / "data"), "--workers", workers, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        ser.main(argv)
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error:" in line]
    assert end.value.code == 1 and len(errors) == 1 and "03.png" in errors[0] and "--skip-corrupt" in errors[0], errors

    # Left out, they are counted, and the probes that the run names next leave them out too.
    (tmp_path / "data" / "test" / "right" / "02.png").write_bytes(b"no image")
    ser.main([*argv[:-1], str(tmp_path / "again"), "--skip-corrupt", "--max-steps", "1"])
    left_out = "images cannot be read and are left out, such as"
    for call in range(2):
        errors = capsys.readouterr().err
        assert f"1 of 25 {left_out} {tmp_path / 'data' / 'train' / 'left' / '03.png'}\n" in errors
        assert f"1 of 12 {left_out} {tmp_path / 'data' / 'test' / 'right' / '02.png'}\n" in errors
        if call == 0:
            eval_probe.main([str(tmp_path / "again" / "checkpoint.pt"), "--tasks", "knn", "--workers", workers])
    assert (tmp_path / "again" / "skipped.txt").read_text() == f"{tmp_path / 'data' / 'train' / 'left' / '03.png'}\n"


class Broken(common.HorizontalFlip):
    def __call__(self, x, params):
        raise RuntimeError("boom")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_an_op_keeps_its_traceback(workers, folder):
    data = common.load_data("imagefolder", str(folder), "train", 16)
    policy = common.Compose([common.RandomResizedCrop(16), Broken()])
    args = common.RunArgs(batch_size=4, epochs=1, workers=workers)
    draw = lambda generator: {"1": (torch.arange(4), policy.sample(4, generator))}
    loader = common.Loader(data, {"1": policy}, draw, args, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="boom"):
        next(loader.batches(range(2)))


def test_S3_sigterm_to_the_whole_group_with_busy_workers_saves_and_ends(tiny, tmp_path, monkeypatch):
    """What schedulers do: the loader's workers get the signal too, and are in the middle of something."""
    open_image = common.open_image
    monkeypatch.setattr(common, "open_image", lambda path: time.sleep(0.05) or open_image(path))
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            ser.main([*tiny, "--workers", "2", "--epochs", "50", "--out", str(tmp_path)])
        except SystemExit as end:
            code = end.code
        os._exit(code)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child, signal.SIGTERM)
    killed = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 143 and common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] >= 1
    assert time.monotonic() - killed < 10


def test_resuming_continues_the_log(tiny, tmp_path):
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "4"])
    log = tmp_path / "log.jsonl"
    log.write_text(
        log.read_text() + json.dumps(dict(step=4, loss=0)) + "\n"
    )  # of a run that was killed before it could save
    ser.main([*tiny, "--out", str(tmp_path), "--resume"])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6)) and lines[4]["loss"] > 0


def test_what_loader_workers_need_can_be_sent_to_them():
    """Where processes are spawned and not forked (macOS, Windows) the loader travels as a pickle, and still knows its
    rows."""
    import pickle
    from functools import partial

    args = ser.Args(**ser.RECIPES["blocks"] | dict(recipe="blocks", batch_size=16, img_size=16, patch_size=4))
    ser.check(args)
    policies, data = (
        ser.make_policies(args),
        common.ImageSet(images=torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)),
    )
    loader = common.Loader(data, policies, partial(ser.draw_views, args, policies), args, torch.device("cpu"))
    assert same(loader[1], pickle.loads(pickle.dumps(loader))[1])


def test_C17_an_overwritten_run_leaves_nothing(tiny, tmp_path, capsys):
    ser.main([*tiny, "--equi", "none", "--max-steps", "1", "--out", str(tmp_path)])
    trained = content(tmp_path / "checkpoint.pt")
    ser.main([*tiny, "--epochs", "0", "--overwrite", "--out", str(tmp_path)])  # the untrained encoder, in its place
    assert content(tmp_path / "checkpoint.pt")["step"] == 0 and trained["step"] == 1
    assert not (tmp_path / "backbone.safetensors").exists() and (tmp_path / "log.jsonl").read_text() == ""


def test_C11_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, capsys, monkeypatch):
    """Finite losses, but a step that ruins the weights: the checkpoint before it stays."""
    step = torch.optim.AdamW.step

    def ruin(self, *a, **k):
        step(self, *a, **k)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 4:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--max-steps", "4", "--save-every", "1", "--out", str(tmp_path)])
    assert end.value.code == 1 and "not finite" in capsys.readouterr().err
    assert content(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_torn_log_does_not_keep_a_run_from_resuming(tiny, tmp_path):
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "2"])
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "ep')
    ser.main([*tiny, "--out", str(tmp_path), "--resume", "--max-steps", "3"])
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


# ---- what a CPU can show of a GPU ---------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
def test_a_resumed_optimizer_is_fused_where_this_device_fuses(here):
    """Whatever the checkpoint says: one of a CPU resumed on a GPU would go on tensor by tensor."""
    model = nn.ModuleDict(dict(backbone=nn.Linear(3, 2), head=nn.Linear(2, 1)))
    model.evaluated = "backbone"
    there, own = (torch.optim.AdamW(model.parameters(), fused=fused) for fused in (not here, here))
    model.head(model.backbone(torch.ones(4, 3))).sum().backward()
    there.step()
    heads = {f"head.{k}": v for k, v in model.head.state_dict().items()}
    saved = dict(
        backbone_state=model.backbone.state_dict(), train_state=dict(heads=heads, optimizer=there.state_dict())
    )
    common.Run._load(types.SimpleNamespace(model=model, optimizer=own, path="checkpoint.pt"), saved)
    assert all(group["fused"] is here and group["foreach"] is None for group in own.param_groups)
    own.step()
    assert all(own.state[p]["step"] == 2 for p in model.parameters())


@pytest.mark.parametrize("soft, hard, most, raised", [(1024, 4096, 9999, 4096), (256, 10**9, 12_000, 10_240)])
def test_the_limit_of_open_files_is_raised(soft, hard, most, raised, monkeypatch):
    limits = []

    def setrlimit(what, pair):
        if pair[0] > most:
            raise ValueError("not allowed to raise maximum limit")
        limits.append((what, *pair))

    fake = types.SimpleNamespace(RLIMIT_NOFILE=7, getrlimit=lambda what: (soft, hard), setrlimit=setrlimit)
    monkeypatch.setattr(common, "resource", fake)
    assert common.start("cpu").type == "cpu" and limits == [(7, raised, hard)]
    monkeypatch.setattr(common, "resource", None)  # as on Windows
    assert common.start("cpu").type == "cpu"


@pytest.mark.parametrize("cores, local, free, workers", [(64, 1, 99, 16), (64, 2, 99, 8), (4, 2, 99, 2), (64, 1, 9, 4)])
def test_default_workers(cores, local, free, workers, monkeypatch):
    """By cores, processes of the machine, and what shared memory has room for (`free` batches)."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(common, "free_shared_memory", lambda: free * 1000)
    assert common.default_workers(None, 1000) == workers and common.default_workers(3, 1000) == 3


def small_loader(data, workers=0, epochs=3):
    policy = common.Compose([common.CenterCrop(8)])
    args = types.SimpleNamespace(seed=0, batch_size=4, workers=workers, epochs=epochs)
    draw = lambda g: {"1": (torch.arange(4), policy.sample(4, g))}
    return common.Loader(data, {"1": policy}, draw, args, torch.device("cpu"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_live_as_long_as_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "detach_worker", lambda _: (tmp_path / str(os.getpid())).touch())
    loader = small_loader(common.load_data("imagefolder", str(folder), "train", 8), workers=2)
    assert len(list(loader.batches(range(loader.total_steps)))) == 18
    assert len(list(tmp_path.iterdir())) == 2


def test_a_batch_does_not_take_the_order_of_its_epoch_along():
    loader = small_loader(common.ImageSet(images=torch.zeros(100, 3, 8, 8, dtype=torch.uint8)))
    rows = [loader.rows(step)["1"] for step in range(25)]
    assert all(r.untyped_storage().nbytes() == 4 * 8 for r in rows)
    assert torch.equal(torch.cat(rows), torch.randperm(100, generator=common.rng(0, "order", 0)))


def test_only_rank_0_computes_the_monitors(monkeypatch):
    computed, written = [], []
    run = types.SimpleNamespace(pending=[], device=torch.device("cpu"), flush=dict, logged=0, clock=0.0)
    run.args, run.loader = types.SimpleNamespace(log_every=1, batch_size=4), types.SimpleNamespace(waited=0.0)
    run._append, run.bar = written.append, types.SimpleNamespace(set_postfix_str=lambda *a, **k: None)
    monkeypatch.setattr(common, "collapse_monitors", lambda y: computed.append(1) or dict(effective_rank=1.0))
    for number in (1, 0):
        monkeypatch.setattr(common, "rank", lambda number=number: number)
        common.Run.log(run, 0, features=torch.ones(2, 3), loss=1.0)
    assert computed == [1] and len(written) == 1 and written[0]["effective_rank"] == 1.0


@pytest.mark.parametrize("n", [5, 16, 40])
def test_features_of_a_gpu_are_collected_16_batches_at_a_time(n, monkeypatch):
    data = common.ImageSet(images=torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=common.rng("n")))
    encoder, joined, cat = nn.Identity(), [], torch.cat
    encoder.img_size, encoder.mean, encoder.std = 4, (0.0,) * 3, (1.0,) * 3
    encode = lambda x: x.mean((2, 3))
    there = common.features(encoder, data, torch.device("cpu"), encode=encode, batch_size=1)
    monkeypatch.setattr(common, "send", lambda x, device: x)
    monkeypatch.setattr(torch, "cat", lambda x, *a: cat(x, *a) if len(x) == 1 else joined.append(len(x)) or cat(x, *a))
    gpu = types.SimpleNamespace(type="cuda")
    assert torch.equal(common.features(encoder, data, gpu, encode=encode, batch_size=1, amp="off"), there)
    assert joined == [16] * (n // 16) + [n % 16] * (n % 16 > 0)


def test_pictures_of_an_overwritten_run_go_and_those_of_others_stay(tiny, tmp_path):
    run = [*tiny, "--epochs", "0", "--warmup-epochs", "0", "--out", str(tmp_path)]
    (tmp_path / "mine.png").touch()
    ser.main(run)
    assert (tmp_path / "mine.png").exists()
    for name in ("reconstruction.png", "skipped.txt"):
        (tmp_path / name).touch()
    ser.main([*run, "--overwrite"])
    assert not (tmp_path / "reconstruction.png").exists() and not (tmp_path / "skipped.txt").exists()
    assert (tmp_path / "mine.png").exists()


class Pixels(nn.Module):
    """An encoder whose last map is the image itself (it turns with the image), or a mean colour that does not."""

    img_size, depth, mean, std = 8, 1, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, act):
        super().__init__()
        self.act = act

    def tokens(self, x, after):
        return self.act(x).permute(0, 2, 3, 1)  # (n, h, w, 3)


def test_equivariance_at_the_end_of_a_run_sees_maps_that_turn_and_maps_that_do_not():
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=common.rng("turn"))
    data, args = common.ImageSet(images=images), common.RunArgs(amp="off", workers=0)
    score = lambda act: common.turn_equivariance(Pixels(act), data, torch.device("cpu"), args, most=20)
    assert score(lambda x: x) == pytest.approx(1, abs=1e-6)
    assert abs(score(lambda x: x.flip(3))) < 0.1  # noise, mirrored: turns the other way
    place = torch.randn(1, 3, 8, 8, generator=common.rng("place"))
    assert abs(score(lambda x: place + 0 * x)) < 0.3  # the same map whatever the image
    loop = []  # a map that turns in part: the loop in float64
    blend = lambda x: x + 0.5 * x.flip(3)
    x = ((images[::2].double() / 255) - 0.5) / 0.25
    a, b = blend(x), blend(torch.rot90(x, 1, (2, 3)))
    a = torch.rot90(a, 1, (2, 3))
    a, b = (z - z.mean((0, 2, 3), keepdim=True) for z in (a, b))
    for n in range(20):
        for i in range(8):
            for j in range(8):
                u, v = a[n, :, i, j], b[n, :, i, j]
                loop.append((u @ v / u.norm() / v.norm()).item())
    assert score(blend) == pytest.approx(sum(loop) / len(loop), abs=1e-5)


def test_the_gpu_benchmark_measures_a_run_and_survives_one_that_fails(tmp_path, monkeypatch):
    """Both kinds of training part on a CPU; a part that breaks is a line of the table, and the next one runs."""
    import bench_gpu

    monkeypatch.setattr(common, "load_data", common.load_data)  # the benchmark replaces these; a test must not
    monkeypatch.setattr(common, "N_OBJECTS", dict(common.N_OBJECTS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    agree = bench_gpu.losses_agree
    broken = lambda module, flags, *more: agree(module, flags, *more) if "simclr" in flags else 1 / 0
    monkeypatch.setattr(bench_gpu, "losses_agree", broken)
    bad = bench_gpu.main(["--tiny", "--only", "step ciper", "--out", str(tmp_path)])
    table = json.loads((tmp_path / "gpu.json").read_text())
    assert len(bad) == 3 and "FAILED ZeroDivisionError" in table["step ciper essl"]
    assert len(table) == 4 and table["step ciper simclr"].startswith("losses differ by 0e+00, bf16 loss ")
    bench_gpu.main(["--tiny", "--only", "speed SimCLR", "--out", str(tmp_path)])
    speed = json.loads((tmp_path / "gpu.json").read_text())["speed SimCLR ResNet-18 32 px"]
    rate, peak_share = re.match(r"([\d,]+) images/s.* ([\d.]+)% of the bf16 peak", speed).groups()
    assert int(rate.replace(",", "")) > 0 and float(peak_share) > 0
    assert bench_gpu.main(["--tiny", "--seconds", "0", "--out", str(tmp_path)]) == []
    assert set(json.loads((tmp_path / "gpu.json").read_text()).values()) == {"SKIPPED: no time left"}
