"""A tiny network for the tests of the benchmark, and stand-ins for compiled decoding and transformers."""
import torch

from weights import config_from_dict

CPU = torch.device("cpu")
CONFIG = config_from_dict({
    "model_type": "mllama", "image_token_index": 60,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
                    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "cross_attention_layers": [1, 3], "max_position_embeddings": 512},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 3, "num_global_layers": 1, "intermediate_layers_indices": [1, 2]}})


class Plain:
    """Stands in for Compiled."""

    def __init__(self, decode, device):
        self.decode = decode

    def __call__(self, tokens, cache):
        return self.decode(tokens, cache)


class Twin:
    """Stands in for Peer: this project once more, with the bytes of all tile slots."""
    version = "9.9"

    def __init__(self, model, static=False):
        self.model = model
        self.check_prompts, self.pad_right, self.decode = model.check_prompts, model.pad_right, model.decode

    def encode(self, tiles):
        return self.model.encode([tiles])

    def tokens_seen(self, input_ids, lengths, image):
        return [0] * len(lengths)

    def prefill(self, input_ids, lengths, image, max_new_tokens, pruner=None):
        logits, cache = self.model.prefill(input_ids, lengths, image.expand(len(lengths)), max_new_tokens)
        bytes_of = cache.image_bytes
        cache.image_bytes = lambda: 4 * bytes_of()
        return logits, cache

    def corrected(self):
        return torch.inference_mode()
