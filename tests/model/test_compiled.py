"""The compiled decode step: the tokens of the plain path, and the same few graphs whatever is kept."""
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from evaluation.exam import make_exam
from generate import Assistant, EncodedImages, generate, no_one
from model.cache import BUCKET, Cache
from model.compiled import Compiled, WrittenOut
from model.sampling import GREEDY
from pruning import METHODS, Pruner, load
from scenes.draw import draw
from weights.quantized_linear import Int4Linear, Int8Linear
from weights.tokenizer import messages

ROOT = Path(__file__).parents[2]
KEEPS = 0.05, 0.5
IMAGES = 8                # of all eight ratios, with three questions each


@pytest.fixture(scope="module")
def plain() -> Assistant:
    return Assistant("tiny", "cpu")


@pytest.fixture(scope="module")
def compiled() -> Assistant:
    return Assistant("tiny", "cpu", compile=True)


@pytest.fixture(scope="module")
def scenes(plain) -> list[tuple[EncodedImages, list[list[dict]]]]:
    papers = make_exam(3 * IMAGES)
    return [(plain.encode_images([draw(scene)], keep_states=True),
             [messages(question.text, 1) for question in questions]) for scene, questions in papers]


def pruners(image: int) -> list[Pruner]:
    """Every method, at one keep ratio for an image and at another one for the next."""
    return [load(name, keep=1.0 if name == "none" else KEEPS[image % 2]) for name in METHODS]


def graphs_made_by(work: Callable[[], None]) -> int:
    before = counters["stats"]["unique_graphs"]
    work()
    return counters["stats"]["unique_graphs"] - before


def test_every_method_gives_the_same_tokens_from_one_graph(plain, compiled, scenes):
    def ask_everything(images: int = IMAGES):
        for i, (image, turns) in enumerate(scenes[:images]):
            for pruner in pruners(i):
                expected = plain.answer(turns, image, 24, pruner=pruner)
                answer = compiled.answer(turns, image, 24, pruner=pruner)
                assert answer.tokens == expected.tokens
                assert answer.kept == expected.kept

    def ask_alone():
        for i, (image, turns) in enumerate(scenes[:3]):
            for pruner in pruners(i)[i::3]:
                expected = plain.answer(turns[:1], image, 24, pruner=pruner)
                assert compiled.answer(turns[:1], image, 24, pruner=pruner).tokens == expected.tokens

    def ask_without_an_image():
        image = compiled.encode_images([])
        turns = [messages(f"What is {word}?") for word in ("red", "a star", "this")]
        assert compiled.answer(turns, image, 9).tokens == plain.answer(turns, image, 9).tokens
        assert compiled.answer(turns[:2], image, 70).tokens == plain.answer(turns[:2], image, 70).tokens

    torch._dynamo.reset()
    assert graphs_made_by(ask_everything) == 1                              # for any number of rows but one
    assert graphs_made_by(ask_alone) == 1
    assert graphs_made_by(ask_without_an_image) == 1
    assert graphs_made_by(lambda: ask_everything(2)) == 0


def test_lengths_in_whole_buckets_change_next_to_nothing(plain, scenes):
    """As on a GPU: with masked tokens behind those that are kept."""
    step = Compiled(plain.model.decode, torch.device("cpu"))
    step.decode, step.bucket, sizes = plain.model.decode, BUCKET, set()

    def checked(tokens: Tensor, cache: Cache) -> Tensor:
        expected = plain.model.decode(tokens, copy.deepcopy(cache))
        logits = step(tokens, cache)
        sizes.update(kv.key.shape[2] for kv in cache.image_kv)
        torch.testing.assert_close(logits, expected, atol=0.2, rtol=0)             # of about 30, in bf16
        return logits

    for i, (image, turns) in enumerate(scenes):
        ids = [plain.tokenizer.encode(turn) for turn in turns]
        for pruner in pruners(i):
            run = pruner.around(generate)
            run(plain.model, ids, image.tokens.expand(len(ids)), 4, (), GREEDY, no_one, pruner, checked)
    assert len(sizes) >= 4 and not any(size % BUCKET for size in sizes)


