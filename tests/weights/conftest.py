"""What the tests of this folder share: a file that may not be read, and a small byte-level tokenizer.

The tokenizer has Llama 3's way of cutting text and its special tokens, at ids of its own: nothing may rely on
the official numbers.
"""
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from text_side import CURRENT, write
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model.config import Config, TextConfig
from weights.tokenizer import ChatTokenizer

NOBODY = 65534
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|eot_id|>+"]
CORPUS = ["What is in the picture? The red circle is to the left of the blue square.",
          "user system assistant\n\n\n\n", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024",
          "How many digits are there? 1 22 333", "naïve café 画像 の 中 👍🏽 e\u0301"] * 4


@pytest.fixture
def without_permission(tmp_path: Path) -> Callable[[Path], AbstractContextManager]:
    """A context in which a file or folder of this test gives no permission to anybody, also not to root."""
    modes = {folder: folder.stat().st_mode for folder in (tmp_path, *tmp_path.parents)}
    modes = {folder: mode for folder, mode in modes.items() if not mode & 0o1}     # closed to others

    @contextmanager
    def denied(path: Path) -> Iterator[None]:
        root = os.geteuid() == 0
        before = path.stat().st_mode
        if root:                                # root may read everything: become somebody else for a while
            for folder, mode in modes.items():
                folder.chmod(mode | 0o711)
        path.chmod(0)
        if root:
            os.seteuid(NOBODY)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
                for folder, mode in modes.items():
                    folder.chmod(mode)
            path.chmod(before)
    return denied


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A folder as the base models': all special tokens, no chat template, ends at end_of_text only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                                  use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*SPECIAL, "<|image|>"]])
    tokenizer.add_tokens([AddedToken("<café>", normalized=False, special=False)])
    bos = tokenizer.token_to_id(SPECIAL[0])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A",
                                                             special_tokens=[(SPECIAL[0], bos)])
    tokenizer.enable_truncation(16)         # both must be overruled: prompts are longer, and never padded
    tokenizer.enable_padding(length=16)
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config__json={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
                                          "tokenizer_class": "PreTrainedTokenizerFast"},
          generation_config__json={"eos_token_id": tokenizer.token_to_id("<|end_of_text|>")})
    return folder


@pytest.fixture(scope="session")
def ids(base_folder):
    """Special token -> id."""
    tokenizer = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in [*SPECIAL, "<|image|>"]}


@pytest.fixture(scope="session")
def config(ids):
    return Config(text=TextConfig(vocab_size=ids["<|image|>"], eos_token_id=(ids["<|end_of_text|>"],)),
                  image_token_index=ids["<|image|>"])


@pytest.fixture
def folder(base_folder, ids, tmp_path):
    """A folder as the Instruct models', but for the chat template."""
    folder = shutil.copytree(base_folder, tmp_path / "instruct")
    folder.chmod(0o755)                     # a temporary folder is closed to others
    stops = [ids[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    write(folder, generation_config__json={"eos_token_id": stops})
    return folder


@pytest.fixture
def current(folder, config):
    write(folder, chat_template__jinja=CURRENT)
    return ChatTokenizer.from_folder(folder, config)
