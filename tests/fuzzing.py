"""Files of strangers made from good ones: bytes flipped, cut and joined, numbers and descriptions that lie.

What is fuzzed loads equal (to what the caller says) or ends in one line that names the file that was changed, within a
second and 200 MB over the plain run. ``CLIPFT_FUZZ_SECONDS`` makes each fuzzer's run longer, ``CLIPFT_FUZZ_SEED``
another.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import signal
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES, HANG = 1.0, 200, 60
LIES: list[Any] = [
    *(0, 1, -1, 3, 7, 24, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 63, 10**30),
    *(0.5, -1.5, 1e308, math.nan, math.inf, True, False, None),
    *("", "a", "F32", "I64", "../x", "/etc/passwd", "http://a/b", "\0", "[red]\x1b[2J", "9" * 5000, "é"),
    *([], {}, [1, 2], [[]], {"a": {}}, ["a", "b"], [10**9, 10**9]),
]
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [
    *(b"\0", b"\xff\xfe", b'"', b",", b"\t", b"\n", b"\r", b"{", b"-1", b"../", b"\\ud800", b"1e999"),
    *(b"[" * 5000, b"9" * 5000, b"/etc/passwd", b"\x1b[2J", b"x" * 200_000),
]
Case = tuple[str, bytes]  # a file's name, and what is in it now


class Hang(BaseException):
    """Not an Exception: nothing on the way may take it for a damaged file."""


# ---- ways to change bytes ----


def flip(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are others, more of them near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        end = min(len(changed), rng.choice((16, 256, 4096, len(changed))))
        changed[rng.randrange(end)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """The end or a piece is missing."""
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:first], data[first:], data[:first] + data[last:], data[: len(data) - rng.randrange(1, 9)]))


def join(rng: random.Random, data: bytes) -> bytes:
    """Something is there twice, or more than belongs there."""
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    junk = rng.choice((rng.randbytes(rng.choice((1, 8, 999))), b"\0" * 4096, *WORDS))
    return rng.choice(
        (data + data, data[:last] + data[first:], data + junk, junk + data, data[:first] + junk + data[first:])
    )


def lie_binary(rng: random.Random, data: bytes) -> bytes:
    """Numbers in bytes are others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        size, place = rng.choice((1, 2, 4, 8)), rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))
        number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
        changed[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(changed)


def lie(rng: random.Random, value: Any) -> Any:
    """A JSON value with one part that is another, missing, or more."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        near = [value + 1, value - 1, -value, value * 1000] if isinstance(value, int | float) else []
        return rng.choice([*LIES, *near])
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    way = rng.random()
    if way < 0.1:
        del changed[key]
    elif way < 0.2 and isinstance(changed, dict):
        changed[rng.choice(("a", "", f"{key}2", "auto_map", "..", rng.choice(list(changed))))] = rng.choice(LIES)
    else:
        changed[key] = lie(rng, changed[key])
    return changed


def lie_json(rng: random.Random, data: bytes) -> bytes:
    """Of a file of JSON."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = lie(rng, value)
    return json.dumps(value).encode()


def lie_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Of the header, whose length fits again."""
    size = int.from_bytes(data[:8], "little")
    header = lie_json(rng, data[8 : 8 + size])
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1 << 20, 1 << 62, (1 << 64) - 1))
    return length.to_bytes(8, "little") + header + data[8 + size :]


class Runs:
    """What a pickle may ask to be called."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.parts = call, arguments

    def __reduce__(self) -> Any:
        return self.parts


def lie_pickle(rng: random.Random, data: bytes) -> bytes:
    """Of the program in torch's archive, and of its members; of an older file of torch, bytes."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return flip(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if rng.random() < 0.7:
        name = next(name for name in members if name.endswith("data.pkl"))
    own = bytearray(members[name] or b"\0")
    way = rng.random()
    if way < 0.2 and name.endswith(".pkl"):
        ran = rng.choice(
            (Runs(print, "ran"), Runs(open, "/etc/passwd"), Runs(bytes, 10**9), [[]] * 5, {"state_dict": 3})
        )
        own = bytearray(pickle.dumps(rng.choice(({"a": ran}, ran)), 2))
    elif way < 0.3:
        del members[name]
        own = bytearray()
    else:
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(len(own))
            own[place : place + 1] = rng.choice((rng.randbytes(1), b"", b"\x8a\x08" + rng.randbytes(8), b"\xff" * 4))
    if name in members:
        members[name] = bytes(own)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return out.getvalue()


def lie_npy(rng: random.Random, data: bytes) -> bytes:
    """Of the header's shape and type, and of what it says of its own length."""
    size = int.from_bytes(data[8:10], "little")
    shape = rng.choice(
        ("()", "(4,)", "(3, 4)", "(4, 3)", "(-1, 4)", "(0, 4)", f"({10**12}, 4)", "(9**9, 4)", "(True, 4)")
    )
    kind = rng.choice(("<f4", ">f4", "<f8", "<f2", "|O", "<i4", "<U9", "V4", "|V99999999999", "[('a', '<f4')]"))
    header = f"{{'descr': '{kind}', 'fortran_order': {rng.choice((True, False))}, 'shape': {shape}, }}\n".encode()
    length = rng.choice((len(header), len(header), 0, size, 0xFFFF))
    return data[:8] + length.to_bytes(2, "little") + header + data[10 + size :]


def lie_yaml(rng: random.Random, data: bytes) -> bytes:
    """A line is one that YAML's own parser trips over."""
    lines = data.decode().splitlines()
    tags = ("!!int ''", "!!bool x", "!!timestamp x", "!!float ''", "!!python/name:os.x")
    odd = (*tags, "{? [1]: 2}", "[", "*a", "&a [*a]", "{<<: {a: 1}}")
    lines[rng.randrange(len(lines))] = f"epochs: {rng.choice(odd)}"
    return "\n".join(lines).encode()


def lies_under(*keys: str) -> Callable[[random.Random, bytes], bytes]:
    """As ``lie_json``, of the values under these keys of an object."""

    def lie_under(rng: random.Random, data: bytes) -> bytes:
        value = json.loads(data)
        key = rng.choice([key for key in keys if key in value])
        return json.dumps(value | {key: lie(rng, value[key])}).encode()

    return lie_under


LIARS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": lie_json,
    ".safetensors": lie_safetensors,
    ".bin": lie_pickle,
    ".npy": lie_npy,
    ".yaml": lie_yaml,
}


