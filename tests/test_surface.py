"""The frozen surface: names, parameters, flags and keys that people's code and files rely on, each written out.

A failure here says that the surface has changed. Additions are written down here too; what is renamed or removed breaks somebody.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fastkd
from fastkd.cli.main import COMMANDS, main
from fastkd.train.config import RunConfig
from fastkd.train.schema import help_text

NAMES = [
    "Divergence",
    "LinearKLDivLoss",
    "LossStats",
    "ProjectedMSELoss",
    "RelationKLLoss",
    "RelationTarget",
    "VocabMap",
    "distill",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "projected_mse",
    "reference",
    "relation_kl",
    "topk_kl_div",
]
REFERENCES = ["kl_div", "linear_cross_entropy", "linear_kl_div", "projected_mse", "relation_kl", "topk_kl_div"]
ROW_OPTIONS = "reduction='mean', denominator=None, chunk_size=None, memory_budget=None, backend='auto'"
TWO_TERMS = ROW_OPTIONS.replace("denominator=None", "denominator=None, label_denominator=None")
LOGITS = "student_softcap=None, teacher_softcap=None, student_logit_scale=1.0, teacher_logit_scale=1.0"
LABELS = "labels=None, label_weight=0.0, ignore_index=-100"
TEACHER = "vocab_index=None, teacher_mass='renormalize', vocab_slots=None"
SIGNATURES = {
    "distill": "(config, *, only_stage=None)",
    "kl_div": "(student_logits, teacher_logits, *, divergence='forward_kl', temperature=1.0, temperature_squared=True, mask=None, "
    f"{TEACHER}, {LABELS}, {LOGITS}, {TWO_TERMS}, return_stats=False)",
    "linear_cross_entropy": f"(hidden, weight, labels, *, bias=None, ignore_index=-100, softcap=None, logit_scale=1.0, "
    f"{ROW_OPTIONS}, token_weight=None)",
    "linear_kl_div": "(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias=None, teacher_bias=None, "
    f"divergence='forward_kl', temperature=1.0, temperature_squared=True, mask=None, {TEACHER}, {LABELS}, {LOGITS}, {TWO_TERMS}, "
    "return_stats=False, grad_filter=None, token_weight=None, group=None)",
    "projected_mse": "(student_states, student_weight, teacher_states, teacher_weight, *, student_bias=None, teacher_bias=None, "
    "mask=None, reduction='mean', chunk_size=None, memory_budget=None)",
    "relation_kl": "(student_q, student_k, teacher_q, teacher_k, *, key_mask=None, query_mask=None, targets=(), form='kl', "
    "reduction='mean', chunk_size=None, memory_budget=None, backend='auto')",
    "topk_kl_div": "(student_hidden, student_weight, topk_ids, topk_logprobs, tail_logprob=None, *, student_bias=None, tail='bucket', "
    "divergence='forward_kl', student_support='full', temperature=1.0, temperature_squared=True, topk_temperature=None, "
    f"mask=None, {LABELS}, student_softcap=None, student_logit_scale=1.0, {TWO_TERMS}, return_stats=False, "
    "grad_filter=None, group=None)",
    "Divergence": "(kind, mixing=None)",
    "Divergence.mixed": "(alpha)",
    "Divergence.jsd": "(beta)",
    "Divergence.skew_kl": "(alpha)",
    "Divergence.skew_rkl": "(alpha)",
    "Divergence.parse": "(value)",
    "LinearKLDivLoss": "(**options)",
    "LinearKLDivLoss.forward": "(self, student_hidden, student_weight, teacher_hidden, teacher_weight, **per_batch)",
    "LossStats": "(divergence=None, cross_entropy=None, student_entropy=None, teacher_entropy=None, top1_agreement=None, "
    "acceptance=None, columns_kept=None, dropped_mass=None, listed_mass=None, topk_overlap=None, kept_mass=None, "
    "teacher_top1_kept=None)",
    "ProjectedMSELoss": "(**options)",
    "ProjectedMSELoss.forward": "(self, student_states, student_weight, teacher_states, teacher_weight, **per_batch)",
    "RelationKLLoss": "(**options)",
    "RelationKLLoss.forward": "(self, student_q, student_k, teacher_q, teacher_k, **per_batch)",
    "RelationTarget": "(q, k, weight=1.0, key_mask=None, query_mask=None)",
    "VocabMap": "(kept_ids, id_to_slot)",
    "VocabMap.from_counts": "(counts, keep, protected=(), multiple_of=128, requires=None, vocab_size=None, exclude=())",
    "VocabMap.from_t2d": "(t2d)",
    "VocabMap.from_d2t": "(d2t, vocab_size)",
    "VocabMap.identity": "(vocab_size)",
    "VocabMap.assign_stand_ins": "(self, embedding, similarity='dot', *, unk_id=None, exclude=())",
    "VocabMap.map_ids": "(self, ids, ignore_index=None)",
    "VocabMap.decode_ids": "(self, slots)",
    "VocabMap.shard": "(self, rank, world_size)",
    "VocabMap.to": "(self, device)",
    "VocabMap.save": "(self, directory)",
    "VocabMap.load": "(directory)",
}
LIGER = "student_input, student_weight, teacher_input, teacher_weight"
DROP_INS = {
    "liger.LigerFusedLinearJSDLoss": "(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100, temperature=1.0, "
    "compiled=True, chunk_size=None, return_soft_hard_loss=False)",
    "liger.LigerFusedLinearJSDLoss.forward": f"(self, {LIGER}, true_labels, student_bias=None, teacher_bias=None)",
    "liger.LigerFusedLinearJSD": "(jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None)",
    "liger.LigerFusedLinearJSD.forward": f"(self, {LIGER}, shift_labels)",
    "liger.LigerFusedLinearKLDivLoss": "(reduction='batchmean', ignore_index=-100, temperature=1.0, eps=1e-10, accum_dtype=None)",
    "liger.LigerFusedLinearKLDivLoss.forward": "(self, student_input, student_weight, target, shift_labels=None)",
    "liger.LigerJSD": "(beta=0.5, ignore_index=-100)",
    "liger.LigerJSD.forward": "(self, log_q, log_p, shift_labels=None)",
    "liger.LigerKLDIVLoss": "(eps=1e-10, *args, **kwargs)",
    "liger.LigerKLDIVLoss.forward": "(self, y_pred, y_true)",
    "liger.LigerTVDLoss": "(reduction='batchmean', ignore_index=-100)",
    "liger.LigerTVDLoss.forward": "(self, p, q, shift_labels=None)",
    "trl.patch_trainers": "()",
    "speculators.kl_div_loss": "(logits, targets)",
    "speculators.reverse_kl_div_loss": "(logits, targets)",
    "speculators.js_div_loss": "(logits, targets)",
    "speculators.ce_loss": "(logits, targets)",
    "speculators.tv_loss": "(logits, targets)",
    "speculators.neg_log_acceptance_loss": "(logits, targets)",
    "speculators.lk_hybrid_loss": "(logits, targets, eta=3.0)",
}
"""Below fastkd.integrations."""
FLAGS = {
    "quickstart": "--method --output_dir --seed --print_config --all",
    "train": "config --stage --print_config --all",
    "vocab count": "--model --data --name --split --text_column --documents --streaming "
    "--max_rows --on_bad_row --num_proc --output_dir",
    "vocab prune": "--model --counts --keep --multiple_of --protected --output_dir",
    "generate": "model prompt --max_new_tokens --temperature --seed --use_cpu",
    "export": "student --output_dir --results --onnx",
    "cache": "config --stage --output --kind --k --dtype --shard_rows --yes",
    "eval": "model --teacher --baseline --task --text --path --text_columns --label_column --name --text_column --documents --split "
    "--max_rows --max_length --batch_size --output_dir --use_cpu",
    "plot": "run --key --output",
    "doctor": "--vocabulary --student_hidden --teacher_hidden --dtype --temperature --tokens --teacher --student --student_layers "
    "--batch_size --length --json",
    "bench": "claims --smoke --repeats --budget --device --output --pair",
    "bench report": "--results --docs --readme",
}
KEYS = """
    text text.path text.name text.train_split text.eval_split text.eval_path text.text_column text.documents text.streaming
    text.max_rows text.max_eval_rows text.max_length text.layout text.on_bad_row text.max_bad_rows task task.path task.name
    task.train_split task.eval_split task.eval_path task.max_rows task.max_eval_rows task.on_bad_row task.max_bad_rows task.cloze
    task.cloze.kind task.cloze.template task.cloze.label_column task.cloze.label_words task.cloze.labels task.cloze.choices
    task.cloze.choices_column task.cloze.choice_columns task.cloze.strip task.cloze.length_penalty task.cloze.max_length dataset
    dataset.task dataset.path dataset.eval_path dataset.eval_split dataset.text_columns dataset.label_column dataset.kind
    dataset.max_length dataset.pad_to_max_length dataset.doc_stride dataset.max_answer_length dataset.few_sample dataset.label_noise
    dataset.sample_seed dataset.max_eval_rows dataset.on_bad_row dataset.max_bad_rows teacher_model_name_or_path teacher
    teacher.kind teacher.path teacher.tail options.NAME dropout.NAME per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps max_steps num_train_epochs learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon
    bias_correction max_grad_norm lr_scheduler_type warmup_steps lr_decay_steps lr_final_ratio bf16 fp16 torch_compile
    group_by_length logging_steps report_to profile_steps eval_steps save_steps save_total_limit async_save save_failure non_finite
    max_skipped_steps method output_dir model_name_or_path tokenizer_name_or_path student_layers student.NAME vocabulary
    vocabulary.keep vocabulary.multiple_of vocabulary.protected vocabulary.stand_ins vocabulary.counts stages.NAME seed use_cpu backend
    fsdp fsdp_teacher ddp_timeout cache_dir overwrite_output_dir
