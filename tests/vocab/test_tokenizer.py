"""Vocab room: pruned tokenizers keep the contract of `fastkd.vocab.tokenizer`, survive saving, and refuse what cannot work."""

import inspect
import json
import random
import subprocess
import sys
import textwrap
import types
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
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    ByT5Tokenizer,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from fastkd.vocab.tokenizer import (
    PrunedAgreement,
    check_pruned_tokenizer,
    protected_ids,
    prune_tokenizer,
    token_requirements,
)
from fastkd.vocab.tokenizer_backend import id_fields

VOCAB_SIZE = 1200
BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


# --- text and tokenizers, made here


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


def tiny(model, pre_tokenizer=None, **attributes) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **attributes)


# --- the contract


@every_kind
def test_fully_kept_lines_are_tokenized_identically_after_reopening(kind, tmp_path):
    tokenizer, pruned, kept = pruned_pair(kind)
    pruned.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert reopened.get_vocab() == {tokenizer.convert_ids_to_tokens(token): slot for slot, token in enumerate(kept)}

    fully_kept = fully_kept_lines(kind)
    assert 40 <= len(fully_kept) <= 260
    for line, expected in fully_kept:
        assert reopened(line)["input_ids"] == expected
        assert reopened.decode(expected) == tokenizer.decode(tokenizer(line)["input_ids"])


@every_kind
def test_agreement_counts(kind):
    tokenizer, pruned, kept = pruned_pair(kind)
    agreement = check_pruned_tokenizer(tokenizer, pruned, kept, held_out_lines())
    fully_kept = len(fully_kept_lines(kind))
    assert agreement.lines == 300
    assert agreement.lines_fully_kept == fully_kept
    assert fully_kept <= agreement.lines_equal < 300
    assert agreement.tokens == sum(len(tokenizer(line)["input_ids"]) for line in held_out_lines())
    assert 0.5 < agreement.tokens_equal_share < 1.0


