"""Upstream's class of a variant, constructed without random initialization, with mapped weights.

A synthesis does not need it (`model.model`); voices from clips and users of upstream's class do. Filling 800
million parameters with random numbers takes 13 s of an upstream start. Non-persistent buffers and plain tensor
attributes (position tables, windows, fades) are still computed; a meta device would lose them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox, paused_gc
from chatterbox_prewarm.model.model import check_device
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.weights.record import Synthetic, read_record
from chatterbox_prewarm.weights.tensor_shapes import COMPUTED, check_tensors
from chatterbox_prewarm.weights.variants import VARIANTS, get_variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from chatterbox.models.t3 import T3
    from chatterbox.tts import ChatterboxTTS
    from torch import nn

    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.weights.variants import Variant

_SHORTENED = "{name}_with_{layers}_layers"
#: The number of layers in a configuration of a Llama, and of a GPT-2.
_LAYERS = ("num_hidden_layers", "n_layer")
#: Names of functions, because transformers replaces the functions of torch.nn.init while it constructs a model. The set
#: also contains the initializers that call the fills: a mode is off while one of its functions runs.
_RANDOM_FILLS = frozenset(
    {
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "orthogonal_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
    }
)


def load_upstream(directory: Path, *, device: str = "cpu", lean: Model | None = None) -> ChatterboxTTS:
    """Build upstream's class of the variant in a weights directory.

    All tensors equal those of its `from_local`. If `lean` runs T3 in another data type, T3's layers have it
    here, too, and upstream's own `T3.inference` cannot run.

    On a CPU the parameters are mapped pages of the files. On a GPU each file is loaded directly to the device. The
    voice (`conds`) is not set: it comes from the warm state, or from the caller.

    Args:
        directory: contains the variant's files and `weights.json`.
        device: a torch device as a string, such as "cpu" or "cuda".
        lean: a model of the same weights on this device. Its tensors are used, so that memory holds them once.

    Raises:
        WeightsError: a file is missing or truncated, or the names or shapes of its tensors are wrong.
        ModelError: the model's packages cannot be imported, or the installed version needs other tensors.
    """
    record = read_record(directory)
    variant = get_variant(record.variant)
    check_tensors(directory, variant, record.synthetic)
    check_device(device)
    code = code_of(variant)
    code.read_text(directory, variant)  # for its errors: upstream's are an assertion, or none
    import_chatterbox()
    loaded = lean.tensors if lean is not None else {}
    with paused_gc():
        t3, s3gen, ve = construct(variant, record.synthetic)
        for part, module in (("ve", ve), ("t3", t3), ("s3gen", s3gen)):
            below = {name.removeprefix(f"{part}."): loaded[name] for name in loaded if name.startswith(f"{part}.")}
            _assign(module, directory / variant.tensor_files[part], device, below)
        for module in (ve, t3, s3gen):
            module.to(device).eval()
        model: ChatterboxTTS = code.upstream_class()(t3, s3gen, ve, code.upstream_tokenizer(directory, variant), device)
        return model


def upstream_text_tokens(model: ChatterboxTTS, text: str, language: str | None = None) -> torch.Tensor:
    """Return the text tokens that upstream's T3 expects, (2, n): with and without guidance, with start and stop."""
    import torch

    variant = variant_of(model)
    ids = code_of(variant).upstream_text_ids(model, text, variant.check_language(language))
    hp = model.t3.hp
    return torch.tensor([[hp.start_text_token, *ids, hp.stop_text_token]], device=model.device).repeat(2, 1)


def variant_of(model: ChatterboxTTS) -> Variant:
    """Return the variant of a model that upstream or `load_upstream` loaded.

    Raises:
        BadInputError: this project does not know the class of the model.
    """
    lean: Model | None = getattr(model, "lean", None)  # None in a process that only makes voices
    if lean is not None:
        return lean.variant
    for variant in VARIANTS.values():
        if code_of(variant).is_upstream(model, variant):
            return variant
    raise BadInputError(
        f"{type(model).__name__} is not a model of a variant that this project knows",
        next_step=f"use one of: {', '.join(VARIANTS)}",
    )


