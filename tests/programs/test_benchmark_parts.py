"""What the figures of the benchmark are made of: timing, what is timed, and the waterfall."""
import copy
import platform
from functools import partial

import pytest
import torch
from small_benchmark import CONFIG, CPU

from benchmarks import measure, waterfall
from benchmarks.subject import SHAPES, Subject, cut, fill, grid_of, random_model
from benchmarks.timed import Timed
from generate import generate
from model.decoder import CrossAttentionLayer
from pruning import Pruner, load
from weights.wide import is_slow

pytestmark = pytest.mark.usefixtures("small_measurements")

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


@pytest.mark.parametrize(("ms_of_one", "size", "most"), [
    (0.0, 64, 9), (2000 / 64 ** 3 / 20, 64, 9), (2000 / 64 ** 3, 32, 9), (100.0, 8, 9), (1e6, 8, 2)])
def test_a_ceiling_is_measured_in_bounds_on_any_machine(monkeypatch, ms_of_one, size, most):
    """A product of side n takes n^3 times `ms_of_one`; the largest side is 64, and a probe has an eighth."""
    taken = []
    monkeypatch.setattr(measure, "timed", lambda job, device: taken.append(job ** 3 * ms_of_one) or taken[-1])
    assert measure.fastest(lambda size: size, 64, 3, CPU) == (size, size ** 3 * ms_of_one)
    runs = [ms for ms in taken if ms == size ** 3 * ms_of_one]
    assert 2 <= len(runs) <= (most if ms_of_one else len(taken))
    assert sum(runs) <= measure.CEILING_MS or len(runs) == 2
    assert sum(taken) - sum(runs) < measure.CEILING_MS / 2


def test_ceilings_are_of_a_product_that_the_machine_is_made_for(monkeypatch):
    multiplied = []
    inner = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.append(a.dtype) or inner(a, b))
    for slow, dtype, name in (False, torch.bfloat16, "bf16"), (True, torch.float32, "fp32"):
        multiplied.clear()
        monkeypatch.setattr(measure, "is_slow", lambda dtype, device, slow=slow: slow)
        most = measure.ceilings(CPU)
        assert set(multiplied) == {dtype} and most.pop("matmul_dtype") == name
        assert set(most) == {"copy_bytes_per_s", "matmul_flops"} and min(most.values()) > 0


@pytest.mark.parametrize(("tokens", "rounds"), [(32, 1), (3, 1), (2, 2), (1, 3)])
def test_a_cuda_graph_is_warm_after_three_steps(tokens, rounds):
    assert waterfall.warm_up_rounds(tokens) == rounds


def test_peak_counts_memory_that_a_job_frees_again():
    peak = measure.peak_added(lambda: torch.ones(2 ** 24), CPU)                         # 64 MiB
    assert (peak is None) == (not measure.knows_peak())
    assert peak is None or 2 ** 26 - 2 ** 20 <= peak < 2 ** 27       # the system counts in batches of pages


def test_the_machine_has_no_name_of_its_own():
    assert platform.node() not in str(measure.machine(CPU))
    machine = measure.machine(CPU)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["instructions"].startswith(torch.backends.cpu.get_cpu_capability())
    assert ("none for bf16" in machine["instructions"]) == is_slow(torch.bfloat16, CPU)


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


def test_waterfall(run_benchmark):
    out, made = run_benchmark("--waterfall", "--against", "transformers")
    steps = [bar["step"] for bar in made["waterfall"]]
    assert steps[0] == "transformers 9.9, eager" and len(steps) == 7
    assert steps[-1].startswith("pruned (trimmed_llama")
    for before, bar in zip(made["waterfall"], made["waterfall"][1:], strict=False):
        assert bar["gain"] == pytest.approx(before["ms"] / bar["ms"]) and bar["step"] in out
    assert made["rows"] == [] and made["about"]["tiles"] == 1
