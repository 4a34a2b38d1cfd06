"""Rows, preprocessing, augmentation and the collator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import LENGTH, SIZE, captioned, class_folders, encoded, labelled, picture, smooth, tiny_clip
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

import clipft
from clipft.data.collate import tokenize
from clipft.data.pictures import EncodedPicture
from clipft.data.rows import PairRows
from clipft.data.sampling import EpochSampler
from clipft.data.transforms import AUGMENTATIONS, Augmentation, augmentation_set, build_transform
from clipft.recipes.options import TrainOptions


@pytest.fixture(scope="module")
def processor():
    return tiny_clip()[1]


# ---- preprocessing ----

MODES = {
    "wide": Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 81, 3), dtype=np.uint8)),
    "tall": Image.fromarray(np.random.default_rng(1).integers(0, 256, (97, 40, 3), dtype=np.uint8)),
    "small": Image.fromarray(np.random.default_rng(2).integers(0, 256, (7, 9, 3), dtype=np.uint8)),
    "grey": Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 60), dtype=np.uint8)),
    "alpha": Image.fromarray(np.random.default_rng(4).integers(0, 256, (60, 70, 4), dtype=np.uint8)),
    "palette": picture(0)[0].quantize(8),
    "CMYK": Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 70, 4), dtype=np.uint8), mode="CMYK"),
    "grey and alpha": picture(0)[0].convert("LA"),
}
PROCESSORS = {
    "clip": {},
    "other statistics": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 127.5},
    "bilinear": {"resample": 2},
    "square": {"size": {"height": 48, "width": 40}, "do_center_crop": False},
    "crop larger": {"crop_size": {"height": 64, "width": 64}},
    "no normalisation": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
}


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
def test_preprocessing_is_the_processors_own(options) -> None:
    own = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}} | options
    images = CLIPImageProcessor(**own)
    transform = build_transform(images)
    for mode, image in MODES.items():
        expected = images(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(transform(image), expected), mode


def test_the_pil_backend_is_refused(processor) -> None:
    with pytest.raises(ValueError, match="expected the torchvision image processor, got CLIPImageProcessorPil"):
        build_transform(CLIPImageProcessorPil())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"random_resized_crop": 0.0}, "random_resized_crop"),
        ({"random_resized_crop": 1.5}, "random_resized_crop"),
        ({"horizontal_flip": 2}, "horizontal_flip"),
        ({"color_jitter": 0.9}, "color_jitter"),
        ({"rotation": 181}, "rotation"),
        ({"noise": -0.1}, "noise"),
        ({"blur": 11}, "blur"),
    ],
)
def test_augmentation_checks_its_options(options, name) -> None:
    with pytest.raises(ValueError, match=name):
        Augmentation(**options)


def test_flip_and_crop_do_what_they_say(processor) -> None:
    image = picture(4)[0]
    plain = clipft.CLIPDataCollator(processor)([{"image": image, "caption": "x"}])["pixel_values"][0]
    flip = clipft.CLIPDataCollator(processor, augmentation=Augmentation(horizontal_flip=1.0))
    row = {"image": image, "caption": "x", "draw": (0, 0)}
    assert torch.equal(flip([row])["pixel_values"][0], plain.flip(-1))
    crop = clipft.CLIPDataCollator(processor, augmentation=Augmentation(random_resized_crop=0.3))
    cropped = [crop([row | {"draw": (epoch, 0)}])["pixel_values"][0] for epoch in range(3)]
    assert all(c.shape == plain.shape for c in cropped)
    assert not torch.equal(cropped[0], cropped[1])
    jitter = clipft.CLIPDataCollator(processor, augmentation=Augmentation(color_jitter=0.4))
    assert not torch.equal(jitter([row])["pixel_values"][0], plain)


@pytest.mark.parametrize("size", [(200, 100), (100, 230), (1200, 900)])
@pytest.mark.parametrize(
    "options",
    [{}, {"size": {"shortest_edge": SIZE + 8}}, {"size": {"height": SIZE + 8, "width": SIZE + 4}}],
    ids=["shortest edge", "larger edge", "both sides"],
)
def test_a_crop_is_of_what_the_model_sees_in_use(size: tuple[int, int], options: dict[str, Any], processor) -> None:
    """With all of the area to keep it is the checkpoint's own, whatever the picture's shape."""
    own = CLIPImageProcessor(
        **({"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}} | options)
    )
    whole, plain = (build_transform(own, Augmentation(random_resized_crop=share)) for share in (1.0, None))
    image = smooth(*size)
    assert (whole(image) - plain(image)).abs().mean() < 0.1  # half a pixel; a squashed picture differs by .2 to .8


def test_a_crop_of_a_square_is_torchvisions(processor) -> None:
    image, bicubic = smooth(90, 90), v2.InterpolationMode.BICUBIC
    transform = build_transform(processor.image_processor, Augmentation(random_resized_crop=0.3))
    theirs = v2.RandomResizedCrop(SIZE, scale=(0.3, 1.0), interpolation=bicubic, antialias=True)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = transform(image)
        torch.manual_seed(seed)
        expected = theirs(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        own = Image.fromarray(expected.permute(1, 2, 0).numpy())
        assert torch.equal(ours, build_transform(processor.image_processor)(own))


def test_augmentation_sets(processor) -> None:
    (option,) = [field for field in dataclasses.fields(TrainOptions) if field.name == "augmentation"]
    assert ("auto", *AUGMENTATIONS) == option.metadata["choices"]
    assert augmentation_set("none") == Augmentation()
    medical, industrial = AUGMENTATIONS["medical"], AUGMENTATIONS["industrial"]
    assert (medical.horizontal_flip, medical.color_jitter) == (0, 0)
    assert industrial.rotation > 0
    assert industrial.noise > 0
    assert industrial.blur > 0
    mixed = augmentation_set("strong", horizontal_flip=0.0, random_resized_crop=0, rotation=None)
    assert (mixed.horizontal_flip, mixed.random_resized_crop, mixed.rotation) == (0, None, 10)
    with pytest.raises(
        ValueError, match="augmentation: expected one of none, crop, light, strong, industrial, medical"
    ):
        augmentation_set("heavy")
    row = {"image": picture(5)[0], "caption": "x", "draw": (0, 0)}
    for name, augmentation in AUGMENTATIONS.items():
        first, again = (clipft.CLIPDataCollator(processor, augmentation=augmentation)([row]) for _ in range(2))
        assert torch.equal(first["pixel_values"], again["pixel_values"]), name
        other = clipft.CLIPDataCollator(processor, augmentation=augmentation)([row | {"draw": (1, 0)}])
        assert torch.equal(first["pixel_values"], other["pixel_values"]) == (name == "none"), name


@pytest.mark.parametrize("option", ["rotation", "noise", "blur"])
def test_each_change_leaves_the_rest(processor, option: str) -> None:
    """A change of its kind, and no larger than asked for: what is grey stays grey, the mean stays where it was."""
    image = Image.fromarray(np.random.default_rng(0).integers(90, 160, (SIZE, SIZE), dtype=np.uint8))
    plain = build_transform(processor.image_processor)(image)
    torch.manual_seed(0)
    strength = {"rotation": 20.0, "noise": 0.1, "blur": 3.0}[option]
    changed = build_transform(processor.image_processor, Augmentation(**{option: strength}))(image)
    assert not torch.equal(changed, plain)
    std, mean = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("std", "mean"))
    grey = changed * std[:, None, None] + mean[:, None, None]
    inner = grey[:, 8:-8, 8:-8]  # away from the corners that rotation fills
    assert torch.allclose(inner[0], inner[1], atol=1e-3)
    assert inner.mean().item() == pytest.approx((plain[0, 8:-8, 8:-8] * std[0] + mean[0]).mean().item(), abs=0.03)
    spread = inner.std() / (plain[0, 8:-8, 8:-8] * std[0]).std()
    assert spread > 1.02 if option == "noise" else spread < 0.98


# ---- pictures of every kind ----


def test_sixteen_bits_keep_their_range(processor) -> None:
    """PIL alone clips at 255, which turns all but the darkest levels white."""
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    transform = build_transform(processor.image_processor)
    assert torch.equal(transform(Image.fromarray(levels)), transform(Image.fromarray((levels >> 8).astype(np.uint8))))
    for kind in (np.int32, np.float32):
        with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got PIL's mode"):
            transform(Image.fromarray(levels.astype(kind)))


def test_exif_turns_pictures_upright(processor) -> None:
    image, exif = smooth(160, 96), Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert turned.size() == image.size
    for augmentation in (None, Augmentation(random_resized_crop=0.9)):
        pixels = []
        for picture_ in (turned, encoded(image)):
            torch.manual_seed(0)
            pixels.append(build_transform(processor.image_processor, augmentation)(picture_))
        torch.testing.assert_close(*pixels, atol=0.1, rtol=0)  # JPEG's own error


def test_a_crop_decodes_at_the_scale_it_needs(processor) -> None:
    """The pixels are those of the full picture within JPEG's error; decoding is four times smaller."""
    picture_, reductions = encoded(smooth(640, 400)), []

    class Watched(EncodedPicture):
        def decode(self, reduction: int = 1) -> Image.Image:
            reductions.append(reduction)
            return super().decode(reduction)

    transform = build_transform(processor.image_processor, Augmentation(random_resized_crop=0.8))
    for seed in range(5):
        torch.manual_seed(seed)
        reduced = transform(Watched(picture_.data, ""))
        torch.manual_seed(seed)
        full = transform(picture_.decode())
        assert (reduced - full).abs().mean() < 0.05
    assert reductions == [4] * 5
    plain = build_transform(processor.image_processor)
    assert torch.equal(plain(Watched(picture_.data, "")), plain(picture_.decode()))
    assert reductions[-1] == 1  # never without a random crop


