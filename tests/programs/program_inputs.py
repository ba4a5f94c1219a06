"""What the tests of how a program starts and ends share: the programs and a question for them."""
from pathlib import Path

import benchmark
import demo
import evaluate
import generate

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "examples" / "shapes.png")
QUESTION = "--image", IMAGE, "--prompt", "What is written on the circle?"
PROGRAMS = {"generate": generate, "evaluate": evaluate, "benchmark": benchmark, "demo": demo}
