"""The soft overlong penalty."""

import pytest

from r1kernels.train.rewards import Sample, Scorer, ScoringConfig


def test_the_penalty_grows_over_the_buffer():
    lengths = [0, 1, 60, 61, 70, 80, 99, 100]
    samples = [Sample("", "", "", tokens=tokens, limit=100) for tokens in lengths]
    with Scorer({"overlong": 1.0}, ScoringConfig(overlong_buffer=40)) as scorer:
        penalties = scorer.score(samples).total
    assert penalties == pytest.approx([0, 0, 0, -1 / 40, -10 / 40, -20 / 40, -39 / 40, -1])


@pytest.mark.parametrize("known", [{"tokens": 5}, {"limit": 5}, {}])
def test_a_sample_without_its_length_is_an_error(known):
    with (
        Scorer({"overlong": 1.0}) as scorer,
        pytest.raises(ValueError, match=r"reward 'overlong' got tokens=.*, limit=.*, expected two numbers"),
    ):
        scorer.score([Sample("", "", "", **known)])
