"""clipcluster from Python: `submit` a recipe, `load` a trained model, read a recipe's shards by `webdataset`.

Importing it loads neither torch nor webdataset; docs/python.md has examples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcluster.build.loaded import load as load
    from clipcluster.data.loading.stream import webdataset as webdataset

_PLACES = {
    "load": "clipcluster.build.loaded",
    "webdataset": "clipcluster.data.loading.stream",
    # of the floor above, by name alone: training needs no cluster
    "submit": "jobs.api",
    "submission": "jobs.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
