"""Export: a run in, a verified bundle out."""

if __name__ != "arllm.export":
    raise ImportError('this package is "arllm.export"; "import export" from the root would make a second copy of it')
