"""What a user meets on the first day, through the commands: what a run says of itself, sweeps, classes by
name, starting from weights, latents made by hand, moving, jobs' logs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import tqdm
from conftest import ROOT, TINY, cli, message, process, write_set
from PIL import Image
from test_faults import wait_until
from test_sample import lively, settings_for
from test_train import assert_same_run, fit, load, log

import models
import sample
import train
from extract_latents import content_id

pytestmark = pytest.mark.usefixtures("all_on_one_thread")


def said(capsys, script, *flags):
    """What a command that works says on stdout."""
    status, stdout, stderr = cli(capsys, script, *flags)
    assert status == 0, stderr
    return stdout


def refusal(capsys, script, *flags):
    status, _, stderr = cli(capsys, script, *flags)
    assert status == 2, stderr
    return message(stderr)


# ---- a run


def test_what_a_run_says(capsys, data, tmp_path):
    """Sizes, data, steps and device at its start; its log has epoch and seconds, which a resume adds to."""
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--batch-size", 8, "--max-steps")
    lines = said(capsys, "train", *flags, 3).splitlines()
    model = models.SiT_models["SiT-Ti/4"](input_size=8, num_classes=10)
    head = models.AlignHead(128, 4, 4, 5)
    millions, of_head = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, head))
    assert lines[:3] == [f"{tmp_path / 'run'}: from step 0 to 3, on 1 x cpu",
                         f"  {millions:.1f} M parameters, heads {of_head:.1f} M: vae_repa",
                         "  12 images of 10 classes, latents [4, 8, 8], 4 tokens; 1.5 steps an epoch"]
    assert lines[-1] == f"{tmp_path / 'run'}: done at step 3"
    assert ": from step 3 to 6, on" in said(capsys, "train", *flags, 6)
    assert [line["epoch"] for line in log(tmp_path / "run")] == [step * 8 / 12 for step in range(1, 7)]
    seconds = [line["seconds"] for line in log(tmp_path / "run")]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1] < 100
    before = (tmp_path / "run" / "state.pt").stat().st_mtime_ns
    for steps in (6, 2):
        (line,) = said(capsys, "train", *flags, steps).splitlines()
        assert "nothing left to do at step 6" in line and "--max-steps" in line
    assert (tmp_path / "run" / "state.pt").stat().st_mtime_ns == before
    lines = said(capsys, "train", *flags, 1, "--vae-repa-depth", 0, "--run-dir", tmp_path / "plain")
    assert "heads 0.0 M: none" in lines


@pytest.mark.parametrize("steps, decay, left, suits", [
    (4, 0.9999, "100%", "0"), (30, 0.95, "21%", "0.7"), (30, 0.9, "4%", "0.7"), (30, 0.87, None, None),
    (4, 0, None, None)])
def test_an_average_that_is_too_slow(capsys, data, tmp_path, steps, decay, left, suits):
    """It would sample the initial weights, which a line says, with a decay that suits."""
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--ema-decay", decay, "--max-steps", steps)
    out = said(capsys, "train", *TINY, *flags)
    warned = re.findall(r"--ema-decay \S+ leaves (\d+%) of the initial weights.* steps take (\S+)", out)
    assert warned == ([(left, suits)] if left else [])


def test_a_loss_without_a_weight(capsys, monkeypatch, data, tmp_path):
    weights = train.loss_weights
    monkeypatch.setattr(train, "loss_weights", lambda *of: {"denoising": weights(*of)["denoising"]})
    line = refusal(capsys, "train", *TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps", 1)
    assert "loss_weights has no weight for vae_repa" in line


# ---- jobs' logs


def test_progress_of_a_job(capsys, monkeypatch, data, tmp_path):
    """Where stderr is no terminal, a line a minute, with the numbers of then; an error comes last."""
    clock = iter(range(10**6))
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))  # a second each time it is asked
    monkeypatch.setattr(tqdm.std.tqdm, "monitor_interval", 0)
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--log-every", 10, "--max-steps")
    real, scalars, calls = train.training_step, {}, []

    def step(*args):
        calls.append(args)
        if len(calls) == 1:  # a real one is enough
            scalars.update(real(*args))
        return {name: x * (torch.nan if len(calls) == 207 else 1) for name, x in scalars.items()}

    monkeypatch.setattr(train, "training_step", step)
    status, _, stderr = cli(capsys, "train", *flags, 200)
    lines = [line for line in stderr.split("\n") if line]
    steps, seconds = zip(*((int(at), 60 * int(minutes) + int(s)) for at, minutes, s in
                           (re.search(r" (\d+)/200 \[(\d\d):(\d\d)", line).groups() for line in lines)))
    assert status == 0 and "\r" not in stderr and 3 <= len(lines) <= 7 and steps[0] == 0 and steps[-1] == 200
    assert all(59 <= b - a <= 63 for a, b in zip(seconds[:-1], seconds[1:-1])), seconds
    assert "denoising=" in lines[1]
    status, _, stderr = cli(capsys, "train", *flags, 300)  # its 7th is not finite
    last = stderr.splitlines()[-1]
    assert status == 2 and last.startswith("train.py: error: the loss or its gradient is not finite")
    assert "/300 " in stderr and stderr.count("error: ") == 1


def test_progress_on_a_terminal(capsys, monkeypatch, data, tmp_path):
    """A bar that is drawn over itself."""
    monkeypatch.setattr(sys.stderr.__class__, "isatty", lambda stream: True, raising=False)
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps", 3)
    assert cli(capsys, "train", *flags)[2].count("\r") >= 2


# ---- sampling


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A run's folder, with a newer and an older checkpoint, and a file that is none of train.py's."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("9999999.pt", "0000002.pt", "10000000.pt", "best.pt"):
        shutil.copy(checkpoint, folder / name)
    return folder.parent


def test_sweeps(capsys, trained, vae, tmp_path):
    """Each setting has a file of its own, named by what is not at its default, by the newest checkpoint."""
    shutil.copytree(vae, tmp_path / "a" / "my vae")
    names = {("--per-class", 1): "per-class-1_num-steps-2.png",
             ("--per-class", 1, "--cfg-scale", 4, "--seed", 3):
                 "per-class-1_seed-3_num-steps-2_cfg-scale-4.png",
             ("--per-class", 1, "--batch-size", 2): "per-class-1_num-steps-2.png",
             ("--classes", "class2", 0, "--mode", "ode"): "classes-class2-0_mode-ode_num-steps-2.png",
             ("--num-samples", 1): "num-samples-1_num-steps-2.npz",
             ("--num-samples", 2): "num-samples-2_num-steps-2.npz",
             ("--num-samples", 2, "--cfg-scale", 1.5): "num-samples-2_num-steps-2_cfg-scale-1.5.npz",
             ("--num-samples", 2, "--guidance-interval", 0, 0.7):
                 "num-samples-2_num-steps-2_guidance-interval-0-0.7.npz",
             ("--num-samples", 2, "--vae", tmp_path / "a" / "my vae"):
                 "num-samples-2_vae-my-vae_num-steps-2.npz"}
    few, made = ("--ckpt", trained, "--num-steps", 2), set()
    for flags, name in names.items():
        out = trained / "checkpoints" / f"10000000_{name}"
        assert said(capsys, "sample", *few, *flags).splitlines()[0].split(" is complete")[0] == str(out)
        made.add(out)
    assert {path for kind in ("png", "npz") for path in trained.rglob(f"*.{kind}")} == made
    assert "complete already" in said(capsys, "sample", *few, *flags)
    long = ("--classes", *["0"] * 200, "--per-class", 1)
    paths = [Path(said(capsys, "sample", *few, *long, *more).splitlines()[0])
             for more in ((), ("--seed", 1), ("--seed", 2))]
    assert len(set(paths)) == 3 and all(len(path.name) < 200 and path.exists() for path in paths)


def test_classes_by_name(capsys, trained, tmp_path):
    """As their folders are named; what is a name is not taken for a number."""
    few = ("--ckpt", trained / "checkpoints" / "best.pt", "--num-steps", 2, "--per-class", 2, "--classes")
    out = said(capsys, "sample", *few, "class2", 0, "--out", tmp_path / "a.png")
    assert out.splitlines()[1:] == ["row 1: class 2 (class2)", "row 2: class 0 (class0)"]
    said(capsys, "sample", *few, 2, 0, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "--classes class3: this checkpoint has 0 to 2, named class0, class1, class2" in refusal(
        capsys, "sample", *few, "class3")
    found = load(trained / "checkpoints" / "best.pt")
    found["settings"]["data"]["class_names"] = ["2", "10", "x"]
    torch.save(found, trained / "checkpoints" / "best.pt")
    out = said(capsys, "sample", *few, 10, 2, 1, "--out", tmp_path / "c.png")
    assert out.splitlines()[1:] == ["row 1: class 1 (10)", "row 2: class 0 (2)", "row 3: class 1 (10)"]


def test_the_newest_checkpoint(capsys, trained, data, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "no checkpoints/STEP.pt yet" in refusal(capsys, "sample", "--ckpt", tmp_path / "new")
    assert sample.load_model(trained)[1]["step"] == 4
    shutil.rmtree(trained / "checkpoints")
    assert "no checkpoints/STEP.pt yet" in refusal(capsys, "sample", "--ckpt", trained)
    assert "no checkpoints/STEP.pt yet" in refusal(capsys, "train", *TINY, "--data", data, "--init", trained)


# ---- weights to start from


def begun(capsys, data, run, file, *flags):
    """(what a run of no learning rate says of --init, its state)."""
    words = ("--data", data, "--run-dir", run, "--lr", 0, "--max-steps", 1, *flags)
    out = said(capsys, "train", *TINY, "--init", file, *words)
    return re.search(rf"--init {re.escape(str(file))}: (.*)", out)[1], load(run / "state.pt")


def assert_taken(state, weights, new=()):
    """Model and average are the file's, but for the names that begin with `new`, which are as ever."""
    torch.manual_seed(0)
    fresh = models.build_model(state["settings"]).state_dict()
    for part in ("model", "ema"):
        for name, x in state[part].items():
            assert torch.equal(x, (fresh if name.startswith(new) else weights)[name]), name


