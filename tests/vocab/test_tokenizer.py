"""Pruned tokenizers keep the contract of `fastkd.vocab.tokenizer`, and refuse what cannot work."""

import logging
import random
import types

import pytest
import torch
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
)

from fastkd.vocab.tokenizer import (
    PrunedAgreement,
    check_pruned_tokenizer,
    protected_ids,
    prune_tokenizer,
    token_requirements,
    tokens_by_id,
)
from tests.tokenizer_kinds import (
    BERT_SPECIALS,
    KINDS,
    backed_by,
    every_kind,
    fully_kept_lines,
    held_out_lines,
    pruned_pair,
    training_lines,
)

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
    tokenizer = backed_by(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
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
    tokenizer = backed_by(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
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
    tokenizer = backed_by(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
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
    tokenizer = backed_by(models.BPE({token: i for i, token in enumerate(tokens)}, merges, continuing_subword_prefix="##"))
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
    tokenizer = backed_by(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
    assert protected_ids(tokenizer) == [0, 2, 3]


def unknown_piece_twice() -> PreTrainedTokenizerFast:
    """As CamemBERT's: text has the ids of the last of equal pieces, and the unknown that of the first."""
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("<unk>", -100.0), ("▁a", -1.0), ("▁", -9.0), ("b", -2.0), ("c", -3.0)]
    return backed_by(models.Unigram(pieces, unk_id=1), pre_tokenizers.Metaspace(), unk_token="<unk>", pad_token="<pad>")


def test_unigram_with_the_unknown_piece_twice_is_pruned_by_ids():
    tokenizer = unknown_piece_twice()
    assert tokenizer("a é <unk>").input_ids == [3, 4, 1, 4, 2]
    protected = protected_ids(tokenizer)
    assert set(protected) <= tokens_by_id(tokenizer).keys() and {0, 1, 2} <= set(protected)
    kept = [4, 1, 2, 0, 3, 5, 6]
    pruned = prune_tokenizer(tokenizer, kept)
    for text in ("a é <unk>", "ab", "ç", "a bb c"):
        assert [kept[slot] for slot in pruned(text).input_ids] == tokenizer(text).input_ids
    assert check_pruned_tokenizer(tokenizer, pruned, kept, ["a é <unk> abc"]).lines_fully_kept == 1
    with pytest.raises(ValueError, match=r"Ids 1 and 2 are both '<unk>', whose text gets the last one, 2, .* exchange the two"):
        prune_tokenizer(tokenizer, [4, 2, 1, 0, 3, 5, 6])


def test_ids_with_gaps_name_their_tokens():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<chat>": 40, "b": 42}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", extra_special_tokens=["<chat>"])
    assert tokens_by_id(tokenizer) == {0: "<unk>", 1: "a", 40: "<chat>", 42: "b"}
    assert protected_ids(tokenizer) == [0, 40]
    assert prune_tokenizer(tokenizer, [40, 0, 42])("b <chat> a").input_ids == [2, 0, 1]


def test_an_added_token_without_a_row_is_dropped_and_one_that_is_inserted_is_not(tmp_path):
    """As Gemma 3's image token and CodeLlama's fill token, whose models have a row less than there are ids."""
    tokenizer = words(extra_special_tokens=["<image>"])
    assert tokenizer("a <image> b").input_ids == [1, 4, 2]
    assert protected_ids(tokenizer) == [0, 4] and protected_ids(tokenizer, rows=4) == [0]
    with pytest.raises(ValueError, match=r"misses 1 protected ids, first 4 \('<image>'\)"):
        prune_tokenizer(tokenizer, [0, 1, 2])
    prune_tokenizer(tokenizer, [0, 2, 1], rows=4).save_pretrained(tmp_path)
    pruned = AutoTokenizer.from_pretrained(tmp_path)
    assert pruned.get_vocab() == {"<unk>": 0, "b": 1, "a": 2}
    assert pruned("a b <image>").input_ids == [2, 1, 0, 0, 0] and pruned.all_special_tokens == ["<unk>"]
    for role in ({"pad_token": "<pad>"}, {"eos_token": "<end>"}):
        assert protected_ids(words(**role), rows=4) == [0, 4]


def test_protected_ids_hold_every_character_where_nothing_catches_a_missing_one():
    vocab = {"a": 0, "é": 1, "aé": 2}
    assert protected_ids(backed_by(models.BPE(vocab, [("a", "é")]))) == [0, 1]
    with_unknown = models.BPE({**vocab, "<unk>": 3}, [("a", "é")], unk_token="<unk>")
    assert protected_ids(backed_by(with_unknown)) == [0, 3]
    assert protected_ids(backed_by(with_unknown, pre_tokenizers.ByteLevel())) == [0, 1, 3]


def test_words_are_kept_with_all_their_tokens_which_the_log_names(caplog):
    vocab = {"[UNK]": 0, "yes": 1, "Yes": 2, "no": 3, "##w": 4, "other": 5}
    tokenizer = backed_by(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]")
    with caplog.at_level(logging.INFO, logger="fastkd"):
        assert protected_ids(tokenizer, [" Yes "]) == [0, 1, 2, 4]
        assert caplog.messages == []
        assert protected_ids(tokenizer, [" Yes ", "now", "é"]) == [0, 1, 2, 3, 4]
    assert caplog.messages == [
        "These words are several tokens, all of which are kept: 'now' (no ##w).",
        "The tokenizer has no tokens for 'é', so nothing keeps them.",
    ]

    vocab = {"Ġ": 0, "Y": 1, "y": 2, "ĠY": 3, "Ġy": 4}
    byte_level = backed_by(models.BPE(vocab, [("Ġ", "Y"), ("Ġ", "y")]), pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert protected_ids(byte_level) == [0, 1, 2]
    assert protected_ids(byte_level, ["Y"]) == [0, 1, 2, 3, 4]


# --- refusals


def words(**attributes) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    return backed_by(models.WordLevel(vocab, unk_token="<unk>"), unk_token="<unk>", **attributes)


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
    tokenizer = backed_by(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
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
        prune_tokenizer(backed_by(model), [0])


def test_special_token_outside_the_vocabulary_is_refused():
    tokenizer = words()
    tokenizer.pad_token = "<pad>"
    with pytest.raises(ValueError, match=r"special tokens \['<pad>'\] are not in its vocabulary"):
        prune_tokenizer(tokenizer, [0, 1])


def test_unknown_model_type_is_refused():
    backend = types.SimpleNamespace(to_str=lambda: '{"model": {"type": "Novel"}}')
    with pytest.raises(ValueError, match="model is of type 'Novel'"):
        protected_ids(types.SimpleNamespace(backend_tokenizer=backend))
