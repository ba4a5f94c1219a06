"""What the bundled checkpoint is: a small Llama-3.2-Vision of the real architecture, and its tokenizer.

It has every mechanism of the large models: tiles, local and gated global layers, tapped states, gated
cross-attention between self-attention layers, llama3 rotary scaling, the Llama-3 special tokens and chat
format. Only the sizes differ. `write_folder` writes everything except the weights, laid out like a hub
repository.
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.config import Config
from scenes.draw import COLOURS, SHAPES, make_scene
from scenes.questions import questions
from weights import config_from_dict
from weights.files import replacing
from weights.vocabulary import LLAMA3_SPLIT

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
IMAGE_TOKEN = "<|image|>"
VOCABULARY = 640
TILE = 112          # pixels
PATCH = 16


def config_json() -> dict:
    """The bundled checkpoint's config.json."""
    first = VOCABULARY - len(SPECIAL_TOKENS)
    ids = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": "bfloat16",
        "image_token_index": VOCABULARY,
        "text_config": {
            "model_type": "mllama_text_model", "vocab_size": VOCABULARY,
            "hidden_size": 160, "intermediate_size": 384, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "cross_attention_layers": [2, 4, 6], "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
            "bos_token_id": ids["<|begin_of_text|>"], "pad_token_id": ids["<|finetune_right_pad_id|>"],
            "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]},
        "vision_config": {
            "model_type": "mllama_vision_model", "image_size": TILE, "patch_size": PATCH, "num_channels": 3,
            "hidden_size": 128, "intermediate_size": 512, "attention_heads": 2, "num_hidden_layers": 4,
            "num_global_layers": 1, "intermediate_layers_indices": [1, 3], "vision_output_dim": 384,
            "max_num_tiles": 4, "norm_eps": 1e-5, "hidden_act": "gelu",
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]},
    }


def tiny_config() -> Config:
    return config_from_dict(config_json())


def train_tokenizer(images: int = 2000) -> Tokenizer:
    """Byte-level BPE over the questions and answers of the training scenes. Every digit is a token, and any
    text can be encoded."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_corpus(images), trainer)
    unused = VOCABULARY - len(SPECIAL_TOKENS) - tokenizer.get_vocab_size()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(unused)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in (*reserved, *SPECIAL_TOKENS, IMAGE_TOKEN)])
    return tokenizer


def _corpus(images: int):
    yield from ("user", "assistant", "system", "\n\n") * images
    yield from (f"{a}{word}" for word in (*COLOURS, *SHAPES) for a in ("", " ") for _ in range(images))
    for i in range(images):
        for question in questions(make_scene("train", i), seed=i, count=8):
            for text in question.text, question.answer:
                yield "".join(c for c in text if not c.isdigit())


def write_folder(folder: Path, config: dict | None = None):
    """Write a checkpoint without its weights; `config` is that of tiny if not given."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    with replacing(folder / "tokenizer.json") as partial:
        tokenizer.save(str(partial))
    config = config or config_json()
    text = config["text_config"]
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": text["bos_token_id"], "eos_token_id": text["eos_token_id"],
                                   "pad_token_id": text["pad_token_id"]},
        "preprocessor_config.json": {
            "image_processor_type": "MllamaImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "do_pad": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
            "resample": 2, "max_image_tiles": 4, "size": {"height": TILE, "width": TILE},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
    }
    for name, content in files.items():
        with replacing(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


