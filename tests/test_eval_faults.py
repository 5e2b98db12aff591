"""What goes wrong around an evaluation: checkpoints, caches, signals, workers. Ids name the fault, as in a catalogue
of reliability."""

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import common
import eval_probe
import eval_robustness
import ser

import pytest
import torch
from PIL import Image
from test_cli import expect_mistake
from test_distributed import on_ranks

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--linear-epochs", "2", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def untrained(tiny, tmp_path_factory):
    """A checkpoint and the export of its encoder."""
    out = tmp_path_factory.mktemp("untrained") / "run"
    ser.main([*tiny, "--epochs", "0", "--equi", "none", "--out", str(out)])
    return out


@pytest.fixture
def run(untrained, tmp_path):
    """A copy of it: what is written beside it stays there."""
    shutil.copytree(untrained, tmp_path / "run")
    return tmp_path / "run"


def records(run):
    return (
        [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
        if (run / "eval.jsonl").exists()
        else []
    )


def ends(code, main, argv, capsys):
    """main(argv) ends with a code and one line on stderr (beside those that say what was done) -> that line, stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if "error:" in line or "stopped by" in line]
    assert end.value.code == code and "Traceback" not in err and len(lines) == 1, err
    return lines[0], out


# ---- what was finished is kept ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [RuntimeError("boom"), KeyError("boom"), OSError(errno.EIO, "boom"), SystemExit(2)],
    ids=["R6 RuntimeError", "R6 KeyError", "R6 OSError", "R6 a mistake"],
)
def test_R6_a_task_that_fails_costs_one_line_and_the_exit_code(error, run, capsys, monkeypatch):
    def fails(case):
        if isinstance(error, SystemExit):
            common.die("boom")
        raise error

    monkeypatch.setitem(eval_probe.TASKS, "mlp", fails)
    line, out = ends(
        1, eval_probe.main, [str(run / "checkpoint.pt"), "--tasks", "knn", "mlp", "linear", *QUICK], capsys
    )
    assert "boom" in line and out.splitlines()[0].split() == ["n", "knn", "linear"]  # the one after it too
    assert [list(r["results"]) for r in records(run)] == [["knn"], ["linear"]]


@pytest.mark.parametrize("main", [eval_probe.main, eval_robustness.main], ids=["R6 eval_probe", "R6 eval_robustness"])
@pytest.mark.parametrize("bad", ["damaged", "data that are gone"])
def test_R6_one_bad_checkpoint_of_three_costs_its_own_row(main, bad, run, tmp_path, capsys):
    for name in "bc":
        shutil.copytree(run, tmp_path / name)
    state = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)
    state["args"]["data_dir"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "b" / "checkpoint.pt")
    if bad == "damaged":
        (tmp_path / "b" / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-1000])
    paths = [str(tmp_path / name / "checkpoint.pt") for name in ("run", "b", "c")]
    what = ["--tasks", "knn"] if main is eval_probe.main else ["--suite", "augmentations", "--passes", "1"]
    line, out = ends(1, main, [*paths, *what, *QUICK], capsys)
    assert ("damaged" if bad == "damaged" else "gone") in line and len(out.splitlines()) == 3
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [["run", "1"], ["c", "1"]]
    assert len(records(run)) == len(records(tmp_path / "c")) == 1 and not records(tmp_path / "b")
    line, out = ends(2, main, [paths[1], *what, *QUICK], capsys)  # where it is the only one it is a mistake of the call
    assert not out


def on_two_ranks(paths, broken):
    """An evaluation of several checkpoints on this rank, in which something fails -> its exit code."""
    rank = common.rank()
    knn, load = eval_probe.TASKS["knn"], eval_probe.load

    def fails(case):
        if broken == "a mistake":
            common.die("boom")
        return 1 / 0 if rank == 0 else knn(case)

    def load_if(path):
        return common.die("boom", alone=True) if rank == 1 and path == paths[0] else load(path)

    if broken == "a checkpoint on one rank":
        eval_probe.load = load_if
    else:
        eval_probe.TASKS["mlp"] = fails
    try:
        eval_probe.main([*paths, "--tasks", "knn", "mlp", "equivariance", "--mlp-epochs", "1", *QUICK])
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    "broken, kept",
    [("a mistake", [2, 2]), ("a checkpoint on one rank", [0, 3]), ("rank 0 alone", [1, 0])],
    ids=["R6 a mistake on 2 ranks", "R6 a checkpoint on 1 of 2", "R6 rank 0 of 2"],
)
def test_R6_ranks_go_on_together_or_end(broken, kept, run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    paths = [str(p / "checkpoint.pt") for p in (run, tmp_path / "other")]
    if broken == "rank 0 alone":  # the other one waits for it, and torchrun ends it
        (code, _) = on_ranks_but_one(tmp_path, on_two_ranks, paths, broken)
        assert code == 1
    else:
        assert on_ranks(2, tmp_path, on_two_ranks, paths, broken) == [1, 1]
    assert [len(records(p)) for p in (run, tmp_path / "other")] == kept


def on_ranks_but_one(tmp_path, fn, *args):
    """fn(*args) on two forked gloo processes -> (what rank 0 gives, the exit code of rank 1, ended by rank 0's end)."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            common.dist.init_process_group(
                "gloo", init_method=f"file://{tmp_path / 'rendezvous-one'}", rank=rank, world_size=2
            )
            os._exit(fn(*args))
        children.append(child)
    code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    return code, os.waitstatus_to_exitcode(os.waitpid(children[1], 0)[1])


def test_R6_a_line_comes_from_rank_0_even_before_the_ranks_have_met(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        eval_probe.say(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"


@pytest.mark.parametrize("main", [eval_probe.main, eval_robustness.main], ids=["R6 eval_probe", "R6 eval_robustness"])
@pytest.mark.parametrize("bad", ["R6 damaged", "R6 data that are gone"])
def test_R6_a_bad_checkpoint_is_found_before_anything_is_computed(main, bad, run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "last")
    path = tmp_path / "last" / "checkpoint.pt"
    if "damaged" in bad:
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        state = torch.load(path, weights_only=True)
        state["args"]["data_dir"] = str(tmp_path / "gone")
        torch.save(state, path)
    features, errors = common.features, []

    def first_features(*args, **how):
        errors.append("error:" in capsys.readouterr().err)
        return features(*args, **how)

    monkeypatch.setattr(common, "features", first_features)
    what = ["--tasks", "knn"] if main is eval_probe.main else ["--suite", "augmentations", "--passes", "1"]
    with pytest.raises(SystemExit):
        main([str(run / "checkpoint.pt"), str(path), *what, *QUICK])
    assert errors[0] and len(records(run)) == 1


@pytest.mark.parametrize("part", [["inv"], ["all", "inv"], ["all", "equi"], ["inv", "equi"]], ids=" ".join)
@pytest.mark.parametrize("main", [eval_probe.main, eval_robustness.main], ids=["C9 eval_probe", "C9 eval_robustness"])
def test_C9_parts_of_encoders_that_do_not_split_are_one_line(main, part, run, capsys, monkeypatch):
    monkeypatch.setattr(common, "features", lambda *a, **k: pytest.fail("something was computed"))
    expect_mistake(capsys, main, [str(run / "checkpoint.pt"), "--part", *part, *QUICK], f"--part {' '.join(part)}")


def test_R6_a_mean_over_fewer_says_so():
    rows = [("a", dict(knn=1.0, mlp=1.0)), ("a", dict(knn=2.0))]
    assert "1.50 ± 0.71" in eval_probe.table(rows) and "1.00 (1 of 2)" in eval_probe.table(rows)
    assert json.loads(eval_probe.table(rows, "json"))["a"]["mlp"]["n"] == 1


def test_R6_a_suite_that_fails_leaves_the_others(run, capsys, monkeypatch):
    monkeypatch.setitem(eval_robustness.SUITES, "perturbations", lambda *a: 1 / 0)
    line, out = ends(
        1,
        eval_robustness.main,
        [str(run / "checkpoint.pt"), "--suite", "perturbations", "augmentations", "--passes", "1", *QUICK],
        capsys,
    )
    assert "perturbations: ZeroDivisionError" in line and "CJ+Ro" in out
    assert [r["protocol"]["suite"] for r in records(run)] == ["augmentations"]


SIGNALS = dict(
    argnames="number",
    argvalues=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
    ids=["S4 SIGINT 130", "S4 SIGTERM 143", "S4 SIGHUP 129"],
)


@pytest.mark.parametrize(**SIGNALS)
@pytest.mark.parametrize("where", ["k-NN", "features", "reading the checkpoint", "arguments"])
def test_R6_a_signal_ends_a_probe_in_one_line_with_what_was_finished(number, where, run, capsys, monkeypatch):
    module, name = dict(
        [
            ("k-NN", (common, "knn")),
            ("features", (common, "features")),
            ("reading the checkpoint", (common, "load_checkpoint")),
            ("arguments", (common, "parse")),
        ]
    )[where]
    fn = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (os.kill(os.getpid(), number), fn(*a, **k))[1])
    before = [signal.getsignal(s) for s in eval_probe.STOPPING]
    tasks = ["equivariance", "knn"] if where == "features" else ["linear", "knn"]
    line, out = ends(128 + number, eval_probe.main, [str(run / "checkpoint.pt"), "--tasks", *tasks, *QUICK], capsys)
    assert number.name in line and [signal.getsignal(s) for s in eval_probe.STOPPING] == before
    assert ("linear" in out) == (where == "k-NN") == (len(records(run)) == 1)


@pytest.mark.parametrize(**SIGNALS)
def test_R6_a_signal_inside_a_suite_prints_what_it_has_counted(number, run, capsys, monkeypatch):
    corrupt, calls = eval_robustness.corrupt, []

    def late(x, name, *a):
        calls.append(name)
        if name == "fog":
            os.kill(os.getpid(), number)
        return corrupt(x, name, *a)

    monkeypatch.setattr(eval_robustness, "corrupt", late)
    line, out = ends(
        128 + number,
        eval_robustness.main,
        [str(run / "checkpoint.pt"), "--suite", "augmentations", "corruptions", "--passes", "1", *QUICK],
        capsys,
    )
    assert number.name in line and [r["protocol"]["suite"] for r in records(run)] == ["augmentations"]
    assert "CJ+Ro" in out and "defocus_blur" in out and "clean" in out
    assert "fog" not in out  # no image of it was shown


def test_R6_a_signal_that_nohup_has_switched_off_stays_off(run, capsys, monkeypatch):
    def knn_under(number):
        monkeypatch.setitem(eval_probe.TASKS, "knn", lambda case: (os.kill(os.getpid(), number), ({"knn": 1.0}, {}))[1])
        return [str(run / "checkpoint.pt"), "--tasks", "knn", *QUICK]

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert eval_probe.main(knn_under(signal.SIGHUP))[0][1] == {"knn": 1.0}
        ends(130, eval_probe.main, knn_under(signal.SIGINT), capsys)  # another signal leaves it off too
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory on the GPU"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory on the GPU"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 10 bytes"
            ),
            "out of memory",
        ),
    ],
    ids=["S13 MemoryError", "S13 GPU", "S13 MPS", "S13 CPU"],
)
@pytest.mark.parametrize("main", [eval_probe.main, eval_robustness.main])
def test_S13_out_of_memory_is_one_line_that_says_what_to_lower(error, words, main, run, capsys, monkeypatch):
    monkeypatch.setattr(common.ViT, "last_blocks", lambda self, x: (_ for _ in ()).throw(error))
    line, _ = ends(
        1,
        main,
        [
            str(run / "checkpoint.pt"),
            *(["--tasks", "linear"] if main is eval_probe.main else ["--suite", "augmentations"]),
            *QUICK,
        ],
        capsys,
    )
    assert words in line and "--device" in line and "--batch-size" not in line
    assert "lower --batch-size, " in eval_probe.one_line(error, "--batch-size")  # of eval_dense.py, which has it
    assert ("--workers" in line) == ("GPU" not in words)


