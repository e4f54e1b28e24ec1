"""Smaller models in folders: a plain config where the class can express them, else a record that kdfast reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pruned_oracle as oracle
import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from kdfast.prune import Masks, compact
from kdfast.prune.layers import ADAPTERS

KINDS = dict.fromkeys(tiny_models.CAUSAL, hf.AutoModelForCausalLM)
OWN_SIZE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi")  # a head's size is in the config


def made(name: str, **options: Any) -> Any:
    """With the buffers that transformers makes of a float64 model it loads."""
    model = tiny_models.make(name, **options)
    for part in model.modules():  # Gemma's factor of embeddings went through float32
        if hasattr(part, "embed_scale"):
            part.embed_scale.fill_(part.scalar_embed_scale)
    return model


def uniform(model: nn.Module, *, heads: bool = True) -> Masks:
    """As many heads of each group, and as many neurons, in every layer; not the same ones."""
    masks = Masks.full(model)
    for i, (of_heads, neurons) in enumerate(zip(masks.heads, masks.neurons, strict=True)):
        if heads:
            half = len(of_heads) // 2
            of_heads[[i % half, half + (i + 1) % half]] = False
        neurons[i : i + 9] = False
    return masks


def nothing(model: nn.Module) -> Masks:
    masks = oracle.random_masks(model)
    masks.heads[0][:] = False
    masks.neurons[0][:] = False
    masks.neurons[1][:] = False
    if model.config.model_type != "albert":
        masks.layers[1] = False
    return masks


def check_same(model: Any, loaded: Any) -> None:
    batch = tiny_models.batch(model)
    assert type(loaded) is type(model)
    assert {name: x.shape for name, x in model.state_dict().items()} == {
        name: x.shape for name, x in loaded.state_dict().items()
    }
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-10, atol=1e-10)
    ignored = {"_name_or_path": "", "dtype": ""}
    assert loaded.config.to_dict() | ignored == model.config.to_dict() | ignored


@pytest.mark.parametrize("masks_of", [oracle.random_masks, uniform, nothing], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_reloaded_is_the_same(name: str, masks_of: Any, tmp_path: Path) -> None:
    model = made(name)
    smaller = compact(model, masks_of(model))
    smaller.save_pretrained(tmp_path)
    loaded = KINDS.get(name, hf.AutoModelForSequenceClassification).from_pretrained(tmp_path)
    check_same(smaller, loaded)
    plain = "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert plain == (masks_of is uniform and name in OWN_SIZE)
    loaded.save_pretrained(tmp_path / "again")
    check_same(smaller, type(loaded).from_pretrained(tmp_path / "again"))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_neurons_and_dropped_layers_are_in_every_config(name: str, tmp_path: Path) -> None:
    model = made(name)
    masks = uniform(model, heads=False)
    masks.layers[-1] = name == "albert"
    smaller = compact(model, masks)
    smaller.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    check_same(smaller, KINDS.get(name, hf.AutoModelForSequenceClassification).from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "options"), [("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("phi", {"qk_layernorm": True})]
)
def test_what_classes_derive_of_numbers_that_changed(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The scale of scores of a layer's number, and the size of norms of the number of heads."""
    model = made(name, **options)
    masks = uniform(model)
    masks.layers[0] = False
    smaller = compact(model, masks)
    batch = tiny_models.batch(model)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(smaller(**batch).logits, oracle.masked(model, masks)(**batch).logits, **close)
    smaller.save_pretrained(tmp_path)
    check_same(smaller, hf.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_loads_without_kdfast_what_the_class_expresses(tmp_path: Path) -> None:
    expected = []
    for name in ("llama", "phi"):
        model = tiny_models.make(name)
        smaller = compact(model, uniform(model))
        smaller.save_pretrained(tmp_path / name)
        assert (smaller.config.num_attention_heads, smaller.config.intermediate_size) == (4, tiny_models.NEURONS - 9)
        assert not hasattr(smaller.config, "quantization_config")
        expected.append(f"{type(smaller.base_model).__name__} {smaller.base_model.num_parameters()}")
    run = alone(tmp_path / "llama", tmp_path / "phi")
    assert run.stdout.splitlines() == expected, run.stderr


@pytest.mark.parametrize("name", OWN_SIZE)
def test_numbers_of_heads_that_the_class_refuses(name: str, tmp_path: Path) -> None:
    """Five heads do not divide a width of 48, which the Llamas' configs want although heads have a size of their own."""
    model = made(name, num_key_value_heads=tiny_models.HEADS)
    masks = Masks.full(model)
    for heads in masks.heads:
        heads[2] = False
    smaller = compact(model, masks)
    smaller.save_pretrained(tmp_path)
    check_same(smaller, hf.AutoModelForCausalLM.from_pretrained(tmp_path))


def alone(*folders: Path) -> subprocess.CompletedProcess[str]:
    """Folders, loaded by transformers in a process that does not import kdfast."""
    program = (
        "import sys, transformers\n"
        f"for folder in {[*map(str, folders)]!r}:\n"
        "    try:\n"
        "        model = transformers.AutoModel.from_pretrained(folder)\n"
        "        print(type(model).__name__, model.num_parameters())\n"
        "    except RuntimeError:\n"
        "        print('refused')\n"
        "assert 'kdfast' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_without_kdfast_it_fails_and_says_what_to_install(tmp_path: Path) -> None:
    """Also where all weights that there are would fit, and transformers would make up the others."""
    for gone in ("some heads", "all heads of a layer", "the first layer"):
        model = tiny_models.make("modernbert")
        masks = Masks.full(model)
        masks.heads[1][2 if gone == "some heads" else slice(None)] = gone == "the first layer"
        masks.layers[0] = gone != "the first layer"
        compact(model, masks).save_pretrained(tmp_path / gone)
    run = alone(*tmp_path.iterdir())
    assert run.stdout.split() == ["refused"] * 3, run.stderr
    assert run.stderr.count("pip install kdfast, then import kdfast") == 3


@pytest.mark.parametrize("first", ["kdfast", "transformers", "transformers.quantizers"])
def test_loads_whichever_is_imported_first(tmp_path: Path, first: str) -> None:
    model = tiny_models.make("bert", kind=hf.AutoModel)
    compact(model, oracle.random_masks(model)).save_pretrained(tmp_path)
    program = (
        f"import {first}, sys\n"
        f"assert ({first!r} == 'kdfast') == ('transformers' not in sys.modules)\n"
        "import kdfast, transformers\n"
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path)!r})\n"
        "print(sum(x.numel() for x in model.parameters()), 'kdfast._from_pretrained' in str(sys.meta_path))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    saved = load_file(tmp_path / "model.safetensors")
    assert run.stdout.split() == [str(sum(x.numel() for x in saved.values())), "False"]


