"""What the first lines of README's Python stand on: two small models, a batch, and the arguments of a Trainer."""

from tempfile import mkdtemp

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

shape = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=n, intermediate_size=n, **shape)) for n in (8, 16))
head, teacher_head = student.lm_head, teacher.lm_head.requires_grad_(False)
hidden, teacher_hidden = torch.randn(2, 7, 8, requires_grad=True), torch.randn(2, 7, 16)
mask = torch.rand(2, 7) < 0.7
rows = [{"input_ids": list(range(1, 9)), "attention_mask": [1] * 8, "labels": list(range(1, 9))}] * 2
arguments = TrainingArguments(mkdtemp(), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
