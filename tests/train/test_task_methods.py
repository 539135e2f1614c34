"""CR-ILD and TED by the driver: every architecture, every kind of task, text, exact resume, and what is refused before any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fastkd
from fastkd.methods.registry import METHODS
from tests import tiny
from tests.runs import log_lines, same_bits, settings, weights, write_dataset, write_text

TED = {"mse_alpha": 5.0, "kl_alpha": 1.0, "teacher_filter_interval": 2}
TASKS = ("glue/rte", "glue/stsb", "super_glue/copa", "squad_v2")
HEADS = {"squad_v2": "QuestionAnswering"}
OUTPUTS = {"glue/rte": 2, "squad_v2": 2}


def saved(folder: Path, architecture: str, task: str = "glue/rte", *, head: str | None = None, seed: int = 1, **shape: Any) -> str:
    """A teacher of four layers with its task's head, or `head`."""
    tokenizer = tiny.byte_level() if architecture in tiny.DECODERS else tiny.wordpiece()
    model = tiny.transformer(
        architecture,
        HEADS.get(task, "SequenceClassification") if head is None else head,
        seed=seed,
        vocab_size=len(tokenizer) + 4,  # some tokenizer classes add tokens of their own
        num_labels=OUTPUTS.get(task, 1),
        **shape,
    )
    return tiny.save(folder / f"{architecture}-{head}-{seed}", model, tokenizer)


def config(folder: Path, method: str, teacher: str, **more: Any) -> dict[str, Any]:
    """All stages of the method, a step each, with a student of two of the teacher's layers."""
    return settings(
        folder,
        **{
            "method": method,
            "teacher_model_name_or_path": teacher,
            "model_name_or_path": teacher,
            "student_layers": "first:2",
            "student": {},
            "dataset": write_dataset(folder),
            "options": TED if method == "ted" else {},
            "stages": {spec.name: {} for spec in METHODS[method].stages},
            "max_steps": 2,
            **more,
        },
    )


@pytest.mark.parametrize("method", ["crild", "ted"])
@pytest.mark.parametrize("architecture", tiny.TRANSFORMERS)
def test_every_architecture_takes_a_step(tmp_path, architecture, method):
    teacher = saved(tmp_path, architecture)
    results = fastkd.distill(config(tmp_path, method, teacher, max_steps=1, learning_rate=0.01, warmup_steps=0))
    assert list(results) == [spec.name for spec in METHODS[method].stages]
    last = results["distill" if method == "ted" else "kd"]
    assert 0 <= last["scores"]["accuracy"] <= 1
    student, start = weights(last), safetensors.torch.load_file(Path(teacher) / "model.safetensors")
    moved = [name for name in student if name not in start or not torch.equal(student[name], start[name])]
    assert moved and all(tensor.isfinite().all() for tensor in student.values())
    assert not any("filter" in name or "fit_dense" in name for name in student)
    assert type(reopened(last["student_dir"])).__name__.endswith("ForSequenceClassification")


