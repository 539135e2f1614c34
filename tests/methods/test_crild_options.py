"""CR-ILD's options: what the presets decide, and what is refused."""

from __future__ import annotations

import pytest

from fastkd.methods.crild import CRILDOptions


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("preset", ["paper"]),
        ("objects", ["AX", "", "AHA"]),
        ("consistency_objects", ["Q", "P", "AA"]),
        ("layers", ["first", "uniform"]),
        ("consistency_weight", [-0.1, float("nan")]),
        ("ema_decay", [1.0, -0.1]),
        ("relation_heads", [0]),
        ("temperature", [0.0]),
        ("label_weight", [-1.0]),
    ],
)
def test_bad_options_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}={value!r} "):
            CRILDOptions(**{name: value})


def test_presets_and_what_is_given_beside_them():
    common = {
        "consistency_weight": 0.1,
        "layers": "last",
        "mixup": True,
        "ramp": "epoch",
        "padding": "include",
        "form": "cross_entropy",
    }
    baseline = {**common, "consistency_weight": 0.0, "layers": "uniform", "mixup": False}
    for preset, objects, consistent, others in (
        ("consistency", "AH", "AH", {**common, "ramp": "step", "padding": "exclude", "form": "kl"}),
        ("paper_script", "QKV", "", common),
        ("tinybert", "AH", "AH", baseline),
        ("pkd", "P", "", baseline),
    ):
        assert vars(CRILDOptions(preset=preset).resolved()) == {"objects": objects, "consistency_objects": consistent, **others}
    assert CRILDOptions(objects="VPAQ").resolved().consistency_objects == "VAQ"
    assert CRILDOptions(preset="paper_script", objects="VPAQ").resolved().consistency_objects == "A"
    assert CRILDOptions(layers="uniform", consistency_objects="").resolved().objects == "AH"
