"""The table of bad input: images, flags, prompts, checkpoints, pruning methods, numbers, outputs and names.

A row is a name, a function that prepares the case on a `Bench` and returns the command line, and what the
line on stderr must say. The rows of checkpoints are in `bad_checkpoints.py`, those of a guard in
`bad_guards.py`, those of a file of questions in `bad_jsonl.py`, those of lmms-eval's runs in `bad_lmms.py`,
the functions in `bad_files.py`. Some rows are about other programs than `generate.py`.
"""
from bad_checkpoints import CONFIGS, PLACES, TEXT_SIDE, WEIGHT_FILES
from bad_files import (
    QUESTION,
    Prepare,
    bare,
    drawn,
    flags,
    hub,
    image,
    in_folder,
    model,
    no_revision,
    of,
    piped,
    png_of_size,
    typed,
    with_pipe,
    without_permission,
)
from bad_guards import GUARDS
from bad_jsonl import JSONL
from bad_lmms import LMMS

import benchmark
import evaluate

IMAGES = [
    ("missing", image("none.png"), "none.png", "no such file"),
    ("a folder", image("."), "a folder; name one image"),
    ("empty", image("e.png", b""), "e.png: empty"),
    ("no path", flags("--image", ""), "image"),
    ("a text", image("notes.txt", b"a red star\n"), "notes.txt: not an image", "PNG"),
    ("a text called png", image("notes.png", b"a red star\n"), "notes.png: not an image"),
    ("SVG", image("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "x.svg: not an image"),
    ("PDF", image("x.pdf", b"%PDF-1.7\n%%EOF"), "x.pdf: not an image"),
    ("EPS", image("x.eps", drawn("EPS")), "x.eps: not an image", "PNG, JPEG"),
    ("TGA", image("x.tga", drawn("TGA")), "x.tga: not an image", "PNG, JPEG"),
    ("signature only", image("s.png", drawn("PNG")[:8]), "s.png: "),
    ("cut PNG", image("c.png", drawn("PNG")[:60]), "c.png: damaged", "save it again"),
    ("cut JPEG", image("c.jpg", drawn("JPEG")[:-100]), "c.jpg: damaged", "save it again"),
    ("cut WebP", image("c.webp", drawn("WEBP")[:-10]), "c.webp: "),
    ("bomb", image("bomb.png", png_of_size(60000, 60000)), "bomb.png: over", "pixels"),
    ("strip", image("strip.png", png_of_size(1, 89_000_000)), "strip.png: 1 x 89000000 pixels", "2 GiB"),
    ("no pixels", image("n.png", png_of_size(0, 4)), "n.png: "),
    ("NaN pixels", image("n.tif", drawn("TIFF", "F", float("nan"))), "n.tif: ", "NaN"),
    ("NUL in the path", image("a\0b.png"), "null"),
    ("a device", image("/dev/zero"), "/dev/zero: a pipe, a socket or a device", "save the image as a file"),
    ("a URL of no server", flags("--image", "http://127.0.0.1:1/x"), "http://127.0.0.1:1/x: cannot be"),
    ("a URL without a server", flags("--image", "https:///a.png"), "no server in this address"),
    ("a URL of a file", flags("--image", "file:///etc/hosts"), "a URL, where a path", "download it first"),
    ("a data URI", flags("--image", "data:image/png;base64,iVBO"), ";base64,iVBO: not an image"),
    ("a data URI without a comma", flags("--image", "data:image/png"), "no comma"),
    ("nothing piped as an image", flags("--image", "-"), "standard input: empty"),
    ("two images piped", flags("--image", "-", "--image", "-"), "twice", "one image"),
    ("nobody pipes an image", typed("--image", "-"), "nothing is piped in", "give a path"),
    ("base64", flags("--image", "iVBORw0KGgo" + "A" * 262_000), "base64 text", "a path"),
    ("a long name", flags("--image", "x" * 300), "xxx: cannot be read", "check the path"),
    ("a name that is not UTF-8", flags("--image", "caf\udce9.png"), "caf\\udce9.png: no such file"),
    ("line break in the path", image("a\nb.png"), "no such file"),
    ("second", lambda b: [*piped(b"", image=True)(b), *image("b.png")(b)], "b.png: no such file"),
]

LENGTH, HEAT, MASS = "--max-new-tokens", "--temperature", "--top-p"
FLAGS = [
    ("unknown flag", bare("--imagine", "x.png"), "--imagine"),
    ("stray word", bare("x.png"), "x.png"),
    ("ambiguous flag", bare("--d", "cpu"), "--d", "--device", "--dtype"),
    ("prompt without value", bare("--prompt"), "--prompt", "expected one argument"),
    ("image without value", bare("--image", "--json"), "--image", "expected one argument"),
    ("json with value", flags("--json=yes"), "--json"),
    ("length not a number", flags(LENGTH, "many"), LENGTH, "'many'"),
    ("length not whole", flags(LENGTH, "2.5"), LENGTH, "'2.5'"),
    ("length 0", flags(LENGTH, "0"), f"{LENGTH} is 0", "at least 1"),
    ("length below 0", flags(LENGTH, "-3"), f"{LENGTH} is -3", "at least 1"),
    ("length beyond the context", flags(LENGTH, "100000"), "100000", "context holds 2048", "fewer"),
    ("length beyond 64 bits", flags(LENGTH, "1" * 30), "1" * 30, "context holds 2048"),
    ("temperature not a number", flags(HEAT, "hot"), HEAT, "'hot'"),
    ("temperature below 0", flags(HEAT, "-0.5"), "temperature is -0.5", "0 (greedy)"),
    ("temperature NaN", flags(HEAT, "nan"), "temperature is nan"),
    ("temperature infinite", flags(HEAT, "inf"), "temperature is inf"),
    ("top-p 0", flags(MASS, "0"), "top-p is 0.0", "at most 1"),
    ("top-p below 0", flags(MASS, "-0.1"), "top-p is -0.1"),
    ("top-p above 1", flags(MASS, "1.1"), "top-p is 1.1", "at most 1"),
    ("top-p NaN", flags(MASS, "nan"), "top-p is nan"),
    ("top-k below 0", flags("--top-k", "-1"), "top-k is -1", "0 for all"),
    ("top-k not whole", flags("--top-k", "1.5"), "--top-k", "'1.5'"),
    ("penalty 0", flags("--repetition-penalty", "0"), "repetition-penalty is 0.0", "1 (none)"),
    ("penalty NaN", flags("--repetition-penalty", "nan"), "repetition-penalty is nan"),
    ("nothing to sample by", flags("--sample"), "generation_config.json: it suggests no way to sample"),
    ("empty stop text", flags("--stop", ""), "stop text", "at least one character"),
    ("stop text not UTF-8", flags("--stop", "caf\udce9"), "stop text", "not valid Unicode"),
    ("seed not whole", flags("--seed", "1.5"), "--seed", "'1.5'"),
    ("seed beyond 64 bits", flags("--seed", "9" * 20, HEAT, "1"), "seed", "9" * 20),
    ("unknown device", flags("--device", "abacus"), "'abacus'", "use cpu, cuda"),
    ("no device", flags("--device", ""), "device", "use cpu, cuda"),
    ("unsupported device", flags("--device", "meta"), "'meta'", "use cpu, cuda"),
    ("device before download", hub("--device", "abacus", error=no_revision), "'abacus'", "use cpu, cuda"),
    ("no CUDA", flags("--device", "cuda"), "no CUDA GPU", "use device cpu"),
    ("unknown quantize", flags("--quantize", "int5"), "'int5'", "int8, int4, int8+tower, int4+tower"),
    ("quantize before download", hub("--quantize", "4", error=no_revision), "'4'", "int8, int4"),
    ("quantize in fp64", flags("--quantize", "int8", "--dtype", "fp64"), "fp64", "bf16, fp16 or fp32"),
    ("unknown dtype", flags("--dtype", "int4"), "'int4'", "bf16", "fp32"),
    ("dtype before download", hub("--dtype", "int4", error=no_revision), "'int4'", "bf16", "fp32"),
    ("JSON chat", typed("--json"), "--json", "--prompt"),
]

STARS = "star " * 3000
DATED = "chat_template.jinja", b"{{ date_string }}"
PROMPTS = [
    ("empty", bare("--prompt", ""), "prompt is empty"),
    ("only blanks", bare("--prompt", " \t\n"), "prompt is empty"),
    ("second empty", flags("--prompt", ""), "prompt is empty"),
    ("nothing piped", piped(b""), "--prompt", "--image"),
    ("blanks piped", piped(b" \n\n"), "--prompt", "--image"),
    ("input closed", piped(None), "--prompt", "--image"),
    ("not UTF-8", bare("--prompt", "caf\udce9"), "not valid Unicode", "UTF-8"),
    ("not UTF-8, piped", piped(b"caf\xe9?"), "standard input", "UTF-8"),
    ("system not UTF-8", flags("--system", "caf\udce9"), "system message", "UTF-8"),
    ("date not UTF-8", model(DATED, also=(*QUESTION, "--date", "\udce9")), "date", "UTF-8"),
    ("too long", bare("--prompt", STARS), "prompt tokens", "context holds 2048", "shorten"),
    ("too long, piped", piped(STARS.encode(), image=True), "context holds 2048"),
    ("too long, second", flags("--prompt", STARS), "context holds 2048"),
    ("too long with the answer", bare("--prompt", STARS[:9500]), "and 256 new ones", "context holds 2048"),
]


def method(content: str, named: str = "Mine") -> Prepare:
    """A class in a file as the pruning method."""
    return lambda bench: ["--prune", bench.path("mine.py", content.encode()) + ":" + named, *QUESTION]


PRUNING = [
    ("unknown method", flags("--prune", "fast"), "'fast'", "trimmed_llama, fastv, elastic", "mine.py:Mine"),
    ("no such guide", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune",
                                     "sgl", "--set", "guide=./none"], "'./none'", "nor a folder here"),
    ("no such compressor", flags("--prune", "quecc", "--set", "weights=here"), "quecc", "'here'", "folder"),
    ("empty blocks", flags("--prune", "attention_predictor", "--set", "block=0"), "block is 0", "at least"),
    ("more layers choose than there are", lambda bench: [
        "--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune", "mint", "--set", "n_sel=9"],
     "n_sel is 9", "1 to 3"),
    ("a mass above all", flags("--prune", "zipvl", "--set", "tau=2"), "tau is 2", "at most 1"),
    ("nothing observed", flags("--prune", "csp", "--set", "observed=0"), "observed is 0", "above 0"),
    ("no method", flags("--keep", "0.5"), "--prune"),
    ("option without a method", flags("--set", "seed=1"), "--prune"),
    ("keep nothing", flags("--prune", "random", "--keep", "0"), "keep is 0", "at least 1"),
    ("keep too much", flags("--prune", "random", "--keep", "1.5"), "keep is 1.5", "at most 1.0"),
    ("keep a word", flags("--prune", "random", "--keep", "half"), "keep is 'half'", "a number"),
    ("keep not a number", flags("--prune", "random", "--keep", "nan"), "keep is nan", "a number"),
    ("whole tiles", flags("--prune", "downsample", "--keep", "7"), "keep is 7", "fraction", "tiles"),
    ("unknown option", flags("--prune", "fastv", "--set", "depth=3"), "no option 'depth'", "full_layers"),
    ("bad value", flags("--prune", "fastv", "--set", "positions=some"), "positions is 'some'", "last or all"),
    ("bad type", flags("--prune", "fastv", "--set", "full_layers=x"), "full_layers is 'x'", "whole number"),
    ("no value", flags("--prune", "fastv", "--set", "rows"), "'rows'", "option=value"),
    ("bad hook", flags("--prune", "random", "--set", "when=step"), "when is 'step'", "prefill or boundary"),
    ("too many layers", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune",
                                       "fastv", "--set", "full_layers=9"], "full_layers is 9", "0 to 3"),
    ("no such file", flags("--prune", "nowhere.py:Mine"), "nowhere.py", "no such file"),
    ("no class", method("x = 1"), "no class 'Mine'"),
    ("no pruner", method("class Mine: pass"), "'Mine'", "Pruner"),
    ("no name", method("x = 1", ""), "no class ''"),
    ("syntax", method("class Mine("), "mine.py", "SyntaxError"),
    ("fails", method("import nowhere_at_all"), "mine.py", "nowhere_at_all"),
    ("map of two answers", flags("--prompt", "What?", "--save-map", "x.png"), "--save-map", "one --prompt"),
    ("map of no image", flags("--save-map", "x.png"), "--save-map", "--image"),
    ("map of no kind", flags("--map", "lens"), "invalid choice", "attention"),
    ("map of odd format", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION,
                                         "--save-map", "x.docx"], "x.docx", ".png"),
    ("map into nowhere", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION,
                                        "--save-map", "nowhere/x.png"], "nowhere/x.png", "folder"),
    ("a file alone", flags("--prune", "mine.py"), "'mine.py'", "mine.py:Mine"),
]

