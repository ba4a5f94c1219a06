"""`python tests/page/watch.py LOG PROGRAM ...` runs a program, and writes down every host that it looks up,
connects to or sends to: one line each in LOG, the event and the host."""
import runpy
import sys
from pathlib import Path

HOST_OF = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.connect": 1, "socket.sendto": 1}


def watch(event: str, arguments: tuple):
    if event in HOST_OF:
        address = arguments[HOST_OF[event]]
        host = address[0] if isinstance(address, tuple) else address
        log.write(f"{event} {host}\n")


if __name__ == "__main__":
    log = open(sys.argv[1], "w", buffering=1, encoding="utf-8")     # noqa: SIM115  open until the program ends
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    sys.addaudithook(watch)
    runpy.run_path(sys.argv[0], run_name="__main__")