@pytest.mark.parametrize("sink", ["R7 a full disk", "R7 a reader that left"])
def test_R7_nobody_needs_to_read_the_table(sink, run, capsys, monkeypatch):
    """Numbers are in eval.jsonl whatever becomes of stdout."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w") if "disk" in sink else os.fdopen(write, "w"))
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    common.command(lambda: eval_probe.main([str(run / "checkpoint.pt"), "--tasks", "knn", *QUICK]))
    sys.stdout.close()
    assert len(records(run)) == 1


def test_V7_a_table_on_an_ascii_terminal_and_json_without_nan(run, capsys, monkeypatch):
    rows = [("é", {"linear ±90°": 50.0}), ("é", {"linear ±90°": math.nan})]
    for form in ("table", "markdown", "csv", "json"):
        eval_probe.table(rows, form, "ascii").encode("ascii")
    lines = eval_probe.table([("a", dict(knn=1.0)), ("a", dict(knn=2.0))], encoding="ascii").splitlines()
    assert "1.50 +- 0.71" in lines[1] and len(lines[0]) == len(lines[1])
    assert json.loads(eval_probe.table(rows, "json"), parse_constant=lambda token: pytest.fail(token))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setitem(eval_probe.TASKS, "knn", lambda case: ({"knn": math.inf}, dict(odd=[math.nan])))
    shutil.copytree(run, run.with_name("other"))
    eval_probe.main([str(p / "checkpoint.pt") for p in (run, run.with_name("other"))] + ["--tasks", "knn", *QUICK])
    line = (run / "eval.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda token: pytest.fail(token))
    assert record["results"] == {"knn": None} and line.isascii()


def test_F10_a_record_begins_on_a_line_of_its_own(run):
    (run / "eval.jsonl").write_text('{"results": {"kn')  # a disk was full for a moment
    eval_probe.main([str(run / "checkpoint.pt"), "--tasks", "knn", *QUICK])
    torn, line = (run / "eval.jsonl").read_text().splitlines()
    assert json.loads(line)["results"].keys() == {"knn"}


# ---- caches and checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
    ids=["F13 OSError", "F13 RuntimeError"],
)
def test_F13_features_that_cannot_be_kept_cost_one_line(error, run, tmp_path, capsys, monkeypatch):
    def full(state, file, *a):
        if isinstance(file, (str, Path)) or not isinstance(file, io.BytesIO):
            file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    results = eval_probe.main(
        [str(run / "checkpoint.pt"), "--tasks", "knn", "linear", "--cache-dir", str(tmp_path / "cache"), *QUICK]
    )
    out, err = capsys.readouterr()
    assert {"knn", "linear"} == set(results[0][1]) and "knn" in out and "--cache-dir" in err
    assert not list((tmp_path / "cache").iterdir())


def test_F14_evaluations_at_once_share_no_temporary_name(run, tmp_path, monkeypatch):
    """While one keeps its features another comes from beginning to end."""
    argv = [str(run / "checkpoint.pt"), "--tasks", "knn", "--cache-dir", str(tmp_path / "cache"), *QUICK]
    replace = os.replace
    again = [1]

    def late(source, target):
        if again and "features-" in str(target):
            again.pop()
            second.extend(eval_probe.main(argv))
        return replace(source, target)

    second = []
    monkeypatch.setattr(os, "replace", late)
    first = eval_probe.main(argv)
    assert first == second and len(list((tmp_path / "cache").iterdir())) == 2
    probe, unlink = tmp_path / "cache" / ".writable-0", Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda self, *a, **k: (unlink(probe, missing_ok=True), unlink(self, *a, **k))[1]
    )  # the other one was quicker
    assert eval_probe.main(argv) == first


def test_R3_a_checkpoint_is_read_once_and_named_by_what_was_read(run, tmp_path, monkeypatch):
    """Another one takes its place during the evaluation: its features are not taken for those of the other."""
    old, load, opened = (run / "checkpoint.pt").read_bytes(), common.load_backbone, []
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["backbone_state"] = {k: v + 1 for k, v in state["backbone_state"].items()}

    def replaced(*a):
        out = load(*a)
        torch.save(state, run / "checkpoint.pt")
        return out

    sys.addaudithook(
        lambda event, args: (
            opened.append(args[0])
            if watching and event == "open" and str(args[0]) == str(run / "checkpoint.pt") and args[1] != "wb"
            else None
        )
    )
    watching, argv = [1], [str(run / "checkpoint.pt"), "--tasks", "knn", "--cache-dir", str(tmp_path / "cache"), *QUICK]
    monkeypatch.setattr(common, "load_backbone", replaced)
    first = eval_probe.main(argv)
    watching.clear()
    assert len([p for p in opened if p]) == 1, opened
    assert records(run)[0]["sha256"] == eval_probe.hashlib.sha256(old).hexdigest()
    monkeypatch.setattr(common, "load_backbone", load)
    assert eval_probe.main(argv) == eval_probe.main([a for a in argv if "cache" not in a])
    (run / "checkpoint.pt").write_bytes(old)
    assert eval_probe.main(argv) == first


def test_R3_kept_features_of_another_length_or_another_version_are_not_taken(run, tmp_path, monkeypatch):
    argv = [str(run / "checkpoint.pt"), "--tasks", "knn", "--cache-dir", str(tmp_path / "cache"), *QUICK]
    encoded = []
    features = common.features
    monkeypatch.setattr(common, "features", lambda *a, **k: (encoded.append(1), features(*a, **k))[1])
    first = eval_probe.main(argv)
    for path in (tmp_path / "cache").iterdir():
        torch.save(dict(x=torch.zeros(3, 4)), path)
    assert eval_probe.main(argv) == first and len(encoded) == 4
    source = tmp_path / "common.py"
    source.write_text(Path(common.__file__).read_text() + "\n")
    monkeypatch.setattr(common, "__file__", str(source))
    assert eval_probe.main(argv) == first and len(encoded) == 6


@pytest.mark.parametrize(
    "change, words",
    [("more", "24 and 28 images"), ("another class", "other classes"), ("other names", "file names")],
    ids=["F4 more images", "F4 another class", "F4 other names"],
)
def test_F3_probes_refuse_images_that_the_checkpoint_has_not_seen(change, words, tiny, folder, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    ser.main(
        [
            *tiny[: tiny.index("--data-dir")],
            "--data-dir",
            str(root),
            *tiny[tiny.index("--data-dir") + 2 :],
            *"--epochs 0 --equi none --out".split(),
            str(tmp_path / "run"),
        ]
    )
    argv = [str(tmp_path / "run" / "checkpoint.pt"), "--tasks", "knn", *QUICK]
    shutil.copytree(root, tmp_path / "moved")
    assert eval_probe.main([*argv, "--data-dir", str(tmp_path / "moved")]) == eval_probe.main(argv)
    if change == "more":
        for i in range(4):
            shutil.copy(root / "train" / "left" / "00.png", root / "train" / "left" / f"copy{i}.png")
    elif change == "another class":
        for split in ("train", "test"):
            (root / split / "right").rename(root / split / "wrong")
    else:
        (root / "train" / "left" / "00.png").rename(root / "train" / "left" / "first.png")
    expect_mistake(capsys, eval_probe.main, argv, words, "--data-dir")
    assert {"knn"} == set(eval_probe.main([*argv, "--data-dir", str(root)])[0][1])


# ---- files for timm -------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def resnet():
    import timm

    return {k: v for k, v in timm.create_model("resnet18", num_classes=0).state_dict().items()}


@pytest.mark.parametrize(
    "how",
    [
        "C5 a flipped bit",
        "C4 cut short",
        "C11 NaN",
        "C11 NaN in safetensors",
        "C6 legacy format",
        "C7 pickled code",
        "C8 expanded",
        "C8 deflated",
        "C6 text",
        "C4 safetensors cut short",
    ],
)
def test_R11_weights_for_timm_are_checked_as_ours_are(how, resnet, folder, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / ("w.safetensors" if "safetensors" in how else "w.pt")
    nan = resnet | {"fc.weight": torch.ones(1), "conv1.weight": torch.full_like(resnet["conv1.weight"], math.nan)}
    if "NaN" in how:
        save_file(nan, file) if "safetensors" in how else torch.save(nan, file)
    elif "safetensors" in how:
        save_file(resnet, file)
        file.write_bytes(file.read_bytes()[:-1000])
    elif "legacy" in how:
        torch.save(resnet, file, _use_new_zipfile_serialization=False)
    elif "code" in how:
        torch.save(dict(a=Payload(str(tmp_path / "marker"))), file)
    elif "expanded" in how:
        torch.save(resnet | {"huge": torch.zeros(1).expand(4_000_000_000)}, file)
    elif "text" in how:
        file.write_text("no weights")
    else:
        torch.save(resnet, file)
        content = bytearray(file.read_bytes())
        if "flipped" in how:
            content[len(content) // 2] ^= 16
        file.write_bytes(content[:-1000] if "short" in how else content)
        if "deflated" in how:
            with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
                for name in old.namelist():
                    new.writestr(name, old.read(name))
    argv = [f"timm:resnet18@{file}", "--data", "imagefolder", "--data-dir", str(folder), "--tasks", "knn", *QUICK]
    expect_mistake(capsys, eval_probe.main, argv, str(file), "NaN" if "NaN" in how else "damaged")
    with pytest.raises(SystemExit):
        eval_probe.main(argv)
    err = capsys.readouterr().err
    assert not any(word in err for word in ("weights_only", "unsafe", "trust"))
    assert not (tmp_path / "marker").exists()


def test_R11_notes_in_a_file_for_timm_name_no_other_file(run, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(run / "backbone.safetensors", "pt") as f:
        notes = f.metadata()
    save_file(
        load_file(run / "backbone.safetensors"),
        tmp_path / "w.safetensors",
        notes | dict(timm=json.dumps(json.loads(notes["timm"]) | dict(checkpoint_path="/nowhere.pt"))),
    )
    encoder, _ = eval_probe.load(f"timm:vit_small_patch16_224@{tmp_path / 'w.safetensors'}")
    assert encoder.img_size == 16


# ---- what a user types ----------------------------------------------------------------------------------


def test_checkpoints_come_first(run, capsys):
    for main, flags in (
        (eval_probe.main, ["--tasks", "knn", "linear"]),
        (eval_robustness.main, ["--suite", "corruptions"]),
    ):
        expect_mistake(capsys, main, [*flags, str(run / "checkpoint.pt")], "checkpoint.pt", "checkpoints come first")


@pytest.mark.parametrize(
    "where", ["checkpoint", "timm file", "--data-dir", "--cache-dir", "--suite-dir", "--frost-dir", "--save-images"]
)
def test_C22_a_name_of_256_characters_is_one_line(where, run, capsys):
    long = "x" * 256
    first = str(run / "checkpoint.pt")
    main = (
        eval_probe.main if where in ("checkpoint", "timm file", "--data-dir", "--cache-dir") else eval_robustness.main
    )
    argv = {"checkpoint": [f"{long}/checkpoint.pt"], "timm file": [f"timm:resnet18@{long}", "--data", "blocks"]}.get(
        where, [first, where, long, *(["--suite", "shifts"] if where == "--suite-dir" else [])]
    )
    expect_mistake(capsys, main, [*argv, *QUICK], long)


@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(["--data", "cifar11"], ["cifar11", "cifar10"], id="V1 unknown data set"),
        pytest.param(["--data-dir", "{flat}"], ["test split"], id="V1 no test split"),
        pytest.param(["--data-dir", "{fewer}"], ["different classes", "right"], id="V2 a class is missing"),
        pytest.param(["--data-dir", "{other}"], ["different classes"], id="V3 other class names"),
        pytest.param(["--data-dir", "{one}"], ["no classes"], id="D3 one class"),
    ],
)
def test_V1_data_that_cannot_be_probed_are_one_line(flags, words, run, folder, tmp_path, capsys):
    shutil.copytree(folder / "train" / "left", tmp_path / "flat")
    for name in ("fewer", "other", "one"):
        shutil.copytree(folder, tmp_path / name)
    shutil.rmtree(tmp_path / "fewer" / "test" / "right")
    (tmp_path / "fewer" / "test" / "third").mkdir()
    shutil.copy(folder / "test" / "left" / "00.png", tmp_path / "fewer" / "test" / "third")
    (tmp_path / "other" / "test" / "left").rename(tmp_path / "other" / "test" / "Left")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "one" / split / "right")
    argv = [flag.format(**{name: tmp_path / name for name in ("flat", "fewer", "other", "one")}) for flag in flags]
    expect_mistake(capsys, eval_probe.main, [str(run / "checkpoint.pt"), *argv, *QUICK], *words)


def test_V2_top_5_of_three_classes_is_not_shown():
    scores, labels = torch.eye(3)[torch.tensor([0, 1, 2, 2])], torch.tensor([0, 1, 2, 1])
    assert eval_probe.accuracies("knn", scores[:, :3], labels)["knn"] == 75 and not any(
        "top-5" in k for k in eval_probe.accuracies("knn", scores, labels)
    )


@pytest.mark.parametrize("how", ["V3 copies", "V3 links"])
def test_V3_test_images_that_were_trained_on_are_told(how, run, folder, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    argv = [str(run / "checkpoint.pt"), "--tasks", "knn", "--data-dir", str(root), *QUICK]
    eval_probe.main(argv)
    assert "training images too" not in capsys.readouterr().err
    for i in range(3):
        there = root / "test" / "left" / f"{i:02d}.png"
        there.unlink()
        (shutil.copy if "copies" in how else lambda a, b: os.symlink(a, b))(
            root / "train" / "left" / f"{i:02d}.png", there
        )
    eval_probe.main(argv)
    assert "3 of 12 test images are training images too" in capsys.readouterr().err


def test_V4_an_evaluation_touches_nothing_and_repeats_to_the_bits(run, capsys):
    """File and mode of the encoder; two runs give the same bits, with other workers and batches too (N8, N15)."""
    before, path = (run / "checkpoint.pt").read_bytes(), str(run / "checkpoint.pt")
    argv = [
        path,
        *"--tasks knn linear r2 --augment --r2-targets crop --r2-epochs 1 --linear-epochs 2".split(),
        *"--device cpu --workers".split(),
    ]
    assert eval_probe.main([*argv, "0"]) == eval_probe.main([*argv, "0"]) == eval_probe.main([*argv, "2"])
    assert (run / "checkpoint.pt").read_bytes() == before
    encoder, state = eval_probe.load(path)
    case = eval_probe.open_case(path, encoder, state, eval_probe.Args(workers=0), torch.device("cpu"))
    x = case.features(case.train)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters()) and not x.requires_grad
    assert all(torch.allclose(case.features(case.train, batch_size=b), x, atol=1e-6) for b in (1, 5, 24))


def encoded(n, batch_size):
    """Features of n images on this rank, and what every rank encoded."""
    seen = []
    data = common.ImageSet(
        images=torch.arange(n * 3, dtype=torch.uint8).view(n, 3, 1, 1).expand(n, 3, 4, 4).contiguous()
    )
    encoder = torch.nn.Identity()
    encoder.img_size, encoder.mean, encoder.std = 4, (0.0,) * 3, (1.0,) * 3
    x = common.features(
        encoder,
        data,
        torch.device("cpu"),
        encode=lambda x: (seen.extend((255 * x[:, 0, 0, 0]).round().int().tolist()), x.mean((2, 3)))[1],
        batch_size=batch_size,
    )
    return (255 * x).round().int().tolist(), seen


@pytest.mark.parametrize(
    "n, world, batch_size", [(10, 4, 2), (7, 2, 3), (2, 3, 256)], ids=["V6 10 on 4", "V6 7 on 2", "V6 2 on 3"]
)
def test_V6_every_image_counts_once_and_rank_0_alone_holds_the_features(n, world, batch_size, tmp_path):
    (first, _), *others = on_ranks(world, tmp_path, encoded, n, batch_size)
    assert first == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(n)] and all(x == [] for x, _ in others)
    assert all(len(seen) == -(-n // world) for _, seen in others)


# ---- loader workers -----------------------------------------------------------------------------------


class WhoAreYou:
    size = 16

    def __call__(self, images, params):
        return torch.full((len(images), 1), os.getpid())


def test_F9_workers_start_once_and_serve_every_pass(folder, monkeypatch):
    data = common.load_data("imagefolder", str(folder), "train", 16)
    started = []
    start = torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter,
        "__init__",
        lambda self, loader: (started.append(1), start(self, loader))[1],
    )
    reader, rows = common.Reader(data, 1), torch.arange(24)
    passes = [
        torch.cat([x for _, x in reader.batches(WhoAreYou(), rows, batch_size=8)]).unique().tolist() for _ in range(3)
    ]
    assert passes[0] == passes[1] == passes[2] != [os.getpid()] and len(started) == 1
    next(iter(reader.batches(WhoAreYou(), rows, batch_size=8)))  # one that is broken off takes its workers along
    assert [len(chunk) for chunk, _ in reader.batches(WhoAreYou(), rows, batch_size=9)] == [9, 9, 6]
    del started[:]
    case = eval_probe.Case(
        common.make_backbone("vit_pico", *common.CIFAR10, 16, patch_size=4),
        {},
        data,
        common.load_data("imagefolder", str(folder), "test", 16),
        eval_probe.Args(workers=1, linear_epochs=3, r2_epochs=1, augment=True),
        torch.device("cpu"),
    )
    for task in ("linear", "r2", "equivariance", "rotation"):
        eval_probe.TASKS[task](case)
    assert len(started) == 2  # of train and test images


class Deadly(WhoAreYou):
    def __call__(self, images, params):
        os.kill(os.getpid(), signal.SIGKILL)


def test_D11_a_killed_worker_is_one_line_and_others_take_its_place(folder, capsys):
    reader = common.Reader(common.load_data("imagefolder", str(folder), "train", 16), 1)
    with pytest.raises(SystemExit) as end:
        list(reader.batches(Deadly(), torch.arange(24)))
    err = capsys.readouterr().err
    assert end.value.code == 1 and "--workers" in err and "Traceback" not in err
    del end  # it refers to this frame; a loader in a cycle waits 5 s for its workers when it is collected
    assert len(list(reader.batches(WhoAreYou(), torch.arange(24), batch_size=8))) == 3


def test_F11_shared_memory_that_is_too_small_is_found_before_workers_start(run, capsys, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 16, 16, 16, 0, 0, 0, 0, 255)))
    expect_mistake(
        capsys,
        eval_probe.main,
        [str(run / "checkpoint.pt"), "--tasks", "knn", "--device", "cpu", "--workers", "1"],
        "--workers 1",
        "--shm-size",
    )


FORKSERVER = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
import common, eval_probe, eval_robustness
common.VITS = {vits!r}

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["common", "eval_probe", "eval_robustness"])
    quick = ["--workers", "1", "--device", "cpu", "--linear-epochs", "1", "--augment"]
    tasks = ["knn", "linear", "mlp", "finetune", "fewshot", "r2", "layers", "equivariance", "rotation", "latents"]
    short = ["--finetune-epochs", "1", "--r2-epochs", "1", "--mlp-epochs", "1"]
    eval_probe.main([{path!r}, "--tasks", *tasks, "--fewshot", "finetune", *short, *quick])
    eval_robustness.main([{path!r}, "--suite", "corruptions", "perturbations", "--types", "gaussian_noise", *quick])
    eval_robustness.main([{path!r}, "--suite", "augmentations", "--passes", "1", *quick])
    eval_robustness.main([{path!r}, "--suite", "shifts", "--suite-dir", {shifted!r}, *quick])
"""


