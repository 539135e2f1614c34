"""Pruned tokenizers: what they carry over, and what they do once they are saved and opened again."""

import json
import subprocess
import sys
import textwrap

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    models,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from fastkd.vocab.tokenizer import (
    check_pruned_tokenizer,
    protected_ids,
    prune_tokenizer,
)
from fastkd.vocab.tokenizer_backend import id_fields
from tests.tokenizer_kinds import (
    KINDS,
    backed_by,
    byte_bpe_gpt2,
    chosen_ids,
    every_kind,
    fully_kept_lines,
    held_out_lines,
    pruned_pair,
    wordpiece_bert,
)

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
    tokenizer = backed_by(models.Unigram(pieces, unk_id=0), unk_token="<unk>")
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
