"""An adapter that would be merged in part, or wrongly, is refused in one line that says what to do."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_base import ADAPTERS, BASE, write_base
from helpers import refused
from safetensors.torch import load_file, save_file

from weights import load_model
from weights.adapter_file import find_adapter, find_adapters, open_adapter

FILE = "adapter_model.safetensors"
Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj."
EMBEDDING = "base_model.model.model.language_model.embed_tokens."
DOWN = "base_model.model.model.language_model.layers.0.mlp.down_proj."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def tensors(change):
    def edit(folder: Path):
        held = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
        change(held)
        save_file(held, folder / FILE)
    return edit


def config(**changes):
    def edit(folder: Path):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


def put(name: str, tensor: torch.Tensor):
    return tensors(lambda held: held.update({name: tensor}))


def drop(name: str):
    return tensors(lambda held: held.pop(name))


def rename(change):
    return tensors(lambda held: [held.update({change(name): held.pop(name)}) for name in list(held)])


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def slow(key: str):
    return config(alpha_pattern={key: 1})


ALONE = {                                       # name: (adapter, how to spoil it, what the line says)
    "no config": ("lora", lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json there"]),
    "no weights": ("lora", lambda f: (f / FILE).unlink(), [f"no {FILE} there", "pickle", "save the adapter"]),
    "IA3": ("ia3", None, ["peft_type 'IA3'", "only LORA", "merge_and_unload()", "--model"]),
    "LoHa": ("loha", None, ["peft_type 'LOHA'", "merge_and_unload()"]),
    "prefix tuning": ("prefix", None, ["PREFIX_TUNING", "virtual tokens", "only LoRA"]),
    "config not JSON": ("lora", write("adapter_config.json", b"{"), ["adapter_config.json", "JSON"]),
    "config a list": ("lora", write("adapter_config.json", b"[]"), ["no peft_type"]),
    "no peft_type": ("lora", config(peft_type=None), ["no peft_type"]),
    "rank 0": ("lora", config(r=0), ["r is 0", "whole number"]),
    "no rank": ("lora", config(r=None), ["r is None"]),
    "alpha a word": ("lora", config(lora_alpha="8"), ["lora_alpha is '8'", "a number"]),
    "alpha NaN": ("lora", config(lora_alpha=float("nan")), ["lora_alpha is nan"]),
    "switch a word": ("lora", config(use_rslora="yes"), ["use_rslora is 'yes'", "true or false"]),
    "pattern a list": ("lora", config(rank_pattern=[1]), ["rank_pattern", "not an object"]),
    "pattern of words": ("lora", config(rank_pattern={"o_proj": "2"}), ["rank_pattern of 'o_proj' is '2'"]),
    "pattern that is none": ("lora", slow("(q"), ["alpha_pattern", "'(q'", "no pattern"]),
    "pattern without end": ("lora", slow("(a+)+b"), ["alpha_pattern", "too long"]),
    "pattern with many repeats": ("lora", slow(".*.*.*.*x"), ["too long"]),
    "pattern of many letters": ("lora", slow("x" * 300), ["too long"]),
    **{name: ("lora", config(**{name: value}), [f"{name} is set", "not supported"]) for name, value in {
        "use_qalora": True, "use_bdlora": {"x": 1}, "arrow_config": {"a": 1},
        "alora_invocation_tokens": [1, 2], "layer_replication": [[0, 2]],
        "trainable_token_indices": [3], "target_parameters": ["x"]}.items()},
    "a switch of tomorrow": ("lora", config(use_tomorrow=True), ["use_tomorrow is set", "not known here"]),
    "pissa": ("lora", config(init_lora_weights="pissa_niter_4"), ["'pissa_niter_4'", "base's weights, too"]),
    "no tensors": ("lora", tensors(lambda held: held.clear()), ["holds no tensors"]),
    "damaged": ("lora", write(FILE, b"\x08" + b"\0" * 20), [FILE]),
    "whole numbers": ("lora", put(Q + "lora_A.weight", torch.ones(4, 16, dtype=torch.int8)), ["dtype I8"]),
    "A without B": ("lora", drop(Q + "lora_B.weight"), ["q_proj", "lacks", "lora_B", "incomplete"]),
    "another rank": ("lora", config(r=8), ["[4, 24] and [16, 4]", "rank 8"]),
    "DoRA without its magnitude": ("lora", config(use_dora=True), ["lacks", "lora_magnitude_vector"]),
    "magnitude without DoRA": ("dora", config(use_dora=False), ["against its configuration", "magnitude"]),
    "two adapters in one file": ("lora", put(Q + "lora_A.second.weight", torch.ones(4, 16)),
                                 ["twice", "one adapter"]),
    "two values of one parameter": ("rslora", put(
        "base_model.model.model.multi_modal_projector.modules_to_save.bias", torch.ones(16)), ["differ"]),
}
MERGED = {
    "other names": ("lora", rename(lambda name: name.replace("language_model.layers", "layers")),
                    ["only 24 of its 48 tensors", "layers.0", "meta-llama/Llama-3.2-11B-Vision-Instruct"]),
    "no name": ("lora", rename(lambda name: "x." + name), ["none of its 48 tensors", "made for another"]),
    "one name": ("lora", put("base_model.model.extra", torch.ones(2)), ["only 48 of its 49", "extra"]),
    "another width": ("lora", put(Q + "lora_A.weight", torch.ones(4, 32)), ["q_proj", "[4, 32]", "[16, 16]"]),
    "another height": ("lora", put(DOWN + "lora_B.weight", torch.ones(8, 4)), ["down_proj", "[8, 4]"]),
    "another magnitude": ("dora", put(Q.replace("q_proj", "k_proj") + "lora_magnitude_vector", torch.ones(3)),
                          ["k_proj", "[3]"]),
    "another embedding": ("embedding", put(EMBEDDING + "lora_embedding_A", torch.ones(2, 60)), ["[2, 60]"]),
    "a parameter of another shape": ("rslora", put(
        "base_model.model.model.vision_model.layernorm_pre.bias", torch.ones(3)), ["layernorm_pre", "[3]"]),
    "a norm": ("lora", tensors(lambda held: held.update({
        "language_model.norm.lora_A.weight": torch.ones(4, 16),
        "language_model.norm.lora_B.weight": torch.ones(16, 4)})), ["norm", "not fit"]),
    "a bias that the model lacks": ("lora", put(Q + "lora_B.bias", torch.ones(16)), ["adds a bias"]),
    "a head longer than the embedding": ("resized", tensors(lambda held: held.update({
        "base_model.model.lm_head.weight": torch.ones(80, 16)})), ["70 rows of the embedding for 80"]),
}


def spoiled(folder: Path, adapter: str, spoil) -> Path:
    copy = shutil.copytree(ADAPTERS / adapter, folder / "adapter")
    if spoil is not None:
        spoil(copy)
    return copy


@pytest.mark.parametrize("case", ALONE)
def test_before_the_base_is_looked_at(tmp_path, case):
    adapter, spoil, words = ALONE[case]
    folder = spoiled(tmp_path, adapter, spoil)
    with refused(parts=words, longest=400 + len(str(folder))):
        load_model("nowhere/that-exists", adapters=[str(folder)])


@pytest.mark.parametrize("case", MERGED)
def test_what_does_not_fit_the_base(base, tmp_path, case):
    adapter, spoil, words = MERGED[case]
    folder = spoiled(tmp_path, adapter, spoil)
    open_adapter(find_adapter(folder))
    with refused(parts=words, longest=500 + len(str(folder))):
        load_model(base, adapters=[folder])


def test_two_adapters_that_replace_the_same(base, tmp_path):
    other = spoiled(tmp_path, "rslora", put("base_model.model.model.vision_model.layernorm_pre.bias",
                                            torch.ones(16)))
    load_model(base, adapters=[ADAPTERS / "rslora"] * 2)            # the same values
    with refused("replaces what another adapter replaces"):
        load_model(base, adapters=[ADAPTERS / "rslora", other])


@pytest.mark.parametrize("adapters, words", [
    ("lora", "must be a list"), ([5], "must be a list"), (None, "must be a list"),
    (["none", "x/y"], "'none' means that no adapter is merged"),
    (["./nowhere"], "adapter './nowhere' is neither a folder here nor a hub id"),
    ([""], "adapter '' is neither"), ([ADAPTERS / "lora" / FILE], "is a file, not a folder: pass the folder"),
    ([ADAPTERS], "no adapter_config.json there")])
def test_what_is_no_adapter(adapters, words):
    with refused(words):
        load_model("nowhere/that-exists", adapters=adapters)
    with refused(words):
        find_adapters(adapters)


# ---- beside weights, and alone

def test_an_adapter_beside_full_weights_is_not_ignored(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    shutil.copy(ADAPTERS / "lora" / "adapter_config.json", tmp_path)
    with refused("an adapter lies beside the weights", [f"--adapter {tmp_path}", "--adapter none"]):
        load_model(tmp_path)
    plain = load_model(tmp_path, adapters=["none"])
    shutil.copy(ADAPTERS / "lora" / FILE, tmp_path)
    with refused("an adapter lies beside the weights"):
        load_model(tmp_path)
    merged = load_model(tmp_path, adapters=[tmp_path])
    weight = "language_model.layers.0.self_attn.q_proj.weight"
    assert not plain.state_dict()[weight].equal(merged.state_dict()[weight])


@pytest.mark.parametrize("said, advice", [
    ("meta-llama/Llama-3.2-11B-Vision", "--model meta-llama/Llama-3.2-11B-Vision --adapter"),
    ("/home/me/llama", "--model BASE --adapter"), ("x; rm -rf /", "--model BASE --adapter"),
    (None, "--model BASE --adapter"), ([1], "--model BASE --adapter")])
def test_an_adapter_given_as_the_model(tmp_path, said, advice):
    folder = spoiled(tmp_path, "lora", config(base_model_name_or_path=said))
    with refused("holds an adapter alone", [f"give {advice}"]):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(BASE))           # some trainers write it, too
    with refused("holds an adapter alone", [f"give {advice}"]):
        load_model(folder)
