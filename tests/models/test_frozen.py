"""clipft.add_lora(frozen="int8"): frozen layers in int8 under peft's adapters, and their float weights again."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import tiny_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel

import clipft

pytest.importorskip("peft")

from peft_models import LAYERS, adapted, assert_same_gradients, config, embeds, gradients, peft, randomised, tiny_batch
from ranks import run_ranks
from scripts import import_paths

from clipft.models.frozen import FrozenLinear, float_state, frozen_linears, rounding_errors, to_float, to_int8
from clipft.models.saving import save_model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return tiny_batch()


def tuned(model: CLIPModel | None = None, frozen: str = "int8", **options: Any) -> Any:
    return randomised(clipft.add_lora(model or tiny_model(), r=4, frozen=frozen, **options))


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = (part.detach().flatten().double() for part in (one, other))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("targets", ["vision,text", "vision.last1:fc2"])
def test_gradients_are_near_those_of_the_float_base(batch: dict[str, Tensor], targets: str) -> None:
    model, plain = (tuned(frozen=frozen, targets=targets) for frozen in ("int8", "float"))
    assert len(frozen_linears(model)) == LAYERS
    assert cosine(embeds(model, batch), embeds(plain, batch)) > 0.999
    ours, theirs = gradients(model, batch), gradients(plain, batch)
    assert ours.keys() == theirs.keys()
    assert cosine(*(torch.cat([part.flatten() for part in own.values()]) for own in (ours, theirs))) > 0.99
    assert not torch.equal(embeds(model, batch), embeds(plain, batch))


def test_a_variant_of_lora_computes_with_the_weight_that_the_codes_mean(batch: dict[str, Tensor]) -> None:
    model, plain = (clipft.fuse(adapted(use_dora=True)) for _ in range(2))
    to_int8(model)
    assert cosine(embeds(model, batch), embeds(plain, batch)) > 0.999
    ours, theirs = gradients(model, batch), gradients(plain, batch)
    assert cosine(*(torch.cat([own[name].flatten() for name in theirs]) for own in (ours, theirs))) > 0.99


def test_what_is_float_and_what_is_gone() -> None:
    base = tiny_model()
    weights = {name for name, _ in base.named_parameters()}
    model = tuned(base)
    left = {name.replace("base_layer.", "") for name, _ in model.base_model.model.named_parameters()}
    gone = {name.rpartition(".")[0] for name in weights - left}
    assert gone == set(frozen_linears(model)) and len(gone) == LAYERS
    assert type(base.visual_projection) is type(base.text_projection) is nn.Linear
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(batch: dict[str, Tensor], reentrant: bool) -> None:
    model = tuned(dropout=0.3).train()
    torch.manual_seed(1)
    expected = gradients(model, batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(1)
    assert_same_gradients(gradients(model, batch), expected)


def test_adapters_are_added_switched_disabled_and_deleted(batch: dict[str, Tensor]) -> None:
    model = tuned(targets="vision")
    first = embeds(model, batch)
    with model.disable_adapter():
        none = embeds(model, batch)
    assert cosine(none, embeds(tiny_model(), batch)) > 0.999
    model.add_adapter("second", config(target_modules=["fc1", "fc2"]))  # of the text tower too, which has none yet
    assert torch.equal(embeds(model, batch), first)
    model.set_adapter("second")
    assert torch.allclose(embeds(model, batch), none, atol=1e-6)  # B is zero
    randomised(model, 3)
    other = embeds(clipft.fuse(model), batch)
    plain = tuned(frozen="float", targets="vision")
    plain.add_adapter("second", config(target_modules=["fc1", "fc2"]))
    plain.set_adapter("second")
    assert cosine(other, embeds(randomised(plain, 3), batch)) > 0.999
    for one in (model, plain):
        one.base_model.set_adapter(["default", "second"])
    assert cosine(embeds(model, batch), embeds(plain, batch)) > 0.999
    model.delete_adapter("second")
    model.set_adapter("default")
    assert len(gradients(model, batch)) == LAYERS


def test_what_is_saved_loads_in_plain_peft_on_the_float_base(
    base: Path, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model, plain = (tuned(clipft.load(base)[0], frozen) for frozen in ("int8", "float"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(embeds(loaded, batch), embeds(plain, batch), atol=1e-6)
    merged, _ = clipft.load(tmp_path / "adapter")
    assert torch.allclose(embeds(merged, batch), embeds(plain, batch), atol=1e-5)


def test_a_merge_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for act in (
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(safe_merge=True),
        clipft.quantize,
        lambda model: save_model(model, None, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"save the adapter with model.save_pretrained\(FOLDER\), and clipft.load"):
            act(tuned())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="frozen: expected float or int8, got 'int4'"):
        clipft.add_lora(tiny_model(), frozen="int4")


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_an_adapter_that_would_change_its_base_is_refused(start: str) -> None:
    with pytest.raises(ValueError, match=r"an adapter whose initialisation changes its base \(pissa, olora, \.\.\.\)"):
        tuned().add_adapter("other", config(init_lora_weights=start))


def test_an_adapter_of_a_parameter_is_refused() -> None:
    model = peft.get_peft_model(tiny_model(), config(target_modules=["q_proj"], target_parameters=["fc1.weight"]))
    with pytest.raises(ValueError, match=r"target_parameters: .*text_model.*mlp.fc1 has no float weight"):
        to_int8(model)
    assert not frozen_linears(model)


# ---- without an adapter ----


def test_gradients_pass_through_frozen_layers(batch: dict[str, Tensor]) -> None:
    models = tiny_model(), tiny_model()
    for model in models:
        clipft.freeze(clipft.fuse(model), "towers")
        for part in (model.vision_model.embeddings, model.text_model.embeddings, model.text_model.encoder.layers[1]):
            part.requires_grad_(True)
    to_int8(models[0])
    assert len(frozen_linears(models[0])) == LAYERS - 6
    ours, theirs = (gradients(model, batch) for model in models)
    assert ours.keys() == theirs.keys()
    assert cosine(*(torch.cat([own[name].flatten() for name in theirs]) for own in (ours, theirs))) > 0.99


def test_a_float_state_is_taken_where_the_codes_were_made_of_it(batch: dict[str, Tensor]) -> None:
    plain, model = tiny_model(), tiny_model().requires_grad_(False)
    order = [name for name, _ in plain.named_parameters()]
    to_int8(model)
    want = embeds(model, batch)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    assert not any(model.load_state_dict(state))
    assert torch.equal(embeds(model, batch), want)
    weights = {name: plain.get_submodule(name).weight for name in frozen_linears(model)}
    saved = float_state(model, weights)
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], value) for name, value in state.items())
    state["text_model.encoder.layers.1.mlp.fc1.weight"][3, 5] += 1.0
    with pytest.raises(
        ValueError, match=r"text_model.encoder.layers.1.mlp.fc1: expected the weight that its int8 codes"
    ):
        model.load_state_dict(state, strict=False)
    to_float(model, weights)
    assert [name for name, _ in model.named_parameters()] == order


CODES_OF_EACH_RANK = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from peft_models import gradients, tiny_batch
from ranks import leave
from tiny_clip import tiny_model
import clipft
from clipft.models.frozen import frozen_linears

dist.init_process_group("gloo")
model = clipft.add_lora(tiny_model(dist.get_rank()), r=4, frozen="int8")  # as if packed for another CPU
codes = [buffer for layer in frozen_linears(model).values() for buffer in layer.codes.buffers()]
before = [buffer.clone() for buffer in codes]
gradients(DistributedDataParallel(model), tiny_batch())
assert codes and all(map(torch.equal, codes, before))
leave()
"""


