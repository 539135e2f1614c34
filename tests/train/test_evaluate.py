"""Scores of finished models against what plain transformers and plain formulas give for the same rows."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastkd
from fastkd.cli.main import main
from fastkd.methods.comparison import by_position
from fastkd.models.language_model import LanguageModel
from fastkd.models.load import load_language_model, load_tokenizer
from fastkd.tasks.glue import load_task
from fastkd.tasks.text import IGNORE_INDEX, Masking, collate_text
from fastkd.train import curves
from fastkd.train.config import DatasetArguments, TextData
from fastkd.train.evaluate import evaluate_on_task, evaluate_on_text, write_evaluation
from fastkd.train.log import read_log
from tests import runs, tiny

LENGTH = 32


def plain_calibration_error(probability: torch.Tensor, labels: torch.Tensor) -> float:
    """Guo et al.'s formula, bin by bin."""
    confidence, top = probability.double().max(-1)
    right, total = (top == labels).double(), 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            total += inside.sum().item() * abs(right[inside].mean().item() - confidence[inside].mean().item())
    return total / len(labels)


def plain_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each row of logits."""
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def scores_of(evaluation: dict[str, Any], name: str = "student") -> dict[str, float]:
    return evaluation["models"][name]["scores"]


# ---- tasks


def arguments(folder: Path, task: str, **more: Any) -> DatasetArguments:
    return DatasetArguments(**{**runs.write_dataset(folder, task), **more})


def task_model(folder: Path, name: str, head: str, **settings: Any) -> str:
    tokenizer = tiny.wordpiece()
    return tiny.save(folder / name, tiny.transformer("bert", head, vocab_size=len(tokenizer), **settings), tokenizer)


@torch.no_grad()
def plain_logits(folder: str, arguments: DatasetArguments) -> torch.Tensor:
    """Row by row, without padding: classes, or scores of choices."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), load_tokenizer(folder)
    rows = []
    for example in load_task(arguments.task, arguments.path).split("validation"):
        pairs = [(example.text, choice) for choice in example.choices] or [(example.text, example.second_text)]
        encoded = [tokenizer(*pair, truncation="longest_first", max_length=arguments.max_length, return_tensors="pt") for pair in pairs]
        rows.append(torch.cat([model(**each).logits[0] for each in encoded]))
    return torch.stack(rows)


@pytest.mark.parametrize(("task", "outputs"), [("glue/rte", 2), ("super_glue/copa", 1)])
def test_classes_and_choices(tmp_path, task, outputs):
    models = {
        name: task_model(tmp_path, name, "SequenceClassification", num_labels=outputs, seed=seed)
        for seed, name in enumerate(("teacher", "student"))
    }
    given = arguments(tmp_path, task)
    evaluation = evaluate_on_task(models, given, batch_size=3, use_cpu=True)
    labels = torch.tensor([example.label for example in load_task(task, given.path).split("validation")])
    logits = {name: plain_logits(folder, given) for name, folder in models.items()}
    for name, rows in logits.items():
        scores = scores_of(evaluation, name)
        assert scores["accuracy"] == (rows.argmax(-1) == labels).double().mean().item()
        assert scores["calibration_error"] == pytest.approx(plain_calibration_error(rows.softmax(-1), labels), abs=1e-6)
    student, teacher = scores_of(evaluation), logits["teacher"]
    assert set(scores_of(evaluation, "teacher")) == {"accuracy", "calibration_error"}
    assert student["teacher_agreement"] == (logits["student"].argmax(-1) == teacher.argmax(-1)).double().mean().item()
    assert student["teacher_divergence"] == pytest.approx(plain_divergence(teacher, logits["student"]).mean().item(), rel=1e-4)
    assert student["teacher_divergence"] > 1e-3
    assert evaluation["data"]["split"] == "validation" and evaluation["data"]["examples"] == 8


