"""Meta's own files, converted, compute what Meta's own code computes (data/meta/make.py)."""
import json
import os
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from dialogs import SPECIAL
from dialogs import tokenizer_json as expected_tokenizer
from meta_folder import DATA, edit_params, meta_folder
from PIL import Image
from safetensors.torch import load_file

from model.image_tokens import Tiles
from weights import find_checkpoint, load_model
from weights.from_meta import from_meta, main
from weights.images import ImageProcessor
from weights.meta_tokenizer import byte_letters, special_tokens, tokenizer_json
from weights.tokenizer import ChatTokenizer


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shard", [10 ** 9, 30_000])
def test_the_logits_of_metas_own_code(ranks, shard, tmp_path):
    out = from_meta(meta_folder(tmp_path, ranks), tmp_path / "out", shard=shard)
    assert (out / "model.safetensors").exists() == (shard == 10 ** 9)
    expected = load_file(DATA / f"logits{ranks}.safetensors")
    assert expected["logits"].std() > 0.5
    model = load_model(out, dtype="fp32")
    with torch.no_grad():
        logits = model(expected["ids"], [Tiles(expected["pixels"], torch.tensor([[1, 2]]))])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert load_model(out).dtype == torch.bfloat16


def test_what_text_and_images_need(tmp_path):
    out = from_meta(meta_folder(tmp_path), tmp_path / "out")
    config = load_model(out).config
    tokenizer = ChatTokenizer.from_folder(out, config)
    content = [{"type": "image"}, {"type": "text", "text": "Hé?"}]
    ids = tokenizer.encode([{"role": "user", "content": content}])
    special = special_tokens(256)
    begin, start, end, eot, image = (special[f"<|{name}|>"] for name in (
        "begin_of_text", "start_header_id", "end_header_id", "eot_id", "image"))
    assert image == config.image_token_index == 512
    assert ids == [begin, start, *b"user", end, *b"\n\n", image, *"Hé?".encode(), eot,
                   start, *b"assistant", end, *b"\n\n"]
    assert tokenizer.decode(ids[10:14]) == "Hé?"
    assert set(tokenizer.stop_ids) == {special[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")}
    tiles = ImageProcessor.from_folder(out, config.vision)([Image.new("RGB", (56, 28))])
    assert tiles.pixels.shape == (1, 4, 3, 28, 28) and tiles.grid.tolist() == [[1, 2]]


def test_a_base_model_continues_texts(tmp_path):
    main([str(meta_folder(tmp_path)), str(tmp_path / "out"), "--base"])
    tokenizer = ChatTokenizer.from_folder(tmp_path / "out", load_model(tmp_path / "out").config)
    special = special_tokens(256)
    assert tokenizer.encode([{"role": "user", "content": "Hi"}]) == [special["<|begin_of_text|>"], *b"Hi"]
    assert tokenizer.stop_ids == (special["<|end_of_text|>"],)


def test_the_official_tokenizer():
    """Special tokens with the hub's numbers, and merges as the dialogs of Meta's tokenizer confirm them."""
    assert special_tokens(128000).items() >= SPECIAL.items()
    letters = byte_letters()
    stored = json.loads((DATA.parent / "meta_dialogs.json").read_text())["vocabulary"]
    ranks = {bytes(letters.index(letter) for letter in token): rank for token, rank in stored.items()}
    ours, expected = json.loads(tokenizer_json(ranks)), json.loads(expected_tokenizer(stored))
    assert ours["model"]["merges"] == expected["model"]["merges"]
    assert ours["pre_tokenizer"] == expected["pre_tokenizer"]
    assert ours["decoder"] == expected["decoder"]


def test_the_folder_of_the_hub(tmp_path, capsys):
    """Meta's files in original/, and no tokenizer there."""
    folder = tmp_path / "hub" / "original"
    folder.mkdir(parents=True)
    (meta_folder(folder) / "tokenizer.model").unlink()
    out = from_meta(folder.parent, tmp_path / "out")
    assert not (out / "tokenizer.json").exists() and "add one" in capsys.readouterr().err
    load_model(out)


def test_gates_for_each_channel(tmp_path):
    """One number, however often it is stored."""
    path = meta_folder(tmp_path) / "consolidated.pth"
    once = load_model(from_meta(tmp_path, tmp_path / "once"))
    state = torch.load(path, weights_only=True)
    name = "text_model.cross_attention_layers.1.gate_attn"
    state[name] = state[name].expand(16).contiguous()
    torch.save(state, path)
    often = load_model(from_meta(tmp_path, tmp_path / "often"))
    for key, tensor in once.state_dict().items():
        assert torch.equal(tensor, often.state_dict()[key]), key
    state[name][3] += 1
    torch.save(state, path)
    assert name in refusal(tmp_path)


def test_as_a_program(tmp_path, capsys):
    command = [str(meta_folder(tmp_path)), str(tmp_path / "out")]
    main(command)
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.err == f"error: {tmp_path / 'out'} is there already; name a folder that is not\n"
    assert not said.out


# ---- refusals


def refusal(folder: Path) -> str:
    """The one line, and nothing is left behind."""
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError) as caught:
        from_meta(folder, folder / "refused")
    assert sorted(os.listdir(folder)) == before
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 500 + 2 * len(str(folder)), line
    return line


class Harmful:
    def __reduce__(self):
        return os.system, ("echo harmful",)


def edit_state(change, file="consolidated.pth"):
    def edit(folder: Path):
        state = torch.load(folder / file, weights_only=True)
        change(state)
        torch.save(state, folder / file)
    return edit


def save(value: object, file="consolidated.pth", **options):
    return lambda folder: torch.save(value, folder / file, **options)


def params(**changes):
    return lambda folder: edit_params(folder, **changes)


def cut(file: str, size: int):
    """A file of so many bytes, or so many less."""
    return lambda folder: os.truncate(folder / file, size % (folder / file).stat().st_size)


def compressed(folder: Path):
    """The same archive as other programs would pack it."""
    path = folder / "consolidated.pth"
    with ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


WQ = "text_model.layers.0.attention.wq.weight"
BAD = {                                             # name: (ranks, how to spoil it, what the line says)
    "no params": (1, lambda f: (f / "params.json").unlink(), ["no params.json", "consolidated.pth"]),
    "params not JSON": (1, lambda f: (f / "params.json").write_text("{"), ["params.json", "JSON"]),
    "params a list": (1, lambda f: (f / "params.json").write_text("[]"), ["params.json", "settings"]),
    "a text model": (1, params(vision_num_cross_attention_layers=-1), ["sees no images"]),
    "a size as text": (1, params(dim="16"), ["dim is '16'"]),
    "no vocabulary": (1, params(vocab_size=-1), ["vocab_size is -1"]),
    "many layers": (1, params(n_layers=10 ** 6), ["more layers"]),
    "another width": (1, params(dim=32), ["belong together"]),
    "other heads": (1, params(n_heads=3), ["belong together"]),
    "more layers": (1, params(n_layers=4), ["missing", "belong together"]),
    "another tile": (1, params(vision_chunk_size=42), ["belong together"]),
    "no weights": (1, lambda f: (f / "consolidated.pth").unlink(), ["consolidated.00.pth is missing"]),
    "a rank missing": (2, lambda f: (f / "consolidated.00.pth").unlink(), ["consolidated.00.pth is missing"]),
    "half the ranks": (2, lambda f: (f / "consolidated.01.pth").unlink(), ["belong together"]),
    "another rank": (2, edit_state(lambda s: s.pop(WQ), "consolidated.01.pth"), [WQ, "mixed"]),
    "empty": (1, cut("consolidated.pth", 0), ["consolidated.pth", "copy it again"]),
    "truncated": (1, cut("consolidated.pth", 50_000), ["consolidated.pth", "copy it again"]),
    "an old pickle": (1, save({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
                      ["consolidated.pth"]),
    "truncated at its end": (1, cut("consolidated.pth", -100), ["consolidated.pth", "copy it again"]),
    "compressed": (1, compressed, ["consolidated.pth", "compressed"]),
    "harmful": (1, save({"a": Harmful()}), ["consolidated.pth", "torch.save has written"]),
    "a list": (1, save([torch.ones(2)]), ["it holds a list"]),
    "nested": (1, save({"model": {"a": torch.ones(2)}}), ["'model' is not the name of a tensor"]),
    "integers": (1, edit_state(lambda s: s.update({WQ: torch.ones(16, 16).int()})), [WQ, "int32"]),
    "a tensor missing": (1, edit_state(lambda s: s.pop(WQ)), ["q_proj", "missing"]),
    "a tensor too many": (1, edit_state(lambda s: s.update(extra=torch.ones(2))),
                          ["'extra'", "no such model"]),
    "no projector": (1, edit_state(lambda s: s.pop("vision_model.vision_projection.weight")),
                     ["multi_modal_projector.weight"]),
    "a scalar": (1, edit_state(lambda s: s.update({WQ: torch.tensor(1.0)})), ["belong together"]),
    "another shape": (1, edit_state(lambda s: s.update({WQ: torch.ones(16, 8)})), ["q_proj", "[16, 8]"]),
    "tokens cut": (1, cut("tokenizer.model", 300), ["tokenizer.model"]),
    "tokens not base64": (1, lambda f: (f / "tokenizer.model").write_text("é 0\n"), ["line 1", "base64"]),
    "too few tokens": (1, lambda f: (f / "tokenizer.model").write_text("AA== 0\n"), ["1 tokens, where 256"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line(case, tmp_path):
    ranks, spoil, fragments = BAD[case]
    spoil(meta_folder(tmp_path, ranks))
    line = refusal(tmp_path)
    for fragment in fragments:
        assert fragment in line


def test_the_loader_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"`python -m weights\.from_meta FOLDER OUT` converts"):
        find_checkpoint(meta_folder(tmp_path))
