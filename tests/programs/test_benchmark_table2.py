"""Table 2 of the paper: put together from a slice it is what the complete decoder needs, in operations."""
from functools import partial

import pytest
import torch
from small_benchmark import CONFIG, CPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import paper, table2, timed
from benchmarks.subject import Subject, cut, random_model
from benchmarks.table2 import Prefill, of_complete, of_depth
from benchmarks.whole import Watched
from generate import generate
from pruning import Pruner, load

pytestmark = pytest.mark.usefixtures("small_measurements")
T, TILES = 7, 2
N = TILES * CONFIG.vision.tokens_per_tile
OPERATIONS = "own", "paper's formula", "operations"
METHODS = {"none": Pruner(), "random": load("random", keep=0.4),
           "trimmed_llama": load("trimmed_llama", keep=0.4, budget=0.4),
           "coreset": load("coreset", keep=0.4), "early coreset": load("coreset", keep=0.4, question=0),
           "csp": load("csp", keep=0.4)}


def counting(job, device):
    """In place of milliseconds: operations of matrix products, those of attention among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = job()
    return counter.get_total_flops(), result


@pytest.fixture(scope="module")
def sliced():
    """Three layers, of which one is a cross-attention layer, of the five."""
    return Subject(random_model(cut(CONFIG, 3), CPU, torch.float32), generate, "tiny", CONFIG)


@pytest.fixture(scope="module")
def image(sliced):
    return sliced.model.encode([sliced.tiles(TILES, Pruner())])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_operations_are_those_of_the_complete_decoder(sliced, image, subject, monkeypatch, method, batch):
    """All but own work, whose products may depend on the weights; it is that of one complete prefill too."""
    for module in table2, timed:
        monkeypatch.setattr(module, "with_time", counting)
    prefill = Prefill(sliced, image, batch, T)
    prefill.round([METHODS[method]])
    row = prefill.row(METHODS[method])
    clock = Watched(METHODS[method], CPU)
    whole = subject.model.encode([subject.tiles(TILES, Pruner())])
    operations, _ = counting(partial(subject.answer, subject.prompt(batch, T), whole, 0, clock), CPU)
    own = clock.ms["prefill"]
    assert row["ms"] - row["own_ms"] == operations - own > 0
    assert row["projected"] == clock.projected and row["attended"] == clock.attended
    assert row["own_ms"] == own or method.endswith("coreset")
    assert (own > 0) == (method in ("trimmed_llama", "coreset", "csp")) or method == "early coreset"
    above = 3 * 4 * CONFIG.text.hidden_size * T * (T - 1) // 2          # causal pairs that a product makes
    assert row["ms"] - row["own_ms"] == batch * (row["operations"] + above)


@pytest.mark.parametrize(("method", "projected", "attended"), [
    ("none", [N, N], [N, N]), ("random", [N, 4], [N, 4]), ("trimmed_llama", [N, 4], [N, 4]),
    ("coreset", [N, 4], [4, 4]), ("early coreset", [4, 4], [4, 4]), ("csp", [N, N], [N, N])])
def test_which_layers_make_keys_and_values_of_which_tokens(sliced, image, method, projected, attended):
    assert round(0.4 * N) == 4
    prefill = Prefill(sliced, image, 2, T)
    prefill.round([METHODS["none"], METHODS[method]])
    row = prefill.row(METHODS[method])
    assert (row["projected"], row["attended"]) == (projected, attended)
    assert row["kept"] == attended[-1] / N
    layers = {piece["piece"]: piece["times"] for piece in row["pieces"]}
    assert layers["self-attention"] == 3 and layers["once"] == 1 and layers["text cache"] == 3 / 2
    for n in {*projected, *attended}:
        assert layers.get(f"keys_values {n}", 0) == projected.count(n)
        assert sum(times for name, times in layers.items() if name.startswith(f"attention {n} ")
                   ) == attended.count(n)


def test_a_figure_is_the_sum_of_medians_and_pieces_are_shared(sliced, image):
    """Of a clock that counts: what is the same for several methods is timed once a round."""
    prefill = Prefill(sliced, image, 2, T)
    pruners = [METHODS["none"], METHODS["random"], METHODS["trimmed_llama"], METHODS["coreset"]]
    for _ in range(3):
        prefill.round(pruners)
    assert {len(samples) for samples in prefill.samples.values()} == {3}
    assert sum(piece[0] == "attention" for piece in prefill.samples) == 3       # to all, few, few with a bias
    for number, piece in enumerate(prefill.samples):
        prefill.samples[piece] = [(1000 * (number + 1), 1), (number, 1), (2 * number, 5)]
    for pruner in pruners:
        row = prefill.row(pruner)
        assert row["ms"] == sum(piece["times"] * piece["ms"] for piece in row["pieces"])
        assert all(piece["ms"] % 2 == 0 for piece in row["pieces"]) and row["rounds"] == 3
        assert row["cpu_ms"] == sum(piece["times"] for piece in row["pieces"])


def test_a_decoder_of_full_depth_has_the_layers_of_the_slice(sliced, image):
    """With a slice that is complete it is the model itself; else it has as many layers of each kind."""
    complete = Subject(random_model(CONFIG, CPU, torch.float32), generate, "tiny", CONFIG)
    ids, lengths = complete.prompt(2, T), [T, T]
    whole = complete.model.encode([complete.tiles(TILES, Pruner())]).expand(2)
    again = of_depth(complete.model, CONFIG.text)
    assert torch.equal(*(model.prefill(ids, lengths, whole, 1)[0] for model in (complete.model, again)))
    deep = of_depth(sliced.model, CONFIG.text)
    kinds = [type(layer) for layer in deep.language_model.layers]
    assert kinds == [type(layer) for layer in complete.model.language_model.layers]
    own = {id(weight) for weight in sliced.model.parameters()}
    assert all(id(weight) in own for weight in deep.language_model.parameters())
    assert deep.prefill(ids, lengths, image.expand(2), 1)[0].isfinite().all()


def test_the_command_puts_it_together(run_benchmark, tmp_path):
    out, made = run_benchmark("--preset", "table2", "--layers", "3", "--batch", "4,1")
    rows = made["table2"]
    assert [(row["method"], row["keep"], row["batch"]) for row in rows] == [
        (method, keep, batch) for batch in (4, 1) for method, keep in (
            ("none", 1.0), ("random", 0.509), ("trimmed_llama", 0.509), ("coreset", 0.509),
            ("random", 0.396), ("trimmed_llama", 0.396), ("coreset", 0.396))]
    image_tokens = 4 * CONFIG.vision.tokens_per_tile
    assert {row["kept"] for row in rows} == {1.0} | {
        int(image_tokens * keep + 0.5) / image_tokens for keep in (0.509, 0.396)}
    assert all(row["ms"] > row["own_ms"] > 0 and row["rounds"] == 2 for row in rows)
    assert [row["batch"] for row in rows if row.get("through_ms")] == [1]
    _, *lines = paper.table2(made)
    assert [line[4] for line in lines] == ["-", *["-7.1 %"] * 3, *["-11.4 %"] * 3,
                                           "-", *["-4.1 %"] * 3, *["-4.3 %"] * 3]
    full, random = rows[:2]
    operations = 100 * (random["operations"] / full["operations"] - 1)
    measured = 100 * (random["ms"] / full["ms"] - 1)
    assert lines[0][5:8] == ["-"] * 3 and lines[1][5:8] == [
        f"{number:+.1f} %" for number in (-100 * random["formula_saves"], operations, measured)]
    assert lines[1][8] == f"{100 * (random['cpu_ms'] / full['cpu_ms'] - 1):+.1f} %"
    assert operations < 0 and "paper's formula" in out and "of full depth" in out and made["rows"] == []
    assert made["seconds"] > 0


def test_rounds_end_when_the_time_is_over(run_benchmark, monkeypatch):
    """Then the round that was to warm up counts."""
    monkeypatch.setattr(table2, "SECONDS", 0)
    _, made = run_benchmark("--preset", "table2", "--layers", "3", "--batch", "1,2", "--prune", "random",
                            "--keep", "0.25")
    assert {(row["keep"], row["rounds"]) for row in made["table2"]} == {(keep, 1) for keep in (
        1.0, 0.509, 0.396, 0.25)}


def test_a_complete_model_has_the_same_table(run_benchmark):
    out, made = run_benchmark("--preset", "table2", "--batch", "1", "--prune", "trimmed_llama",
                              "--keep", "0.2")
    counted = of_complete(Subject(random_model(CONFIG, CPU, torch.float32), generate, "tiny", CONFIG),
                          [Pruner(), load("trimmed_llama", keep=0.2, budget=0.2)], 4, T)
    assert made["operations"][0] == counted[0] and made["operations"][3] == counted[1]
    _, *lines = paper.table2(made)
    full, cut_to = counted
    assert lines[3][0] == "trimmed_llama 0.2" and lines[3][4:7] == ["-", *(
        f"{number:+.1f} %" for number in (-100 * cut_to["formula_saves"],
                                          100 * (cut_to["operations"] / full["operations"] - 1)))]
    assert made["table2"] == [] and "put together" not in out


@pytest.mark.parametrize(("argv", "words"), [
    (["--prune", "downsample"], "downsample does more than hooks"),
    (["--against", "transformers"], "leave out --against"), (["--compile"], "leave out --against")])
def test_what_a_slice_cannot_tell_is_refused(run_benchmark, capsys, argv, words):
    with pytest.raises(SystemExit):
        run_benchmark("--preset", "table2", "--layers", "3", "--keep", "0.5", *argv)
    assert words in capsys.readouterr().err.splitlines()[-1]
