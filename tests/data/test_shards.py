"""clipft.load_pairs on WebDataset tar shards, read in place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import encoded, picture, tiny_clip
from torch.utils.data import DataLoader

import clipft
from clipft.data.rows import PairRows
from clipft.data.sampling import EpochSampler


@pytest.fixture(scope="module")
def processor():
    return tiny_clip()[1]


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path) -> Path:
    """Twelve samples in three shards, captions in .txt, .json (several) or both."""
    folder.mkdir(parents=True)
    for number in range(3):
        members: dict[str, bytes] = {}
        for index in range(4 * number, 4 * number + 4):
            members[f"set/{index:04d}.png"] = encoded(picture(index)[0], format="PNG").data
            captions = [f"caption {index}"] + [f"again {index}"] * (number == 1)
            members[f"set/{index:04d}.json"] = json.dumps({"captions": captions, "width": 50}).encode()
            if number == 2:
                members[f"set/{index:04d}.txt"] = f"text {index}\n".encode()
        shard(folder / f"pairs 1%-{number:03d}.tar", members)
    return folder


def test_shards_are_read_in_place(tmp_path: Path, processor) -> None:
    folder = write_shards(tmp_path / "shards")
    names = [folder, folder / "pairs 1%-{000..002}.tar", folder / "pairs*.tar"]
    sets = [clipft.load_pairs(name) for name in names]
    assert all(part["caption"][:] == sets[0]["caption"][:] for part in sets)
    dataset = sets[0]
    assert [dataset[i]["caption"] for i in (0, 5, 11)] == [["caption 0"], ["caption 5", "again 5"], ["text 11"]]
    for index in (0, 6, 11):
        assert np.array_equal(np.asarray(dataset[index]["image"]), np.asarray(picture(index)[0]))
    assert len(clipft.load_pairs(folder / "pairs 1%-000.tar")) == 4
    parts = dataset.train_test_split(0.25, seed=0)
    rows = PairRows(parts["train"], encoded=True)
    loader = DataLoader(
        rows, 3, sampler=EpochSampler(9, 0, lambda: 0), num_workers=2, collate_fn=clipft.CLIPDataCollator(processor)
    )
    plain = clipft.CLIPDataCollator(processor)([PairRows(parts["train"])[i] for _, i in EpochSampler(9, 0, lambda: 0)])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), plain["pixel_values"])
    dataset.save_to_disk(tmp_path / "saved")
    assert clipft.load_pairs(tmp_path / "saved", allow_outside=True)[3]["image"].size == (50, 40)


def test_labels_and_named_fields_in_shards(tmp_path: Path) -> None:
    png = encoded(picture(0)[0], format="PNG").data
    path = shard(tmp_path / "a.tar", {"1.png": png, "1.cls": b"3\n", "2.png": png, "2.cls": b"0"})
    assert clipft.load_pairs(path)["label"][:] == [3, 0]
    path = shard(tmp_path / "b.tar", {"1.mask.png": png, "1.png": png[:9], "1.json": b'{"alt": "words"}'})
    dataset = clipft.load_pairs(path, image_column="mask.png", caption_column="alt")
    assert (dataset[0]["caption"], dataset[0]["image"].size) == ("words", (50, 40))


def test_bad_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    png = encoded(picture(0)[0], format="PNG").data
    path = shard(tmp_path / "a.tar", {"1.png": png, "1.txt": b"one", "2.txt": b"two", "3.png": png[:99], "3.txt": b"3"})
    with pytest.raises(ValueError, match=r"a\.tar, 2: expected a picture \(\.jpg, "):
        clipft.load_pairs(path)
    assert clipft.load_pairs(path, on_bad_row="skip")["caption"][:] == ["one"]
    assert "left out 2 of 3 rows" in caplog.text
    for data in (b"no tar" * 99, path.read_bytes()[:600], gzip.compress(path.read_bytes())):
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.tar: expected an uncompressed tar file"):
            clipft.load_pairs(tmp_path / "bad.tar")
    with pytest.raises(FileNotFoundError, match="there is no shard"):
        clipft.load_pairs(tmp_path / "a-{00..01}.tar")
    with pytest.raises(ValueError, match="found none in 1 samples"):
        clipft.load_pairs(shard(tmp_path / "c.tar", {"1.png": png}))
