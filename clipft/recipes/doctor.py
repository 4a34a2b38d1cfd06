"""What is wrong with a data set, or with how a model prepares it, before a training run finds out: ``clipft doctor``.

Every picture is read once. Pictures are duplicates where their files are equal, and near duplicates where 256 signs of
low frequencies of a discrete cosine transform (a perceptual hash) differ in at most 40 places: on 1000 photographs and
radiographs, recompressed, halved or brightened copies differed in at most 26, distinct pictures in 64 or more. Plain
pictures have no signs: these are near where their colours are.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from clipft.console import console_of_run, without_bars
from clipft.data.captions import shortened
from clipft.data.classes import read_class_names, renamed, says_nothing
from clipft.data.collate import most_tokens, unify_captions
from clipft.data.digests import digest_of
from clipft.data.pictures import UNREADABLE, EncodedPicture, UnreadablePictureError, naming, to_rgb, upright
from clipft.data.reading import UNREADABLE_KIND
from clipft.data.rows import PairRows, class_names_of, read_stored, stored_pictures
from clipft.data.sampling import UNEVEN
from clipft.data.sources import read_pairs
from clipft.environment import usable_cores
from clipft.families.clip import CLIP
from clipft.families.registry import family_of
from clipft.files import check_output, write_json
from clipft.models.resize import check_resize
from clipft.recipes.findings import Finding, Findings, finding_of, share, show_findings
from clipft.recipes.model_findings import check_preprocessing, check_scale, check_sizes
from clipft.recipes.options import ClassOptions, DoctorOptions, options_from
from clipft.recipes.run import loaded, model_name
from clipft.recipes.sources import reading_of

__all__ = ["Finding", "Findings", "doctor", "examine"]

_SIDE, _FREQUENCIES = 64, 16
_SIGNS = _FREQUENCIES**2
_NEAR = 40  # of these
_PLAIN = 1.0  # levels of 255: standard deviation below which nothing is on a picture
_SHADE = 6  # levels between colours that look the same
_LISTED = 10  # places of one file in an example
_EXAMPLES = 10
_CHUNK = 256
_IMBALANCE = 10.0  # largest over smallest class
_DARK = 0.125  # share of the 16-bit range below which a picture's levels are lost


@without_bars()
def doctor(
    data: Any,
    *,
    eval_data: Any = None,
    model: Any = None,
    json: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> Findings:
    """Look for what spoils a training run: bad rows, duplicates, leakage, cut captions, drift: the same as the command
    ``clipft doctor``, with the same options.

    Args:
        data, eval_data: sources that :func:`clipft.load_pairs` takes.
        model: a folder, a hub name, ``"demo"``, ``(model, processor)`` or a :class:`clipft.recipes.run.Run`; its
            tokenizer, preprocessing and logit scale are looked at.
        json: file for the findings.
        console: where the table goes; default: standard output.
        options: fields of :class:`clipft.recipes.options.DoctorOptions`: ``class_names``, ``caption_column``, ... With
            ``image_size`` or ``max_tokens`` data is looked at as a model of that size sees it.

    Returns:
        ``findings`` and ``statistics``, a dictionary; ``.problems`` are the findings to mend first.

    Raises:
        TypeError: no such option.
        FileNotFoundError, ValueError: there is no such data set or model.
    """
    if json is not None:
        check_output(Path(json))
    found = examine(data, eval_data=eval_data, model=model, **options)
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(json), found)
    show_findings(found, console or console_of_run())
    return found


def examine(data: Any, *, eval_data: Any = None, model: Any = None, **options: Any) -> Findings:
    """As :func:`doctor`, which says what it found too."""
    settings = options_from(DoctorOptions, options | {"on_bad_row": "skip"})
    clip, processor = (None, loaded("demo")[1]) if model is None else loaded(model)
    if clip is not None:
        check_resize(clip, image_size=settings.image_size, max_tokens=settings.max_tokens)
    if settings.max_tokens is not None:
        processor = copy.deepcopy(processor)
        processor.tokenizer.model_max_length = settings.max_tokens
    sets = {"data": _Contents(data, settings)}
    if eval_data is not None:
        sets["eval_data"] = _Contents(eval_data, settings, "test")
    findings: list[Finding] = []
    for contents in sets.values():
        captions = _check_captions(contents, clip, processor, settings.max_tokens)
        own = [*_check_rows(contents), *captions, *_check_pictures(contents)]
        findings += [replace(finding, data=contents.source) for finding in own]
    if eval_data is not None:
        findings += _check_leakage(sets["data"], sets["eval_data"])
    if clip is not None:
        findings += check_preprocessing(processor, clip.config)
    own_size = None if clip is None else getattr(clip.config.vision_config, "image_size", None)
    findings += check_sizes(
        {place: size for contents in sets.values() for place, size in contents.sizes()}, settings.image_size or own_size
    )
    if clip is not None:
        findings += check_scale(clip)
    return Findings(
        findings=[asdict(finding) for finding in findings],
        statistics={name: contents.statistics() for name, contents in sets.items()},
        **({} if clip is None else {"model": {"family": family_of(clip).model_type, "source": model_name(model)}}),
    )


vars(doctor).update(Finding=Finding, examine=examine)  # clipft.doctor was a module with these names in 0.1


# ---- what a data set holds ----


@dataclass(frozen=True)
class _Picture:
    digest: bytes
    signs: NDArray[np.uint8]  # [32], packed
    colour: tuple[float, float, float] | None  # of a plain picture
    size: tuple[int, int]
    kind: str
    note: str = ""
    several: bool = False  # frames


class _Contents:
    """A data set's captions and labels, and what a look at each picture gave."""

    def __init__(self, source: Any, settings: ClassOptions, purpose: str = "train") -> None:
        reading = reading_of(settings)
        if not isinstance(source, (str, Path)):
            reading.source = {"train": "data", "test": "eval_data"}[purpose]
        dataset = read_pairs(source, settings.split if purpose == "train" else None, reading, purpose)
        self.source = source = reading.source
        if settings.class_names is not None:
            dataset = renamed(dataset, read_class_names(settings.class_names, settings.encoding), source)
        places = [reading.place(number) for number in range(len(dataset))]
        self.rows = len(dataset) + len(reading.skipped)
        seen = list(_look(dataset, places))
        for number, found in enumerate(seen):
            if isinstance(found, str):
                reading.leave_out_row(number, UNREADABLE_KIND, found)
        self.account, self.unusable = reading, reading.skipped
        good = [number for number, found in enumerate(seen) if not isinstance(found, str)]
        reading.keep(good)
        self.pictures = [found for found in seen if not isinstance(found, str)]
        self.places = [places[number].removeprefix(f"{self.source}, ") for number in good]
        names = class_names_of(dataset)
        has_captions = "caption" in dataset.column_names
        self.captions = PairRows(dataset.select(good)).captions() if good and (has_captions or names) else []
        self.own_captions = has_captions
        labels = list(dataset["label"]) if "label" in dataset.column_names else []
        self.labels = [names[labels[row]] if names else str(labels[row]) for row in good] if labels else []
        self.class_names = names or sorted(set(self.labels))

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Width and height by place."""
        for place, picture in zip(self.places, self.pictures, strict=True):
            yield f"{place} of {self.source}", picture.size

    def statistics(self) -> dict[str, Any]:
        sides = np.array([picture.size for picture in self.pictures] or [(0, 0)])
        captions = [caption for own in self.captions for caption in own] if self.own_captions else []
        sizes = Counter(self.labels)
        return {
            "source": self.source,
            "reading": self.account.to_json(),
            "rows": self.rows,
            "usable": len(self.pictures),
            "captions": len(captions),
            "distinct_captions": len(set(captions)),
            "width": _spread(sides[:, 0]),
            "height": _spread(sides[:, 1]),
            "kinds": dict(Counter(picture.kind for picture in self.pictures).most_common()),
            "classes": {name: sizes[name] for name in self.class_names},
        }


def _spread(values: NDArray[Any]) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _look(dataset: Any, places: Sequence[str]) -> Iterator[_Picture | str]:
    """Each picture, or why it cannot be read."""
    stored = stored_pictures(dataset) or dataset

    def look(place: str, image: dict[str, Any]) -> _Picture | str:
        try:
            with naming(place):
                return _picture(read_stored(image))
        except UnreadablePictureError as error:
            return str(error)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(stored), _CHUNK):
            images = stored[start : start + _CHUNK]["image"]
            yield from pool.map(look, places[start : start + len(images)], images)


def _picture(data: bytes) -> _Picture:
    def look(picture: Image.Image) -> tuple[Image.Image, tuple[int, int], str, bool]:
        of_head = picture.size, f"{picture.format} {picture.mode}", _has_frames(picture)
        picture.draft(None, (_SIDE, _SIDE))  # type: ignore[no-untyped-call]
        picture.load()
        return upright(picture), *of_head

    picture, size, kind, several = EncodedPicture(data, "image").opened(look)
    note = ""
    if picture.mode.startswith("I;16"):
        top = float(np.asarray(picture).max()) / 65535
        note = f"uses {top:.1%} of the 16-bit range" if top < _DARK else ""
    picture = to_rgb(picture)
    grey = np.asarray(picture.convert("L").resize((_SIDE, _SIDE)), np.float32)
    digest = digest_of(data)
    return _Picture(digest, _signs(grey), _plain_colour(picture), size, kind, note, several)


def _has_frames(picture: Image.Image) -> bool:
    """More than one; what a phone keeps beside a photograph is none."""
    try:
        return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))
    except UNREADABLE:
        return False


def _signs(grey: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[32] bytes: the signs of the lowest frequencies but the constant, both ways, of [64, 64]."""
    places = np.pi / _SIDE * (np.arange(_SIDE) + 0.5)
    waves = np.cos(np.outer(np.arange(1, _FREQUENCIES + 1), places))
    return np.packbits(waves @ grey @ waves.T > 0)


