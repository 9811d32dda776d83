"""A port of the router, written after artifacts/README.md alone: reads a bundle's JSON, runs ``router.onnx``.

Knows nothing of arllm. ``port.py BUNDLE VARIANT`` prints, per line of conformance.jsonl, the choice at each beta and
the qualities at the first, as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(bundle: Path, variant: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    candidates = json.loads((bundle / "pool.json").read_text(encoding="utf-8"))["candidates"]
    candidates.sort(key=lambda candidate: (candidate["cost"], candidate["name"]))
    names = [candidate["name"] for candidate in candidates]
    calibration = manifest["policies"]["nir"]["calibration"]
    offsets = [calibration["offsets"].get(name, calibration["default"]) for name in names]
    pool = {
        "model_vectors": np.array([candidate["vector"] for candidate in candidates], dtype=np.float32),
        "offsets": np.array(offsets, dtype=np.float64),
        "costs": np.array([candidate["cost"] for candidate in candidates], dtype=np.float64),
        "cost_bounds": np.array([manifest["cost"]["minimum"], manifest["cost"]["maximum"]], dtype=np.float64),
        "candidate_mask": np.ones(len(names), dtype=bool),
    }
    session = onnxruntime.InferenceSession(str(bundle / variant / "router.onnx"), providers=["CPUExecutionProvider"])
    for line in (bundle / "conformance.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        ids = np.array([row["ids"]], dtype=np.int64)
        choice, quality = {}, None
        for beta in row["expected"][variant]["choice"]:
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beta": np.array([float(beta)])}
            chosen, found = session.run(["choice", "quality"], inputs | pool)
            choice[beta] = names[int(chosen[0])]
            quality = quality or dict(zip(names, found[0].tolist(), strict=True))
        print(json.dumps({"choice": choice, "quality": quality, "arllm": "arllm" in sys.modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