def test_own_weights(capsys, checkpoint, data, latents, tmp_path):
    """Of a run: all that fits, heads too; with other classes than its, the table of labels is new."""
    weights = load(checkpoint)["ema"]
    took, state = begun(capsys, latents, tmp_path / "same", checkpoint)
    assert_taken(state, weights)
    assert took == f"{len(weights)} tensors; new here: none; not used of it: none"
    assert state["settings"]["init_content"] == content_id(checkpoint)
    took, state = begun(capsys, data, tmp_path / "ten", checkpoint)
    assert_taken(state, weights, ("y_embedder.",))
    table = "y_embedder.embedding_table"
    assert took == f"{len(weights) - 1} tensors; new here: {table}; not used of it: {table}"
    for layers in (2, 4, 6):  # a head as a whole or not at all
        took, state = begun(capsys, latents, tmp_path / f"{layers}", checkpoint, "--vae-repa-layers", layers)
        assert_taken(state, weights, ("heads.",))
        assert "; new here: heads.vae_repa; not used of it: heads.vae_repa" in took
    took, state = begun(capsys, latents, tmp_path / "plain", checkpoint, "--vae-repa-depth", 0)
    assert "; new here: none; not used of it: heads.vae_repa" in took


def test_a_run_that_began_with_weights(capsys, checkpoint, data, tmp_path):
    """Its folder is named by them; it goes on with the file elsewhere, and with no other."""
    flags = (*TINY, "--data", data, "--lr", 1e-3, "--max-steps")
    file, moved, other = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    shutil.copy(checkpoint, file)
    run = tmp_path / "run"
    said(capsys, "train", *flags, 2, "--init", file, "--run-dir", run)
    file.rename(moved)
    said(capsys, "train", *flags, 3, "--init", moved, "--run-dir", run)
    moved.rename(other)
    out = said(capsys, "train", *flags, 4, "--init", moved, "--run-dir", run)  # which is not there any more
    assert "--init" not in out
    other.rename(moved)
    fit(capsys, data, tmp_path / "whole", "--lr", 1e-3, "--max-steps", 4, "--init", moved)
    assert_same_run(run, tmp_path / "whole")
    ema = load(moved)["ema"]
    torch.save({"ema": {name: x * 2 for name, x in ema.items()}, "settings": {}}, other)
    assert "init_content is" in refusal(capsys, "train", *flags, 5, "--init", other, "--run-dir", run)
    assert "init is" in refusal(capsys, "train", *flags, 5, "--run-dir", run)
    assert "init is" in refusal(capsys, "train", *flags, 5, "--run-dir", run, "--init", "nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--init", str(moved)])
        assert train.parse_args().run_dir == "runs/SiT-XL-2_init-b.pt_vae-repa-depth-8"


