"""A judge for rehearsals of LLaVA-Bench without the network: `python -m evaluation.lmms.loopback_judge`.

It listens on 127.0.0.1 alone, answers in the format of OpenAI's chat completions, and is no judge of
language: the reference gets 10, and the answer as much of 10 as it shares words with it (F1). Start lmms-eval
with

    OPENAI_API_KEY=none OPENAI_API_URL=http://127.0.0.1:8765/v1/chat/completions
"""
import argparse
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cli.options import Parser, whole_number
from cli.program import run, write
from weights.messages import reason

MOST_BYTES = 1_000_000              # of a question
ANSWERS = re.compile(r"\[(\w+) 1]\n(.*?)\n\n\[End of \1 1].*\[\1 2]\n(.*?)\n\n\[End of \1 2]", re.S)


class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            length = int(self.headers["Content-Length"])
            asked = json.loads(self.rfile.read(min(length, MOST_BYTES)))
            verdict = judged(asked["messages"])
        except (ValueError, KeyError, TypeError) as error:
            return self.send_error(400, f"not a question about two answers: {type(error).__name__}")
        message = {"role": "assistant", "content": verdict}
        made = {"id": "0", "object": "chat.completion", "created": 0, "model": str(asked.get("model")),
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}}
        data = json.dumps(made).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Nothing: stdout has the address alone."""


def judged(conversation: list[dict]) -> str:
    """A line "10 7.5", and a reason. Raises ValueError where the two answers are not found."""
    content = conversation[-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    found = ANSWERS.search(text)
    if found is None:
        raise ValueError("there are no two answers")
    return f"10 {10 * f1(found[2], found[3]):.1f}\nShared words."


def f1(reference: str, answer: str) -> float:
    """Twice the shared words over the words of both."""
    a, b = Counter(reference.split()), Counter(answer.split())
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.lmms.loopback_judge", "A judge for rehearsals, on 127.0.0.1.")
    parser.add_argument("--port", type=whole_number, default=8765, metavar="N",
                        help="default 8765; 0: any that is free")
    return parser.parse_args()


def command(args: argparse.Namespace):
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port is {args.port}, but must be 0 to 65535")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Judge)
    except OSError as error:
        raise ValueError(f"--port {args.port}: {reason(error)}; choose another") from None
    with server:
        write(f"http://127.0.0.1:{server.server_port}/v1/chat/completions\n")
        server.serve_forever()


def main():
    run(command, arguments)


if __name__ == "__main__":
    main()
