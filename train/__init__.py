"""Training: outcomes and a pool in, a run folder out. Importing this package alone brings in no torch."""

if __name__ != "arllm.train":
    raise ImportError('this package is "arllm.train"; "import train" from the root would make a second copy of it')
