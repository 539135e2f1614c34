from types import SimpleNamespace

import pytest
import torch

from fastkd.train.schedule import learning_rate_factor, resolve_warmup


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(37, 0), (37, 5), (37, 37), (4, 9)])
def test_equals_transformers(kind, total, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factor_of = scheduler.lr_lambdas[0]
    for step in range(total):
        factor = learning_rate_factor(kind, step, total_steps=total, warmup_steps=warmup)
        assert factor == pytest.approx(factor_of(step), abs=1e-15), step


def test_glmd_pretraining_schedule():
    """150 000 steps: to 4e-4 over 6 000, cosine to 2e-5 at 120 000, then flat."""
    decay = 120_000
    warmup = resolve_warmup(0.05, decay)
    assert warmup == 6_000

    def rate(step):
        options = {"total_steps": 150_000, "warmup_steps": warmup, "decay_steps": decay, "final_ratio": 0.05}
        return 4e-4 * learning_rate_factor("cosine", step, **options)

    assert rate(0) == 0.0
    assert rate(3_000) == pytest.approx(2e-4)
    assert rate(6_000) == pytest.approx(4e-4)
    assert rate(63_000) == pytest.approx((4e-4 + 2e-5) / 2)  # half-way down
    assert rate(34_500) == pytest.approx(2e-5 + 3.8e-4 * (2 + 2**0.5) / 4)  # a quarter: cos(pi/4)
    assert rate(119_999) > rate(120_000)
    for step in (120_000, 135_000, 149_999, 200_000):
        assert rate(step) == pytest.approx(2e-5, rel=1e-12)


def test_glmd_finetuning_schedule():
    """Linear to a tenth of the peak."""
    factors = [learning_rate_factor("linear", s, total_steps=100, warmup_steps=10, final_ratio=0.1) for s in range(101)]
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


def test_constant():
    assert learning_rate_factor("constant", 0, total_steps=10, warmup_steps=0) == 1.0
    with pytest.raises(ValueError, match="constant_with_warmup"):
        learning_rate_factor("constant", 0, total_steps=10, warmup_steps=3)


@pytest.mark.parametrize(("value", "total"), [(0, 100), (0.0, 100), (0.1, 30), (0.07, 100), (0.05, 7), (1, 100), (500, 100)])
def test_warmup_is_resolved_as_in_transformers(value, total):
    from transformers import TrainingArguments

    assert resolve_warmup(value, total) == TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=value), total)


@pytest.mark.parametrize("value", [-1, -0.1, 2.5])
def test_impossible_warmup_is_refused(value):
    with pytest.raises(ValueError, match="warmup_steps"):
        resolve_warmup(value, 10)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"polynomial.*cosine"):
        learning_rate_factor("polynomial", 0, total_steps=10, warmup_steps=0)
    with pytest.raises(ValueError, match=r"final_ratio=1\.5"):
        learning_rate_factor("linear", 0, total_steps=10, warmup_steps=0, final_ratio=1.5)
