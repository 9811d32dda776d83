"""The same encoder by every engine, and nano's whole route() against PyTorch: milliseconds by tokens, as JSON.

    python tests/benchmarks/engines.py --out out/bench/engines.json [--rounds 10] [--smoke]

EmbeddingGemma's shape and nano's with layers have random weights. An engine is a way to run one query of so many
tokens: PyTorch eager, the traced graph and the authored one in ONNX Runtime, OpenVINO from an environment of its own.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import shapes
import torch
from environments import InstallError, cache_folder, environment
from interleave import Arm, interleaved, stopwatch
from record import ONE_THREAD, arguments, note, record
from worker import Worker, WorkerError

from arllm.runtime.router import Router
from arllm.train.encoder import QueryEncoder

THREADS = (1,) if ONE_THREAD else (2, 1)
QUERIES = 8  # of every length, in turn
NANO_LAYERS = 4
PROFILED = 9  # runs of a graph
OPENVINO = ("openvino==2026.4.1", "nncf==3.4.0")
OPENVINO_WORKER = Path(__file__).with_name("openvino_worker.py")

Table = dict[str, Any]


def on(threads: int, function: Callable[[Any], object], queries: Iterable[Any]) -> Arm:
    """An arm of PyTorch: it has one number of threads for the whole process."""
    each = itertools.cycle(queries)

    def arm() -> float:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        query = next(each)
        return stopwatch(lambda: function(query))()

    return arm


def each_of(function: Callable[[Any], object], queries: Iterable[Any]) -> Arm:
    """An arm that takes the queries in turn."""
    each = itertools.cycle(queries)

    def arm() -> float:
        query = next(each)
        return stopwatch(lambda: function(query))()

    return arm


def remote(worker: Worker, name: str, queries: Iterable[Any]) -> Arm:
    """An arm that runs, and is timed, in a worker."""
    each = itertools.cycle(queries)
    return lambda: worker.run(name, [next(each)])[0][0]


def session(path: Path, threads: int, *, profile: str | None = None) -> onnxruntime.InferenceSession:
    """As the runtime opens a graph for a guest: threads that wait sleep; spinning, they would take others' cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_graph(graph: onnxruntime.InferenceSession) -> Callable[[Any], object]:
    names = ["query_vector", "familiarity"]
    return lambda ids: graph.run(names, {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]})


def run_torch(encoder: QueryEncoder) -> Callable[[Any], object]:
    def run(ids: Any) -> object:
        one = torch.from_numpy(ids)[None]
        mask = torch.ones_like(one)
        with torch.inference_mode():
            return encoder(one, mask), encoder.familiarity(one, mask)

    return run


def in_bf16(encoder: QueryEncoder) -> QueryEncoder:
    """The backbone in bf16; pooling and heads stay in fp32."""
    other = copy.deepcopy(encoder)
    other.backbone.to(torch.bfloat16)
    return other


def compare_encoders(
    title: str, encoder: QueryEncoder, folder: Path, lengths: Sequence[int], rounds: int
) -> tuple[list[Table], dict[str, Any]]:
    """A table per number of threads, and what ONNX Runtime's profiler says of the two int8 graphs."""
    graphs = shapes.export_graphs(encoder, folder, note)
    networks = {"PyTorch fp32": run_torch(encoder), "PyTorch bf16": run_torch(in_bf16(encoder))}
    vocabulary = encoder.spec.backbone.vocab_size
    tables = []
    with ExitStack() as stack:
        openvino, missing = _openvino(stack, graphs["traced-fp32"], vocabulary)
        for threads in THREADS:
            sessions = {f"ORT {name.replace('-', ' ')}": session(path, threads) for name, path in graphs.items()}
            times: dict[str, dict[str, list[float]]] = defaultdict(dict)
            for length in lengths:
                note(f"{title}: {threads} threads, {length} tokens")
                queries = shapes.random_ids(vocabulary, length, QUERIES)
                arms = {name: on(threads, run, queries) for name, run in networks.items()}
                arms |= {name: each_of(run_graph(one), queries) for name, one in sessions.items()}
                there = {}
                if openvino is not None:
                    asked = [ids.tolist() for ids in queries]
                    there = {f"OpenVINO {p}": remote(openvino, f"{p}/{threads}", asked) for p in ("bf16", "int8")}
                try:
                    found = interleaved(arms | there, rounds)
                except WorkerError as error:
                    openvino, missing = None, f"OpenVINO: {error}"
                    note(missing)
                    found = interleaved(arms, rounds)
                for name, ms in found.items():
                    times[name][str(length)] = ms
            times = {name: by_length for name, by_length in times.items() if len(by_length) == len(lengths)}
            tables.append({"title": title, "threads": threads, "base": "ORT authored int8", "times": times})
    about: dict[str, Any] = {"profiles": _profiles(graphs, vocabulary, lengths)}
    about |= {"missing": missing} if missing else {}
    return tables, about


