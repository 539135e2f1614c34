"""A tokenizer of every kind that can be pruned, trained on the spot on Python's own sources, and what is kept of each."""

import inspect
import json
import random
from collections import Counter
from functools import cache
from importlib import import_module

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertTokenizerFast,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
)

from fastkd.vocab.tokenizer import (
    protected_ids,
    prune_tokenizer,
    token_requirements,
)

VOCAB_SIZE = 1200
BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@cache
def text_lines(*modules: str) -> tuple[str, ...]:
    lines = (line for module in modules for line in inspect.getsource(import_module(module)).splitlines())
    return tuple(line for line in lines if line.strip())


def training_lines() -> tuple[str, ...]:
    return text_lines("argparse", "ast", "textwrap")


def held_out_lines() -> list[str]:
    lines = text_lines("shutil", "subprocess", "types")
    return random.Random(0).sample(lines, 300)


def trained(model: models.Model, trainer: trainers.Trainer, **parts) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(training_lines(), trainer)
    return tokenizer


@cache
def wordpiece_backend() -> str:
    backend = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=list(BERT_SPECIALS.values()), show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    sep, cls = (("[SEP]", backend.token_to_id("[SEP]")), ("[CLS]", backend.token_to_id("[CLS]")))
    backend.post_processor = processors.BertProcessing(sep, cls)
    return backend.to_str()


@cache
def byte_level_backend() -> str:
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    ).to_str()


@cache
def unigram_backend() -> str:
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ).to_str()


def wordpiece_plain() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(wordpiece_backend()),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=77,
        padding_side="left",
        truncation_side="left",
        chat_template="{{ messages[0]['content'] }}",
        clean_up_tokenization_spaces=True,
        extra_special_tokens=[AddedToken("<note>", lstrip=True, special=True)],
        **BERT_SPECIALS,
    )


def wordpiece_bert() -> PreTrainedTokenizerFast:
    return BertTokenizerFast(vocab=Tokenizer.from_str(wordpiece_backend()).get_vocab(), model_max_length=77)


def byte_bpe_plain() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level_backend()), eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def byte_bpe_gpt2(tokenizer_class: type = GPT2TokenizerFast) -> PreTrainedTokenizerFast:
    model = json.loads(byte_level_backend())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return tokenizer_class(vocab=model["vocab"], merges=merges, pad_token="<|pad|>")


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As converted from SentencePiece: byte fallback, and every split of every piece is a merge."""
    pieces = trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<unk>", "<s>"], show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    ).get_vocab()
    tokens = sorted(pieces, key=pieces.__getitem__)
    tokens[2:2] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: position for position, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens[258:]
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<unk>")


def affixed_bpe() -> PreTrainedTokenizerFast:
    """A BPE whose symbols say where in the word they are."""
    backend = trained(
        models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<unk>"],
            continuing_subword_prefix="##",
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(unigram_backend())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def unigram_bytes() -> PreTrainedTokenizerFast:
    spec = json.loads(unigram_backend())
    spec["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    spec["model"]["byte_fallback"] = True
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, spec["decoder"], {"type": "Fuse"}],
    }
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def word_level() -> PreTrainedTokenizerFast:
    backend = trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")


KINDS = {
    build.__name__: cache(build)
    for build in (
        wordpiece_plain,
        wordpiece_bert,
        byte_bpe_plain,
        byte_bpe_gpt2,
        sentencepiece_bpe,
        affixed_bpe,
        unigram,
        unigram_bytes,
        word_level,
    )
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def chosen_ids(tokenizer, share: float = 0.5, lines=None) -> list[int]:
    """Protected ids and the most frequent others, each with its ancestors, then shuffled: every slot differs from its id."""
    counts = Counter(token for ids in tokenizer(list(lines or training_lines()))["input_ids"] for token in ids)
    requirements = token_requirements(tokenizer)
    kept: dict[int, None] = {}
    for token in [*protected_ids(tokenizer), *(token for token, _ in counts.most_common())]:
        todo = [token]
        while todo:
            todo.extend(requirements.get(node := todo.pop(), ()))
            kept[node] = None
        if len(kept) >= share * len(tokenizer):
            break
    order = list(kept)
    random.Random(1).shuffle(order)
    return order


@cache
def pruned_pair(kind: str):
    tokenizer = KINDS[kind]()
    kept = chosen_ids(tokenizer)
    return tokenizer, prune_tokenizer(tokenizer, torch.tensor(kept)), kept


def fully_kept_lines(kind: str) -> list[tuple[str, list[int]]]:
    """Held-out lines of kept tokens only, with the ids they must get."""
    tokenizer, _, kept = pruned_pair(kind)
    slots = {token: slot for slot, token in enumerate(kept)}
    unreliable = {tokenizer.unk_token_id} if kind.startswith("wordpiece") else set()
    found = []
    for line in held_out_lines():
        ids = tokenizer(line)["input_ids"]
        if slots.keys() >= set(ids) and not unreliable & set(ids):
            found.append((line, [slots[token] for token in ids]))
    return found


def backed_by(model, pre_tokenizer=None, **attributes) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **attributes)