def sit_file(path, num_classes=10):
    """A file as SiT's authors publish: (its weights, without the half of the output that is not used)."""
    weights = lively("SiT-Ti/4", num_classes).state_dict()
    published = dict(weights)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        pixels = weights[name].reshape(4, 4, 4, *weights[name].shape[1:])  # a token's rows, columns, channels
        published[name] = torch.cat([pixels, torch.randn_like(pixels)], dim=2).flatten(0, 2)
    torch.save(published, path)
    return weights


def test_weights_of_sit(capsys, data, tmp_path):
    """There t = 1 is data and v points at it: velocities are the negative at 1 - t. They sample and train."""
    weights = sit_file(path := tmp_path / "SiT.pt")
    original = models.SiT_models["SiT-Ti/4"](input_size=8, num_classes=10)
    original.load_state_dict(weights)
    model, settings = sample.load_model(path)
    x, t, y = torch.randn(5, 4, 8, 8), torch.tensor([0, 0.1, 0.5, 0.8, 1]), torch.arange(5)
    with torch.no_grad():
        expected = -original(x, 1 - t, y)
        torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1 and settings["data"]["vae"] == "stabilityai/sd-vae-ft-ema"
    took, state = begun(capsys, data, tmp_path / "run", path)
    assert took == f"{len(weights)} tensors; new here: heads.vae_repa; not used of it: none"
    assert_taken(state, model.state_dict(), ("heads.",))