def test_values_and_answers(tmp_path):
    """Values have no likeliest class; of answers the texts are compared, with each model's own tokens."""
    value = task_model(tmp_path, "value", "SequenceClassification", num_labels=1)
    evaluation = evaluate_on_task({"teacher": value, "student": value}, arguments(tmp_path, "glue/stsb"), use_cpu=True)
    assert set(scores_of(evaluation)) == {"spearman", "pearson"}
    answering = [task_model(tmp_path, f"answers-{seed}", "QuestionAnswering", seed=seed) for seed in (0, 1)]
    asked = arguments(tmp_path, "squad_v2")
    models = {"teacher": answering[0], "student": answering[1], "same": answering[0]}
    evaluation = evaluate_on_task(models, asked, batch_size=4, use_cpu=True)
    assert set(scores_of(evaluation, "same")) == {"token_f1", "exact_match", "teacher_agreement"}
    assert scores_of(evaluation, "same")["teacher_agreement"] == 1.0 > scores_of(evaluation)["teacher_agreement"]
    own = {key: scores_of(evaluation, "same")[key] for key in ("token_f1", "exact_match")}
    assert own == scores_of(evaluation, "teacher")


def test_splits_and_limits(tmp_path):
    model = task_model(tmp_path, "model", "SequenceClassification", num_labels=2)
    given = arguments(tmp_path, "glue/rte", eval_split="train", max_eval_rows=5)
    evaluation = evaluate_on_task({"student": model}, given, use_cpu=True)
    assert evaluation["data"]["split"] == "train" and evaluation["data"]["examples"] == 5
    assert scores_of(evaluation)["accuracy"] in {n / 5 for n in range(6)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head": "MaskedLM"}, "has no trained head for classification"),
        ({"num_labels": 3}, "has 3 outputs and the task 2"),
        ({"eval_split": "test"}, "has no file of split 'test'"),
        ({"task": "pairs"}, "has no labels to judge by; labelled are none"),
        ({"max_position_embeddings": 16}, "The longest row takes"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_what_a_task_refuses(tmp_path, change, sentence):
    given = arguments(tmp_path, "glue/rte", eval_split=change.get("eval_split"))
    if "task" in change:
        given = DatasetArguments(task=change["task"], path=str(Path(str(given.path)) / "train.jsonl"), text_columns=("sentence1",))
    settings = {key: change[key] for key in ("num_labels", "max_position_embeddings") if key in change}
    model = task_model(tmp_path, "model", change.get("head", "SequenceClassification"), **{"num_labels": 2, **settings})
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        evaluate_on_task({"student": model}, given, use_cpu=True)


# ---- text


def dev_text(folder: Path) -> TextData:
    return TextData(path=runs.write_text(folder)["eval_path"], max_length=LENGTH, documents="line")


@torch.no_grad()
def next_token_logits(folder: str, text: TextData) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Logits over the model's own rows, labels as the tokenizer's ids, and positions: packed rows, one at a time."""
    model, tokenizer = load_language_model(folder).eval(), load_tokenizer(folder)
    lines = Path(text.path).read_text().splitlines()
    stream = [token for line in lines for token in [*tokenizer(line, add_special_tokens=False).input_ids, tokenizer.eos_token_id]]
    rows = [torch.tensor([stream[i : i + LENGTH]]) for i in range(0, len(stream) - 1, LENGTH)]
    logits = torch.cat([model(row)[0, :-1] for row in rows])
    return logits, torch.cat([row[0, 1:] for row in rows]), np.concatenate([np.arange(1, row.shape[1]) for row in rows])


def text_bytes(folder: str, ids: torch.Tensor) -> int:
    """The bytes of byte-level tokens, each a character for a byte; what ends a document is no text."""
    tokenizer = load_tokenizer(folder)
    return sum(len(word) for word in tokenizer.convert_ids_to_tokens(ids.tolist()) if word != tokenizer.eos_token)


def test_decoders_over_all_ids(tmp_path):
    models = {"teacher": runs.llama_teacher(tmp_path, seed=1), "student": runs.llama_teacher(tmp_path, seed=2, num_hidden_layers=1)}
    text = dev_text(tmp_path)
    evaluation = evaluate_on_text(models, text, batch_size=4, use_cpu=True)
    assert evaluation["data"]["split"] is None and evaluation["data"]["events"] == "all 700 ids"
    all_logits = {}
    for name, folder in models.items():
        all_logits[name], labels, positions = next_token_logits(folder, text)
        scores = scores_of(evaluation, name)
        expected = math.exp(torch.nn.functional.cross_entropy(all_logits[name], labels))
        assert scores["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert scores["bits_per_byte"] == pytest.approx(math.log2(expected) * len(labels) / text_bytes(folder, labels), rel=1e-4)
        error = plain_calibration_error(all_logits[name].softmax(-1), labels)
        assert scores["calibration_error"] == pytest.approx(error, abs=1e-5)
    assert evaluation["data"]["predictions"] == len(labels) and evaluation["data"]["bytes"] == text_bytes(models["teacher"], labels)
    assert "slot" not in evaluation["bits_per_byte"]
    divergence = plain_divergence(all_logits["teacher"], all_logits["student"]).numpy()
    scores, parts = scores_of(evaluation), evaluation["models"]["student"]["divergence_by_position"]
    assert scores["teacher_divergence"] == pytest.approx(divergence.mean(), rel=1e-4)
    same = all_logits["teacher"].argmax(-1) == all_logits["student"].argmax(-1)
    assert scores["teacher_agreement"] == pytest.approx(same.double().mean().item(), abs=1e-3)
    assert [part["positions"] for part in parts] == [[1, 8], [9, 16], [17, 31]]
    for part in parts:
        inside = (positions >= part["positions"][0]) & (positions <= part["positions"][1])
        assert part["predictions"] == inside.sum()
        assert part["divergence"] == pytest.approx(divergence[inside].mean(), rel=1e-4)


def test_a_mapped_student_beside_models_over_all_ids(tmp_path):
    """All are judged on the student's slots; the distance is over the kept ids."""
    teacher = runs.llama_teacher(tmp_path)
    config = runs.settings(
        tmp_path,
        teacher_model_name_or_path=teacher,
        text=runs.write_text(tmp_path),
        vocabulary={"keep": 0.5, "multiple_of": 8},
    )
    student = fastkd.distill(config)["pretrain"]["student_dir"]
    text = dev_text(tmp_path)
    evaluation = evaluate_on_text({"teacher": teacher, "student": student, "again": student}, text, batch_size=5, use_cpu=True)
    vocab_map = load_language_model(student).vocab_map
    assert vocab_map is not None
    student_logits, labels, _ = next_token_logits(student, text)
    teacher_logits, *_ = next_token_logits(teacher, text)
    slots = vocab_map.id_to_slot[labels]
    assert (~vocab_map.is_kept[labels]).any()
    folded = teacher_logits.double().softmax(-1) @ torch.nn.functional.one_hot(vocab_map.id_to_slot).double()
    for name, probability in (("teacher", folded), ("student", student_logits.double().softmax(-1))):
        scores = scores_of(evaluation, name)
        expected = math.exp(-probability.gather(1, slots[:, None]).log().mean())
        assert scores["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert scores["bits_per_byte"] == pytest.approx(math.log2(expected) * len(labels) / text_bytes(teacher, labels), rel=1e-4)
        assert scores["calibration_error"] == pytest.approx(plain_calibration_error(probability, slots), abs=1e-5)
    divergence = plain_divergence(teacher_logits[:, vocab_map.kept_ids], student_logits).mean().item()
    assert scores_of(evaluation)["teacher_divergence"] == pytest.approx(divergence, rel=1e-4)
    assert scores_of(evaluation) == scores_of(evaluation, "again")
    assert evaluation["models"]["student"]["vocabulary"] == vocab_map.num_kept
    assert evaluation["data"]["events"] == f"{vocab_map.num_kept} slots of 700 ids"
    assert "naming slots and not tokens" in evaluation["bits_per_byte"]


def test_bits_per_byte_of_an_exported_student_are_the_texts_own(tmp_path):
    """By another tokenizer, which cuts the same bytes into other tokens; those of a row's first token are predicted by nobody."""
    student = pruned(tmp_path, runs.llama_teacher(tmp_path), 0.5)
    assert main(["export", student, "--output_dir", str(tmp_path / "exported")]) == 0
    text, exported = dev_text(tmp_path), str(tmp_path / "exported")
    mapped, own = (evaluate_on_text({"student": folder}, text, use_cpu=True) for folder in (student, exported))
    logits, labels, _ = next_token_logits(exported, text)
    bits = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item() / math.log(2)
    assert scores_of(own)["bits_per_byte"] == pytest.approx(bits / text_bytes(exported, labels), rel=1e-4)
    assert own["data"]["events"] == "all 352 ids" and mapped["data"]["events"] == "352 slots of 700 ids"
    assert own["data"]["predictions"] > mapped["data"]["predictions"]
    whole = sum(len(line) for line in Path(text.path).read_text().splitlines())
    for evaluation in (mapped, own):
        assert 0.9 * whole < evaluation["data"]["bytes"] < whole


def test_bits_per_byte_of_masked_tokens_are_of_their_bytes(tmp_path):
    """With the same tokens masked as in a batch that is made by hand."""
    folder, text = runs.bert_teacher(tmp_path), dev_text(tmp_path)
    tokenizer = load_tokenizer(folder)
    lines = [line[:24].strip() for line in Path(text.path).read_text().splitlines()]  # each fits a row
    Path(text.path).write_text("\n".join(lines))
    evaluation = evaluate_on_text({"student": folder}, text, use_cpu=True)
    encoded = [tokenizer(line, return_offsets_mapping=True) for line in lines]
    generator = torch.Generator().manual_seed(0)
    rows = [np.array(each.input_ids) for each in encoded]
    batch = collate_text(rows, pad_id=0, masking=Masking.of(tokenizer, 0.15), generator=generator)
    ends = [np.maximum.accumulate([end for _, end in each.offset_mapping]) for each in encoded]
    covered = sum(ends[row][i] - (ends[row][i - 1] if i > 1 else 0) for row, i in (batch.labels != IGNORE_INDEX).nonzero().tolist())
    assert evaluation["data"]["bytes"] == covered > 0
    bits = math.log2(scores_of(evaluation)["perplexity"]) * evaluation["data"]["predictions"]
    assert scores_of(evaluation)["bits_per_byte"] == pytest.approx(bits / covered, rel=1e-6)


@pytest.mark.parametrize(("make", "method"), [(runs.llama_teacher, "kd"), (runs.bert_teacher, "glmd")])
def test_perplexity_is_that_of_the_run(tmp_path, make, method):
    """Plain distillation's slots stand for all of their ids, and an encoder has the same tokens masked."""
    config = runs.settings(
        tmp_path,
        method=method,
        teacher_model_name_or_path=make(tmp_path),
        text=runs.write_text(tmp_path),
        vocabulary={"keep": 0.5, "multiple_of": 8},
    )
    result = next(iter(fastkd.distill(config).values()))
    evaluation = evaluate_on_text({"student": result["student_dir"]}, dev_text(tmp_path), batch_size=16, use_cpu=True)
    assert scores_of(evaluation)["perplexity"] == pytest.approx(result["scores"]["perplexity"], rel=1e-6)
    copied = shutil.copytree(result["student_dir"], tmp_path / "copied")
    again = evaluate_on_text({"student": str(copied)}, dev_text(tmp_path), batch_size=16, use_cpu=True)
    assert scores_of(again) == scores_of(evaluation)
    assert set(scores_of(evaluation)) == {"perplexity", "bits_per_byte", "calibration_error"}
    vocab_map = load_language_model(result["student_dir"]).vocab_map
    assert (
        vocab_map is not None
        and result["events"] == evaluation["data"]["events"] == f"{vocab_map.num_kept} slots of {vocab_map.vocab_size} ids"
    )
    log = read_log(Path(result["student_dir"]).parent / "log.jsonl")
    assert {line["eval_events"] for line in log if "eval_perplexity" in line} == {result["events"]}


def test_each_model_runs_once_a_batch(tmp_path, monkeypatch):
    runs_of: list[torch.nn.Module] = []
    forward = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, *given: runs_of.append(self) or forward(self, *given))
    models = {"teacher": runs.llama_teacher(tmp_path), "student": runs.llama_teacher(tmp_path)}
    runs.write_text(tmp_path)
    evaluation = evaluate_on_text(models, dev_text(tmp_path), batch_size=5, use_cpu=True)
    batches = math.ceil(evaluation["data"]["rows"] / 5)
    assert batches > 1 and [runs_of.count(model) for model in dict.fromkeys(runs_of)] == [batches, batches]


def refused_models(case: str, folder: Path) -> dict[str, str]:
    bert = runs.bert_teacher(folder)
    if case == "task head":
        return {"student": runs.bert_classifier(folder)}
    if case == "no head":
        return {"student": task_model(folder, "backbone", "")}
    if case == "tokenizers":
        return {"teacher": bert, "student": runs.llama_teacher(folder)}
    if case == "kinds":
        tokenizer = tiny.wordpiece()
        return {"teacher": bert, "student": tiny.save(folder / "decoder", tiny.llama(len(tokenizer)), tokenizer)}
    mapped = [pruned(folder, bert, keep) for keep in (0.5, 0.7)]
    if case == "maps":
        return {"teacher": bert, "student": mapped[0], "other": mapped[1]}
    tokenizer = tiny.wordpiece()
    return {"teacher": tiny.save(folder / "small", tiny.bert(200), tokenizer), "student": mapped[0]}


def pruned(folder: Path, teacher: str, keep: float) -> str:
    """A mapped student without training."""
    from fastkd.models.load import save_model
    from fastkd.models.prune import prune_model
    from fastkd.vocab.map import VocabMap

    model, tokenizer = load_language_model(teacher), load_tokenizer(teacher)
    counts = torch.arange(model.vocabulary, 0, -1)
    vocab_map = VocabMap.from_counts(counts, keep, range(5), 8).assign_stand_ins(model.head.weight.detach(), "dot")
    save_model(prune_model(model.model, vocab_map), tokenizer, folder / f"pruned-{keep}")
    return str(folder / f"pruned-{keep}")


def padded(folder: str, rows: int) -> str:
    """The same model with other padding rows."""
    model = load_language_model(folder).model
    model.resize_token_embeddings(rows, mean_resizing=False)
    return tiny.save(Path(f"{folder}-{rows}"), model, load_tokenizer(folder))


@pytest.mark.parametrize("make", [runs.bert_teacher, runs.llama_teacher])
def test_padding_rows_are_no_part_of_what_is_compared(tmp_path, make):
    """Beside a student whose map is of a teacher with padding, or without, models with other padding rows."""
    teacher = make(tmp_path)
    rows = load_language_model(teacher).vocabulary
    text = dev_text(tmp_path)
    for student in (pruned(tmp_path, teacher, 0.5), pruned(tmp_path, padded(teacher, rows + 8), 0.6)):
        models = {"teacher": teacher, "baseline": padded(teacher, rows + 4 + len(student) % 2), "student": student}
        evaluation = evaluate_on_text(models, text, use_cpu=True)
        assert scores_of(evaluation, "baseline")["teacher_divergence"] == pytest.approx(0, abs=1e-6)
        if student.endswith("0.5"):  # the map knows no padding
            for name, value in scores_of(evaluation, "teacher").items():
                assert scores_of(evaluation, "baseline")[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("task head", "was saved as BertForSequenceClassification, which has no trained head for words"),
        ("no head", "was saved as BertModel"),
        ("tokenizers", "The teacher and the student have different tokenizers"),
        ("kinds", "teacher, student are decoders and encoders"),
        ("maps", "The student and the other keep different parts of the vocabulary"),
        ("rows", r"The teacher has 200 vocabulary rows, and the student keeps the id \d+; give models with a row for every id"),
    ],
)
def test_what_text_refuses(tmp_path, case, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate_on_text(refused_models(case, tmp_path), dev_text(tmp_path), use_cpu=True)


# ---- what is written


@pytest.mark.parametrize("what", ["task", "text"])
def test_off_a_terminal_it_says_how_far_it_is(tmp_path, monkeypatch, caplog, what):
    monkeypatch.setattr("fastkd.train.log._SECONDS_A_LINE", 0.0)
    with caplog.at_level(logging.INFO, "fastkd"):
        if what == "task":
            models = {"student": runs.bert_classifier(tmp_path)}
            evaluate_on_task(models, arguments(tmp_path, "glue/rte"), batch_size=3, use_cpu=True)
            total, step, named = 8, 3, "eval student"
        else:
            evaluation = evaluate_on_text({"student": runs.llama_teacher(tmp_path)}, dev_text(tmp_path), batch_size=4, use_cpu=True)
            total, step, named = evaluation["data"]["rows"], 4, "eval"
    told = [message.rpartition(",")[0] for message in caplog.messages if message.endswith(" left")]
    assert told == [f"{named}: {min(done, total)}/{total} rows" for done in range(step, total + step, step)]


def test_results_and_plots_are_written(tmp_path, monkeypatch, caplog):
    models = {"teacher": runs.bert_teacher(tmp_path, seed=1), "student": runs.bert_teacher(tmp_path, seed=2)}
    evaluation = evaluate_on_text(models, dev_text(tmp_path), use_cpu=True)
    assert evaluation["data"]["predicted"] == "masked tokens" and evaluation["settings"]["mask_probability"] == 0.15
    with monkeypatch.context() as without, caplog.at_level(logging.WARNING):
        without.setitem(sys.modules, "matplotlib.figure", None)
        (tmp_path / "plain").mkdir()
        write_evaluation(evaluation, tmp_path / "plain")
    assert len([record for record in caplog.records if "matplotlib" in record.message]) == 1
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "plain" / "results.json").read_text()) == evaluation
    assert {"fastkd", "python", "torch", "transformers"} == set(evaluation["versions"])
    pytest.importorskip("matplotlib")
    (tmp_path / "drawn").mkdir()
    write_evaluation(evaluation, tmp_path / "drawn")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["divergence.png", "results.json", "scores.png"]