def test_agreement_of_a_hand_made_tokenizer():
    vocab = {"[UNK]": 0, "ab": 1, "a": 2, "b": 3, "##b": 4, "##a": 5}
    tokenizer = tiny(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
    kept = [4, 0, 2, 3, 5]
    pruned = prune_tokenizer(tokenizer, kept)
    # "ab" becomes "a ##b", "c" is unknown to both: 3 of the 4 teacher tokens stay where they were.
    assert pruned("ab b").input_ids == [2, 0, 3]
    assert check_pruned_tokenizer(tokenizer, pruned, kept, ["ab b", "c a", "b"]) == PrunedAgreement(
        lines=3, lines_fully_kept=1, lines_equal=2, tokens=5, tokens_equal=4
    )
    assert check_pruned_tokenizer(tokenizer, pruned, kept, []).tokens_equal_share == 1.0


@every_kind
def test_check_raises_when_the_contract_is_broken(kind):
    tokenizer, pruned, kept = pruned_pair(kind)
    common = max(fully_kept_lines(kind), key=lambda found: len(found[1]))[1]
    first, second = common[1], next(slot for slot in range(len(kept)) if slot != common[1])
    swapped = list(kept)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(ValueError, match="breaks its contract on the line"):
        check_pruned_tokenizer(tokenizer, pruned, swapped, held_out_lines())


def test_wordpiece_unknown_words_are_outside_the_contract():
    vocab = {"[UNK]": 0, "abc": 1, "ab": 2, "##cd": 3, "x": 4}
    tokenizer = tiny(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
    kept = [0, 4, 2, 3]
    pruned = prune_tokenizer(tokenizer, kept)
    assert tokenizer("abcd").input_ids == [0]  # "abc" matches, then nothing
    assert pruned("abcd").input_ids == [2, 3]
    assert check_pruned_tokenizer(tokenizer, pruned, kept, ["abcd", "x"]).lines_fully_kept == 1


def test_everything_kept_is_a_renumbering():
    tokenizer = KINDS["byte_bpe_plain"]()
    kept = random.Random(2).sample(range(len(tokenizer)), len(tokenizer))
    agreement = check_pruned_tokenizer(tokenizer, prune_tokenizer(tokenizer, kept), kept, held_out_lines())
    assert agreement.lines_equal == agreement.lines == 300


# --- requirements


def test_requirements_follow_the_merges_that_are_executed():
    # "abc" is listed first as ab + c, yet "bc" always merges before "ab" does.
    tokens = ["a", "b", "c", "z", "ab", "bc", "abc", "za"]
    merges = [("b", "c"), ("ab", "c"), ("a", "bc"), ("z", "a"), ("a", "b")]
    tokenizer = tiny(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    requirements = token_requirements(tokenizer)
    assert requirements == {4: (0, 1), 5: (1, 2), 6: (0, 5), 7: (3, 0)}

    # The parents of lowest rank would not do: without "bc", "za" merges before "ab".
    assert tokenizer.convert_ids_to_tokens(tokenizer("zabc").input_ids) == ["z", "abc"]
    kept = [7, 6, 5, 3, 2, 1, 0]
    assert check_pruned_tokenizer(tokenizer, prune_tokenizer(tokenizer, kept), kept, ["zabc"]).lines_equal == 1
    with pytest.raises(ValueError, match=r"holds 6 \('abc'\) but not 5 \('bc'\)"):
        prune_tokenizer(tokenizer, [0, 1, 2, 3, 4, 6, 7])


def test_a_token_that_looks_marked_requires_the_parents_of_both_readings():
    # "####" is the word "####" as well as "##" inside of a word, where every "#" is written "###".
    tokens = ["#", "###", "##", "####"]
    merges = [("#", "###"), ("###", "###"), ("##", "####")]
    tokenizer = tiny(models.BPE({token: i for i, token in enumerate(tokens)}, merges, continuing_subword_prefix="##"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("####").input_ids) == ["####"]
    assert {token: set(parents) for token, parents in token_requirements(tokenizer).items()} == {2: {0, 1}, 3: {1, 2, 3}}


@pytest.mark.parametrize("kind", ["byte_bpe_plain", "sentencepiece_bpe", "affixed_bpe"])
def test_every_merged_token_is_built_from_its_parents(kind):
    tokenizer = KINDS[kind]()
    requirements = token_requirements(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(requirements) > len(tokenizer) / 3
    prefix = "##" if kind == "affixed_bpe" else ""
    for token, parents in requirements.items():
        products = {tokens[left] + tokens[right].removeprefix(prefix) for left in parents for right in parents}
        assert tokens[token] in products
    text_ids = {token for ids in tokenizer(list(training_lines()))["input_ids"] for token in ids}
    merged = {token for token in text_ids if len(tokens[token].removeprefix(prefix).removesuffix("</w>")) > 1}
    assert merged - set(protected_ids(tokenizer)) <= requirements.keys()


@pytest.mark.parametrize("kind", ["wordpiece_plain", "unigram", "word_level"])
def test_other_models_require_nothing(kind):
    assert token_requirements(KINDS[kind]()) == {}


# --- protected ids


def test_protected_ids_of_wordpiece_are_specials_and_ascii():
    tokenizer = KINDS["wordpiece_plain"]()
    tokens = set(tokenizer.convert_ids_to_tokens(protected_ids(tokenizer)))
    assert tokens >= {*BERT_SPECIALS.values(), "<note>", "a", "##a", "(", "7"}
    spelling = {token.removeprefix("##") for token in tokens} - {*BERT_SPECIALS.values(), "<note>"}
    assert all(len(character) == 1 and character.isascii() for character in spelling)


def test_protected_ids_of_byte_level_bpe_are_specials_and_bytes():
    tokenizer = KINDS["byte_bpe_plain"]()
    tokens = set(tokenizer.convert_ids_to_tokens(protected_ids(tokenizer)))
    assert tokens == {"<|endoftext|>", "<|pad|>", *pre_tokenizers.ByteLevel.alphabet()}


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "unigram_bytes"])
def test_protected_ids_hold_the_fallback_bytes(kind):
    tokenizer = KINDS[kind]()
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokenizer.convert_ids_to_tokens(protected_ids(tokenizer)))


def test_protected_ids_of_unigram_hold_the_lowest_score():
    pieces = [("<unk>", 0.0), ("é", -2.0), ("rare", -9.0), ("a", -1.0)]
    tokenizer = tiny(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
    assert protected_ids(tokenizer) == [0, 2, 3]


def test_protected_ids_hold_every_character_where_nothing_catches_a_missing_one():
    vocab = {"a": 0, "é": 1, "aé": 2}
    assert protected_ids(tiny(models.BPE(vocab, [("a", "é")]))) == [0, 1]
    with_unknown = models.BPE({**vocab, "<unk>": 3}, [("a", "é")], unk_token="<unk>")
    assert protected_ids(tiny(with_unknown)) == [0, 3]
    assert protected_ids(tiny(with_unknown, pre_tokenizers.ByteLevel())) == [0, 1, 3]


def test_extra_tokens_count_only_if_they_are_one_token():
    vocab = {"[UNK]": 0, "yes": 1, "Yes": 2, "no": 3, "##w": 4, "other": 5}
    tokenizer = tiny(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
    assert protected_ids(tokenizer, [" Yes ", "now"]) == [0, 1, 2, 4]

    vocab = {"Ġ": 0, "Y": 1, "y": 2, "ĠY": 3, "Ġy": 4}
    byte_level = tiny(models.BPE(vocab, [("Ġ", "Y"), ("Ġ", "y")]), pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert protected_ids(byte_level) == [0, 1, 2]
    assert protected_ids(byte_level, ["Y"]) == [0, 1, 2, 3, 4]


# --- what is carried over


def test_attributes_and_added_tokens_are_carried_over(tmp_path):
    tokenizer, pruned, _ = pruned_pair("wordpiece_plain")
    pruned.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    for name in (
        "special_tokens_map",
        "extra_special_tokens",
        "all_special_tokens",
        "model_max_length",
        "padding_side",
        "truncation_side",
        "chat_template",
        "clean_up_tokenization_spaces",
        "model_input_names",
    ):
        assert getattr(reopened, name) == getattr(tokenizer, name), name
    flags = {token.content: token.__getstate__() for token in tokenizer.added_tokens_decoder.values()}
    assert {token.content: token.__getstate__() for token in reopened.added_tokens_decoder.values()} == flags
    assert flags["<note>"]["lstrip"]
    assert pruned.name_or_path == tokenizer.name_or_path


def test_class_attributes_of_a_subclass_are_carried_over():
    tokenizer, pruned, _ = pruned_pair("wordpiece_bert")
    assert pruned.model_input_names == tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert pruned.backend_tokenizer.normalizer.lowercase


@every_kind
def test_batches_are_padded_truncated_and_paired_alike(kind):
    tokenizer, pruned, kept = pruned_pair(kind)
    slots = {token: slot for slot, token in enumerate(kept)}
    first, second, third = [line for line, _ in fully_kept_lines(kind)][:3]
    for arguments in (
        {"text": [first, second, third], "padding": True},
        {"text": [first, second, third], "padding": "max_length", "truncation": True, "max_length": 7},
        {"text": [first, second], "text_pair": [second, third], "padding": True},
    ):
        expected, got = tokenizer(**arguments), pruned(**arguments)
        assert got.keys() == expected.keys()
        assert got["input_ids"] == [[slots[token] for token in ids] for ids in expected["input_ids"]]
        assert all(got[name] == expected[name] for name in expected if name != "input_ids")


def test_baked_in_padding_and_post_processors_are_renumbered():
    vocab = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3, "<s>": 4, "<pad>": 5}
    for processor in (
        processors.RobertaProcessing(("</s>", 3), ("<s>", 4)),
        processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 3)]),
            ]
        ),
    ):
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processor
        backend.enable_padding(pad_id=5, pad_token="<pad>", length=5)
        # transformers names none of the special tokens: only the post-processor and the padding know them.
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        assert protected_ids(tokenizer) == [0, 3, 4, 5]
        pruned = prune_tokenizer(tokenizer, [5, 4, 3, 2, 0])
        assert pruned.backend_tokenizer.encode("b").ids == [1, 3, 2, 0, 0]
        assert pruned("b a").input_ids == [1, 3, 4, 2]


