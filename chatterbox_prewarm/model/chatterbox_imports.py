"""Import Chatterbox without the modules that synthesis does not use.

Upstream's package imports far more than it runs. `chatterbox/__init__` imports every variant. transformers imports
scikit-learn (with pandas) and flex attention if they are installed. A few modules import torch's compiler and SymPy for
functions that inference never calls. This module changes no installed file:

- It enters the package without running its `__init__`.
- It tells transformers that two extras are missing, while it imports the modules that would import them.
- It keeps torch's compiler out: some modules are imported only when one of their functions is called, and hints that
  packages register with the compiler are dropped. If a process imports `torch._dynamo` first, in order to compile, this
  step is skipped.
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
from chatterbox_prewarm.system.fingerprint import upstream_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Advice where packages are missing.
FULL_PACKAGES = (
    "in an image, use one that was built with `--build-arg PACKAGES=full`; "
    "elsewhere, install the model extra: pip install 'chatterbox-prewarm[model]'"
)

#: Functions of transformers that decide about imports which decoding with Llama never uses.
_UNUSED_EXTRAS = ("is_torch_flex_attn_available", "is_sklearn_available")

#: Modules that take up to a second to import, and a function of each that other modules import by name.
_DEFERRED: dict[str, str | None] = {
    "torch._dynamo._trace_wrapped_higher_order_op": "TransformGetItemToIndex",  # builds masks with vmap
    "torch.utils.checkpoint": "checkpoint",  # for training
    "torch.distributed.tensor": None,  # for tools that inspect distributed models
    "scipy.stats": "scoreatpercentile",  # finds peaks in a signal
    "onnx": "load",  # converts S3's tokenizer from its first format
}


def require_upstream() -> None:
    """Check that upstream's model is installed.

    Raises:
        ModelError: it is not. An image has it only if it was built with `PACKAGES=full`.
    """
    if not upstream_installed():
        raise ModelError("the package chatterbox-tts is not installed, which this needs", next_step=FULL_PACKAGES)


def import_chatterbox() -> None:
    """Import the modules of torch, transformers, chatterbox and perth that loading and synthesis need.

    Modules that are already imported do not change. The garbage collector is off during the imports: they create a
    hundred thousand objects that stay alive, and collections would take a fifth of the import time.

    Raises:
        ModelError: a package is missing, or the watermarker cannot be loaded.
    """
    require_upstream()
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
                next_step=FULL_PACKAGES,
            ) from error
    if perth.PerthImplicitWatermarker is None:
        raise ModelError(
            "Perth's watermarker is missing (it needs pkg_resources), and speech without a watermark is not allowed",
            next_step="pip install 'setuptools<81'",
        )


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Turn the cyclic garbage collector off, then exclude all existing objects from its later runs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def free_import_frames() -> None:
    """Collect the cycles that the imports left, which `paused_gc` excluded from collection.

    Some of them contain a frame, which refers to the frames of all its callers. A model in a local variable of a caller
    would stay in memory forever. This takes 0.25 s, so a server, which needs its model to the end, does not call it.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _enter_package(name: str) -> None:
    """Add a package to `sys.modules` without running its `__init__`. Its submodules can then be imported as usual."""
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
    """Run the skipped `__init__` when a name of the package is used for the first time."""
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
    """Prevent imports of torch's compiler, unless the process has already imported it.

    During the block, imports of the modules in `_DEFERRED` return placeholders. A placeholder imports the real module
    when its function is called or another attribute is read. Later imports return the real module.
    `torch.compiler.disable` and `allow_in_graph`, which import the compiler to register a hint, do nothing during the
    block. einops registers its hints with `torch._dynamo` directly.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    compiler: Any = importlib.import_module("torch.compiler")
    originals = (compiler.disable, compiler.allow_in_graph)
    placeholders = {
        name: _placeholder(name, function) for name, function in _DEFERRED.items() if name not in sys.modules
    }
    placeholders["torch._dynamo"] = _placeholder("torch._dynamo", "allow_in_graph", _ignore_hint)
    sys.modules.update(placeholders)
    compiler.disable = compiler.allow_in_graph = _ignore_hint
    try:
        yield
    finally:
        compiler.disable, compiler.allow_in_graph = originals
        for name, module in placeholders.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            _set_as_attribute(name, module)


def _set_as_attribute(name: str, placeholder: types.ModuleType) -> None:
    """Make `package.name` work without an import of the module, as it does after the real import."""
    parent, _, leaf = name.rpartition(".")
    package = sys.modules.get(parent)
    # Packages with `__getattr__` import submodules on demand. A real import replaces the placeholder.
    if package is not None and not {leaf, "__getattr__"} & vars(package).keys():
        setattr(package, leaf, placeholder)


def _ignore_hint(function: Any = None, **_: Any) -> Any:
    """Return the function unchanged. Works as a decorator with and without arguments."""
    return _ignore_hint if function is None else function


def _placeholder(name: str, attribute: str | None, value: Any = None) -> types.ModuleType:
    """Create a module with one attribute: `value`, or a function that calls the real module's function."""
    module = types.ModuleType(name)

    def real() -> types.ModuleType:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return importlib.import_module(name)

    def call_real(*arguments: Any, **settings: Any) -> Any:
        return getattr(real(), str(attribute))(*arguments, **settings)

    def real_attribute(other: str) -> Any:
        if other.startswith("__"):  # inspect reads the file name of every module
            raise AttributeError(other)
        return getattr(real(), other)

    if attribute is not None:
        setattr(module, attribute, value or call_real)
    module.__getattr__ = real_attribute  # type: ignore[method-assign]
    return module


@contextlib.contextmanager
def _without_unused_extras() -> Iterator[None]:
    utils = importlib.import_module("transformers.utils")
    import_utils = importlib.import_module("transformers.utils.import_utils")
    originals = [(module, name, getattr(module, name)) for module in (utils, import_utils) for name in _UNUSED_EXTRAS]
    for module, name, _ in originals:
        setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, probe in originals:
            setattr(module, name, probe)