def reopened(folder: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("architecture", tiny.TRANSFORMERS)
def test_glmd_takes_a_step_on_every_architecture(tmp_path, architecture):
    head = "CausalLM" if architecture in tiny.DECODERS else "MaskedLM"
    teacher = saved(tmp_path, architecture, head=head)
    results = fastkd.distill(
        settings(tmp_path, teacher_model_name_or_path=teacher, text=write_text(tmp_path), student={"num_hidden_layers": 2}, max_steps=1)
    )
    assert results["pretrain"]["steps"] == 1


@pytest.mark.parametrize(
    ("method", "stage", "options", "terms"),
    [
        ("ted", "distill", TED, {"labels", "divergence", "states"}),
        ("ted", "distill", {**TED, "layerwise": "none"}, {"labels", "divergence"}),
        ("crild", "ild", {"objects": "AHQKV"}, {"attention", "hidden", "queries", "keys", "values"}),
        ("crild", "ild", {"objects": "P", "consistency_weight": 0.0}, {"summary"}),
        ("crild", "kd", {"label_weight": 0.5}, {"divergence", "labels"}),
        ("crild", "kd", {}, set()),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_the_log_tells_the_terms_of_a_loss_apart(tmp_path, method, stage, options, terms):
    accumulation = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4}
    fastkd.distill(config(tmp_path, method, saved(tmp_path, "bert"), options=options, **accumulation))
    lines = [line for line in log_lines(tmp_path / "run" / stage) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        found = {name.removeprefix("loss_"): value for name, value in line.items() if name.startswith("loss_")}
        assert found.keys() == terms and all(value > 0 for value in found.values())
        assert not terms or sum(found.values()) == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["crild", "ted"])
def test_every_kind_of_task(tmp_path, method, task):
    results = fastkd.distill(config(tmp_path, method, saved(tmp_path, "bert", task), dataset=write_dataset(tmp_path, task)))
    scores = results["distill" if method == "ted" else "kd"]["scores"]
    assert (
        set(scores)
        == {
            "glue/rte": {"accuracy"},
            "glue/stsb": {"spearman", "pearson"},
            "super_glue/copa": {"accuracy"},
            "squad_v2": {"token_f1", "exact_match"},
        }[task]
    )


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_ted_on_text(tmp_path, architecture):
    teacher = saved(tmp_path, architecture, head="CausalLM" if architecture == "llama" else "MaskedLM")
    results = fastkd.distill(config(tmp_path, "ted", teacher, dataset=None, text=write_text(tmp_path)))
    assert results["distill"]["scores"]["perplexity"] > 1
    assert results["teacher_filters"]["filters_dir"].endswith("teacher_filters/filters")


@pytest.mark.parametrize("supplementary", ["glue/stsb", "pairs", "text"])
def test_crild_learns_states_from_other_rows_than_scores(tmp_path, supplementary):
    """Stage 1 on another task, on unlabelled pairs or on text; the student's head is that of the task."""
    if supplementary == "text":
        data: dict[str, Any] = {"dataset": None, "text": write_text(tmp_path)}
    elif supplementary == "pairs":
        copy = write_dataset(tmp_path)
        path = str(Path(copy["path"]) / "train.jsonl")
        data = {"dataset": {"task": "pairs", "path": path, "text_columns": ["sentence1", "sentence2"], "max_length": 32}}
    else:
        data = {"dataset": write_dataset(tmp_path, "glue/stsb")}
    results = fastkd.distill(config(tmp_path, "crild", saved(tmp_path, "bert"), stages={"ild": data, "kd": {}}))
    assert results["ild"]["scores"] == {} and 0 <= results["kd"]["scores"]["accuracy"] <= 1


# ---- what is kept, what moves


def test_filters_alone_move_in_their_stages(tmp_path):
    teacher = saved(tmp_path, "bert")
    before = safetensors.torch.load_file(Path(teacher) / "model.safetensors")
    results = fastkd.distill(config(tmp_path, "ted", teacher))
    assert same_bits(before, safetensors.torch.load_file(Path(teacher) / "model.safetensors"))
    for stage in ("teacher_filters", "student_filters"):
        folder = tmp_path / "run" / stage
        assert not list(folder.glob("checkpoint-*/model.safetensors")) and list(folder.glob("checkpoint-*/filters.safetensors"))
        assert results[stage]["filters_dir"] == str(folder / "filters")
    changed = safetensors.torch.load_file(Path(results["teacher"]["teacher_dir"]) / "model.safetensors")
    assert not same_bits(before, changed)


def test_kd_is_ted_without_states(tmp_path):
    """mse_alpha 0 and layerwise none: the same bits."""
    teacher = saved(tmp_path, "bert")
    made = []
    for name, options in (("zero", {"mse_alpha": 0.0}), ("none", {"layerwise": "none"})):
        run = config(tmp_path, "ted", teacher, options=options, stages={"distill": {}}, output_dir=str(tmp_path / name), max_steps=4)
        made.append(weights(fastkd.distill(run)["distill"]))
    assert same_bits(*made)
    start = safetensors.torch.load_file(Path(teacher) / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in made[0].items())


def test_filters_of_another_run_serve(tmp_path):
    teacher = saved(tmp_path, "bert")
    whole = fastkd.distill(config(tmp_path, "ted", teacher))
    options = {**TED, "teacher_filters": whole["teacher_filters"]["filters_dir"]}
    stages = {name: {} for name in ("student", "student_filters", "distill")}
    again = config(tmp_path, "ted", whole["teacher"]["teacher_dir"], options=options, stages=stages, output_dir=str(tmp_path / "again"))
    again["model_name_or_path"] = teacher
    assert same_bits(weights(fastkd.distill(again)["distill"]), weights(whole["distill"]))


@pytest.mark.parametrize("method", ["crild", "ted"])
def test_interrupted_runs_end_bit_for_bit(tmp_path, method, monkeypatch):
    """Every stage is left in the middle once; the filters, fit_dense, the averaged student and the ramp are all resumed."""
    options = {"ema_decay": 0.9, "consistency_weight": 1.0} if method == "crild" else TED
    run = config(tmp_path, method, saved(tmp_path, "bert"), options=options, max_steps=5, save_steps=1, learning_rate=0.01)
    whole = fastkd.distill({**run, "output_dir": str(tmp_path / "whole")})

    from fastkd.train import loop

    class Crash(Exception):
        pass

    crashed: set[str] = set()
    take_step = loop.StageTrainer._step

    def step(self: Any, *arguments: Any) -> None:
        if self.at.step == 3 and self.stage.name not in crashed:
            crashed.add(self.stage.name)
            raise Crash
        take_step(self, *arguments)

    monkeypatch.setattr(loop.StageTrainer, "_step", step)
    for _ in METHODS[method].stages:
        with pytest.raises(Crash):
            fastkd.distill(run)
    resumed = fastkd.distill(run)
    assert crashed == set(whole)
    for name, result in whole.items():
        (key,) = (key for key in result if key.endswith("_dir"))
        left, right = (
            safetensors.torch.load_file(next(Path(results[name][key]).glob("*.safetensors"))) for results in (whole, resumed)
        )
        assert same_bits(left, right)
        assert log_lines(tmp_path / "whole" / name) == log_lines(tmp_path / "run" / name)


def test_dropout_is_that_of_the_stage(tmp_path):
    run = config(tmp_path, "finetune", saved(tmp_path, "bert"), dropout={"hidden_dropout_prob": 0.0, "classifier_dropout": 0.3})
    student = reopened(fastkd.distill(run)["train"]["student_dir"])
    assert [module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)].count(0.3) == 1
    assert student.config.hidden_dropout_prob == 0.0 and student.config.attention_probs_dropout_prob == 0.1


def test_dropout_is_that_of_a_new_student_too(tmp_path):
    new = {"model_name_or_path": None, "student_layers": None, "student": {"num_hidden_layers": 1}}
    run = config(tmp_path, "finetune", saved(tmp_path, "bert"), dropout={"hidden_dropout_prob": 0.3}, max_steps=1, **new)
    assert reopened(fastkd.distill(run)["train"]["student_dir"]).config.hidden_dropout_prob == 0.3


# ---- refused before the first step


def _rename(name: str) -> Any:
    def apply(run: dict[str, Any], folder: Path) -> None:
        path = Path(run["dataset"]["path"]) / "train.jsonl"
        path.write_text(path.read_text().replace("sentence2", name))

    return apply


def _only_one(run: dict[str, Any], folder: Path) -> None:
    path = Path(run["dataset"]["path"]) / "train.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")


