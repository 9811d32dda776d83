"""What a cold start runs in its fresh process: load a bundle, decide once, say where the time went.

``python -c "from arllm.train.latency.child import main; main()" BUNDLE VARIANT THREADS TEXT``. Imports nothing that
``Router.load`` would not import itself, or its own imports would count as the process's start.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def main() -> None:
    """Prints one line of JSON: seconds of each part, and the peak memory in bytes."""
    started = time.perf_counter()
    from arllm.runtime import Router
    from arllm.runtime.session import Session
    from arllm.runtime.tokens import TextTokenizer

    imported = time.perf_counter()
    bundle, variant, threads, text = sys.argv[1:]
    spent = {"tokenizer": 0.0, "session": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - begun

        return call

    # The very calls that Router.load makes, wherever it makes them.
    TextTokenizer.from_file = timed("tokenizer", TextTokenizer.from_file)  # type: ignore[method-assign]
    Session.__init__ = timed("session", Session.__init__)  # type: ignore[method-assign]
    router = Router.load(bundle, variant=variant, threads=int(threads))
    loaded = time.perf_counter()
    router.route(text)
    decided = time.perf_counter()

    import json  # only now: everything before is what a host pays

    load = loaded - imported
    parts = {
        "import": imported - started,
        "bundle": max(0.0, load - sum(spent.values())),
        **spent,
        "first_route": decided - loaded,
    }
    print(json.dumps({"parts": parts, "total": decided - started, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """The largest resident memory of this process so far.

    Linux keeps ru_maxrss across exec, so that a child would report the parent that started it; VmHWM is the child's
    own. Elsewhere ru_maxrss, in bytes on macOS and KiB on the others.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="ignore") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
