"""Checkpoints with added tokens, as transformers' resize_token_embeddings and save_pretrained write them."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import EMBEDDING, HEAD, SMALL, refusal, single, small_tensors
from tokenizers import AddedToken, Tokenizer

from generate import Assistant
from model.config import Config
from model.sampling import GREEDY
from weights import config_from_dict, load_model
from weights.image_file import open_image
from weights.tokenizer import messages

sys.path.append(str(Path(__file__).parents[1] / "model"))
from test_transformers import (  # noqa: E402
    CLOSE,
    build,
    difference,
    random_batch,
    random_config,
    run_transformers,
)

TINY = Path(__file__).parents[2] / "weights" / "tiny"
SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"


def edit_text_config(folder: Path, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= changes
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


# ---- transformers' own writer

@pytest.mark.parametrize("added, multiple, more, stale", [
    (3, None, 0, False),                # one length for both, fewer rows than <|image|> and 7 others
    (3, 64, 0, False),
    (9, None, 0, True),                 # config.json of the base model beside the weights
    (11, None, 1, True),
    (11, None, 8, False),
])
@torch.no_grad()
def test_same_logits_as_transformers(tmp_path, added, multiple, more, stale):
    config = random_config(7)
    before = config.text_config.vocab_size
    theirs = build(config, 7)
    theirs.resize_token_embeddings(before + added, pad_to_multiple_of=multiple, mean_resizing=False)
    theirs.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.3)
    theirs.save_pretrained(tmp_path)
    rows = before + added if multiple is None else -(-(before + added) // multiple) * multiple
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    assert written == rows                                          # it writes the new number there
    if more:
        edit_tensors(tmp_path, lambda t: t.update({EMBEDDING: torch.cat([t[EMBEDDING], t[HEAD][:more]])}))
    if stale:
        edit_text_config(tmp_path, vocab_size=before)
    ours = load_model(tmp_path)
    assert ours.lm_head.out_features == ours.config.text.vocab_size == rows
    assert ours.language_model.embed_tokens.num_embeddings == ours.config.text.embedding_rows == rows + more
    batch = random_batch(replace(ours.config, text=replace(ours.config.text, vocab_size=before)), 7)
    first_text = [next(i for i, t in enumerate(ids) if t != before) for ids in batch.ids.tolist()]
    batch.ids[torch.arange(len(batch.ids)), first_text] = before + added - 1
    logits = ours(batch.ids, batch.tiles)
    assert logits.shape[-1] == rows
    assert difference(run_transformers(theirs, batch), logits, batch) < CLOSE["atol"]
    with pytest.raises(ValueError, match=f"from 0 to {rows + more - 1}"):
        ours.check_prompts([[rows + more]], 1)


# ---- what other tools write

def small_with(folder: Path, embedding: int, head: int | None, **text) -> Path:
    """The small checkpoint, of 64 tokens, with so many rows; without a head where that is None."""
    tensors = small_tensors()
    tensors[EMBEDDING] = torch.randn(embedding, 32)
    tensors[HEAD] = torch.randn(head or 1, 32)
    if head is None:
        del tensors[HEAD]
    return single(folder, tensors, **text)


def image_token_at(folder: Path, token: int):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": token}))


def test_the_image_token_may_be_anywhere(tmp_path):
    small_with(tmp_path, 128, 128)
    for token in 5, 64, 127:
        image_token_at(tmp_path, token)
        assert load_model(tmp_path).config.image_token_index == token
    image_token_at(tmp_path, 128)
    line = refusal(tmp_path)
    assert "config.json: image_token_index is 128, but the model embeds 128 tokens" in line


@pytest.mark.parametrize("rows, vocab_size", [(72, 64), (65, 64), (70, 70), (128, 128)])
def test_a_tied_head_has_the_rows_that_config_says(tmp_path, rows, vocab_size):
    model = load_model(small_with(tmp_path, rows, None, tie_word_embeddings=True, vocab_size=vocab_size))
    embedding = model.language_model.embed_tokens.weight
    assert embedding.shape == (rows, 32) and torch.equal(model.lm_head.weight, embedding[:vocab_size])


@pytest.mark.parametrize("embedding, head, text, words", [
    (70, None, {"tie_word_embeddings": True}, ["vocab_size is 64", "70 rows", "set vocab_size", "70 or 62"]),
    (64, 72, {}, ["64 rows of the embedding", "72 of the head", "mixed"]),
    (64, 64, {}, ["image_token_index is 64", "embeds 64 tokens"]),
    (100, 90, {"hidden_size": 64}, ["has the shape", "[90, 32]", "[90, 64]"]),
    (100, None, {}, ["missing tensors (1)", HEAD]),
])
def test_rows_that_do_not_fit_get_one_line(tmp_path, embedding, head, text, words):
    line = refusal(small_with(tmp_path, embedding, head, **text))
    for word in words:
        assert word in line


def test_rows_are_not_read_from_the_file():
    text = SMALL["text_config"] | {"extra_embeddings": 5}
    assert config_from_dict(SMALL | {"text_config": text}) == config_from_dict(SMALL)
    assert Config().text.embedding_rows == 128264


# ---- prompts and answers

def test_an_added_token_in_a_prompt_and_in_an_answer(tmp_path):
    """The bundled checkpoint, resized for two new tokens; the second is made likelier than `Y`."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|point|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<yes, Y>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    point, yes = map(tokenizer.token_to_id, ("<|point|>", "<yes, Y>"))
    assert yes == tokenizer.get_vocab_size() - 1 > 640
    letter, = tokenizer.encode("Y", add_special_tokens=False).ids

    def resize(tensors: dict[str, torch.Tensor]):
        head = torch.cat([tensors[HEAD], torch.zeros(yes + 1 - len(tensors[HEAD]), tensors[HEAD].shape[1])])
        head[yes] = 2 * head[letter]
        tensors[HEAD] = head.to(tensors[EMBEDDING].dtype)
        tensors[EMBEDDING] = tensors[EMBEDDING][:yes + 1].clone()
    edit_tensors(tmp_path, resize)

    assistant = Assistant(str(tmp_path))
    assert assistant.model.config.text.extra_embeddings == 0
    encoded = assistant.encode_images([open_image(SHAPES)])
    asked = [messages("What is written on the circle? <yes, Y>", 1)]
    ids = assistant.tokenizer.encode(asked[0])
    assert yes in ids and point not in assistant.tokenizer.encode(messages("<|point|>"))
    answer = assistant.answer([messages("What is written on the circle?", 1)], encoded, 3, GREEDY)
    assert answer.tokens[0][0] == yes
    assert assistant.tokenizer.decode(answer.tokens[0]).startswith("<yes, Y>")
    assert assistant.answer(asked, encoded, 2).tokens                       # it is embedded