def test_weights_of_repa(capsys, data, tmp_path):
    weights = lively("SiT-Ti/4", 10).state_dict()
    torch.save({"ema": {**weights, "projectors.0.0.weight": torch.ones(3)}, "opt": {}}, tmp_path / "r.pt")
    took, state = begun(capsys, data, tmp_path / "run", tmp_path / "r.pt")
    assert took == f"{len(weights)} tensors; new here: heads.vae_repa; not used of it: projectors.0"
    assert_taken(state, weights, ("heads.",))


def test_weights_that_do_not_fit(capsys, data, tmp_path):
    file, run = tmp_path / "x.pt", ("--run-dir", tmp_path / "run", "--max-steps", 1)
    common = (*TINY, "--data", data, *run, "--init")
    ema = lively("SiT-Ti/4", 10).state_dict()
    own, mlp = {"ema": ema, "settings": settings_for()}, "blocks.3.mlp.fc1.weight"
    for content, says in (
            (None, "No such file"), (b"x", "is no file of torch.save"), ({"ema": 5}, "x.pt"),
            ({}, "it has no x_embedder"), ({"ema": {}, "settings": {}}, "is None, not (128, 4, 4, 4)"),
            ({"model": ema}, "it has no x_embedder"), ({**own, "ema": {**ema, 7: ema[mlp]}}, "x.pt"),
            ({"ema": lively("SiT-Ti/2").state_dict()}, "its x_embedder.proj.weight is (128, 4, 2, 2), not"),
            ({**own, "ema": lively("SiT-S/4").state_dict()}, "(384, 4, 4, 4), not (128, 4, 4, 4)"),
            ({**own, "ema": {**ema, mlp: ema[mlp] * torch.nan}}, f"its {mlp} is not finite"),
            ({**own, "ema": {**ema, mlp: ema[mlp].long()}}, f"its {mlp} is not finite"),
            ({**own, "ema": {**ema, "blocks.6.mlp.fc1.weight": ema[mlp]}}, "another --model?"),
            ({**own, "ema": {name: x for name, x in ema.items() if name != mlp}}, f"its {mlp} is None, not")):
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        line = refusal(capsys, "train", *common, file)
        assert (f"--init {file} cannot be used: " in line or content is None) and says in line, line
        assert not (tmp_path / "run").exists()


# ---- latents made by hand


def changed(folder, name, change):
    np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))


def about(folder, **changes):
    path = folder / "latents.json"
    path.write_text(json.dumps({key: x for key, x in {**json.loads(path.read_text()), **changes}.items()
                                if x is not None}))


