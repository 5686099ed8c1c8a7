"""The table of the Chatterbox variants. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.limits import SAMPLING

if TYPE_CHECKING:
    from collections.abc import Mapping

_LLAMA_SHAPES: Mapping[str, tuple[str, ...]] = MappingProxyType({"t3": ("t3",), "s3gen": ("s3gen",), "ve": ("ve",)})
_GPT_SHAPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"t3": ("t3_gpt",), "s3gen": ("s3gen", "s3gen_mean"), "ve": ("ve",)}
)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A ZIP archive that a variant needs and the model hub does not have.

    Attributes:
        path: of the archive in the checkpoint. Its members are unpacked into a folder of the same name.
        url: where it is published.
        sha256: its digest.
        members: the files in it.
    """

    path: str
    url: str
    sha256: str
    members: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the archive and of its unpacked members in the checkpoint."""
        return (self.path, *(f"{self.path.removesuffix('.zip')}/{member}" for member in self.members))


@dataclass(frozen=True, kw_only=True)
class Control:
    """A setting of the sampling that a variant has.

    Attributes:
        default: upstream's default; None if it is part of the voice or depends on the installed upstream.
        low, high: the bounds.
    """

    default: float | None
    low: float
    high: float


def _controls(**defaults: float | None) -> Mapping[str, Control]:
    """Return controls by their names, with the bounds that all variants share."""
    return MappingProxyType(
        {
            name: Control(default=default, low=SAMPLING[name][0], high=SAMPLING[name][1])
            for name, default in defaults.items()
        }
    )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A Chatterbox variant: its checkpoint, and what its users can choose.

    Attributes:
        name: the name of the variant on the command line, in states and in labels.
        module: the module of `model.variants` with its code.
        repository: the repository of the checkpoint on the model hub.
        revision: the default commit of `weights fetch`. Upstream does not pin one.
        tokenizer: the file of the text tokenizer.
        voice_encoder, t3, s3gen: the files with the tensors, all of them safetensors.
        builtin_voice: the file with upstream's voice. It is a pickle, so it is only read with `weights_only`.
        data: other files of the repository that the text needs.
        archives: archives from elsewhere that the text needs.
        tags: the file of `data` with the tags that ask for a sound, such as "[laugh]"; "" without such tags.
        published: the names under which the hub publishes files that have another name here. Such a file is a pickle of
            tensors, which `weights fetch` converts to safetensors.
        t3_sha256: the digest of the published T3, to recognize it under the name of a variant with equal shapes; "" if
            no other variant has its shapes.
        text_vocabulary: the number of text tokens that T3 has embeddings for.
        shapes: the parts of `tensors.json` that describe the tensors of T3, S3Gen and the voice encoder.
        t3_layers, t3_width: the size of T3's transformer.
        controls: the settings of the sampling, by their names.
        ignored_controls: settings of other variants that upstream's `generate` accepts here without an effect.
        clip_seconds: a reference clip must be longer than this.
        prompt_tokens: the most speech tokens of a voice that T3 uses.
        languages: the names of the languages that a request can choose, by their code.
        samples: a short text in each language, which a bake turns into tokens.
    """

    name: str
    module: str
    repository: str
    revision: str
    tokenizer: str
    voice_encoder: str
    t3: str
    s3gen: str
    builtin_voice: str
    data: tuple[str, ...] = ()
    archives: tuple[Archive, ...] = ()
    tags: str = ""
    published: Mapping[str, str] = field(default_factory=dict)
    t3_sha256: str = ""
    text_vocabulary: int
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _LLAMA_SHAPES)
    t3_layers: int = 30
    t3_width: int = 1024
    controls: Mapping[str, Control]
    ignored_controls: tuple[str, ...] = ()
    clip_seconds: float = 0.0
    prompt_tokens: int = 150
    languages: Mapping[str, str]
    samples: Mapping[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the checkpoint."""
        unpacked = (path for archive in self.archives for path in archive.files)
        return (self.tokenizer, *self.safetensors, self.builtin_voice, *self.data, *unpacked)

    @property
    def safetensors(self) -> tuple[str, ...]:
        """The files that hold tensors and must not be pickles."""
        return (self.voice_encoder, self.t3, self.s3gen)

    def check_control(self, name: str) -> str:
        """Return the name of a control of this variant, or of one that upstream ignores here.

        Raises:
            BadInputError: the variant does not have it.
        """
        if name not in self.controls and name not in self.ignored_controls:
            raise BadInputError(
                f"the model {self.name} has no setting {name!r}",
                next_step=f"leave it out; the model has: {', '.join(self.controls)}",
            )
        return name

    def check_language(self, code: str | None) -> str:
        """Return the code of a language as `languages` spells it; the first language without a code.

        Raises:
            BadInputError: the variant does not speak this language.
        """
        if code is None:
            return next(iter(self.languages))
        spelled = code.lower() if isinstance(code, str) else ""
        if spelled not in self.languages:
            raise BadInputError(
                f"the language is {reprlib.repr(code)}; the model {self.name} does not speak it",
                next_step=f"choose one of: {', '.join(self.languages)}",
            )
        return spelled

    @property
    def tensor_files(self) -> dict[str, str]:
        """The files with tensors by the part of the model: "t3", "s3gen" and "ve"."""
        return {"t3": self.t3, "s3gen": self.s3gen, "ve": self.voice_encoder}


#: The commit has the files of all variants.
_CHATTERBOX = "ResembleAI/chatterbox"
_COMMIT = "5bb1f6ee58e50c3b8d408bc82a6d3740c2db6e18"

ENGLISH = Variant(
    name="english",
    module="english",
    repository=_CHATTERBOX,
    revision=_COMMIT,
    tokenizer="tokenizer.json",
    voice_encoder="ve.safetensors",
    t3="t3_cfg.safetensors",
    s3gen="s3gen.safetensors",
    builtin_voice="conds.pt",
    text_vocabulary=704,
    controls=_controls(
        temperature=0.8, cfg_weight=0.5, exaggeration=None, repetition_penalty=1.2, min_p=0.05, top_p=1.0
    ),
    languages=MappingProxyType({"en": "English"}),
    samples=MappingProxyType({"en": "Hello, world."}),
)

#: The model that splits Chinese text into words. Upstream's package downloads it at its first use.
_PKUSEG = Archive(
    path="pkuseg/spacy_ontonotes.zip",
    url="https://github.com/explosion/spacy-pkuseg/releases/download/v0.0.26/spacy_ontonotes.zip",
    sha256="b216e7f92de7ae285aeab8feba2faa8ea8216e5995ff6fb3d391cc8356db1bfe",
    members=("features.msgpack", "weights.npz"),
)

MULTILINGUAL = Variant(
    name="multilingual",
    module="multilingual",
    repository=_CHATTERBOX,
    revision=_COMMIT,
    tokenizer="grapheme_mtl_merged_expanded_v1.json",
    voice_encoder="ve.safetensors",
    t3="t3_mtl23ls_v2.safetensors",
    t3_sha256="b1237586127ce98e7800a68e49938eb5092846862aabcb6e17b2fda7889a6c75",
    s3gen="s3gen.safetensors",
    builtin_voice="conds.pt",
    data=("Cangjie5_TC.json",),
    archives=(_PKUSEG,),
    published=MappingProxyType({"ve.safetensors": "ve.pt", "s3gen.safetensors": "s3gen.pt"}),
    text_vocabulary=2454,
    controls=_controls(
        temperature=0.8, cfg_weight=0.5, exaggeration=None, repetition_penalty=None, min_p=0.05, top_p=1.0
    ),
    languages=MappingProxyType(
        {
            "en": "English",
            "ar": "Arabic",
            "da": "Danish",
            "de": "German",
            "el": "Greek",
            "es": "Spanish",
            "fi": "Finnish",
            "fr": "French",
            "he": "Hebrew",
            "hi": "Hindi",
            "it": "Italian",
            "ja": "Japanese",
            "ko": "Korean",
            "ms": "Malay",
            "nl": "Dutch",
            "no": "Norwegian",
            "pl": "Polish",
            "pt": "Portuguese",
            "ru": "Russian",
            "sv": "Swedish",
            "sw": "Swahili",
            "tr": "Turkish",
            "zh": "Chinese",
        }
    ),
    # Hebrew has points and Russian has stress marks, without which their texts are refused.
    samples=MappingProxyType(
        {
            "en": "Hello, world.",
            "ar": "مرحبا، كيف حالك؟",
            "da": "Hvordan går det på øen?",
            "de": "Größe ist nicht alles…",
            "el": "Καλημέρα κόσμε",
            "es": "¿Qué tal, señor?",
            "fi": "Hyvää päivää",
            "fr": "Ça va très bien, merci : et vous ?",
            "he": "שָׁלוֹם עוֹלָם",
            "hi": "नमस्ते, आप कैसे हैं?",
            "it": "Perché no?",
            "ja": "今日はとても天気がいいですね。ヘリコプターへ",
            "ko": "안녕하세요, 반갑습니다.",
            "ms": "Selamat pagi",
            "nl": "Hoe gaat het?",
            "no": "Hvordan går det?",
            "pl": "Zażółć gęślą jaźń",
            "pt": "Não há problema",
            "ru": "Приве́т, как дела́?",
            "sv": "Hur mår du?",
            "sw": "Habari ya asubuhi",
            "tr": "İstanbul'da ılık bir gün",  # noqa: RUF001
            "zh": "你好,世界。今天天很好。曰日",
        }
    ),
)

MULTILINGUAL_V3 = dataclasses.replace(
    MULTILINGUAL,
    name="multilingual-v3",
    t3="t3_mtl23ls_v3.safetensors",
    t3_sha256="5abca8321ede76f8e61f1cc0d19aea6c946b28871017ce8726f8a69203f05953",
)

#: A GPT-2 that was distilled from the English model, with tags for sounds such as a laugh. Several public projects pin
#: the same commit; upstream does not pin one.
TURBO = Variant(
    name="turbo",
    module="turbo",
    repository="ResembleAI/chatterbox-turbo",
    revision="749d1c1a46eb10492095d68fbcf55691ccf137cd",
    tokenizer="vocab.json",
    voice_encoder="ve.safetensors",
    t3="t3_turbo_v1.safetensors",
    s3gen="s3gen_meanflow.safetensors",
    builtin_voice="conds.pt",
    data=("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    tags="added_tokens.json",
    text_vocabulary=50276,
    shapes=_GPT_SHAPES,
    t3_layers=24,
    controls=_controls(temperature=0.8, top_k=1000, top_p=0.95, repetition_penalty=1.2),
    ignored_controls=("cfg_weight", "exaggeration", "min_p"),
    clip_seconds=5.0,
    prompt_tokens=375,
    languages=ENGLISH.languages,
    samples=MappingProxyType({"en": "Hello, world. [laugh]"}),
)

#: A smaller Turbo. Only upstream's main branch loads it.
NANO = dataclasses.replace(
    TURBO,
    name="nano",
    repository="ResembleAI/chatterbox-nano",
    revision="71ccd1d0081b430592cea481f4307e764e07bc64",
    t3="t3_nano_v1.safetensors",
    t3_layers=12,
    t3_width=768,
)

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {variant.name: variant for variant in (ENGLISH, MULTILINGUAL, MULTILINGUAL_V3, TURBO, NANO)}
)
#: The name of the model that converts speech. It has the checkpoint, the warm state and the voices of a model that
#: speaks texts, so it is not a variant.
CONVERSION_MODEL = "vc"
#: A related model that this project has no code for.
_FLASH = "flash"

#: The variant that commands use if no other is named.
DEFAULT_VARIANT = ENGLISH


def check_any_language(code: str) -> None:
    """Check that some variant speaks a language.

    Raises:
        BadInputError: none does.
    """
    known = sorted({language for variant in VARIANTS.values() for language in variant.languages})
    if code.lower() not in known:
        raise BadInputError(f"no model speaks the language {code!r}", next_step=f"choose one of: {', '.join(known)}")


def get_variant(name: str) -> Variant:
    """Return the variant with this name.

    Raises:
        BadInputError: there is no such variant.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        relative = name.lower().removeprefix("chatterbox-")
        if relative == CONVERSION_MODEL:
            raise BadInputError(
                "the voice conversion has no checkpoint of its own",
                next_step=f"use the checkpoint of {DEFAULT_VARIANT.name}, and add --convert to `serve`",
            ) from None
        if relative == _FLASH:
            raise BadInputError(
                f"Chatterbox's model {name!r} has another architecture, which this version does not support",
                next_step=f"choose one of: {', '.join(VARIANTS)}",
            ) from None
        raise BadInputError(
            f"there is no model variant {name!r}", next_step=f"choose one of: {', '.join(VARIANTS)}"
        ) from None
