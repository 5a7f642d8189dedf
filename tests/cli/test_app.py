"""The door: exit codes, one sentence for what the user got wrong, and extras that are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorasc_fx.cli import main
from lorasc_fx.errors import MissingExtra
from lorasc_fx.extras import module_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian", "x.toml"],
            "no command is called 'trian'; nearest: 'train'; known: train, sites, fold, export, compare",
        ),
        (["train"], "train needs a configuration file first: lorasc-fx train CONFIG.toml"),
        (["compare", "--compare.seeds", "1"], "compare needs a configuration file first"),
        (["train", "absent.toml"], "absent.toml: the configuration cannot be read: No such file or directory"),
        (["train", "tiny.toml", "--data.name", "mnist"], "no data set is called 'mnist'; nearest: 'mnist5k'"),
        (["train", "tiny.toml", "--data.name", "csv:a.csv"], "the model takes images, and csv:a.csv holds texts"),
        (["train", "tiny.toml", "--model.name", "timm:resnet81"], "timm has no model 'resnet81'; nearest: 'resnet18'"),
        (["train", "tiny.toml", "--train.device", "warp"], "train.device is 'warp': "),
        (["train", "tiny.toml", "--spec.targets", "0.wieght"], "matches no weight; nearest: '0.weight'"),
        (["compare", "tiny.toml", "--spec.train"], "compare.methods has 'probe', which trains what spec.train names"),
        (["compare", "tiny.toml", "--compare.methods", "lorac"], "Error parsing compare: compare.methods has 'lorac'"),
        (["compare", "tiny.toml", "--data.shifts", "nose"], "no shift is called 'nose'; nearest: 'noise'"),
        (["sites", "python:tiny_model:build"], "give the shape of its input, as --input 2 3 64 64"),
        (["sites", "python:tiny_model:build", "--input", "2", "5"], "refuses the example inputs"),
        (["sites", "timm:absent"], "timm has no model 'absent'"),
        (["fold", "absent"], "absent holds no run: there is no config.toml in it"),
        (["train", "tiny.toml", "--spec.rnk", "3"], "Perhaps you meant"),
    ],
)
def test_what_the_user_got_wrong_is_a_sentence_and_2(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.err + said.out).replace("│", " ").split())
    assert "Traceback" not in said.err + said.out
    assert not (place / "runs").exists()  # nothing was begun


def test_a_fault_of_ours_keeps_its_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("lorasc_fx.cli.sites.run_sites", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["sites", "timm:resnet18"])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["compare", "-h"], ["sites", "-h"], ["fold", "-h"], ["export", "-h"]]
)
def test_help_is_0(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert "lorasc-fx" in capsys.readouterr().out


def test_no_command_shows_the_usage_and_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "lorasc-fx compare CONFIG.toml" in capsys.readouterr().out


BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from lorasc_fx.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize(
    ("blocked", "arguments", "sentence"),
    [
        ("tyro", ["sites", "timm:resnet18"],
         "lorasc-fx: this needs the package 'tyro', which is not installed: pip install 'lorasc-fx[cli]'"),
        ("timm", ["sites", "timm:resnet18"],
         "lorasc-fx: this needs the package 'timm', which is not installed: pip install 'lorasc-fx[vision]'"),
        ("sklearn", ["train", "tiny.toml"],
         "lorasc-fx: this needs the package 'sklearn', which is not installed: pip install 'lorasc-fx[vision]'"),
        ("transformers", ["sites", "hf:package:minilm"],
         "lorasc-fx: this needs the package 'transformers', which is not installed: pip install 'lorasc-fx[text]'"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_sentence(
    place: Path, environment: dict[str, str], blocked: str, arguments: list[str], sentence: str
) -> None:
    code = BLOCKED.format(names=[blocked], arguments=arguments)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (ended.returncode, ended.stderr.strip()) == (2, sentence)


def test_a_package_whose_own_need_is_missing_is_not_explained_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_package.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_absent") as caught:
        module_of("vision", "needy_package")
    assert not isinstance(caught.value, MissingExtra)
