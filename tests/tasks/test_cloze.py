"""Cloze examples: what is scored where, what is cut, how batches are filled, and every bad row refused."""

import logging
from dataclasses import fields

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastkd.tasks.cloze import collate, encode_examples, label_word_ids
from fastkd.tasks.cloze_task import ClozeTask

TEXT = "the cat sat on the mat , . is it true ? answer : yes no maybe because so rainy day went home"


@pytest.fixture(scope="module")
def wordpiece() -> PreTrainedTokenizerFast:
    """Uncased WordPiece with [CLS] text [SEP], as BERT's; a word the text lacks falls into letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator([TEXT] * 5 + list("abcdefghijklmnopqrstuvwxyz"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]"
    )


def byte_level(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT, "yes", "no"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: no mask token, nothing around the text, offsets without the spaces."""
    tokenizer = byte_level(["<eos>"], eos_token="<eos>", pad_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def bpe_closed() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <s> before and </s> after every text; offsets include the spaces."""
    tokenizer = byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>", pad_token="</s>")
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


VERBALIZER = ClozeTask(kind="verbalizer", template="{premise} is it true? {mask}, {hypothesis}", label_words=("yes", "no"))
CAUSAL_VERBALIZER = ClozeTask(kind="verbalizer", template="{premise} is it true? answer: {mask}", label_words=("yes", "no"))
CHOICES = ClozeTask(kind="choices", template="{premise} so {choice}.", choices_column="endings")
COLUMNS = ClozeTask(kind="choices", template="{premise} so {choice}.", choice_columns=("a", "b", "c"))
CLASSIFICATION = ClozeTask(kind="classification", template="{premise} {hypothesis}", labels=("no", "yes", "maybe"))
ROW = {"premise": "the cat sat on the mat", "hypothesis": "the cat went home", "label": 1}
ENDINGS = {"premise": "rainy day", "endings": ["the cat went home", "zebra"], "label": 0}


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids.tolist())


# --- verbalizer -------------------------------------------------------------------------------------------------------


def test_verbalizer_encoder_scores_the_mask(wordpiece):
    (example,) = encode_examples(VERBALIZER, [ROW], wordpiece, causal=False)
    (ids,), ((position,),) = example.sequences, example.score_positions
    expected = wordpiece("the cat sat on the mat is it true? [MASK], the cat went home").input_ids
    assert ids.tolist() == expected and ids.dtype == np.int32
    assert ids[position] == wordpiece.mask_token_id
    assert example.score_targets == ((),)
    assert example.label == 1


def test_a_mask_token_in_the_data_is_not_the_one_scored(wordpiece):
    (example,) = encode_examples(VERBALIZER, [ROW | {"premise": "[MASK] sat"}], wordpiece, causal=False)
    masks = np.flatnonzero(example.sequences[0] == wordpiece.mask_token_id)
    assert example.score_positions == ((masks[1],),) and len(masks) == 2


def test_verbalizer_decoder_scores_after_the_last_token(bpe, bpe_closed):
    text = "the cat sat on the mat is it true? answer:"
    (example,) = encode_examples(CAUSAL_VERBALIZER, [ROW], bpe, causal=True)
    assert example.sequences[0].tolist() == bpe(text).input_ids  # no space after the colon: it is the word's
    assert example.score_positions == ((len(bpe(text).input_ids) - 1,),)
    (closed,) = encode_examples(CAUSAL_VERBALIZER, [ROW], bpe_closed, causal=True)
    assert closed.sequences[0].tolist() == bpe_closed(text).input_ids[:-1]  # the closing token must not be asked
    assert tokens(bpe_closed, closed.sequences[0])[closed.score_positions[0][0]] == ":"


def test_label_words_are_tokens_as_written_in_place_of_the_mask(wordpiece, bpe):
    assert wordpiece.convert_ids_to_tokens(label_word_ids(VERBALIZER, wordpiece)) == ["yes", "no"]
    assert bpe.convert_ids_to_tokens(label_word_ids(CAUSAL_VERBALIZER, bpe)) == ["Ġyes", "Ġno"]
    glued = ClozeTask(kind="verbalizer", template="{premise} answer:{mask}", label_words=("yes", "no"))
    assert bpe.convert_ids_to_tokens(label_word_ids(glued, bpe)) == ["yes", "no"]


def test_the_scored_place_is_where_the_label_word_would_be(bpe):
    """Appending the label word's token to the sequence gives the ids of the full sentence."""
    (example,) = encode_examples(CAUSAL_VERBALIZER, [ROW], bpe, causal=True)
    word = label_word_ids(CAUSAL_VERBALIZER, bpe)[0]
    assert [*example.sequences[0].tolist(), word] == bpe("the cat sat on the mat is it true? answer: yes").input_ids


def test_a_byte_level_label_word_whose_space_is_a_token_of_its_own_is_refused(bpe, bpe_closed):
    task = ClozeTask(kind="verbalizer", template=CAUSAL_VERBALIZER.template, label_words=("yes", "q"))
    for tokenizer in (bpe, bpe_closed):
        with pytest.raises(ValueError, match=r"'q'.*\['Ġ', 'q'\]"):
            label_word_ids(task, tokenizer)


def test_byte_level_encoder_with_a_lone_space_before_its_mask():
    tokenizer = byte_level(["<mask>"], mask_token="<mask>")
    (example,) = encode_examples(VERBALIZER, [ROW], tokenizer, causal=False)
    mask = example.sequences[0].tolist().index(tokenizer.mask_token_id)
    assert tokens(tokenizer, example.sequences[0])[mask - 1] == "Ġ"
    assert example.score_positions == ((mask,),)
    assert tokenizer.convert_ids_to_tokens(label_word_ids(VERBALIZER, tokenizer)) == ["Ġyes", "Ġno"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("yes", "zebra"), r"'zebra'.*\['z', '##e', '##b', '##r', '##a'\].*kind 'choices'.*\['yes', 'zebra'\]"),
        (("yes", "ß"), r"'ß'.*\['\[UNK\]'\].*one known token"),
        (("yes", "Yes"), r"token ids \[(\d+), \1\]"),
    ],
)
def test_bad_label_words_are_refused(wordpiece, words, message):
    task = ClozeTask(kind="verbalizer", template=VERBALIZER.template, label_words=words)
    with pytest.raises(ValueError, match=message):
        encode_examples(task, [ROW], wordpiece, causal=False)