LONG, DIGITS = "x" * 300, "1" * 401
MAP = "--image", "IMAGE", *QUESTION, "--save-map"
RANDOM, SGL, QUECC = ("--prune", "random"), ("--prune", "sgl"), ("--prune", "quecc")
ONE = "--questions", "1", "--json", "HERE/x.json"
NUMBERS = [
    ("length beyond all size", flags(f"{LENGTH}={DIGITS}"), LENGTH, "too large"),
    ("length below all size", flags(f"{LENGTH}=-{DIGITS}"), LENGTH, "too large"),
    ("length of 5000 digits", flags(f"{LENGTH}={'1' * 5000}"), LENGTH, "too large"),
    ("length NaN", flags(LENGTH, "nan"), LENGTH, "'nan'", "whole number"),
    ("length in floating point", flags(LENGTH, "1e3"), LENGTH, "'1e3'", "whole number"),
    ("temperature beyond all size", flags(HEAT, "1e400"), "temperature is inf"),
    ("temperature of 401 digits", flags(HEAT, DIGITS), "temperature is inf"),
    ("temperature below all size", flags(f"{HEAT}=-inf"), "temperature is -inf"),
    ("top-p infinite", flags(MASS, "inf"), "top-p is inf"),
    ("seed beyond all size", flags("--seed", DIGITS), "--seed", "too large"),
    ("seed NaN", flags("--seed", "nan"), "--seed", "'nan'", "whole number"),
    ("keep beyond all size", flags(*RANDOM, "--keep", DIGITS), "too large a number", "at most 9"),
    ("keep beyond 64 bits", flags(*RANDOM, "--keep", "1" + "0" * 25), "too large a number"),
    ("keep of 5000 digits", flags(*RANDOM, "--keep", "1" * 5000), "keep is inf"),
    ("keep infinite", flags(*RANDOM, "--keep", "1e400"), "keep is inf", "a number"),
    ("keep 1e25", flags(*RANDOM, "--keep", "1e25"), "keep is 1e+25", "fraction"),
    ("option beyond all size", flags(*RANDOM, "--set", f"seed={DIGITS}"), "too large a number"),
    ("option beyond 64 bits", flags(*SGL, "--set", f"threshold={10 ** 25}"), "too large a number"),
    ("questions of 401 digits", of(evaluate, "--questions", DIGITS), "--questions", "too large"),
    ("questions beyond reason", of(evaluate, "--questions", "1" + "0" * 12), "at most 1000000"),
    ("questions below 0", of(evaluate, "--questions", "-3"), "--questions is -3", "at least 1"),
    ("questions not whole", of(evaluate, "--questions", "1.5"), "--questions", "'1.5'"),
    *((f"questions {value}", of(evaluate, f"--questions={value}"), "--questions", repr(value), "whole number")
      for value in ("nan", "inf", "1e400", "")),
    *((f"blur {value}", of(evaluate, f"--blur={value}"), f"--blur is {float(value)}", "0 or more pixels")
      for value in ("nan", "inf", "-inf", "1e400", "-1", "1e25", "1001")),
    ("blur of 401 digits", of(evaluate, "--blur", DIGITS), "--blur is inf"),
    ("blur a word", of(evaluate, "--blur", "much"), "--blur", "'much'"),
    ("layer of 401 digits", of(evaluate, "--skip-layer", DIGITS), "--skip-layer", "too large"),
    ("keeps, one too large", of(evaluate, *RANDOM, "--keep", f"0.5,{10 ** 25}"), "too large a number"),
    ("rounds of 401 digits", of(benchmark, "--repeat", DIGITS), "--repeat", "too large"),
    ("batches, one no number", of(benchmark, "--batch", "1,two"), "--batch", "'two'"),
    ("tiles of 401 digits", of(benchmark, "--tiles", DIGITS), "--tiles", "too large"),
]