def _plain_colour(picture: Image.Image) -> tuple[float, float, float] | None:
    """Of a picture that is of one colour."""
    pixels = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    red, green, blue = pixels.mean(0).tolist()
    return (red, green, blue) if pixels.std(0).max() < _PLAIN else None


# ---- checks of one data set ----


def _check_rows(contents: _Contents) -> list[Finding]:
    counts = Counter(contents.labels)
    findings = [
        finding_of(
            "unreadable rows",
            "problem",
            contents.unusable,
            f"of {contents.rows} rows cannot be used; mend them, or leave them out with --on-bad-row skip",
            f"all {contents.rows} rows can be used",
        )
    ]
    if contents.labels:
        sizes = [counts[name] for name in contents.class_names]
        shown = [f"{name}: {counts[name]}" for name in sorted(contents.class_names, key=lambda name: counts[name])]
        shares = " to ".join(map(str, sorted({min(sizes), max(sizes)})))
        ratio = max(sizes) / max(min(sizes), 1)
        text = f"{len(sizes)} classes, {shares} rows each"
        advice = "; look at balanced accuracy, and train on batches drawn by class (--class-balanced)"
        status = "problem" if min(sizes) < 2 or ratio >= _IMBALANCE else "ok" if ratio <= UNEVEN else "note"
        summary = text if status == "ok" else text + advice
        findings.append(Finding("class balance", status, summary, len(sizes), shown[:_EXAMPLES]))
        findings.append(
            finding_of(
                "class names",
                "note",
                [name for name in contents.class_names if says_nothing(name)],
                f"of {len(sizes)} class names say nothing to the text tower, which captions are made for; give them "
                "words with --class-names FILE",
                "class names are words",
            )
        )
    return findings


