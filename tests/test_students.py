"""Students made of teachers: they compute what the teacher's layers do, are saved as such, and leave the teacher alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kdfast import hf, students

LAYERS = 4
SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
BERT: dict[str, Any] = SMALL | {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "megatron-bert"), BERT),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), BERT | {"pad_token_id": 1}),
    "electra": BERT | {"embedding_size": 16},
    "rembert": BERT | {"input_embedding_size": 16, "output_embedding_size": 16},
    "deberta-v2": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32},
    "distilbert": {"vocab_size": 60, "dim": 32, "n_heads": 4, "n_layers": LAYERS, "hidden_dim": 48},
    "xlnet": {"vocab_size": 60, "d_model": 32, "n_head": 4, "n_layer": LAYERS, "d_inner": 48},
    "albert": BERT | {"embedding_size": 16},
    "modernbert": BERT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    "llama": LLAMA | {"tie_word_embeddings": True},
    "qwen2": LLAMA | WINDOW | {"max_window_layers": 2},  # the last two with a window
    "qwen3": LLAMA | {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": LLAMA | {"sliding_window": 3},
    "smollm3": LLAMA,  # the fourth without rotary embeddings
}
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "smollm3")
LISTS = {"distilbert": "transformer.layer", "xlnet": "layer"} | dict.fromkeys((*CAUSAL, "modernbert"), "layers")
# Other than the first three of each kind, of which the configs' defaults would be right.
SOME = (0, 3, 1)

assert {*CONFIGS, "vit", "deit", "dinov2"} == set(hf.ADAPTERS)  # and those of images


def model_of(name: str, head: str = "", **changes: Any) -> Any:
    """head: "", "classes" or "words". All parameters are random, biases as well."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name] | changes)
    words = transformers.AutoModelForCausalLM if name in (*CAUSAL, "xlnet") else transformers.AutoModelForMaskedLM
    classes = transformers.AutoModelForSequenceClassification
    model = {"": transformers.AutoModel, "classes": classes, "words": words}[head].from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 56, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def output(model: Any) -> Tensor:
    result: Tensor = model.eval()(**batch())[0]
    return result


def with_layers(teacher: Any, layers: tuple[int, ...]) -> Any:
    """The student from a copy of the teacher, all but these layers taken out by hand."""
    model = copy.deepcopy(teacher)
    name = model.config.model_type
    if name != "albert":
        path = LISTS.get(name, "encoder.layer")
        every = model.base_model.get_submodule(path)
        model.base_model.set_submodule(path, nn.ModuleList([every[i] for i in layers]))
        for mine, its in enumerate(layers):
            if name in CAUSAL:
                every[its].self_attn.layer_idx = mine  # of the cache
    for of_layers in ("layer_types", "no_rope_layers"):
        if hasattr(model.config, of_layers):
            setattr(model.config, of_layers, [getattr(model.config, of_layers)[i] for i in layers])
    model.config.num_hidden_layers = len(layers)
    return model


def tied(model: Any) -> bool:
    out = model.get_output_embeddings()
    return out is not None and out.weight is model.get_input_embeddings().weight


