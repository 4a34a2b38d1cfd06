"""Names, ids, queries and paths from data are shown as they are: no markup, no escapes, no formulas."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from rich.table import Table
from rich.text import Text
from tiny_clip import class_folders, picture
from typer.testing import CliRunner

from clipft.cli import app
from clipft.console import PlainConsole, gain, show
from clipft.errors import line_of, shown
from clipft.report.model_card import write_model_card
from clipft.report.sheet import Row, draw_sheet

NASTY = ["[red]", "[/b]", "shirt [m]", ":apple: $x^2$ 100%", "猫 😀", "<b>|*_"]
NASTY += ["\x1b]0;title\x07\x1b[2Jdog", "a\r\nb\u202ec"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def table(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(2 * len(names)):
        picture(index)[0].save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "label": names[index // 2]}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


# ---- the terminal ----


def test_an_error_is_one_line() -> None:
    assert line_of(ValueError("two\n  lines,\tand more\n")) == "two lines, and more"
    assert line_of(RuntimeError("")) == line_of(RuntimeError("\n")) == "RuntimeError"
    assert line_of(OSError("x" * 2000)) == "x" * 500 + "..." and line_of(OSError("x" * 2000), 4000) == "x" * 2000


def test_control_characters_are_shown() -> None:
    assert shown("a\x1b[31m\x00\x9b\u202e\udc80\n猫") == r"a\x1b[31m\x00\x9b\u202e\udc80\n猫"
    assert shown("two\nlines\r", lines=True) == "two\nlines\\r"
    said = io.StringIO()
    console = PlainConsole(file=said, width=80)
    rows = Table("[b]head", title="\x1b[2J [/x]")
    rows.add_row("[red]x \x9b :apple:")
    console.print(rows)
    console.print("[/b] \x1b]0;t\x07")
    console.print(Text("a \x1b[5m folder"))
    for part in (r"a \x1b[5m folder", "[b]head", r"\x1b[2J [/x]", r"[red]x \x9b :apple:", r"[/b] \x1b]0;t\x07"):
        assert part in said.getvalue()


def test_the_table_of_many_classes_has_the_worst() -> None:
    rows = [{"class": f"c{i}", "precision": 0.5, "recall": 0.5, "f1": i / 300, "support": i % 3} for i in range(300)]
    said = io.StringIO()
    part = {"accuracy": 0.5, "per_class": rows, "intervals": {"accuracy": [0, 1], "per_class": []}}
    show({"score": {"zero_shot": part}}, "title", PlainConsole(file=said, width=80))
    lines = said.getvalue()
    assert "50 of 300 classes" in lines and " c1 " in lines and " c3 " not in lines and " c299 " not in lines


@pytest.mark.parametrize("width", [80, 140])
def test_a_gain_comes_with_its_interval(width: int) -> None:
    before, after = ({"retrieval": {"R@1": value, "intervals": {"R@1": [0, 1]}}} for value in (0.25, 0.75))
    gains = {"retrieval": {"R@1": {"value": 0.5, "interval": [-0.125, 0.875]}}}
    said = io.StringIO()
    show({"before": before, "after": after}, "title", PlainConsole(file=said, width=width), gains=gains)
    assert "+0.500 (-0.125 to +0.875)" in said.getvalue()
    assert ("0.250 [0.000 - 1.000]" in said.getvalue()) == (width == 140)
    for edges, colour in (([-0.1, 0.9], "default"), ([0.1, 0.9], "green"), ([-0.9, -0.1], "red")):
        assert gain("R@1", edges[0] + edges[1], edges).style == colour


def test_commands_show_names_as_they_are(base: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "$x [b] 猫", NASTY)
    out = tmp_path / "score.json"
    result = run("evaluate", "--model", base, "--data", data, "--output", out)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "\x07" not in result.output
    for name in NASTY:
        assert shown(name) in result.output
    assert str(data) in result.output
    assert [row["class"] for row in json.loads(out.read_text())["zero_shot"]["per_class"]] == sorted(NASTY)
    assert "&lt;b&gt;" in out.with_suffix(".html").read_text()
    result = run("doctor", data)
    assert ("\x1b" not in result.output and "[/b]: 2" in result.output) or "class" in result.output
    (data.parent / "rows.jsonl").write_text('{"image": "no \\u001b[2J [red].png", "label": "a"}\n')
    result = run("evaluate", "--model", base, "--data", data)
    assert result.exit_code == 2 and "\x1b" not in result.output and "[red].png" in result.output


def test_what_is_logged_is_shown_alike(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from clipft.console import log_to_terminal

    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    logger = logging.getLogger("clipft")
    before = list(logger.handlers)
    log_to_terminal()
    added = [handler for handler in logger.handlers if handler not in before]
    logger.warning("left out: %s", "\x1b[2Jcat")
    for handler in added:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "left out: \\x1b[2Jcat\n"


def test_results_are_written_before_they_are_printed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_terminal(*args: Any, **kwargs: Any) -> None:
        raise OSError("the terminal is gone")

    data = class_folders(tmp_path / "data", 8)
    monkeypatch.setattr("clipft.recipes.evaluate.show", no_terminal)
    monkeypatch.setattr("clipft.recipes.doctor.show_findings", no_terminal)
    assert run("evaluate", "--model", base, "--data", data, "--output", tmp_path / "s.json").exit_code == 2
    assert run("doctor", data, "--json", tmp_path / "d.json").exit_code == 2
    assert (tmp_path / "s.json").is_file() and (tmp_path / "s.html").is_file() and (tmp_path / "d.json").is_file()


# ---- files for people ----


def _report(data: str) -> dict[str, Any]:
    names = ("accuracy", "balanced_accuracy", "macro_f1")
    part = {"zero_shot": {**dict.fromkeys(names, 0.5), "intervals": {name: [0.4, 0.6] for name in names}}}
    return {
        "before": part,
        "after": part,
        "test": {"data": data, "pictures": 4},
        "environment": {"clipft": "1", "packages": {}},
    }


@pytest.mark.parametrize("name", [*NASTY, "a\n---\ntags: [x]\n```\n# b", 'quo"te\\'])
def test_a_model_card_holds_any_name(name: str, tmp_path: Path) -> None:
    settings = {"model": "demo", "data": name, "caption_templates": [f"{name} {{}}"], "output": "x"}
    write_model_card(tmp_path, "run", _report(name), settings, adapter=False)
    text = (tmp_path / "README.md").read_text()
    assert "\x1b" not in text and "\r" not in text and "\u202e" not in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["clip", "clipft"]
    assert card.data.eval_results[0].dataset_name == shown(name)
    fence = next(line for line in text.splitlines() if line.endswith("`yaml")).removesuffix("yaml")
    options = yaml.safe_load(text.split(f"{fence}yaml\n")[1].split(f"\n{fence}\n")[0])
    assert options == {"model": "demo", "data": shown(name), "caption_templates": [shown(f"{name} {{}}")]}
    headings = [line for line in text.split(f"{fence}yaml")[0].splitlines() if line.startswith("#")]
    assert len(headings) == 4  # the name, results, use, training
    assert "<b>" not in text.split("---\n", 2)[2].split("## Training")[0].replace(r"\<b\>", "")


def test_a_sheet_draws_any_name_and_says_which_characters_have_no_font(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Row(name, [(name, 0.5, None)]) for name in [*NASTY[:4], "$\\frac{a$ 猫"]]
    with caplog.at_level(logging.WARNING):
        draw_sheet(tmp_path / "s.png", [*rows, Row("\ue000", [("a", 0.5, None)])])
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert "characters that no font here has" in caplog.text and "\ue000" in caplog.text


def test_names_in_an_ascii_locale(tmp_path: Path) -> None:
    """Where Python takes the locale at its word: names of files are UTF-8 all the same, the terminal is not."""
    for number, name in enumerate(["猫", "dog"]):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (99 * number, 0, 0)).save(tmp_path / "data" / name / "é.png")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "clipft.cli", "doctor", tmp_path / "data", "--model", "demo"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode < 2 and not done.stderr, done.stderr  # 1: so few pictures are a problem
    assert b"read 2 of 2" in done.stdout and done.stdout.isascii()