HAND = [
    (lambda f: about(f, scale=None), "latents.json has no scale: of x = (z - shift) * scale"),
    (lambda f: about(f, vae=None), "latents.json has no vae: a diffusers autoencoder, to decode samples"),
    (lambda f: about(f, num_classes=None), "latents.json has no num_classes: labels are from 0 to num_"),
    *((lambda f, names=names: about(f, class_names=names), "class_names must be a list of num_classes names")
      for names in (["a"], list(range(10)), "abcdefghij", dict.fromkeys("abcdefghij", 0))),
    (lambda f: about(f, scale=-1), "scale above 0"),
    (lambda f: changed(f, "moments", np.float64), "moments.npy is float64 (12, 8, 8, 8) in C order, not fl"),
    (lambda f: changed(f, "labels", np.float32), "labels.npy is float32 (12,) in C order, not int8 or int"),
    (lambda f: changed(f, "moments", np.asfortranarray), "(12, 8, 8, 8) in Fortran order, not"),
    (lambda f: changed(f, "labels", lambda x: x[:5]), "labels.npy is int64 (5,) in C order, not"),
    (lambda f: changed(f, "moments", lambda x: np.concatenate([x[:, :4], np.log(x[:, 4:])], 1)), "below 0"),
    (lambda f: (f / "labels.npy").unlink(), "there is no"),
    (lambda f: (f / "moments.npy").unlink(), "moments.npy")]


@pytest.mark.parametrize("change, says", HAND)
def test_latents_made_by_hand(capsys, tmp_path, change, says):
    """What is wrong and what it is for; nobody is told to extract again what was not extracted."""
    folder = write_set(tmp_path / "set", files_sha256=None)
    about(folder)
    flags = (*TINY, "--data", folder, "--run-dir", tmp_path / "run", "--max-steps", 1)
    change(folder)
    line = refusal(capsys, "train", *flags)
    assert says in line and "extract" not in line and not (tmp_path / "run").exists()


def test_what_extraction_made_is_extracted_again(capsys, tmp_path):
    """If it is damaged; images that only REPA needs are named."""
    folder = write_set(tmp_path / "set")
    flags = (*TINY, "--data", folder, "--run-dir", tmp_path / "run", "--max-steps", 1)
    (folder / "images.npy").unlink()
    said(capsys, "train", *flags)
    line = refusal(capsys, "train", *flags, "--repa-depth", 1, "--repa-encoder", "dinov2_vitt14")
    assert "images.npy, which REPA needs: extract again, with --store-images" in line
    (folder / "moments.npy").write_bytes((folder / "moments.npy").read_bytes()[:-9])
    assert "if damaged, remove them and extract them again" in refusal(capsys, "train", *flags)


# ---- moving