def round_trip(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("head", ["", "classes", "words"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_compute_what_they_did(name: str, head: str, tmp_path: Path) -> None:
    teacher = model_of(name, head)
    before = output(teacher)
    assert torch.equal(output(students.from_layers(teacher, range(LAYERS))), before)
    student = students.from_layers(teacher, SOME)
    assert type(student) is type(teacher)
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (LAYERS, 3)
    assert torch.equal(output(student), output(with_layers(teacher, SOME)))
    assert not torch.equal(output(student), before)
    assert tied(student) == tied(teacher)
    student.train()(**batch())[0].sum().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert torch.equal(output(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())
    saved = round_trip(student, tmp_path)
    assert torch.equal(output(saved), output(student))
    assert tied(saved) == tied(teacher)


def test_a_layer_twice_is_two_layers() -> None:
    teacher = model_of("llama", "words")
    teacher.generation_config.max_new_tokens = 7
    random_numbers = torch.get_rng_state()
    student = students.from_layers(teacher, (2, 2, 0))
    assert torch.equal(torch.get_rng_state(), random_numbers)  # none are drawn
    assert student.generation_config.max_new_tokens == 7
    assert student.generation_config is not teacher.generation_config
    layers = student.model.layers
    for mine, its in enumerate((2, 2, 0)):
        a, b = layers[mine].state_dict(), teacher.model.layers[its].state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]  # of the cache, when it samples
    nn.init.zeros_(layers[0].mlp.up_proj.weight)
    assert layers[1].mlp.up_proj.weight.any()
    assert teacher.model.layers[2].mlp.up_proj.weight.any()


def test_first_layer_of_modernbert(tmp_path: Path) -> None:
    """It has no attn_norm, which any other layer has."""
    teacher = model_of("modernbert", "words")
    torch.use_deterministic_algorithms(True)  # memory that nobody initialised is NaN
    try:
        student = students.from_layers(teacher, (2, 0))
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = student.model.layers
    assert isinstance(first.attn_norm, nn.Identity)
    assert torch.equal(first.attn.Wqkv.weight, teacher.model.layers[2].attn.Wqkv.weight)
    assert torch.equal(second.attn.Wqkv.weight, teacher.model.layers[0].attn.Wqkv.weight)
    assert torch.equal(second.attn_norm.weight, torch.ones(32))
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(output(round_trip(student, tmp_path)), output(student))


def test_groups_of_albert() -> None:
    teacher = model_of("albert", num_hidden_groups=2)
    assert torch.equal(output(students.from_layers(teacher, [0, 3])), output(with_layers(teacher, (0, 3))))
    with pytest.raises(ValueError, match=r"layers: expected as many of each of the 2 groups .* got \[0, 1\]"):
        students.from_layers(teacher, (0, 1))


def test_student_of_a_teacher_in_use() -> None:
    """Frozen, read, without pooler, in bfloat16 with an odd float32."""
    for name in ("bert", "mpnet", "llama"):
        teacher = model_of(name).bfloat16().requires_grad_(False)
        if hasattr(teacher, "pooler"):
            teacher.pooler = None
        for layer in teacher.get_submodule(LISTS.get(name, "encoder.layer")):
            for module in layer.modules():
                if "Norm" in type(module).__name__:
                    module.float()
        dtypes = {key: value.dtype for key, value in teacher.state_dict().items()}
        with hf.Reader(teacher):
            student = students.from_layers(teacher, range(LAYERS), dtype=None)
        assert {key: value.dtype for key, value in student.state_dict().items()} == dtypes
        assert getattr(student, "pooler", None) is None
        assert all(p.requires_grad for p in student.parameters())
        assert "kdfast" not in student.config._attn_implementation
        assert not any(module._forward_hooks for module in student.modules())
    rotary = model_of("llama")
    student = students.from_layers(rotary.bfloat16(), range(LAYERS), dtype=None)
    assert student.rotary_emb.inv_freq.dtype == torch.float32  # as after from_pretrained(dtype=torch.bfloat16)
    assert students.from_layers(transformers.BertModel(model_of("bert").config, False), [1]).pooler is None


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout(name: str) -> None:
    teacher = model_of(name, "classes", **{"attention_dropout": 0.1} if name in CAUSAL else {})
    probabilities = [m.p for m in students.from_layers(teacher, SOME).modules() if isinstance(m, nn.Dropout)]
    theirs = [m.p for m in with_layers(teacher, SOME).modules() if isinstance(m, nn.Dropout)]
    assert sorted(probabilities) == sorted(theirs)
    student = students.from_layers(teacher, SOME, dropout=0).train()
    assert torch.equal(student(**batch())[0], student(**batch())[0])
    assert torch.equal(student(**batch())[0], student.eval()(**batch())[0])


def test_wrong_layers_and_teachers() -> None:
    teacher = model_of("bert", "classes")
    for wrong in ((), (0, 4), (-1,)):
        with pytest.raises(ValueError, match=r"from_layers: layers: expected numbers from 0 to 3, got \["):
            students.from_layers(teacher, wrong)
    with pytest.raises(ValueError, match=r"dropout: expected 0 or more and less than 1, got 1\.5"):
        students.from_layers(teacher, [0], dropout=1.5)
    with pytest.raises(TypeError, match="teacher: expected a transformers model, got Linear"):
        students.from_layers(nn.Linear(2, 2), [0])
    teacher.classifier = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"that BertForSequenceClassification makes .* for classifier\.weight, class"):
        students.from_layers(teacher, [0])
    teacher = model_of("bert")
    teacher.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got others for extra\.weight, extra\.bias"):
        students.from_layers(teacher, [0])
    t5 = transformers.AutoConfig.for_model("t5", vocab_size=60, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=32)
    with pytest.raises(ValueError, match=r"expected one list of its 2 layers, got .* in T5Model"):
        students.narrower(transformers.AutoModel.from_config(t5), hidden_size=16)


def test_spread() -> None:
    assert students.spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert students.spread(6, 3) == [0, 2, 5]
    assert students.spread(5, 5) == [0, 1, 2, 3, 4]
    assert students.spread(12, 1) == [0]
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"student_layers: expected 1 to 4, the teacher's, got {wrong}"):
            students.spread(4, wrong)


NARROWER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tinybert": ("bert", "", {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}),
    "of masked words": ("bert", "words", {"hidden_size": 24}),
    "inner width alone": ("roberta", "classes", {"intermediate_size": 20, "num_hidden_layers": 2}),
    "names of distilbert": ("distilbert", "words", {"hidden_size": 24, "hidden_dim": 20, "num_hidden_layers": 3}),
    "head size of xlnet": ("xlnet", "", {"hidden_size": 24}),
    "projection of embeddings": ("electra", "", {"hidden_size": 24}),
    "projection where was none": ("electra", "words", {"hidden_size": 16, "num_attention_heads": 2}),
    "shared layers": ("albert", "words", {"hidden_size": 24, "num_hidden_layers": 2}),
    "mpnet": ("mpnet", "words", {"hidden_size": 24, "num_hidden_layers": 2}),
    "local layers": ("modernbert", "words", {"hidden_size": 16, "num_hidden_layers": 2}),
    "head size follows": ("llama", "words", {"hidden_size": 16, "num_hidden_layers": 3}),
    "head size of its own": ("qwen3", "words", {"hidden_size": 24, "num_hidden_layers": 2}),
    "window": ("qwen2", "words", {"intermediate_size": 20, "num_hidden_layers": 3}),
    "other vocabulary": ("bert", "words", {"vocab_size": 64}),
    "shorter vocabulary, untied": ("qwen2", "words", {"vocab_size": 56}),
    "other labels": ("bert", "classes", {"num_labels": 5}),
}