"""


def test_the_package_exports_these_names_and_no_others() -> None:
    assert fastkd.__all__ == NAMES and set(NAMES) <= set(dir(fastkd))
    assert all(getattr(fastkd, name) is not None for name in NAMES)
    assert fastkd.reference.__all__ == REFERENCES and all(callable(getattr(fastkd.reference, name)) for name in REFERENCES)


@pytest.mark.parametrize("name", [*SIGNATURES, *DROP_INS])
def test_parameters_and_their_defaults(name: str) -> None:
    found: Any = fastkd if name in SIGNATURES else importlib.import_module(f"fastkd.integrations.{name.partition('.')[0]}")
    for part in name.split(".")[name in DROP_INS :]:
        found = getattr(found, part)
    signature = inspect.signature(found)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == {**SIGNATURES, **DROP_INS}[name]


def test_every_public_name_has_its_parameters_written_down() -> None:
    assert {name.split(".")[0] for name in SIGNATURES} == set(NAMES) - {"reference"}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_has_no_parameter_that_its_op_has_not(name: str) -> None:
    """And those that both have, in one order with the same defaults; `linear_kl_div`'s hands on what it does not name."""
    op, reference = (inspect.signature(getattr(home, name)).parameters for home in (fastkd, fastkd.reference))
    named = [parameter for parameter in reference.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    shared = [parameter for parameter in op.values() if parameter.name in reference]
    assert [(p.name, p.kind, p.default) for p in named] == [(p.name, p.kind, p.default) for p in shared]


class Parsing(BaseException):
    """A command has built its parser."""


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The flags of a parser, or of each of its subcommands, by the words that lead there."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if isinstance(actions[0], argparse._SubParsersAction):
        return {name: flags for choice in actions[0].choices.values() for name, flags in flags_of(choice).items()}
    names = (name for action in actions for name in action.option_strings or [action.dest])
    return {parser.prog.removeprefix("fastkd "): " ".join(names)}


def test_flags_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found.update(flags_of(self))
        raise Parsing

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    for command in [*([command] for command in COMMANDS), ["bench", "report"]]:
        with pytest.raises(Parsing):
            main([*command, "anything"])
    assert found == FLAGS


def test_keys_of_a_run() -> None:
    """The flags of `fastkd train` and the keys of its YAML; those below stages.NAME are the same again."""
    keys = re.findall(r"^--(\S+)", help_text(RunConfig), re.MULTILINE)
    assert [key for key in keys if not key.startswith("stages.NAME.")] == KEYS.split()


def test_types_are_packaged() -> None:
    marker = Path(fastkd.__file__).parent / "py.typed"
    project = tomllib.loads((marker.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert marker.is_file() and "py.typed" in project["tool"]["setuptools"]["package-data"]["fastkd"]
    assert "Typing :: Typed" in project["project"]["classifiers"]
