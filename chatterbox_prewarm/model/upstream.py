"""Upstream's `ChatterboxTTS`, constructed without random initialization, with mapped weights.

A synthesis does not need it (`variants.english`); voices from clips and users of upstream's class do. Filling 800
million parameters with random numbers takes 13 s of an upstream start. Non-persistent buffers and plain tensor
attributes (position tables, windows, fades) are still computed; a meta device would lose them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox, paused_gc
from chatterbox_prewarm.model.variants.english import check_device, read_tokenizer
from chatterbox_prewarm.weights.record import Synthetic, read_record
from chatterbox_prewarm.weights.tensor_shapes import COMPUTED, check_tensors
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from chatterbox.models.t3 import T3
    from chatterbox.tts import ChatterboxTTS
    from torch import nn

    from chatterbox_prewarm.model.variants.english import English

_SHORT_LLAMA = "chatterbox_prewarm_{layers}_layers"
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


def load_upstream(directory: Path, *, device: str = "cpu", lean: English | None = None) -> ChatterboxTTS:
    """Build `ChatterboxTTS` from a weights directory.

    All tensors equal those of `ChatterboxTTS.from_local`. If `lean` runs T3 in bfloat16, T3's layers are in bfloat16
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
    check_tensors(directory, ENGLISH, record.synthetic)
    check_device(device)
    read_tokenizer(directory / "tokenizer.json")  # for its errors: upstream's are an assertion, or none
    import_chatterbox()

    from chatterbox.models.tokenizers import EnTokenizer
    from chatterbox.tts import ChatterboxTTS

    loaded = lean.tensors if lean is not None else {}
    with paused_gc():
        t3, s3gen, ve = construct(record.synthetic)
        for stem, module in (("ve", ve), ("t3_cfg", t3), ("s3gen", s3gen)):
            _assign(module, directory / f"{stem}.safetensors", device, loaded)
        for module in (ve, t3, s3gen):
            module.to(device).eval()
        return ChatterboxTTS(t3, s3gen, ve, EnTokenizer(str(directory / "tokenizer.json")), device)


def upstream_text_tokens(model: ChatterboxTTS, text: str) -> torch.Tensor:
    """Return the text tokens that upstream's T3 expects, (2, n): with and without guidance, with start and stop."""
    from chatterbox.tts import punc_norm

    tokens = model.tokenizer.text_to_tokens(punc_norm(text)).to(model.device)
    tokens = functional.pad(tokens, (1, 0), value=model.t3.hp.start_text_token)
    return functional.pad(tokens, (0, 1), value=model.t3.hp.stop_text_token).repeat(2, 1)


def construct(synthetic: Synthetic | None) -> tuple[T3, nn.Module, nn.Module]:
    """Construct T3, S3Gen and the voice encoder with uninitialized parameters.

    Args:
        synthetic: the number of layers in each stack of a shortened checkpoint, or None.
    """
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.voice_encoder import VoiceEncoder

    with SkipRandomFills():
        t3 = make_t3(synthetic.t3_layers if synthetic else None)
        s3gen = S3Gen()
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


def make_t3(layers: int | None, *, multilingual: bool = False) -> T3:
    """Construct T3. `layers` shortens its transformer; None keeps the published number of layers."""
    from chatterbox.models.t3 import T3
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
    from chatterbox.models.t3.modules.t3_config import T3Config

    config = T3Config.multilingual() if multilingual else T3Config.english_only()
    if layers is not None:
        # Upstream looks up the transformer's configuration by name, so add an entry for the shorter one.
        name = _SHORT_LLAMA.format(layers=layers)
        LLAMA_CONFIGS[name] = {**LLAMA_CONFIGS[config.llama_config_name], "num_hidden_layers": layers}
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
            tensor = loaded.get(f"{path.stem}.{name}")
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
