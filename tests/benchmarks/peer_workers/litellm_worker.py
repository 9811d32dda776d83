"""litellm: its complexity router with default rules, ``classify`` and the model of the tier."""

from __future__ import annotations

from typing import Any

from worker import serve


def start() -> tuple[dict[str, Any], dict[str, Any]]:
    from litellm.router_strategy.complexity_router.complexity_router import ComplexityRouter

    tiers = {"SIMPLE": "small", "MEDIUM": "medium", "COMPLEX": "large", "REASONING": "reasoner"}
    router = ComplexityRouter(
        "smart", ctx=None, complexity_router_config={"tiers": tiers}, derive_savings_baseline=False
    )
    return {"complexity router": lambda text: router.get_model_for_tier(router.classify(text)[0])}, {}


if __name__ == "__main__":
    serve(start)