def test_unknown_post_processor_is_refused():
    with pytest.raises(ValueError, match="post-processor 'Novel' is unknown"):
        list(id_fields({"added_tokens": [], "padding": None, "post_processor": {"type": "Novel"}}))


@pytest.mark.parametrize("kind", ["byte_bpe_plain", "wordpiece_bert", "unigram"])
def test_added_token_unknown_to_the_model_gets_any_slot(kind):
    tokenizer = KINDS[kind].__wrapped__()
    tokenizer.add_tokens([AddedToken("<entity>", special=False, normalized=False)])
    entity = tokenizer.convert_tokens_to_ids("<entity>")
    kept = chosen_ids(tokenizer)
    kept.remove(entity)
    kept.insert(3, entity)
    pruned = prune_tokenizer(tokenizer, kept)
    assert pruned("<entity>", add_special_tokens=False).input_ids[-1] == 3
    lines = [f"{line} <entity>" for line in held_out_lines()]
    assert check_pruned_tokenizer(tokenizer, pruned, kept, lines).lines_fully_kept > 30


def test_added_token_unknown_to_unigram_leaves_the_unknown_penalty():
    # "é" has no piece of its own: x + unknown + yzz scores 0 - (9 + 10) + 0, against xéy + z + z with -9 - 7 - 7.
    pieces = [("<unk>", 0.0), ("x", 0.0), ("yzz", 0.0), ("xéy", -9.0), ("z", -7.0)]
    tokenizer = tiny(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
    tokenizer.add_tokens(["<entity>"])
    assert tokenizer("xéyzz").input_ids == [1, 0, 2]
    assert prune_tokenizer(tokenizer, [5, 4, 3, 2, 1, 0])("xéyzz").input_ids == [4, 5, 3]


# --- opening the saved files


def test_saved_files_open_where_fastkd_is_not_installed(tmp_path):
    wanted = {}
    for kind in KINDS:
        pruned_pair(kind)[1].save_pretrained(tmp_path / kind)
        wanted[kind] = fully_kept_lines(kind)
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    program = """
        import json, sys
        from pathlib import Path
        sys.modules["fastkd"] = None  # makes `import fastkd` fail
        from transformers import AutoTokenizer
        root = Path(sys.argv[1])
        for kind, lines in json.loads((root / "wanted.json").read_text()).items():
            tokenizer = AutoTokenizer.from_pretrained(root / kind)
            assert lines and all(tokenizer(line)["input_ids"] == ids for line, ids in lines), kind
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("build", "config"),
    [(wordpiece_bert, BertConfig()), (lambda: byte_bpe_gpt2(Qwen2Tokenizer), Qwen2Config())],
    ids=["bert", "qwen2"],
)
def test_saved_files_open_beside_a_model_config(build, config, tmp_path):
    """AutoTokenizer then also looks at the model type, and may open a model-specific class that rebuilds its backend."""
    tokenizer = build()
    kept = chosen_ids(tokenizer)
    prune_tokenizer(tokenizer, kept).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    assert len(reopened) == len(kept)
    assert check_pruned_tokenizer(tokenizer, reopened, kept, held_out_lines()).lines_fully_kept > 40


@pytest.mark.parametrize("kind", ["byte_bpe_plain", "byte_bpe_gpt2"])
def test_byte_level_round_trip_of_any_text(kind):
    tokenizer, pruned, _ = pruned_pair(kind)
    code_points = [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 4099)]
    for start in range(0, len(code_points), 50):
        text = "".join(map(chr, code_points[start : start + 50]))
        assert pruned.decode(pruned(text).input_ids) == text
    for line in held_out_lines():
        assert pruned.decode(pruned(line).input_ids) == line
    assert len(pruned) < 0.6 * len(tokenizer)


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "unigram_bytes"])
def test_byte_fallback_round_trip(kind):
    _, pruned, _ = pruned_pair(kind)
    for text in ("naïve", "日本語 text", "emoji 🎉 end"):
        assert pruned.decode(pruned(text).input_ids, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("kind", ["wordpiece_plain", "wordpiece_bert"])
def test_dropped_ascii_words_are_spelled(kind):
    tokenizer, pruned, _ = pruned_pair(kind)
    for line in held_out_lines():
        if tokenizer.unk_token_id not in tokenizer(line)["input_ids"]:
            assert pruned.unk_token_id not in pruned(line)["input_ids"]


# --- refusals


def words(**attributes) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    return tiny(models.WordLevel(vocab, unk_token="<unk>"), unk_token="<unk>", **attributes)


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ([0, 1, 1], ValueError, "holds id 1 2 times"),
        ([0, 4], ValueError, "holds id 4, which names no token"),
        ([0, -1], ValueError, "holds id -1, which names no token"),
        ([1, 2], ValueError, r"misses 1 protected ids, first 0 \('<unk>'\)"),
        ([[0, 1]], TypeError, r"got shape \(1, 2\)"),
        ([0.0, 1.0], TypeError, "float32"),
        ([True, False], TypeError, "bool"),
    ],
)
def test_wrong_kept_ids_are_refused(kept, error, message):
    with pytest.raises(error, match=message):
        prune_tokenizer(words(), kept)


def test_kept_ids_may_be_a_tensor_or_a_sequence():
    for kept in (torch.tensor([2, 0]), [2, 0], (2, 0), torch.tensor([2, 0]).numpy()):
        assert prune_tokenizer(words(), kept).get_vocab() == {"b": 0, "<unk>": 1}


def test_unigram_without_its_lowest_piece_is_refused():
    pieces = [("<unk>", 0.0), ("ab", -2.0), ("rare", -9.0)]
    tokenizer = tiny(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
    with pytest.raises(ValueError, match=r"first 2 \('rare'\)"):
        prune_tokenizer(tokenizer, [0, 1])


def test_slow_tokenizer_is_refused():
    for refuse in (protected_ids, token_requirements, lambda slow: prune_tokenizer(slow, [0])):
        with pytest.raises(TypeError, match="ByT5Tokenizer, which has no `tokenizers` backend"):
            refuse(ByT5Tokenizer())


@pytest.mark.parametrize(
    "model", [models.Unigram([("a", -1.0)]), models.WordPiece({"a": 0}, unk_token="[UNK]")], ids=["unigram", "wordpiece"]
)
def test_model_without_unknown_token_is_refused(model):
    with pytest.raises(ValueError, match="has no unknown token in its vocabulary"):
        prune_tokenizer(tiny(model), [0])


def test_special_token_outside_the_vocabulary_is_refused():
    tokenizer = words()
    tokenizer.pad_token = "<pad>"
    with pytest.raises(ValueError, match=r"special tokens \['<pad>'\] are not in its vocabulary"):
        prune_tokenizer(tokenizer, [0, 1])


def test_unknown_model_type_is_refused():
    backend = types.SimpleNamespace(to_str=lambda: '{"model": {"type": "Novel"}}')
    with pytest.raises(ValueError, match="model is of type 'Novel'"):
        protected_ids(types.SimpleNamespace(backend_tokenizer=backend))
