"""clipft.load_pairs on WebDataset tar shards, read in place."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import encoded, picture, tiny_clip
from torch.utils.data import DataLoader

import clipft
from clipft.data.reading import Reading
from clipft.data.rows import PairRows
from clipft.data.sampling import EpochSampler
from clipft.data.slices import read_slice
from clipft.data.sources import load_reading


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


# ---- damage ----


def head(name: bytes, size: int, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, field or b"%011o\0" % size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(name: str, data: bytes) -> bytes:
    return head(name.encode(), len(data)) + data + b"\0" * (-len(data) % 512)


PNG = encoded(picture(0)[0], format="PNG").data
END = b"\0" * 1024


def sample(number: int) -> bytes:
    return entry(f"{number}.png", PNG) + entry(f"{number}.txt", b"caption %d" % number)


def captions(path: Path, data: bytes, **options) -> tuple[list[str], Reading]:
    path.write_bytes(data)
    reading = Reading(skip=True, **options)
    return load_reading(path, reading)["caption"][:], reading


def test_files_of_a_sample_may_stand_apart(tmp_path: Path) -> None:
    members = {f"{i}.png": PNG for i in range(4)} | {f"{i}.txt": b"caption %d" % i for i in reversed(range(4))}
    assert clipft.load_pairs(shard(tmp_path / "a.tar", members))["caption"][:] == [f"caption {i}" for i in range(4)]


def test_pictures_without_an_ending(tmp_path: Path) -> None:
    members = {f"{i}{ending}": data for i in range(3) for ending, data in (("", PNG), (".txt", b"caption %d" % i))}
    assert clipft.load_pairs(shard(tmp_path / "a.tar", members))["caption"][:] == [f"caption {i}" for i in range(3)]
    bad = shard(tmp_path / "b.tar", members | {"1": b"no picture"})
    read, reading = captions(bad, bad.read_bytes())
    assert read == ["caption 0", "caption 2"] and reading.line() == "read 2 of 3: 1 unreadable: 1"
    (tmp_path / "folder").mkdir()
    for name, data in members.items():
        (tmp_path / "folder" / name).write_bytes(data)
    assert clipft.load_pairs(tmp_path / "folder")["caption"][:] == [f"caption {i}" for i in range(3)]


def test_pictures_alone_need_no_sound_captions(tmp_path: Path) -> None:
    members = {"0.png": PNG, "0.txt": b"caf\xe9", "1.png": PNG, "1.json": b"{", "2.png": PNG, "2.cls": b"x" * (2 << 20)}
    reading = Reading(pictures_only=True)
    assert load_reading(shard(tmp_path / "a.tar", members), reading)["id"][:] == [f"a.tar/{i}.png" for i in range(3)]
    assert reading.line() == "read 3 of 3"


def test_dots_in_names(tmp_path: Path) -> None:
    def load(*names: str, **options) -> list[str]:
        members = {name: PNG if name.endswith("png") else name.encode() for name in names}
        return sorted(clipft.load_pairs(shard(tmp_path / "a.tar", members), **options)["caption"])

    assert load("a_1.0.png", "a_1.0.txt", "a_2.0.png", "a_2.0.txt") == ["a_1.0.txt", "a_2.0.txt"]
    assert load("v1.0.png", "v1.1.png", "v1.0.txt", "v1.1.txt") == ["v1.0.txt", "v1.1.txt"]
    assert load("k.input.png", "k.caption.txt") == ["k.caption.txt"]
    members = {
        f"v1.{i}.{ending}": data for i in range(2) for ending, data in (("png", PNG), ("json", b'{"text": "%d"}' % i))
    }
    assert clipft.load_pairs(shard(tmp_path / "b.tar", members))["caption"][:] == ["0", "1"]
    assert load("k.png", "k.mask.png", "k.txt") == ["k.txt"]
    with pytest.raises(ValueError, match=r"a\.tar, k: expected one picture, found in\.png, out\.png; name one with"):
        load("k.in.png", "k.out.png", "k.txt")
    assert load("k.in.png", "k.out.png", "k.txt", image_column="in.png") == ["k.txt"]


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([entry("1.png", PNG), entry("1.json", b"{")], "1.json: expected JSON"),
        ([entry("1.png", PNG), entry("1.json", b"[" * 100_000)], "1.json: expected JSON"),
        ([entry("1.png", PNG), entry("1.txt", b"caf\xe9")], "1.txt: expected text in UTF-8"),
        ([entry("1.png", PNG), entry("1.txt", b"x" * (2 << 20))], "1.txt: expected a text of at most 1 MB"),
        ([sample(1), entry("1.txt", b"other")], "1.txt: expected a name once in a shard"),
        ([entry("1.txt", b"words")], "1: expected a picture (.jpg, .png, .webp, ...), found txt"),
        ([entry("1.png", PNG)], "1: expected a caption"),
        ([head(b"1.png", 0, b"2"), entry("1.txt", b"words")], "1: expected a picture"),
        ([entry("1.png", PNG[:90]), entry("1.txt", b"words")], "1: the image cannot be read"),
    ],
    ids=["json", "deep", "latin-1", "large", "twice", "no picture", "no caption", "link", "broken picture"],
)
def test_a_broken_member_is_a_bad_row(tmp_path: Path, members: list[bytes], why: str) -> None:
    found, reading = captions(tmp_path / "a.tar", sample(0) + b"".join(members) + sample(2) + END)
    assert found == ["caption 0", "caption 2"]
    assert [message.startswith(f"{tmp_path / 'a.tar'}, {why}") for message in reading.skipped] == [True]


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (head(b"x.png", 0, field=b"\xff" + (-512 + (1 << 88)).to_bytes(11, "big")), "x.png, of -512 bytes"),
        (head(b"x.png", 0, field=b"\x80" + (1 << 62).to_bytes(11, "big")), "x.png, of 4611686018427387904 bytes"),
        (head(b"x", 0, b"L", field=b"\x80" + (1 << 62).to_bytes(11, "big")), "a head of 4611686018427387904 bytes"),
        (head(b"x", 13, b"x") + b"13 path=x.txt" + b"\0" * 499, "a pax head that cannot be read"),
        (b"junk" * 128, "no head of an entry"),
        (b"\0" * 2048 + b"junk" * 256, "no head of an entry"),
    ],
    ids=["negative", "absurd", "long name", "pax", "junk", "junk after the end"],
)
def test_a_damaged_head_costs_no_other(tmp_path: Path, between: bytes, why: str) -> None:
    found, reading = captions(tmp_path / "a.tar", sample(0) + between + sample(2) + END)
    assert (found, reading.left_out.keys()) == (["caption 0", "caption 2"], {"damaged in a shard"})
    assert why in reading.skipped[0]
    with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed tar file \(.*, at byte \d+\)"):
        clipft.load_pairs(tmp_path / "a.tar")


def test_long_names_one_after_the_other(tmp_path: Path) -> None:
    name = b"far/" * 60 + b"7."
    many = (head(b"L", 5, b"L") + b"abcd\0" + b"\0" * 507) * 3000
    long = [
        head(b"L", len(name) + 4, b"L") + (name + end + b"\0").ljust(512, b"\0") + entry("short", data)
        for end, data in ((b"png", PNG), (b"txt", b"words"))
    ]
    found, reading = captions(tmp_path / "a.tar", many + b"".join(long) + END)
    assert (found, reading.left_out) == (["words"], {})


def test_names_that_are_long_or_end_a_line(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a\n\x1b[2J.png": PNG, "a\n\x1b[2J.txt": b"", "b.png": PNG, "b.txt": b"words"})
    with pytest.raises(ValueError, match=r"a\.tar, a\\n\\x1b\[2J: ") as caught:
        clipft.load_pairs(path)
    assert "\n" not in str(caught.value)
    shard(path, {"x" * 5000 + ".png": PNG, "b.png": PNG, "b.txt": b"words"})
    with pytest.raises(ValueError, match=r"\(a name of 5004 characters, at byte \d+\)"):
        clipft.load_pairs(path)
    assert captions(path, path.read_bytes())[0] == ["words"]


def test_joined_shards_are_read_whole(tmp_path: Path) -> None:
    found, reading = captions(tmp_path / "a.tar", sample(0) + END * 8 + sample(1) + END)
    assert (found, reading.left_out) == (["caption 0", "caption 1"], {})


def test_missing_and_cut_shards(tmp_path: Path) -> None:
    whole = sample(0) + sample(1)
    for number, data in ((0, whole + END), (2, whole), (3, whole[: len(PNG) // 2]), (4, b"")):
        (tmp_path / f"a-{number}.tar").write_bytes(data)
    os.mkfifo(tmp_path / "a-5.tar")
    reading = Reading(skip=True)
    rows = load_reading(tmp_path / "a-{0..5}.tar", reading)
    assert rows["caption"][:] == ["caption 0", "caption 1"] * 2
    assert [why.partition(f"{tmp_path}/")[2].partition(", at byte")[0] for why in reading.skipped] == [
        "a-1.tar'",
        "a-2.tar: expected an uncompressed tar file (its end mark is missing: it is cut off",
        f"a-3.tar: expected an uncompressed tar file (0.png, of {len(PNG)} bytes, is cut off or no file",
        "a-4.tar: expected an uncompressed tar file (its end mark is missing: it is cut off",
        "a-5.tar: expected a file, found a pipe or a device",
    ]
    with pytest.raises(FileNotFoundError, match=r"there is no shard '.*a-1\.tar'"):
        clipft.load_pairs(tmp_path / "a-{0..1}.tar")
    for pattern in ("a-{0..3000000000}.tar", "a-{0..999}{0..999}.tar", "a-{3..1}.tar"):
        with pytest.raises(ValueError, match="path_or_name: expected 1 to 100000 shards, got"):
            clipft.load_pairs(tmp_path / pattern)


def test_hidden_members_and_junk_beside_shards(tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text("{}")
    (tmp_path / ".part.tar").write_bytes(b"")
    hidden = entry("._0.png", b"junk") + entry("__MACOSX/0.png", b"junk")
    (tmp_path / "a.tar").write_bytes(hidden + sample(0) + head(b"0.link.png", 0, b"2") + END)
    reading = Reading()
    assert load_reading(tmp_path, reading)["caption"][:] == ["caption 0"]
    assert reading.line() == "read 1 of 6: 3 hidden, 1 of another kind, 1 no regular file"


def test_addresses_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"1234")
    where = f"tarslice://{str(path)[1:]}"
    assert read_slice(f"{where}@1+2/x.png") == b"23"
    for rest, message in (
        ("@1+999999999999/x", "too many for a picture"),
        ("@1+99/x", "shorter than when it was indexed"),
        (f"@1+{'9' * 5000}/x", "address: expected one of tarslice"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            read_slice(where + rest)