def test_processes_do_not_send_each_other_codes() -> None:
    run_ranks(f"import sys\nsys.path[:0] = {import_paths(__file__)!r}\n{CODES_OF_EACH_RANK}")


def test_what_a_user_keeps_from_ddp_is_kept_from_it_still() -> None:
    model = tiny_model()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["logit_scale"])
    to_int8(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored - {"logit_scale"} == {name for name, _ in model.named_buffers() if ".codes." in name}
    assert "logit_scale" in ignored


def test_copies_and_pickles(batch: dict[str, Tensor]) -> None:
    model = tuned()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(embeds(other, batch), embeds(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_weights_come_back_to_the_bit(dtype: torch.dtype) -> None:
    modules = tiny_model().to(dtype).named_modules()
    weights = {name: module.weight for name, module in modules if type(module) is nn.Linear}
    model = tuned(tiny_model().to(dtype))
    other = weights | {"text_model.encoder.layers.1.mlp.fc1": weights["text_model.encoder.layers.0.mlp.fc1"]}
    with pytest.raises(
        ValueError, match=r"text_model.encoder.layers.1.mlp.fc1: expected the weight that its int8 codes"
    ):
        to_float(model, other)
    assert len(frozen_linears(model)) == LAYERS
    to_float(model, weights)
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())
    plain = model.unload()
    assert all(torch.equal(plain.get_submodule(name).weight, weight) for name, weight in weights.items())


def test_errors_of_rounding_tell_columns_that_stand_out(batch: dict[str, Tensor]) -> None:
    model = tiny_model().requires_grad_(False)
    errors = rounding_errors(model, lambda: model(**batch))
    assert len(errors) == LAYERS and max(errors.values()) < 0.1
    with torch.no_grad():  # a column that the layer does not read
        model.text_model.encoder.layers[1].layer_norm2.bias[3] = 400.0
        model.text_model.encoder.layers[1].mlp.fc1.weight[:, 3] = 0.0
    worse = rounding_errors(model, lambda: model(**batch))
    assert [name for name, error in worse.items() if error > 0.1] == ["text_model.encoder.layers.1.mlp.fc1"]
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model.vision_model.encoder.layers[0].self_attn.k_proj.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"model: vision_model.*layers.0.self_attn.k_proj: .*weight must be finite"):
        rounding_errors(model, lambda: model(**batch))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's /proc")
def test_memory_of_float_weights_is_given_back():
    """To the system, not to the heap that they lay on."""
    code = """
import re, clipft
from pathlib import Path
from clipft.models.frozen import float_linears, to_int8
from transformers import CLIPConfig, CLIPModel

def resident():
    return 1024 * int(re.search(r"Rss:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

tower = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
vision, text = {**tower, "image_size": 32, "patch_size": 16}, {**tower, "vocab_size": 64}
config = CLIPConfig(vision_config=vision, text_config=text)
model = CLIPModel(config).requires_grad_(False)
size = sum(layer.weight.nbytes for layer in float_linears(model).values())
before = resident()
to_int8(model)
print((before - resident()) / size)
model = CLIPModel(config)
clipft.quantize(model)  # loads what it needs
clipft._C.trim_heap()
before = resident()
quantized = clipft.quantize(model)
print((resident() - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, added = map(float, done.stdout.split())
    assert given_back > 0.4  # two packings of the codes are .52 of the weights
    assert added < 0.4  # one and the int8 rest are .27, and the float model stays
