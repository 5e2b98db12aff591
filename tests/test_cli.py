"""What a user types: help, mistakes (one line, exit 2), the README's commands."""

import ast
import math
import re
import shutil
import subprocess
from pathlib import Path

import ciper
import clever
import common
import eval_dense
import eval_probe
import eval_robustness
import recon_xattn
import ser

import pytest
import torch
from test_run import refused

ROOT = Path(__file__).resolve().parents[1]


def expect_mistake(capsys, main, argv, *words):
    """main(argv) ends with exit code 2 and one line that holds `words`; tyro's own box counts as the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    captured = capsys.readouterr()
    err = captured.err.strip()
    assert end.value.code == 2 and "Traceback" not in err
    assert re.search("──|--------", err) or len(err.splitlines()) == 1, err
    assert all(w in err + captured.out for w in words), err + captured.out


MISTAKES = {
    "unknown data set": (["--data", "imagenette", "--recipe", "cifar10"], "--data imagenette", "blocks"),
    "unknown recipe": (["--recipe", "cifar11"], "--recipe cifar11", "cifar10"),
    "imagefolder without a recipe": (["--data", "imagefolder", "--data-dir", "{folder}"], "--recipe", "cifar10"),
    "D1 missing folder": (["{tiny}", "--data-dir", "{tmp}/nowhere"], "--data-dir", "nowhere", "no such directory"),
    "D1 folder not given": (["--data", "imagefolder", "--recipe", "cifar10"], "--data-dir"),
    "D1 empty folder": (["{tiny}", "--data-dir", "{tmp}/empty"], "--data-dir", "no images"),
    "A7 batch larger than the data": (["{tiny}", "--batch-size", "32"], "--batch-size 32", "24"),
    "A5 size not divisible by the patch": (["{tiny}", "--img-size", "18"], "--img-size 18", "--patch-size 4"),
    "unknown arch": (["{tiny}", "--arch", "vit_huge"], "--arch vit_huge", "vit_small"),
    "A2 learning rate nan": (["{tiny}", "--lr", "nan"], "--lr nan"),
    "A2 learning rate negative": (["{tiny}", "--lr", "-1"], "--lr -1"),
    "A2 learning rate inf": (["{tiny}", "--lr", "inf"], "--lr inf"),
    "A2 temperature 0": (["{tiny}", "--equi-temp", "0"], "--equi-temp 0"),
    "A2 momentum above 1": (["{tiny}", "--momentum", "1.5"], "--momentum 1.5"),
    "A2 crop above the image": (["{tiny}", "--crop-scale", "0.5", "1.5"], "--crop-scale 1.5"),
    "A8 seed out of range": (["{tiny}", "--seed", "-1"], "--seed -1"),
    "A6 warm-up longer than the run": (["{tiny}", "--epochs", "1"], "--warmup-epochs"),
    "layer beyond the encoder": (["{tiny}", "--equi-layer", "5"], "--equi-layer 5", "4 blocks"),
    "A7 b2 larger than the batch": (["{tiny}", "--batch-size", "8"], "--batch-size 8", "second part"),
    "A2 range upside down": (["{tiny}", "--crop-scale", "1.0", "0.2"], "--crop-scale 1.0 0.2", "lower"),
    "A2 hue beyond the circle": (["{tiny}", "--jitter", "0.4", "0.4", "0.4", "3"], "--jitter", "0.5"),
    "no block left for [CLS]": (["{tiny}", "--equi-layer", "4"], "--cls-layer 3"),
    "C17 resume and overwrite": (["{tiny}", "--resume", "--overwrite"], "--resume", "--overwrite"),
    "A9 no such device": (["{tiny}", "--device", "mps"], "--device mps"),
    "A3 empty value": (["{tiny}", "--data-dir="], "--data-dir", "empty"),
    "C19 output under a file": (["{tiny}", "--out", "{tmp}/file/run"], "--out"),
    "A1 unknown flag": (["{tiny}", "--learning-rate", "1"], "--learning-rate"),
    "ser without a layer": (["{tiny}", "--equi-layer", "0"], "--equi-layer 0", "tokens"),
    "a layer without a term": (["{tiny}", "--equi", "none", "--equi-layer", "2"], "--equi-layer 2", "--cls-layer 2"),
    "a folder for rendered images": (["--data-dir", "{folder}"], "--data-dir", "blocks", "--data imagefolder"),
    "[CLS] after the layer that reads it": (
        ["{tiny}", "--equi", "augself", "--equi-layer", "2", "--cls-layer", "2"],
        "--equi-layer 2",
        "--cls-layer 0",
    ),
    "local views of a baseline": (["{tiny}", "--equi", "essl", "--local-views", "4"], "--local-views 4", "ser or none"),
    "local views of Barlow Twins": (["{tiny}", "--base", "barlow", "--local-views", "4"], "--local-views 4", "mocov3"),
    "a parameter that never changes": (
        ["{tiny}", "--equi", "augself", "--equi-params", "crop", "solarize"],
        "--equi-params solarize",
        "--solarize",
    ),
    "A5 local size not divisible": (
        ["{tiny}", "--local-views", "4", "--local-size", "6"],
        "--local-size 6",
        "--patch-size 4",
    ),
    "A7 odd batch for pairs": (["{tiny}", "--equi", "stl", "--batch-size", "11"], "--batch-size 11", "even"),
    "nothing to predict": (["{tiny}", "--equi", "augself", "--equi-params"], "--equi-params", "crop color"),
    "A1 wrong type": (["{tiny}", "--epochs", "many"], "--epochs", "many"),
    "A3 empty name": (["{tiny}", "--recipe="], "--recipe", "empty"),
    "A7 a batch of one": (["{tiny}", "--batch-size", "1"], "--batch-size 1", "[2, inf)"),
    "A8 seed of 33 bits": (["{tiny}", "--seed", "4294967296"], "--seed 4294967296"),
    "A1 not a choice": (["{tiny}", "--base", "byol"], "barlow"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_training(name, tiny, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    argv, *words = MISTAKES[name]
    if name.startswith("A1"):
        monkeypatch.setattr(common, "start", None)  # no device is looked for
    filled = []
    for a in argv:
        filled += tiny if a == "{tiny}" else [a.format(folder=folder, tmp=tmp_path)]
    out = [] if "--out" in argv else ["--out", str(tmp_path / "run")]
    expect_mistake(capsys, ser.main, [*filled, *out], *words)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_A4_mistakes_of_processes(tiny, capsys, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 5)
    args = common.parse(ser.Args, ser.values_in_force, tiny)
    expect_mistake(
        capsys,
        lambda _: common.Loader(
            common.ImageSet(images=torch.zeros(24, 3, 2, 2, dtype=torch.uint8)), {}, None, args, torch.device("cpu")
        ),
        None,
        "--batch-size 12",
        "5 processes",
        "10",
    )
    expect_mistake(capsys, lambda _: ser.check(args), None, "8 images", "5 processes", "or 8", "raise --batch-size")
    args.batch_size = 100
    expect_mistake(capsys, lambda _: ser.check(args), None, "5 processes", "give --equi-ratio 0.4")
    assert ser.equi_batch_size(100, 0.4) % 5 == 0
    args = common.parse(ser.Args, ser.values_in_force, [*tiny, "--equi", "stl", "--batch-size", "15"])
    expect_mistake(capsys, lambda _: ser.check(args), None, "--batch-size 15", "5 processes", "even")


def test_the_processes_that_the_readme_starts_share_a_step(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    calls = re.findall(r"^torchrun (.*?) (\w+)\.py (.*?)(?:#.*)?$", text, flags=re.M)
    started = []
    for launch, script, flags in calls:
        started.append(math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", launch)))
        monkeypatch.setattr(common, "world_size", lambda: started[-1])
        module = dict(ser=ser, recon_xattn=recon_xattn, ciper=ciper, clever=clever)[script]
        args = common.parse(module.Args, module.values_in_force, flags.split())
        module.check(args)
        assert args.batch_size % started[-1] == 0
    assert 16 in started


@pytest.mark.parametrize("script", [ser, recon_xattn, ciper, clever, eval_probe, eval_robustness])
def test_A2_every_number_is_refused_outside_its_range(script, capsys):
    """NaN, infinity and both sides of the interval are; its closed ends, such as --lr 0, are not."""
    for name, interval in common.ranges(script.Args).items():
        args, (low, high) = script.Args(), map(float, interval[1:-1].split(","))
        given = lambda value, args=args, name=name: setattr(
            args, name, (value,) if isinstance(getattr(args, name), tuple) else value
        )
        ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
        for value in (math.nan, math.inf, -math.inf, low - 1, high + 1, *({low, high} - {*ends})):
            given(value)
            refused(
                capsys,
                lambda args=args, name=name: common.check_ranges(args),
                f"--{name.replace('_', '-')} {value}",
                interval,
            )
        for value in ends:
            given(value)
            common.check_ranges(args)
    assert common.ranges(script.Args).get("lr", "[0, inf)") == "[0, inf)"


def test_A3_of_a_repeated_flag_the_last_counts(tiny):
    assert common.parse(ser.Args, ser.values_in_force, [*tiny, "--lr", "1", "--lr", "2"]).lr == 2


def test_C17_mistakes_with_the_output_directory(tiny, tmp_path, capsys):
    run = [*tiny, "--max-steps", "1", "--out", str(tmp_path)]
    ser.main([*run, "--resume"])  # where there is none yet, it starts
    good = (tmp_path / "checkpoint.pt").read_bytes()
    expect_mistake(capsys, ser.main, run, "add --resume", "--overwrite")
    expect_mistake(capsys, ser.main, [*run, "--resume", "--arch", "vit_tiny"], "--arch vit_tiny", "vit_pico")
    expect_mistake(capsys, ser.main, [*run, "--resume", "--lr", "1"], "--lr 1")
    assert (tmp_path / "checkpoint.pt").read_bytes() == good
    (tmp_path / "checkpoint.pt").write_bytes(good[:-100])
    expect_mistake(capsys, ser.main, [*run, "--resume"], "checkpoint.pt", "damaged")
    (tmp_path / "checkpoint.pt").write_bytes(good)
    ser.main([*run, "--overwrite"])
    assert (tmp_path / "args.json").exists()


@pytest.mark.parametrize("script", [ser, recon_xattn, ciper, clever])
def test_A2_C14_every_argument_that_computes_is_fixed_on_resume(script):
    """A new argument is either free to change on resumption or compared: none slips through unnamed."""
    assert common.Run.FREE <= {f.name for f in common.dataclasses.fields(script.Args)}
    numbers = {
        f.name for f in common.dataclasses.fields(script.Args) if any(t in str(f.type) for t in ("int", "float"))
    }
    assert numbers == set(common.ranges(script.Args))  # every number has a range


def test_mistakes_of_probing(tiny, folder, tmp_path, capsys):
    ser.main([*tiny, "--epochs", "0", "--out", str(tmp_path / "run")])
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    expect_mistake(capsys, eval_probe.main, [], "no checkpoint")
    expect_mistake(capsys, eval_probe.main, [str(tmp_path / "nothing.pt")], "nothing.pt")
    expect_mistake(capsys, eval_probe.main, [checkpoint, "--tasks", "magic"], "magic")
    expect_mistake(capsys, eval_probe.main, [checkpoint, checkpoint], "twice")
    expect_mistake(capsys, eval_probe.main, [checkpoint, "--data-dir", str(tmp_path / "gone")], "gone")
    expect_mistake(capsys, eval_probe.main, [checkpoint, "--data", "pets"], "--data-dir", "pets needs")
    expect_mistake(capsys, eval_probe.main, [checkpoint, "--knn-k", "0"], "--knn-k 0")
    expect_mistake(
        capsys, eval_probe.main, [checkpoint, "--tasks", "r2", "--r2-targets", "pose"], "--r2-targets pose", "rotation"
    )
    for flags in ("--layers 1", "--r2-targets flip", "--fewshot finetune", "--protocol clever --fewshot linear"):
        task = flags.split()[-2].removeprefix("--").replace("-targets", "")
        expect_mistake(capsys, eval_probe.main, [checkpoint, *flags.split()], f"--{task}", f"--tasks {task}")
    flags = "--tasks linear --knn-k 5"
    expect_mistake(capsys, eval_probe.main, [checkpoint, *flags.split()], "--knn-k", "--tasks knn")
    expect_mistake(capsys, eval_probe.main, [checkpoint, *"--protocol ser --linear lbfgs".split()], "--no-augment")
    for main, flags in ((eval_probe.main, "--linear lbfgs --linear-lrs 1"), (eval_robustness.main, "--linear steps")):
        mistake = [checkpoint, *flags.split(), "--linear-epochs", "9"]
        expect_mistake(capsys, main, mistake, "--linear-epochs: goes with --linear sgd")
    flat = tmp_path / "flat"
    shutil.copytree(folder / "train" / "left", flat)
    expect_mistake(capsys, eval_probe.main, [checkpoint, "--data-dir", str(flat)], "test split")


def test_a_tree_without_classes_trains_and_promises_no_score(tiny, folder, tmp_path, capsys):
    shutil.copytree(folder / "train" / "left", tmp_path / "tree" / "deep" / "er")
    ser.main(
        [*tiny, "--data-dir", str(tmp_path / "tree"), *"--max-steps 1 --epochs 2 --out".split(), str(tmp_path / "run")]
    )
    assert "no k-NN score" in capsys.readouterr().out and (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "main, flags",
    [
        (ser.main, [*vars(ser.Args())]),
        (recon_xattn.main, [*vars(recon_xattn.Args())]),
        (ciper.main, [*vars(ciper.Args())]),
        (clever.main, [*vars(clever.Args())]),
        (eval_probe.main, [k for k in vars(eval_probe.Args()) if k != "checkpoints"]),
        (eval_robustness.main, [k for k in vars(eval_robustness.Args()) if k != "checkpoints"]),
    ],
)
def test_help_teaches_every_flag(main, flags, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name.replace('_', '-')}" in text for name in flags)
    assert "is silent" not in text and text.index("python ") < text.index("options")
    for cls in (
        ser.Args,
        recon_xattn.Args,
        ciper.Args,
        clever.Args,
        common.RunArgs,
        eval_probe.Args,
        eval_robustness.Args,
    ):
        tree = ast.parse(Path(common.sys.modules[cls.__module__].__file__).read_text())
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__).body
        fields = {a.target.id for a in body if isinstance(a, ast.AnnAssign)}
        assert fields == {
            a.target.id for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
        }


def test_help_shows_the_values_in_force(capsys):
    for argv, value in ((["--help"], "128"), (["--recipe", "imagenet", "--data", "imagefolder", "--help"], "2048")):
        with pytest.raises(SystemExit):
            ser.main(argv)
        text = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
        assert f"(default: {value})" in text.split("--batch-size INT")[1][:200]


@pytest.mark.parametrize(
    "base, expected",
    [
        (
            "dino",
            dict(
                lr=1e-4,
                lr_end=0.0125,
                momentum=0.982,
                temp=0.1,
                teacher_temp=(0.04, 0.07),
                teacher_temp_epochs=10,
                weight_decay=0.04,
                weight_decay_end=0.4,
                clip=0.3,
                prototypes=65536,
                proj_hidden=2048,
                proj_dim=256,
                drop_path=0.1,
                crop_scale=(0.25, 1.0),
                equi_weight=0.3,
                equi_temp=0.5,
            ),
        ),
        (
            "barlow",
            dict(
                lr=1e-4,
                lr_end=0.001,
                weight_decay=0.1,
                clip=0.3,
                proj_hidden=8192,
                proj_dim=8192,
                redundancy=0.0051,
                equi_weight=1.0,
                equi_temp=0.3,
            ),
        ),
    ],
)
def test_the_other_bases_of_the_paper(base, expected):
    args = ser.Args(**ser.values_in_force(ser.Args(base=base, data="imagefolder", recipe="imagenet")))
    assert {k: getattr(args, k) for k in expected} == expected


def test_the_recipe_of_the_paper():
    args = ser.Args(**ser.values_in_force(ser.Args(data="imagefolder", recipe="imagenet")))
    expected = dict(
        arch="vit_small",
        img_size=224,
        patch_size=16,
        epochs=100,
        warmup_epochs=10,
        batch_size=2048,
        lr=3e-4,
        weight_decay=0.1,
        temp=0.2,
        momentum=0.99,
        equi_layer=3,
        equi_ratio=0.01,
        equi_weight=1.0,
        equi_temp=0.3,
        equi_dim=512,
        proj_hidden=4096,
        proj_dim=256,
        crop_scale=(0.08, 1.0),
        jitter=(0.4, 0.4, 0.2, 0.1),
        blur=(1.0, 0.1),
        solarize=(0.0, 0.2),
        equi_area=(0.7, 1.3),
    )
    assert {k: getattr(args, k) for k in expected} == expected
    assert args.lr * args.batch_size / 256 == pytest.approx(2.4e-3)


class Checked(Exception):
    """Raised in place of the work that follows the checks of a command line."""


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_the_commands_of_the_readme_run(document, tiny, folder, core50, tmp_path, monkeypatch, request):
    """Every line of README.md that calls a script, as a shell expands it, through main(argv) on tiny images: the last
    of a repeated flag counts. Those of RESULTS.md are parsed and checked."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
    shell = 'python() { echo "$@"; }; torchrun() { echo "$@"; }\n' + "".join(b for b in blocks if "venv" not in b)
    lines = subprocess.run(["bash", "-ec", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    calls = [
        (Path(words[i]).stem, words[i + 1 :])
        for words in map(str.split, lines)
        for i, w in enumerate(words)
        if w.endswith(".py") and not w.startswith("tests/")
    ]
    seeded = ((script, re.sub(r" --(seed|out) \S+", "", " ".join(argv))) for script, argv in calls)
    calls = list(dict.fromkeys(seeded))  # each kind once

    # Training scripts build a model after the checks, and evaluations start the device.
    def stop(*a):
        raise Checked

    scripts = dict(ser=ser, recon_xattn=recon_xattn, ciper=ciper, clever=clever)
    evaluations = dict(eval_probe=eval_probe, eval_robustness=eval_robustness, eval_dense=eval_dense)
    last = {}  # directory of the last run of a script
    if document == "RESULTS.md":
        request.getfixturevalue("pico")  # whose blocks its commands count
        last = dict.fromkeys(scripts, "not-read")
        Path("not-read").mkdir()
        Path("not-read/checkpoint.pt").touch()
        for module in scripts.values():
            monkeypatch.setattr(module, "build", stop)

    # What makes a run tiny. The widths of the projectors are ser.py's alone.
    pairs = zip(tiny[::2], tiny[1::2])
    shared = [a for pair in pairs if pair[0] not in ("--proj-dim", "--equi-dim") for a in pair]
    views = ["--data", "core50", "--data-dir", str(core50), *"--recipe core50 --arch resnet_pico --proj-dim 8".split()]
    tiny_run = dict(
        ser=[*tiny, "--prototypes", "32"],
        recon_xattn=[*shared, *"--neck 16 --embed-dim 8 --batch-size 4".split()],
        ciper=[*shared, *views],
        clever=[*shared, *"--head-dim 16 --head-dim-equi 16 --local-size 8".split()],
    )
    tiny_evaluation = dict(
        eval_probe="--workers 0 --linear-epochs 1 --finetune-epochs 1 --r2-epochs 1 --r2-images 12",
        eval_robustness="--workers 0 --linear-epochs 1 --images-per-class 1 --passes 1",
        eval_dense="--workers 0 --images 2 --steps 1 --batch-size 2",
    )
    trained, seen = 0, set()
    for script, argv in ((script, argv.split()) for script, argv in calls):
        plain = re.sub(r"\S+checkpoint\.pt ?", "", " ".join(argv))
        settings = {(script, setting) for setting in re.split(r" (?=--)", plain)}
        if settings <= seen:  # each flag with each of its values once
            continue
        seen |= settings
        if script in scripts:
            trained += 1
            out = f"run-{trained}-s0"
            epochs = ["--epochs", "0"] if "0" in argv else []
            argv = [*argv, *tiny_run[script], *epochs, *f"--max-steps 1 --no-compile --out {out}".split()]
            if document == "README.md":
                scripts[script].main(argv)
                last[script] = out
            else:
                with pytest.raises(Checked):
                    scripts[script].main(argv)
            continue

        # Evaluations take one of these checkpoints, and its data: parts are RECON's, FullGrad is for ResNets.
        flags = " ".join(argv[next((i for i, w in enumerate(argv) if w.startswith("--")), len(argv)) :])
        flags = re.sub(r"--data(-dir)?( (?!--)\S+)+ ?", "", flags)
        if "shifts" in flags and "--suite-dir" not in flags:  # only rendered images have shifts of their own
            flags += " --suite-dir SHIFTED"
        flags = re.sub(r"(--suite-dir) \S+", rf"\1 {folder / 'test'}", flags).split()
        ours = tiny_evaluation[script]
        if script == "eval_dense" and "--figures" in flags:
            ours = "--workers 0 --images 8"
        if "lbfgs" in flags:  # which has no epochs
            ours = ours.replace("--linear-epochs 1 ", "")
        needs = "recon_xattn" if "--part" in flags else "ciper" if "fullgrad" in flags else "ser"
        argv = [f"{last[needs]}/checkpoint.pt", *flags, *ours.split(), "--device", "cpu"]
        if document == "README.md":
            evaluations[script].main(argv)
        else:
            with pytest.raises(Checked), monkeypatch.context() as m:
                m.setattr(common, "start", stop)
                evaluations[script].main(argv)
    assert trained >= {"README.md": 8, "RESULTS.md": 25}[document], trained
