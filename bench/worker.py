"""The process that a side runs in: one JSON request a line on stdin, one JSON reply a line on stdout.

    python -m deltapatch.bench.worker PEER

A side has a process of its own, so that import time and peak memory are its own, and its Python may be
another environment's. What libraries print goes to stderr.
"""

import time

BEGAN = time.perf_counter()  # before anything that takes long is imported

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402


def serve(name: str) -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from deltapatch.bench.side import Side, in_words

    side = Side(name, BEGAN)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(side, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": in_words(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
