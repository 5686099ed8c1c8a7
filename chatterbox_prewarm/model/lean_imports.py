"""Importing Chatterbox for the price of what synthesis uses.

Upstream's package pulls in far more than it runs: `chatterbox/__init__` imports every variant, transformers imports
scikit-learn (with pandas) and flex attention because they are installed, and a few modules bring torch's compiler and
SymPy along for functions that inference never calls. Nothing installed is touched: the package is entered without
running its `__init__`, transformers is told that two extras are absent while the modules that would import them are
loaded, and torch's compiler is kept out: some modules are deferred to the first call of one of those functions, and
what packages note for the compiler about themselves is dropped. A process that compiles imports `torch._dynamo` first,
and then nothing of this is done.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Probes of transformers that decide about imports which a Llama decode never uses.
_UNUSED_EXTRAS = ("is_torch_flex_attn_available", "is_sklearn_available")

#: Modules that cost up to a second to import, and a function of each that others import by name.
_DEFERRED: dict[str, str | None] = {
    "torch._dynamo._trace_wrapped_higher_order_op": "TransformGetItemToIndex",  # for masks that are built by vmap
    "torch.utils.checkpoint": "checkpoint",  # for training
    "torch.distributed.tensor": None,  # for tools that look into distributed models
    "scipy.stats": "scoreatpercentile",  # for finding peaks in a signal
    "onnx": "load",  # for the conversion of S3's tokenizer from its first format
}


def import_chatterbox() -> None:
    """Import what loading and synthesis need of torch, transformers, chatterbox and perth.

    What was imported before stays as it is. The garbage collector rests meanwhile: a hundred thousand new
    objects that all stay alive make it run in vain, a fifth of the import time.

    Raises:
        ModelError: a package is missing, or the watermarker cannot be loaded.
    """
    with paused_gc(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated", category=UserWarning)
        try:
            importlib.import_module("torch")
            _enter_package("chatterbox")
            with _without_compiler():
                with _without_unused_extras():
                    importlib.import_module("transformers.models.llama.modeling_llama")
                perth = importlib.import_module("perth")
                importlib.import_module("chatterbox.tts")
        except ImportError as error:
            raise ModelError(
                f"the model's packages cannot be imported: {error}",
                next_step="install the model extra: pip install 'chatterbox-prewarm[model]'",
            ) from error
    if perth.PerthImplicitWatermarker is None:
        raise ModelError(
            "Perth's watermarker is missing (it needs pkg_resources), and speech without a watermark is not made here",
            next_step="pip install 'setuptools<81'",
        )


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cyclic garbage collector off, then leave what was made out of its later runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _enter_package(name: str) -> None:
    """Put a package into `sys.modules` without running its `__init__`, so that submodules import as usual."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"No module named {name!r}")
    package = types.ModuleType(name)
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations)
    package.__file__ = spec.origin
    package.__getattr__ = lambda attribute: _late_attribute(package, attribute)  # type: ignore[method-assign]
    sys.modules[name] = package


def _late_attribute(package: types.ModuleType, attribute: str) -> object:
    """Run the skipped `__init__` when somebody asks the package for one of its own names after all."""
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    del package.__getattr__
    spec = package.__spec__
    if spec is None or spec.loader is None:
        raise AttributeError(attribute)
    spec.loader.exec_module(package)
    return getattr(package, attribute)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep torch's compiler from being imported, unless it is there already.

    Imports of the modules in `_DEFERRED` meet stand-ins, which import the real module when their one function is called
    or anything else is asked of them; whoever imports them afterwards gets the real ones. `torch.compiler.disable` and
    `allow_in_graph`, which import the compiler to leave a note for it, do nothing; einops leaves its notes at
    `torch._dynamo` itself.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    compiler: Any = importlib.import_module("torch.compiler")
    notes = (compiler.disable, compiler.allow_in_graph)
    stand_ins = {name: _stand_in(name, function) for name, function in _DEFERRED.items() if name not in sys.modules}
    stand_ins["torch._dynamo"] = _stand_in("torch._dynamo", "allow_in_graph", _leave_no_note)
    sys.modules.update(stand_ins)
    compiler.disable = compiler.allow_in_graph = _leave_no_note
    try:
        yield
    finally:
        compiler.disable, compiler.allow_in_graph = notes
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            _keep_as_attribute(name, module)


def _keep_as_attribute(name: str, stand_in: types.ModuleType) -> None:
    """Let `package.name` work without an import of it, as it does where the real module was imported."""
    parent, _, leaf = name.rpartition(".")
    package = sys.modules.get(parent)
    # A package that imports its parts on demand needs nothing. The real module's import replaces the stand-in.
    if package is not None and not {leaf, "__getattr__"} & vars(package).keys():
        setattr(package, leaf, stand_in)


def _leave_no_note(function: Any = None, **_: Any) -> Any:
    """A decorator, with or without arguments, that decorates nothing."""
    return _leave_no_note if function is None else function


def _stand_in(name: str, attribute: str | None, value: Any = None) -> types.ModuleType:
    """A module with one attribute, if any: `value`, or a function that calls the real module's."""
    module = types.ModuleType(name)

    def real() -> types.ModuleType:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return importlib.import_module(name)

    def call_real(*arguments: Any, **settings: Any) -> Any:
        return getattr(real(), str(attribute))(*arguments, **settings)

    def real_attribute(other: str) -> Any:
        if other.startswith("__"):  # inspect asks every module for its file
            raise AttributeError(other)
        return getattr(real(), other)

    if attribute is not None:
        setattr(module, attribute, value or call_real)
    module.__getattr__ = real_attribute  # type: ignore[method-assign]
    return module


@contextlib.contextmanager
def _without_unused_extras() -> Iterator[None]:
    utils = importlib.import_module("transformers.utils")
    probes = importlib.import_module("transformers.utils.import_utils")
    saved = [(module, name, getattr(module, name)) for module in (utils, probes) for name in _UNUSED_EXTRAS]
    for module, name, _ in saved:
        setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, probe in saved:
            setattr(module, name, probe)
