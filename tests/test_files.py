"""clipft.files: sets of files, what a killed process leaves, locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from clipft.files import check_set, locked, replace_set, set_of, settle, write_json, write_text, writing


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def put(folder: Path, **files: str) -> None:
    """A set of text files."""
    with replace_set(folder, "list.json", obsolete=["old*"]) as staging:
        for name, text in files.items():
            path = staging / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_what_killed_processes_staged_is_cleared_by_the_next(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from clipft.files import replace_set, writing
with replace_set(Path(sys.argv[1]), "list.json") as staging:
    (staging / "c").write_text("half")
    with writing(Path(sys.argv[1]) / "b") as staged:
        staged.write_text("half")
        os.kill(os.getpid(), 9)
"""
    put(tmp_path, a="1")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert names(tmp_path) > {"a", "list.json", ".clipft-staging", ".clipft-staging/c"}
    put(tmp_path, a="2")
    write_text(tmp_path / "b", "3")
    assert names(tmp_path) == {"a", "b", "list.json"}


# ---- a set ----


def test_a_set_takes_the_place_of_the_one_before_and_of_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("mine", "old.txt", "checkpoints/old.txt"):
        (tmp_path / name).write_text("as it was")
    put(tmp_path, a="1", b="1", edited="1", sub__c="1")
    assert names(tmp_path) == {
        "mine",
        "checkpoints",
        "checkpoints/old.txt",
        "a",
        "b",
        "edited",
        "sub",
        "sub/c",
        "list.json",
    }
    (tmp_path / "edited").write_text("by hand")
    put(tmp_path, a="2")
    assert names(tmp_path) == {"mine", "checkpoints", "checkpoints/old.txt", "a", "edited", "list.json"}
    assert (tmp_path / "a").read_text() == "2" and (tmp_path / "edited").read_text() == "by hand"
    assert set_of(tmp_path, "list.json") == {"a": [1, set_of(tmp_path, "list.json")["a"][1]]}  # type: ignore[index]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def test_an_error_leaves_all_as_it_was(tmp_path: Path) -> None:
    put(tmp_path / "there", a="1")
    for folder in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(RuntimeError), replace_set(folder, "list.json") as staging:
            (staging / "a").write_text("half")
            raise RuntimeError
        with pytest.raises(RuntimeError), writing(tmp_path / "file") as staged:
            staged.write_text("half")
            raise RuntimeError
    assert names(tmp_path) == {"there", "there/a", "there/list.json"}
    assert (tmp_path / "there" / "a").read_text() == "1"


def planned(folder: Path, move: list[str], remove: list[str], tag: str = "") -> Path:
    """What a killed process leaves, or a stranger."""
    committed = folder / f".clipft-committed{tag}"
    committed.mkdir(parents=True)
    (committed / ".plan.json").write_text(json.dumps({"move": move, "remove": remove}))
    return committed


def test_a_plan_does_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    for number, name in enumerate(["../victim", str(tmp_path / "victim"), "link/victim", "", ".", "a/../../victim"]):
        for way in ("move", "remove"):
            folder = tmp_path / f"{way}-{number}"
            committed = planned(folder, *([[name], []] if way == "move" else [[], [name]]))
            for place in (folder, committed):  # the second: what is moved comes from outside
                (place / "link").symlink_to(tmp_path)
            with pytest.raises(ValueError, match="expected names within the folder"):
                settle(folder)
            if name == "link/victim" and way == "move":
                (folder / "link").unlink()
                with pytest.raises(ValueError, match="expected names within the folder"):
                    settle(folder)
            write_json(folder / "list.json", {"files": {name: [4, "0"]}})
            with pytest.raises(ValueError, match=r"not as list\.json knows it"):
                check_set(folder, "list.json")
    assert names(tmp_path) >= {"victim"} and (tmp_path / "victim").read_text() == "mine"


def test_a_plan_of_one_file_reaches_no_other(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    planned(tmp_path, [], ["notes"], ".v.npy")
    with pytest.raises(ValueError, match=r"expected a list of names of v.npy under remove .*found \['notes'\]"):
        settle(tmp_path, "v.npy")
    assert (tmp_path / "notes").read_text() == "mine"


def test_links_in_place_of_staging_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("1")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (".clipft-staging", ".clipft-committed", ".clipft-staging.a"):
        (folder / name).symlink_to(tmp_path / "home")
    put(folder, b="1")
    write_text(folder / "a", "1")
    settle(folder)
    assert names(tmp_path / "home") == {"mine"} and names(folder) >= {"a", "b"}


def test_what_lies_in_the_way_is_named_and_nothing_changes(tmp_path: Path) -> None:
    put(tmp_path, a="1")
    (tmp_path / "b").mkdir()
    (tmp_path / "sub").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name, kind in (("b", IsADirectoryError), ("sub__c", NotADirectoryError), ("link__c", NotADirectoryError)):
        with pytest.raises(kind, match=f"{name.partition('_')[0]}: expected a (file|folder) or nothing"):
            put(tmp_path, a="2", **{name: "1"})
    assert names(tmp_path) == {"a", "b", "sub", "link", "list.json"} and (tmp_path / "a").read_text() == "1"


def test_a_mix_is_named_on_both_sides(tmp_path: Path) -> None:
    put(tmp_path, a="1", b="1", c="1")
    check_set(tmp_path, "list.json")
    (tmp_path / "b").write_text("2")
    with pytest.raises(ValueError, match=r"written together: b not as list.json knows it, with which a, c belong"):
        check_set(tmp_path, "list.json")
    check_set(tmp_path, "list.json", ["a", "c"])
    (tmp_path / "d").write_text("1")
    with pytest.raises(ValueError, match="d not as"):
        check_set(tmp_path, "list.json", ["a", "d"])
    check_set(tmp_path, "absent.json")
    for text in ("{", "[]", '{"files": 3}', '{"files": {"a": 1}}'):
        (tmp_path / "list.json").write_text(text)
        assert set_of(tmp_path, "list.json") is None


# ---- locks ----

HOLDER = """
import sys, time
from pathlib import Path
from clipft.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_second_of_two_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    try:
        with pytest.raises(BlockingIOError, match=r"out: another process is writing into this folder"):
            put(tmp_path / "out", a="1")
        refused = run("train", "--model", "demo", "--data", tmp_path / "none", "--output", tmp_path / "out")
        assert refused.exit_code == 2 and "another process is writing into this folder" in refused.output
        write_text(tmp_path / "out" / "note", "a file alone may be written")
    finally:
        holder.kill()
        holder.wait()
    put(tmp_path / "out", a="1")
    assert names(tmp_path / "out") == {"a", "list.json", "note"}


def test_a_lock_may_be_taken_again_and_leaves_no_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"), locked(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with locked(tmp_path / "c"):
        put(tmp_path / "c", a="1")
        child = os.fork()
        if not child:
            from clipft.locks import _held

            os._exit(len(_held))
        assert os.waitpid(child, 0)[1] == 0
    assert names(tmp_path / "c") == {"a", "list.json"}