def test_moved_to_another_place(capsys, monkeypatch, latents, vae, tmp_path):
    """A run, its data and their VAE are copied: it goes on there as it would have here, draws and samples; a
    VAE of the same path with another content is refused."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(latents, here / "data")
    shutil.copytree(vae, here / "vae")
    about(here / "data", vae=str(here / "vae"))
    flags = (*TINY, "--lr", 1e-3, "--run-dir", "run", "--data", "data", "--max-steps")
    monkeypatch.chdir(here)
    said(capsys, "train", *flags, 2)
    shutil.copytree(here, there)
    said(capsys, "train", *flags, 4)
    (here / "vae").rename(here / "old")
    monkeypatch.chdir(there)
    line = refusal(capsys, "train", *flags, 4, "--sample-every", 4)
    assert f"{here / 'vae'}" in line and "latents.json" in line and "--vae" in line
    about(there / "data", vae=str(there / "vae"), class_names=["better", "names", "now"])
    said(capsys, "train", *flags, 4, "--sample-every", 4)
    assert_same_run(here / "run", there / "run")
    said(capsys, "sample", "--ckpt", "run", "--num-steps", 2)
    changed_vae = json.loads((there / "vae" / "config.json").read_text()) | {"sample_size": 99}
    (there / "vae" / "config.json").write_text(json.dumps(changed_vae))
    assert "not those that made the latents" in refusal(capsys, "train", *flags, 5, "--sample-every", 1)


def test_another_set_of_the_same_name(capsys, monkeypatch, tmp_path):
    """Of as many images under the same names, in a folder of the same name: no run goes on with it."""
    here, there = (write_set(tmp_path / name / "set") for name in "ab")
    changed(there, "labels", lambda x: x[::-1])
    monkeypatch.chdir(tmp_path)
    flags = (*TINY, "--max-steps")
    said(capsys, "train", *flags, 2, "--data", here)
    assert "runs/SiT-Ti-4_data-set_" in said(capsys, "train", *flags, 3, "--data", here)
    for steps in (3, 4):
        line = refusal(capsys, "train", *flags, steps, "--data", there)
        assert "latents_sha256 is" in line and "give another --run-dir" in line


def test_by_hand_and_moved(capsys, vae, tmp_path):
    """Of latents that do not say what their VAE holds, too."""
    folder, run = write_set(tmp_path / "set", vae=str(vae)), tmp_path / "run"
    flags = (*TINY, "--data", folder, "--run-dir", run, "--max-steps")
    said(capsys, "train", *flags, 1)
    shutil.copytree(vae, tmp_path / "vae")
    about(folder, vae=str(tmp_path / "vae"))
    said(capsys, "train", *flags, 2)
    (tmp_path / "vae").rename(tmp_path / "old")  # nobody needs it now
    said(capsys, "train", *flags, 3)
    (tmp_path / "old").rename(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert "vae_content is" in refusal(capsys, "train", *flags, 4)


def test_a_folder_in_which_nothing_was_learned(capsys, monkeypatch, data, tmp_path):
    """As after too large a batch: other settings may take it; not once a step was logged."""
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
        refusal(capsys, "train", *flags)
    said(capsys, "train", *flags, "--batch-size", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", Mock(side_effect=OSError))
        refusal(capsys, "train", *flags, "--run-dir", tmp_path / "b")
    assert "lr is" in refusal(capsys, "train", *flags, "--run-dir", tmp_path / "b", "--lr", 1)
    assert "give another --run-dir" in refusal(capsys, "train", *flags, "--lr", 1)


def test_a_transformer_without_a_head(capsys, monkeypatch, data, tmp_path):
    """It would be trained as plain SiT under another name."""
    monkeypatch.setattr(models.SiT, "add_head", lambda *args: None)
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--max-steps", 1)
    assert "SiT-Ti/4 has no head for vae_repa" in refusal(capsys, "train", *TINY, *flags)


@pytest.mark.parametrize("line", ["lr looks fine", "", '{"seconds": ', '{"seconds": null}', "[1]"])
def test_a_log_that_a_user_wrote_into(capsys, data, tmp_path, line):
    flags = (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps")
    said(capsys, "train", *flags, 1)
    state = load(tmp_path / "run" / "state.pt")
    torch.save({**state, "log": state["log"] + f"{line}\n"}, tmp_path / "run" / "state.pt")
    said(capsys, "train", *flags, 2)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_the_last_step_is_logged(capsys, data, tmp_path):
    fit(capsys, data, tmp_path / "run", "--log-every", 4, "--max-steps", 6)
    assert [line["step"] for line in log(tmp_path / "run")] == [4, 6]


def test_a_job_that_is_killed_has_said_what_it_is(data, tmp_path):
    """Though a file's lines wait in memory by default."""
    flags = map(str, (*TINY, "--data", data, "--run-dir", tmp_path / "run", "--max-steps", 1000000))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "train.py", *flags]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        with subprocess.Popen(command, stdout=out, stderr=err, env=own) as job:
            wait_until(lambda: (tmp_path / "err").stat().st_size, job)
            job.kill()
    assert "from step 0 to 1000000, on 1 x cpu" in (tmp_path / "out").read_text()


# ---- on images that nobody here drew


def test_a_folder_of_images(capsys, monkeypatch, images, tmp_path):
    """README's lines for own images, with fewer steps, and a VAE of their own."""
    flags = ("--images-from", images, "--steps", 2, "--batch-size", 4, "--out", tmp_path / "vae")
    process("tests/data/train_vae", *flags)
    monkeypatch.syspath_prepend(ROOT / "tests/data")
    status, _, err = cli(capsys, "train_vae", *flags)
    assert status == 2 and f"--out {tmp_path / 'vae'} exists" in message(err)
    flags = ("--image-size", 64, "--vae", tmp_path / "vae", "--out", tmp_path / "mine")
    said(capsys, "extract_latents", "--images", images, *flags, "--num-workers", 1)
    flags = ("--data", tmp_path / "mine", "--run-dir", tmp_path / "run", "--ema-decay", 0.5)
    assert "12 images of 3 classes" in said(capsys, "train", *TINY, *flags, "--max-steps", 4)
    few = ("--num-steps", 2, "--classes", "class1", "--per-class", 2)
    with Image.open(said(capsys, "sample", "--ckpt", tmp_path / "run", *few).splitlines()[0]) as picture:
        assert picture.size == (128, 64)
