"""Reading config.json: every spelling gives the same Config, and every bad value one line that names it."""
import json

import pytest

from model.config import Config, RopeScaling, TextConfig, VisionConfig
from weights.config_file import config_from_dict, read_config

SMALL = {
    "model_type": "mllama", "image_token_index": 60,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
                    "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_layers_indices": [1, 2]}}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
INSTRUCT = Config(VisionConfig(image_size=560),
                  TextConfig(rope_scaling=RopeScaling(), eos_token_id=(128001, 128008, 128009)))
OFFICIAL = {"model_type": "mllama", "image_token_index": 128256, "torch_dtype": "bfloat16",
            "text_config": {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 40,
                            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
                            "rope_scaling": ROPE, "rope_theta": 500000.0,
                            "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "top_k": 50},
            "vision_config": {"attention_heads": 16, "image_size": 560, "vision_output_dim": 7680,
                              "intermediate_layers_indices": [3, 7, 15, 23, 30], "max_num_tiles": 4}}
SPELLINGS = {
    "official": OFFICIAL,
    "transformers 5": {"model_type": "mllama", "image_token_id": 128256, "dtype": "bfloat16",
                       "text_config": {"rope_parameters": ROPE | {"rope_theta": 500000.0},
                                       "eos_token_id": [128001, 128008, 128009]},
                       "vision_config": {"num_attention_heads": 16, "image_size": 560}},
    "defaults left out": {"model_type": "mllama", "vision_config": {"image_size": 560},
                          "text_config": {"rope_scaling": ROPE, "eos_token_id": [128001, 128008, 128009]}},
    "an older key": {"model_type": "mllama", "vision_config": {"image_size": 560},
                     "text_config": {"rope_scaling": {"type": "llama3"},
                                     "eos_token_id": [128001, 128008, 128009]}},
    "nulls": {"model_type": "mllama",
              "vision_config": {"image_size": 560, "max_num_tiles": None, "supported_aspect_ratios": None},
              "text_config": {"rope_scaling": ROPE, "rope_parameters": None, "cross_attention_layers": None,
                              "eos_token_id": [128001, 128008, 128009], "pad_token_id": None}}}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_configuration(spelling, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SPELLINGS[spelling]))
    assert read_config(tmp_path) == INSTRUCT
    assert config_from_dict(SPELLINGS[spelling]) == INSTRUCT        # and it leaves its argument as it is
    hash(INSTRUCT.text)                                             # rotary_frequencies looks it up


def test_values_of_a_configuration():
    plain = config_from_dict({"model_type": "mllama"})
    assert plain == Config() and plain.vision.image_size == 448 and plain.text.rope_scaling is None
    single = config_from_dict({"model_type": "mllama", "text_config": {"eos_token_id": 7}})
    assert single.text.eos_token_id == (7,)
    rope = {"rope_type": "default", "rope_theta": 10000}
    for text in ({"rope_parameters": rope}, {"rope_scaling": None, "rope_theta": 10000}):
        read = config_from_dict({"model_type": "mllama", "text_config": text}).text
        assert read.rope_scaling is None and read.rope_theta == 10000
    vision = INSTRUCT.vision
    assert (vision.patches_per_side, vision.tokens_per_tile, vision.pad_tokens) == (40, 1601, 7)
    assert vision.output_dim == 7680
    assert [vision.ratio_id(*grid) for grid in vision.supported_aspect_ratios] == [1, 2, 3, 4, 5, 6, 7, 8]


BAD_TEXT = [
    ("hidden_size", "4096"), ("hidden_size", 30), ("hidden_size", True), ("hidden_size", 64.5),
    ("vocab_size", 0), ("num_attention_heads", -4), ("num_key_value_heads", 0),
    ("cross_attention_layers", [1, 5]), ("cross_attention_layers", [-1]), ("cross_attention_layers", 3),
    ("cross_attention_layers", ["1"]), ("cross_attention_layers", [1, 1]), ("rms_norm_eps", "tiny"),
    ("tie_word_embeddings", "no"), ("rope_theta", [1]), ("rope_theta", 0), ("rope_scaling", "llama3")]
BAD_VISION = [
    ("hidden_size", 17), ("image_size", [28, 28]), ("image_size", 30), ("norm_eps", "small"),
    ("intermediate_layers_indices", [3]), ("intermediate_layers_indices", []),
    ("intermediate_layers_indices", [1, 1]), ("intermediate_layers_indices", "12"),
    ("supported_aspect_ratios", [[1]]), ("supported_aspect_ratios", 4)]
BAD_ROPE = [("rope_type", "yarn"), ("factor", "8"), ("factor", 0), ("high_freq_factor", 1.0)]
BAD = [("text_config", {key: value}, key) for key, value in BAD_TEXT] + [
    ("vision_config", {key: value}, key) for key, value in BAD_VISION] + [
    ("text_config", {"rope_scaling": ROPE | {key: value}}, key) for key, value in BAD_ROPE] + [
    ("text_config", {"num_attention_heads": 32}, "even head width"),
    ("text_config", {"num_key_value_heads": 3}, "4 query heads"),
    ("vision_config", {"supported_aspect_ratios": [[1, 5]]}, "4 tiles"),
    ("vision_config", {"max_num_tiles": 2}, "2 tiles"),
    ("text_config", [1], "text_config"), ("vision_config", 5, "vision_config"),
    ("image_token_index", "60", "image_token_index"), ("image_token_index", 68, "image_token_index"),
    ("image_token_index", -1, "image_token_index"), ("model_type", "llava", "'llava'")]


@pytest.mark.parametrize("section, value, fragment", BAD, ids=str)
def test_a_bad_value_gets_one_line(section, value, fragment):
    """A line that names what is wrong."""
    value = SMALL[section] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError) as error:
        config_from_dict(SMALL | {section: value})
    assert "\n" not in str(error.value) and fragment in str(error.value), str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"mllama"', "{}", '{"model_type": null}'])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="nowhere"):
        read_config(tmp_path / "nowhere")
