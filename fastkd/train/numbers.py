"""The numbers that a text may be, by the core schema of YAML 1.2: in a configuration's file and in its flags alike."""

import re

WHOLE = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
DECIMAL = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
NOT_FINITE = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


def whole_number(text: str) -> int:
    """The integer that a text is; ValueError if it is none."""
    if not re.fullmatch(WHOLE, text) or len(text) > 100:
        raise ValueError(f"{text[:100]!r} is no whole number")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def decimal_number(text: str) -> float:
    """The float that a text is; ValueError if it is none."""
    if re.fullmatch(NOT_FINITE, text):
        return float(text.replace(".", ""))
    if not re.fullmatch(DECIMAL, text):
        raise ValueError(f"{text[:100]!r} is no number")
    return float(text)
