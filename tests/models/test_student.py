"""Students on a kept vocabulary: built, pruned, saved, exported."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastkd.models.language_model import LanguageModel
from fastkd.models.load import check_same_tokenizer, load_language_model, save_model
from fastkd.models.prune import prune_model
from fastkd.models.student import build_student, export_student
from fastkd.models.task_model import TaskHead, build_task_model
from fastkd.vocab.map import VocabMap
from fastkd.vocab.tokenizer import protected_ids, prune_tokenizer, token_requirements
from tests import tiny


def vocab_map_for(tokenizer, rows: int | None = None, keep: float = 0.5, width: int = 16) -> VocabMap:
    """Counts of the first half of the lines; the second half is held out."""
    ids = [i for line in tiny.lines()[::2] for i in tokenizer(line, add_special_tokens=False)["input_ids"]]
    counts = torch.from_numpy(np.bincount(ids, minlength=len(tokenizer)))
    chosen = VocabMap.from_counts(
        counts, keep, protected_ids(tokenizer), multiple_of=8, requires=token_requirements(tokenizer), vocab_size=rows or len(tokenizer)
    )
    return chosen.assign_stand_ins(torch.randn(rows or len(tokenizer), width, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama])
def test_pruning_keeps_the_kept_rows_logits(make):
    """On kept ids the pruned model computes what the whole one does, column for column."""
    model = make()
    rows = model.get_output_embeddings().out_features
    chosen = VocabMap.from_counts(torch.arange(rows, 0, -1), keep=200, protected=[5, 300], multiple_of=1)
    vocab_map = chosen.assign_stand_ins(torch.eye(rows))
    pruned = prune_model(model, vocab_map).eval()
    ids = vocab_map.kept_ids[torch.randint(200, (2, 7), generator=torch.Generator().manual_seed(0))]
    assert torch.allclose(pruned(ids), model(ids).logits[..., vocab_map.kept_ids], atol=1e-5)
    assert pruned.model.config.vocab_size == 200
    assert pruned.model.get_input_embeddings().weight.data_ptr() == pruned.head.weight.data_ptr()


def test_a_built_student_depends_on_its_seed_alone_and_maps_special_ids():
    teacher = tiny.llama()
    vocab_map = vocab_map_for(tiny.byte_level())
    make = lambda seed: build_student(teacher.config, {"hidden_size": 16, "num_hidden_layers": 1}, vocab_map, seed=seed)  # noqa: E731
    state = torch.get_rng_state()
    first, second, other = make(1), make(1), make(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight) and not torch.equal(first.head.weight, other.head.weight)
    assert first.head.weight.shape == (vocab_map.num_kept, 16)
    assert first.model.config.eos_token_id == int(vocab_map.id_to_slot[0]) and first.model.config.bos_token_id is None
    assert 0.015 < make(1).model.model.layers[0].mlp.up_proj.weight.std() * 0.02 / 0.2 < 0.025


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_new_students_train_in_float32_whatever_their_teacher_was_saved_in(dtype):
    config = tiny.bert().config
    config.dtype = dtype
    assert build_student(config, {"num_hidden_layers": 1}, None, seed=0).model.dtype == torch.float32
    assert build_task_model(config, TaskHead("classification", 2), seed=0).model.dtype == torch.float32


def test_another_architecture_and_unknown_settings():
    teacher = tiny.llama()
    vocab_map = vocab_map_for(tiny.byte_level())
    student = build_student(teacher.config, {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, vocab_map, seed=0)
    assert type(student.model).__name__ == "GPT2LMHeadModel" and student.vocabulary == vocab_map.num_kept
    with pytest.raises(ValueError, match=r"student\.num_layer_count is not a setting of LlamaConfig"):
        build_student(teacher.config, {"num_layer_count": 1}, vocab_map, seed=0)
    with pytest.raises(ValueError, match="not an architecture"):
        build_student(teacher.config, {"model_type": "lama"}, vocab_map, seed=0)


@pytest.mark.parametrize(("make", "tokenizer"), [(tiny.bert, tiny.wordpiece), (tiny.llama, tiny.byte_level)], ids=["bert", "llama"])
def test_mapped_students_round_trip(make, tokenizer, tmp_path):
    vocab_map = vocab_map_for(tokenizer())
    student = LanguageModel(make(vocab_map.num_kept), vocab_map).eval()
    save_model(student, tokenizer(), tmp_path)
    loaded = load_language_model(str(tmp_path)).eval()
    ids = torch.randint(len(tokenizer()), (3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids), student(ids))
    assert loaded.vocab_map.fingerprint == vocab_map.fingerprint


READ_EXPORT = """
import sys, json, torch
sys.modules["fastkd"] = None
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
folder, kind, texts, out = sys.argv[1:]
lines = json.load(open(texts))
model = (AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM).from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
from safetensors.torch import save_file
result = {}
with torch.no_grad():
    for number, line in enumerate(lines):
        ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        result[f"ids{number}"], result[f"logits{number}"] = ids, model(ids).logits