OUTPUTS = [
    ("map over its image", in_folder(*MAP, "IMAGE"), "good.png", "this is the image"),
    ("map over its image, spelt otherwise", in_folder(*MAP, "HERE/./good.png"), "this is the image"),
    ("map on a pipe", with_pipe("map.png", in_folder(*MAP, "HERE/map.png")), "map.png", "not a file"),
    ("map on a folder", in_folder(*MAP, "HERE/checkpoint.png/x.png"), "no folder", "create it"),
    ("map in a file", in_folder(*MAP, "HERE/a.png/x.png", name="a.png", content=b""), "no folder"),
    ("map of 300 letters", in_folder(*MAP, f"HERE/{LONG}.png"), "File name too long", "another name"),
    ("map without permission", without_permission(in_folder(*MAP, "HERE/x.png")), "nothing can be written"),
    ("map over a protected file",
     without_permission(in_folder(*MAP, "HERE/x.png", name="x.png", content=b"")), "write-protected"),
    ("JSON on a device", of(evaluate, "--json", "/dev/null"), "--json /dev/null", "not a file"),
    ("JSON on a folder", in_folder("--json", "HERE", program=evaluate), "--json", "not a file"),
    ("JSON of 300 letters", in_folder("--json", f"HERE/{LONG}", program=evaluate), "File name too long"),
    ("JSON of 252 letters", in_folder("--questions", "1", "--json", f"HERE/{LONG[:252]}", program=evaluate),
     ".part", "File name too long"),
    ("JSON without permission", without_permission(in_folder("--json", "HERE/x", program=evaluate)),
     "nothing can be written"),
    ("JSON and plot in one file", in_folder(*RANDOM, "--json", "HERE/x.png", "--plot", "HERE/./x.png",
                                            program=evaluate), "same file", "two names"),
    ("plot of 300 letters", in_folder(*RANDOM, "--plot", f"HERE/{LONG}.png", program=evaluate), "too long"),
    ("plot without permission",
     without_permission(in_folder(*RANDOM, "--plot", "HERE/x.png", program=evaluate)),
     "nothing can be written"),
    ("part on a pipe", with_pipe("x.json.part", in_folder(*ONE, program=evaluate)), "part", "not a file"),
    ("part of something else", in_folder(*ONE, name="x.json.part", content=b"mine\n", program=evaluate),
     "x.json.part", "delete this file"),
    ("figures on a device", of(benchmark, "--json", "/dev/null"), "--json /dev/null", "not a file"),
    ("figures of 300 letters", in_folder("--json", f"HERE/{LONG}", program=benchmark), "File name too long"),
    ("drawing of 300 letters", in_folder("--plot", f"HERE/{LONG}.png", program=benchmark), "name too long"),
    ("drawing without permission", without_permission(in_folder("--plot", "HERE/x.png", program=benchmark)),
     "nothing can be written"),
]