def _check_captions(contents: _Contents, clip: Any, processor: Any, length: int | None) -> list[Finding]:
    if not contents.captions:
        return []
    findings = []
    family = family_of(clip) if clip is not None else None
    limit = length or CLIP.text_length
    if length is None and family is not None:
        limit = most_tokens(processor, family.most_positions(clip.config), family=family)
    if contents.own_captions:
        texts = unify_captions(processor, contents.captions, limit, family=family)
        counts = Counter(text for own in texts for text in set(own))
        repeated = [f"{count} x {caption!r}" for caption, count in counts.most_common() if count > 1]
        findings.append(
            finding_of(
                "duplicate captions",
                "note",
                repeated,
                "captions (by their tokens) belong to several pictures; training takes them as positives of each "
                "other, and retrieval counts any of the pictures as right",
                "each caption belongs to one picture",
            )
        )
    distinct = list(dict.fromkeys(caption for own in contents.captions for caption in own))
    lengths = [len(ids) for ids in processor.tokenizer(shortened(distinct))["input_ids"]] if distinct else []
    long = sorted(((n, text) for n, text in zip(lengths, distinct, strict=True) if n > limit), reverse=True)
    guess = "" if clip is not None else " (by the demo model's tokenizer; give --model for its own)"
    findings.append(
        finding_of(
            "caption length",
            "problem",
            [f"{n} tokens: {text!r}" for n, text in long],
            f"captions are longer than {limit} tokens{guess} ({share(long, distinct)}); the end of each is cut off",
            f"the longest caption has {max(lengths, default=0)} of {limit} tokens{guess}",
        )
    )
    return findings


