"""Weights from all sorts of places: the activation function they were trained with, files that are not what they should be."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import BERT, MODELS
from tests.openai_clip import features, openai_weights, transformers_clip, write_archive
from tests.repositories import lay_out
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Task
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.open_clip import _quick_gelu, create
from vipbench.harness.models.openai_file import is_torchscript, read_openai
from vipbench.harness.runs.inputs import build_method
from vipbench.harness.runs.resolve import resolve_config

TEXTS = ["a photo of a melanoma.", "round", "a very irregular border with three colours, some of them blue"]


@pytest.fixture(scope="module")
def clip() -> Any:
    return transformers_clip()


@pytest.fixture(scope="module")
def places(clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a TorchScript archive, as safetensors, and in a folder whose config has quick_gelu; and model JSONs."""
    folder = tmp_path_factory.mktemp("places")
    weights = openai_weights(clip)
    write_archive(weights, folder / "openai.pt")
    write_archive(weights, folder / "other.pt", openai=False)
    (folder / "hub").mkdir()
    for path in (folder / "weights.safetensors", folder / "hub" / "open_clip_model.safetensors"):
        save_file(weights, path)
    for name, flag in {"plain": {}, "quick": {"quick_gelu": True}, "gelu": {"quick_gelu": False}}.items():
        (folder / f"{name}.json").write_text(json.dumps({"model_cfg": MODELS["vit"] | flag}))
    shutil.copy(folder / "quick.json", folder / "hub" / "open_clip_config.json")
    return folder


@pytest.fixture
def tags(places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models `tiny` and `tiny-quickgelu` as open_clip has its own, with tags for QuickGELU and for GELU."""
    for name, flag in {"tiny": {}, "tiny-quickgelu": {"quick_gelu": True}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(MODELS["vit"] | flag))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    tag = open_clip.get_pretrained_cfg("ViT-B-16", "openai") | {"file": str(places / "weights.safetensors")}
    assert tag["quick_gelu"]
    gelu = {key: value for key, value in tag.items() if key != "quick_gelu"}
    known = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(known, "tiny", {"openai": tag, "laion": gelu, "no": gelu | {"quick_gelu": False}})
    monkeypatch.setitem(known, "tiny-quickgelu", {"openai": tag})


def difference(backbone: Backbone, clip: Any) -> float:
    """The most by which normalised features differ from those of transformers."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    images, texts = (torch.nn.functional.normalize(part, dim=-1) for part in features(clip, pixels, tokens))
    with torch.no_grad():
        ours = backbone.encode_images(pixels), torch.nn.functional.normalize(backbone.text.encode_texts(TEXTS), dim=-1)
    return max(float((ours[0] - images).abs().max()), float((ours[1] - texts).abs().max()))


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("plain.json", "openai.pt"),
        ("quick.json", "weights.safetensors"),
        ("hub", None),
        ("tiny", "openai"),
        ("tiny", "openai.pt"),
        ("tiny-quickgelu", "openai"),
        ("tiny-quickgelu", "weights.safetensors"),
    ],
)
def test_weights_run_with_the_activation_that_they_were_trained_with(
    clip: Any, places: Path, tags: None, name: str, pretrained: str | None
) -> None:
    """The tag's flag, OpenAI's file, the config or the name give QuickGELU, and then transformers has the same features."""
    here = {path.name: str(path) for path in places.iterdir()}
    config = BackboneConfig(name=here.get(name, name), pretrained=here.get(pretrained or "", pretrained))
    assert difference(load_backbone(config), clip) < 1e-5


def test_gelu_is_seen_in_features_and_digest(clip: Any, places: Path, tags: None) -> None:
    """The same weights with GELU are another model, whose features must not be taken for the right ones."""
    right, same, wrong = (
        load_backbone(BackboneConfig(name=name, pretrained=weights))
        for name, weights in [("tiny", "openai"), ("tiny-quickgelu", "openai"), ("tiny", "laion")]
    )
    assert difference(wrong, clip) > 1e-3
    assert right.digest == same.digest != wrong.digest
    files = [
        load_backbone(BackboneConfig(name=str(places / name), pretrained=str(places / "weights.safetensors"))).digest
        for name in ("plain.json", "quick.json")
    ]
    archive = load_backbone(
        BackboneConfig(name=str(places / "plain.json"), pretrained=str(places / "openai.pt"))
    ).digest
    assert archive == files[1] != files[0]