NAMES = [
    ("model of 300 letters", flags("--model", LONG), "neither 'tiny'"),
    ("model of 5000 letters", flags("--model", "x" * 5000), "neither 'tiny'"),
    ("image of 300 letters", flags("--image", LONG), "name too long"),
    ("method of 5000 letters", flags("--prune", "x" * 5000), "choose one of none", "mine.py:Mine"),
    ("file of 300 letters", flags("--prune", f"{LONG}.py:Mine"), "File name too long", "mine.py:Mine"),
    ("class of 5000 letters", method("x = 1", "X" * 5000), "no class", "Pruner"),
    ("option of 5000 letters", flags(*RANDOM, "--set", f"{'x' * 5000}=1"), "no option", "keep: a number"),
    ("value of 5000 letters", flags(*RANDOM, "--set", "when=" + "x" * 5000), "must be prefill or"),
    ("setting of 5000 letters", flags(*RANDOM, "--set", "x" * 5000), "option=value"),
    ("weights of 300 letters", flags(*QUECC, "--set", f"weights={LONG}"), "File name too long"),
    ("guide of 300 letters", in_folder("--image", "IMAGE", *QUESTION, *SGL, "--set", f"guide={LONG}"),
     "nor a folder here"),
    ("device of 5000 letters", flags("--device", "x" * 5000), "use cpu, cuda"),
    ("dtype of 5000 letters", flags("--dtype", "x" * 5000), "bf16", "fp32"),
    ("flag of 5000 letters", bare("--" + "x" * 5000), "unrecognized arguments"),
    ("kind of 5000 letters", of(evaluate, "--kinds", "x" * 5000), "no question is of kind", "colour"),
    ("methods of 5000 letters", of(evaluate, "--prune", "x" * 5000), "choose one of none"),
    ("setting of methods", of(evaluate, *RANDOM, "--set", "x" * 5000), "option=value"),
    ("weights of methods", of(evaluate, *QUECC, "--set", f"quecc.weights={LONG}"), "File name too long"),
]

KINDS = {"pruning": PRUNING, "image": IMAGES, "flag": FLAGS, "prompt": PROMPTS, "checkpoint": PLACES,
         "config": CONFIGS, "weights": WEIGHT_FILES, "text": TEXT_SIDE, "number": NUMBERS, "output": OUTPUTS,
         "name": NAMES, "guard": GUARDS, "lmms-eval": LMMS,
         "questions": JSONL}
ROWS = {f"{kind}: {name}": row for kind, rows in KINDS.items() for name, *row in rows}
