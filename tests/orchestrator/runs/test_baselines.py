"""Baselines: against the formula written out with counters, and on texts whose entropy is known."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runs.data import PRIOR_STRENGTH, baseline_losses, load_data


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def brute_force(train: bytes, validation: bytes, order: int) -> float:
    """The same interpolation, one byte at a time."""

    def probability(context: bytes, byte: bytes) -> float:
        if len(context) == 0:
            shorter, gram, seen = 1 / 256, 1, len(train)
        else:
            shorter, gram = probability(context[1:], byte), len(context) + 1
            contexts = Counter(train[i : i + gram - 1] for i in range(len(train) - gram + 1))
            seen = contexts[context]
        grams = Counter(train[i : i + gram] for i in range(len(train) - gram + 1))
        return (grams[context + byte] + PRIOR_STRENGTH * shorter) / (seen + PRIOR_STRENGTH)

    places = range(2, len(validation))
    losses = [-math.log(probability(validation[i - order + 1 : i], validation[i : i + 1])) for i in places]
    return sum(losses) / len(losses)


@given(train=st.binary(min_size=1, max_size=30), validation=st.binary(min_size=3, max_size=12))
def test_losses_equal_counting_one_byte_at_a_time(train: bytes, validation: bytes) -> None:
    found = baseline_losses(as_bytes(train), as_bytes(validation))
    expected = [brute_force(train, validation, order) for order in (1, 2, 3)]
    assert list(found.values()) == pytest.approx(expected)


def test_more_context_helps_on_text_that_repeats() -> None:
    text = as_bytes(b"abac" * 1000)
    found = baseline_losses(text, text[:400])
    assert found["unigram"] == pytest.approx(1.5 * math.log(2), abs=0.01)
    assert found["bigram"] == pytest.approx(0.5 * math.log(2), abs=0.03)
    assert found["trigram"] == pytest.approx(0, abs=0.05)


def test_default_text_has_the_baselines_that_a_model_must_beat() -> None:
    data = load_data("builtin:english", seq=128, seed=0)
    found = baseline_losses(data.train, data.validation)
    assert list(found) == ["unigram", "bigram", "trigram"]
    assert 3.0 < found["unigram"] < 3.6
    assert 1.8 < found["trigram"] < 2.2 < found["bigram"] < 2.8