def _check_pictures(contents: _Contents) -> list[Finding]:
    places, pictures = contents.places, contents.pictures
    groups: dict[bytes, list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault(picture.digest, []).append(number)
    same = [_named(places, rows) for rows in groups.values() if len(rows) > 1]
    files = [rows[0] for rows in groups.values()]
    near = [f"{places[files[b]]}, {places[files[a]]} ({how})" for a, b, how in _nearest([pictures[n] for n in files])]
    harm = "they are each other's negatives, and leak into a held-out part"
    dark = [f"{place} {picture.note}" for place, picture in zip(places, pictures, strict=True) if picture.note]
    kinds = Counter(picture.kind for picture in pictures).most_common()
    return [
        finding_of(
            "duplicate pictures", "problem", same, f"files occur more than once; {harm}", "no file occurs twice"
        ),
        finding_of(
            "near-duplicate pictures", "problem", near, f"look like an earlier one; {harm}", "no two look the same"
        ),
        finding_of(
            "brightness",
            "problem",
            dark,
            "16-bit pictures use a small part of their range and turn black in 8 bits; scale them first",
            "no 16-bit picture is too dark",
        ),
        finding_of(
            "frames",
            "note",
            [place for place, picture in zip(places, pictures, strict=True) if picture.several],
            "pictures have several frames, of which the first is read",
            "every picture has one frame",
        ),
        Finding("kinds", "ok", ", ".join(f"{count} {kind}" for kind, count in kinds) or "no pictures", len(kinds)),
    ]


def _named(places: Sequence[str], rows: Sequence[int]) -> str:
    more = len(rows) - _LISTED
    return ", ".join(places[row] for row in rows[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _nearest(pictures: Sequence[_Picture], others: Sequence[_Picture] | None = None) -> list[tuple[int, int, str]]:
    """Of each picture that looks like one of the others (without them: like an earlier one): its row, the row of the
    nearest, and how they differ; nearest first. All are compared, a block at a time.
    """
    known = pictures if others is None else others
    if not pictures or not known:
        return []
    found = []
    size = max(1, 4_000_000 // len(known))
    for start in range(0, len(pictures), size):
        differ = _signs_that_differ(pictures[start : start + size], known)
        if others is None:
            differ[np.arange(len(known)) >= np.arange(start, start + len(differ))[:, None]] = _SIGNS
        nearest = differ.argmin(1)
        least = differ[np.arange(len(differ)), nearest]
        found += [(int(least[row]), start + int(row), int(nearest[row])) for row in np.nonzero(least <= _NEAR)[0]]
    return [(row, other, f"{distance} of {_SIGNS} signs differ") for distance, row, other in sorted(found)]


def _signs_that_differ(some: Sequence[_Picture], others: Sequence[_Picture]) -> NDArray[np.uint16]:
    """[some, others]; for a plain picture none, where the other is of its colour, else all."""
    left, right = (np.stack([picture.signs for picture in pictures]).view(np.uint64) for pictures in (some, others))
    differ = np.zeros((len(left), len(right)), np.uint16)
    for word in range(left.shape[1]):
        differ += np.bitwise_count(left[:, None, word] ^ right[None, :, word])
    one, other = (np.array([p.colour or (np.nan,) * 3 for p in pictures], np.float32) for pictures in (some, others))
    plain = ~np.isnan(one[:, 0, None]) | ~np.isnan(other[None, :, 0])
    if plain.any():
        alike = np.all([np.abs(one[:, None, c] - other[None, :, c]) <= _SHADE for c in range(3)], axis=0)  # NaN: false
        differ[plain] = np.where(alike, 0, _SIGNS)[plain]
    return differ


# ---- checks of two data sets ----


def _check_leakage(train: _Contents, test: _Contents) -> list[Finding]:
    files = {picture.digest: row for row, picture in reversed(list(enumerate(train.pictures)))}
    same = [(row, files[p.digest], "the same file") for row, p in enumerate(test.pictures) if p.digest in files]
    rest = [row for row, picture in enumerate(test.pictures) if picture.digest not in files]
    near = [(rest[row], other, how) for row, other, how in _nearest([test.pictures[n] for n in rest], train.pictures)]
    found = [
        f"{test.places[row]} of the test set, {train.places[other]} of the training set ({how})"
        for row, other, how in [*same, *near]
    ]
    findings = [
        finding_of(
            "leakage of pictures",
            "problem",
            found,
            f"of {len(test.pictures)} test pictures are in the training set too, as the same file or nearly so; the "
            "test says too much",
            "no test picture is in the training set",
        )
    ]
    if train.own_captions and test.own_captions:
        known = {caption for own in train.captions for caption in own}
        shared = sorted({caption for own in test.captions for caption in own if caption in known})
        findings.append(
            finding_of(
                "leakage of captions",
                "note",
                [repr(caption) for caption in shared],
                "test captions are in the training set too",
                "no test caption is in the training set",
            )
        )
    if train.labels and test.labels:
        new, missing = set(test.labels) - set(train.labels), set(train.labels) - set(test.labels)
        findings.append(
            finding_of(
                "classes of both sets",
                "problem" if new else "note",
                sorted(new | missing),
                "classes have rows in one of the two sets only"
                if new
                else "classes have no test pictures; the test set is scored against all classes of training",
                "both sets have rows of the same classes",
            )
        )
    return findings
