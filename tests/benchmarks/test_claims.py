"""Every claim runs, by the command line, on tiny shapes, and leaves its record; the checks see what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastkd.benchmarks import CLAIMS, checks, claim, eager
from fastkd.cli.main import main


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert main(["bench", "--smoke", "--device", "cpu", "--output", str(folder)]) == 0
    return {path.stem.removesuffix("_cpu"): json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_all_claims_leave_a_record(records):
    assert set(records) == set(CLAIMS)
    for name, record in records.items():
        assert record["claim"] == name and record["device"] == "cpu" and record["smoke"] is True and record["repeats"] == 1
        assert record["environment"]["versions"]["torch"] == torch.__version__ and record["environment"]["threads"] >= 1
        assert record["results"]


def test_linear_kl(records):
    rows = {row["implementation"]: row for row in records["linear_kl"]["results"]}
    assert rows["GEMMs alone"]["ratio_to_gemms"] == 1.0 and rows["GEMMs alone, float32"]["seconds"]["rounds"] == 1
    for row in rows.values():
        assert row["ratio_to_gemms"] == pytest.approx(row["seconds"]["median"] / rows["GEMMs alone"]["seconds"]["median"])
    for target, ours, theirs in zip(
        (4e-4, 4e-3, 3e-2), rows["fastkd torch"]["gradient_error"], rows["eager"]["gradient_error"], strict=True
    ):
        assert ours["kl"] == pytest.approx(target, rel=0.05)
        assert max(ours["student"], ours["head"]) < 5e-3 < min(theirs["student"], theirs["head"])


def test_accuracy(records):
    for row in records["accuracy"]["results"]:
        if row["implementation"].startswith("fastkd"):
            assert max(row["student"], row["head"]) < (5e-3 if row["dtype"] == "bfloat16" else 1e-3)


def test_row_kernel(records):
    for row in records["row_kernel"]["results"]:
        assert row["bytes_per_second"] == pytest.approx(1e9 * 4 * row["accesses_per_element"] / row["nanoseconds_per_element"])


def test_grad_filter(records):
    coarse, fine = records["grad_filter"]["results"]
    assert coarse["threshold"] > fine["threshold"] and coarse["columns_kept"] < fine["columns_kept"] <= 1
    assert coarse["student_error"] > fine["student_error"] and fine["head_cosine"] > 0.999


def test_relation_kl_and_projected_mse(records):
    relation, filtered = records["relation_kl"], records["projected_mse"]
    assert {row["targets"] for row in relation["results"]} == {1, 3}
    for count in (1, 3):
        check_beside_eager([row for row in relation["results"] if row["targets"] == count], ["value", "q", "k"])
    check_beside_eager(filtered["results"], ["value", "states", "weight", "bias"])


def check_beside_eager(results, judged):
    rows = {row["implementation"]: row for row in results}
    floor, eager = rows.pop("GEMMs alone"), rows["eager"]
    assert floor["ratio_to_gemms"] == eager["ratio_to_eager"] == 1.0 and floor["errors"] is None
    assert any(name.startswith("fastkd") for name in rows)
    for row in rows.values():
        assert row["ratio_to_gemms"] == pytest.approx(row["seconds"]["median"] / floor["seconds"]["median"])
        assert row["ratio_to_eager"] == pytest.approx(row["seconds"]["median"] / eager["seconds"]["median"])
        assert list(row["errors"]) == judged and 0 < max(row["errors"].values()) < 2e-5


def test_a_peer_that_fails_is_left_out_and_ours_is_not(tmp_path):
    settings = claim.Settings(torch.device("cpu"), 1, 1.0, smoke=True, output=tmp_path, pair=None)

    def fail(inputs):
        raise RuntimeError("no compiler")

    def run(found):
        return eager.beside_eager(settings, found, lambda name: (list, lambda: found[name](None)), None, lambda run: {})

    found = {"GEMMs alone": lambda inputs: (), "eager": fail, "fastkd": lambda inputs: ()}
    rows, failed = run(found)
    assert failed == {"eager": "RuntimeError: no compiler"}
    assert [(row["implementation"], row["ratio_to_eager"]) for row in rows] == [("GEMMs alone", None), ("fastkd", None)]
    with pytest.raises(RuntimeError, match="no compiler"):
        run({**found, "fastkd": fail})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["linear_k"], "There is no claim 'linear_k'; there are linear_kl, masked"),
        (["grad_filter"], "--pair DIR, the output folder of `fastkd quickstart`"),
        (["grad_filter", "--pair", "/no/where"], "--pair /no/where holds no trained teacher"),
        (["masked", "--repeats", "0"], "--repeats 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, sentence, tmp_path, capsys):
    assert main(["bench", *arguments, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_claim_without_a_pair_is_left_out_by_default(tmp_path):
    settings = claim.Settings(torch.device("cpu"), 1, 1.0, smoke=False, output=tmp_path, pair=None)
    assert claim.default_claims(settings) == [name for name in CLAIMS if name != "grad_filter"]


def test_checks_pass_here_and_see_a_broken_backend(tmp_path, monkeypatch):
    settings = claim.Settings(torch.device("cpu"), 1, 1.0, smoke=True, output=tmp_path, pair=None)
    assert all(row["passed"] for row in checks.run_checks(settings, "torch"))
    own = checks.fused
    monkeypatch.setattr(checks, "fused", lambda *inputs, **options: 1.01 * own(*inputs, **options))
    doctors = checks.check_ops
    monkeypatch.setattr(checks, "check_ops", lambda *given: [replace(check, failure="broken") for check in doctors(*given)])
    assert not any(row["passed"] for row in checks.run_checks(settings, "torch"))


def test_the_row_check_sees_a_kernel_that_is_wrong(monkeypatch):
    kinds = dict(checks.row_kinds("triton", torch.device("cpu")))
    kind = kinds["16-bit logits, 16 divides V"]
    assert len(kinds) == 26 and kind.aligned_vocabulary and kind.student == "bfloat16"
    assert checks.framed_rows("torch", kind, torch.device("cpu")) == "right"
    monkeypatch.setattr(checks.MODULES["torch"], "run", lambda call: None)
    with pytest.raises(AssertionError, match="its divergence is off by nan"):
        checks.framed_rows("torch", kind, torch.device("cpu"))