def test_it_is_a_model_like_any_other(tmp_path: Path) -> None:
    """transformers refuses to cast, compile or train much of what it loads by this door."""
    model = tiny_models.make("bert").float()
    smaller = compact(model, oracle.random_masks(model))
    smaller.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}
    assert loaded.float().dtype == torch.float32
    assert loaded.half().to(torch.float64).dtype == torch.float64
    left = {"hf_quantizer", "is_quantized", "quantization_method"}
    assert not left & {*vars(loaded)}
    assert "_is_quantized" not in vars(loaded.config)
    assert loaded.config.quantization_config == smaller.config.quantization_config
    rows = [{name: x[0] for name, x in tiny_models.batch(model).items()} | {"labels": torch.tensor(1)}] * 4
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    options = {"max_steps": 2, "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    trainer = hf.Trainer(loaded, hf.TrainingArguments(str(tmp_path / "run"), **options), train_dataset=rows)
    trainer.train()
    resumed = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    check_same(loaded.eval(), resumed)
    assert not torch.equal(resumed.classifier.weight, smaller.classifier.weight)


def test_tied_weights_are_one_after_loading_and_shards_are_joined(tmp_path: Path) -> None:
    for name, kind in (("bert", hf.AutoModelForMaskedLM), ("qwen3", hf.AutoModelForCausalLM)):
        model = tiny_models.make(name, kind=kind, tie_word_embeddings=True)
        smaller = compact(model, oracle.random_masks(model))
        smaller.save_pretrained(tmp_path / name, max_shard_size="30KB")
        assert len([*(tmp_path / name).glob("*.safetensors")]) > 2
        loaded = kind.from_pretrained(tmp_path / name)
        check_same(smaller, loaded)
        for one in (smaller, loaded):
            assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert smaller.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_other_heads_on_the_same_folder(tmp_path: Path) -> None:
    model = tiny_models.make("electra", kind=hf.AutoModel)
    smaller = compact(model, nothing(model))
    smaller.save_pretrained(tmp_path)
    batch = tiny_models.batch(model)
    kinds = (hf.AutoModelForTokenClassification, hf.AutoModelForQuestionAnswering, hf.AutoModelForMultipleChoice)
    for kind in (hf.AutoModelForSequenceClassification, hf.AutoModelForMaskedLM, *kinds):
        base = kind.from_pretrained(tmp_path).base_model
        torch.testing.assert_close(base(**batch)[0], smaller(**batch)[0], rtol=1e-10, atol=1e-10)


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_models.make("bert")
    compact(model, oracle.random_masks(model)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"version": 2}, "version: expected 1, as this kdfast writes it .*, got 2"),
        ({"layers": config["quantization_config"]["layers"][:2]}, "layers: expected shapes of 3 layers, got 2"),
    ):
        path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | changes}))
        with pytest.raises(ValueError, match=f"kdfast: config.json: {message}"):
            hf.AutoModel.from_pretrained(tmp_path)


def test_an_architecture_must_be_registered_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.make("bert")
    compact(model, oracle.random_masks(model)).save_pretrained(tmp_path)
    monkeypatch.delitem(ADAPTERS, "bert")
    with pytest.raises(ValueError, match=r"kdfast: config.json: model: .*kdfast.prune.register\('bert', "):
        hf.AutoModel.from_pretrained(tmp_path)


def test_kdfast_itself_takes_it(tmp_path: Path) -> None:
    from kdfast import students
    from kdfast.models import loading

    model = tiny_models.make("bert")
    smaller = compact(model, oracle.random_masks(model))
    smaller.save_pretrained(tmp_path)
    check_same(smaller, loading.pretrained(hf.AutoModelForSequenceClassification, "student", tmp_path))
    student = students.narrower(smaller, hidden_size=24).model
    assert not hasattr(student.config, "quantization_config")
    assert len(student.base_model.encoder.layer[0].attention.self.query.weight) == 24
