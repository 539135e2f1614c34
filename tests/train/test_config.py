"""Keys, flags and stages of a run, layer over layer, and the sentence for every value that cannot be."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastkd.tasks.cloze_task import ClozeTask
from fastkd.train.config import RunConfig, StageArguments, TaskData, TextData, Vocabulary, read_config
from fastkd.train.schema import ConfigError, field_docs, load_yaml, to_yaml

BASE: dict[str, Any] = {
    "method": "glmd",
    "output_dir": "run",
    "student": {"num_hidden_layers": 2},
    "teacher_model_name_or_path": "org/teacher",
    "text": {"path": "corpus.txt", "max_length": 64},
    "task": {"path": "task", "cloze": {"kind": "verbalizer", "template": "{text} {mask}", "label_words": ["if", "for"]}},
    "options": {"temperature": 2.0, "preset": "paper"},
    "max_steps": 100,
    "stages": {
        "pretrain": None,
        "task_words": {"max_steps": 20, "text": {"path": "other.txt"}, "options": {"temperature": 1.0}},
        "task_scores": {"teacher_model_name_or_path": "org/fine-tuned", "learning_rate": 1},
    },
}


def refusal(data: dict[str, Any], *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_config(data, flags)
    return str(error.value)


def of_stages(config: RunConfig, key: str) -> list[Any]:
    return [getattr(stage, key) for stage in config.stages.values()]


# ---- layers


def test_top_keys_reach_the_stages_that_do_not_set_their_own():
    config = read_config(BASE)
    assert of_stages(config, "max_steps") == [100, 20, 100]
    assert of_stages(config, "teacher_model_name_or_path") == ["org/teacher", "org/teacher", "org/fine-tuned"]
    assert of_stages(config, "learning_rate") == [5e-4, 5e-4, 1.0]
    assert of_stages(config, "options") == [
        {"temperature": 2.0, "preset": "paper"},
        {"temperature": 1.0, "preset": "paper"},
        {"temperature": 2.0, "preset": "paper"},
    ]
    assert [(text.path, text.max_length) for text in of_stages(config, "text")] == [
        ("corpus.txt", 64),
        ("other.txt", 64),
        ("corpus.txt", 64),
    ]
    assert BASE["stages"]["task_words"] == {"max_steps": 20, "text": {"path": "other.txt"}, "options": {"temperature": 1.0}}


def test_a_flag_overrides_every_stage_and_a_stages_flag_overrides_that():
    flags = ["--max_steps", "7", "--stages.task_words.max_steps", "3", "--options.temperature", "4", "--text.max_length=32"]
    config = read_config(BASE, flags)
    assert config.max_steps == 7
    assert of_stages(config, "max_steps") == [7, 3, 7]
    assert of_stages(config, "options") == [{"temperature": 4, "preset": "paper"}] * 3
    assert [text.max_length for text in of_stages(config, "text")] == [32, 32, 32]
    assert [text.path for text in of_stages(config, "text")] == ["corpus.txt", "other.txt", "corpus.txt"]


def test_a_flag_alone_makes_a_stage():
    data = {key: value for key, value in BASE.items() if key != "stages"}
    config = read_config(data, ["--stages.pretrain.max_steps", "3"])
    assert list(config.stages) == ["pretrain"]
    assert (config.stages["pretrain"].max_steps, config.stages["pretrain"].text) == (3, config.text)


def test_flags_keep_the_order_of_the_files_stages():
    assert list(read_config(BASE, ["--stages.task_scores.bf16"]).stages) == [*BASE["stages"]]


@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("defaults", [True, False])
def test_what_print_config_writes_is_the_same_run(tmp_path, comments, defaults):
    config = read_config(BASE, ["--vocabulary.keep", "0.25", "--learning_rate", "2e-5", "--eval_steps", "9"])
    (tmp_path / "run.yaml").write_text(to_yaml(config, comments=comments, defaults=defaults))
    assert read_config(load_yaml(tmp_path / "run.yaml")) == config


def test_every_key_has_its_help():
    for cls in (RunConfig, StageArguments, TextData, TaskData, Vocabulary, ClozeTask):
        assert set(field_docs(cls)) == {field.name for field in fields(cls)}


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"learning_rte": 1.0}, ["learning_rte is not a known key", "did you mean learning_rate?"]),
        ({"stages": {"pretrain": {"max_step": 1}}}, ["stages.pretrain.max_step is not a known key", "stages.pretrain.max_steps?"]),
        ({"text": {"path": "a", "max_lenght": 1}}, ["text.max_lenght is not a known key", "text.max_length?"]),
        ({"vocabulary": {"keeps": 0.5}}, ["vocabulary.keeps", "vocabulary.keep?"]),
        (
            {"max_length": 64},
            ["max_length is not a known key; did you mean text.max_length or task.cloze.max_length or dataset.max_length?"],
        ),
        ({"stages": {"pretrain": {"label_word": ["a"]}}}, ["did you mean stages.pretrain.task.cloze.label_words?"]),
        ({"method": "glmdd"}, ["method is the text 'glmdd'; it must be glmd | crild | ted | kd | lm | finetune"]),
        ({"learning_rate": "2e-5"}, ["learning_rate is the text '2e-5'; it must be float: write a number"]),
        ({"learning_rate": float("inf")}, ["learning_rate is inf; it must be a finite number"]),
        ({"adam_epsilon": 1e-320}, ["adam_epsilon is 1e-320; it must be at least 1.2e-38, or it is 0 in float32"]),
        ({"num_train_epochs": 1e308}, ["num_train_epochs is 1e+308; it must be at most 2147483648"]),
        ({"ddp_timeout": 10**12}, ["ddp_timeout is 1000000000000; it must be at most 2147483647 seconds"]),
        ({"seed": 2**64}, ["seed is a number beyond 64 bits"]),
        ({"student": {"a": [float("nan")]}}, ["student.a[0] is nan; it must be a finite number"]),
        ({"options": {"temperature": float("inf")}}, ["options.temperature is inf; it must be a finite number"]),
        ({"output_dir": ""}, ["output_dir is '', which names nothing"]),
        ({"output_dir": "~nobody-has-this-name/x"}, ["output_dir: '~nobody-has-this-name/x' begins with ~, and there is no such home"]),
        ({"cache_dir": " "}, ["cache_dir is ' ', which names nothing"]),
        ({"text": {"path": ""}}, ["text.path is '', which names nothing"]),
        ({"model_name_or_path": "a\0b"}, ["model_name_or_path is 'a\\x00b', which names nothing"]),
        ({"vocabulary": {"counts": ""}}, ["vocabulary.counts is ''"]),
        ({"learning_rate": 0}, ["learning_rate is 0.0; it must be a finite number > 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan"]),
        ({"max_steps": 0}, ["max_steps is 0; give a number >= 1, or -1"]),
        ({"max_steps": 1.5}, ["max_steps is 1.5; it must be int: write a whole number"]),
        ({"max_grad_norm": -1}, ["max_grad_norm is -1.0; it must be a finite number >= 0"]),
        ({"adam_beta2": 1.0}, ["adam_beta2 is 1.0; it must lie in [0, 1)"]),
        ({"lr_final_ratio": 2}, ["lr_final_ratio is 2.0; it is a share"]),
        (
            {"lr_scheduler_type": "constant"},
            ["lr_scheduler_type='constant' has no warm-up", "'constant_with_warmup', or warmup_steps 0"],
        ),
        ({"warmup_steps": 2.5}, ["warmup_steps=2.5 is neither"]),
        ({"bf16": True, "fp16": True}, ["bf16 and fp16 are both on; choose one"]),
        ({"bf16": "yes please"}, ["bf16 is the text 'yes please'; it must be bool: write true or false"]),
        ({"eval_steps": 0}, ["eval_steps is 0; it must be at least 1"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps is 0"]),
        ({"text": {"path": "a", "max_length": 1}}, ["text.max_length is 1; it must be at least 2"]),
        ({"task": {**BASE["task"], "max_rows": 0}}, ["task.max_rows is 0; it must be at least 1"]),
        ({"task": {"path": "a"}}, ["task.cloze is missing"]),
        ({"task": {"path": "a", "cloze": {"kind": "verbalizer", "template": "{text}"}}}, ["task.cloze", "{mask}"]),
        ({"vocabulary": {"keep": 1.0}}, ["vocabulary.keep is 1.0; give a share between 0 and 1"]),
        ({"vocabulary": {"keep": 0}}, ["vocabulary.keep is 0; give a share"]),
        ({"vocabulary": {"keep": -0.5}}, ["vocabulary.keep is -0.5"]),
        ({"vocabulary": {"keep": float("nan")}}, ["vocabulary.keep is nan"]),
        ({"vocabulary": {"keep": 0.5, "multiple_of": 0}}, ["vocabulary.multiple_of is 0; it must be at least 1"]),
        ({"student": {}}, ["neither model_name_or_path nor student is set", "student: {num_hidden_layers: 2}"]),
        ({"stages": ["pretrain"]}, ["stages must map a stage's name"]),
        ({"stages": {"pretrain": 3}}, ["stages must map a stage's name"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_bad_value_is_named_with_its_remedy(changes, sentences):
    message = refusal({**BASE, **changes})
    for sentence in sentences:
        assert sentence in message


def test_missing_keys_are_named():
    message = refusal({"student": {"num_hidden_layers": 2}})
    assert "method is missing (glmd | crild | ted | kd | lm | finetune)" in message and "output_dir is missing" in message


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_stps", "3"], "--max_stps is not a known flag; did you mean --max_steps?"),
        (["--max_steps"], "--max_steps lacks its value"),
        (["--max_steps", "many"], "max_steps is the text 'many'; it must be int"),
        (["--stages.pretrain.learning_rat", "1"], "did you mean --stages.pretrain.learning_rate?"),
        (["max_steps", "3"], "max_steps is not a flag; write --key VALUE"),
        (["--stages", "pretrain"], "stages must map a stage's name to its settings"),
        (["--stages.pretrain", "3"], "stages must map a stage's name to its settings"),
        (["--output_dir", ""], "output_dir is '', which names nothing"),
        (["--max_steps", "1:30"], "max_steps is the text '1:30'; it must be int"),
        (["--max_steps", "1_000"], "max_steps is the text '1_000'; it must be int"),
        (["--learning_rate", "1e999"], "learning_rate is inf; it must be a finite number"),
        (["--learning_rate", "nan"], "learning_rate is the text 'nan'; it must be float"),
    ],
)
def test_a_bad_flag_is_named_with_its_remedy(flags, sentence):
    assert sentence in refusal(BASE, *flags)


@pytest.mark.parametrize(
    ("text", "layers"), [("first:2", "first:2"), ("every:2", "every:2"), ("1,3", (1, 3)), ("2", (2,)), ("null", None), ("1,x", "1,x")]
)
def test_a_flag_may_be_a_text_or_a_list(text, layers):
    assert read_config({**BASE, "model_name_or_path": "student"}, ["--student_layers", text]).student_layers == layers


def test_a_home_folder_in_a_config_that_was_read_by_nobody_is_refused():
    with pytest.raises(
        ValueError, match=r"output_dir is '~/run', and ~ is expanded in files and flags alone; give os\.path\.expanduser"
    ):
        RunConfig(method="lm", output_dir="~/run", student={"num_hidden_layers": 1})


def test_a_home_folder_stands_for_its_sign_in_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    data = {
        **BASE,
        "output_dir": "~/run",
        "cache_dir": "~",
        "teacher_model_name_or_path": "~/teacher",
        "model_name_or_path": "~/student",
        "tokenizer_name_or_path": "~/tokenizer",
        "text": {"path": "~/*.txt", "eval_path": "~/dev.txt"},
        "task": {**BASE["task"], "path": "~/task", "cloze": {**BASE["task"]["cloze"], "template": "~ {text} {mask}"}},
        "vocabulary": {"counts": "~/counts"},
        "teacher": {"kind": "cache", "path": "./~/cache"},
        "stages": {"pretrain": {"dataset": {"task": "glue/rte", "path": "~/rte"}, "options": {"teacher_filters": "~/filters"}}},
    }
    config = read_config(data, ["--text.eval_path=~/other.txt"])
    stage = config.stages["pretrain"]
    assert stage.text and stage.dataset and stage.task and config.vocabulary
    assert stage.options["teacher_filters"] == "/home/somebody/filters"
    assert [config.output_dir, config.cache_dir, config.model_name_or_path, config.tokenizer_name_or_path] == [
        "/home/somebody/run",
        "/home/somebody",
        "/home/somebody/student",
        "/home/somebody/tokenizer",
    ]
    assert [stage.teacher_model_name_or_path, stage.text.path, stage.text.eval_path, stage.dataset.path, config.vocabulary.counts] == [
        "/home/somebody/teacher",
        "/home/somebody/*.txt",
        "/home/somebody/other.txt",
        "/home/somebody/rte",
        "/home/somebody/counts",
    ]
    assert stage.teacher.path == "./~/cache" and stage.task.cloze.template == "~ {text} {mask}"


def test_numbers_in_a_file_are_those_of_yaml_1_2(tmp_path: Path):
    text = to_yaml(read_config(BASE)).replace("learning_rate: 0.0005", "learning_rate: 2e-5").replace("seed: 0", "seed: 010")
    (tmp_path / "run.yaml").write_text(text)
    config = read_config(load_yaml(tmp_path / "run.yaml"))
    assert (config.learning_rate, config.seed) == (2e-5, 10)
    (tmp_path / "run.yaml").write_text(text.replace("max_steps: 100", "max_steps: 1:30").replace("bf16: false", "bf16: on"))
    message = refusal(load_yaml(tmp_path / "run.yaml"))
    assert "max_steps is the text '1:30'; it must be int" in message and "bf16 is the text 'on'; it must be bool" in message
