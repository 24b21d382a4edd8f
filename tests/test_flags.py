"""Settings that mean nothing, and YAML that is more than plain values: one line each."""

import re
from pathlib import Path

import pytest

import dino_train
from harness.flags import QUICKSTART, check_values, parse_config


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--projection-output-dim", "1"], "need --projection-output-dim > 1, got 1"),
        (["--teacher-momentum", "1"], "need --teacher-momentum >= 0 and < 1, got 1.0"),
        (["--center-momentum", "1"], "need --center-momentum >= 0 and < 1, got 1.0"),
        (["--canvas-size", "1"], "need --canvas-size > 7, got 1"),
        (["--canvas-size", "100000"], "and <= 4096, got 100000"),
        (["--teacher-temp", "100"], "need --teacher-temp > 0 and <= 10, got 100.0"),
        (["--student-temp", "100"], "need --student-temp > 0 and <= 10, got 100.0"),
        (["--epochs", str(10**20)], "need --epochs > 0 and <= 1000000"),
        (["--num-workers", "1000"], "and <= 512, got 1000"),
        (["--output-dir", ""], "need a name for --output-dir"),
        (["--init-from", ""], "need a name for --init-from, got ''"),
        (["--projection-output-dim", str(10**9)], "bytes of student, teacher and optimizer"),
    ],
)
def test_number_that_means_nothing_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_values(parse_config(flags))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def bomb() -> str:
    lines = ["optim:", "  a0: &a0 [x, x]"]
    lines += [f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "the key 'lr' stands twice"),
        (bomb(), "got an alias in line 2"),
        ("optim:\n  lr: !!python/object:os.system x\n", "got the tag tag:yaml.org,2002:python"),
        ("optim:\n  lr: !!float x\n", "got the tag"),
        ("[" * 5000, "cannot read"),
    ],
    ids=["twice", "bomb", "object", "tag", "deep"],
)
def test_yaml_that_is_more_than_values_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        parse_config(["--config", str(path)])
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_recipe_is_found_by_its_name_alone() -> None:
    recipe = QUICKSTART.parent / "cifar10_resnet18.yaml"
    assert parse_config(["--config", "cifar10_resnet18"]) == parse_config(["--config", str(recipe)])
    with pytest.raises(ValueError, match=r"no such recipe: cifar10_resnet81; .*cifar10_resnet18"):
        parse_config(["--config", "cifar10_resnet81"])


def test_recipe_without_data_names_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"need --data PATH: .*vits16_100ep.yaml is for ImageNet"):
        parse_config(["--config", "vits16_100ep"])
    assert parse_config(["--config", "vits16_100ep", "--data", "x"]).data.data == "x"


def test_help_begins_with_flags_that_there_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], dino_train.__doc__)
    assert stop.value.code == 0
    start, options = capsys.readouterr().out.split("Start here")[1].split("Source: DINO")
    flags = re.findall(r"^ +(--[a-z-]+)", start, flags=re.MULTILINE)
    assert len(flags) == 8
    for flag in flags:
        assert re.search(rf"{flag}\b", options), flag
