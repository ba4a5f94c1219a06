"""The official models by their sizes, without files: what config.json of each of them says."""
from dataclasses import replace

from model.config import Config, RopeScaling, TextConfig, VisionConfig

ELEVEN = Config(VisionConfig(image_size=560), TextConfig(rope_scaling=RopeScaling()))
NINETY = replace(ELEVEN, text=replace(
    ELEVEN.text, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=100,
    cross_attention_layers=tuple(range(3, 100, 5))))
OFFICIAL = {"11b": ELEVEN, "90b": NINETY,                       # Llama Guard 3 Vision has the shape of 11B
            "11b-base": replace(ELEVEN, vision=VisionConfig()),         # base models: tiles of 448 pixels
            "90b-base": replace(NINETY, vision=VisionConfig())}
