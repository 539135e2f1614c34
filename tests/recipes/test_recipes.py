"""Every recipe is a run that can start, says what the authors' scripts say, and is in the wheel."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastkd.methods.registry import METHODS
from fastkd.recipes import FOLDER, config_path, recipe_titles
from fastkd.tasks.glue import TASKS
from fastkd.tasks.stdlib_tasks import STDLIB_TASKS
from fastkd.train.config import RunConfig, read_config
from fastkd.train.schema import from_mapping, load_yaml

ROOT = Path(__file__).parents[2]
RECIPES = list(recipe_titles())
PUBLISHED = [name for name in RECIPES if "/stdlib-" not in name]
GLUE = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"}
SUPER_GLUE = {"boolq", "cb", "copa", "multirc", "rte", "wic"}


def recipe(name: str, *flags: str) -> RunConfig:
    return read_config(load_yaml(config_path(name)), flags)


def per_stage(name: str, *keys: str) -> dict[str, Any]:
    """The values of `keys` in every stage: one value if all stages agree on it, else stage -> value."""
    config, found = recipe(name), {}
    for key in keys:
        values = {stage: getattr(arguments, key) for stage, arguments in config.stages.items()}
        found[key] = values if len(set(values.values())) > 1 else next(iter(values.values()))
    return found


def test_every_task_has_its_recipe():
    expected = {f"crild/{task}" for task in GLUE}
    expected |= {f"crild/{task}-few" for task in ("cola", "mrpc", "rte", "stsb")}
    expected |= {f"crild/{task}-noise" for task in ("cola", "mrpc", "rte")}
    expected |= {f"ted/{task}" for task in GLUE | {"squad2"}}
    expected |= {f"glmd/{task}" for task in SUPER_GLUE | {"pretrain"}}
    assert set(PUBLISHED) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run_of_its_method(name):
    config = recipe(name)
    method = METHODS[config.method]
    assert config.method == name.split("/")[0]
    stages = config.stages or {method.stages[0].name: config}
    specs = {spec.name: spec for spec in method.stages}
    assert list(stages) == [stage for stage in specs if stage in stages], "the stages are the method's, in its order"
    for stage, arguments in stages.items():
        specs[stage].check_stages(from_mapping(method.options, arguments.options), list(stages))
        assert [kind for kind in specs[stage].data if getattr(arguments, kind) is not None], f"{stage} has no data"
        assert arguments.dataset is None or arguments.dataset.task in {**TASKS, **STDLIB_TASKS, "stdlib/pairs": None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_all_stages_and_its_sources(name):
    config, text = recipe(name), config_path(name).read_text(encoding="utf-8")
    assert config.output_dir == f"runs/{name.replace('/', '-')}"
    comment = text.split("method:")[0]
    assert all(line.startswith("# ") for line in comment.splitlines())
    for source in (r"arXiv:\d{4}\.\d{5}", r"github\.com/\w+/[\w-]+", r"\w+\.(sh|py)|README\.md"):
        assert re.search(source, comment)
    assert not any(arguments.bf16 or arguments.fp16 for arguments in (config, *config.stages.values())), "it runs on a CPU"
    if name != "glmd/pretrain":
        assert set(config.stages) == {spec.name for spec in METHODS[config.method].stages} - {"pretrain"}


def test_a_flag_goes_over_a_recipe():
    config = recipe("ted/rte", "--output_dir", "elsewhere", "--teacher_model_name_or_path", "mine", "--options.preset", "strict")
    assert config.output_dir == "elsewhere"
    assert {stage.teacher_model_name_or_path for stage in config.stages.values()} == {"mine"}
    assert config.stages["distill"].options == {"preset": "strict", "kl_alpha": 20, "mse_alpha": 50}
    assert recipe("glmd/pretrain", "--vocabulary", "null").vocabulary is None


# ---- TED: scripts/{finetune,learn_filters,ted}_{glue,qa}.sh

TED = {  # batch, length, rate of teacher and student, epochs, warm-up of both, kl_alpha, mse_alpha
    "mnli": (64, 256, 2e-5, 7e-5, 3, 1500, 1500, 5, 7500),
    "qqp": (64, 256, 2e-5, 6e-5, 8, 5000, 5000, 20, 1000),
    "qnli": (32, 256, 1e-5, 5e-5, 3, 500, 500, 20, 100),
    "sst2": (32, 256, 2e-5, 4e-5, 6, 0, 0, 20, 20),
    "rte": (16, 256, 3e-5, 6e-5, 6, 0, 0, 20, 50),
    "cola": (32, 256, 2e-5, 6e-5, 6, 100, 0, 0, 10),
    "mrpc": (32, 256, 3e-5, 7e-5, 6, 0, 0, 20, 100),
    "stsb": (16, 128, 2e-5, 1e-4, 6, 100, 100, 20, 50),
    "squad2": (8, 384, 3e-5, 5e-5, 3, 0, 0, 10, 5000),
}


@pytest.mark.parametrize("task", TED)
def test_ted_as_published(task):
    batch, length, teacher_rate, rate, epochs, teacher_warmup, warmup, kl_alpha, mse_alpha = TED[task]
    config = recipe(f"ted/{task}")
    teachers = [config.stages[name] for name in ("teacher", "teacher_filters")]
    students = [config.stages[name] for name in ("student", "student_filters", "distill")]
    assert {(s.learning_rate, s.warmup_steps) for s in teachers} == {(teacher_rate, teacher_warmup)}
    assert {(s.learning_rate, s.warmup_steps) for s in students} == {(rate, warmup)}
    for stage in (*teachers, *students):
        assert stage.dataset is not None and stage.dataset.max_length == length
        assert stage.dataset.task == {"squad2": "squad_v2"}.get(task, f"glue/{task}")
        assert (stage.num_train_epochs, stage.lr_scheduler_type, stage.lr_final_ratio, stage.lr_decay_steps) == (epochs, "linear", 0, 1)
        assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert (stage.weight_decay, stage.max_grad_norm, stage.max_steps) == (0, 0, -1)
    sizes = {name: (s.per_device_train_batch_size, s.gradient_accumulation_steps) for name, s in config.stages.items()}
    different = {"rte": {"student_filters": (32, 1)}, "squad2": {"teacher": (24, 2), "teacher_filters": (48, 1)}}.get(task, {})
    assert sizes == {**dict.fromkeys(config.stages, (batch, 1)), **different}
    options: Any = from_mapping(METHODS["ted"].options, config.stages["distill"].options).resolved()
    assert (options.kl_alpha, options.mse_alpha, options.temperature) == (kl_alpha, mse_alpha, 2)
    assert (options.layerwise, options.padding, options.filter_stage_dropout) == ("ted", "include", True)
    assert (options.filter_interval, options.teacher_filter_interval, options.filter_nonlinear) == (1, 1, False)
    assert (config.teacher_model_name_or_path, config.model_name_or_path, config.seed) == (
        "microsoft/deberta-v3-base",
        "microsoft/deberta-v3-xsmall",
        42,
    )


# ---- CR-ILD: scripts/*.sh, run_finetune.py, modules/optimization.py

ILD_EPOCHS = {"cola": 20, "mnli": 5, "mrpc": 20, "sst2": 10, "stsb": 20, "qqp": 5, "qnli": 10, "rte": 20}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("crild/")])
def test_crild_as_published(name):
    task, _, variant = name.removeprefix("crild/").partition("-")
    config = recipe(name)
    assert per_stage(name, "learning_rate", "per_device_train_batch_size", "num_train_epochs") == {
        "learning_rate": {"teacher": 2e-5, "ild": 3e-5, "kd": 3e-5},
        "per_device_train_batch_size": {"teacher": 16, "ild": 32, "kd": 16},
        "num_train_epochs": {"teacher": 20 if variant == "few" else 4, "ild": ILD_EPOCHS[task], "kd": 4},
    }
    is_large = task in {"mnli", "sst2", "qqp", "qnli"}
    assert per_stage(name, "eval_steps")["eval_steps"] == {
        "teacher": 1000 if is_large else 100,
        "ild": None,
        "kd": 1000 if is_large else 50,
    }
    for stage in config.stages.values():
        data = stage.dataset
        assert data is not None and (data.task, data.max_length) == (f"glue/{task}", 128)
        assert (data.few_sample, data.label_noise) == {"": (None, 0), "few": (1000, 0), "noise": (None, 0.3)}[variant]
        assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon, stage.weight_decay) == (0.9, 0.999, 1e-6, 0.01)
        assert (stage.warmup_steps, stage.lr_scheduler_type, stage.lr_final_ratio, stage.max_grad_norm) == (0.1, "linear", 0, 1)
    options: Any = from_mapping(METHODS["crild"].options, config.options)
    assert (options.resolved().objects, options.resolved().mixup, options.resolved().layers) == ("QKV", True, "last")
    assert (options.temperature, options.label_weight, options.ema_decay) == (2, 0, None)
    assert (config.student_layers, config.model_name_or_path, config.seed) == ("first:6", "bert-base-uncased", 42)


# ---- GLMD: README.md, distill/auto_tune.py, config/*.json

GLMD = {  # batch, rate, epochs, length, kind, words in the order of the hub's classes
    "copa": (16, 5e-6, 50, 256, "choices", ()),
    "rte": (16, 2e-5, 50, 256, "verbalizer", ("yes", "no")),
    "boolq": (16, 2e-5, 20, 256, "verbalizer", ("no", "yes")),
    "wic": (16, 2e-5, 30, 256, "verbalizer", ("no", "yes")),
    "cb": (32, 2e-5, 50, 256, "verbalizer", ("yes", "no", "maybe")),
    "multirc": (16, 5e-6, 15, 512, "verbalizer", ("no", "yes")),
}
MEANINGS = {"entailment": "yes", "not_entailment": "no", "contradiction": "no", "neutral": "maybe", "False": "no", "True": "yes"}


@pytest.mark.parametrize("task", GLMD)
def test_glmd_as_published(task):
    batch, rate, epochs, length, kind, words = GLMD[task]
    config, spec = recipe(f"glmd/{task}"), TASKS[f"super_glue/{task}"]
    for stage in config.stages.values():
        assert (stage.per_device_train_batch_size, stage.learning_rate, stage.num_train_epochs) == (batch, rate, epochs)
        assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon, stage.weight_decay) == (0.9, 0.999, 1e-8, 0.1)
        assert (stage.warmup_steps, stage.lr_scheduler_type, stage.lr_final_ratio, stage.max_grad_norm) == (0.1, "linear", 0.1, 1)
        assert stage.task is not None and (stage.task.path, stage.task.name) == ("aps/super_glue", task)
        cloze = stage.task.cloze
        assert (cloze.kind, cloze.max_length, cloze.label_words, cloze.length_penalty) == (kind, length, words, 0)
        assert words == tuple(MEANINGS[name] for name in spec.label_names)
        assert {*cloze.columns, *cloze.choice_columns} <= set(spec.columns), "the hub's columns"
    assert config.model_name_or_path == f"{recipe('glmd/pretrain').output_dir}/pretrain/student"


def test_glmd_pretraining_as_published():
    config = recipe("glmd/pretrain")
    assert (config.max_steps, config.per_device_train_batch_size * config.gradient_accumulation_steps) == (150_000, 64)
    assert (config.learning_rate, config.lr_scheduler_type, config.lr_final_ratio) == (4e-4, "cosine", 0.05)
    assert (config.lr_decay_steps, config.warmup_steps) == (0.8, 0.05)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert (config.weight_decay, config.max_grad_norm) == (0.1, 1)
    assert config.text is not None and config.text.max_length == 512
    assert config.vocabulary is not None and (config.vocabulary.keep, config.vocabulary.multiple_of) == (0.5, 128)
    assert config.student == {"num_hidden_layers": 6}
    options: Any = from_mapping(METHODS["glmd"].options, config.options)
    assert (options.temperature, options.divergence, options.mask_probability) == (15, "forward_kl", 0.15)


# ---- the wheel


def test_recipes_are_in_the_wheel():
    """setuptools takes what these patterns match below the package."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "fastkd.recipes" in setuptools["packages"]
    packaged = {file for pattern in setuptools["package-data"]["fastkd.recipes"] for file in FOLDER.glob(pattern)}
    assert packaged == {file for file in FOLDER.rglob("*") if file.suffix in (".yaml", ".md")}
    assert len(packaged) > len(PUBLISHED)