def construct(variant: Variant, synthetic: Synthetic | None) -> tuple[T3, nn.Module, nn.Module]:
    """Construct T3, S3Gen and the voice encoder with uninitialized parameters.

    Args:
        variant: what to construct.
        synthetic: the number of layers in each stack of a shortened checkpoint, or None.
    """
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.voice_encoder import VoiceEncoder

    with SkipRandomFills():
        t3 = make_t3(variant, synthetic.t3_layers if synthetic else None)
        if hasattr(t3.tfmr, "wte"):
            del t3.tfmr.wte  # as upstream does after loading a GPT-2, which never uses it
        s3gen = S3Gen(**code_of(variant).s3gen_arguments())
        ve = VoiceEncoder()
    if synthetic and synthetic.s3gen_blocks is not None:
        shorten_s3gen(s3gen, synthetic.s3gen_blocks)
    return t3, s3gen, ve


class SkipRandomFills(TorchFunctionMode):
    """While active, in-place random fills return their tensor unchanged. Memory that is never written costs nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Skip random fills, and call every other function."""
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def make_t3(variant: Variant, layers: int | None) -> T3:
    """Construct the T3 of a variant. `layers` shortens its transformer; None keeps the published number of layers."""
    from chatterbox.models.t3 import T3
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS

    config = code_of(variant).t3_config(variant)
    heads = code_of(variant).aligned_heads(variant, layers) if layers is not None else ()
    if heads:
        analyzer: Any = importlib.import_module("chatterbox.models.t3.inference.alignment_stream_analyzer")
        analyzer.LLAMA_ALIGNED_HEADS = list(heads)
    if layers is not None:
        # Upstream looks up the transformer's configuration by name, so add an entry for the shorter one.
        name = _SHORTENED.format(name=config.llama_config_name, layers=layers)
        complete = LLAMA_CONFIGS[config.llama_config_name]
        LLAMA_CONFIGS[name] = {**complete, next(key for key in _LAYERS if key in complete): layers}
        config.llama_config_name = name
    return T3(config)


def shorten_s3gen(s3gen: nn.Module, blocks: int) -> None:
    """Shorten S3Gen's four deep stacks to `blocks` layers each. The remaining layers keep their published shapes."""
    encoder, estimator = s3gen.flow.encoder, s3gen.flow.decoder.estimator  # type: ignore[union-attr]
    encoder.encoders = encoder.encoders[:blocks]  # type: ignore[union-attr,index]
    encoder.up_encoders = encoder.up_encoders[:blocks]  # type: ignore[union-attr,index]
    estimator.mid_blocks = estimator.mid_blocks[:blocks]  # type: ignore[union-attr,index]
    tokenizer = s3gen.tokenizer.encoder  # type: ignore[union-attr]
    tokenizer.blocks = tokenizer.blocks[:blocks]  # type: ignore[union-attr,index]


def _assign(module: nn.Module, path: Path, device: str, loaded: Mapping[str, torch.Tensor]) -> None:
    """Use a file's tensors as the module's parameters and buffers; take those in `loaded` from there."""
    expected, tensors = module.state_dict(), {}
    with safe_open(path, framework="pt", device=device) as file:  # type: ignore[no-untyped-call]
        for name in expected.keys() & set(file.keys()):
            tensor = loaded.get(name)
            if tensor is None:
                # The cast only affects half-precision files. Upstream also copies them into float32 parameters.
                tensor = file.get_tensor(name).to(expected[name].dtype)
            tensors[name] = tensor
    if missing := expected.keys() - tensors.keys() - COMPUTED:
        raise ModelError(
            f"the installed chatterbox-tts needs the tensor {min(missing)!r}, which {path} lacks",
            next_step="install the version of chatterbox-tts that the locks name",
        )
    module.load_state_dict(tensors, strict=False, assign=True)