def test_a_model_has_one_colour_in_both_plots_and_scores_say_what_they_are_over(tmp_path, monkeypatch):
    models = {"teacher": runs.llama_teacher(tmp_path), "student": pruned(tmp_path, runs.llama_teacher(tmp_path), 0.5)}
    evaluation = evaluate_on_text({**models, "baseline": models["student"]}, dev_text(tmp_path), use_cpu=True)
    to_hex = pytest.importorskip("matplotlib.colors").to_hex
    figures: list[Any] = []
    monkeypatch.setattr(curves, "_write", lambda figure, path: figures.append(figure) or path)
    write_evaluation(evaluation, tmp_path)
    scores, divergence = figures
    names = [label.get_text() for label in scores.axes[0].get_yticklabels()]
    bars = {name: to_hex(bar.get_facecolor()) for name, bar in zip(names, scores.axes[0].patches, strict=True)}
    lines = {line.get_label(): to_hex(line.get_color()) for line in divergence.axes[0].lines}
    assert list(bars) == ["teacher", "student", "baseline"] and lines == {name: bars[name] for name in ("student", "baseline")}
    titles = [axes.get_title(loc="left") for axes in scores.axes]
    assert titles[:3] == [
        "perplexity\nover 352 slots of 700 ids",
        "bits per byte\nover 352 slots of 700 ids",
        "calibration error",
    ]
    assert divergence.axes[0].get_title(loc="left") == str(tmp_path / "dev.txt")


def test_bins_of_positions():
    values, positions = np.arange(1.0, 8.0), np.array([1, 8, 9, 16, 17, 32, 40])
    assert by_position(values, positions) == [
        {"positions": [1, 8], "predictions": 2, "divergence": 1.5},
        {"positions": [9, 16], "predictions": 2, "divergence": 3.5},
        {"positions": [17, 32], "predictions": 2, "divergence": 5.5},
        {"positions": [33, 40], "predictions": 1, "divergence": 7.0},
    ]
    assert [part["positions"] for part in by_position(values[:1], positions[6:])] == [[33, 40]]
