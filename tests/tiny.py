"""Small tokenizers and models, made on the spot from Python's own sources."""

from __future__ import annotations

import functools
import inspect
import json
import random
import textwrap
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def lines() -> tuple[str, ...]:
    """A few thousand non-empty lines of text."""
    modules = (json, random, textwrap, inspect, functools)
    text = "\n".join(inspect.getsource(m) for m in modules)
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@functools.cache
def wordpiece(vocabulary: int = 600) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        lines(), trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def byte_level(vocabulary: int = 700) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def bert(vocabulary: int = 600, seed: int = 0, **settings: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=vocabulary, pad_token_id=0, initializer_range=0.2, **{**shape, **settings}))
    torch.nn.init.normal_(model.cls.predictions.bias, std=1.0)
    return model.eval()


def llama(vocabulary: int = 700, seed: int = 0, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **settings})).eval()


_ENCODER = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "type_vocab_size": 2}
_DEBERTA = {
    **_ENCODER,
    "type_vocab_size": 0,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_MODERNBERT = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
_DECODER = {"num_key_value_heads": 2, "attention_dropout": 0.1, "bos_token_id": None, "eos_token_id": 0}
_SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}  # from layer 3 on, only tokens near by are seen
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", _ENCODER),
    "deberta-v2": ("deberta-v2", {**_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta-v3": ("deberta-v2", _DEBERTA),
    "modernbert": ("modernbert", {**_MODERNBERT, "attention_dropout": 0.1, "embedding_dropout": 0.1, "local_attention": 6}),
    "gpt2": ("gpt2", {"bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("llama", _DECODER),
    "qwen2": ("qwen2", {**_DECODER, **_SLIDING}),
    "qwen3": ("qwen3", {**_DECODER, **_SLIDING, "head_dim": 16}),
}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3")


def transformer(
    name: str, head: str = "SequenceClassification", *, seed: int = 0, attention: str | None = None, **settings: Any
) -> Any:
    """A model of four layers with one of `AutoModelFor...`'s heads ("": none); attention is "sdpa" or "eager" (None: its default)."""
    import transformers

    torch.manual_seed(seed)
    model_type, own = TRANSFORMERS[name]
    shape = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "num_labels": 2 if head == "QuestionAnswering" else 3,
        "initializer_range": 0.2,
    }
    config = transformers.AutoConfig.for_model(model_type, **{**shape, **own, **settings})
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto.from_config(config, attn_implementation=attention).eval()


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    """A folder that from_pretrained opens."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