def test_a_broken_file_is_named_wherever_it_is_decoded(processor) -> None:
    whole = encoded(smooth(200, 200)).data
    for data in (b"", b"no picture", whole[: len(whole) // 2]):
        for augmentation in (None, Augmentation(random_resized_crop=0.9)):
            transform = build_transform(processor.image_processor, augmentation)
            with pytest.raises(ValueError, match=r"row 7 \(a\.jpg\): the image cannot be read"):
                transform(EncodedPicture(data, "row 7 (a.jpg)"))


# ---- collator ----


def test_captions_are_padded_to_the_longest_and_cut(processor) -> None:
    rows = [{"image": picture(i)[0], "caption": text} for i, text in enumerate(["a", "abc", "x" * 99])]
    batch = clipft.CLIPDataCollator(processor)(rows[:2])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    cut = clipft.CLIPDataCollator(processor)(rows)
    assert cut["input_ids"].shape == (3, LENGTH)
    assert cut["input_ids"][2, -1] == processor.tokenizer.eos_token_id
    assert clipft.CLIPDataCollator(processor, max_length=10)(rows)["input_ids"].shape == (3, 10)


def test_megabytes_are_cut_before_they_are_tokenized(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, lengths = type(processor.tokenizer), []
    call = kind.__call__

    def counted(self, texts, **options):
        lengths.extend(map(len, texts))
        return call(self, texts, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    ids = tokenize(processor, ["abc " * 1_000_000, "abc " * 1000])["input_ids"]
    assert torch.equal(ids[0], ids[1])
    assert max(lengths) == 1 << 16


def test_padding_does_not_change_embeddings(processor) -> None:
    model, _ = tiny_clip()
    collate = clipft.CLIPDataCollator(processor)
    rows = [{"image": picture(0)[0], "caption": text} for text in ("a", "a much longer one")]
    inputs = [{k: v for k, v in collate(part).items() if k != "labels"} for part in (rows, rows[:1])]
    with torch.no_grad():
        together, alone = (model(**batch).text_embeds for batch in inputs)
    torch.testing.assert_close(together[:1], alone)


def test_labels_mark_equal_captions_or_classes(processor) -> None:
    collate = clipft.CLIPDataCollator(processor)
    image = picture(0)[0]
    labels = collate([{"image": image, "caption": text} for text in ("a cat", "a dog", "a cat")])["labels"]
    assert labels.dtype == torch.int64
    assert (labels[:, None] == labels).tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    rows = [{"image": image, "captions": [f"caption {i}"], "label": i // 2} for i in range(4)]
    assert collate(rows)["labels"].tolist() == [0, 0, 1, 1]


def test_captions_of_equal_tokens_are_one_text(processor) -> None:
    collate, image = clipft.CLIPDataCollator(processor), picture(0)[0]
    texts = ["A dog", "a  dog ", "a cat", "x" * 50, "x" * 60]  # the last two are cut to the same
    batch = collate([{"image": image, "caption": text} for text in texts])
    assert len(batch["input_ids"]) == 3 and batch["text_index"].tolist() == [0, 0, 1, 2, 2]
    equal = (batch["labels"][:, None] == batch["labels"]).long()
    assert equal.sum(1).tolist() == [2, 2, 1, 2, 2]
    alone = collate([{"image": image, "caption": texts[1]}])  # less padding, another caption
    assert alone["labels"][0] == batch["labels"][0]


def test_rows_without_captions_give_pictures_only(processor) -> None:
    batch = clipft.CLIPDataCollator(processor)([{"image": picture(0)[0]}])
    assert batch.keys() == {"pixel_values"}


# ---- draws ----


def test_one_of_several_captions_is_drawn_each_epoch(processor) -> None:
    rows, collate = PairRows(captioned(8, captions=3)), clipft.CLIPDataCollator(processor, seed=1)
    drawn = [[collate([rows[epoch, i]])["labels"].item() for i in range(8)] for epoch in range(6)]
    again = [[collate([rows[epoch, i]])["labels"].item() for i in range(8)] for epoch in range(6)]
    assert drawn == again
    assert all(len({epoch[i] for epoch in drawn}) > 1 for i in range(8))
    fixed = {collate([rows[0]])["labels"].item() for _ in range(5)}
    assert len(fixed) == 1  # not a training row: always the first


def test_draws_depend_on_seed_epoch_and_index_alone(processor) -> None:
    options = Augmentation(random_resized_crop=0.3, horizontal_flip=0.5, color_jitter=0.3)
    rows = PairRows(captioned(12, captions=2))

    def batches(workers: int, seed: int = 3, batch_size: int = 4):
        torch.manual_seed(workers * 100 + batch_size)  # of no influence
        sampler = EpochSampler(12, seed, lambda: 2)
        collate = clipft.CLIPDataCollator(processor, augmentation=options, seed=seed)
        loader = DataLoader(rows, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate)
        return torch.cat([batch["pixel_values"] for batch in loader])

    assert torch.equal(batches(0), batches(2))
    assert torch.equal(batches(0), batches(0, batch_size=3))
    assert not torch.equal(batches(0), batches(0, seed=4))


def test_drawing_leaves_the_global_generators_alone(processor, monkeypatch) -> None:
    for gpu in (torch.cuda, torch.xpu):
        monkeypatch.setattr(gpu, "manual_seed_all", lambda seed: pytest.fail("dropout on a GPU draws from it"))
    collate = clipft.CLIPDataCollator(processor, augmentation=Augmentation(horizontal_flip=0.5))
    state = torch.get_rng_state()
    collate([PairRows(captioned(2))[0, 1]])
    assert torch.equal(torch.get_rng_state(), state)


def test_order_differs_by_epoch_and_repeats() -> None:
    epoch = 0
    sampler = EpochSampler(50, 7, lambda: epoch)
    first = list(sampler)
    epoch = 1
    second = list(sampler)
    assert [e for e, _ in second] == [1] * 50
    assert sorted(i for _, i in first) == list(range(50))
    assert [i for _, i in first] != [i for _, i in second]
    assert second == list(EpochSampler(50, 7, lambda: 1))


# ---- rows ----


def test_class_names_make_captions() -> None:
    rows = PairRows(labelled(4), ["a {} thing", "{}"])
    assert rows[0]["captions"] == ["a red thing", "red"]
    assert rows[0]["label"] == 0
    assert rows.captions()[1] == ["a green thing", "green"]
    assert "label" not in PairRows(captioned(2))[0]


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match="column 'image', found"):
        PairRows(datasets.Dataset.from_dict({"picture": [1]}))
    with pytest.raises(ValueError, match="column 'caption', or a column 'label' with class names"):
        PairRows([{"image": picture(0)[0], "label": 1}])
    with pytest.raises(ValueError, match="row 1: expected a caption"):
        PairRows([{"image": picture(0)[0], "caption": text} for text in ("a", " ")])[1]
    with pytest.raises(ValueError, match="at least one row"):
        PairRows([])
    with pytest.raises(TypeError, match="with a length"):
        PairRows(captioned(2).to_iterable_dataset())


def test_an_unreadable_picture_names_its_row(tmp_path: Path) -> None:
    class_folders(tmp_path, 8)
    (tmp_path / "blue" / "broken.png").write_bytes(b"no picture")
    rows = PairRows(clipft.load_pairs(tmp_path))
    with pytest.raises(ValueError, match=r"row 2 \(.*broken\.png\): the image cannot be read"):
        rows[2]


def test_real_pictures(data_folder: Path, processor) -> None:
    dataset = clipft.load_pairs(data_folder / "clothing")
    assert len(dataset) == 600
    rows = PairRows(dataset)
    batch = clipft.CLIPDataCollator(processor)([rows[0, i] for i in (0, 599)])
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert batch["labels"].tolist() == [0, 9]
