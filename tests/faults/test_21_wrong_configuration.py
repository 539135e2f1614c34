"""Fault 21: an unknown key, a wrong type, a number that is text or not finite, a negative temperature, top_k > V, a layer that is not
there, a tied head with a pruned vocabulary.

One message each that names the key, before any download. A tied head is no mistake: the student keeps both the tie and the vocabulary.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.cli.main import main
from fastkd.models.load import load_language_model
from fastkd.train import run as driver
from fastkd.train import run_models
from fastkd.train.config import read_config
from fastkd.train.loop import StageTrainer
from fastkd.train.schema import load_yaml, to_yaml
from tests import runs
from tests.faults.disturbed import config

REMOTE = """
method: {method}
output_dir: {folder}/run
teacher_model_name_or_path: some-organisation/some-teacher
text: {{path: some-organisation/some-corpus}}
dataset: {{task: glue/rte}}
student: {{num_hidden_layers: 2}}
max_steps: 3
"""


def reached(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a model, or the network, was reached")


@pytest.fixture
def no_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", reached)
    for module, name in ((driver, "load_tokenizer"), (run_models, "load_config")):
        monkeypatch.setattr(module, name, reached)
    no_weights(monkeypatch)


def no_weights(patch: pytest.MonkeyPatch) -> None:
    for name in ("load_frozen", "load_language_model", "load_task_model"):
        patch.setattr(run_models, name, reached)
    patch.setattr(StageTrainer, "__init__", reached)


@pytest.mark.usefixtures("no_fetching")
@pytest.mark.parametrize(
    ("method", "line", "said"),
    [
        ("kd", "learning_rat: 0.1", "learning_rat is not a known key; did you mean learning_rate?"),
        (
            "kd",
            "stages: {distill: {max_step: 1}}",
            "stages.distill.max_step is not a known key; did you mean stages.distill.max_steps?",
        ),
        ("kd", "text: {path: a, colum: b}", "text.colum is not a known key"),
        ("kd", "options: {temprature: 2.0}", "options.temprature is not a known key; did you mean options.temperature?"),
        ("kd", "max_steps: many", "max_steps is the text 'many'; it must be int: write a whole number"),
        ("kd", "max_steps: 2.5", "max_steps is 2.5; it must be int"),
        ("kd", "bf16: 1", "bf16 is 1; it must be bool: write true or false"),
        ("kd", 'learning_rate: "2e-5"', "learning_rate is the text '2e-5'; it must be float: write a number"),
        ("kd", "learning_rate: .nan", "learning_rate is nan; it must be a finite number"),
        ("kd", "learning_rate: 1e999", "learning_rate is inf; it must be a finite number"),
        ("kd", "max_steps: 1:30", "max_steps is the text '1:30'; it must be int: write a whole number"),
        ("kd", "num_train_epochs: 1e308", "num_train_epochs is 1e+308; it must be at most 2147483648."),
        ("kd", 'output_dir: ""', "output_dir is '', which names nothing; give a path or name, or leave the key out."),
        ("kd", "stages: pretrain", "stages must map a stage's name to its settings"),
        ("kd", "text: {path: a, on_bad_row: ignore}", "text.on_bad_row is the text 'ignore'; it must be error | skip"),
        ("kd", "options: {temperature: -1.0}", "options.temperature=-1.0 must be "),
        ("glmd", "options: {temperature: -1.0}", "options.temperature=-1.0 must be "),
        ("kd", "teacher: {kind: cache}", "teacher.path is not set, and kind is cache"),
    ],
)
def test_one_message_that_names_the_key_before_any_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, line: str, said: str
) -> None:
    path = tmp_path / "run.yaml"
    keys = [
        known for known in REMOTE.format(method=method, folder=tmp_path).splitlines() if not known.startswith(f"{line.split(':')[0]}:")
    ]
    path.write_text("\n".join([*keys, line]))
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err.strip()
    assert said in message and len(message.splitlines()) == 1
    with pytest.raises(ValueError):  # noqa: PT011 (the message is looked at above)
        fastkd.distill(load_yaml(path))
    assert not (tmp_path / "run").exists()


def with_layers(folder: Path, method: str, **more: Any) -> dict[str, Any]:
    stages = {"distill": {}} if method == "ted" else {"ild": {}}
    return config(method, folder, **{"stages": stages, "options": {}, **more})


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        (
            "ted",
            {"options": {"teacher_filter_interval": 5}},
            r"teacher_filter_interval=5: the model has 4 layers; give a number from 1 to 4",
        ),
        ("ted", {"student_layers": [1, 9]}, r"layers=\[9\]: the model has layers 1 to 4"),
        ("crild", {"student_layers": "first:5"}, r"layers='first:5': use .* N from 1 to 4"),
        ("crild", {"student_layers": [0]}, r"layers=\[0\]: the model has layers 1 to 4"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_before_any_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changes: dict[str, Any], said: str
) -> None:
    no_weights(monkeypatch)
    stages = {"stages": {name: {} for name in ("teacher_filters", "student_filters", "distill")}} if method == "ted" else {}
    with pytest.raises(ValueError, match=said):
        fastkd.distill(with_layers(tmp_path, method, **{**stages, **changes}))


@pytest.mark.parametrize("k", [301, 600])
def test_more_of_the_largest_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], k: int) -> None:
    settings = runs.settings(
        tmp_path,
        method="glmd",
        teacher_model_name_or_path=runs.bert_teacher(tmp_path),
        text=runs.write_text(tmp_path),
        vocabulary={"keep": 300, "multiple_of": 1},
        stages={"pretrain": {}},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(read_config(settings)))
    command = ["cache", str(tmp_path / "run.yaml"), "--stage", "pretrain", "--output", str(tmp_path / "cache"), "--kind", "topk"]
    assert main([*command, "--k", str(k)]) == 2
    assert f"k is {k}; a top-k cache holds from 1 to all 300 of the compared tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("hidden_size: 33.0", "student.hidden_size cannot be 33.0"),
        ("hidden_size: big", "student.hidden_size cannot be 'big'"),
        ("hidden_size: -8", "student.hidden_size is -8; it must be at least 1"),
        ("hidden_size: 33", "student.hidden_size=33 makes no bert model"),
        ("hidden_act: foo", "student.hidden_act is 'foo', which is no activation that transformers knows"),
        ("num_attention_heads: 0", "student.num_attention_heads is 0; it must be at least 1"),
        ("num_hidden_layers: 0", "student.num_hidden_layers is 0; it must be at least 1"),
        ("num_hidden_layers: -1", "student.num_hidden_layers is -1; it must be at least 1"),
        ("dtype: bfloat16", "student.dtype has no effect"),
        ("architectures: [BertModel]", "student.architectures has no effect"),
    ],
)
@pytest.mark.parametrize("method", ["kd", "finetune"])
def test_a_student_that_cannot_be_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, setting: str, said: str
) -> None:
    data = {"text": runs.write_text(tmp_path)} if method == "kd" else {"dataset": runs.write_dataset(tmp_path)}
    settings = runs.settings(tmp_path, method=method, teacher_model_name_or_path=runs.bert_teacher(tmp_path), **data)
    text = to_yaml(read_config(settings)).replace("num_hidden_layers: 1", setting)
    (tmp_path / "run.yaml").write_text(text)
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    message = capsys.readouterr().err
    assert f"fastkd train: {said}" in message and "Traceback" not in message
    assert not list((tmp_path / "run").rglob("log.jsonl")) and not runs.trained(tmp_path / "run")


def test_a_tied_head_and_a_pruned_vocabulary_go_together(tmp_path: Path) -> None:
    settings = runs.settings(
        tmp_path,
        method="kd",
        teacher_model_name_or_path=runs.llama_teacher(tmp_path),  # tied
        text=runs.write_text(tmp_path),
        vocabulary={"keep": 0.5, "multiple_of": 8},
        max_steps=2,
    )
    student = fastkd.distill(settings)["distill"]["student_dir"]
    assert json.loads((Path(student) / "config.json").read_text())["tie_word_embeddings"] is True
    assert not [name for name in runs.weights(student) if "lm_head" in name]
    model = load_language_model(student)
    assert model.head.weight is model.model.get_input_embeddings().weight
    assert model.vocab_map is not None and len(model.head.weight) == model.vocab_map.num_kept < 700