@pytest.mark.parametrize("case", NARROWER)
def test_narrower(case: str, tmp_path: Path) -> None:
    name, head, changes = NARROWER[case]
    teacher = model_of(name, head, **{"embedding_size": 32} if "was none" in case else {})
    before = output(teacher)
    student, copied, fresh = students.narrower(teacher, **changes)
    assert all(getattr(student.config, key) == value for key, value in changes.items())
    state, theirs = student.state_dict(), teacher.state_dict()
    assert {*copied, *fresh} == set(state)
    assert bool(fresh) == ("vocabulary" not in case)
    layers = students.spread(LAYERS, changes.get("num_hidden_layers", LAYERS))
    hidden = "albert" if name == "albert" else LISTS.get(name, "encoder.layer")
    for key, mine in state.items():
        place, found, rest = key.partition(f"{hidden}.")
        number, _, inner = rest.partition(".")
        its = theirs.get(f"{place}{found}{layers[int(number)]}.{inner}" if found and number.isdigit() else key)
        if its is not None and key in copied:
            rows = slice(min(len(its), len(mine)))
            assert torch.equal(mine[rows], its[rows]), key
        else:
            assert its is None or its.shape != mine.shape, key
            assert mine.std() < 0.1  # of the class, not of this file, where it is 0.2
    assert tied(student) == tied(teacher)
    student.train()(**batch())[0].sum().backward()
    assert torch.equal(output(teacher), before)
    assert torch.equal(output(round_trip(student, tmp_path)), output(student))


def test_narrower_in_depth_alone() -> None:
    teacher = model_of("smollm3", "words")
    for arguments in ({"num_hidden_layers": 2}, {"layers": (0, 3)}, {"layers": (0, 3), "num_hidden_layers": 2}):
        student, _, fresh = students.narrower(teacher, **arguments)
        assert not fresh
        assert student.config.no_rope_layers == [1, 0]
        assert torch.equal(output(student), output(students.from_layers(teacher, (0, 3))))


