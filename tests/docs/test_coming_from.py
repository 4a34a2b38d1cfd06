"""What docs/coming-from.md says of other libraries and of ours: options that there are, and what they mean."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import TrainingArguments

import clipft
from clipft.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
TORCHRUN = {"--nproc-per-node", "--nnodes"}
SCRIPT = {"model_name_or_path", "train_file", "image_column", "caption_column", "max_seq_length"}  # of run_clip.py
SCRIPT |= {"freeze_vision_model", "freeze_text_model"}


def column(section: str, number: int) -> list[str]:
    """Code of a column, 0 for theirs and 1 for ours."""
    rows = [line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    return [code for row in rows[2:] for code in re.findall(r"`([^`]+)`", row[number])]


@pytest.mark.parametrize("section", SECTIONS)
def test_our_options_are_options_of_a_command(section):
    group: Any = typer.main.get_command(app)
    known = {name for command in group.commands.values() for param in command.params for name in param.opts}
    named = {word for code in column(section, 1) for word in code.split() if word.startswith("--")}
    assert named - known - TORCHRUN == set()


def test_our_command_lines_parse():
    group: Any = typer.main.get_command(app)
    base = ["--model", "demo", "--data", "d", "--output", "o"]
    for code in (code for section in SECTIONS for code in column(section, 1) if re.match(r"--[\w-]+ [^=]+$", code)):
        if not code.startswith(tuple(TORCHRUN)):
            group.commands["train"].make_context("clipft train", [*base, *shlex.split(code)])
    whole = [code for section in SECTIONS for code in column(section, 1) if re.match(r"clipft \w+ --model ", code)]
    assert len(whole) > 3
    for _, name, *words in map(shlex.split, whole):
        group.commands[name].make_context(f"clipft {name}", words)


def test_their_trainers_arguments_are_arguments():
    names = {field.name for field in dataclasses.fields(TrainingArguments)} | SCRIPT
    section = next(name for name in SECTIONS if name.startswith("Hugging Face"))
    named = {word for code in column(section, 0) for word in re.findall(r"--(\w+)", code)}
    assert len(named) > 8
    assert named - names == set()


def test_open_clips_command_lines_parse():
    params = pytest.importorskip("open_clip_train.params")
    lines = [code for code in column("open_clip", 0) if code.startswith("--")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)
        params.parse_args(words if len(words) > 1 or words[0] != "--imagenet-val" else [*words, "DIR"])


def test_open_clip_counts_the_projection_as_a_group():
    transformer = pytest.importorskip("open_clip.transformer")
    groups, layers = re.search(r"unlocked-groups (\d)`.*?`--freeze vision:(\d)`", SECTIONS["open_clip"]).groups()
    tower = transformer.VisionTransformer(8, 4, width=8, layers=4, heads=2, mlp_ratio=1.0, output_dim=4)
    tower.lock(int(groups))
    blocks = [all(p.requires_grad for p in block.parameters()) for block in tower.transformer.resblocks]
    assert sum(blocks) == int(layers)
    assert tower.proj.requires_grad and tower.ln_post.weight.requires_grad
    assert not tower.conv1.weight.requires_grad


def test_sentence_transformers_has_what_is_named():
    losses = pytest.importorskip("sentence_transformers.losses")
    util = pytest.importorskip("sentence_transformers.util")
    section = column("sentence-transformers", 0)
    named = {name for code in section for name in re.findall(r"\b\w+NegativesRankingLoss", code)}
    assert len(named) == 2
    assert all(hasattr(losses, name) for name in named)
    assert hasattr(util, "semantic_search")


def test_their_loss_in_both_directions_is_ours():
    losses = pytest.importorskip("sentence_transformers.losses")
    options = re.search(r"with `(directions=.*?)` ", SECTIONS["sentence-transformers"])[1]
    if "directions" not in inspect.signature(losses.MultipleNegativesRankingLoss).parameters:
        pytest.skip("an older sentence-transformers")
    one, both = (
        losses.MultipleNegativesRankingLoss(None, **keywords) for keywords in ({}, eval(f"dict({options})", {}))
    )
    images, texts = torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=torch.manual_seed(0)), dim=-1)
    ours = clipft.contrastive_loss(images, texts, 20.0).item()
    assert both.compute_loss_from_embeddings([images, texts], None).item() == pytest.approx(ours, abs=1e-5)
    assert one.compute_loss_from_embeddings([images, texts], None).item() != pytest.approx(ours, abs=1e-3)


def test_their_search_and_ours_name_the_same_rows():
    util = pytest.importorskip("sentence_transformers.util")
    pytest.importorskip("faiss")
    corpus, queries = (torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.manual_seed(n))) for n in (9, 3))
    theirs = [[hit["corpus_id"] for hit in hits] for hits in util.semantic_search(queries, corpus, top_k=5)]
    assert clipft.search(corpus, queries, k=5)[1].tolist() == theirs
