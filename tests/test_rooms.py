"""The house: who may import whom, and which files work in an empty folder."""

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

import harness

SCRIPTS = (
    "dino_train",
    "eval_knn",
    "eval_linear",
    "eval_copies",
    "eval_retrieval",
    "eval_segmentation",
    "eval_video",
    "embed",
    "visualize",
    "export",
)
FILES = [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]


def name_of(file: Path) -> str:
    """Return a file's name as imports have it."""
    path = file.relative_to(ROOT).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__")


NAMES = {name_of(file) for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Return the files of this repository that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & NAMES


IMPORTS = {name_of(file): imports_of(file) for file in FILES}


def test_leaves_import_no_other_file() -> None:
    for name in ("models", "losses", "multicrop", "optimizers", "pixels", "tar_shards"):
        assert IMPORTS[name] == set()
    assert IMPORTS["data"] == {"multicrop", "folders", "pixels", "tar_shards"}
    assert IMPORTS["folders"] == {"tar_shards"}
    assert IMPORTS["config"] == {"models", "multicrop"}


def test_harness_imports_no_script() -> None:
    for name, imports in IMPORTS.items():
        if name.startswith("harness"):
            assert not imports & set(SCRIPTS), name


def test_imports_in_harness_go_up_its_table_of_contents_alone() -> None:
    """So that there is no circle: a file imports those that stand above it."""
    order = re.findall(r"^(\w+)  +\S", harness.__doc__, re.MULTILINE)
    assert sorted(order) == sorted(
        name.removeprefix("harness.") for name in NAMES if name.startswith("harness.")
    )
    for place, name in enumerate(order):
        for imported in IMPORTS[f"harness.{name}"]:
            if imported.startswith("harness."):
                assert imported.removeprefix("harness.") in order[:place], (name, imported)


def test_scripts_import_one_other_script_at_most() -> None:
    """Training hands eval_knn's accuracy to its online k-NN."""
    for name in SCRIPTS:
        expected = {"eval_knn"} if name == "dino_train" else set()
        assert IMPORTS[name] & set(SCRIPTS) == expected


# ---------------------------------------------------------------- copied alone

USES = {
    "losses.py": """
        import torch
        from losses import DinoLoss
        dino_loss = DinoLoss(16)
        student = torch.randn(4, 3, 16, requires_grad=True)
        teacher = torch.randn(2, 3, 16)
        dino_loss(student, teacher, teacher_temp=0.04).backward()
        dino_loss.update_center(teacher)
        assert student.grad.abs().sum() > 0 and dino_loss.center.abs().sum() > 0
    """,
    "models.py": """
        import torch
        from models import DinoModel, DinoProjectionHead, get_backbone, load_checkpoint
        from models import ModelConfig, save_checkpoint, update_teacher_EMA
        config = ModelConfig("resnet10_half", image_size=32, projection_output_dim=16)
        model, teacher = DinoModel.from_config(config), DinoModel.from_config(config)
        crops = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)]
        assert model(crops).shape == (3, 2, 16)
        update_teacher_EMA(model, teacher, 0.9)
        save_checkpoint("c.safetensors", model, {"step": 1})
        assert load_checkpoint("c.safetensors")[1] == {"step": 1}
    """,
    "multicrop.py": """
        import torch
        from multicrop import CropConfig, MultiCrop, hash_keys
        images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
        crops = MultiCrop(CropConfig())(images, None, hash_keys(0, 0, torch.arange(2)))
        assert [crop.shape[-1] for crop in crops] == [224] * 2 + [96] * 8
    """,
    "data.py": """
        import torch
        from PIL import Image
        from data import CropConfig, Cropper, MultiCrop, StepSampler, build_dataset, collate
        from pathlib import Path
        for name in ("a", "b"):
            Path("images", name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (i, 9, 99)).save(f"images/{name}/{i}.png")
        dataset = build_dataset("images", canvas_size=32)
        sampler = StepSampler(len(dataset), 3, seed=0, rank=0, world=1, steps=range(2))
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
        config = CropConfig(global_crop_size=16, local_crop_size=8)
        crops_of = Cropper(MultiCrop(config), seed=0, device=torch.device("cpu"))
        assert dataset.classes == ["a", "b"]
        assert [len(crops_of(batch)) for batch in loader] == [10, 10]
    """,
    "folders.py": """
        from pathlib import Path
        from folders import find_images
        for name in ("pets/cat/1.png", "pets/dog/2.png", "pets/dog/notes.txt"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("")
        found = find_images(".", image_suffixes=[".png"])
        assert found.train.classes.tolist() == ["cat", "dog"] and found.test is None
        assert found.notes[-1] == "entered pets/"
    """,
    "pixels.py": """
        import numpy as np
        from PIL import Image
        from pixels import decode, image_suffixes, to_canvas
        Image.fromarray(np.array([[0, 1000], [2000, 4000]], np.uint16)).save("cells.png")
        image = decode(b"cells.png", levels=(1000, 2000))
        assert image[0].tolist() == [[0, 0], [255, 255]] and ".png" in image_suffixes()
        assert to_canvas(image, 8).shape == (3, 8, 8)
    """,
    "tar_shards.py": """
        import tarfile
        from pathlib import Path
        Path("cat").mkdir()
        Path("cat/1.jpg").write_bytes(b"one")
        with tarfile.open("a.tar", "w") as tar:
            tar.add("cat/1.jpg")
        from tar_shards import TarImages, scan_tars
        members = scan_tars([Path("a.tar")], (".jpg",))
        assert TarImages(members)[0].read() == b"one"
        assert members["names"].tolist() == [b"cat/1.jpg"]
    """,
    "optimizers.py": """
        import torch
        from torch import nn
        from optimizers import build_optimizer, clip_gradients, set_rates
        for name in ("adamw", "sgd", "lars"):
            layer = nn.Linear(3, 2)
            before = layer.weight.detach().clone()
            optimizer = build_optimizer(layer, name)
            layer(torch.ones(1, 3)).sum().backward()
            set_rates(optimizer, lr=0.1, weight_decay=0.1)
            clip_gradients(layer.parameters(), 0.5)
            assert layer.weight.grad.norm() <= 0.5 + 1e-6
            optimizer.step()
            assert not torch.equal(before, layer.weight)
    """,
    "harness/feature_maps.py": """
        import timm, torch
        from feature_maps import PCA, class_attention, feature_map, patch_map
        backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
        backbone.patch_size = 16
        images = torch.randn(2, 3, 32, 32)
        attention = patch_map(class_attention(backbone, images), backbone, images)
        maps = feature_map(backbone, images)
        assert attention.shape == (2, 3, 2, 2) and maps.shape == (2, 192, 2, 2)
        assert PCA.of_maps(list(maps)).colours(maps[0]).shape == (2, 2, 3)
    """,
    "harness/pictures.py": """
        from PIL import Image
        from pictures import curves
        log = [{"epoch": i, "loss": 5 - i, "lr": 0.1, "knn_top1": 30 + i} for i in range(4)]
        curves(log, output_dim=4096).save("curves.png")
        Image.open("curves.png").verify()
    """,
    "harness/fast_backbone.py": """
        import timm, torch
        from fast_backbone import DropPath, share_drop_path, skip_unread_tokens
        options = dict(img_size=32, depth=2, num_classes=0, drop_path_rate=0.1)
        backbone = timm.create_model("vit_tiny_patch16_224", **options).eval()
        expected = backbone(torch.ones(1, 3, 32, 32))
        assert skip_unread_tokens(backbone)
        share_drop_path(backbone)
        assert any(isinstance(module, DropPath) for module in backbone.modules())
        assert torch.allclose(backbone(torch.ones(1, 3, 32, 32)), expected, atol=1e-5)
    """,
    "harness/convolutions.py": """
        import torch
        from convolutions import multiply_for_weight_gradients, products_are_faster
        assert products_are_faster() in (True, False)
        convolution = torch.nn.Conv2d(64, 4, 3, padding=1, bias=False)
        multiply_for_weight_gradients(convolution)
        convolution(torch.ones(1, 64, 1, 1)).sum().backward()
        assert convolution.weight.grad[:, :, 1, 1].eq(1).all()
        assert convolution.weight.grad.sum() == 256
    """,
}


def copyable_files() -> dict[str, list[str]]:
    """Return the files that docs/code.md calls copyable, and what it says to copy with each."""
    rows = re.findall(
        r"^\| `([\w/]+\.py)` \|.*\| yes(.*?) \|$", (ROOT / "docs" / "code.md").read_text(), re.M
    )
    return {file: re.findall(r"`([\w/]+\.py)`", companions) for file, companions in rows}


def test_every_copyable_file_is_used_below() -> None:
    assert copyable_files().keys() == USES.keys()


# Runs each use in a process of its own and in its own folder, forked from one that has imported the
# packages alone: the seconds of imports are spent once.
FORKS = """
import json, os, sys, traceback
sys.modules.update(accelerate=None, tyro=None, rich=None, yaml=None)
import einops, numpy, safetensors.torch, timm, torch, torchvision.transforms.v2
torch.set_num_threads(1)
for folder, use in json.load(sys.stdin):
    if os.fork() == 0:
        os.chdir(folder)
        try:
            exec(use, {})
        except BaseException:
            with open("error.txt", "w") as file:
                traceback.print_exc(file=file)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def folders_of_uses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in which each file was used alone; with error.txt where that failed."""
    folders: dict[str, Path] = {}
    uses: list[tuple[str, str]] = []
    for file, use in USES.items():
        folders[file] = tmp_path_factory.mktemp("alone")
        for name in [file, *copyable_files()[file]]:
            shutil.copy(ROOT / name, folders[file])
        done = "open('done.txt', 'w').close()"
        uses.append((str(folders[file]), f"{textwrap.dedent(use)}\n{done}"))
    command = [sys.executable, "-c", FORKS]
    subprocess.run(command, input=json.dumps(uses), text=True, check=True)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("file", USES)
def test_copied_file_is_of_use_in_an_empty_folder(
    file: str, folders_of_uses: dict[str, Path]
) -> None:
    error = folders_of_uses[file] / "error.txt"
    assert not error.exists(), error.read_text()
    assert (folders_of_uses[file] / "done.txt").exists()