# --- choices ----------------------------------------------------------------------------------------------------------


def test_choices_encoder_masks_every_answer_token(wordpiece):
    (example,) = encode_examples(CHOICES, [ENDINGS], wordpiece, causal=False)
    assert len(example.sequences) == 2
    for ending, ids, positions, targets in zip(
        ENDINGS["endings"], example.sequences, example.score_positions, example.score_targets, strict=True
    ):
        assert list(targets) == wordpiece(ending, add_special_tokens=False).input_ids and len(targets) > 1
        assert set(ids[list(positions)]) == {wordpiece.mask_token_id}
        restored = ids.copy()
        restored[list(positions)] = targets
        assert restored.tolist() == wordpiece(f"rainy day so {ending}.").input_ids
        assert (ids == wordpiece.mask_token_id).sum() == len(targets)
    assert example.label == 0


@pytest.mark.parametrize("fixture", ["bpe", "bpe_closed"])
def test_choices_decoder_reads_the_answer_and_scores_one_before(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    (example,) = encode_examples(CHOICES, [ENDINGS], tokenizer, causal=True)
    for ending, ids, positions, targets in zip(
        ENDINGS["endings"], example.sequences, example.score_positions, example.score_targets, strict=True
    ):
        assert ids.tolist() == tokenizer(f"rainy day so {ending}.").input_ids
        assert ids[np.array(positions) + 1].tolist() == list(targets)
        assert list(targets) == tokenizer(f" {ending}", add_special_tokens=False).input_ids[: len(targets)]
        assert tokenizer.decode(list(targets)) == f" {ending}"
        assert tokens(tokenizer, ids)[positions[0]] == "Ġso"


def test_fixed_choices_and_choice_columns(wordpiece):
    fixed = ClozeTask(kind="choices", template="{premise} {choice}", choices=("yes", "no", "maybe"), labels=("y", "n", "m"))
    (example,) = encode_examples(fixed, [{"premise": "the mat", "label": "m"}], wordpiece, causal=False)
    assert [wordpiece.decode(list(target)) for target in example.score_targets] == ["yes", "no", "maybe"]
    assert example.label == 2
    rows = [
        {"premise": "day", "a": "yes", "b": None, "c": "home", "label": 2},
        {"premise": "day", "a": "yes", "b": "no", "c": "home", "label": 2},
        {"premise": "day", "a": "yes", "label": 0},
    ]
    encoded = encode_examples(COLUMNS, rows, wordpiece, causal=False)
    assert [len(example.sequences) for example in encoded] == [2, 3, 1]
    assert [example.label for example in encoded] == [1, 2, 0]  # the index among the candidates that are there
    assert wordpiece.decode(list(encoded[0].score_targets[1])) == "home"


def test_a_decoder_cannot_score_the_first_token(bpe, bpe_closed):
    task = ClozeTask(kind="choices", template="{choice}", choices_column="endings")
    with pytest.raises(ValueError, match=r"Row 0.*starts the sequence"):
        encode_examples(task, [ENDINGS], bpe, causal=True)
    (example,) = encode_examples(task, [ENDINGS], bpe_closed, causal=True)
    assert example.score_positions[0][0] == 0  # after <s>


# --- classification and labels ----------------------------------------------------------------------------------------


def test_classification_is_the_text_alone(wordpiece, bpe_closed):
    (example,) = encode_examples(CLASSIFICATION, [ROW | {"label": "maybe"}], wordpiece, causal=False)
    assert example.sequences[0].tolist() == wordpiece("the cat sat on the mat the cat went home").input_ids
    assert example.score_positions == ((),) and example.score_targets == ((),)
    assert example.label == 2
    assert CLASSIFICATION.num_labels == 3 and VERBALIZER.num_labels == 2 and CHOICES.num_labels == 0
    batch = collate([example], pad_id=0)
    assert batch.score_positions.shape == (1, 0) and batch.choice_mask.tolist() == [[True]]
    (closed,) = encode_examples(CLASSIFICATION, [ROW], bpe_closed, causal=True)
    assert closed.sequences[0].tolist() == bpe_closed("the cat sat on the mat the cat went home").input_ids


@pytest.mark.parametrize("task", [VERBALIZER, CLASSIFICATION, CHOICES])
def test_unlabeled_rows(task, wordpiece):
    row = ROW | ENDINGS
    del row["label"]
    rows = [row, row | {"label": None}, row | {"label": -1}, row | {"label": 1}]
    encoded = encode_examples(task, rows, wordpiece, causal=False)
    assert [example.label for example in encoded] == [-1, -1, -1, 1]


def test_label_values_and_indices(wordpiece):
    def encoded_label(labels, value):
        task = ClozeTask(kind="classification", template="{premise}", labels=labels)
        return encode_examples(task, [{"premise": "cat", "label": value}], wordpiece, causal=False)[0].label

    assert encoded_label(("no", "yes"), "yes") == 1
    assert encoded_label(("no", "yes"), 1) == 1  # the class index of a ClassLabel column
    assert encoded_label((5, 3), 3) == 1  # values, not indices
    assert encoded_label((False, True), True) == 1
    for labels, value in [(("no", "yes"), "maybe"), (("no", "yes"), 2), ((5, 3), 0), (("no", "yes"), 1.0)]:
        with pytest.raises(ValueError, match=rf"Row 0 .*: column 'label' holds {value!r}; it must be one of labels"):
            encoded_label(labels, value)


# --- cutting ----------------------------------------------------------------------------------------------------------


def test_the_longest_column_is_cut_and_the_mask_stays(wordpiece, caplog):
    task = ClozeTask(kind="verbalizer", template="{premise} so {mask}, {hypothesis}", label_words=("yes", "no"), max_length=16)
    rows = [ROW, {"premise": "the cat " * 40, "hypothesis": "the mat"}, {"premise": "day", "hypothesis": "home " * 40}]
    with caplog.at_level(logging.WARNING):
        encoded = encode_examples(task, rows, wordpiece, causal=False)
    assert "2 of 3 rows were cut to max_length=16" in caplog.text
    first, second, third = (example.sequences[0] for example in encoded)
    assert len(first) == 15 and len(second) == len(third) == 16
    for example in encoded:
        assert example.sequences[0][example.score_positions[0][0]] == wordpiece.mask_token_id
    kept = ["the", "cat"] * 4 + ["the"]
    assert tokens(wordpiece, second) == ["[CLS]", *kept, "so", "[MASK]", ",", "the", "mat", "[SEP]"]
    assert tokens(wordpiece, third) == ["[CLS]", "day", "so", "[MASK]", ",", *["home"] * 10, "[SEP]"]


def test_cutting_levels_the_columns(wordpiece):
    task = ClozeTask(kind="classification", template="{premise} ? {hypothesis}", labels=(0, 1), max_length=10)
    row = {"premise": "cat " * 8, "hypothesis": "mat " * 6}
    (example,) = encode_examples(task, [row], wordpiece, causal=False)
    cut = tokens(wordpiece, example.sequences[0])
    assert len(cut) == 10
    assert sorted([cut.count("cat"), cut.count("mat")]) == [3, 4]


@pytest.mark.parametrize("causal", [False, True])
def test_multi_token_answers_survive_cutting(causal, wordpiece, bpe_closed):
    tokenizer = bpe_closed if causal else wordpiece
    task = ClozeTask(kind="choices", template="{premise} so {choice}.", choices_column="endings", max_length=14)
    row = ENDINGS | {"premise": "rainy day " * 30}
    (uncut,) = encode_examples(CHOICES, [row], tokenizer, causal=causal)
    (example,) = encode_examples(task, [row], tokenizer, causal=causal)
    assert example.score_targets == uncut.score_targets
    for ids, positions, targets in zip(example.sequences, example.score_positions, example.score_targets, strict=True):
        assert len(ids) == 14
        if causal:
            assert ids[np.array(positions) + 1].tolist() == list(targets)
        else:
            assert set(ids[list(positions)]) == {tokenizer.mask_token_id}


def test_a_decoder_is_asked_at_the_template_end_after_cutting(bpe):
    task = ClozeTask(kind="verbalizer", template="{premise} answer: {mask}", label_words=("yes", "no"), max_length=8)
    (example,) = encode_examples(task, [{"premise": " ".join(["cat"] * 50)}], bpe, causal=True)
    assert len(example.sequences[0]) == 8
    assert example.score_positions == ((7,),)
    assert bpe.decode(example.sequences[0]).endswith("cat answer:")


def test_a_decoder_keeps_the_last_token_of_a_column_that_ends_the_text(bpe):
    task = ClozeTask(kind="verbalizer", template="{premise} {mask}", label_words=("yes", "no"), max_length=4)
    (example,) = encode_examples(task, [{"premise": "the cat sat on the mat is it true?"}], bpe, causal=True)
    assert tokens(bpe, example.sequences[0]) == ["the", "Ġcat", "Ġsat", "?"]
    assert example.score_positions == ((3,),)


def test_a_template_that_cannot_fit_is_refused(wordpiece):
    task = ClozeTask(kind="choices", template="{premise} so {choice}.", choices_column="endings", max_length=5)
    with pytest.raises(ValueError, match=r"Row 1 .* take 8 tokens, more than max_length=5; raise max_length"):
        encode_examples(task, [ENDINGS | {"endings": ["yes"]}, ENDINGS], wordpiece, causal=False)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (VERBALIZER, {"premise": "cat"}, "column 'hypothesis' holds None"),
        (VERBALIZER, {"premise": ["cat"], "hypothesis": "mat"}, r"column 'premise' holds \['cat'\]"),
        (VERBALIZER, ROW | {"label": 2}, "column 'label' holds 2; it must be an index below 2"),
        (VERBALIZER, ROW | {"label": "yes"}, "column 'label' holds 'yes'; .*set labels"),
        (CHOICES, ENDINGS | {"endings": []}, "column 'endings' gives no candidate"),
        (CHOICES, ENDINGS | {"endings": "cat"}, "column 'endings' holds 'cat', not a list"),
        (CHOICES, ENDINGS | {"endings": ["cat", " "]}, "column 'endings' holds the empty candidate ' '"),
        (CHOICES, ENDINGS | {"endings": ["cat", "\x00"]}, "a candidate has no token"),
        (CHOICES, ENDINGS | {"endings": ["cat", True]}, "column 'endings' holds True"),
        (CHOICES, ENDINGS | {"label": 2}, "column 'label' holds 2; it must be an index below 2"),
        (COLUMNS, {"premise": "cat", "label": 0}, r"column \['a', 'b', 'c'\] gives no candidate"),
        (COLUMNS, {"premise": "cat", "a": "yes", "c": "no", "label": 1}, ".*candidate 1, which is absent"),
    ],
)
def test_bad_rows_are_named(task, row, message, wordpiece):
    good = ROW | ENDINGS | {"a": "yes", "b": "no", "c": "home", "label": 1}
    with pytest.raises(ValueError, match=rf"Row 1 \(the first is 0\) of the examples: {message}"):
        encode_examples(task, [good, row], wordpiece, causal=False)


