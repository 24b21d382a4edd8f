"""What the README and docs/ say to type is typed here: code runs, command lines are read."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import embed
import eval_copies
import eval_knn
import eval_linear
import eval_retrieval
import eval_segmentation
import eval_video
import export
import visualize
from harness.command import read_flags
from harness.flags import check_values, parse_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
CODE = [block for language, block in BLOCKS if language == "python"]


def _train(flags: list[str]) -> None:
    if "--resume" in flags:
        return  # which reads the run's folder: tests/test_dino_train.py
    check_values(parse_config(flags))


def _reader(kind: type) -> Callable[[list[str]], object]:
    return lambda flags: read_flags(kind, flags, None)


READERS = {
    "dino_train.py": _train,
    "embed.py": _reader(embed.EmbedConfig),
    "eval_copies.py": _reader(eval_copies.CopiesConfig),
    "eval_knn.py": _reader(eval_knn.KnnConfig),
    "eval_linear.py": _reader(eval_linear.LinearConfig),
    "eval_retrieval.py": _reader(eval_retrieval.RetrievalConfig),
    "eval_segmentation.py": _reader(eval_segmentation.SegmentationConfig),
    "eval_video.py": _reader(eval_video.VideoConfig),
    "export.py": _reader(export.ExportConfig),
    "visualize.py": _reader(visualize.VisualizeConfig),
}
SCRIPT = re.compile(rf"(?<![\w/-])({'|'.join(map(re.escape, READERS))})([^`|&]*)")


def commands() -> list[tuple[str, str]]:
    """Return each script and its flags, of fenced blocks and of `code` within a line."""
    pieces = [block for language, block in BLOCKS if not language]
    pieces += re.findall(r"`((?:python|accelerate|torchrun)[^`\n]*)`", TEXT)
    found: list[tuple[str, str]] = []
    for line in "\n".join(pieces).splitlines():
        found += [(name, rest.split("#")[0].strip()) for name, rest in SCRIPT.findall(line)]
    return sorted(set(found))


COMMANDS = commands()


def test_there_are_code_and_commands() -> None:
    assert len(CODE) >= 1
    assert {name for name, _ in COMMANDS} == set(READERS)


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs_as_it_is_pasted(
    code: str,
    tiny_run: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(tiny_run)
    if "features.safetensors" in code:
        names = torch.tensor(list(b"a.jpg\0b.jpg"), dtype=torch.uint8)
        save_file({"features": torch.zeros(2, 3), "names": names}, "features.safetensors")
    shutil.copy(image_folder / "stripes" / "0.jpg", "photo.jpg")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.slow
def test_pasted_code_gives_the_features_of_embed(
    tiny_flags: list, image_folder: Path, tmp_path: Path, script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that evaluates at another size than that of its crops."""
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", 1, "--knn-every", 0, "--eval-size", 12, "--eval-resize", 14]
    script("dino_train", *tiny_flags, *flags, "--output-dir", "runs/NAME")
    photo = image_folder / "stripes" / "0.jpg"
    shutil.copy(photo, "photo.jpg")
    (code,) = (code for code in CODE if "load_checkpoint" in code)
    names: dict[str, object] = {}
    exec(compile(code, "docs/code.md", "exec"), names)
    assert names["data"]["eval_size"] != names["crops"]["global_crop_size"]
    Path("list.txt").write_text(f"{photo}\n{image_folder / 'checks' / '0.jpg'}\n")
    result = script("embed", "runs/NAME", "--data", "list.txt", "--out", "features.npy")
    assert result.returncode == 0, result.stderr
    expected = torch.from_numpy(np.load("features.npy"))[:1]
    torch.testing.assert_close(names["features"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "flags"), COMMANDS, ids=[" ".join(each) for each in COMMANDS])
def test_command_line_is_understood(name: str, flags: str) -> None:
    words = [word for word in shlex.split(flags) if word != "..."]
    if words[:1] == ["--help"]:
        return
    needs_more = flags.endswith("...") or not words
    if needs_more and name != "dino_train.py":  # the line shows how to launch it alone
        words = ["CHECKPOINT", *words]
    words = [
        word.replace("NAME", "vits16_100ep") if name == "dino_train.py" else word for word in words
    ]
    READERS[name](words)


def anchors_of(page: Path) -> set[str]:
    """Return what GitHub makes of a page's headings: `## Files, and more` is #files-and-more."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    num_anchors = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (page.name, link)
            if anchor:
                num_anchors += 1
                assert anchor in anchors_of(target), (page.name, link)
    assert num_anchors >= 15
