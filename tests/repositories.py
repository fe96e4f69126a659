"""Tiny repositories of every family, as transformers and open_clip write them, and a hub's cache and server to hold them."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import LETTERS, MODELS
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.open_clip import create

SIZES = {"hidden_size": 32, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def transformers_repository(
    folder: Path,
    family: str,
    activation: str,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    shards: bool = False,
    vocabulary: bool = False,
) -> Any:
    """Write a repository of transformers with random weights; returns its model.

    Args:
        family: "clip", "siglip" or "siglip2", which differ in the tokenizer.
        text, vision: more settings of the towers.
        vocabulary: the tokenizer is in vocab.json and merges.txt, as in repositories older than tokenizer.json.
    """
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    tokenizer = clip_tokenizer() if family == "clip" else siglip_tokenizer(family)
    text = {**SIZES, "vocab_size": len(tokenizer), "hidden_act": activation, **(text or {})}
    vision = {**VISION, "hidden_act": activation, **(vision or {})}
    if family == "clip":
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = {"max_position_embeddings": 77, **ids, **text}
        config: Any = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = random_model(CLIPModel, config)
        prepared = {
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "size": {"shortest_edge": 32},
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        }
    else:
        config = SiglipConfig(text_config={"bos_token_id": 1, "eos_token_id": 1, **text}, vision_config=vision)
        model = random_model(SiglipModel, config)
        half = [0.5, 0.5, 0.5]
        prepared = {"size": {"height": 32, "width": 32}, "image_mean": half, "image_std": half}
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    tokenizer.save_pretrained(folder)
    if vocabulary:
        file = folder / "tokenizer.json"
        words = json.loads(file.read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(words["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, words["merges"])]) + "\n")
        file.unlink()
    if family != "clip":  # the class that the family's repositories name
        file = folder / "tokenizer_config.json"
        named = {"siglip": "SiglipTokenizer", "siglip2": "GemmaTokenizer"}[family]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": named}))
    kind = "CLIPImageProcessor" if family == "clip" else "SiglipImageProcessor"
    settings = {"image_processor_type": kind, "do_resize": True, "do_normalize": True, "resample": 3, **prepared}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def random_model(kind: Any, config: Any) -> Any:
    """A model with random weights that are large, so that activations and epsilons matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.data.fill_(1.5)
            elif name == "logit_bias":
                parameter.data.fill_(-3.25)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def clip_tokenizer(specials_first: bool = False) -> Any:
    """A byte-level tokenizer as CLIP has, of letters and a few merges; its end token is the highest unless `specials_first`."""
    from transformers import CLIPTokenizer

    merges: Any = [("a", "n</w>"), ("t", "h"), ("th", "e</w>"), ("o", "f</w>")]
    pieces = [
        *LETTERS,
        ".",
        ",",
        *(f"{piece}</w>" for piece in [*LETTERS, ".", ","]),
        *("".join(pair) for pair in merges),
    ]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    order = [*specials, *pieces] if specials_first else [*pieces, *specials]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(order)}, merges=merges)


def siglip_tokenizer(family: str) -> Any:
    """A unigram tokenizer that adds an end token, which SigLIP also pads with; SigLIP 2 has a padding token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS, "\u2581round", ".", ","]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad = "</s>" if family == "siglip" else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token=pad, unk_token="<unk>", model_max_length=64
    )


def open_clip_repository(folder: Path, kind: str, model_folder: Path, **text: str) -> None:
    """Write a repository of open_clip with random weights: a model of `tests.conftest.MODELS`, with its tokenizer for "bert"."""
    model, _, _ = create(BackboneConfig(name=str(model_folder / f"{kind}.json")))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.clone().contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {**MODELS[kind], "text_cfg": {**MODELS[kind]["text_cfg"], **text}}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "size": [32, 32]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def files_in(folder: Path) -> list[Path]:
    """All files under a folder, in order."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def commit_of(folder: Path) -> str:
    """A commit hash that a repository's content determines."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in files_in(folder):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def lay_out(cache: Path, name: str, folder: Path, revision: str = "main") -> str:
    """Put a repository into a hub's cache as huggingface_hub would: blobs, a snapshot of links, a ref. Returns the commit."""
    commit, root = commit_of(folder), cache / f"models--{name.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = root / "snapshots" / commit / file.name
        if not link.exists():
            link.symlink_to(Path("../../blobs") / blob.name)
    return commit


@contextmanager
def hub_server(repositories: dict[str, dict[str, Path]]) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories, folders by name and revision, by the hub's file API on loopback; yields its URL and the requests.

    The API is the part that downloads use: /api/models/NAME[/revision/R], /api/models/NAME/tree/R and /NAME/resolve/R/FILE.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            for name, revisions in repositories.items():
                commits = {commit_of(folder): folder for folder in revisions.values()}
                known = {**revisions, **commits}
                if path == f"/api/models/{name}":
                    return self.info(name, revisions["main"])
                front, _, rest = path.partition(f"/{name}/")
                verb, _, rest = rest.partition("/")
                revision, _, file = rest.partition("/")
                folder = known.get(revision)
                if folder and front == "/api/models" and verb == "revision":
                    return self.info(name, folder)
                if folder and front == "/api/models" and verb == "tree":
                    return self.answer(json.dumps([self.entry(folder, file) for file in files_in(folder)]).encode())
                if folder and not front and verb == "resolve":
                    headers = {"X-Repo-Commit": commit_of(folder)}
                    if not (folder / file).is_file():
                        return self.answer(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
                    content = (folder / file).read_bytes()
                    return self.answer(content, 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
                if path.startswith(f"/api/models/{name}/"):
                    return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        def entry(self, folder: Path, file: Path) -> dict[str, Any]:
            oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
            return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": oid}

        def info(self, name: str, folder: Path) -> None:
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files_in(folder)]
            self.answer(json.dumps({"id": name, "sha": commit_of(folder), "siblings": siblings}).encode())

        def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
