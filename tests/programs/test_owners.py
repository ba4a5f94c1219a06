"""What owners are told their hardware holds: docs/OWNERS.md is what the code computes from the shapes."""
from pathlib import Path

import pytest
import torch

from benchmarks.measure import Allocated
from benchmarks.subject import SHAPES, Subject, grid_of, random_model
from generate import generate
from pruning import Pruner
from weights import load_model
from weights.memory import FORMATS, answer_bytes, card_for, main, shares, table, weight_bytes
from weights.shapes import NINETY, OFFICIAL
from weights.skeleton import without_weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "OWNERS.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables_that_the_code_computes():
    lines = list(table({name: OFFICIAL[name] for name in ("11b", "90b")}))
    assert "\n".join(lines) in PAGE
    assert "python -m weights.memory" in PAGE


def test_the_page_on_processes_has_the_table_that_the_code_computes():
    page = (ROOT / "docs" / "PROCESSES.md").read_text(encoding="utf-8")
    assert "\n".join(shares({name: OFFICIAL[name] for name in ("11b", "90b")})) in page
    assert "python -m weights.memory --processes" in page


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_of_weights_are_those_of_a_loaded_model(form):
    model = load_model("tiny", dtype="bf16", quantize=FORMATS[form])
    expected = sum(tensor.nbytes for tensor in model.state_dict().values())
    shapes = without_weights(model.config).bfloat16()
    assert weight_bytes(shapes, FORMATS[form]).total == expected


def test_what_a_token_reads_leaves_out_what_is_looked_up_and_what_is_cached():
    model = without_weights(NINETY)
    decoder = model.language_model
    unread = [decoder.embed_tokens, *(part for layer in decoder.cross_layers
                                      for part in (layer.cross_attn.k_proj, layer.cross_attn.v_proj,
                                                   layer.cross_attn.k_norm))]
    read = [decoder, model.lm_head]
    count = sum(p.numel() for part in read for p in part.parameters())
    count -= sum(p.numel() for part in unread for p in part.parameters())
    assert weight_bytes(model, None).read == 2 * count


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tiles", [1, 4])
@torch.inference_mode()
def test_bytes_of_an_answer_are_just_above_what_is_allocated(tiles, batch):
    model = random_model(SHAPES["tiny"](), torch.device("cpu"), torch.bfloat16)
    subject = Subject(model, generate, "tiny", model.config)
    image, ids = subject.tiles(tiles, Pruner()), subject.prompt(batch, 128)
    with Allocated() as encoding:
        tokens = model.encode([image])
    with Allocated() as prefill:
        model.prefill(ids, [128] * batch, tokens.expand(batch), 256)
    estimate = sum(answer_bytes(model, [grid_of(model.config.vision, tiles)], batch=batch).values())
    measured = max(encoding.peak, prefill.peak + tokens.features.nbytes)
    assert measured <= estimate <= 1.3 * measured


def test_the_smallest_gpu_that_holds_it():
    assert card_for(8 * 10 ** 9) == "12 GB" and card_for(7 * 10 ** 9) == "8 GB"
    assert card_for(24 * 10 ** 9) == "24 GB" and card_for(25 * 10 ** 9) == "32 GB"
    assert card_for(178 * 10 ** 9) == "3 x 80 GB"


def test_the_command_prints_one_shape_and_names_those_that_it_knows(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["memory", "--shape", "11b"])
    main()
    assert capsys.readouterr().out.splitlines() == list(table({"11b": OFFICIAL["11b"]}))
    monkeypatch.setattr("sys.argv", ["memory", "--shape", "11b-huge"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "unknown shape '11b-huge': use one of 11b, 90b" in capsys.readouterr().err
