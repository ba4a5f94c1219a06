"""The benchmark: the whole program, its JSON, and bad input in one line.

On a tiny network, and nothing here depends on how fast anything is. Eager decoding stands in for compiled
decoding, and this project for transformers, except in the tests of the real peer.
"""
import json
import shlex
from dataclasses import replace

import pytest
import torch
from small_benchmark import CONFIG, CPU

import benchmark
from benchmarks import paper, parts
from benchmarks.methods import for_random_weights
from benchmarks.peer import Peer
from benchmarks.subject import random_model
from model.config import RopeScaling
from pruning import Pruner, load
from weights import read_config

pytestmark = pytest.mark.usefixtures("small_measurements")

# ----- the whole program


KEYS = {"component", "shape", "layers", "dtype", "device", "batch", "tiles", "method", "keep", "ours_ms",
        "peer_ms", "peer", "ratio", "ours_bytes", "peer_bytes", "fraction_of_ceiling"}


def test_every_part_beside_transformers(run_benchmark):
    out, made = run_benchmark("--layers", "4", "--batch", "1,2", "--tiles", "1,2", "--prune", "trimmed_llama",
                              "--keep", "0.3", "--against", "transformers", "--compile")
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
    assert [(each["tiles"], each["batch"], each["pruner"]) for each in made["compiled"]] == [
        (tiles, batch, name) for tiles in (1, 2) for batch in (1, 2)
        for name in (None, str(load("trimmed_llama", keep=0.3)))]
    assert all(each["equal_tokens"] == each["tokens"] > 0 == each["max_difference"] < each["std"]
               for each in made["compiled"])
    assert max(equal["max_difference"] for equal in made["equal"]) == 0
    assert made["versions"]["transformers"] == "9.9" and made["settings"]["repeat"] == 2
    assert shlex.split(made["command"])[-2:] == ["--json", "made.json"]
    assert out.count("\n") > len(rows) and "the own work of trimmed_llama" in out


def test_several_methods_at_several_ratios(run_benchmark):
    _, made = run_benchmark("--tiles", "2", "--prune", "random,coreset", "--keep", "0.5,0.2")
    kept = [(row["method"], row["keep"]) for row in made["rows"] if row["component"] == "decode"]
    assert kept == [("none", 1.0), ("random", 0.5), ("random", 0.2), ("coreset", 0.5), ("coreset", 0.2)]


def test_what_was_measured_before_an_interruption_is_there(run_benchmark, monkeypatch, tmp_path):
    """The file is written after each number of tiles; stopping in the second one leaves the first."""
    inner = parts.Bench.memory

    def stop_at_two(bench, batch, encoded):
        if encoded.count == 2:
            raise KeyboardInterrupt
        return inner(bench, batch, encoded)

    monkeypatch.setattr(parts.Bench, "memory", stop_at_two)
    with pytest.raises(SystemExit):
        run_benchmark("--tiles", "1,2")
    made = json.loads((tmp_path / "made.json").read_text())
    assert {row["tiles"] for row in made["rows"]} == {1}


def test_the_fraction_of_a_ceiling(run_benchmark):
    _, made = run_benchmark("--tiles", "2")
    rows, most = {row["component"]: row for row in made["rows"]}, made["ceilings"]
    flops = random_model(CONFIG, CPU, torch.bfloat16).flops(7, [(1, 2)])
    for part in "encode", "prefill":
        reached = flops[part] / rows[part]["ours_ms"] * 1000
        assert rows[part]["fraction_of_ceiling"] == pytest.approx(reached / most["matmul_flops"])
    reached = rows["decode"]["ours_bytes"] / rows["decode"]["ours_ms"] * 1000
    assert rows["decode"]["fraction_of_ceiling"] == pytest.approx(reached / most["copy_bytes_per_s"])
    assert rows["first_token"]["ours_ms"] > rows["prefill"]["ours_ms"] and rows["encode"]["peer_ms"] is None


def test_a_method_that_acts_before_the_encoder_encodes_less(run_benchmark):
    _, made = run_benchmark("--tiles", "4", "--prune", "downsample", "--keep", "0.25")
    ms = {(row["component"], row["method"]): row for row in made["rows"]}
    assert ms["image_kv", "downsample"]["ours_bytes"] * 4 == ms["image_kv", "none"]["ours_bytes"]
    assert ("encode", "downsample") in ms