def test_row_numbers_count_on_across_blocks(wordpiece):
    rows = [ROW] * 300
    assert len(encode_examples(VERBALIZER, rows, wordpiece, causal=False)) == 300
    with pytest.raises(ValueError, match="Row 300 "):
        encode_examples(VERBALIZER, [*rows, {}], wordpiece, causal=False)


def test_bad_tokenizers_and_columns_are_refused(wordpiece, bpe):
    with pytest.raises(ValueError, match="no mask token, which kind 'choices' needs"):
        encode_examples(CHOICES, [ENDINGS], bpe, causal=False)
    with pytest.raises(ValueError, match=r"must end with \{mask\}"):
        encode_examples(VERBALIZER, [ROW], bpe, causal=True)
    with pytest.raises(ValueError, match=r"There is no column 'c' in the examples: it has 'premise', 'a', 'b'"):
        encode_examples(COLUMNS, [{"premise": "cat", "a": "x", "b": "y"}], wordpiece, causal=False)
    task = ClozeTask(kind="verbalizer", template="{premise} {mask}", label_words=("yes", "no"))
    with pytest.raises(ValueError, match=r"Row 0 .*: .*leaves no text before \{mask\}"):
        encode_examples(task, [{"premise": ""}], bpe, causal=True)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collate_fills_short_lists_with_candidate_zero(wordpiece):
    rows = [
        {"premise": "day", "endings": ["zebra", "the cat went home", "no"], "label": 1},
        {"premise": "rainy day", "endings": ["maybe", "yes"]},
    ]
    encoded = encode_examples(CHOICES, rows, wordpiece, causal=False)
    batch = collate(encoded, pad_id=wordpiece.pad_token_id)
    assert (batch.num_examples, batch.num_choices) == (2, 3)
    assert batch.choice_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.labels.tolist() == [1, -1]
    assert batch.input_ids.shape == (6, 16)  # the longest sequence has 10 tokens
    for field in fields(batch):
        if field.name not in ("choice_mask", "labels"):
            tensor = getattr(batch, field.name)
            assert torch.equal(tensor[5], tensor[3]), field.name  # row (1, 2) repeats row (1, 0)
    for line, (example, choice) in enumerate([(encoded[0], 0), (encoded[0], 1), (encoded[0], 2), (encoded[1], 0)]):
        ids, scored = example.sequences[choice].tolist(), len(example.score_positions[choice])
        assert batch.input_ids[line].tolist() == ids + [wordpiece.pad_token_id] * (16 - len(ids))
        assert batch.attention_mask[line].tolist() == [1] * len(ids) + [0] * (16 - len(ids))
        assert batch.score_mask[line].tolist() == [True] * scored + [False] * (5 - scored)
        assert batch.score_positions[line].tolist() == [*example.score_positions[choice], *[0] * (5 - scored)]
        assert batch.score_targets[line].tolist() == [*example.score_targets[choice], *[-100] * (5 - scored)]


def test_collate_of_a_verbalizer_and_dtypes(wordpiece):
    encoded = encode_examples(VERBALIZER, [ROW, ROW | {"premise": "day"}], wordpiece, causal=False)
    batch = collate(encoded, pad_id=0, pad_to_multiple_of=1).to("cpu")
    assert batch.input_ids.shape == (2, max(len(example.sequences[0]) for example in encoded))
    picked = batch.input_ids.gather(1, batch.score_positions)
    assert picked.tolist() == [[wordpiece.mask_token_id]] * 2
    assert batch.score_mask.all() and batch.choice_mask.shape == (2, 1)
    assert (batch.score_targets == -100).all()
    integers = (batch.input_ids, batch.attention_mask, batch.score_positions, batch.score_targets, batch.labels)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.score_mask.dtype == batch.choice_mask.dtype == torch.bool
    assert batch.to("meta").input_ids.device.type == batch.to("meta").labels.device.type == "meta"
    with pytest.raises(ValueError, match="examples is empty"):
        collate([], pad_id=0)
