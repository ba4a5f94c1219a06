"""The benchmark: what its figures are made of, its JSON, its page, and bad input in one line.

On a tiny network, and nothing here depends on how fast anything is. Eager decoding stands in for compiled
decoding, and this project for transformers, except in the tests of the real peer.
"""
import copy
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
from benchmarks.subject import SHAPES, Subject, cut, fill, grid_of, random_model
from benchmarks.timed import Timed
from generate import generate
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
    return Subject(random_model(CONFIG, CPU, torch.float32), generate, "tiny", CONFIG)


# ----- timing


def test_jobs_take_turns_after_a_warm_up():
    calls = []
    jobs = {name: partial(calls.append, name) for name in ("a", "b")}
    samples = measure.times_in_turns(jobs, 2, CPU)
    assert calls == ["a", "b"] * 3 and {name: len(ms) for name, ms in samples.items()} == {"a": 2, "b": 2}
    assert min(samples["a"] + samples["b"]) > 0


def test_rounds_before_the_recorded_ones():
    numbers = iter(range(20))
    assert measure.in_turns({"a": lambda: next(numbers), "b": lambda: -next(numbers)}, 2, warm_up=3) == {
        "a": [6, 8], "b": [-7, -9]}


@pytest.mark.parametrize(("tokens", "rounds"), [(32, 1), (3, 1), (2, 2), (1, 3)])
def test_a_cuda_graph_is_warm_after_three_steps(tokens, rounds):
    assert waterfall.warm_up_rounds(tokens) == rounds


def test_peak_counts_memory_that_a_job_frees_again():
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
    subject = Subject(model, generate, "tiny", CONFIG)
    image = model.encode([subject.tiles(2, Pruner())])
    logits, _ = model.prefill(subject.prompt(2, 9), [9, 9], image.expand(2), 1)
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
    sliced = Subject(random_model(cut(CONFIG, 2), CPU, torch.float32), generate, "tiny", CONFIG)
    assert sliced.complete_prefill(image_ms=10, text_ms=4, head_ms=1) == 1 + 3 * 3 / 1 + 6 * 2 / 1
    assert subject.complete_prefill(image_ms=10, text_ms=4, head_ms=1) == 10


class FakeTime:
    """A clock of `measure` on which only `work` takes time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: self.now)

    def work(self, ms: float):
        self.now += ms / 1000


@pytest.mark.parametrize("method", ["trimmed_llama", "random", "fastv", "mint", "elastic_cache"])
def test_a_timed_pruner_does_what_the_one_inside_does(subject, method):
    ids, image = subject.prompt(2, 9), subject.model.encode([subject.tiles(4, Pruner())], keep_states=True)
    inner = load(method, keep=0.5)
    expected = subject.answer(ids, image, 3, inner)
    clock = Timed(inner, CPU)
    answer = subject.answer(ids, image, 3, clock)
    assert (answer.tokens, answer.kept, answer.image_kv_bytes, answer.image_kv_stored) == (
        expected.tokens, expected.kept, expected.image_kv_bytes, expected.image_kv_stored)
    assert clock.ms["prefill"] > 0 and clock.ms["decode"] > 0
    assert len(clock.read) == 4                                     # after prefill and after 3 steps


def test_the_clock_of_a_pruner_counts_its_hooks_and_nothing_else(subject, monkeypatch):
    time = FakeTime(monkeypatch)

    class Slow(Pruner):
        """1 ms to begin, 2 when encoded, 4 at each of 2 layers, 8 and 16 around, 32 a step."""
        keeps_all = False

        def begin(self, model):
            time.work(1)

        def encoded(self, image, prompts):
            time.work(2)
            return image

        def layer(self, i, queries, image, kv):
            time.work(4)
            return image, kv

        def stepped(self, step, queries, image_kv):
            time.work(32)
            return image_kv

        def around(self, generate):
            def run(model, *args):
                time.work(8)
                generate(copy.copy(model), *args[:-2], Second(), None)
                answer = generate(model, *args)
                time.work(16)
                return answer
            return run

    class Second(Pruner):
        """64 ms in a second model."""
        keeps_all = False

        def begin(self, model):
            time.work(64)

    clock = Timed(Slow(), CPU)
    subject.answer(subject.prompt(2, 9), subject.model.encode([subject.tiles(1, Pruner())]), 3, clock)
    assert clock.ms["prefill"] == pytest.approx(1 + 2 + 2 * 4 + 8 + 16 + 64)
    assert clock.ms["decode"] == pytest.approx(3 * 32)


def test_decoding_is_that_of_generate(subject):
    """The decode steps of an answer are counted without the first token, which comes from prefill."""
    ids, image = subject.prompt(2, 9), subject.model.encode([subject.tiles(1, Pruner())])
    answer = subject.answer(ids, image, 4)
    expected = generate(subject.model, ids.tolist(), image.expand(2), 5, ())
    assert answer.tokens == expected.tokens and answer.decoded == 2 * 4
    prefill = subject.answer(ids, image, 0)
    assert [len(tokens) for tokens in prefill.tokens] == [1, 1] and prefill.decoded == 0
    assert subject.answer(subject.prompt(2, 9, image=False), None, 1).image_kv_bytes == 0


# ----- the waterfall


def test_what_is_put_back_changes_no_logit(subject):
    ids, model = subject.prompt(2, 9), subject.model
    image = model.encode([subject.tiles(1, Pruner())]).expand(2)
    (logits, plain), (_, slow) = (model.prefill(ids, [9, 9], image, 4) for _ in range(2))
    plain.image_kv = Pruner().prefilled(plain.image_kv)
    slots = 4 * CONFIG.vision.tokens_per_tile
    slow.image_kv = waterfall.AllSlots(slots).prefilled(slow.image_kv)
    assert {kv.key.shape[2] for kv in slow.image_kv} == {slots}
    lever, tokens = waterfall.PutBack(model, 9, grow=True, repeat=True), logits.argmax(-1)
    for _ in range(3):
        torch.testing.assert_close(lever(tokens, slow), model.decode(tokens, plain), atol=1e-5, rtol=0)
    assert lever.length == 12


def test_bars_read_all_slots_where_they_say_so(subject):
    jobs = waterfall.answers(subject, None, load("random", keep=0.5), 1, 1, 9, 2)
    eager = list(jobs)[:4]                              # compiling takes seconds
    bytes_of = {name: jobs[name]().image_kv_bytes for name in eager}
    full = bytes_of["real tiles only"]
    assert bytes_of["static text cache"] == full > 0
    assert bytes_of["this project, everything put back"] == 4 * full
    assert bytes_of["keys and values not repeated"] == 4 * full


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
    assert f"{load('trimmed_llama', keep=0.3)}: the first call, which" in out
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
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops": 1e9}
    bench = parts.Bench(args, subject, {parts.EAGER: peer}, [Pruner()], ceilings)
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


@pytest.mark.parametrize("content", [
    "[]", "{}", "null", '{"rows": [], "ceilings": {}, "waterfall": []}',
    '{"rows": [{"component": "encode"}], "ceilings": {}, "waterfall": [], "methods": [], "equal": []}'])
def test_a_file_that_is_no_measurement_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
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
