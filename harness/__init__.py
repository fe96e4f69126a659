"""vipbench: a benchmark harness for adapting CLIP-like models to medical images with prompts."""

__version__ = "0.1.0"

if __name__.partition(".")[0] != "vipbench":  # a second copy of every module, with a registry of its own, if it went on
    raise ImportError("import vipbench.harness; this folder is that package (vipbench/harness is a link to it)")
