"""The benchmark of weights in fewer bits: what is compared, and that it is the same model."""
import pytest
import torch
from small_benchmark import CONFIG, CPU

from benchmarks.quantized import bytes_of, quantized_copy
from benchmarks.subject import Subject, random_model
from generate import generate
from weights.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear

pytestmark = pytest.mark.usefixtures("small_measurements")


def test_the_rows(run_benchmark):
    out, made = run_benchmark("--quantize", "int8,int4", "--tiles", "2", "--compile",
                              "--against", "transformers")
    rows = made["quantized"]
    assert [(row["weights"], row["how"]) for row in rows] == [
        *((way, how) for way in ("in full", "int8", "int4") for how in ("eager", "compiled")),
        ("transformers", "eager")]
    full, eight, four = rows[0], rows[2], rows[4]
    assert full["bytes"] > eight["bytes"] > four["bytes"] and full["read_bytes"] > eight["read_bytes"]
    assert full["difference"] == 0 < eight["difference"] < four["difference"] < 1
    assert rows[-1]["difference"] is None
    assert all(min(row["prefill_ms"], row["token_ms"], row["fraction_of_ceiling"]) > 0 for row in rows)
    assert [(each["weights"], each["max_difference"]) for each in made["compiled"]] == [
        ("in full", 0), ("int8", 0), ("int4", 0)]
    assert "logits differ by" in out and made["rows"] == []


def test_a_copy_is_the_same_model_with_other_linear_layers():
    model = random_model(CONFIG, CPU, torch.bfloat16)
    copy = quantized_copy(model, "int8")
    assert copy.language_model.embed_tokens.weight is not None
    assert torch.equal(copy.language_model.embed_tokens.weight, model.language_model.embed_tokens.weight)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in copy.parameters()} <= shared
    assert bytes_of(copy) < bytes_of(model)
    linears = Subject(copy, generate, "tiny", CONFIG).linears()
    assert len(linears) == len(Subject(model, generate, "tiny", CONFIG).linears())
    assert {type(linear) for linear in linears} == {Int8Linear}
    kinds = {type(module) for module in quantized_copy(model, "int4").modules()
             if isinstance(module, QuantizedLinear)}
    assert kinds == {Int4Linear, Int8Linear}                        # down_proj has 48 inputs, and the head


def test_bytes_that_a_token_reads():
    model = random_model(CONFIG, CPU, torch.bfloat16)
    copy = quantized_copy(model, "int8")
    job, read = Subject(copy, generate, "tiny", CONFIG).linears_alone(2, 1)
    job()
    linears = Subject(copy, generate, "tiny", CONFIG).linears()
    sizes = [(each.in_features, each.out_features) for each in linears]
    assert read == sum(inputs * outputs + 2 * outputs for inputs, outputs in sizes)


def test_several_batches_and_methods(run_benchmark):
    _, made = run_benchmark("--quantize", "int8", "--tiles", "2", "--batch", "1,2", "--keep", "0.3",
                            "--prune", "random,coreset")
    assert [(row["batch"], row["weights"], (row["pruner"] or "none")[:6]) for row in made["quantized"]] == [
        (batch, way, method) for batch in (1, 2) for way in ("in full", "int8")
        for method in ("none", "random", "corese")]
    assert all(row["tokens_per_second"] == pytest.approx(row["batch"] / row["token_ms"] * 1000)
               for row in made["quantized"])
