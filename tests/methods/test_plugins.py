"""Methods outside of the clone: plugin files and entry points, their identity, and what is refused."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.conftest import CLASSES, write_images
from tests.methods.documented import write_plugin
from vipbench.harness.cli import app
from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError
from vipbench.harness.methods import registry
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.registry import load_plugins, method_class, method_names
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import load_config, resolve_config
from vipbench.harness.runs.transfer import evaluate_run
from vipbench.sweeps.plan import write_plan

METHOD = """
from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import TextClassifier, template_features
from vipbench.harness.methods.registry import register

@register("{name}")
class Mine(TextClassifier):
    Config = MethodConfig
    trains = False

    def class_features(self):
        return template_features(self.task, self.backbone)[:, 0]
"""


def forget_plugins() -> None:
    """Do as if this were another process."""
    registry._plugins.clear()
    for name in [name for name, cls in registry._methods.items() if cls in registry._code]:
        del registry._methods[name]


def command(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture
def config(base_config: dict[str, Any], tmp_path: Path) -> Path:
    """A config of the method that docs/methods.md shows."""
    train = {"epochs": 2, "batch_size": 6, "lr": 0.05}
    run = {**base_config["run"], "out": str(tmp_path / "runs")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**base_config, "method": "my_kgcoop", "train": train, "run": run}))
    return path


def test_a_new_method_takes_few_lines_and_trains_where_it_is_named(config: Path, tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path)
    assert len(plugin.read_text().splitlines()) <= 36
    with pytest.raises(UserError, match="no method 'my_kgcoop'"):
        load_config(config)
    shown = yaml.safe_load(command("config", config, "--plugin", plugin))
    assert shown["run"]["plugins"] == [str(plugin)]
    command("run", config, "--plugin", plugin)
    (path,) = (tmp_path / "runs").glob("my_kgcoop_*")
    run = Run.load(path)
    digests = {"digests": run.provenance["digests"]["method"], "plugins": run.provenance["plugins"][str(plugin)]}
    assert len(set(digests.values())) == 1 and len(digests["digests"]) == 64
    assert run.curve()["loss"].notna().all()

    write_images(tmp_path / "images", seed=3)
    command("prepare", tmp_path / "images", "--format", "folder", "--out", tmp_path / "other")
    forget_plugins()
    command("evaluate", path, "--data", tmp_path / "other", "--device", "cpu")
    (evaluation,) = (path / "evaluations").iterdir()
    assert json.loads((evaluation / "metrics.json").read_text())["samples"] == 21
    assert json.loads((evaluation / "provenance.json").read_text())["digests"]["method"] == digests["digests"]


def test_other_code_is_another_run_and_does_not_evaluate_the_first(config: Path, tmp_path: Path, dataset: Path) -> None:
    plugin = write_plugin(tmp_path)
    command("run", config, "--plugin", plugin)
    (first,) = (tmp_path / "runs").glob("my_kgcoop_*")
    moved = tmp_path / "moved"
    moved.mkdir()
    kept = Path(shutil.copy(plugin, moved))
    plugin.write_text(plugin.read_text().replace("weight: NonNegativeFloat = 8.0", "weight: NonNegativeFloat = 8.00"))
    command("run", config, "--plugin", plugin)
    assert len(list((tmp_path / "runs").glob("my_kgcoop_*"))) == 2
    table = CliRunner().invoke(app, ["table", str(tmp_path / "runs"), "--rows", "method", "--columns", "shots"])
    assert "would mix runs before and after method.name=my_kgcoop changed in content" in str(table.exception)
    with pytest.raises(UserError, match="code of method 'my_kgcoop' is not what it was when the run was made"):
        evaluate_run(first, dataset, "test", None, "cpu")
    plugin.unlink()
    with pytest.raises(UserError, match=r"plugin .*my_kgcoop\.py: no such Python file"):
        evaluate_run(first, dataset, "test", None, "cpu")
    forget_plugins()
    same = evaluate_run(first, dataset, "test", None, "cpu", plugins=[kept])
    assert json.loads((same / "metrics.json").read_text()) == Run.load(first).metrics
    assert Run.load(first, [kept]).method().task.classes == CLASSES


def test_a_sweep_holds_its_plugins_and_packs(config: Path, tmp_path: Path) -> None:
    plugin, grid = write_plugin(tmp_path), tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump({"base": str(config), "axes": {"seed": [1, 2]}}))
    names = write_plan(grid, tmp_path / "out", plugins=[plugin])
    forget_plugins()
    configs = [load_config(tmp_path / "out" / "configs" / f"{name}.yaml") for name in names]
    assert [found.run.plugins for found in configs] == [(plugin,)] * 2
    assert execute_together(configs) == {}
    assert sorted(path.name for path in (tmp_path / "out" / "runs").glob("my_kgcoop_*")) == sorted(names)


def test_built_in_methods_keep_their_identity_whatever_else_is_loaded(
    base_config: dict[str, Any], tmp_path: Path
) -> None:
    from vipbench.harness.config.identity import Digests, run_name

    assert registry.method_digest("coop") is None
    resolved = resolve_config(override(base_config, ["method=coop"]), [write_plugin(tmp_path)])
    before = resolve_config(override(base_config, ["method=coop"]))
    assert run_name(resolved, Digests("d", "b", None)) == run_name(before, Digests("d", "b", None))
    assert Digests("d", "b", None).to_mapping() == {"dataset": "d", "backbone": "b", "symptoms": None}


BAD = {
    "nothing.py": ("x = 1\n", "registers no method"),
    "syntax.py": ("x = 1\nx = = 2\n", r"syntax\.py, line 2: SyntaxError"),
    "raises.py": ("\n\n1 / 0\n", r"raises\.py, line 3: ZeroDivisionError: division by zero"),
    "exits.py": ("raise SystemExit('no')\n", r"line 1: SystemExit: no"),
    "absent.py": ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "taken.py": (
        METHOD.format(name="coop"),
        "method 'coop' is registered already, by vipbench.baselines.coop; rename one",
    ),
    "halfway.py": (METHOD.format(name="mine") + "\n1 / 0\n", "ZeroDivisionError"),
    "config.py": (METHOD.format(name="mine").replace("= MethodConfig", "= dict"), "whose Config is a subclass"),
    "no_class.py": (METHOD.format(name="mine").replace("(TextClassifier)", ""), "give a subclass of Method"),
    "names.py": (METHOD.format(name="../mine"), "a name has letters, digits, _ and - only"),
    "nowhere.py": (METHOD.format(name="mine").replace("@register", "del __file__\n@register"), "must be a file"),
    "text.txt": (METHOD.format(name="mine"), "no such Python file"),
    "missing.py": (None, "no such Python file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_plugin_that_does_not_work_ends_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    before = method_names()
    with pytest.raises(UserError, match=message) as caught:
        load_plugins([tmp_path / name])
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert method_names() == before, "what it registered before it failed is gone"


def test_a_changed_plugin_is_loaded_again(tmp_path: Path) -> None:
    """Change a plugin as in a notebook; its size and time may be those of the first one."""
    path = tmp_path / "plugin.py"
    path.write_text(METHOD.format(name="mine"))
    load_plugins([path])
    first = method_class("mine")
    load_plugins([path])
    assert method_class("mine") is first
    path.write_text(METHOD.format(name="ours"))
    load_plugins([path])
    assert method_class("ours") is not first and "mine" not in method_names()
    assert not (tmp_path / "__pycache__").exists()


def install(folder: Path, package: str, content: str, entry: str) -> None:
    """A package as pip would leave it."""
    (folder / f"{package}.py").write_text(content)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vipbench.methods]\n{entry}\n")


def test_an_installed_package_offers_methods(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "offers_one", METHOD.format(name="offered"), "offered = offers_one")
    assert "offered" in method_names() and "offered" not in registry._methods, "it is not imported before it is chosen"
    settings = ["method=offered", f"run.out={tmp_path / 'runs'}"]
    path = tmp_path / "offered.yaml"
    path.write_text(yaml.safe_dump(override(base_config, settings)))
    command("run", path)
    (run,) = (tmp_path / "runs").glob("offered_*")
    assert Run.load(run).provenance["digests"]["method"] == registry.method_digest("offered")
    assert Run.load(run).method().backbone.dim == 64


@pytest.mark.parametrize(
    ("content", "entry", "name", "message"),
    [
        ("1 / 0\n", "broken = PACKAGE", "broken", "the package PACKAGE offers it .*ZeroDivisionError"),
        ("x = 1\n", "broken = PACKAGE", "broken", "does not register a method of this name"),
        (
            METHOD.format(name="unused"),
            "coop = PACKAGE",
            "coop",
            "method 'coop' is registered by vipbench.baselines.coop and offered",
        ),
    ],
)
def test_a_package_that_does_not_work_is_named_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, entry: str, name: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = f"package_{abs(hash((content, entry)))}"
    install(tmp_path, package, content, entry.replace("PACKAGE", package))
    assert issubclass(method_class("vip"), Method), "other methods work all the same"
    with pytest.raises(UserError, match=message.replace("PACKAGE", package)):
        method_class(name)


def test_the_folders_have_one_import_name() -> None:
    """Two copies of the registry would not see each other's methods."""
    with pytest.raises(ImportError, match=r"import vipbench\.harness"):
        importlib.import_module("harness")