def test_buffers_are_used_again_but_not_while_they_are_in_use(plain, scenes):
    """With the plain step in place of the graph: only where things stand is looked at."""
    model, (image, turns) = plain.model, scenes[0]
    step, ids = Compiled(model.decode, torch.device("cpu")), plain.tokenizer.encode(turns[0])
    step.decode, step.bucket, token = model.decode, BUCKET, torch.tensor([5])

    def read() -> tuple:
        return model.prefill(torch.tensor([ids]), [len(ids)], image.tokens, 9)[1], model.prefill(
            torch.tensor([ids]), [len(ids)], image.tokens, 9)[1]

    def coords_of(cache) -> list[int]:
        return [t.data_ptr() for t in cache.text_keys + cache.text_values + [kv.key for kv in cache.image_kv]]

    with torch.inference_mode():
        (first, reference), (second, _) = read(), read()
        expected = [model.decode(token, reference) for _ in range(3)]
        torch.testing.assert_close(step(token, first), expected[0], atol=0.2, rtol=0)
        stood = coords_of(first)
        torch.testing.assert_close(step(token, second), expected[0], atol=0.2, rtol=0)     # in turns
        assert not set(stood) & set(coords_of(second))
        for logits in expected[1:]:
            torch.testing.assert_close(step(token, first), logits, atol=0.2, rtol=0)
        stood = coords_of(first)
        del first, second
        third, _ = read()
        torch.testing.assert_close(step(token, third), expected[0], atol=0.2, rtol=0)
        assert coords_of(third) == stood
        held = third.image_kv[0]
        assert held.key.shape[2] % BUCKET == 0 and held.mask.sum() == held.mask.shape[1] * image.real
        assert held.key[~held.mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_one_row_are_written_out(dtype):
    """And only those: for several rows a library is better."""
    linear = torch.nn.Linear(96, 80, bias=False).to(dtype).requires_grad_(False)
    options = {"post_grad_custom_post_pass": WrittenOut()}
    for rows, called in (1, False), (2, True):
        x = torch.randn(rows, 1, 96).to(dtype)
        result, code = run_and_get_code(torch.compile(linear, options=options, dynamic=False), x)
        assert ("extern_kernels" in "".join(code).partition("def call")[2]) is called
        torch.testing.assert_close(result, linear(x))


def test_products_with_quantised_weights_are_those_of_the_plain_path():
    """The same kernels are called: what is written out is only what they do not do."""
    layers = torch.nn.Sequential()
    for kind in Int8Linear, Int4Linear:
        layers.append(kind(torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)))
        stored = kind.rounded(torch.randn(64, 64), torch.bfloat16)
        layers[-1].fill(stored, torch.device("cpu"), torch.bfloat16)
    options = {"post_grad_custom_post_pass": WrittenOut(), "emulate_precision_casts": True}
    compiled = torch.compile(layers, options=options, fullgraph=True)
    with torch.inference_mode():
        for rows in 1, 3:
            x = torch.randn(rows, 1, 64).bfloat16()
            assert torch.equal(compiled(x), layers(x))


def test_a_step_may_change_what_is_held(plain, compiled, scenes):
    """Hook 4 between compiled steps: half of the tokens go after each of the first four."""
    class Halving(Pruner):
        def stepped(self, step: int, queries: list[Tensor], image_kv: list) -> list:
            assert len(queries) == len(image_kv) and queries[0].shape[2] == 1
            if step > 3:
                return image_kv
            real = [torch.ones(kv.key.shape[:3]).bool() if kv.mask is None else
                    kv.mask.expand(kv.key.shape[:3]) for kv in image_kv]
            every_other = [there & (there.cumsum(-1) % 2 == i % 2) for i, there in enumerate(real)]
            return [kv.take(kept) for kv, kept in zip(image_kv, every_other, strict=True)]

    for image, turns in scenes[:3]:
        pruner = Halving(keep=0.9)
        expected = plain.answer(turns, image, 12, pruner=pruner)
        assert compiled.answer(turns, image, 12, pruner=pruner).tokens == expected.tokens


def test_generate_takes_any_decode(plain, scenes):
    image, turns = scenes[0]
    calls = []

    def counted(tokens, cache):
        calls.append(len(tokens))
        return plain.model.decode(tokens, cache)
    ids = plain.tokenizer.encode(turns[0])
    generate(plain.model, [ids], image.tokens, 4, (), decode=counted)
    assert calls == [1, 1, 1]


def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "generate.py", "--image", "examples/shapes.png", "--device", "cpu", *argv]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_command_line(tmp_path):
    done = run("--prompt", "What is written on the circle?", "--compile", "--json")
    data = json.loads(done.stdout)
    said = done.stderr.splitlines()       # a CUDA build of torch may warn that it finds no GPU
    assert data["answer"] == "Y" and data["ms"]["compile"] > 0
    assert [line for line in said if line.startswith("compiled in ")] == said[-1:]


def test_who_does_not_compile_imports_no_compiler():
    code = "import sys, generate; sys.exit('torch._inductor.pattern_matcher' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_compiler_is_one_line(tmp_path):
    nothing = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run("--prompt", "What?", "--compile", **nothing)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the decode step cannot be compiled here: ")