def test_sizes_of_heads() -> None:
    follows = students.narrower(model_of("llama"), hidden_size=16).model.config
    assert (follows.head_dim, follows.num_key_value_heads) == (4, 2)
    assert students.narrower(model_of("qwen3"), hidden_size=24).model.config.head_dim == 16
    every = model_of("llama", num_key_value_heads=4)
    assert students.narrower(every, num_attention_heads=2).model.config.num_key_value_heads == 2
    assert students.narrower(every, num_key_value_heads=2).model.config.num_key_value_heads == 2


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("bert", {"hidden": 24}, r"expected names that BertConfig has, its sizes are .*hidden_size.*; got hidden$"),
        ("distilbert", {"intermediate_size": 24}, r"its sizes are .*hidden_dim.*; got intermediate_size"),
        ("bert", {"hidden_size": 30}, r"hidden_size: expected a multiple of the 4 heads .* got 30"),
        ("xlnet", {"hidden_size": 30}, r"hidden_size: expected a multiple of the 4 heads .* got 30"),
        ("llama", {"hidden_size": 20}, r"expected heads of even size for rotary embeddings, got 5"),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 3},
            r"expected a multiple of num_key_value_heads=3",
        ),
        ("bert", {"num_hidden_layers": 5}, r"student_layers: expected 1 to 4, the teacher's, got 5"),
        ("bert", {"num_hidden_layers": 2, "layers": [1]}, r"layers: expected 2, num_hidden_layers, got \[1\]"),
        ("bert", {"layers": [4]}, r"narrower: layers: expected numbers from 0 to 3, got \[4\]"),
        ("bert", {"hidden_size": "24"}, r"config_changes: .*hidden_size"),
        ("modernbert", {"layer_types": ["full_attention"]}, r"config_changes: .*"),
    ],
)
def test_narrower_refuses(name: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        students.narrower(model_of(name), **changes)


BERTS = {
    "BertModel": "DistilBertModel",
    "BertForMaskedLM": "DistilBertForMaskedLM",
    "BertForPreTraining": "DistilBertForMaskedLM",
    "BertForTokenClassification": "DistilBertForTokenClassification",
    "BertForQuestionAnswering": "DistilBertForQuestionAnswering",
}


def bert_of(kind: str) -> Any:
    """It adds nothing for token type 0."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(model_of("bert").config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.zeros_(model.base_model.embeddings.token_type_embeddings.weight)
    return model


@pytest.mark.parametrize(("kind", "expected"), BERTS.items())
def test_distilbert_computes_what_bert_did(kind: str, expected: str, tmp_path: Path) -> None:
    teacher = bert_of(kind)
    transform = {"vocab_transform": True} if "MaskedLM" in expected else {}
    for layers in (range(LAYERS), SOME):
        student = students.distilbert(teacher, layers, **transform)
        assert type(student).__name__ == expected
        torch.testing.assert_close(output(student), output(with_layers(teacher, tuple(layers))), rtol=1e-5, atol=1e-6)
    assert tied(student) == ("MaskedLM" in expected)
    assert torch.equal(output(round_trip(student, tmp_path)), output(student))


def test_distilbert() -> None:
    teacher = bert_of("BertForMaskedLM")
    student = students.distilbert(teacher)
    layers = student.distilbert.transformer.layer
    for mine, its in zip(layers, (0, 3), strict=True):
        assert torch.equal(mine.ffn.lin1.weight, teacher.bert.encoder.layer[its].intermediate.dense.weight)
    assert student.vocab_transform.weight.std() < 0.1  # new
    assert torch.equal(student.vocab_projector.bias, teacher.cls.predictions.bias)
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["distilbert.embeddings.position_embeddings.weight"]
    free = students.distilbert(teacher, freeze_positions=False, dropout=0.0)
    assert all(p.requires_grad for p in free.parameters())
    assert {m.p for m in free.modules() if isinstance(m, nn.Dropout)} == {free.config.qa_dropout} == {0}
    nn.init.zeros_(free.distilbert.embeddings.word_embeddings.weight)
    assert teacher.get_input_embeddings().weight.any()


def test_distilbert_of_a_classifier() -> None:
    teacher = model_of("bert", "classes", num_labels=5, classifier_dropout=0.3)
    teacher.set_attn_implementation("eager")
    student = students.distilbert(teacher)
    assert student.classifier.out_features == 5
    assert student.config.id2label == teacher.config.id2label
    assert (student.config.seq_classif_dropout, student.config._attn_implementation) == (0.3, "eager")
    assert torch.equal(student.distilbert.embeddings.word_embeddings.weight, teacher.get_input_embeddings().weight)


def test_sizes_of_distilbert() -> None:
    with torch.device("meta"):
        teacher = transformers.BertForMaskedLM(transformers.BertConfig())
    student = students.distilbert(teacher)
    assert sum(p.numel() for p in student.base_model.parameters()) == 66_362_880
    assert sum(p.numel() for p in student.parameters()) == 66_985_530  # the released checkpoint's
    half = students.from_layers(teacher, students.spread(12, 6))
    assert sum(p.numel() for p in half.base_model.parameters()) == 66_362_880 + 2 * 768  # and the token types


def test_distilbert_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected one of BertModel, .*, got RobertaModel; from_layers makes"):
        students.distilbert(model_of("roberta"))
    with pytest.raises(ValueError, match="vocab_transform: expected a masked language model, got BertModel"):
        students.distilbert(model_of("bert"), vocab_transform=True)
    with pytest.raises(ValueError, match=r"distilbert: layers: expected numbers from 0 to 3, got \[4\]"):
        students.distilbert(model_of("bert"), [4])


@pytest.mark.cuda
def test_students_on_a_gpu() -> None:
    teacher = model_of("llama", "words").cuda().bfloat16()
    for student in (students.from_layers(teacher, SOME), students.narrower(teacher, hidden_size=16).model):
        assert {(x.device.type, x.dtype) for x in student.state_dict().values()} == {("cuda", torch.float32)}