def _openvino(stack: ExitStack, graph: Path, vocabulary: int) -> tuple[Worker | None, str]:
    try:
        python = environment("openvino", OPENVINO, note)
        note("OpenVINO: compiling and quantizing")
        log = cache_folder() / "openvino.log"
        return stack.enter_context(Worker([python, OPENVINO_WORKER, graph, str(vocabulary)], log)), ""
    except (InstallError, WorkerError) as error:
        note(f"OpenVINO: {error}")
        return None, f"OpenVINO: {error}"


def _profiles(graphs: dict[str, Path], vocabulary: int, lengths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Graph → length → operator → share of the time that ONNX Runtime spent in kernels, on one thread."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("traced-int8", "authored-int8"):
        found[name] = {}
        for length in lengths:
            queries = shapes.random_ids(vocabulary, length, PROFILED)
            with tempfile.TemporaryDirectory() as scratch:
                one = session(graphs[name], 1, profile=f"{scratch}/profile")
                for ids in queries:
                    run_graph(one)(ids)
                events = json.loads(Path(one.end_profiling()).read_text(encoding="utf-8"))
            found[name][str(length)] = _shares(events)
    return found


def _shares(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Operator → share of kernel time, each node by the median of its runs: a busy machine preempts some of them.

    A branch's own node is left out: what stands inside it is counted itself.
    """
    of_node: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            of_node[event["name"], event["args"]["op_name"]].append(event["dur"])
    total: dict[str, float] = defaultdict(float)
    for (_, op), durations in of_node.items():
        total[op] += median(durations)
    total.pop("If", None)
    everything = sum(total.values()) or 1.0
    return {op: duration / everything for op, duration in sorted(total.items(), key=lambda pair: -pair[1])}


def compare_routes(nano: shapes.Nano, lengths: Sequence[int], rounds: int) -> list[Table]:
    """Whole route() calls, tokenization included, over 16 candidates."""
    texts, _ = shapes.prompts()
    reference = nano.torch_router()
    tables = []
    for threads in THREADS:
        routers = {
            name: Router.load(folder, variant=variant, threads=threads, pool=nano.pool)
            for name, (folder, variant) in nano.bundles.items()
        }
        times: dict[str, dict[str, list[float]]] = defaultdict(dict)
        stages: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for length in lengths:
            note(f"{nano.title}: {threads} threads, {length} tokens")
            queries = shapes.texts_of(nano.run.text_tokenizer(), length, QUERIES, texts)
            arms = {"PyTorch": on(threads, reference.route, queries)}
            arms |= {name: each_of(router.route, queries) for name, router in routers.items()}
            for name, ms in interleaved(arms, rounds).items():
                times[name][str(length)] = ms
            for name, router in {"PyTorch": reference, **routers}.items():
                stages[name][str(length)] = _stages(router, queries)
        base = next((name for name in routers if "authored int8" in name), next(iter(routers)))
        tables.append({"title": nano.title, "threads": threads, "base": base, "times": times, "stages": stages})
    return tables


def _stages(router: Router, queries: Sequence[str]) -> list[float]:
    """Median milliseconds of tokenizing, encoding and deciding."""
    timings = [router.route(text).timing for text in queries * 4]
    rows = [(t.tokenize_ms, t.encode_ms, t.score_ms) for t in timings]
    return [float(value) for value in np.median(rows, axis=0)]


def run(rounds: int, lengths: Sequence[int], cache: Path, *, small: bool = False) -> dict[str, Any]:
    """Everything, as the writer of RESULTS.md wants it; ``small``: two layers of EmbeddingGemma's shape."""
    torch.set_grad_enabled(False)
    spec = shapes.EMBEDDINGGEMMA
    if small:
        spec = replace(spec, num_layers=2, layer_types=spec.layer_types[4:6])
    encoder = shapes.random_encoder(spec, 2048)
    title = f"EmbeddingGemma's shape ({spec.num_layers} layers)"
    encoders, about = compare_encoders(title, encoder, cache / f"gemma-{spec.num_layers}", lengths, rounds)
    del encoder
    layered = shapes.layered_nano(NANO_LAYERS, cache / f"nano-{NANO_LAYERS}", note)
    tables, _ = compare_encoders(
        f"{layered.title}, encoder alone", layered.run.encoder, cache / f"nano-{NANO_LAYERS}/graphs", lengths, rounds
    )
    routes = [table for nano in (shapes.shipped_nano(), layered) for table in compare_routes(nano, lengths, rounds)]
    return {
        "rounds": rounds,
        "lengths": list(lengths),
        "texts": shapes.prompts(1)[1],
        "encoders": encoders + tables,
        "routes": routes,
        **about,
    }


def main() -> None:
    given = arguments("Engines compared, interleaved.", "rounds", 8, "of every length").parse_args()
    rounds = 2 if given.smoke else given.rounds
    lengths = shapes.LENGTHS[:2] if given.smoke else shapes.LENGTHS
    record(given.out, lambda: run(rounds, lengths, cache_folder(), small=given.smoke))


if __name__ == "__main__":
    main()
