"""Reading config.json: every spelling gives the same Config, and every bad value one line that names it."""
import json

import pytest
import torch

from model.config import Config, RopeScaling, TextConfig, VisionConfig
from model.layers import rotary_frequencies
from weights.config_file import config_from_dict, read_config
from weights.messages import quoted

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


NESTED = []
for _ in range(500):
    NESTED = [NESTED]
NAN, INFINITE, LONG = float("nan"), float("inf"), 10 ** 400         # json reads all three
NO_SIZE = (0, -4, 64.5, True, "4096", [32], {}, NESTED, 10 ** 25, LONG, NAN, INFINITE, 2 ** 31)
NO_NUMBER = (True, "tiny", [1e-5], {}, NESTED, NAN, INFINITE, -INFINITE, LONG, -LONG, -1)
NO_LAYERS = (3, "12", [[1]], ["1"], [1.0], [True], [1, 1], [1, 0], [-1], [5], [LONG], [], {}, NESTED)
BAD_TEXT = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"), NO_SIZE),
    "num_hidden_layers": (*NO_SIZE, 501),
    "cross_attention_layers": NO_LAYERS,
    "rms_norm_eps": (*NO_NUMBER, 0, 1e-320, 1e-13, 1.5),
    "rope_theta": (*NO_NUMBER, 0, 0.5, 1e300, 10 ** 19),
    "tie_word_embeddings": ("no", 1, 0, [True], NAN),
    "eos_token_id": ("end", 1.5, True, [True], [[1]], {"a": 1}, NESTED),
    "rope_scaling": ("llama3", ["llama3"], 8, True, False, 0, "", []),
    "rope_parameters": (["llama3"], 1, [], "")}
BAD_VISION = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "patch_size", "num_channels",
                     "max_num_tiles", "attention_heads"), NO_SIZE),
    "num_hidden_layers": (*NO_SIZE, 501), "num_global_layers": (*NO_SIZE, 501),
    "norm_eps": (*NO_NUMBER, 0, 1e-320, 1.5),
    "intermediate_layers_indices": NO_LAYERS,
    "supported_aspect_ratios": (4, "11", [], [[1]], [1, 2], [[1, 1, 1]], [[1, 0]], [[1, -1]], [[1, 1.0]],
                                [[True, 1]], [[1, LONG]], [[1, 5]], {}, NESTED)}
BAD_ROPE = {
    "rope_type": ("yarn", 5, True, [], NESTED),
    "factor": (*NO_NUMBER, 0, 0.5, 1e-300, 1e7), "high_freq_factor": (*NO_NUMBER, 1.0, 1e7),
    "low_freq_factor": (*NO_NUMBER, 4.0, 1e7), "original_max_position_embeddings": NO_SIZE}
SPELLED = {"attention_heads": "num_attention_heads"}
BAD = [(section, {key: value}, SPELLED.get(key, key)) for section, table in
       (("text_config", BAD_TEXT), ("vision_config", BAD_VISION)) for key, values in table.items()
       for value in values]
BAD += [("text_config", {name: ROPE | {key: value}}, key) for name in ("rope_scaling", "rope_parameters")
        for key, values in BAD_ROPE.items() for value in values]
BAD += [("text_config", {"rope_parameters": {"rope_theta": value}}, "rope_theta")
        for value in (0, 1e300, NAN)]
BAD += [
    ("text_config", {"rope_scaling": {"factor": 8.0}}, "a factor but no rope_type"),
    ("text_config", {"hidden_size": 30}, "does not divide into 4 heads"),
    ("vision_config", {"hidden_size": 17}, "does not divide into 2 heads"),
    ("text_config", {"num_attention_heads": 32}, "even head width"),
    ("text_config", {"num_key_value_heads": 3}, "4 query heads"),
    ("text_config", {"cross_attention_layers": []}, "no layer would see the image"),
    ("text_config", {"cross_attention_layers": [0, 1, 2, 3, 4]}, "no layer would see the text"),
    ("vision_config", {"image_size": 30}, "no multiple of patch_size"),
    ("vision_config", {"intermediate_layers_indices": []}, "reads at least one layer"),
    ("vision_config", {"max_num_tiles": 2}, "2 tiles"),
    ("vision_config", {"num_channels": 1}, "images have 3 colours")]
BAD += [(section, value, section) for section in ("text_config", "vision_config")
        for value in ([1], [], 5, 0, "", False, NESTED)]
BAD += [(name, value, "image_token_index") for name in ("image_token_index", "image_token_id")
        for value in ("60", 2 ** 31, -1, True, 1.0, NAN, LONG, [], NESTED)]
BAD += [("model_type", value, "not 'mllama'") for value in ("llava", None, 5, True, ["mllama"], {}, NESTED)]


def labels(value: object) -> str:
    """A short name of a test's value."""
    return quoted(value, 40)


@pytest.mark.parametrize("section, value, fragment", BAD, ids=labels)
def test_a_bad_value_gets_one_line(section, value, fragment):
    """A line that names what is wrong."""
    value = SMALL.get(section, {}) | value if isinstance(value, dict) and value else value
    data = {key: old for key, old in SMALL.items() if not (section == "image_token_id" and "token" in key)}
    with pytest.raises(ValueError) as error:
        config_from_dict(data | {section: value})
    line = str(error.value)
    assert line.isprintable() and fragment in line and len(line) < 300, line


@pytest.mark.parametrize("text", ["{", "[]", "null", '"mllama"', "{}", '{"model_type": null}', "5", "NaN",
                                  "true", "[" * 10 ** 5, '{"model_type": "mllama", "x": ' + "[" * 10 ** 5,
                                  '{"model_type": "mllama", "x": ' + "9" * 10 ** 4 + "}"], ids=labels)
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    line = str(error.value)
    assert line.isprintable() and line.startswith(f"{path}: ") and len(line) < 300 + len(str(path))
    with pytest.raises(ValueError, match="nowhere"):
        read_config(tmp_path / "nowhere")


def test_unknown_keys_may_hold_anything():
    strange = {"x": NESTED, "y": LONG, "z": NAN, "pad_token_id": -1}
    assert config_from_dict(SMALL | strange) == config_from_dict(SMALL)
    inside = {name: SMALL[name] | strange for name in ("text_config", "vision_config")}
    assert config_from_dict(SMALL | inside) == config_from_dict(SMALL)


def test_values_at_the_ends_of_their_ranges_give_finite_angles():
    for theta in 1, 1e18:
        for factor, low, high in (1, 0, 1e-6), (1e6, 0, 1e6), (8, 1, 1 + 1e-12), (1, 999_999, 1e6):
            rope = ROPE | {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            for context in 1, 2 ** 31 - 1:
                rope["original_max_position_embeddings"] = context
                text = SMALL["text_config"] | {"rope_scaling": rope, "rope_theta": theta}
                config = config_from_dict(SMALL | {"text_config": text}).text
                frequencies = rotary_frequencies(config, torch.device("cpu"))
                assert frequencies.isfinite().all() and (frequencies > 0).all()