def test_F9_every_task_runs_where_workers_are_not_forked(run, folder, tmp_path):
    (tmp_path / "script.py").write_text(
        FORKSERVER.format(
            root=str(ROOT), vits=common.VITS, path=str(run / "checkpoint.pt"), shifted=str(folder / "test")
        )
    )
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {task for r in records(run) for task in r["protocol"] if task in eval_probe.TASKS} == set(eval_probe.TASKS)
    assert [r["protocol"]["suite"] for r in records(run) if "suite" in r["protocol"]] == [
        "corruptions",
        "perturbations",
        "augmentations",
        "shifts",
    ]


# ---- sizes of images ------------------------------------------------------------------------------------


class Lines(torch.nn.Module):
    """An encoder of 64 px that sees whether lines of one pixel run across or down."""

    img_size, dim, inv, depth, mean, std = 64, 2, None, 1, (0.5,) * 3, (0.5,) * 3

    feature = "pixels"

    def forward(self, x):
        return torch.stack([x.diff(dim=d).abs().mean((1, 2, 3)) for d in (2, 3)], 1)

    last_blocks = forward


def test_F6_clean_images_are_seen_at_the_encoders_own_size(tmp_path, capsys):
    for split, n in (("train", 20), ("test", 8), ("elsewhere", 8)):
        for c, name in enumerate(("across", "down")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                x = torch.zeros(64, 64, 3, dtype=torch.uint8)
                x[i % 2 :: 2] = 255
                Image.fromarray((x.transpose(0, 1) if c else x).contiguous().numpy()).save(
                    tmp_path / split / name / f"{i}.png"
                )
    sets = [common.load_data("imagefolder", str(tmp_path), split, 64) for split in ("train", "test")]
    case = eval_probe.Case(
        Lines(),
        dict(data="imagefolder", data_dir=str(tmp_path)),
        *sets,
        eval_probe.Args(tasks=("linear",), linear_epochs=30, linear_lrs=(10.0,), workers=0),
        torch.device("cpu"),
    )
    who, clean = eval_robustness.Subject("lines", "lines.pt", case), eval_probe.linear(case)[0]["linear"]
    assert clean == 100

    def outcome(make, **args):
        suite = make([who], case.test, eval_robustness.Args(workers=0, **args))
        eval_robustness.measure(
            suite, sums := eval_robustness.zeros(suite, [who]), eval_robustness.Args(workers=0, **args)
        )
        return suite.row(sums["lines.pt"][""])[0], suite

    values, suite = outcome(eval_robustness.corruptions, types=("brightness",))
    assert values["clean"] == clean and "32 px" in suite.notes[0] and "lines (64 px)" in suite.notes[0]
    assert outcome(eval_robustness.perturbations, types=("brightness",))[1].notes
    values, suite = outcome(eval_robustness.augmentations, passes=1)
    assert values["Orig"] == clean and values["CJ"] == values["CJ+Flip"] == 100 and not suite.notes
    values, _ = outcome(eval_robustness.shifts, suite_dir=(str(tmp_path / "elsewhere"),))
    assert values == {"clean": clean, "elsewhere": 100}
    for severity in range(1, 6):
        shutil.copytree(tmp_path / "test", tmp_path / "C" / "brightness" / str(severity))
    values, suite = outcome(eval_robustness.corruptions, types=("brightness",), suite_dir=(str(tmp_path / "C"),))
    assert values == {"clean": clean, "brightness": 100} and not suite.notes


def test_F6_clean_is_what_the_linear_probe_says(run):
    """Also of images that are larger than the encoder's, and of encoders of several sizes in one call."""
    path = str(run / "checkpoint.pt")
    linear = eval_probe.main([path, "--tasks", "linear", *QUICK])[0][1]["linear"]
    tables = eval_robustness.main(
        [path, "--suite", "corruptions", "augmentations", "--types", "fog", "--passes", "1", *QUICK]
    )
    (_, corrupted), (_, augmented) = tables["corruptions"][0], tables["augmentations"][0]
    assert corrupted["clean"] == augmented["Orig"] == pytest.approx(linear, abs=1e-4)


@pytest.mark.parametrize("how", ["V5 absent", "V5 a file for a folder", "V5 severity 6"])
def test_V5_published_sets_that_are_not_whole_are_one_line(how, run, folder, tmp_path, capsys):
    for severity in range(1, 6):
        shutil.copytree(folder / "test", tmp_path / "C" / "fog" / str(severity))
    if "absent" in how:
        shutil.rmtree(tmp_path / "C" / "fog" / "4")
    elif "file" in how:
        shutil.rmtree(tmp_path / "C" / "fog" / "4")
        (tmp_path / "C" / "fog" / "4").write_text("")
    else:
        with pytest.raises(ValueError, match="1 to 5"):
            eval_robustness.corrupt(
                torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 6, torch.zeros(1, dtype=torch.long)
            )
        return
    expect_mistake(
        capsys,
        eval_robustness.main,
        [str(run / "checkpoint.pt"), "--types", "fog", "--suite-dir", str(tmp_path / "C"), *QUICK],
        "--suite-dir",
        "fog/4",
    )


def test_F6_two_sizes_in_one_call(run, tiny, tmp_path):
    i = tiny.index("--img-size")
    ser.main(
        [
            *tiny[:i],
            "--img-size",
            "24",
            *tiny[i + 2 :],
            *"--epochs 0 --equi none --out".split(),
            str(tmp_path / "larger"),
        ]
    )
    paths = [str(run / "checkpoint.pt"), str(tmp_path / "larger" / "checkpoint.pt")]
    linear = [values["linear"] for _, values in eval_probe.main([*paths, "--tasks", "linear", *QUICK])]
    tables = eval_robustness.main([*paths, "--suite", "augmentations", "--passes", "1", *QUICK])
    assert [values["Orig"] for _, values in tables["augmentations"]] == pytest.approx(linear, abs=1e-4)


# ---- the figure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, word",
    [
        ("V8 no matplotlib", "matplotlib"),
        ("V8 another ending", ".png"),
        ("V8 no such directory", "No such file"),
        ("V8 a directory", "Is a directory"),
        ("C22 256 characters", "too long"),
    ],
)
@pytest.mark.parametrize("main", [eval_probe.main, eval_robustness.main], ids=["eval_probe", "eval_robustness"])
def test_V8_a_figure_that_cannot_be_drawn_is_one_line_before_anything_is_computed(
    main, how, word, run, tmp_path, capsys, monkeypatch
):
    if "matplotlib" in how:
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.setattr(eval_probe, "figure_class", lambda: None)
    monkeypatch.setattr(eval_probe, "load", lambda path: pytest.fail("a checkpoint was read"))
    (tmp_path / "folder.png").mkdir()
    names = {
        "V8 another ending": "figure.txt",
        "V8 no such directory": "gone/figure.png",
        "V8 a directory": "folder.png",
        "C22 256 characters": "x" * 256 + ".png",
    }
    expect_mistake(
        capsys,
        main,
        [str(run / "checkpoint.pt"), "--plot", str(tmp_path / names.get(how, "figure.png"))],
        "--plot",
        word,
    )
    assert not (tmp_path / "figure.png").exists()
