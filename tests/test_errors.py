"""What was being done, as a note on an exception, and which name a misspelled one means."""

import pytest

from fastkd.errors import doing, nearest, what_was_done


def test_the_innermost_note_is_told() -> None:
    with pytest.raises(KeyError) as caught, doing("writing the model x"), doing("reading the file y"):
        raise KeyError("a")
    assert what_was_done(caught.value) == "reading the file y"


def test_notes_of_others_are_not_told() -> None:
    error = ValueError("a")
    error.add_note("somebody else's")
    assert what_was_done(error) is what_was_done(OSError()) is None


def test_what_goes_well_or_is_no_error_is_left_alone() -> None:
    with doing("reading the file y"):
        pass
    with pytest.raises(SystemExit) as caught, doing("reading the file y"):
        raise SystemExit(3)
    assert what_was_done(caught.value) is None


def test_the_nearest_name_is_the_likeliest() -> None:
    assert nearest("num_atention_heads", ["num_hidden_layers", "num_attention_heads", "hidden_size"]) == "num_attention_heads"
    assert nearest("zzz", ["num_hidden_layers"]) is None
