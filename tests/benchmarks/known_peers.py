"""The peers that install from PyPI and route offline: what each needs, and what it does and doesn't do."""

from __future__ import annotations

from dataclasses import dataclass

ARLLM = "arllm nano"  # the arm that all others are compared with


@dataclass(frozen=True)
class Peer:
    """A package with one or several routers, called arms.

    ``requirements`` are pip's; none: the benchmark's own environment has all of it.
    """

    name: str
    worker: str  # file in peer_workers
    requirements: tuple[str, ...]
    arms: tuple[str, ...]
    encoder: str
    decides: str
    learned_from: str
    candidates: str
    lacks: str


TORCH = "torch==2.13.0"  # a bare requirement takes a CUDA build of several GB

PEERS = (
    Peer(
        "arllm",
        "arllm_worker.py",
        (),
        (ARLLM,),
        "nano's int8 graph (ONNX Runtime, 1 thread)",
        "the candidate of highest utility: calibrated quality of each against its cost, by beta per request",
        "outcomes: which model answered which query right",
        "16; any pool, new candidates by their accuracy per domain, without training",
        "knows no conversation, tools or session; one text in, one model out",
    ),
    Peer(
        "llmrouter-lib",
        "llmrouter_worker.py",
        ("llmrouter-lib==0.4.0", TORCH, "transformers==5.24.0", "numpy==2.4.6"),
        ("MLP", "MF", "KNN"),
        "Longformer base's shape, random weights (PyTorch fp32)",
        "the best candidate by an MLP, a bilinear factorization or neighbours on the query's embedding",
        "outcomes: performance of each candidate on each query",
        "16, fixed at training",
        "cost, preference and calibration; loads its model again in every `route_single`; pads to 512 tokens",
    ),
    Peer(
        "routellm",
        "routellm_worker.py",
        ("routellm==0.2.0", TORCH, "transformers==5.24.0", "numpy<2", "datasets==4.4.1", "pyarrow==21.0.0"),
        ("BERTRouter",),
        "XLM-R base's shape, random weights (PyTorch fp32)",
        "strong or weak model: win rate of the strong one against a threshold",
        "human preferences between pairs of models",
        "2",
        "more than two candidates; cost is a threshold set by hand; the default, mf, needs OpenAI's embeddings",
    ),
    Peer(
        "semantic-router",
        "semantic_router_worker.py",
        ("semantic-router==1.1.1", TORCH, "transformers==4.57.6", "numpy==2.4.6"),
        ("IndexedRouter",),
        "MiniLM-L6's shape, random weights (PyTorch fp32)",
        "the route whose example utterances are nearest: a topic, which somebody maps to a model",
        "10 example utterances for each of 16 routes",
        "16 routes",
        "quality, cost and preference: it knows topics, not which model is good at them",
    ),
    Peer(
        "litellm",
        "litellm_worker.py",
        ("litellm==1.110.2",),
        ("complexity router",),
        "none: regular expressions and keyword lists",
        "one of four tiers by a weighted score of keywords, length and punctuation",
        "nothing: rules written by hand",
        "4 tiers",
        "outcomes, quality and cost: a tier is a guess at difficulty from words",
    ),
    Peer(
        "scikit-learn",
        "lexical_worker.py",
        (),
        ("tf-idf + logistic regression",),
        "none: words and pairs of words",
        "the most probable best candidate",
        "outcomes (here random labels of the prompts themselves)",
        "16, fixed at training",
        "cost and preference; out of distribution it loses to the best constant choice (shared/data/README.md)",
    ),
)