def cases(good: Mapping[str, Sequence[bytes]], seed: int) -> Iterator[tuple[str, Case]]:
    """Without end, of files that are good in one form or several: what was done, and the changed file."""
    for number in range(1 << 30):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(list(good))
        ways: list[Callable[[random.Random, bytes], bytes]] = [flip, cut, join, lie_binary]
        if liar := LIARS.get(Path(name).suffix):
            ways += [liar] * 6
        way = rng.choice(ways)
        yield f"{number}: {way.__name__} {name}", (name, way(rng, rng.choice(good[name])))


# ---- the run ----


def fuzz(
    folder: Path,
    load: Callable[[], Any],
    equal: Callable[[Any], object],
    seconds: float,
    names: Sequence[str] = ("",),
    forms: Mapping[str, Sequence[bytes]] | None = None,
    refused: bool = True,
) -> None:
    """Change files of a good folder, one case after the other, and hold what ``load`` makes of each to the promise.

    Args:
        folder: the good one, whose files are changed and mended again.
        load: what is tried.
        equal: is given what came out of it, and raises AssertionError where that is not what the files hold.
        seconds: of CPU time, unless the environment says otherwise.
        names: ends of the names of the files that are changed.
        forms: in place of these, files by name with all that is good in them.
        refused: whether some of the inputs are.
    """
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.endswith(tuple(names))]
    good = {path.name: [path.read_bytes()] for path in paths} if forms is None else forms
    seconds = float(os.environ.get("CLIPFT_FUZZ_SECONDS") or seconds)
    seed = int(os.environ.get("CLIPFT_FUZZ_SEED") or 0)
    plain = 0.0
    for name, data in [(name, data) for name, own in good.items() for data in own][: None if forms else 1]:
        (folder / name).write_bytes(data)
        equal(load())
        plain = max(plain, *(_cost(load)[0] for _ in range(3)))  # a machine may be quick at times
    start, count, faults, loaded = time.process_time(), 0, [], 0
    for what, (name, data) in cases(good, seed):
        spent = time.process_time() - start
        if spent > (seconds if 0 < loaded < count + (not refused) else 10 * seconds) or len(faults) > 20:
            break  # a slow machine has few inputs in a second, perhaps none of a kind
        (folder / name).write_bytes(data)
        fault, came = _try(folder / name, load, equal, plain)
        if fault:
            faults.append(f"{what}: {fault}")
        count, loaded = count + 1, loaded + came
        (folder / name).write_bytes(good[name][0])
    print(f"{count} inputs in {time.process_time() - start:.0f} s, {loaded} loaded, {len(faults)} faults, seed {seed}")
    assert not faults, f"{len(faults)} of {count} (seed {seed}):\n" + "\n".join(faults)
    assert 0 < loaded < count + (not refused)


def _try(path: Path, load: Callable[[], Any], equal: Callable[[Any], object], plain: float) -> tuple[str, bool]:
    """What is wrong, or nothing; and whether it loaded."""
    result: Any = None
    problem = ""

    def tried() -> None:
        nonlocal result, problem
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = load()
        except (ValueError, OSError) as error:
            message = str(error)
            if str(path.parent) not in message or path.name not in message or "\n" in message or len(message) > 2000:
                problem = f"{type(error).__name__}, not a line that names the file: {message[:300]!r}"
        except Hang:
            problem = f"did not end within {HANG} s"
        except BaseException as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"

    seconds, megabytes = _cost(tried)
    for _ in range(4):  # on a busy machine, or a virtual one whose host is, CPU time is no measure once
        if seconds > plain + SECONDS:
            seconds = min(seconds, _cost(tried)[0])
    if result is not None and not problem:
        try:
            equal(result)
        except Exception as error:
            problem = f"loaded, but: {type(error).__name__}: {str(error)[:300]}"
    if not problem and seconds > plain + SECONDS:
        problem = f"took {seconds:.1f} s, the plain run {plain:.1f} s"
    if not problem and megabytes > MEGABYTES:
        problem = f"took {megabytes} MB"
    return problem, result is not None


def _cost(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of the CPU, and MB over those that were held before."""
    with _alarm():
        before, start = _peak(reset=True), time.process_time()
        run()
        return time.process_time() - start, (_peak() - before) >> 10


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _peak(reset: bool = False) -> int:
    """KB of this process; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0
