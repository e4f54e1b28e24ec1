"""Which architectures work with which terms and recipes: the table of docs/models.md is what tiny models of each do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kdfast import prune, recipes, students
from kdfast.early_exit import EarlyExit
from kdfast.objective import CLS, Attention, Cosine, Hidden, LanguageModel, Relations, Terms

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
TOKENS: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = TOKENS | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
GEMMA = GROUPED | {"query_pre_attn_scalar": 16, "sliding_window": 16}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GPT2 = TOKENS | {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}
FALCON = TOKENS | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = TOKENS | {"decoder_start_token_id": 2, "forced_eos_token_id": None, "d_model": 32, "num_labels": 2}
BART |= {f"{side}_{name}": size for side in ("encoder", "decoder")
         for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
IMAGES = {name: size for name, size in SIZES.items() if name not in TOKENS} | {"image_size": 8, "patch_size": 4}
DEBERTA = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
DEBERTA |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "max_relative_positions": -1, "pooler_hidden_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "ernie", "megatron-bert"), SIZES),
    "esm": SIZES | {"mask_token_id": 3},
    "electra": SIZES | {"embedding_size": 32},
    "albert": SIZES | {"embedding_size": 16},
    "modernbert": SIZES | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 32},
    "distilbert": TOKENS | {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    **dict.fromkeys(("roberta", "mpnet"), SIZES | {"pad_token_id": 1, "bos_token_id": 0}),
    "rembert": SIZES | {"input_embedding_size": 16, "output_embedding_size": 16},
    "deberta-v2": DEBERTA,
    "deberta": SIZES,
    "xlnet": TOKENS | {"d_model": 32, "n_head": 4, "n_layer": 2, "d_inner": 48},
    **dict.fromkeys(("convbert", "roformer"), SIZES | {"embedding_size": 32}),
    "gpt2": GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "gptj": GPT2,
    **dict.fromkeys(("phi", "gpt_neox"), SIZES),
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "cohere", "granite"), GROUPED),
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "mixtral": GROUPED | EXPERTS,
    "gpt_oss": GROUPED | EXPERTS,
    "bloom": TOKENS | {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": FALCON,
    "mamba": TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "t5": T5,
    **dict.fromkeys(("bart", "marian"), BART),
    **dict.fromkeys(("vit", "dinov2", "beit", "siglip_vision_model"), IMAGES),
    "swin": {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "whisper": WHISPER,
}  # fmt: skip
WITHOUT_IDS = ("vit", "dinov2", "beit", "siglip_vision_model", "swin", "whisper")
EVERY = pytest.mark.parametrize("name", CONFIGS)


def model_of(name: str, auto: Any = transformers.AutoModel, seed: int = 0, **changes: Any) -> Any:
    """All parameters are random, so that leaving out any shows."""
    torch.manual_seed(seed)
    model = auto.from_config(transformers.AutoConfig.for_model(name, **CONFIGS[name] | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in WITHOUT_IDS and name != "whisper":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(4, 60, (3, 9), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 20, generator=generator), "decoder_input_ids": ids}
    ids[0, 8] = ids[1, 5] = ids[2, 8] = 2  # classifiers of BART and T5 read the end of the text
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids.where(mask.bool(), CONFIGS[name]["pad_token_id"]), "attention_mask": mask}


def inputs_of(model: Any) -> dict[str, Tensor]:
    own = batch(model.config.model_type)
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if getattr(model.config, "is_encoder_decoder", False) and not classifies and "decoder_input_ids" not in own:
        own["decoder_input_ids"] = own["input_ids"][:, :5]
    return own


# ---- what is tried ----
def trains(objective: Any, student: Any, teacher: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether a step changes the student: finite losses, gradients that are not all zero."""
    terms = objective.for_student(student) if hasattr(objective, "for_student") else objective
    terms = terms.for_models(student, teacher) if hasattr(terms, "for_models") else terms
    with torch.no_grad():
        of_teacher = terms.run(teacher, inputs)
    loss = sum(terms(terms.run(student, inputs), of_teacher, inputs).values())
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert bool(loss.isfinite())
    assert loss > 0
    assert any(bool(x.any()) for x in gradients)
    assert all(bool(x.isfinite().all()) for x in gradients)
    return True


