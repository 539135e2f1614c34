"""Model cards: front matter that the hub reads, facts that were recorded, and nothing else."""

from __future__ import annotations

import ast
import copy
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from fastkd.methods.registry import METHODS
from fastkd.models.language_model import LanguageModel
from fastkd.models.task_model import TaskModel
from fastkd.train.model_card import model_card, read_evaluation
from fastkd.vocab.map import VocabMap
from tests import multimodal, tiny

VERSIONS = {"fastkd": "0.1.0", "python": "3.12.1", "torch": "2.11.0", "transformers": "5.17.0"}
PROVENANCE = {
    "method": "crild",
    "seed": 7,
    "student": {"from": {"name": "org/small", "hub": True}, "layers": "first:2", "settings": {}, "vocabulary": None},
    "stages": [
        {
            "stage": "kd",
            "steps": 1200,
            "kept_step": 900,
            "scores": {"accuracy": 0.6875},
            "seconds": 61.25,
            "tokens": 1234567,
            "peak_memory_mb": 812.4,
            "trains": "student",
            "teacher": {"name": "org/large", "hub": True},
            "data": {"kind": "dataset", "task": "glue/rte", "max_length": 128, "few_sample": None, "text_columns": ["text"]},
            "options": {"preset": "paper_script", "temperature": 2.0},
            "training": {"rows_per_step": 32, "precision": "bf16", "learning_rate": 3e-5, "dropout": {}},
            "device": "NVIDIA H100",
            "processes": 4,
            "versions": VERSIONS,
        }
    ],
}
EVALUATION = {
    "data": {"task": "glue/rte", "split": "validation", "examples": 277},
    "settings": {"path": None},
    "versions": VERSIONS,
    "models": {
        "teacher": {"scores": {"accuracy": 0.75}, "parameters": 9000},
        "student": {"scores": {"accuracy": 0.7, "teacher_agreement": 0.9}, "parameters": 4000, "model_name_or_path": "runs/x/student"},
    },
}


def classifier() -> TaskModel:
    return TaskModel(tiny.transformer("bert"))


