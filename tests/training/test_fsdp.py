"""FSDP by configuration, against DistributedDataParallel: 2 gloo processes.

accelerate turns FSDP on where there are accelerators; the worker turns it on by hand, so that torch's ``fully_shard``
cuts the model over two CPU processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from scripts import import_paths
from tiny_clip import captioned
from tiny_trainer import trainer_of
from transformers import CLIPModel

import clipft
from clipft.training.checkpoints import last_checkpoint

WORKER = """
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
sys.path[:0] = {tests!r}
import clipft
from ranks import leave
from tiny_clip import captioned, tiny_clip
from tiny_siglip import tiny_siglip
from tiny_trainer import StopAfter, arguments, losses

class Trainer(clipft.CLIPTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        self.is_fsdp_enabled = bool(self.args.fsdp)
        PartialState().distributed_type = state.distributed_type = (
            DistributedType.FSDP if self.args.fsdp else DistributedType.MULTI_CPU
        )
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args) if self.args.fsdp else None

torch.set_num_threads(1)
folder = Path(sys.argv[1])
results = {{}}

def run(name, model_and_processor, *, shard, stop=None, resume=False, **options):
    model, processor = model_and_processor
    if shard:
        layer = "SiglipEncoderLayer" if "siglip" in name else "CLIPEncoderLayer"
        options |= {{"fsdp": True, "fsdp_config": {{"transformer_layer_cls_to_wrap": [layer]}}}}
    args = arguments(folder / name, per_device_train_batch_size=4, per_device_eval_batch_size=4, save_strategy="steps",
        save_steps=2, num_train_epochs=1, **options)
    trainer = Trainer(model, args, train_dataset=captioned(32, captions=2), eval_dataset=captioned(18, captions=2),
        processing_class=processor, callbacks=[StopAfter(stop)] if stop else [])
    trainer.train(resume_from_checkpoint=resume or None)
    kind = type(next(trainer.model.parameters()).data).__name__
    results[name + (" resumed" if resume else "")] = [kind, losses(trainer), trainer.evaluate()]
    trainer.save_model(str(folder / name / "saved"))

clip = lambda: tiny_clip()
lora = lambda: (clipft.add_lora(tiny_clip()[0], r=4, dropout=0.0), tiny_clip()[1])
siglip = lambda: tiny_siglip("siglip2", folder)
for name, make in (("clip", clip), ("lora", lora), ("siglip", siglip)):
    run(f"{{name}} ddp", make(), shard=False)
    run(f"{{name}} fsdp", make(), shard=True)
run("clip broken", clip(), shard=True, stop=2)
run("clip broken", clip(), shard=True, resume=True)
run("clip chunked", clip(), shard=True, grad_cache_chunk_size=3)
try:
    PartialState().distributed_type = DistributedType.MULTI_CPU
    clipft.CLIPTrainer(clip()[0], arguments(folder, fsdp=True), processing_class=clip()[1])
except ValueError as error:
    results["without an accelerator"] = str(error)
if PartialState().is_main_process:
    (folder / "results.json").write_text(json.dumps(results))
leave()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("sharding")
    run_ranks(WORKER.format(tests=import_paths(__file__)), folder)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", ["clip", "lora", "siglip"])
def test_sharded_it_trains_as_with_ddp(results: tuple[Path, dict[str, Any]], name: str) -> None:
    kind, losses, metrics = results[1][f"{name} fsdp"]
    assert kind == "DTensor"
    plain_kind, plain_losses, plain_metrics = results[1][f"{name} ddp"]
    assert plain_kind == "Tensor"
    assert len(losses) == 4
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for metric in plain_metrics:
        if "R@" in metric or "loss" in metric:
            assert metrics[metric] == pytest.approx(plain_metrics[metric], rel=1e-4, abs=0.06 if "R@" in metric else 0)


def test_a_sharded_run_resumes(results: tuple[Path, dict[str, Any]]) -> None:
    folder, runs = results
    assert runs["clip broken resumed"][1] == pytest.approx(runs["clip fsdp"][1], rel=1e-6)
    assert last_checkpoint(folder / "clip broken").name == "checkpoint-4"


def test_gradient_caching_of_a_sharded_model(results: tuple[Path, dict[str, Any]]) -> None:
    assert results[1]["clip chunked"][1] == pytest.approx(results[1]["clip fsdp"][1], rel=1e-4)


def test_what_is_saved_is_whole_and_plain(results: tuple[Path, dict[str, Any]]) -> None:
    folder = results[0]
    for path in (folder / "clip fsdp" / "saved", folder / "clip fsdp" / "checkpoint-4"):
        model, _ = clipft.load(path)
        assert type(model) is CLIPModel
        assert model.logit_scale.shape == ()
        expected = clipft.load(folder / "clip ddp" / path.name)[0].state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    clipft.load(folder / "siglip fsdp" / "saved")


def test_fsdp_that_would_not_happen_is_an_error(results: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """On CPU processes accelerate passes over the wish in silence."""
    assert results[1]["without an accelerator"].startswith("fsdp: accelerate shards models on accelerators only")
    with pytest.raises(ValueError, match="fsdp_config: expected version 2, got 1"):
        trainer_of(tmp_path, captioned(8), fsdp=True, fsdp_config={"version": 1})
