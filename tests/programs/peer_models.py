"""What the tests of the benchmark's peer share: small networks, ours and transformers', and prompts."""
import torch
from helpers import randomise
from torch import Tensor

from benchmarks.peer import Peer
from model.config import Config, RopeScaling, TextConfig, VisionConfig
from model.llama_vision import LlamaVision
from weights import load_model

TEXT = TextConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
                  num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=(1, 3))
SHAPES = {
    "plain": Config(VisionConfig(16, 32, 2, 3, 1, 28, intermediate_layers_indices=(1, 2)), TEXT, 60),
    # a tap of the first layer's input, one key/value head, stretched rotary frequencies, a padding token that
    # the embedding does not hold
    "odd": Config(VisionConfig(24, 40, 3, 2, 2, 16, 8, intermediate_layers_indices=(0, 1)),
                  TextConfig(50, 48, 40, 4, num_attention_heads=3, num_key_value_heads=1,
                             cross_attention_layers=(2,), rope_theta=10000.0,
                             rope_scaling=RopeScaling(original_max_position_embeddings=16)), 50),
}


def make(name: str) -> tuple[LlamaVision, dict[bool, Peer]]:
    """Ours, and transformers without and with a static cache."""
    if name == "tiny":
        ours = load_model("tiny", dtype="fp32").requires_grad_(False)
    else:
        ours = randomise(LlamaVision(SHAPES[name]), SHAPES[name].vision, seed=1).requires_grad_(False)
    return ours, {static: Peer(ours, static) for static in (False, True)}


def prompts(config: Config, batch: int, images: int = 1) -> Tensor:
    """Text, the images side by side, text: other text in every sequence, of the same length."""
    ids = torch.randint(3, 50, (batch, 11), generator=torch.Generator().manual_seed(batch))
    ids[:, 4:4 + images] = config.image_token_index
    return ids
