"""vipbench: a benchmark harness for adapting CLIP-like models to medical images with prompts.

The names here are for notebooks and plugins; they are imported when they are used, since they bring torch. In a clone the
folders beside this file are links to those at the top.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vipbench.harness.config.schema import MethodConfig as MethodConfig
    from vipbench.harness.methods.base import Method as Method
    from vipbench.harness.methods.base import Output as Output
    from vipbench.harness.methods.base import Task as Task
    from vipbench.harness.methods.base import TextClassifier as TextClassifier
    from vipbench.harness.methods.registry import register as register
    from vipbench.harness.runs.api import Run as Run
else:
    MODULES = {
        "Method": "methods.base",
        "MethodConfig": "config.schema",
        "Output": "methods.base",
        "Run": "runs.api",
        "Task": "methods.base",
        "TextClassifier": "methods.base",
        "register": "methods.registry",
    }

    def __getattr__(name: str) -> Any:
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"vipbench.harness.{MODULES[name]}"), name)