def _unlabelled(run: dict[str, Any], folder: Path) -> None:
    path = Path(run["dataset"]["path"]) / "train.jsonl"
    run["stages"]["kd" if run["method"] == "crild" else "distill"] = {
        "dataset": {"task": "pairs", "path": str(path), "text_columns": ["sentence1"], "max_length": 32}
    }


def _options(**options: Any) -> Any:
    return lambda run, folder: run["options"].update(options)


def _set(**keys: Any) -> Any:
    return lambda run, folder: run.update(keys)


BAD = {
    "missing column": ("ted", _rename("other"), "column 'sentence2' .* is missing"),
    "one example": ("ted", _only_one, "Split 'train' of glue/rte has 1 examples; at least two"),
    "no labels": ("crild", _unlabelled, "stage kd learns from labels, and .*train.jsonl has none"),
    "no data": ("crild", _set(dataset=None), "dataset or text is not set, and stage teacher of crild needs it"),
    "both data": (
        "crild",
        lambda run, folder: run.update(text=write_text(folder)),
        "dataset and .*text are both set; set one of them to null",
    ),
    "no filters": (
        "ted",
        _set(stages={"distill": {}}),
        "The student has no filters: run stage student_filters first",
    ),
    "intervals": ("ted", _options(teacher_filter_interval=1), "filter_interval"),
    "layer out of range": ("ted", _options(layer_map=[[3, 4]]), "student layer 3"),
    "filter size": ("ted", _options(filter_output_dim=0), "filter_output_dim=0"),
    "uniform": ("crild", lambda run, folder: run.update(student_layers="first:3", options={"preset": "tinybert"}), "uniform"),
    "letters": ("crild", _options(objects="AX"), "objects='AX'"),
    "layers": ("crild", _set(student_layers="first:9"), "first:9"),
    "compiled": ("crild", lambda run, folder: run["stages"].update(ild={"torch_compile": True}), "torch_compile is on, and stage ild"),
    "dropout": ("ted", _set(dropout={"dropout_rate": 0.0}), "dropout.dropout_rate is not a setting of BertConfig"),
    "task": ("ted", lambda run, folder: run["dataset"].update(task="glue/nope"), "'glue/nope' is not a task"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_first_step(tmp_path, case, monkeypatch):
    from fastkd.train import loop

    monkeypatch.setattr(loop.StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
    method, spoil, sentence = BAD[case]
    run = config(tmp_path, method, saved(tmp_path, "bert"))
    run["options"] = dict(run["options"])
    spoil(run, tmp_path)
    with pytest.raises(ValueError, match=sentence):
        fastkd.distill(run)


def test_heads_that_differ_are_refused_before_the_first_step(tmp_path, monkeypatch):
    from fastkd.train import loop

    monkeypatch.setattr(loop.StageTrainer, "_step", lambda *_: pytest.fail("a step was taken"))
    run = config(tmp_path, "crild", saved(tmp_path, "bert"), student_layers=None)
    run["model_name_or_path"] = saved(tmp_path, "bert", seed=2, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"the student has 2 and the teacher 4.*relation_heads"):
        fastkd.distill(run)


def test_a_model_that_cannot_be_captured_is_refused_by_name(tmp_path):
    from transformers import MobileBertConfig, MobileBertForSequenceClassification

    tokenizer = tiny.wordpiece()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "embedding_size": 16}
    bottleneck = {"true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
    model = MobileBertForSequenceClassification(MobileBertConfig(vocab_size=len(tokenizer), **shape, **bottleneck))
    folder = tiny.save(tmp_path / "mobile", model, tokenizer)
    with pytest.raises((TypeError, ValueError), match="MobileBert"):
        fastkd.distill(config(tmp_path, "crild", folder, student_layers=None))
