"""`--adapter` of all programs, on the bundled checkpoint: what it changes, and what is said about it."""
import json
from pathlib import Path

import pytest
import torch
from generate_helpers import TINY, command_line
from helpers import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import benchmark
import evaluate
from generate import Assistant

HEAD = "base_model.model.lm_head."
EMBEDDING = "base_model.model.model.language_model.embed_tokens.weight"
ASK = "--prompt", "What is a star?", "--max-new-tokens", "4"


@pytest.fixture
def run(monkeypatch, capsys):
    return command_line(monkeypatch, capsys)


def write(folder: Path, tensors: dict[str, torch.Tensor], **config) -> str:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "them/tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def favours_y(tmp_path) -> str:
    """An adapter of the head that adds twice the row of `Y` to itself: `Y` becomes likelier."""
    letter, = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("Y", add_special_tokens=False).ids
    row = load_file(TINY / "model.safetensors")["language_model.lm_head.weight"][letter].float()
    column = torch.zeros(640, 1)
    column[letter] = 1
    return write(tmp_path / "favours_y", {HEAD + "lora_A.weight": row[None], HEAD + "lora_B.weight": column},
                 lora_alpha=2)


def test_an_adapter_changes_the_answers_and_says_what_it_was_trained_on(run, favours_y):
    image = "--image", "examples/shapes.png", "--prompt", "What is written on the circle?"
    plain, _ = run(*image)
    model = Assistant("tiny", adapters=[favours_y]).model
    assert plain == "Y\n"
    out, err = run(*image, "--adapter", favours_y, "--json")
    assert json.loads(out)["answer"].startswith("Y")
    assert f"adapter {favours_y} merged into tiny; it says that it was trained on them/tiny\n" in err
    original = load_file(TINY / "model.safetensors")["language_model.lm_head.weight"]
    changed = (model.lm_head.weight != original).any(1).nonzero().flatten().tolist()
    letter, = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("Y", add_special_tokens=False).ids
    assert changed == [letter]
    torch.testing.assert_close(model.lm_head.weight[letter], 3 * original[letter], atol=0, rtol=0.01)


def test_nothing_is_said_where_the_names_agree(run, tmp_path):
    nothing = {HEAD + "lora_A.weight": torch.zeros(1, 160), HEAD + "lora_B.weight": torch.zeros(640, 1)}
    silent = write(tmp_path / "a", nothing, base_model_name_or_path="tiny")
    plain, _ = run(*ASK)
    out, err = run(*ASK, "--adapter", silent, "--adapter", silent)
    assert out == plain and "adapter" not in err


def test_an_adapter_with_tokens_of_its_own_brings_its_tokenizer(tmp_path):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|point|>"])
    tokenizer.add_tokens(["<answer: Y>"])
    number = tokenizer.token_to_id("<answer: Y>")
    letter, = tokenizer.encode("Y", add_special_tokens=False).ids
    tensors = load_file(TINY / "model.safetensors")
    head = torch.cat([tensors["language_model.lm_head.weight"], torch.zeros(number - 639, 160).bfloat16()])
    head[number] = 2 * head[letter]
    embedding = tensors["language_model.model.embed_tokens.weight"][:number + 1].contiguous()
    adapter = write(tmp_path / "adapter", {HEAD + "weight": head, EMBEDDING: embedding},
                    modules_to_save=["embed_tokens", "lm_head"])
    without = Assistant("tiny", adapters=[adapter])
    assert without.model.config.text.vocab_size == number + 1
    tokenizer.save(f"{adapter}/tokenizer.json")
    assistant = Assistant("tiny", adapters=[adapter])
    assert assistant.tokenizer.decode([number]) == "<answer: Y>" != without.tokenizer.decode([number])
    assert assistant.tokenizer.stop_ids == without.tokenizer.stop_ids
    asked = [{"role": "user", "content": "Is it <answer: Y>?"}]
    assert number in assistant.tokenizer.encode(asked) and number not in without.tokenizer.encode(asked)
    encoded = assistant.encode_images([])
    assert assistant.answer([asked], encoded, 2).tokens
    template = "{% for m in messages %}<|point|>{{ m.content }}{% endfor %}"
    (Path(adapter) / "chat_template.jinja").write_text(template)
    assert tokenizer.token_to_id("<|point|>") in Assistant("tiny", adapters=[adapter]).tokenizer.encode(asked)


def test_results_with_an_adapter_are_other_results(monkeypatch, favours_y):
    def settings(*argv: str) -> dict:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
        return evaluate.settings_of(evaluate.arguments(), [])
    plain, none, merged = settings(), settings("--adapter", "none"), settings("--adapter", favours_y)
    assert plain == none and "adapters" not in plain
    assert merged == {**plain, "adapters": [[favours_y, merged["adapters"][0][1]]]}
    path = f"{favours_y}/adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert settings("--adapter", favours_y) != merged


def test_a_benchmark_measures_a_model_with_its_adapter(monkeypatch, favours_y):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--adapter", favours_y])
    with refused("--adapter is merged into a model with weights: give --model"):
        benchmark.check_together(benchmark.arguments())
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--model", "tiny",
                                     "--adapter", favours_y, "--tiles", "1",
                                     "--prompt-tokens", "8", "--new-tokens", "2", "--repeat", "1"])
    subject, _ = benchmark.make_subject(benchmark.arguments(), torch.device("cpu"))
    original = load_file(TINY / "model.safetensors")["language_model.lm_head.weight"]
    assert not subject.model.lm_head.weight.equal(original)
