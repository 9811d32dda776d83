"""What a cold start runs in its fresh process: load a bundle, decide once, say where the time went.

``python -c "from arllm.train.latency_child import main; main()" BUNDLE VARIANT THREADS TEXT``. Imports nothing that
``Router.load`` would not import itself, or its own imports would count as the process's start.
"""

import sys
import time


def main() -> None:
    """Prints one line of JSON: seconds of each part, and the peak memory in bytes."""
    started = time.perf_counter()
    from arllm.runtime import Router
    from arllm.runtime.session import Session
    from arllm.runtime.tokens import TextTokenizer

    imported = time.perf_counter()
    bundle, variant, threads, text = sys.argv[1:]
    spent = {"tokenizer": 0.0, "session": 0.0}
    read, opened = TextTokenizer.from_file, Session.__init__

    def timed_read(*args, **kwargs):  # type: ignore[no-untyped-def]
        begun = time.perf_counter()
        try:
            return read(*args, **kwargs)
        finally:
            spent["tokenizer"] += time.perf_counter() - begun

    def timed_open(*args, **kwargs):  # type: ignore[no-untyped-def]
        begun = time.perf_counter()
        try:
            opened(*args, **kwargs)
        finally:
            spent["session"] += time.perf_counter() - begun

    TextTokenizer.from_file, Session.__init__ = timed_read, timed_open  # type: ignore[method-assign]
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
