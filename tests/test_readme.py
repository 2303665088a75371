"""README keeps its word: its links point at the lines they name, and the flags it shows exist."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, TINY, cli, process

README = (ROOT / "README.md").read_text()


def test_links_point_at_the_definitions():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 6
    for name, file, line in links:
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", there), f"{name} is not at {file}#L{line}"


@pytest.mark.parametrize("script", ["extract_latents", "train", "sample"])
def test_flags_of_readme_exist(capsys, script):
    status, text, _ = cli(capsys, script, "--help")
    assert status == 0
    commands = re.findall(rf"{script}\.py((?: \\\n|[^\n`])*)", README)
    shown = {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)}
    if script == "train":  # the tables show flags alone
        rows = re.findall(r"^\| `(--[^`]*)`", README, re.M)
        shown |= {flag for row in rows for flag in re.findall(r"--[a-z-]+", row)}
    assert shown and not [flag for flag in shown if flag not in text]


def test_an_alignment_of_ones_own(latents, tmp_path):
    """The edits of "Add your own" in a copy of the repo: it trains, logs and samples with the new term."""
    repo = tmp_path / "repo"
    repo.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, repo)
    blocks = re.findall(r"```diff\n(\w+\.py)\n(.*?)```", README, re.S)
    assert [file for file, _ in blocks] == ["models.py", "train.py"]
    for file, diff in blocks:
        text = (repo / file).read_text()
        for hunk in diff.split("\n\n"):
            lines = [line for line in hunk.split("\n") if line]
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        (repo / file).write_text(text)
    flags = ("--data", latents, "--early-v-depth", 3, "--lr", 1e-3, "--max-steps", 6)
    process(repo / "train", *TINY, *flags, cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("SiT-Ti-4_") and "_early-v-depth-3" in run.name
    assert "early-v-weight" not in run.name
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert list(lines[0])[1:4] == ["denoising", "vae_repa", "early_v"] and len(lines) == 6
    assert lines[0]["early_v"] == pytest.approx(lines[0]["denoising"], rel=1e-5)  # both predict 0 at first
    assert lines[5]["early_v"] != lines[5]["denoising"]
    process(repo / "sample", "--ckpt", run / "checkpoints" / "0000006.pt", "--num-steps", 2, "--per-class", 1)


def test_the_top_level_holds_what_was_promised():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    promised = {"README.md", "requirements.txt", "train.py", "sample.py", "models.py", "fid.py",
                "extract_latents.py", "tests"}
    assert {path.split("/")[0] for path in tracked if path[0] != "."} == promised
