"""Files of learned weights: what is not such a file, or is another network's, is refused in one line."""
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pruning.methods.attention_predictor import AttentionPredictor, Network, load_network
from pruning.methods.quecc import Compressor, load_compressor
from weights import LEARNED

CPU = torch.device("cpu")
MANY = {"more" * 100 + str(i): torch.zeros(1) for i in range(50)}
NO_FILES = [(b"", "the file is empty"), (bytes(8), "not a safetensors file"),
            (b"\x10" + bytes(7) + b"nothing of a file", "not a safetensors file"),
            (b"\xff" * 100, "not a safetensors file"), (b"version https://git-lfs", "a git-lfs pointer")]


def refusal(load, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        load(*arguments)
    line = str(caught.value)
    assert type(caught.value) is ValueError and line.isprintable() and len(line) < 700, line
    assert "w.safetensors: no weights of " in line
    return line


@pytest.mark.parametrize("content, words", NO_FILES)
def test_no_file_of_weights(tmp_path, content, words):
    path = tmp_path / "w.safetensors"
    assert "cannot be read (No such file" in refusal(load_network, path)
    assert "cannot be read (No such file" in refusal(load_compressor, path, CPU)
    path.write_bytes(content)
    assert words in refusal(load_network, path)
    assert words in refusal(load_compressor, path, CPU)


def test_a_size_that_no_tensor_can_have(tmp_path):
    """Also where another size is 0."""
    entry = {"dtype": "F32", "shape": [0, 2 ** 63], "data_offsets": [0, 0]}
    header = json.dumps({"mix.bias": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "its header is damaged" in refusal(load_network, tmp_path / "w.safetensors")
    assert "its header is damaged" in refusal(load_compressor, tmp_path / "w.safetensors", CPU)


@pytest.mark.parametrize("change, words", [
    ({"out.weight": torch.zeros(10, 200)}, "its sizes are [10, 200, 6,"),       # 3 heads do not share 200
    ({"shrink.weight": torch.zeros(6, 1, 2, 0)}, "its sizes are"),
    ({"shrink.weight": torch.zeros(6, 1, 2, 3)}, "size mismatch for shrink.weight"),
    ({"out.weight": torch.zeros(6)}, "size mismatch"),
    ({"out.weight": torch.zeros(10, 6, 1)}, "size mismatch"),
    ({"out.bias": torch.zeros(10).long()}, "tensor 'out.bias' has the dtype I64, not one of BF16"),
    ({"out.bias": None}, "Missing key(s) in state_dict: \"out.bias\""),
    ({"key.0.weight": None}, "'key.0.weight'"),
    (MANY, "Unexpected key(s)")])
def test_weights_of_another_compressor(tmp_path, change: dict[str, Tensor | None], words):
    state = Compressor(width=6, states=12, text=10, stride=2).state_dict() | change
    save_file({name: tensor for name, tensor in state.items() if tensor is not None},
              tmp_path / "w.safetensors")
    assert words in refusal(load_compressor, tmp_path / "w.safetensors", CPU)


@pytest.mark.parametrize("state, words", [
    ({}, "Missing key(s)"), (MANY, "Missing key(s)"),
    ({**Network().state_dict(), "mix.weight": torch.zeros(1, 32)}, "size mismatch for mix.weight"),
    ({**Network().state_dict(), "mix.bias": torch.zeros(1).bool()}, "has the dtype BOOL, not one of BF16")])
def test_weights_of_another_predictor(tmp_path, state, words):
    save_file(state, tmp_path / "w.safetensors")
    assert words in refusal(load_network, tmp_path / "w.safetensors")


def test_weights_outlive_their_file(tmp_path):
    """They are copies: overwriting the file changes nothing."""
    path = tmp_path / "w.safetensors"
    path.write_bytes((LEARNED / "attention_predictor.safetensors").read_bytes())
    network = load_network(path)
    path.write_bytes(b"")
    for name, weight in AttentionPredictor().network.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight) and weight.dtype == torch.float32
