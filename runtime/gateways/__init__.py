"""Adapters of the runtime to gateways. Each needs its own extra; nothing of ``arllm.runtime`` imports them.

The shared piece (``gate``, and what it is made of) needs nothing beyond the runtime; an adapter is one file on top.
"""
