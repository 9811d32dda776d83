"""llmrouter-lib: ``route_single`` of its MLP, MF and KNN routers, with a random Longformer base injected.

Its routers read routing data at construction and load their model again in every call; both are left as they are.
The data are random: 1,000 queries, 16 candidates. A batch of queries would load the model once.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from random_models import save_random
from worker import serve

QUERIES, CANDIDATES, WIDTH = 1000, 16, 768


def start() -> tuple[dict[str, Any], dict[str, Any]]:
    cache, tokenizer = Path(sys.argv[1]), sys.argv[2]
    folder = save_random("longformer-base", tokenizer, cache / "longformer-base", 4096)
    import torch
    import transformers
    import yaml
    from llmrouter.models.knnrouter.router import KNNRouter
    from llmrouter.models.mfrouter.router import BilinearMF, MFRouter
    from llmrouter.models.mlprouter.router import MLPClassifierNN, MLPRouter
    from llmrouter.utils import embeddings

    embeddings._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    embeddings._model = transformers.LongformerModel.from_pretrained(folder).eval()
    data = cache / "llmrouter"
    data.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    performance = torch.rand(QUERIES, CANDIDATES).tolist()
    rows = [
        {"query": f"query {q}", "embedding_id": q, "model_name": f"model-{m}", "performance": performance[q][m]}
        for q in range(QUERIES)
        for m in range(CANDIDATES)
    ]
    (data / "routing.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    vectors = torch.randn(QUERIES, WIDTH)
    torch.save({q: vectors[q].clone() for q in range(QUERIES)}, data / "embeddings.pt")

    def config(name: str, file: str, hparam: dict[str, Any]) -> str:
        path = data / f"{name}.yaml"
        paths = {
            "routing_data_train": str(data / "routing.jsonl"),
            "query_embedding_data": str(data / "embeddings.pt"),
        }
        given = {"data_path": paths, "model_path": {"load_model_path": str(data / file)}, "hparam": hparam}
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        return str(path)

    knn = KNNRouter(config("knn", "knn.pkl", {"n_neighbors": 5}))
    knn.knn_model.fit(knn.query_embedding_list, knn.model_name_list)
    (data / "knn.pkl").write_bytes(pickle.dumps(knn.knn_model))
    hidden = [128, 64]
    mlp = MLPRouter(config("mlp", "mlp.pt", {"hidden_layer_sizes": hidden, "activation": "relu"}))
    torch.save(MLPClassifierNN(WIDTH, hidden, mlp.num_classes).state_dict(), data / "mlp.pt")
    mf = MFRouter(config("mf", "mf.pt", {"latent_dim": 128, "text_dim": WIDTH}))
    torch.save(BilinearMF(128, CANDIDATES, WIDTH).state_dict(), data / "mf.pt")

    def arm(router: Any) -> Any:
        return lambda text: router.route_single({"query": text})["model_name"]

    return {"MLP": arm(mlp), "MF": arm(mf), "KNN": arm(knn)}, {}


if __name__ == "__main__":
    serve(start)