def test_the_front_matter_is_the_hubs():
    card = ModelCard(model_card(classifier(), "small", provenance=PROVENANCE, evaluations=[EVALUATION], onnx_difference=2e-7))
    data = card.data
    assert data.base_model == "org/small" and data.library_name == "transformers" and data.pipeline_tag == "text-classification"
    assert data.datasets == ["nyu-mll/glue"] and data.language == "en" and data.metrics == ["accuracy", "teacher_agreement"]
    assert data.tags == ["fastkd", "knowledge-distillation", "crild", "onnx"] and data.model_name == "small"
    found = [(r.dataset_type, r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert sorted(found, key=str) == [
        ("nyu-mll/glue", "rte", "validation", "accuracy", 0.7),
        ("nyu-mll/glue", "rte", "validation", "teacher_agreement", 0.9),
    ]


def text_card(student: LanguageModel, *, evaluated: bool = True, events: str = "all 600 ids") -> str:
    """The card of a student that was trained, and judged, on heldout.jsonl."""
    place = {"name": "heldout.jsonl", "hub": False}
    provenance = copy.deepcopy(PROVENANCE)
    provenance["method"] = "lm"
    provenance["stages"][0] |= {"scores": {"perplexity": 150.1}, "events": events}
    provenance["stages"][0]["data"] = {"kind": "text", "path": place, "eval_path": place}
    judged = {"predictions": 100, "bytes": 400, "predicted": "next tokens", "events": events}
    evaluation = {
        "data": {"text": "/home/me/heldout.jsonl", "split": None, **judged},
        "settings": {"name": None},
        "versions": VERSIONS,
        "models": {"student": {"scores": {"perplexity": 171.9, "bits_per_byte": 1.9}, "parameters": 4000}},
    }
    return model_card(student, "small", provenance=provenance, evaluations=[evaluation] * evaluated)


def test_a_metric_of_the_same_data_stands_once_in_the_front_matter():
    student = LanguageModel(tiny.bert(600))
    found = [(result.metric_type, result.metric_value) for result in ModelCard(text_card(student)).data.eval_results]
    assert found == [("perplexity", 171.9), ("bits_per_byte", 1.9)]
    (only,) = ModelCard(text_card(student, evaluated=False)).data.eval_results
    assert (only.metric_type, only.metric_value) == ("perplexity", 150.1)


def test_a_file_has_no_split_and_perplexities_say_what_they_are_over():
    text = text_card(LanguageModel(tiny.bert(600)))
    assert "on `heldout.jsonl`: 100 next tokens as all 600 ids (torch 2.11.0)." in text and "split train" not in text
    assert "| kd | student | `heldout.jsonl` | perplexity over all 600 ids | 150.1 |" in text
    assert "| model | perplexity | bits per byte | parameters |" in text


def test_the_facts_are_those_that_were_recorded():
    student = classifier()
    text = model_card(student, "small", provenance=PROVENANCE, evaluations=[EVALUATION])
    size = sum(parameter.numel() for parameter in student.parameters())
    for fact in (
        f"`BertForSequenceClassification` with {size:,} parameters (layers 4, width 32, vocabulary 200), trained by CR-ILD",
        "- Student: from [org/small](https://huggingface.co/org/small)\n",
        "- Teacher: [org/large](https://huggingface.co/org/large)\n",
        "- Data: `glue/rte`\n",
        "Findings of EACL 2023, [arXiv:2302.01530](https://arxiv.org/abs/2302.01530)",
        "| kd | student | 1200 | 900 | 1,234,567 | 61.2 | 812 | NVIDIA H100, 4 processes |",
        "| kd | student | `glue/rte` | accuracy | 0.6875 |",
        "`fastkd eval` 0.1.0 on `glue/rte`, split validation: 277 examples (torch 2.11.0).",
        "| teacher | 0.75 | - | 9,000 |\n| student | 0.7 | 0.9 | 4,000 |",
        "| kd | 0.1.0 | 3.12.1 | 2.11.0 | 5.17.0 |",
    ):
        assert fact in text, fact
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["seed"] == 7 and shown["student"] == {"from": "org/small", "layers": "first:2"}
    assert shown["stages"]["kd"]["options"] == {"preset": "paper_script", "temperature": 2.0}
    assert shown["stages"]["kd"]["data"] == {"kind": "dataset", "task": "glue/rte", "max_length": 128, "text_columns": ["text"]}
    assert "onnx" not in text and "kept tokens" not in text


def test_what_is_not_known_is_not_guessed():
    text = model_card(classifier(), "found", provenance=None)
    for fact in ("Student", "Teacher", "Data", "Method", "Paper"):
        assert f"- {fact}: not recorded\n" in f"{text}\n"
    assert "## Training\n\nNot recorded.\n" in text and "## Results\n\nNot recorded.\n" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None and data.language is None and data.eval_results is None
    assert data.tags == ["fastkd"] and data.pipeline_tag == "text-classification"


def test_folders_of_a_machine_are_neither_base_models_nor_datasets():
    provenance = copy.deepcopy(PROVENANCE)
    provenance["student"]["from"] = {"name": "mine", "hub": False}
    places = {"path": {"name": "train.txt", "hub": False}, "eval_path": {"name": "dev.txt", "hub": False}}
    provenance["stages"][0]["data"] = {"kind": "text", **places}
    text = model_card(classifier(), "small", provenance=provenance)
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None and data.language is None
    assert "- Student: from `mine` (a local folder)" in text and "- Data: `train.txt`" in text
    assert "| kd | student | `dev.txt` | accuracy" in text and data.eval_results[0].dataset_name == "dev.txt"
    provenance["student"]["from"] = None
    provenance["stages"][0]["data"]["path"] = {"name": "org/corpus", "hub": True}
    text = model_card(classifier(), "small", provenance=provenance)
    assert ModelCard(text).data.base_model == "org/large" and ModelCard(text).data.datasets == ["org/corpus"]
    assert "- Student: new weights" in text


@pytest.mark.parametrize("task", ["glue/sst2", None])
def test_rows_of_ones_own_are_no_benchmark_whatever_task_they_are_read_as(task):
    """The place of the rows is named, and neither a hub data set, nor a language, nor a figure of one."""
    provenance, evaluation = copy.deepcopy(PROVENANCE), copy.deepcopy(EVALUATION)
    read_as = {} if task is None else {"task": task}
    provenance["stages"][0]["data"] = {"kind": "dataset", **read_as, "path": {"name": "reviews", "hub": False}}
    evaluation["data"] = {**read_as, "place": {"name": "test.csv", "hub": False}, "split": None, "examples": 40}
    text = model_card(classifier(), "small", provenance=provenance, evaluations=[evaluation])
    data, suffix = ModelCard(text).data, "" if task is None else ", read as `glue/sst2`"
    assert data.datasets is None and data.language is None and "nyu-mll" not in text
    assert {(r.dataset_type, r.dataset_name, r.dataset_config) for r in data.eval_results} == {
        ("reviews", "reviews", None),
        ("test.csv", "test.csv", None),
    }
    assert f"- Data: `reviews`{suffix}\n" in text and f"| kd | student | `reviews`{suffix} | accuracy | 0.6875 |" in text
    assert f"`fastkd eval` 0.1.0 on `test.csv`{suffix}: 40 examples (torch 2.11.0)." in text


def test_the_hubs_own_rows_are_a_benchmark_by_either_name():
    provenance = copy.deepcopy(PROVENANCE)
    provenance["stages"][0]["data"]["path"] = {"name": "nyu-mll/glue", "hub": True}
    data = ModelCard(model_card(classifier(), "small", provenance=provenance)).data
    (found,) = data.eval_results
    assert (found.dataset_type, found.dataset_name, found.dataset_config) == ("nyu-mll/glue", "glue/rte", "rte")
    assert data.datasets == ["nyu-mll/glue"] and data.language == "en"


def test_classes_with_names_are_listed():
    names = dict(enumerate(("bad *", "good", "so so")))
    text = model_card(TaskModel(tiny.transformer("bert", id2label=names)), "small", provenance=None)
    assert r"- Classes: bad \*, good, so so" in text
    assert "- Classes" not in model_card(classifier(), "small", provenance=None)
    assert "- Classes" not in model_card(TaskModel(tiny.transformer("bert", num_labels=1), "regression"), "small", provenance=None)


def test_a_kept_vocabulary_is_told_with_its_limits():
    chosen = VocabMap.from_counts(torch.arange(600, 0, -1), 0.5, multiple_of=8).assign_stand_ins(torch.eye(600))
    student = LanguageModel(tiny.bert(chosen.num_kept), chosen)
    text = model_card(student, "small", provenance=PROVENANCE)
    assert "- Vocabulary: 304 tokens of the teacher's 600" in text and "with ids of its own" in text
    assert "measured with the teacher's tokenizer" in text and "from transformers import AutoModelForMaskedLM, AutoTokenizer" in text
    assert ModelCard(text).data.pipeline_tag == "fill-mask"
    results = text_card(student, events="304 slots of 600 ids").split("## Results\n\n")[1]
    assert results.startswith("No figures of this folder's own: all were measured with the teacher's tokenizer, before the export.")
    assert "perplexity over 304 slots of 600 ids" in results
    data = ModelCard(text_card(student)).data
    assert data.eval_results is None and data.metrics is None


@pytest.mark.parametrize(("head", "task"), [("CausalLM", "text-generation"), ("QuestionAnswering", "question-answering")])
def test_other_heads(head, task):
    model = tiny.transformer("llama" if head == "CausalLM" else "bert", head)
    student = LanguageModel(model) if head == "CausalLM" else TaskModel(model, "question_answering")
    text = model_card(student, "small", provenance=None)
    assert f"AutoModelFor{head}.from_pretrained" in text and ModelCard(text).data.pipeline_tag == task


def test_every_distillation_method_names_its_paper():
    for name, method in METHODS.items():
        assert method.title and (method.paper is None) == (name in ("lm", "finetune"))
        provenance = {**PROVENANCE, "method": name}
        tags = ModelCard(model_card(classifier(), "small", provenance=provenance)).data.tags
        assert ("knowledge-distillation" in tags) == (method.paper is not None) and name in tags


def test_only_results_of_this_student_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(EVALUATION))
    assert read_evaluation(file, "runs/x/student/") == EVALUATION
    assert read_evaluation(file, str(tmp_path / "runs/x/student")) == EVALUATION
    with pytest.raises(ValueError, match="judges runs/x/student on glue/rte, and the card is of runs/y/student"):
        read_evaluation(file, "runs/y/student")
    for content in ("{}", "[]", "half {", json.dumps({**EVALUATION, "models": {"teacher": {}}})):
        file.write_text(content)
        with pytest.raises(ValueError, match="is no file that `fastkd eval --output_dir` writes"):
            read_evaluation(file, "runs/x/student")


def test_results_that_are_not_there_are_refused_with_what_would_do(tmp_path):
    sentence = (
        "missing.json: No such file or directory; give the results.json that `fastkd eval runs/x/student --output_dir DIR` writes."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_evaluation(tmp_path / "missing.json", "runs/x/student")


HOSTILE = [
    "<script>alert(1)</script>",
    '"a": b',
    "'a': b",
    "x|y",
    "``",
    "a `b` c",
    "a\n```\n<b>",
    "line\nbreak: [x]",
    "---",
    "a\n---\nb",
    "[x](javascript:y)",
    "&lt;i&gt;",
    "*star* _under_ __score__",
    "# head #",
    "null",
    "1.0",
    "- item",
    "\u202egnp.exe",
    "tab\tbell\x07",
    "\udcff",
    "a\\|b",
    "$x$",
]


def hostile_card(name: str, *, hub: bool) -> str:
    """A card in which every name that is not fastkd's own is `name`."""
    provenance = copy.deepcopy(PROVENANCE)
    place = {"name": name, "hub": hub}
    provenance["student"] = {"from": place, "layers": name, "settings": {name: name}, "vocabulary": None}
    (stage,) = provenance["stages"]
    stage |= {"stage": name, "teacher": place, "device": name, "scores": {name: 0.5}, "trains": name, "kept_step": name}
    stage["data"] = {"kind": "dataset", "task": name, "path": place, "text_columns": [name]}
    stage["versions"] = dict.fromkeys(VERSIONS, name)
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["data"] |= {"task": name, "split": name, "examples": name}
    evaluation["versions"] = dict.fromkeys(VERSIONS, name)
    evaluation["models"] |= {name: {"scores": {name: 0.5}, "parameters": 1}}
    return model_card(classifier(), name, provenance=provenance, evaluations=[evaluation], onnx_difference=1e-7)


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "folder"])
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_never_markup(name, hub):
    card = hostile_card(name, hub=hub)
    card.encode()
    start, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    data = yaml.safe_load(front)
    assert start == "" and data["base_model" if hub else "pipeline_tag"] == (name if hub else "text-classification")
    (model,) = data["model-index"]
    assert model["name"] == name and ModelCard(card).data.model_name == name
    found = [(result["dataset"]["type"], result["dataset"]["name"]) for result in model["results"]]
    assert (name, name) in found

    prose, blocks, fence = [], [], ""
    for line in body.strip().split("\n"):
        marks = re.match(r" {0,3}(`{3,})", line)
        if fence:
            if marks and marks[1] == line.strip() and len(marks[1]) >= len(fence):
                fence = ""
            else:
                blocks[-1].append(line)
        elif marks:
            fence = marks[1]
            blocks.append([])
        else:
            prose.append(line)
    use, onnx, settings = ["\n".join(block) for block in blocks]
    assert name in [node.value for node in ast.walk(ast.parse(use)) if isinstance(node, ast.Constant)]
    assert f"{name}/model.onnx" in [node.value for node in ast.walk(ast.parse(onnx)) if isinstance(node, ast.Constant)]
    assert yaml.safe_load(settings)["student"]["settings"] == {name: name}

    assert [line for line in prose if line.startswith("#")][1:] == [
        f"## {title}" for title in ("Use", "Origin", "Training", "Results", "Limits", "Versions")
    ]
    columns = {line.replace("\\|", "").count("|") for line in prose if line.startswith("|")}
    assert columns == {9, 6} and not any(set(line) == {"-"} for line in prose)
    for line in prose:
        line = re.sub(r"\\[!-/:-@\[-`{-~]", "", line)  # an escaped character is a character
        assert line.count("`") % 2 == 0
        line = re.sub(r"`[^`]*`", "", line)
        line = re.sub(r"\[[^\[\]]*\]\(https://[\w./%:-]*\)", "", line)
        assert not set(line) & set("<>[]$"), line


def test_a_record_of_another_shape_is_told_and_left_out(caplog):
    provenance = {**PROVENANCE, "stages": [{"stage": "kd"}]}
    card = model_card(classifier(), "small", provenance=provenance, evaluations=[EVALUATION])
    assert "- Student: not recorded" in card and "on `glue/rte`, split validation" in card
    assert len(caplog.records) == 1 and "The card of 'small' does not tell what made the model" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"data": None},
        {"data": {"task": "glue/rte"}},
        {"settings": None},
        {"versions": {}},
        {"models": {"student": {"scores": {"accuracy": "high"}, "parameters": 1, "model_name_or_path": "runs/x/student"}}},
        {"models": {**EVALUATION["models"], "teacher": {}}},
    ],
)
def test_results_that_no_card_can_show_are_refused_by_name(tmp_path, change):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**EVALUATION, **change}))
    with pytest.raises(ValueError, match=r"results\.json' is no file that `fastkd eval --output_dir` writes"):
        read_evaluation(file, "runs/x/student")


def test_a_model_of_text_and_images_is_told_by_the_part_that_reads_text():
    text = model_card(LanguageModel(multimodal.multimodal("gemma3")), "small", provenance=None)
    assert "(layers 2, width 32, vocabulary 100)" in text