def states(name: str) -> bool:
    models = [model_of(name, seed=seed) for seed in (0, 1)]
    terms = Terms(hidden=Hidden({-1: -1, 1: 1}), cls=CLS("last"), cos=Cosine())
    return trains(terms, *models, inputs_of(models[0]))


def attention(name: str) -> bool:
    models = [model_of(name, seed=seed) for seed in (0, 1)]
    terms = Terms(attention=Attention({-1: -1, 1: 1}), relations=Relations(relations=("qk", "vv", "qq")))
    return trains(terms, *models, inputs_of(models[0]))


def layers(name: str) -> bool:
    return students.from_layers(model_of(name), [1]).config.num_hidden_layers == 1


def classifier(name: str, seed: int = 0) -> Any:
    return model_of(name, transformers.AutoModelForSequenceClassification, seed, num_labels=2)


def of_recipe(name: str, recipe: Any) -> bool:
    """Every stage of a recipe of classifiers, with a student of layers, or `--student` where that is not to be had."""
    teacher = classifier(name, seed=1)
    inputs = inputs_of(teacher) | {"labels": torch.tensor([0, 1, 1])}
    student = classifier(name)
    return all(trains(stage.objective, student, teacher, inputs) for stage in recipe.stages(2, 2, "classification"))


def fastbert(name: str) -> bool:
    with torch.no_grad():
        return len(EarlyExit(classifier(name), width=8)(**inputs_of(classifier(name)), speed=0.5).layers) == 3


def pruned(name: str) -> bool:
    teacher = classifier(name)
    masks = prune.Masks.full(teacher)
    for living in masks.heads:
        living[0] = False
    return prune.compact(teacher, masks).num_parameters() < teacher.num_parameters()


def causal_lm(name: str) -> bool:
    from kdfast.runs.causal_lm import check_causal

    teacher = model_of(name, transformers.AutoModelForCausalLM)
    check_causal(teacher, f"teacher {name}")
    student, inputs = students.from_layers(teacher, [1]), inputs_of(teacher)
    return trains(LanguageModel(), student, teacher, inputs | {"labels": inputs["input_ids"]})


def seq2seq(name: str) -> bool:
    if name in WITHOUT_IDS:  # of sounds: the recipe's rows are texts
        return False
    teacher = model_of(name, transformers.AutoModelForSeq2SeqLM)
    inputs = batch(name) | {"labels": batch(name)["input_ids"][:, :5]}
    return trains(LanguageModel(), students.from_layers(teacher, [0, 1], decoder_layers=[1]), teacher, inputs)


COLUMNS: dict[str, Callable[[str], bool]] = {
    "hidden states": states,
    "attention": attention,
    "`from_layers`": layers,
    "hinton": lambda name: of_recipe(name, recipes.hinton.Recipe()),
    "patient-kd": lambda name: of_recipe(name, recipes.patient_kd.Recipe()),
    "minilm": lambda name: of_recipe(name, recipes.minilm.Recipe()),
    "tinybert": lambda name: of_recipe(name, recipes.tinybert.Recipe()),
    "fastbert": fastbert,
    "prune": pruned,
    "causal-lm": causal_lm,
    "seq2seq": seq2seq,
}


def works(name: str, column: str) -> bool:
    try:
        return COLUMNS[column](name)
    except (ValueError, TypeError):  # refused, in words: anything else is an error of kdfast's
        return False


@EVERY
def test_table_is_true(name: str) -> None:
    found = [works(name, column) for column in COLUMNS]
    row = " | ".join([f"`{name}`", *("yes" if it else "–" for it in found)])
    assert f"| {row} |" in PAGE, f"| {row} |"


def test_table_has_no_other_rows_and_the_same_columns() -> None:
    assert re.findall(r"^\| `([\w-]+)` \| (?:yes|–)", PAGE, flags=re.M) == list(CONFIGS)
    assert f"| `model_type` | {' | '.join(COLUMNS)} |" in PAGE
