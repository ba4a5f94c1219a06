"""The sampling that a checkpoint suggests."""
import json

import pytest
from helpers import refused

from model.sampling import Sampler
from weights.generation_config import read_sampling


@pytest.mark.parametrize(("settings", "expected"), [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1]}, Sampler(0.6, 0.9)),
    ({"temperature": 1, "top_k": 50, "repetition_penalty": 1.1},
     Sampler(1.0, 1.0, top_k=50, repetition_penalty=1.1)),
    ({"top_p": 0.5, "temperature": None}, Sampler(1.0, 0.5)),
])
def test_what_it_says_and_what_it_leaves_out(tmp_path, settings, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert Sampler(**read_sampling(tmp_path)) == expected


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": 1}, {"temperature": None},
                                      {"repetition_penalty": 1.2}, None])
def test_a_checkpoint_that_suggests_nothing(tmp_path, settings):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with refused("generation_config.json: it suggests no way to sample; give --temperature"):
        read_sampling(tmp_path)


@pytest.mark.parametrize(("settings", "words"), [
    ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    ({"top_p": True}, "top_p must be a number, not True"),
    ({"top_k": 50.0}, "top_k must be a whole number, not 50.0"),
    ([1], "not an object"),
])
def test_what_is_no_number(tmp_path, settings, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with refused(f"generation_config.json: .*{words}"):
        read_sampling(tmp_path)