def test_table_2(run_benchmark):
    out, made = run_benchmark("--preset", "table2", "--batch", "1,4", "--keep", "0.2")
    prefill = [(row["method"], row["keep"], row["batch"]) for row in made["rows"]
               if row["component"] == "prefill"]
    assert prefill == [(method, keep, batch) for batch in (1, 4) for method, keep in (
        ("none", 1.0), ("random", 0.509), ("random", 0.396), ("trimmed_llama", 0.2), ("coreset", 0.2))]
    assert {row["component"] for row in made["rows"]} == {"prefill", "prune", "decode", "peak_memory",
                                                          "image_kv"}
    _, *lines = paper.table2(made)
    assert [line[4] for line in lines] == ["-", "-4.1 %", "-4.3 %", "-", "-",
                                           "-", "-7.1 %", "-11.4 %", "-", "-"]
    full, random = (row["ours_ms"] for row in made["rows"][:2])
    assert lines[1][7] == f"{100 * (random / full - 1):+.1f} %" and "-11.4 %" in out


def test_real_weights_are_loaded(run_benchmark):
    _, made = run_benchmark("--model", "tiny", "--tiles", "1")
    load, *_ = made["rows"]
    assert (load["component"], load["shape"], load["tiles"]) == ("load", "tiny", None) and load["ours_ms"] > 0


def test_the_real_transformers(subject):
    peer = Peer(subject.model)
    args = benchmark.argparse.Namespace(prompt_tokens=9, new_tokens=2, repeat=1, batch=[2], compile=False,
                                        preset=None)
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops": 1e9}
    bench = parts.Bench(args, subject, {parts.EAGER: peer}, [Pruner()], ceilings)
    made = {"rows": [], "equal": []}
    saved = []
    bench.run(1, made, lambda so_far: saved.append(len(so_far["rows"])))
    assert saved == [len(made["rows"])]
    assert made["equal"][0]["max_difference"] < 1e-4 < made["equal"][0]["std"]
    rows = {row["component"]: row for row in made["rows"]}
    assert rows["image_kv"]["ratio"] == 4 and rows["decode"]["peer"] == f"transformers {peer.version}, eager"


def test_what_methods_add(run_benchmark):
    out, made = run_benchmark("--methods", "random,random:seed=1,fastv", "--keep", "0.5", "--tiles", "2",
                              "--set", "fastv.when=step")
    whole, random, _, fastv = made["methods"]
    assert [row["method"] for row in made["methods"]] == ["none", "random", "random seed=1", "fastv"]
    assert made["rows"] == []
    image = 2 * CONFIG.vision.tokens_per_tile
    text, layers = CONFIG.text, len(CONFIG.text.cross_attention_layers)
    token = 2 * 2 * text.num_key_value_heads * text.head_dim                        # bytes in one layer, bf16
    assert whole["stored_bytes"] == whole["read_bytes"] == image * layers * token
    assert random["stored_bytes"] == random["read_bytes"] == image // 2 * layers * token
    assert fastv["stored_bytes"] >= whole["stored_bytes"] > fastv["read_bytes"]     # chooses from all again
    assert fastv["own_token_ms"] > random["own_token_ms"] and random["own_prefill_ms"] > 0
    assert all(word in out for word in ("random 0.5", "fastv 0.5", "image KV stored"))


def test_a_random_guide_has_the_rotary_embedding_of_the_model(tmp_path):
    rope = RopeScaling(factor=4.0)
    config = replace(CONFIG, text=replace(CONFIG.text, rope_scaling=rope))
    assert for_random_weights(load("sgl"), config, tmp_path).guide == str(tmp_path)
    guide = read_config(tmp_path)
    assert guide.text.rope_scaling == rope and guide.text.cross_attention_layers == (1,)


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
    (["--methods", "all", "--whole", "all"], "leave out"), (["--whole", "all", "--batch", "2"], "leave out"),
    (["--whole", "random", "--keep", "0.5,2.0"], "keep is 2.0"),
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
