"""What the pages say is true (links, quoted code, numbers, papers, options), in the words of the field."""
import ast
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import generate
from model.config import Config, RopeScaling, TextConfig, VisionConfig
from model.llama_vision import LlamaVision
from pruning import METHODS, Pruner, load
from weights import read_config
from weights.image_file import open_image

ROOT = Path(__file__).parents[2]
FOLDERS = ("model", "weights", "pruning", "scenes", "evaluation", "benchmarks", "page", "tests", "examples",
           "docs", ".ci")
KINDS = "*.py", "*.md", "*.toml", "run"
FILES = sorted([path for kind in KINDS for path in ROOT.glob(kind)]
               + [path for kind in KINDS for folder in FOLDERS for path in (ROOT / folder).rglob(kind)])
PAGES = [path.relative_to(ROOT).as_posix() for path in FILES if path.suffix == ".md"]
NAMED = [name for name, method in METHODS.items() if method is not Pruner]
OF_A_PAPER = [name for name in NAMED if METHODS[name].paper and "Table" not in METHODS[name].paper]


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_all_pages_are_looked_at():
    assert {"README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md", "docs/PAPERS.md", "pruning/README.md",
            "benchmarks/README.md"} <= {*PAGES}


# ----- links and quotes


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.S)
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    for target in linked:
        assert ((ROOT / page).parent / target).exists(), target
    rooms = "|".join(map(re.escape, FOLDERS))
    for target in re.findall(rf"`((?:{rooms})/[\w./-]*)`", text):
        assert (ROOT / target).exists(), target


def quotes(page: str) -> list[tuple[str, str]]:
    """The blocks of a page that begin with `# path/of/a/file.py`: the path, and the code below it."""
    return re.findall(r"```python\n# ([\w/.]+\.py)\n(.*?)```", read(page), re.S)


def stands_in(code: str, source: str) -> bool:
    """Whether these lines follow each other in a file, at whatever indentation."""
    wanted = textwrap.dedent(code).strip("\n")
    lines = source.splitlines()
    count = len(wanted.splitlines())
    starts = range(len(lines) - count + 1)
    return any(textwrap.dedent("\n".join(lines[i:i + count])) == wanted for i in starts)


QUOTES = [(page, path, code) for page in PAGES for path, code in quotes(page) if (ROOT / path).exists()]


@pytest.mark.parametrize(("page", "path", "code"), QUOTES, ids=[f"{page} {path}" for page, path, _ in QUOTES])
def test_quoted_code_stands_in_its_file(page, path, code):
    assert stands_in(code, read(path))


def test_a_stale_quote_is_noticed():
    path, code = quotes("docs/ARCHITECTURE.md")[0]
    assert not stands_in(code.replace("min(", "max(", 1), read(path))
    assert len(QUOTES) >= 8


def test_every_code_block_of_the_architecture_names_its_file():
    assert len(quotes("docs/ARCHITECTURE.md")) == read("docs/ARCHITECTURE.md").count("```python")


def test_diagrams_fit_on_a_page():
    for page in "docs/ARCHITECTURE.md", "docs/PAPERS.md":
        text = re.sub(r"```.*?```", "", read(page), flags=re.S)
        assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("    ")), page


def test_the_method_of_the_page_runs(tmp_path):
    (path, code), = (quote for quote in quotes("pruning/README.md") if quote[0] == "mine.py")
    (tmp_path / path).write_text(code, encoding="utf-8")
    mine = load(f"{tmp_path / path}:Mine", keep=0.25)
    assistant = generate.Assistant("tiny")
    encoded = assistant.encode_images([open_image(ROOT / "examples" / "shapes.png")])
    question = generate.messages("What is written on the circle?", 1)
    answer = assistant.answer([question], encoded, 8, pruner=mine)
    assert answer.kept == [[50, 50, 50]]


# ----- numbers


