"""``clipft.predict``: classes of new pictures, with their probabilities."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from clipft.console import bar, console_of_run, without_bars
from clipft.data.classes import checked_classes
from clipft.data.compact import Lazy
from clipft.data.kept import KeptRows
from clipft.errors import line_of
from clipft.files import check_output
from clipft.inference.classifier import ZERO_SHOT, Classifier
from clipft.inference.classify import classifiers_of, usual_templates, zero_shot_calibration, zero_shot_classifier
from clipft.inference.encode import Array, Encoder, batches_of, encode_pictures, encoder_of, load_any
from clipft.inference.shards import Shards, claimed, digest_of_texts, states
from clipft.models.heads import LABEL
from clipft.models.run_folder import classes_of_run
from clipft.recipes.least_certain import LeastCertain
from clipft.recipes.options import options_from
from clipft.recipes.options_predict import PredictOptions
from clipft.recipes.predictions import UNKNOWN, Predictions, check_table, schema_of, write_tables
from clipft.recipes.run import loaded, model_name
from clipft.recipes.sources import kept_pictures

__all__ = ["predict"]

_SHOWN = 20  # classes that the last lines count


@without_bars()
def predict(
    model: Any,
    data: Any,
    output: str | Path | None = None,
    *,
    sheet: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> Predictions:
    """Classes of pictures, with probabilities: the same as the command ``clipft predict``, with the same options.

    The classes are those of ``classes``, told by their names; else of the model's head; else those that the model's run
    was scored against. Probabilities have the temperature that the model was calibrated with, if it was, and a picture
    whose best class is below the threshold is ``unknown``.

    Args:
        model: a folder, a hub name, ``"demo"``, ``(model, processor)``, a :class:`clipft.recipes.run.Run`, a folder
            that :func:`clipft.export_onnx` wrote or a :class:`clipft.OnnxCLIP`.
        data: a folder of pictures with all below it, a picture, ``pictures/*.jpg``, a table, shards, a data set's name;
            in Python also a picture, several, their paths, or a data set with ``image``.
        output: a ``.csv``, ``.jsonl`` or ``.parquet`` file, which appears when all is done; an interrupted call goes
            on when it is made again. Default: a temporary one, which lives as long as the result.
        sheet: a PNG with the pictures of each class that the model is least certain of.
        console: where progress goes; default: standard output.
        options: fields of :class:`clipft.recipes.options_predict.PredictOptions`: ``classes``, ``top``, ...

    Returns:
        Rows in the order of the pictures, whatever fails: :class:`clipft.recipes.predictions.Predictions`.

    Raises:
        TypeError: no such option. ValueError: no classes, or an option or data that does not fit; the message names it.
        OSError: ``output`` cannot be written.
    """
    settings = options_from(PredictOptions, options)
    console = console or console_of_run()
    _check(output, sheet)
    clip, processor = _model(model, settings)
    rows = kept_pictures("data", data, settings, console, settings.id_column)
    chosen = _Chosen.of(_classifiers(model, clip, processor, settings), settings)
    encoder = encoder_of(clip, processor, settings.batch_size)
    temporary = tempfile.TemporaryDirectory(prefix="clipft-predict-") if output is None else None
    path = Path(temporary.name, "rows.parquet") if temporary else Path(str(output))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = Predictions(path, chosen.classes, chosen.thresholds, _schema=chosen.schema, _temporary=temporary)
    least = LeastCertain(chosen.classes) if sheet is not None else None
    work = {} if temporary else {**_work(rows, chosen), "model": encoder.identity()}
    with claimed(path, work, restart=settings.restart) as parts, bar(console, rate="pictures/s") as progress:
        task = progress.add_task("predicting", total=len(rows))
        encode = partial(_encode, encoder, rows, settings)
        shards = Shards(
            parts, len(rows), ".parquet", encode, partial(chosen.write, rows), partial(progress.advance, task)
        )
        _join(shards, chosen.schema, found, least, skip=settings.on_bad_row == "skip")
    _say(found, console, output)
    if least is not None:
        least.draw(Path(str(sheet)), rows, found.counts, console)
    return found


def _check(output: str | Path | None, sheet: str | Path | None) -> None:
    """What can be told before the work."""
    check_table(output)
    if sheet is not None:
        if Path(sheet).suffix != ".png":
            raise ValueError(f"sheet: expected a name that ends in .png, got {Path(sheet).name!r}")
        check_output(Path(sheet))


# ---- model and classes ----


def _model(model: Any, settings: PredictOptions) -> tuple[Any, Any]:
    """A model in torch and its processor, or an OnnxCLIP and None."""
    if isinstance(model, (str, Path)):
        return load_any(model, int8=settings.int8, threads=settings.threads)
    for name in ("int8", "threads"):
        if getattr(settings, name):
            raise ValueError(f"{name}: expected with a model's folder or name, not with a model that is loaded already")
    return (model, None) if hasattr(model, "encode_images") else loaded(model)


def _classifiers(model: Any, clip: Any, processor: Any, settings: PredictOptions) -> Mapping[str, Classifier]:
    """Those that are asked, by head."""
    found = classifiers_of(clip)
    heads = {name: own for name, own in found.items() if name != ZERO_SHOT}
    onnx = hasattr(clip, "encode_images")
    if settings.classes is not None and settings.head:
        raise ValueError("classes, head: expected one of the two: a head has classes of its own")
    if settings.template and (settings.head or (settings.classes is None and heads)):
        raise ValueError("template: expected with classes that are told by their names; a head has learnt its own")
    if settings.head:
        if wrong := [name for name in settings.head if name not in found]:
            there = ", ".join(found) or "of which it has none"
            raise ValueError(f"head: expected one of the model's heads, {there}, got {', '.join(wrong)}")
        return {name: found[name] for name in dict.fromkeys(settings.head)}
    name = str(clip.directory) if onnx else model_name(model)
    classes = checked_classes(settings.classes)
    if classes is None:
        if heads:
            return _main_head(heads)
        if ZERO_SHOT in found and not settings.template:
            return {ZERO_SHOT: found[ZERO_SHOT]}
        known = found[ZERO_SHOT].names if ZERO_SHOT in found else classes_of_run(name)
        known = known or zero_shot_calibration(clip).classes  # which an int8 folder of a run knows too
        if not known:
            raise ValueError(
                f"classes: expected names to choose from, as a,b or a file with a line each: {name} has no head, and "
                "is no run's folder that says which classes it was scored against"
            )
        classes = list(known)
    templates = list(settings.template or usual_templates(clip, name))
    return {ZERO_SHOT: zero_shot_classifier(clip, processor, classes, templates, settings.batch_size)}


def _main_head(heads: Mapping[str, Classifier]) -> dict[str, Classifier]:
    if LABEL in heads or len(heads) == 1:
        name = LABEL if LABEL in heads else next(iter(heads))
        return {name: heads[name]}
    raise ValueError(f"head: expected one or more of the model's heads, {', '.join(heads)}: it has no one for labels")


@dataclass(frozen=True)
class _Chosen:
    """What rows are made of."""

    classifiers: Mapping[str, Classifier]
    thresholds: dict[str, float]
    top: int

    @classmethod
    def of(cls, classifiers: Mapping[str, Classifier], settings: PredictOptions) -> _Chosen:
        most = max(len(own.names) for own in classifiers.values())
        if settings.top > most:
            raise ValueError(f"top: expected at most {most}, as many as there are classes, got {settings.top}")
        thresholds = {
            name: float(own.calibration.threshold or 0.0 if settings.threshold is None else settings.threshold)
            for name, own in classifiers.items()
        }
        for name, own in classifiers.items():
            if UNKNOWN in own.names and thresholds[name] > 0:
                raise ValueError(
                    f"threshold: expected 0, since a class is called {UNKNOWN!r}, as pictures below the threshold are; "
                    f"got {thresholds[name]:g}"
                )
        return cls(classifiers, thresholds, settings.top)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(own.names) for name, own in self.classifiers.items()}

    @property
    def schema(self) -> pa.Schema:
        return schema_of(self.top, len(self.classifiers) > 1)

    def write(self, rows: KeptRows, file: Path, chosen: range, vectors: Array, faults: list[str | None]) -> None:
        """A shard: the columns of the result, and ``row``, the picture's number."""
        pq.write_table(self._table(rows, chosen, vectors, faults), file)

    def _table(self, rows: KeptRows, chosen: range, vectors: Array, faults: list[str | None]) -> pa.Table:
        errors = [rows.fault(row) or fault for row, fault in zip(chosen, faults, strict=True)]
        good = np.array([fault is None for fault in faults])
        fixed = {"image": [rows.name(row) for row in chosen], "error": errors, "row": list(chosen)}
        schema = self.schema.append(pa.field("row", pa.int64()))
        parts = []
        for name, own in self.classifiers.items():
            columns = fixed | self._columns(name, own, vectors, good)
            if len(self.classifiers) > 1:
                columns["head"] = [name] * len(chosen)
            parts.append(pa.table({column: columns[column] for column in schema.names}, schema))
        order = np.arange(len(parts) * len(chosen)).reshape(len(parts), -1).T.reshape(-1)  # a picture's heads together
        return pa.concat_tables(parts).take(pa.array(order))

    def _columns(self, name: str, own: Classifier, vectors: Array, good: Any) -> dict[str, Any]:
        classes = np.full((self.top, len(good)), None, object)
        values = np.full((self.top, len(good)), np.nan, np.float32)
        if good.any():
            probabilities = own.probabilities(vectors)
            best = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top]
            kept = best.shape[1]  # of a head with fewer classes all
            values[:kept, good] = np.take_along_axis(probabilities, best, axis=1).T
            classes[:kept, good] = np.array(own.names, object)[best].T
            classes[0, good & (values[0] < self.thresholds[name])] = UNKNOWN
        columns: dict[str, Any] = {}
        for place in range(self.top):
            suffix = f"_{place + 1}" if place else ""
            columns[f"class{suffix}"] = classes[place].tolist()
            columns[f"probability{suffix}"] = pa.array(values[place], mask=np.isnan(values[place]))
        return columns


def _work(rows: KeptRows, chosen: _Chosen) -> dict[str, Any]:
    """What an interrupted run was of."""
    classifiers = hashlib.blake2b(digest_size=16)
    for name, own in chosen.classifiers.items():
        classifiers.update(json.dumps([name, own.names, own.scale, own.calibration.to_json()]).encode())
        classifiers.update(own.weights.tobytes())
    return {
        "pictures": digest_of_texts(states(rows.stored())),
        "names": digest_of_texts(map(rows.name, range(len(rows)))),
        "classes": classifiers.hexdigest(),
        "top": chosen.top,
        "threshold": chosen.thresholds,
    }


# ---- pictures ----


def _encode(
    encoder: Encoder, rows: KeptRows, settings: PredictOptions, parts: Sequence[range]
) -> Iterator[tuple[Array, list[str | None]]]:
    size, workers = settings.batch_size, settings.workers
    skip = settings.on_bad_row != "error"
    names, batches = Lazy(rows.name, range(len(rows))), batches_of(parts, size)
    return encode_pictures(encoder, rows, size, workers, names=names, skip=skip, batches=batches)


# ---- results ----


def _join(shards: Shards, schema: pa.Schema, found: Predictions, least: LeastCertain | None, *, skip: bool) -> None:
    """Write and count the rows, a shard at a time; with ``skip`` those that failed are left out."""
    with write_tables(found.path, schema) as write:
        for table in map(_read_shard, shards):
            kept = table.filter(pc.is_null(table["error"])) if skip else table
            found.count(table, len(kept))
            if least is not None:
                least.look(table)
            write(kept.select(schema.names))


def _read_shard(shard: Path) -> pa.Table:
    try:
        return pq.read_table(shard)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard}: damaged ({line_of(error)}); --restart begins again") from error


def _say(found: Predictions, console: Console, output: str | Path | None) -> None:
    for head, names in found.classes.items():
        counts = {name: found.counts[head, name] for name in (*names, UNKNOWN) if found.counts[head, name]}
        shares = [f"{count} {name}" for name, count in sorted(counts.items(), key=lambda entry: -entry[1])]
        before = f"{head}: " if len(found.classes) > 1 else ""
        console.print(Text(f"{before}{', '.join(shares[:_SHOWN])}{', ...' if len(shares) > _SHOWN else ''}"))
    if found.errors:
        more = ", ..." if found.errors > len(found.first_errors) else ""
        console.print(Text(f"{found.errors} cannot be read: {', '.join(found.first_errors)}{more}"))
    if output is not None:
        console.print(f"{found.rows} rows in {output}", highlight=False)
