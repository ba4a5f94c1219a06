"""The benchmark: what its figures are made of, its JSON, its page, and bad input in one line.

On the smallest network, so that nothing here depends on how fast anything is. Compiled decoding and
transformers are stood in for by plain decoding, but for one test of the real peer.
"""
import json
import platform
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch

import benchmark
from benchmarks import measure, parts, tables, waterfall
from benchmarks.peer import Peer
from benchmarks.subject import SHAPES, Greedy, Subject, Timed, cut, fill, grid_of, random_model
from model.decoder import CrossAttentionLayer
from pruning import Pruner, load
from weights import config_from_dict

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = config_from_dict({
    "model_type": "mllama", "image_token_index": 60,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
                    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "cross_attention_layers": [1, 3], "max_position_embeddings": 512},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 3, "num_global_layers": 1, "intermediate_layers_indices": [1, 2]}})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", lambda: CONFIG)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2 ** 16)
    monkeypatch.setitem(measure.PRODUCT_SIDE, "cpu", 16)
    with torch.inference_mode():
        yield


class Plain:
    """Stands in for Compiled."""

    def __init__(self, decode, device):
        self.decode = decode

    def __call__(self, tokens, cache):
        return self.decode(tokens, cache)


class Twin:
    """Stands in for Peer: this project once more, with all tile slots' bytes."""
    version = "9.9"

    def __init__(self, model):
        self.model, self.images = model, {}

    def encode(self, tiles):
        image = self.model.encode([tiles])
        self.images[id(image.features)] = image
        return image.features

    def prefill(self, ids, states, grids, room, static=False):
        image = self.images[id(states)].expand(len(ids))
        return self.model.prefill(ids, [ids.shape[1]] * len(ids), image, room)

    def decode(self, tokens, cache):
        return self.model.decode(tokens, cache)

    def corrected(self):
        return torch.inference_mode()

    def image_kv_bytes(self, cache):
        return 4 * cache.image_bytes()


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program beside a stand-in of transformers: what it printed, and its JSON."""
    def run(*argv: str) -> tuple[str, dict]:
        monkeypatch.setattr("model.compiled.Compiled", Plain)
        monkeypatch.setattr(benchmark, "Peer", Twin)
        small = "--device", "cpu", "--repeat", "2", "--new-tokens", "3", "--prompt-tokens", "7"
        argv += "--json", str(tmp_path / "made.json")
        monkeypatch.setattr("sys.argv", ["benchmark.py", *small, *argv])
        benchmark.main()
        return capsys.readouterr().out, json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    return run


@pytest.fixture(scope="module")
def subject():
    return Subject(random_model(CONFIG, CPU, torch.float32), "tiny", CONFIG)


# ----- timing


def test_jobs_take_turns_after_a_warm_up():
    calls = []
    samples = measure.in_turns({"a": partial(calls.append, "a"), "b": partial(calls.append, "b")}, 2, CPU)
    assert calls == ["a", "b"] * 3 and {name: len(ms) for name, ms in samples.items()} == {"a": 2, "b": 2}
    assert min(samples["a"] + samples["b"]) > 0


@pytest.mark.parametrize(("tokens", "repeat", "expected"), [
    (32, 7, (7, 4, 1, 32)), (3, 7, (3, 1, 3, 6)), (4, 2, (2, 2, 2, 8)), (1, 1, (1, 1, 3, 4))])
def test_decoding_is_cut_into_pieces(tokens, repeat, expected):
    assert waterfall.pace(tokens, repeat) == expected


def test_peak_is_what_a_job_adds_and_lets_go():
    peak = measure.peak_added(lambda: torch.ones(2 ** 24), CPU)                         # 64 MiB
    assert (peak is None) == (not measure.knows_peak())
    assert peak is None or 2 ** 26 - 2 ** 20 <= peak < 2 ** 27       # the system counts in batches of pages


def test_the_machine_has_no_name_of_its_own():
    assert platform.node() not in str(measure.machine(CPU))
    assert measure.machine(CPU)["threads"] == torch.get_num_threads()


# ----- what is timed


def test_a_slice_of_11b_is_what_it_says():
    sliced = cut(SHAPES["11b"](), 5)
    assert (sliced.text.num_hidden_layers, sliced.text.cross_attention_layers) == (5, (3,))
    assert (sliced.vision.num_hidden_layers, sliced.vision.num_global_layers) == (2, 2)
    assert sliced.vision.intermediate_layers_indices == (0, 1)
    assert cut(CONFIG, 5) is CONFIG


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_whole_models(shape):
    config = SHAPES[shape]()
    assert config.text.hidden_size % config.text.num_attention_heads == 0
    assert [grid_of(config.vision, tiles) for tiles in (1, 2, 3, 4)] == [(1, 1), (1, 2), (1, 3), (2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_sane(dtype):
    model = random_model(cut(SHAPES["tiny"](), 2), CPU, dtype)
    subject = Subject(model, "tiny", CONFIG)
    logits, _ = subject.read(subject.prompt(2, 9), model.encode([subject.tiles(2, Pruner())]), 1, Pruner())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits.isfinite().all() and 0.3 < logits.std() < 3
    weight = model.lm_head.weight.float()
    assert (weight[0] - weight[1]).abs().max() > 0.01


def test_rows_of_a_big_matrix_differ():
    weight, noise = torch.empty(1000, 2048), torch.randn(1_000_003)
    fill("mlp.weight", weight, noise)
    assert (weight[1:] - weight[0]).abs().amax(1).min() > 0
    assert weight.std() == pytest.approx(2048 ** -0.5, 0.01)


def test_linears_of_a_step_leave_out_the_reading_of_the_image(subject):
    model, text = subject.model, CONFIG.text
    job, held = subject.linears_alone(3, 2)
    job()
    keys_values = 2 * sum(layer.cross_attn.k_proj.weight.nbytes for layer in model.language_model.layers
                          if isinstance(layer, CrossAttentionLayer))
    counts = model.parameter_counts()
    norms = sum(p.nbytes for name, p in model.language_model.layers.named_parameters()
                if "norm" in name or "gate" in name and "proj" not in name)
    assert held == 4 * sum(counts[part] for part in ("self_attention", "cross_attention", "lm_head")) \
        - keys_values - norms
    assert subject.linears()[-1] is model.lm_head and text.vocab_size == model.lm_head.out_features


def test_the_whole_prefill_is_put_together_from_a_slice(subject):
    sliced = Subject(random_model(cut(CONFIG, 2), CPU, torch.float32), "tiny", CONFIG)
    assert sliced.whole_prefill(image_ms=10, text_ms=4, head_ms=1) == 1 + 3 * 3 / 1 + 6 * 2 / 1
    assert subject.whole_prefill(image_ms=10, text_ms=4, head_ms=1) == 10


def test_a_timed_pruner_does_what_the_one_inside_does(subject):
    ids, image = subject.prompt(2, 9), subject.model.encode([subject.tiles(4, Pruner())])
    for inner in load("trimmed_llama", keep=0.3), load("random", keep=0.5), load("fastv"):
        clock = Timed(inner, CPU)
        (expected, held), (logits, kept) = (subject.read(ids, image, 2, p) for p in (inner, clock))
        assert torch.equal(logits, expected) and held.kept() == kept.kept() and clock.ms > 0


def test_greedy_goes_on_where_it_stopped(subject):
    ids, image = subject.prompt(1, 9), subject.model.encode([subject.tiles(1, Pruner())])
    logits, cache = subject.read(ids, image, 6, Pruner())
    job, tokens = Greedy(subject.model.decode, logits, cache, 2, Pruner()), [logits.argmax(-1)]
    job()
    job()
    _, cache = subject.read(ids, image, 6, Pruner())
    for _ in range(4):
        tokens.append(subject.model.decode(tokens[-1], cache).argmax(-1))
    assert torch.equal(job.tokens, tokens[-1]) and job.step == 4


# ----- the waterfall


def test_what_is_put_back_changes_no_logit(subject):
    ids, model = subject.prompt(2, 9), subject.model
    image = model.encode([subject.tiles(1, Pruner())])
    (logits, plain), (_, slow) = (subject.read(ids, image, 4, Pruner()) for _ in range(2))
    slots = 4 * CONFIG.vision.tokens_per_tile
    slow.images = [waterfall.all_slots(kv, slots) for kv in slow.images]
    assert {kv.key.shape[2] for kv in slow.images} == {slots}
    lever, tokens = waterfall.PutBack(model, 9, grow=True, repeat=True), logits.argmax(-1)
    for _ in range(3):
        torch.testing.assert_close(lever(tokens, slow), model.decode(tokens, plain), atol=1e-5, rtol=0)
    assert lever.held == 12


def test_waterfall(run):
    out, made = run("--waterfall", "--against", "transformers")
    steps = [bar["step"] for bar in made["waterfall"]]
    assert steps[0] == "transformers 9.9, eager" and len(steps) == 7
    assert steps[-1].startswith("pruned (trimmed_llama")
    for before, bar in zip(made["waterfall"], made["waterfall"][1:], strict=False):
        assert bar["gain"] == pytest.approx(before["ms"] / bar["ms"]) and bar["step"] in out
    assert made["rows"] == [] and made["about"]["tiles"] == 1


# ----- the whole program


KEYS = {"component", "shape", "layers", "dtype", "device", "batch", "tiles", "method", "keep", "ours_ms",
        "peer_ms", "peer", "ratio", "ours_bytes", "peer_bytes", "fraction_of_ceiling"}


def test_every_part_beside_transformers(run):
    out, made = run("--layers", "4", "--batch", "1,2", "--tiles", "1,2", "--prune", "trimmed_llama", "--keep",
                    "0.3", "--against", "transformers", "--compile")
    rows = made["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["component"] for row in rows} == {"encode", "project", "prune", "prefill", "decode",
                                                  "first_token", "peak_memory", "image_kv"}
    for row in rows:
        if row["ratio"] is not None and row["ours_ms"] is not None:
            assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        assert (row["layers"], row["shape"], row["dtype"]) == (4, "tiny", "bfloat16")
        assert row["keep"] == (0.3 if row["method"] == "trimmed_llama" else 1.0)
    decode = [row for row in rows if row["component"] == "decode" and row["tiles"] == row["batch"] == 1]
    assert [(row["ours"], row["peer"], row["method"]) for row in decode] == [
        (ours, f"transformers 9.9, {how}", method) for method in ("none", "trimmed_llama")
        for ours in ("eager", "compiled") for how in ("eager", "static cache, compiled")]
    assert [row["ours"] == "compiled" for row in decode] == [row.get("first_call_s", 0) > 0 for row in decode]
    assert ["static" in row["peer"] for row in decode] == ["peer_first_call_s" in row for row in decode]
    assert "trimmed_llama, keep 0.3 per head; layer 0 keeps all in prefill: the first call, which" in out
    kv = [row for row in rows if row["component"] == "image_kv"]
    assert {row["ratio"] for row in kv if row["method"] == "none"} == {4.0} and len(kv) == 8
    assert [equal["tiles"] for equal in made["equal"]] == [1, 2]
    assert max(equal["max_difference"] for equal in made["equal"]) == 0
    assert made["versions"]["transformers"] == "9.9" and made["settings"]["repeat"] == 2
    assert shlex.split(made["command"])[-2:] == ["--json", "made.json"]
    assert out.count("\n") > len(rows) and "the own work of trimmed_llama" in out


def test_the_fraction_of_a_ceiling(run):
    _, made = run("--tiles", "2")
    rows, most = {row["component"]: row for row in made["rows"]}, made["ceilings"]
    flops = random_model(CONFIG, CPU, torch.bfloat16).flops(7, [(1, 2)])
    for part in "encode", "prefill":
        reached = flops[part] / rows[part]["ours_ms"] * 1000
        assert rows[part]["fraction_of_ceiling"] == pytest.approx(reached / most["matmul_flops"])
    reached = rows["decode"]["ours_bytes"] / rows["decode"]["ours_ms"] * 1000
    assert rows["decode"]["fraction_of_ceiling"] == pytest.approx(reached / most["copy_bytes_per_s"])
    assert rows["first_token"]["ours_ms"] > rows["prefill"]["ours_ms"] and rows["encode"]["peer_ms"] is None


def test_a_method_that_acts_before_the_encoder_encodes_less(run):
    _, made = run("--tiles", "4", "--prune", "downsample", "--keep", "0.25")
    ms = {(row["component"], row["method"]): row for row in made["rows"]}
    assert ms["image_kv", "downsample"]["ours_bytes"] * 4 == ms["image_kv", "none"]["ours_bytes"]
    assert ("encode", "downsample") in ms


def test_table_2(run):
    out, made = run("--preset", "table2", "--batch", "1,4", "--keep", "0.2")
    prefill = [(row["method"], row["keep"], row["batch"]) for row in made["rows"]
               if row["component"] == "prefill"]
    assert prefill == [(method, keep, batch) for batch in (1, 4) for method, keep in (
        ("none", 1.0), ("random", 0.509), ("random", 0.396), ("trimmed_llama", 0.2))]
    assert {row["component"] for row in made["rows"]} == {"prefill", "prune", "decode", "peak_memory",
                                                          "image_kv"}
    _, *lines = tables.table2(made)
    assert [line[4] for line in lines] == ["-", "-4.1 %", "-4.3 %", "-", "-", "-7.1 %", "-11.4 %", "-"]
    assert lines[0][3] == "+0.0 %" and "-11.4 %" in out


def test_real_weights_are_loaded(run):
    _, made = run("--model", "tiny", "--tiles", "1")
    load, *_ = made["rows"]
    assert (load["component"], load["shape"], load["tiles"]) == ("load", "tiny", None) and load["ours_ms"] > 0


def test_the_real_transformers(subject):
    peer = Peer(subject.model)
    args = benchmark.argparse.Namespace(prompt_tokens=9, new_tokens=2, repeat=1, batch=[2], compile=False,
                                        preset=None)
    bench = parts.Bench(args, subject, peer, [Pruner()], {"copy_bytes_per_s": 1e9, "matmul_flops": 1e9})
    made = {"rows": [], "equal": []}
    bench.run(1, made)
    assert made["equal"][0]["max_difference"] < 1e-4 < made["equal"][0]["std"]
    rows = {row["component"]: row for row in made["rows"]}
    assert rows["image_kv"]["ratio"] == 4 and rows["decode"]["peer"] == f"transformers {peer.version}, eager"


def test_what_methods_add(run):
    out, made = run("--methods", "random,fastv", "--keep", "0.5", "--set", "fastv.when=step", "--tiles", "2")
    whole, random, fastv = made["methods"]
    assert [row["method"] for row in made["methods"]] == ["none", "random", "fastv"] and made["rows"] == []
    image = 2 * CONFIG.vision.tokens_per_tile
    text, layers = CONFIG.text, len(CONFIG.text.cross_attention_layers)
    token = 2 * 2 * text.num_key_value_heads * text.head_dim                        # bytes in one layer, bf16
    assert whole["stored_bytes"] == whole["read_bytes"] == image * layers * token
    assert random["stored_bytes"] == random["read_bytes"] == image // 2 * layers * token
    assert fastv["stored_bytes"] >= whole["stored_bytes"] > fastv["read_bytes"]     # chooses from all again
    assert fastv["own_token_ms"] > random["own_token_ms"] and random["own_prefill_ms"] > 0
    assert all(word in out for word in ("random 0.5", "fastv 0.5", "image KV stored"))


# ----- the page, the drawing


def test_the_committed_pages_are_those_of_the_committed_figures():
    files = tables.read_files(benchmark.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") == tables.page(files)
    assert tables.with_summary(readme, files) == readme


def test_a_page_without_figures_says_so():
    assert "Nothing has been measured yet." in tables.page({})


def test_the_page_has_every_figure(run, tmp_path):
    out, made = run("--tiles", "2", "--against", "transformers")
    opened, closed = tables.MARKS
    (tmp_path / "first.md").write_text(f"before {opened} old {closed} after\n", encoding="utf-8")
    tables.write_pages(tmp_path, tmp_path / "page.md", tmp_path / "first.md")
    first = (tmp_path / "first.md").read_text(encoding="utf-8")
    assert first.startswith(f"before {opened}\n\n|") and first.endswith(f"|\n\n{closed} after\n")
    encode = next(row for row in made["rows"] if (row["component"], row["tiles"]) == ("encode", 2))
    name, *cells = tables.summary(tables.read_files(tmp_path))[1]
    assert name == "tiny, 5 decoder layers, bfloat16" and cells[0] == cells[7] == "-"
    assert cells[1] == f"{encode['ratio']:.2f}" and "old" not in first and name in first
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## tiny, 5 decoder layers, bfloat16, cpu" in page and made["command"] in page
    for row in made["rows"]:
        assert "| " + " | ".join(tables.cells(row)) + " |" in page
    for note in tables.notes(made):
        assert f"- {note}" in page and note in out


def test_report_writes_the_page(monkeypatch, tmp_path):
    (folder := tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text("".join(tables.MARKS), encoding="utf-8")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", folder / "results")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--report"])
    benchmark.main()
    assert (folder / "README.md").read_text(encoding="utf-8") == tables.page({})
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("|") == 20
    with pytest.raises(ValueError, match="no place for the summary"):
        tables.with_summary("nothing", {})
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="other.json: not written by"):
        tables.read_files(tmp_path)


@pytest.mark.parametrize("argv", [["--tiles", "1", "--against", "transformers"], ["--waterfall"],
                                  ["--preset", "table2", "--batch", "1"]])
def test_plot(run, tmp_path, argv):
    run(*argv, "--plot", str(tmp_path / "drawn.png"))
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


# ----- bad input


@pytest.mark.parametrize(("argv", "words"), [
    (["--repeat", "0"], "--repeat is 0"), (["--batch", "1,-1"], "--batch is [1, -1]"),
    (["--new-tokens", "0"], "--new-tokens is 0"), (["--prompt-tokens", "0"], "--prompt-tokens is 0"),
    (["--batch", "x"], "--batch"), (["--prompt-tokens", "600"], "context holds 512"),
    (["--tiles", "5"], "images of 1, 2, 3, 4 tiles"), (["--shape", "7b"], "invalid choice"),
    (["--layers", "1"], "give at least 2"), (["--layers", "9"], "the whole decoder has 5"),
    (["--layers", "2", "--model", "tiny"], "leave out --shape and --layers"),
    (["--model", "nowhere/at-all/x"], "nowhere"), (["--prune", "nothing"], "no pruning method"),
    (["--keep", "0.5"], "name it with --prune"), (["--prune", "fastv", "--keep", "2.0"], "keep is 2.0"),
    (["--device", "tpu"], "tpu"), (["--dtype", "fp7"], "fp7"), (["--against", "vllm"], "invalid choice"),
    (["--json", "no/such/folder/x.json"], "there is no folder"), (["--plot", "x.gif"], "must end in"),
    (["--plot", "no/such/folder/x.png"], "there is no folder"),
    (["--methods", "all", "--prune", "fastv"], "leave out"), (["--methods", "some"], "no pruning method"),
    (["--preset", "table3"], "invalid choice"), (["--preset", "table2", "--waterfall"], "give one of them"),
])
def test_bad_input_is_one_line_before_anything_is_measured(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(benchmark, "ceilings", None)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--device", "cpu", *argv])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and words in error[-1] and error[-1].startswith("error: ")
    assert len(error) <= 1 + ("loading" in error[0])