def test_all_of_open_clips_flags_are_followed() -> None:
    """Every tag of this open_clip, without its weights: the flag decides, and where there is none the config."""
    for name, tag in open_clip.list_pretrained():
        stated = open_clip.get_model_config(name).get("quick_gelu")
        flag = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")
        expected = bool(stated) if flag is None else flag
        assert _quick_gelu(BackboneConfig(name=name, pretrained=tag), stated, openai=False) is expected, (name, tag)
    assert _quick_gelu(BackboneConfig(name="ViT-B/16", pretrained="openai"), None, openai=False)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("tiny-quickgelu", "laion", "'laion' were trained with GELU; use name: tiny$"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "trained with GELU; use name: ViT-B-16$"),
        (
            "gelu.json",
            "openai.pt",
            "quick_gelu is false, but OpenAI trained .*openai.pt with QuickGELU; set it to true",
        ),
        ("plain.json", "other.pt", "none of OpenAI's CLIP models"),
        ("hub", "weights.safetensors", "brings its weights; leave pretrained out"),
        ("hf-hub:some/model", "weights.safetensors", "brings its weights; leave pretrained out"),
    ],
)
def test_what_contradicts_the_weights_is_refused(
    places: Path, tags: None, name: str, pretrained: str, message: str
) -> None:
    here = {path.name: str(path) for path in places.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(BackboneConfig(name=here.get(name, name), pretrained=here.get(pretrained, pretrained)))
    assert "\n" not in str(caught.value)


def test_an_archive_gives_the_weights_that_torch_would_load(places: Path, tmp_path: Path) -> None:
    """Half precision and several dtypes too; files that are no archives are told apart."""
    weights = openai_weights(transformers_clip())
    mixed = {name: value.half() if "mlp" in name else value for name, value in weights.items()}
    path = write_archive(mixed, tmp_path / "half.pt")
    assert is_torchscript(path)
    read = read_openai(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = torch.jit.load(path).state_dict()
    assert read.keys() == weights.keys() == expected.keys() - {"input_resolution", "context_length", "vocab_size"}
    assert all(torch.equal(read[name], expected[name]) and read[name].dtype == expected[name].dtype for name in read)
    torch.save(weights, tmp_path / "plain.pt")
    assert not is_torchscript(tmp_path / "plain.pt")
    assert not is_torchscript(places / "weights.safetensors")
    quick = load_backbone(BackboneConfig(name=str(places / "quick.json"), pretrained=str(tmp_path / "plain.pt")))
    assert torch.equal(quick.image.proj, weights["visual.proj"])


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (pickle.dumps(Hostile(), protocol=2), "a call of posix.mkdir is not expected"),
        (pickle.dumps(Hostile(), protocol=4), "an operation FRAME is not expected"),
        (b"\x80\x02c__torch__.M\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "none of OpenAI's"),  # holds itself
    ],
)
def test_nothing_in_an_archive_is_run(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, description: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "hostile.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", description)
    with pytest.raises(UserError, match=message):
        load_backbone(BackboneConfig(name=str(places / "plain.json"), pretrained=str(tmp_path / "hostile.pt")))
    assert not (tmp_path / "executed").exists()


def rewritten(source: Path, target: Path, **options: Any) -> Path:
    """The records of an archive written anew."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return target


@pytest.mark.parametrize("damage", ["cut", "bit", "compressed", "no data", "cut description"])
def test_damaged_archives_are_told_in_one_line(places: Path, tmp_path: Path, damage: str) -> None:
    path, content = tmp_path / "bad.pt", bytearray((places / "openai.pt").read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "compressed":
        rewritten(places / "openai.pt", path, compression=zipfile.ZIP_DEFLATED)
    else:
        with zipfile.ZipFile(places / "openai.pt") as old, zipfile.ZipFile(path, "w") as new:
            for record in old.infolist():
                described = record.filename.endswith("/data.pkl")
                if described or damage != "no data" or "/data/" not in record.filename:
                    data = old.read(record)
                    new.writestr(record.filename, data[:-50] if described and damage == "cut description" else data)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_backbone(BackboneConfig(name=str(places / "plain.json"), pretrained=str(path)))
    assert "\n" not in str(caught.value)


def changed(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    state[name].view(-1)[3] = value
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(places: Path, tmp_path: Path, value: float) -> None:
    state = changed(load_file(places / "weights.safetensors"), "transformer.resblocks.1.ln_2.weight", value)
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"1 of 32 weights in transformer\.resblocks\.1\.ln_2\.weight are NaN or inf"):
        load_backbone(BackboneConfig(name=str(places / "plain.json"), pretrained=str(tmp_path / "nan.safetensors")))


def write_model(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


VIT = MODELS["vit"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_cfg": VIT | {"vision_cfg": VIT["vision_cfg"] | {"image_size": [32, 48]}}},
            "32 x 48 pixels; only square",
        ),
        ({"model_cfg": VIT | {"vision_cfg": VIT["vision_cfg"] | {"layerz": 2}}}, "cannot be loaded: .*layerz"),
        ({"model_cfg": VIT | {"vision_cfg": [1]}}, "a mapping is expected; found list"),
        ({"model_cfg": {"embed_dim": 32, "vision_cfg": {}}}, "no open_clip model config: text_cfg missing"),
        ([1, 2], "a mapping is expected; found list"),
        ('{"model_cfg": ', "not JSON"),
        ({"model_cfg": VIT, "preprocess_cfg": {"std": [0, 1, 1]}}, "cannot be loaded: .*std"),
        ({"model_cfg": VIT, "preprocess_cfg": [1]}, "cannot be loaded"),
        ({"model_cfg": VIT | {"embed_dim": 48}}, "cannot be loaded: .*size mismatch"),
        (
            {"model_cfg": VIT | {"vision_cfg": VIT["vision_cfg"] | {"layers": 10**9}}},
            "vision_cfg.layers: at most 1000 is expected; found 1000000000",
        ),
        (
            {"model_cfg": VIT | {"text_cfg": VIT["text_cfg"] | {"width": 2**20, "heads": 64}}},
            "would have 2[0-9,]* parameters; at most 20,000,000,000",
        ),
    ],
)
def test_a_bad_config_is_one_line(places: Path, tmp_path: Path, config: Any, message: str) -> None:
    """In a folder and as a JSON with a file of weights."""
    folder = write_model(tmp_path / "model", config)
    shutil.copy(places / "weights.safetensors", folder / "open_clip_model.safetensors")
    path, weights = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    if "only square" in message:  # such a model's weights are others
        weights.unlink()
        configs = [BackboneConfig(name=str(path))]
    else:
        configs = [BackboneConfig(name=str(folder)), BackboneConfig(name=str(path), pretrained=str(weights))]
    for given in configs:
        with pytest.raises(UserError, match=message) as caught:
            load_backbone(given)
        assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_something_and_a_cut_file_are_one_line(places: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    without = write_model(tmp_path / "without", {"model_cfg": VIT})
    for folder in (tmp_path / "empty", without):
        with pytest.raises(UserError, match=r"no model: open_clip_config.json and weights such as"):
            load_backbone(BackboneConfig(name=str(folder)))
    content = (places / "weights.safetensors").read_bytes()
    for length in (0, 4, 1000, len(content) - 8):
        (without / "open_clip_model.safetensors").write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            load_backbone(BackboneConfig(name=str(without)))
        assert "\n" not in str(caught.value)


def repository(hub: Path, config: Path | None, weights: Path | None) -> BackboneConfig:
    """The hub's cache with a repository of these files; the same one with every call, at another commit."""
    folder = hub / "made" / str(len(list(hub.rglob("*"))))
    folder.mkdir(parents=True)
    (folder / "README.txt").write_text("a model")
    for file, name in ((config, "open_clip_config.json"), (weights, "open_clip_model.safetensors")):
        if file:
            shutil.copy(file, folder / name)
    lay_out(hub, "some/model", folder)
    return BackboneConfig(name="hf-hub:some/model")


def test_a_hub_model_has_its_configs_activation(clip: Any, places: Path, hub_cache: Path) -> None:
    weights = places / "weights.safetensors"
    quick = load_backbone(repository(hub_cache, places / "hub" / "open_clip_config.json", weights))
    assert difference(quick, clip) < 1e-5
    assert load_backbone(repository(hub_cache, places / "plain.json", weights)).digest != quick.digest


def test_a_hub_model_without_weights_is_not_a_random_one(places: Path, hub_cache: Path) -> None:
    with pytest.raises(UserError, match="Required pretrained weights"):
        load_backbone(repository(hub_cache, places / "hub" / "open_clip_config.json", None))
    with pytest.raises(UserError, match=r"cannot be loaded: Failed to download file \(open_clip_config.json\)"):
        load_backbone(repository(hub_cache, None, None))


def test_a_local_text_tower_is_known_by_its_content(model_folder: Path, tmp_path: Path) -> None:
    """Moved it is the same model; with another tokenizer or config it is another one."""

    def digest(folder: Path, name: str = "bert.json") -> str:
        return load_backbone(BackboneConfig(name=str(folder / name))).digest

    here = digest(model_folder)
    for folder in ("moved", "absolute"):
        shutil.copytree(model_folder / "bert", tmp_path / folder / "bert")
        shutil.copy(model_folder / "bert.json", tmp_path / folder / "siglip.json")  # nor is its name part of it
    absolute = json.loads((model_folder / "bert.json").read_text())
    text = {key: str(tmp_path / "absolute" / "bert") for key in ("hf_model_name", "hf_tokenizer_name")}
    absolute["model_cfg"]["text_cfg"] |= text
    (tmp_path / "absolute" / "siglip.json").write_text(json.dumps(absolute))
    assert digest(tmp_path / "moved", "siglip.json") == digest(tmp_path / "absolute", "siglip.json") == here

    (tmp_path / "moved" / "bert" / "model.safetensors").write_bytes(b"is not read")
    assert digest(tmp_path / "moved", "siglip.json") == here
    tokenizer = tmp_path / "moved" / "bert" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"##q"', '"##Q"'))
    assert digest(tmp_path / "moved", "siglip.json") != here
    config = tmp_path / "absolute" / "bert" / "config.json"
    config.write_text(json.dumps(BERT | {"layer_norm_eps": 1e-6}))
    assert digest(tmp_path / "absolute", "siglip.json") != here


def test_a_folder_may_hold_its_own_text_tower(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load a folder as a downloaded BiomedCLIP does: wherever it lies, whatever the current directory, known by its content."""
    model, _, _ = create(BackboneConfig(name=str(model_folder / "bert.json")))
    config = json.loads((model_folder / "bert.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_model_name": ".", "hf_tokenizer_name": "some/tokenizer"}
    digests = []
    for name in ("one", "two"):
        shutil.copytree(model_folder / "bert", tmp_path / name)
        write_model(tmp_path / name, config)
        save_file(model.state_dict(), tmp_path / name / "open_clip_model.safetensors")
        monkeypatch.chdir(tmp_path / name if name == "one" else tmp_path)
        digests.append(load_backbone(BackboneConfig(name="." if name == "one" else name)).digest)
    assert digests[0] == digests[1]
    tokenizer = tmp_path / "two" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"##q"', '"##Q"'))
    assert load_backbone(BackboneConfig(name="two")).digest != digests[0]


def test_building_a_model_leaves_cuda_and_the_random_state_alone(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with two GPUs, on which a CPU run must not start CUDA."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device=None: pytest.fail("CUDA was started"))
    config = {"data": {"path": "d"}, "method": {"name": "vip"}, "symptoms": "s.json"}
    before = torch.get_rng_state()
    backbone = load_backbone(BackboneConfig(name=str(model_folder / "vit.json")))
    build_method(resolve_config(config), Task(["a", "b"], [["round"], ["red"]]), backbone)
    assert torch.equal(torch.get_rng_state(), before)
