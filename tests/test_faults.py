"""What goes wrong around a run: machines, disks, signals, other people's files. Ids name the fault, as in a catalogue
of reliability."""

import atexit
import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ciper
import clever
import common
import eval_probe
import recon_xattn
import ser

import pytest
import torch
from test_distributed import on_ranks
from test_run import content, refused, same, state
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]


def with_data(tiny, folder):
    """The arguments of `tiny` on another folder."""
    i = tiny.index("--data-dir")
    return [*tiny[: i + 1], str(folder), *tiny[i + 2 :]]


def steps(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def in_child(act):
    """act() in a forked process -> its exit code (negative: the signal that killed it)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = act() or 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- several machines -------------------------------------------------------------------------------


def on_machines(tiny, root, *flags):
    """One rank of ser.py in a working directory of its own, as on a machine without a common disk."""
    import torch.distributed as dist

    os.chdir(Path(root) / f"n{dist.get_rank()}")
    sys.stderr = sys.stdout = open(os.devnull, "w")
    try:
        ser.main([*tiny, "--out", "run", *flags])
    except SystemExit as end:
        return end.code
    return 0


def test_F1_machines_without_a_common_disk_resume_together(tiny, tmp_path):
    for name in ("n0", "n1", "whole/n0", "whole/n1"):
        (tmp_path / name).mkdir(parents=True)
    assert on_ranks(2, tmp_path / "n0", on_machines, tiny, tmp_path / "whole") == [0, 0]
    assert on_ranks(2, tmp_path / "n1", on_machines, tiny, tmp_path, "--max-steps", "3") == [0, 0]
    assert not (tmp_path / "n1" / "run" / "checkpoint.pt").exists()  # only rank 0 saves
    assert on_ranks(2, tmp_path, on_machines, tiny, tmp_path, "--resume") == [0, 0]
    whole, resumed = steps(tmp_path / "whole" / "n0" / "run"), steps(tmp_path / "n0" / "run")
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed] and len(resumed) == 6


def test_F1_an_output_that_rank_0_refuses_is_refused_on_all(tiny, tmp_path):
    for name in ("n0/run", "n1"):
        (tmp_path / name).mkdir(parents=True)
    common.save_checkpoint(tmp_path / "n0" / "run" / "checkpoint.pt", state())
    assert on_ranks(2, tmp_path, on_machines, tiny, tmp_path) == [2, 2]
    (tmp_path / "again").mkdir()
    assert on_ranks(2, tmp_path / "again", on_machines, tiny, tmp_path, "--resume") == [2, 2]  # of other arguments


def with_own(argv, flags):
    """One rank of ser.py with flags of its own -> (exit code, what it printed)."""
    import io

    import torch.distributed as dist

    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            ser.main([*argv, *flags[dist.get_rank()]])
        except SystemExit as end:
            return end.code, [line for line in err.getvalue().splitlines() if "error:" in line]
    return 0, []


def test_R5_ranks_with_other_arguments_or_images_do_not_train_together(tiny, folder, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    for code, lines in on_ranks(2, tmp_path, with_own, [*tiny, *out], [[], ["--lr", "0.1"]]):
        assert code == 2 and "--lr: 0.0005 on rank 0 and 0.1 on rank 1" in lines[0]
    shutil.copytree(folder, tmp_path / "fewer")
    (tmp_path / "fewer" / "train" / "left" / "11.png").unlink()
    shutil.copytree(folder, tmp_path / "renamed")
    (tmp_path / "renamed" / "train" / "left" / "11.png").rename(tmp_path / "renamed" / "train" / "left" / "12.png")
    shutil.copytree(folder, tmp_path / "tested")
    next((tmp_path / "tested" / "test" / "left").iterdir()).unlink()
    others = ("fewer", "24 and 23 images"), ("renamed", "other file names"), ("tested", "another test split")
    for name, words in others:
        (tmp_path / f"r-{name}").mkdir()
        for code, lines in on_ranks(
            2, tmp_path / f"r-{name}", with_own, [*tiny, *out], [[], ["--data-dir", str(tmp_path / name)]]
        ):
            assert code == 2 and "rank 1" in lines[0] and words in lines[0], lines


def test_S12_R5_a_mistake_of_one_rank_alone_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    refused(
        capsys, lambda: common.die("--lr: odd"), "--lr: odd"
    )  # nobody ended this process while it waited for rank 0
    assert waits == [5]
    monkeypatch.setenv("RANK", "0")
    refused(capsys, lambda: common.die("--lr: odd"), "--lr: odd")
    assert waits == [5]  # rank 0 speaks at once


# ---- what a run remembers ---------------------------------------------------------------------------


def test_F3_paths_are_kept_absolute(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    ser.main([*with_data(tiny, folder.name), "--epochs", "0", "--warmup-epochs", "0", "--out", str(tmp_path)])
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["args"]["data_dir"] == str(folder)


def test_F4_a_run_goes_on_with_the_images_it_began_with(tiny, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    argv = [*with_data(tiny, tmp_path / "data"), "--out", str(tmp_path / "run")]
    ser.main([*argv, "--max-steps", "1"])
    for i in range(3):
        shutil.copy(folder / "train" / "left" / "00.png", tmp_path / "data" / "train" / "left" / f"more{i}.png")
    refused(capsys, lambda: ser.main([*argv, "--resume"]), "--data-dir", "24 and 27 images")
    for i in range(3):
        (tmp_path / "data" / "train" / "left" / f"more{i}.png").unlink()
    (tmp_path / "data" / "train" / "left").rename(tmp_path / "data" / "train" / "links")
    refused(capsys, lambda: ser.main([*argv, "--resume"]), "--data-dir", "other classes: left")
    (tmp_path / "data" / "train" / "links").rename(tmp_path / "data" / "train" / "left")
    (tmp_path / "data").rename(tmp_path / "moved")
    ser.main([*with_data(tiny, tmp_path / "moved"), "--out", str(tmp_path / "run"), "--resume", "--max-steps", "2"])
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def nothing():
    """A model and an optimiser that say nothing."""
    model = torch.nn.Module()
    model.backbone, model.evaluated = torch.nn.Linear(1, 1), "backbone"
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


SCRIPTS = {"ser": ser, "recon_xattn": recon_xattn, "ciper": ciper, "clever": clever}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A run of one step, in the middle of its first epoch."""
    out = tmp_path_factory.mktemp("saved")
    ser.main([*tiny, "--out", str(out), "--max-steps", "1"])
    return out


@pytest.fixture(scope="module")
def light(saved, tmp_path_factory):
    """Its directory with a checkpoint that has lost its weights, which takes no time to load."""
    out = tmp_path_factory.mktemp("light")
    state = common.load_checkpoint(saved / "checkpoint.pt")
    state["train_state"] |= dict(heads={}, optimizer={})
    common.save_checkpoint(out / "checkpoint.pt", state | dict(backbone_state={}))
    return out


@pytest.mark.parametrize("name", sorted(vars(ser.Args()).keys() - common.Run.FREE))
def test_C14_a_resumed_run_may_change_no_argument_that_says_what_is_computed(light, name, capsys):
    """Whatever was saved under another value of any such argument is not continued."""
    args = common.load_checkpoint(light / "checkpoint.pt")["args"]
    now = ser.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    now.resume, now.out = True, str(light)
    value = getattr(now, name)
    setattr(
        now,
        name,
        "other" if isinstance(value, str) or value is None else (9.5,) if isinstance(value, tuple) else value + 1,
    )
    run = common.Run(now, "", *nothing())
    run.data = common.load_checkpoint(light / "checkpoint.pt")["train_state"]["data"]
    refused(capsys, run._read, f"--{name.replace('_', '-')}", "was made with")


def test_C14_what_is_free_to_change_is_what_does_not_touch_the_result():
    assert common.Run.FREE == {
        "data_dir",
        "out",
        "resume",
        "overwrite",
        "workers",
        "device",
        "compile",
        "max_steps",
        "save_every",
        "log_every",
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_C9_another_scripts_checkpoint_is_not_continued(script, saved, tiny, tmp_path, capsys):
    left_out = dict(
        ser=(),
        recon_xattn=("--equi-dim", "--proj-dim"),
        ciper=("--equi-dim", "--proj-dim", "--arch", "--patch-size"),
        clever=("--equi-dim", "--proj-dim", "--proj-hidden"),
    )[script]
    flags = [v for pair in zip(tiny[::2], tiny[1::2]) if pair[0] not in left_out for v in pair]
    flags += ["--arch", "resnet_pico"] if script == "ciper" else []
    for other in SCRIPTS.keys() - {script}:
        common.save_checkpoint(
            tmp_path / "checkpoint.pt", common.load_checkpoint(saved / "checkpoint.pt") | dict(method=other)
        )
        refused(
            capsys,
            lambda: SCRIPTS[script].main([*flags, "--out", str(tmp_path), "--resume"]),
            f"its checkpoint is of {other}.py",
        )


@pytest.mark.parametrize(
    "spoil", ["heads", "optimizer", "C10 a key of heads", "C10 a shape of heads", "C10 a prefix of heads"]
)
def test_C15_a_training_state_with_a_part_missing_is_one_line(spoil, saved, tiny, tmp_path, capsys):
    c = common.load_checkpoint(saved / "checkpoint.pt")
    if spoil in c["train_state"]:
        del c["train_state"][spoil]
    else:
        key = next(k for k in c["train_state"]["heads"] if k.startswith("projector"))
        c["train_state"]["heads"] |= {key: torch.zeros(3)}
        if "key" in spoil:
            del c["train_state"]["heads"][key]
        if "prefix" in spoil:
            c["train_state"]["heads"] = {f"module.{k}": v for k, v in c["train_state"]["heads"].items()}
    common.save_checkpoint(tmp_path / "checkpoint.pt", c)
    refused(
        capsys,
        lambda: ser.main([*tiny, "--out", str(tmp_path), "--resume"]),
        "checkpoint.pt",
        "does not fit",
        *([key] if "C10" in spoil else []),
    )


# ---- disks ------------------------------------------------------------------------------------------


def test_F10_lines_that_a_full_disk_tore_are_dropped(tiny, tmp_path):
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "2"])
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 2, "lo{"step": 3, "loss": 1.0}\n[]\n{"loss": 1}\n\xff\n{"step": 1')
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "4", "--resume"])
    assert [line["step"] for line in steps(tmp_path)] == [0, 1, 2, 3]


