"""What the models of a run are made of: whole ones alone, students whose settings make a model, and a row for every id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import fastkd
from fastkd.cli.main import main
from fastkd.models.load import load_frozen, load_tokenizer
from fastkd.tasks.token_rows import num_ids
from fastkd.train.cache import write_cache
from fastkd.train.config import read_config
from fastkd.train.loop import StageTrainer
from tests import caches, runs, tiny

CHAT = ("<|user|>", "<|bot|>")


@pytest.fixture
def no_step(monkeypatch):
    """Any training step fails the test."""
    monkeypatch.setattr(StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))


def kd(folder: Path, teacher: str, **more: Any) -> dict[str, Any]:
    return runs.settings(
        folder, **{"method": "kd", "teacher_model_name_or_path": teacher, "text": runs.write_text(folder), "max_steps": 2, **more}
    )


# ---- models that are not whole


def without_a_layer(folder: str) -> str:
    file = Path(folder) / "model.safetensors"
    kept = {name: tensor for name, tensor in safetensors.torch.load_file(file).items() if "layer.1." not in name}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})
    return folder


def headless(folder: Path) -> str:
    return tiny.save(folder / "headless", tiny.bert(600).bert, tiny.wordpiece())


@pytest.mark.parametrize("make", [lambda folder: without_a_layer(runs.bert_teacher(folder)), headless], ids=["no-layer", "no-head"])
@pytest.mark.parametrize("entrance", ["kd", "glmd", "student", "cache", "prune", "export"])
def test_every_entrance_refuses_a_model_that_would_be_partly_random(tmp_path, capsys, no_step, make, entrance):
    model, text = make(tmp_path), runs.write_text(tmp_path)
    said = "has no trained head for words|lacks the weights bert.encoder.layer.1|has no head for words"
    if entrance in ("kd", "glmd", "student"):
        config = kd(tmp_path, model, **{"glmd": {"method": "glmd"}}.get(entrance, {}))
        if entrance == "student":
            config |= {"teacher_model_name_or_path": runs.bert_teacher(tmp_path, seed=2), "model_name_or_path": model, "student": {}}
        with pytest.raises(ValueError, match=said):
            fastkd.distill(config)
        return
    made = tmp_path / "made"
    if entrance == "cache":
        config = caches.kd(tmp_path, lambda _: model, vocabulary=None)
        with pytest.raises(ValueError, match=said):
            write_cache(read_config(config), "distill", made)
        return
    command = ["export", model, "--output_dir", str(made)]
    if entrance == "prune":
        counts = str(tmp_path / "counts")
        assert main(["vocab", "count", "--model", model, "--data", text["path"], "--output_dir", counts]) == 0
        command = ["vocab", "prune", "--model", model, "--counts", counts, "--keep", "0.5", "--output_dir", str(made)]
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("fastkd ") and any(part in told for part in said.split("|")) and not made.exists()


def test_finetuning_starts_from_a_whole_backbone(tmp_path, no_step):
    config = runs.settings(
        tmp_path,
        method="finetune",
        model_name_or_path=without_a_layer(runs.bert_teacher(tmp_path)),
        student={},
        dataset=runs.write_dataset(tmp_path),
    )
    with pytest.raises(ValueError, match=r"lacks the weights bert\.encoder\.layer\.1"):
        fastkd.distill(config)


# ---- settings of a new student


@pytest.mark.parametrize(
    ("make", "student", "said"),
    [
        (runs.llama_teacher, {"hidden_size": 30}, "student.hidden_size=30 makes no llama model: .*multiple of the number of attention"),
        (runs.llama_teacher, {"num_attention_heads": 3}, "student.num_attention_heads=3 makes no llama model"),
        (runs.bert_teacher, {"num_attention_heads": 3}, "student.num_attention_heads=3 makes no bert model"),
        (runs.llama_teacher, {"eos_token_id": 700}, "student.eos_token_id=700 names no token: ids are from 0 to 699"),
    ],
)
def test_a_student_that_could_not_be_saved_is_refused_before_the_first_step(tmp_path, no_step, make, student, said):
    with pytest.raises(ValueError, match=said):
        fastkd.distill(kd(tmp_path, make(tmp_path), student=student))


def test_a_task_student_is_looked_at_before_the_teacher_is_trained(tmp_path, no_step):
    config = caches.ted_task(tmp_path)
    with pytest.raises(ValueError, match=r"student\.hidden_act is 'foo', which is no activation"):
        fastkd.distill({**config, "student": {"num_hidden_layers": 1, "hidden_act": "foo"}})


# ---- ids and rows


def chat_tokenizer(first: int) -> Any:
    """The byte-level tokenizer of 700 tokens, and two chat tokens whose ids begin at `first`."""
    written = json.loads(tiny.byte_level().backend_tokenizer.to_str())
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, token in enumerate(CHAT, first):
        written["added_tokens"].append({"id": number, "content": token, **settings})
        written["model"]["vocab"][token] = number
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), eos_token="<eos>", pad_token="<eos>")


def chat_model(folder: Path, name: str, rows: int, first: int, seed: int = 1, **settings: Any) -> str:
    return tiny.save(folder / name, tiny.llama(rows, seed, **settings), chat_tokenizer(first))


def chat_text(folder: Path) -> dict[str, Any]:
    (folder / "chat").mkdir(exist_ok=True)
    text = runs.write_text(folder / "chat")
    for key in ("path", "eval_path"):
        file = Path(text[key])
        file.write_text("".join(f"{CHAT[0]}{line}{CHAT[1]}\n" for line in file.read_text().splitlines()))
    return text


def test_chat_tokens_behind_a_gap_keep_their_rows(tmp_path):
    """Ids 0 to 699 and 740 to 741; teacher and student have 760 rows."""
    teacher, student = chat_model(tmp_path, "teacher", 760, 740), chat_model(tmp_path, "student", 760, 740, seed=2)
    assert (len(load_tokenizer(student)), num_ids(load_tokenizer(student))) == (702, 742)
    config = kd(tmp_path, teacher, model_name_or_path=student, student={}, text=chat_text(tmp_path), learning_rate=1e-9)
    made = load_frozen(fastkd.distill(config)["distill"]["student_dir"])
    ids = torch.tensor([[741, 5, 740]])
    assert made.vocabulary == 742
    torch.testing.assert_close(made(ids), load_frozen(student)(ids)[..., :742], rtol=1e-5, atol=1e-5)
    new = fastkd.distill(kd(tmp_path, teacher, text=chat_text(tmp_path), output_dir=str(tmp_path / "new")))
    assert load_frozen(new["distill"]["student_dir"]).vocabulary == 742


@pytest.mark.parametrize("method", ["kd", "glmd"])
def test_an_id_that_never_occurs_needs_no_row(tmp_path, method):
    """As gemma-3's tokenizer and CodeLlama's have one more than the models: 701 rows for the ids 0 to 701."""
    teacher = chat_model(tmp_path, "teacher", 701, 700)
    assert num_ids(load_tokenizer(teacher)) == 702
    result = next(iter(fastkd.distill(kd(tmp_path, teacher, method=method)).values()))
    assert load_frozen(result["student_dir"]).vocabulary == 701
    with pytest.raises(ValueError, match=r"has 701 vocabulary rows and its tokenizer 702 ids, and the id 701 occurs"):
        fastkd.distill(kd(tmp_path, teacher, method=method, text=chat_text(tmp_path), output_dir=str(tmp_path / "other")))


def test_a_cached_teacher_may_have_fewer_rows_than_its_tokenizer_has_ids(tmp_path):
    config = caches.kd(tmp_path, lambda folder: chat_model(folder, "teacher", 701, 700), vocabulary=None)
    caches.write(config, "distill")
    result = fastkd.distill(caches.cached(config))
    assert load_frozen(result["distill"]["student_dir"]).vocabulary == 701


def test_eval_reads_what_training_reads(tmp_path, capsys):
    model, text = chat_model(tmp_path, "model", 701, 700), runs.write_text(tmp_path)
    assert main(["eval", model, "--text", text["path"], "--max_length", "32", "--use_cpu"]) == 0
    capsys.readouterr()
    assert main(["eval", model, "--text", chat_text(tmp_path)["path"], "--max_length", "32", "--use_cpu"]) == 2
    assert "The student has 701 vocabulary rows and its tokenizer 702 ids, and the id 701 occurs" in capsys.readouterr().err


# ---- what a run leaves


def test_the_end_of_a_run_says_who_can_open_what_it_left(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    teacher = runs.llama_teacher(tmp_path)
    for name, vocabulary in (("whole", None), ("mapped", {"keep": 0.5, "multiple_of": 8})):
        config = kd(tmp_path, teacher, output_dir=str(tmp_path / name), vocabulary=vocabulary)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))  # which is YAML too
        capsys.readouterr()
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        told = capsys.readouterr().out.splitlines()
        folder = tmp_path / name / "distill" / "student"
        readme = (folder / "README.md").read_text()
        if vocabulary is None:
            assert f"{folder} is for fastkd and for plain transformers: AutoTokenizer and AutoModel open it." in told
            AutoModelForCausalLM.from_pretrained(folder)
            assert "AutoTokenizer and AutoModel of plain transformers open this folder" in readme
        else:
            export = f"fastkd export {folder} --output_dir {folder}-exported"
            assert (
                f"{folder} is for fastkd alone; `fastkd export` makes one for plain transformers of it." in told
                and f"  {export}" in told
            )
            with pytest.raises(ValueError, match="fastkd_mapped"):
                AutoModelForCausalLM.from_pretrained(folder)
            assert "fastkd export student --output_dir student-exported" in readme
            assert main(export.split()[1:]) == 0
            AutoModelForCausalLM.from_pretrained(f"{folder}-exported")