save_file(result, out)
"""


@pytest.mark.parametrize(("make", "tokenizer"), [(tiny.bert, tiny.wordpiece), (tiny.llama, tiny.byte_level)], ids=["bert", "llama"])
def test_the_exported_student_opens_without_fastkd_and_agrees(make, tokenizer, tmp_path):
    """1 000 held-out lines in a process that cannot import fastkd: the mapped model gives the same logits on the same tokens, and a
    line whose tokens are all kept is the very same line to both tokenizers."""
    import json

    from safetensors.torch import load_file

    teacher_tokenizer = tokenizer()
    vocab_map = vocab_map_for(teacher_tokenizer)
    student = LanguageModel(make(vocab_map.num_kept), vocab_map).eval()
    export_student(student, teacher_tokenizer, tmp_path / "export")
    held_out = [line for line in tiny.lines()[1::2] for line in (line, line[: len(line) // 2]) if line][:1000]
    assert len(held_out) == 1000
    (tmp_path / "lines.json").write_text(json.dumps(held_out))
    names = [str(tmp_path / "export"), make.__name__, str(tmp_path / "lines.json"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", READ_EXPORT, *names], check=True)
    read = load_file(tmp_path / "out.safetensors")
    fully_kept = 0
    for number, line in enumerate(held_out):
        slots, logits = read[f"ids{number}"], read[f"logits{number}"]
        with torch.no_grad():
            torch.testing.assert_close(student(vocab_map.decode_ids(slots)), logits, rtol=1e-5, atol=1e-5)
        ids = torch.tensor(teacher_tokenizer(line, truncation=True, max_length=128)["input_ids"])
        if vocab_map.is_kept[ids].all():
            fully_kept += 1
            assert torch.equal(vocab_map.id_to_slot[ids], slots[0]), line
    assert 100 < fully_kept < 1000


def test_the_exported_tokenizer_knows_only_the_kept_tokens():
    tokenizer = tiny.byte_level()
    vocab_map = vocab_map_for(tokenizer)
    pruned = prune_tokenizer(tokenizer, vocab_map.kept_ids)
    assert len(pruned) == vocab_map.num_kept
    text = "def straße(x): return '日本' # round trip"
    assert pruned.decode(pruned(text)["input_ids"]) == text


def test_differing_tokenizers_are_refused_with_the_first_ids():
    with pytest.raises(ValueError, match=r"id \d+ is .* for the teacher and .* for the student"):
        check_same_tokenizer(tiny.byte_level(700), tiny.byte_level(600))
    check_same_tokenizer(tiny.byte_level(700), tiny.byte_level(700))


def test_folders_that_are_no_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no config"):
        load_language_model(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        load_language_model(str(tmp_path / "absent"))
