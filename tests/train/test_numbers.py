"""Which texts are numbers, in files and flags alike."""

import math

import pytest

from fastkd.train.numbers import decimal_number, whole_number


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("-3", -3), ("+7", 7), ("0o17", 15), ("0x1F", 31)])
def test_whole_numbers(text: str, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("text", ["", "1:30", "1_000", "1.0", "1e3", "0b11", " 1", "1 ", "\u0661", "9" * 5000, "1\n"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no whole number"):
        whole_number(text)


@pytest.mark.parametrize(("text", "number"), [("2e-5", 2e-5), ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), ("-.inf", -math.inf)])
def test_decimal_numbers(text: str, number: float) -> None:
    assert decimal_number(text) == number


def test_no_number_is_one_of_the_decimal_ones() -> None:
    assert math.isnan(decimal_number(".nan"))


@pytest.mark.parametrize("text", ["", "nan", "inf", "Infinity", "1_0.0", "1:30.5", "e5", "1e", "\u0661.0", "1.0\n"])
def test_what_is_no_decimal_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        decimal_number(text)