def test_F10_a_line_after_a_torn_one_begins_anew(tiny, tmp_path, monkeypatch, capsys):
    """The disk is full for a moment, in the middle of a line."""
    import builtins

    real, broken = open, []

    class Torn:
        def __init__(self, f):
            self.f = f

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def write(self, text):
            self.f.write(text[:9])
            self.f.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    def tear(path, *a, **k):
        f = real(path, *a, **k)
        if str(path).endswith("log.jsonl") and a[:1] == ("a",):
            broken.append(1)
            if len(broken) == 2:
                return Torn(f)
        return f

    monkeypatch.setattr(builtins, "open", tear)
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "4"])
    monkeypatch.undo()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [common.step_of(line) for line in lines] == [
        0,
        -1,
        2,
        3,
    ] and "could not log step 1" in capsys.readouterr().err


def test_C19_a_directory_that_vanishes_costs_a_line_a_save_and_the_exit_code(tiny, tmp_path, capsys, monkeypatch):
    update, calls = ser.update_teacher, []

    def vanish(model, m):
        update(model, m)
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(ser, "update_teacher", vanish)
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path / "run"), "--max-steps", "3", "--save-every", "1"])
    err = capsys.readouterr().err
    assert (
        end.value.code == 1
        and err.count("could not save step 2") == err.count("could not save step 3") == 1
        and "could not log step 2" in err
    )


