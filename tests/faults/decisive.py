"""Every setting of a run that decides its result, with a value that no run of test_33_identity has, and those that decide nothing."""

from __future__ import annotations

from typing import Any

from fastkd.methods.registry import METHODS
from fastkd.tasks.cloze_task import ClozeTask
from fastkd.train.config import DatasetArguments, RunConfig, StageArguments, TaskData, TeacherArguments, TextData, Vocabulary

GOES_ON = {
    "logging_steps": 2,
    "report_to": "tensorboard",
    "profile_steps": 1,
    "save_steps": 2,
    "save_total_limit": 1,
    "async_save": True,
    "save_failure": "continue",
    "ddp_timeout": 7,
    "cache_dir": "elsewhere",
    "overwrite_output_dir": True,
    "backend": "cpp",  # what "auto" takes here; with another one a run goes on too, but not bit for bit, and is told so
}
"""Settings that decide nothing of the result, each with another value."""
NOT_ALONE = {"fsdp", "fsdp_teacher"}
"""So do these, of several ranks."""
PLACES = {
    *("output_dir", "model_name_or_path", "tokenizer_name_or_path", "teacher_model_name_or_path", "path", "eval_path", "counts"),
    *("teacher_filters", "student_filters"),
}
"""What lies there decides."""
HOLDERS = {"text", "task", "dataset", "teacher", "options", "vocabulary", "stages", "cloze", "dropout", "student", "method"}
"""What is in them decides, or they are changed in a test of their own."""
STAGE = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "num_train_epochs": 5.0,
    "learning_rate": 0.001,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-5,
    "bias_correction": False,
    "max_grad_norm": 2.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "lr_decay_steps": 0.5,
    "lr_final_ratio": 0.1,
    "bf16": True,
    "fp16": True,
    "torch_compile": True,
    "group_by_length": False,
    "eval_steps": 2,
    "non_finite": "skip",
    "max_skipped_steps": 3,
}
RUN = {"student_layers": "first:1", "seed": 4, "use_cpu": False}
BAD_ROWS = {"on_bad_row": "skip", "max_bad_rows": 3}
TEXT = {
    **BAD_ROWS,
    "name": "other",
    "train_split": "other",
    "eval_split": "other",
    "text_column": "other",
    "documents": "paragraph",
    "streaming": True,
    "max_rows": 30,
    "max_eval_rows": 6,
    "max_length": 24,
    "layout": "packed",
}
TASK = {**BAD_ROWS, "name": "other", "train_split": "other", "eval_split": "other", "max_rows": 10, "max_eval_rows": 6}
CLOZE = {
    "kind": "classification",
    "template": "{text} , so {mask}",
    "label_column": "other",
    "label_words": ["for", "if"],
    "labels": [1, 0],
    "choices": ["if", "for"],
    "choices_column": "other",
    "choice_columns": ["other", "another"],
    "strip": ["text"],
    "length_penalty": 0.5,
    "max_length": 30,
}
DATASET = {
    **BAD_ROWS,
    "task": "glue/mrpc",
    "eval_split": "train",
    "text_columns": ["other"],
    "label_column": "other",
    "kind": "regression",
    "max_length": 24,
    "pad_to_max_length": True,
    "doc_stride": 16,
    "max_answer_length": 7,
    "few_sample": 8,
    "label_noise": 0.5,
    "sample_seed": 1,
    "max_eval_rows": 4,
}
VOCABULARY = {"keep": 0.4, "multiple_of": 16, "protected": ["self"], "stand_ins": "cosine"}
TEACHER = {"kind": "model", "tail": "zero"}
OPTIONS: dict[str, dict[str, Any]] = {
    "glmd": {"preset": "paper", "temperature": 3.0, "divergence": "reverse_kl", "mask_probability": 0.2, "teacher_mass": "slots"},
    "kd": {"temperature": 3.0, "divergence": "reverse_kl", "label_weight": 0.25, "mask_probability": 0.2, "completion_only": True},
    "lm": {"mask_probability": 0.2},
    "finetune": {},
    "crild": {
        "preset": "paper_script",
        "objects": "QKV",
        "layers": "uniform",
        "mixup": False,
        "consistency_weight": 0.2,
        "consistency_objects": "A",
        "ema_decay": 0.9,
        "ramp": "epoch",
        "relation_heads": 2,
        "padding": "include",
        "form": "cross_entropy",
        "temperature": 3.0,
        "label_weight": 0.5,
        "relu_head": True,
    },
    "ted": {
        "preset": "paper",
        "padding": "include",
        "regression_kd": "none",
        "filter_stage_dropout": True,
        "layerwise": "none",
        "kl_alpha": 2.0,
        "mse_alpha": 2.0,
        "temperature": 3.0,
        "filter_interval": 2,
        "teacher_filter_interval": 2,
        "layer_map": [[1, 2]],
        "filter_output_dim": 16,
        "filter_nonlinear": True,
        "mask_probability": 0.2,
    },
}
DECISIVE: list[tuple[type, dict[str, Any]]] = [
    (StageArguments, STAGE),
    (RunConfig, {**STAGE, **RUN}),
    (TextData, TEXT),
    (TaskData, TASK),
    (ClozeTask, CLOZE),
    (DatasetArguments, DATASET),
    (Vocabulary, VOCABULARY),
    (TeacherArguments, TEACHER),
    *((METHODS[method].options, changes) for method, changes in OPTIONS.items()),
]
"""Every setting that decides, with a value that no run here has."""