@pytest.fixture(scope="module")
def models():
    """The official 11B-Instruct and the bundled checkpoint, without weights."""
    configs = (Config(VisionConfig(image_size=560), TextConfig(rope_scaling=RopeScaling())),
               read_config(ROOT / "weights" / "tiny"))
    with torch.device("meta"):
        return [LlamaVision(config).to(torch.bfloat16) for config in configs]


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the table whose first line holds this text."""
    lines = read(page).split(title, 1)[1].splitlines()[2:]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def shapes(model: LlamaVision) -> dict[str, str]:
    vision, text = model.config.vision, model.config.text
    side, cross = vision.patches_per_side, len(text.cross_attention_layers)
    padded = vision.tokens_per_tile + vision.pad_tokens
    one_tile, four_tiles = [(1, 1)], [(2, 2)]
    kv_bytes = model.kv_bytes(1, one_tile)
    weights = model.language_model.embed_tokens.weight
    return {
        "tile, pixels": f"{vision.image_size} x {vision.image_size}",
        "patches of a tile": f"{side} x {side} = {side ** 2}",
        "tokens of a tile, P": f"{vision.tokens_per_tile}",
        "tokens of a tile inside the encoder": f"{padded}",
        "encoder sequence, four tiles": f"{4 * padded}",
        "encoder width and output": f"{vision.hidden_size}, {vision.output_dim}",
        "encoder layers, local and global": f"{vision.num_hidden_layers} + {vision.num_global_layers}",
        "image tokens, four tiles": f"{model.image_tokens(four_tiles)}",
        "decoder width, D": f"{text.hidden_size}",
        "decoder layers, self and cross": f"{text.num_hidden_layers - cross} + {cross}",
        "cross-attention layers": ", ".join(map(str, text.cross_attention_layers)),
        "heads H, KV heads G, head width d":
            f"{text.num_attention_heads}, {text.num_key_value_heads}, {text.head_dim}",
        "vocabulary, rows of the embedding": f"{text.vocab_size}, {len(weights)}",
        "parameters": f"{sum(model.parameter_counts().values()):,}",
        "image KV of a token, bytes": f"{kv_bytes['image'] // vision.tokens_per_tile:,}",
        "image KV of one tile, bytes": f"{kv_bytes['image']:,}",
        "image KV of four tiles, bytes": f"{model.kv_bytes(1, four_tiles)['image']:,}",
        "text KV of a token, bytes": f"{kv_bytes['text']:,}",
    }


def test_shapes_and_costs_are_those_of_the_models(models):
    large, tiny = map(shapes, models)
    expected = [[name, large[name], tiny[name]] for name in large]
    assert table("docs/ARCHITECTURE.md", "| | 11B-Instruct | bundled checkpoint |") == expected


def test_numbers_in_the_text_are_those_of_the_model(models):
    page, large = " ".join(read("docs/ARCHITECTURE.md").split()), models[0]
    one, four = (large.vision_model.flops(grid) / 1e12 for grid in ((1, 1), (2, 2)))
    assert f"An image of one tile takes {one:.2f} TFLOP in the encoder" in page
    assert f"and one of four tiles {four:.2f}." in page
    expected = shapes(large)
    for name in "encoder sequence, four tiles", "image KV of a token, bytes", "text KV of a token, bytes":
        assert page.count(expected[name]) >= 2, name
    taps = ", ".join(map(str, large.config.vision.intermediate_layers_indices))
    assert f"what enters layers {taps}" in page and f"inputs of layers {taps}" in page


# ----- the methods


def section(method: str) -> str:
    return re.search(rf"^## {method}\n(.*?)(?=^## |\Z)", read("docs/PAPERS.md"), re.M | re.S).group(1)


def written(default: object) -> str:
    """A default as a command line spells it."""
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


@pytest.mark.parametrize("method", NAMED)
def test_every_method_has_a_section_with_all_its_options(method):
    options = [[f"`{field.name}`", written(field.default)] for field in fields(METHODS[method])]
    assert [row[:2] for row in table_in(section(method))] == options


def table_in(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("method", NAMED)
def test_every_section_says_whose_idea_it_is(method):
    text = section(method)
    parts = ["Paper", "Idea", "Ours"]
    if method in OF_A_PAPER:
        parts += ["The paper's", "Cannot carry over", "Not verified"]
    for part in parts:
        assert f"\n**{part}.** " in text, part
    assert re.search(r"^    \S", text, re.M), "no formula"
    for number in re.findall(r"\d{4}\.\d{5}", METHODS[method].paper):
        assert number in " ".join(text.split())


def test_no_section_is_of_a_method_that_is_gone():
    titles = re.findall(r"^## (.*)", read("docs/PAPERS.md"), re.M)
    assert titles == ["What holds for every method", *NAMED]
    rows = table("docs/PAPERS.md", "| method | text of the paper |")
    assert [row[0] for row in rows] == OF_A_PAPER


@pytest.mark.parametrize("method", NAMED)
def test_docstrings_of_methods_are_short_and_point_to_the_papers(method):
    text = ast.get_docstring(ast.parse(read(f"pruning/methods/{method}.py")))
    assert len(text.splitlines()) <= 10
    assert "docs/PAPERS.md" in text


# ----- words

TRAINED = r"Describe the picture\.|What is in the picture\?"      # the bundled checkpoint has learned these
FOREIGN = "full_text_row_masked_out_mask"                        # an argument in transformers
WORDS = {                                                        # instead of these, say:
    r"(?i)\bmoments?\b(?! later)": "hook",
    r"(?i)\bknobs?\b": "option",
    r"(?i)\bpictures?\b": "image",
    r"(?i)\b(batch|text) rows?\b": "sequence, query position",
    r"(?i)\bcolumn[_ ]mass\b": "attention_received",
    r"\bOneChoice\w*": "SelectOnce",
    r"\bEachLayer\w*": "SelectPerLayer",
    r"(?i)\bprompters?\b": "ChatTokenizer",
    r"(?<!cuda\.)\bStream\b": "Detokenizer",
    r"\b(assistant|Assistant)\.(look|ask)\b": "encode_images, answer",
    r"(?<![\w.])top\(|\bimport [^\n#]*(?<!\w)top(?!\w)": "top_k_mask",
    r"\bopen_picture\b": "open_image",
    r"\bcache\.(keys|values|images|filled|rows|hold|texts)\b": "text_keys, text_values, image_kv",
    r"\.place\b": "coords",
    r"(?i)\b(let|lets|letting) go\b": "drop",
    r"(?i)\bunheard\b": "ignored",
    r"(?i)\b(run|runs|ran|running) along\b": "ignored",
    r"(?i)\bwhat [a-z ]{1,30}\b(come|comes|came) to\b": "is",
    r"(?i)\b(the|a|one) whole(?=[.,;:)]| (of|is|and|or|in)\b)": "all of it",
}


def found(text: str) -> list[str]:
    """The words of `text` that a stranger would have to translate."""
    text = re.sub(f"{TRAINED}|{FOREIGN}", "", text)
    hits = []
    for pattern in WORDS:
        gaps = pattern.replace(" (", r"[_\s#]+(").replace(") ", r")[_\s#]+").replace("[_ ]", r"[_\s#]+")
        words = gaps.replace(r"\b", r"(?:(?<![A-Za-z])|(?![A-Za-z]))")       # an underscore ends a word, too
        hits += [match.group(0) for match in re.finditer(words, text)]
    return hits


def test_the_search_for_words_finds_them():
    bad = ("a knob", "column mass", "column_mass(x)", "the text\n    # rows", "are let\n    go", "runs along",
           "from pruning import Pruner, top", "Prompter", "the whole.", "cache.images", "two_knobs")
    good = "Describe the picture.", "the whole image", "torch.cuda.Stream()", "image rows", "x.topk(3)"
    assert all(map(found, bad)) and not any(map(found, good))


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in FILES
                                  if path != Path(__file__)])
def test_the_words_are_the_fields_own(path):
    assert not found(read(path))