@pytest.mark.parametrize("name", ["C22 ünï cödé x", "C22 a\nline", "-x", "C22 $(touch y);'\""])
def test_C22_any_name_of_a_directory_works(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--resume"]):
        ser.main([*tiny, "--max-steps", "1", f"--out={name}", *flags])
    words = shlex.split(capsys.readouterr().out.split("next: ")[-1])
    assert common.load_checkpoint(words[-1])["step"] == 1 and sorted(os.listdir(tmp_path)) == [name]


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS"])
def test_F16_a_directory_that_cannot_be_flushed_keeps_its_checkpoint(tmp_path, monkeypatch, code):
    fsync, number = os.fsync, getattr(errno, code)

    def on_directories(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", on_directories)
    common.save_checkpoint(tmp_path / "checkpoint.pt", state(3))
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    monkeypatch.setattr(
        os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )  # nor files
    common.save_checkpoint(tmp_path / "checkpoint.pt", state(4))
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("name", ["args.json", "ser.py", "log.jsonl"])
def test_R12_a_disk_that_is_full_at_the_start_is_one_line(name, tiny, tmp_path, monkeypatch, capsys):
    def unless_full(act):
        def guarded(path, *a):
            if Path(path).name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return act(path, *a)

        return guarded

    monkeypatch.setattr(common, "write", unless_full(common.write))
    monkeypatch.setattr(shutil, "copyfile", unless_full(shutil.copyfile))
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and len(lines) == 1 and "No space left" in lines[0] and "--out" in lines[0]


def test_R12_an_export_that_cannot_be_written_costs_one_line_and_not_the_score(tiny, tmp_path, monkeypatch, capsys):
    write = common.write

    def full(path, content):
        if Path(path).suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(common, "write", full)
    ser.main([*tiny, "--equi", "none", "--out", str(tmp_path), "--max-steps", "1"])
    out = capsys.readouterr().out
    assert "backbone.safetensors: not written" in out and "No space left" in out and "k-NN accuracy" in out


def test_C22_R12_a_name_of_256_characters_is_one_line(tiny, tmp_path, capsys):
    refused(capsys, lambda: ser.main([*tiny, "--out", str(tmp_path / ("x" * 256))]), "--out", "too long")
    refused(capsys, lambda: common.load_checkpoint(tmp_path / ("x" * 256)), "no such checkpoint")


def test_C20_R1_a_refused_second_run_leaves_the_first_ones_save_alone(tiny, tmp_path, capfd):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        common.Run(ser.Args(out=str(tmp_path)), "", *nothing())
        (tmp_path / "checkpoint.pt.tmp").write_text("half a save")
        os.write(write, b".")
        time.sleep(30)
    os.read(read, 1)
    try:
        assert in_child(lambda: ser.main([*tiny, "--out", str(tmp_path)])) == 2 and "in use" in capfd.readouterr().err
        assert (tmp_path / "checkpoint.pt.tmp").read_text() == "half a save"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_F15_a_file_system_without_locks_runs(tiny, tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "1"])
    assert (tmp_path / "checkpoint.pt").exists() and "cannot be locked" in capsys.readouterr().out


def test_C20_F15_a_worker_does_not_keep_the_lock(tmp_path):
    """The main process is killed; a loader worker that lives on has let go of the lock."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        common.Run(ser.Args(out=str(tmp_path)), "", *nothing())
        worker = os.fork()
        if worker == 0:
            common.detach_worker(0)
            os.write(write, f"{os.getpid()}\n".encode())
            time.sleep(30)
        time.sleep(30)
    worker = int(os.read(read, 20))
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lock = os.open(tmp_path, os.O_RDONLY)
        assert fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) is None  # raises where somebody holds the lock
        os.close(lock)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_C21_R11_an_overwritten_link_stays_a_link(tiny, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    common.save_checkpoint(tmp_path / "disk" / "c.pt", state())
    (tmp_path / "run" / "checkpoint.pt").symlink_to(tmp_path / "disk" / "c.pt")
    ser.main([*tiny, "--out", str(tmp_path / "run"), "--overwrite", "--max-steps", "1"])
    assert (tmp_path / "run" / "checkpoint.pt").is_symlink() and common.load_checkpoint(tmp_path / "disk" / "c.pt")[
        "step"
    ] == 1


@pytest.mark.parametrize("how", ["C8 expanded", "C8 storage"])
def test_C8_a_small_file_that_claims_much_is_refused_before_it_is_allocated(how, tmp_path, capsys, monkeypatch):
    evil = state(n=3)
    if how.endswith("expanded"):
        evil["backbone_state"]["w"] = torch.zeros(1).expand(10**12)
        torch.save(evil, tmp_path / "evil.pt")
    else:  # the storage's length stands in the pickle
        evil["backbone_state"]["w"] = torch.zeros(70_000)
        torch.save(evil, tmp_path / "good.pt")
        import zipfile

        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / "evil.pt", "w") as new:
            for item in old.infolist():
                data = old.read(item)
                if item.filename.endswith("data.pkl"):
                    data = data.replace((70_000).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little"))
                new.writestr(item.filename, data)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (loads.append(k["map_location"]), load(*a, **k))[1])
    refused(capsys, lambda: common.load_checkpoint(tmp_path / "evil.pt"), "evil.pt", "damaged")
    assert loads == ["meta"]


# ---- signals ----------------------------------------------------------------------------------------


def stopped(tiny, out, number, before=lambda: None, at=2):
    """The exit code of a run that gets the signal in its step `at`."""
    forward, seen = ser.Base.forward, []

    def act():
        before()

        def interrupted(*a, **k):
            seen.append(1)
            if len(seen) == at:
                os.kill(os.getpid(), number)
            return forward(*a, **k)

        ser.Base.forward = interrupted
        ser.main([*tiny, "--out", str(out)])

    return in_child(act)


def test_S1_sighup_saves_as_sigterm_does(tiny, tmp_path):
    assert stopped(tiny, tmp_path / "a", signal.SIGHUP) == 129
    assert common.load_checkpoint(tmp_path / "a" / "checkpoint.pt")["step"] == 2
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert stopped(tiny, tmp_path / "b", signal.SIGHUP, ignore) == 0
    assert common.load_checkpoint(tmp_path / "b" / "checkpoint.pt")["step"] == 6


def test_S2_a_second_sigint_ends_at_once(tiny, tmp_path):
    def twice():
        kill = os.kill
        os.kill = lambda pid, s: (kill(pid, s), kill(pid, s))

    assert stopped(tiny, tmp_path, signal.SIGINT, twice) == 130 and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "where, code, step",
    [
        ("building", -signal.SIGTERM, None),
        ("saving", 143, 2),
        ("saving at the end", 143, 6),
        ("scoring", -signal.SIGTERM, 6),
    ],
)
def test_S4_a_sigterm_at_another_moment_leaves_whole_files(where, code, step, tiny, tmp_path):
    """Before the first step and after the last one nothing needs saving; a save is finished, and the run ends at the
    next step."""

    def act():
        module, name = dict(building=(ser, "build"), saving=(os, "replace"), scoring=(common, "knn_accuracy"))[
            where.split()[0]
        ]
        original = getattr(module, name)

        def interrupted(*a, **k):
            if "saving" not in where or str(a[1]).endswith("checkpoint.pt"):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*a, **k)

        setattr(module, name, interrupted)
        ser.main([*tiny, "--out", str(tmp_path), "--save-every", "1" if where == "saving" else "9"])

    assert in_child(act) == code
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == step if step else not any(tmp_path.iterdir())
    assert not list(tmp_path.glob("*.tmp"))


def with_fault(argv, rank, step, fault):
    """One rank of ser.py, where the losses of rank `rank` go through `fault` in one step -> (exit code, its error
    lines)."""
    import torch.distributed as dist

    forward, seen = ser.Base.forward, []

    def faulty(*a, **k):
        out, y = forward(*a, **k)
        seen.append(1)
        return fault(out) if dist.get_rank() == rank and len(seen) == step + 1 else out, y

    ser.Base.forward = faulty
    return with_own(argv, [[], []])


def test_S5_a_signal_to_one_rank_stops_all_at_the_same_step(tiny, tmp_path):
    (code, lines), (other, silent) = on_ranks(
        2,
        tmp_path,
        with_fault,
        [*tiny, "--out", str(tmp_path / "run")],
        1,
        2,
        lambda out: os.kill(os.getpid(), signal.SIGTERM) or out,
    )
    assert code == other == 143 and "stopped by SIGTERM after step 3" in lines[0]
    assert not silent  # rank 0 speaks for all
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3


def test_S6_when_a_rank_dies_the_others_end_and_the_checkpoint_stands(tiny, tmp_path, capfd):
    import torch.distributed as dist

    def act(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=rank, world_size=2)
        time.sleep = lambda s: None  # torchrun would end this rank meanwhile
        argv = [*tiny, "--out", str(tmp_path / "run"), "--save-every", "1"]
        forward, seen = ser.Base.forward, []
        ser.Base.forward = lambda *a, **k: (
            seen.append(1),
            os.kill(os.getpid(), signal.SIGKILL) if rank == 1 and len(seen) == 4 else None,
            forward(*a, **k),
        )[2]
        common.command(lambda: ser.main(argv))

    begin, doomed = time.monotonic(), os.fork()
    if doomed == 0:
        try:
            act(1)
        finally:
            os._exit(1)
    assert in_child(lambda: act(0)) == 1 and os.WTERMSIG(os.waitpid(doomed, 0)[1]) == signal.SIGKILL
    err = capfd.readouterr().err
    assert err.count("error:") == 1 and "another process of the group ended" in err and "Traceback" not in err
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3 and time.monotonic() - begin < 30


def test_S13_memory_that_runs_out_within_a_step_leaves_the_checkpoint_before_it(tiny, tmp_path, capfd):
    def act():
        forward, seen = ser.Base.forward, []

        def full(*a, **k):
            seen.append(1)
            if len(seen) == 3:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return forward(*a, **k)

        ser.Base.forward = full
        common.command(lambda: ser.main([*tiny, "--out", str(tmp_path), "--save-every", "1"]))

    assert in_child(act) == 1
    err = capfd.readouterr().err
    assert err.count("error:") == 1 and "--batch-size" in err and "Traceback" not in err
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_R10_sigterm_while_the_loader_hangs_saves(tiny, tmp_path):
    def act():
        item = common.Loader.__getitem__

        def hangs(self, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return item(self, step)

        common.Loader.__getitem__ = hangs
        ser.main([*tiny, "--out", str(tmp_path)])

    begin = time.monotonic()
    assert in_child(act) == 143 and time.monotonic() - begin < 30
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_S8_a_run_whose_torchrun_is_gone_saves_and_ends(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parents = iter([7, 7, 7, *[1] * 9])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path)])
    assert end.value.code == 143 and common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_D11_a_killed_worker_is_one_line_and_saves_nothing_torn(tiny, tmp_path, capfd):
    def act():
        item = common.Loader.__getitem__
        common.Loader.__getitem__ = lambda self, step: (
            os.kill(os.getpid(), signal.SIGKILL) if step == 3 else item(self, step)
        )
        common.command(lambda: ser.main([*tiny, "--out", str(tmp_path), "--workers", "1", "--save-every", "1"]))

    assert in_child(act) == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.count("error:") == 1 and "--workers" in err
    c = common.load_checkpoint(tmp_path / "checkpoint.pt")
    assert c["train_state"]["optimizer"]["state"][0]["step"] == c["step"] <= 3


def test_F11_shared_memory_that_is_too_small_is_found_before_workers_start(tiny, tmp_path, monkeypatch, capsys):
    real = os.statvfs
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: (
            type("", (), dict(f_bavail=4, f_bfree=4, f_blocks=4, f_frsize=4096)) if path == "/dev/shm" else real(path)
        ),
    )
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path), "--workers", "2"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "--workers 2" in line and "--shm-size" in line


@pytest.mark.parametrize(
    "error, words",
    [
        (KeyboardInterrupt(), "SIGINT"),
        (MemoryError(), "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on the GPU: lower --batch-size"),
        (RuntimeError("CUDA error: out of memory"), "out of memory on the GPU: lower --batch-size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"
            ),
            "another process",
        ),
        (
            RuntimeError("NCCL error in: NCCLUtils.cpp, remote process exited\nncclRemoteError: A call"),
            "another process",
        ),
        (RuntimeError("NCCL error\nncclSystemError: x Last error: cannot write /dev/shm/nccl-7"), "/dev/shm/nccl-7"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "--compile"),
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx"),
            "--compile",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--workers"),
        (OSError(28, "No space left on device", "x/y"), "x/y"),
    ],
)
def test_S13_what_the_machine_does_is_one_line(error, words, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(SystemExit) as end:
        common.command(main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1) and len(lines) == 1 and words in lines[0]
    )
    with pytest.raises(RuntimeError):  # a fault of the code keeps its traceback
        common.command(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("error, code", [(SystemExit(3), 3), (KeyError("x"), 1), (KeyboardInterrupt(), 130), (None, 9)])
def test_S12_a_process_that_fails_does_not_wait_for_the_others_at_its_exit(error, code, monkeypatch):
    """NCCL destroys a group together with all ranks; exit code 9 stands for its wait."""
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def main():
        if error is not None:
            raise error

    def act():
        atexit.register(os._exit, 9)
        sys.stderr = open(os.devnull, "w")
        with contextlib.suppress(BaseException):
            common.command(main)
        atexit._run_exitfuncs()

    assert in_child(act) == code


@pytest.mark.parametrize("sink", ["R7 a reader that left", "R7 a full disk"])
def test_R7_nobody_needs_to_read_what_a_run_prints(sink, tiny, tmp_path):
    def act():
        if sink.endswith("left"):
            read, write = os.pipe()
            os.close(read)
        else:
            write = os.open("/dev/full", os.O_WRONLY)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        common.command(lambda: ser.main([*tiny, "--out", str(tmp_path), "--max-steps", "2"]))
        sys.stdout.flush()

    assert in_child(act) == 0 and common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def traced(argv, flags):
    """One rank of ser.py -> the collectives that it took part in, in order."""
    import torch.distributed as dist

    calls = []
    for name in ("all_reduce", "all_gather", "broadcast_object_list", "all_gather_object", "barrier", "broadcast"):

        def record(call, name, *a, **k):
            calls.append((name, *(tuple(v.shape) for v in a if isinstance(v, torch.Tensor))))
            return call(*a, **k)

        setattr(dist, name, common.partial(record, getattr(dist, name), name))
    code, lines = with_own(argv, flags)
    return code, lines, calls


def test_S7_all_ranks_take_part_in_the_same_collectives(tiny, tmp_path):
    """Through start, steps, saves, logs and the score at the end; also where one rank alone fails to save."""
    argv = [*tiny, "--max-steps", "3", "--save-every", "1", "--log-every", "2"]
    (code, _, first), (_, _, second) = on_ranks(2, tmp_path, traced, [*argv, "--out", str(tmp_path / "run")], [[], []])
    assert code == 0 and first == second and len(first) > 50


def test_S12_a_damaged_image_on_one_rank_is_one_line(folder, tiny, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "left" / "03.png").write_bytes(b"\x89PNG nothing more")
    argv = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node=2 ser.py".split(),
        *with_data(tiny, tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "ser.py: error:" in line]
    assert (
        done.returncode == 1 and len(lines) == 1 and "03.png" in lines[0] and 'common.py", line' not in done.stderr
    ), done.stderr


def test_A6_A7_an_untrained_encoder_needs_no_full_batch(tiny, tmp_path):
    ser.main([*tiny, "--epochs", "0", "--warmup-epochs", "0", "--batch-size", "2048", "--out", str(tmp_path)])
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


# ---- the environment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, words",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"RANK": "3"}, "RANK=3"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=2"),
        ({"RANK": ""}, "RANK=''"),
    ],
)
def test_S10_a_half_set_or_stray_environment_is_one_line(env, words, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in refused(capsys, lambda: common.start("cpu"))


def test_S9_one_process_opens_no_port_and_no_port_is_fixed(tiny, tmp_path):
    def sockets():
        links = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        return {link for link in links if link.startswith("socket:")}

    before = sockets()
    ser.main([*tiny, "--epochs", "0", "--warmup-epochs", "0", "--out", str(tmp_path)])
    assert sockets() == before and not common.dist.is_initialized()
    for source in ROOT.glob("*.py"):
        assert not re.search(r"tcp://|init_method|MASTER_PORT[\"']\] *=|\b29\d\d\d\b", source.read_text()), source


@pytest.fixture
def four(monkeypatch):
    """The environment of the first of four processes, and what `start` then asks torch for."""
    asked = {}
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4, MASTER_ADDR="localhost", MASTER_PORT=1
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        common.dist,
        "init_process_group",
        lambda backend, timeout: asked.update(backend=backend, minutes=timeout.total_seconds() / 60),
    )
    monkeypatch.setattr(common.atexit, "register", lambda act: asked.update(at_exit=act))
    return asked


def test_S7_S14_a_group_waits_for_minutes_and_is_destroyed_at_exit(four):
    assert common.start("cpu") == torch.device("cpu")
    assert four == dict(backend="gloo", minutes=10, at_exit=common.dist.destroy_process_group)
    eval_probe.Evaluation().start("cpu")
    assert four["minutes"] == 180  # rank 0 trains probes alone


def machine(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_S11_more_processes_than_gpus_are_one_line(four, monkeypatch, capsys):
    machine(monkeypatch, 2, False)
    refused(capsys, lambda: common.start("auto"), "--nproc_per_node 4", "2 GPUs")
    machine(monkeypatch, 4, False)
    assert common.start("auto") == torch.device("cuda", 0) and four["backend"] == "cpu:gloo,cuda:nccl"


def test_A9_a_device_is_chosen_or_refused_by_name(monkeypatch, capsys):
    for cuda, mps, device in ((1, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")):
        machine(monkeypatch, cuda, mps)
        assert str(common.start("auto")) == device and str(common.start("cpu")) == "cpu"
    for device in ("cuda", "mps"):
        refused(capsys, lambda device=device: common.start(device), f"--device {device}", "--device auto")


def test_A9_several_processes_do_not_share_mps(four, monkeypatch, capsys):
    machine(monkeypatch, 0, True)
    assert "--device cpu" in refused(capsys, lambda: common.start("auto"), "--device mps")


# ---- what is not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["C11 a weight", "T3 running statistics"])
def test_C11_a_head_that_is_not_finite_is_not_saved_over_one_that_is(what, tiny, tmp_path, capsys, monkeypatch):
    update, calls = ser.update_teacher, []

    def ruin(model, m):
        update(model, m)
        calls.append(1)
        if len(calls) == 3:
            (model.equi.projector[0].weight.data[0] if "weight" in what else model.predictor[-1].running_var)[0] = (
                math.nan
            )

    monkeypatch.setattr(ser, "update_teacher", ruin)
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path), "--save-every", "1"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "not finite after step 2" in err and f"last good state is in {tmp_path}" in err
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


def test_T1_a_loss_that_is_not_finite_on_one_rank_stops_all_at_the_same_step(tiny, tmp_path):
    for code, lines in on_ranks(
        2,
        tmp_path,
        with_fault,
        [*tiny, "--out", str(tmp_path / "run"), "--save-every", "1"],
        1,
        2,
        lambda out: out | dict(loss=out["loss"] * math.nan),
    ):
        assert code == 1 and "not finite at step 2" in lines[0] and "the last good state is in" in lines[0]
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2


def test_R9_where_nothing_was_saved_nothing_is_promised(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ser.main([*tiny, "--out", str(tmp_path), "--lr", "1e30"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and "nothing was saved yet" in err and "last good state" not in err


def test_F12_a_monitor_ends_no_run(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("did not converge")

    nan = common.collapse_monitors(torch.full((10, 4), math.nan))
    assert nan == dict(feature_std=None, effective_rank=None) and json.loads(json.dumps(nan, allow_nan=False)) == nan
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert common.collapse_monitors(torch.ones(10, 4)) == dict(
        feature_std=pytest.approx(0, abs=1e-6), effective_rank=None
    )


# ---- what a step is made of -------------------------------------------------------------------------


def test_N8_every_step_draws_its_own_augmentations(folder, tiny):
    args = common.parse(ser.Args, ser.values_in_force, tiny)
    ser.check(args)
    policies = ser.make_policies(args)
    draw = common.partial(ser.draw_views, args, policies)
    loader = common.Loader(
        common.load_data("imagefolder", folder, "train", 16), policies, draw, args, torch.device("cpu")
    )
    tops = [loader[step][0]["1"][1]["top"] for step in range(4)]
    assert all(not torch.equal(tops[i], tops[j]) for i in range(4) for j in range(i))


def test_N7_drop_path_resumes_to_the_bits(tiny, tmp_path):
    """Its draws come from the global generator, which is reseeded every step."""
    argv = [*tiny, "--drop-path", "0.5"]
    ser.main([*argv, "--out", str(tmp_path / "whole")])
    ser.main([*argv, "--out", str(tmp_path / "part"), "--max-steps", "3"])
    torch.rand(17)  # whatever happened in between
    ser.main([*argv, "--out", str(tmp_path / "part"), "--resume"])
    assert same(*(content(tmp_path / name / "checkpoint.pt") for name in ("whole", "part")))


def test_an_export_whose_features_timm_does_not_give_is_not_written(tmp_path, monkeypatch):
    backbone = common.make_backbone(
        "vit_pico", *common.CIFAR10, img_size=16, patch_size=4, cls_layer=0, pos="sincos"
    ).eval()
    forward = type(backbone).forward
    monkeypatch.setattr(type(backbone), "forward", lambda self, x: forward(self, x) + 1e-3)
    line = common.export_backbone(tmp_path / "x.safetensors", backbone)
    assert "features differ" in line and not (tmp_path / "x.safetensors").exists()


# ---- every flag once --------------------------------------------------------------------------------

# Script, flags, and whether the variant is compiled as well: one for each way in which a script calls its encoder.
VARIANTS = [
    ("ser", "--base mocov3 --equi ser", True),
    ("ser", "--base dino --equi ser", True),
    ("ser", "--base barlow --equi none", False),
    *(("ser", f"--base mocov3 --equi {equi}", equi == "essl") for equi in ("augself", "stl", "equimod", "essl")),
    *(("recon_xattn", f"--objective {name}", name == "recon") for name in ("recon", "sie", "vicreg", "supervised")),
    *(
        ("ciper", f"--objective {name}", name in ("ciper", "essl"))
        for name in ("ciper", "simclr", "predictive", "essl")
    ),
    ("clever", "--base dino --equi clever", True),
    ("clever", "--base dino --equi none", False),
    ("clever", "--base simsiam --equi ddcl", True),
    ("clever", "--base simsiam --equi none", False),
]


@pytest.mark.parametrize("script, flags, compiles", VARIANTS, ids=[f"F21 {v[0]} {v[1]}" for v in VARIANTS])
def test_C10_N14_T7_F21_every_variant_trains_all_its_parameters_and_compiles(
    script, flags, compiles, folder, tmp_path, monkeypatch, request
):
    """Each trainable parameter is in one group of the optimiser and has a gradient. DINO decays matrices alone, all
    others everything. Compiled with dynamo's eager backend: the losses of plain training, to rounding, and no prefix of
    the compiler is saved."""
    models = []
    monkeypatch.setattr(common, "distributed", lambda model: models.append(model) or model)

    def stepped(optimizer, *_):
        grouped = [(p, group["weight_decay"] > 0) for group in optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in models[-1].parameters() if p.requires_grad}
        assert {id(p) for p, _ in grouped} >= trained and len({id(p) for p, _ in grouped}) == len(grouped) > 20
        assert all(p.grad is not None for p, _ in grouped if p.requires_grad)
        assert all(decays == ("dino" not in flags or p.ndim > 1) for p, decays in grouped)

    request.addfinalizer(register_optimizer_step_pre_hook(stepped).remove)
    monkeypatch.setattr(torch, "compile", common.partial(torch.compile, backend="eager"))
    monkeypatch.setitem(common.VITS, "vit_pico", common.VITS["vit_pico"] | dict(depth=2))  # tracing takes its time
    shared = f"--data imagefolder --data-dir {folder} --recipe cifar10 --img-size 16 --batch-size 12 --epochs 2"
    shared += " --warmup-epochs 0 --max-steps 1 --workers 0 --device cpu"
    shared += " --arch resnet_pico" if script == "ciper" else " --arch vit_pico --patch-size 4"
    small = dict(
        ser=f"--proj-hidden 16 --prototypes 16 --local-size 8 --equi-layer {int('--equi ser' in flags)}",
        recon_xattn="--neck 16 --embed-dim 8",
        ciper="--proj-hidden 16",
        clever="--local-size 8 --head-dim 8 --head-dim-equi 8",
    )
    argv = f"{shared} {small[script]} {flags}".split()
    SCRIPTS[script].main([*argv, "--out", str(tmp_path / "plain")])
    assert len(models) == 1
    if not compiles:
        return
    torch._dynamo.reset()
    SCRIPTS[script].main([*argv, "--out", str(tmp_path / "compiled"), "--compile"])
    plain, compiled = (steps(tmp_path / name)[0] for name in ("plain", "compiled"))
    assert compiled["loss"] == pytest.approx(plain["loss"], abs=1e-4) and len(models) == 2
    plain, compiled = (content(tmp_path / name / "checkpoint.pt") for name in ("plain", "compiled"))
    for part in (lambda c: c["backbone_state"], lambda c: c["train_state"]["heads"]):
        assert part(plain).keys() == part(compiled).keys()


@pytest.mark.usefixtures("pico")
def test_F20_a_copied_and_renamed_script_trains_and_archives_itself(tiny, tmp_path):
    shutil.copy(ROOT / "ser.py", tmp_path / "mine.py")
    shutil.copy(ROOT / "common.py", tmp_path)
    run = [sys.executable, str(tmp_path / "mine.py"), *tiny, "--max-steps", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "mine.py").read_text() == (ROOT / "ser.py").read_text() and (
        tmp_path / "run" / "common.py"
    ).exists()
    assert common.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["method"] == "mine"
    (_, scores), *_ = eval_probe.main(
        [str(tmp_path / "run" / "checkpoint.pt"), "--tasks", "knn", "--workers", "0", "--device", "cpu"]
    )
    assert scores["knn"] > 0


@pytest.mark.parametrize("name", ["hostile", "os", "../hostile", "tests.hostile", ""])
def test_C7_loading_a_checkpoint_imports_none_but_the_four_methods(name, saved, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    c = common.load_checkpoint(saved / "checkpoint.pt") | dict(method=name)
    common.save_checkpoint(tmp_path / "checkpoint.pt", c)
    imported = []
    monkeypatch.setattr(common.importlib, "import_module", imported.append)
    common.load_backbone(tmp_path / "checkpoint.pt")
    assert not imported and not (tmp_path / "marker").exists()
    common.save_checkpoint(tmp_path / "checkpoint.pt", c | dict(method="clever"))
    common.load_backbone(tmp_path / "checkpoint.pt")
    assert imported == ["clever"]


@pytest.mark.parametrize("script", [*SCRIPTS, "eval_probe", "eval_robustness"])
def test_ctrl_c_while_libraries_load_ends_in_one_line(script, tmp_path):
    # a torch that sends SIGINT to the process that imports it
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    run = subprocess.run(
        [sys.executable, ROOT / f"{script}.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert run.returncode == 130 and run.stderr == f"{script}.py: error: stopped by SIGINT\n"
