"""S3Gen's flow with regions: turns speech tokens and a voice into a mel spectrogram, without a host sync."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.regions.flow_blocks import causal_convolution
from chatterbox_prewarm.model.regions.region import (
    FLOW_ENCODER_LAYER,
    FLOW_GUIDED,
    FLOW_MEAN,
    MAX_FRAMES,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

#: Upstream's number of steps for models that were not distilled, and for a mean flow.
_EULER_STEPS, _MEAN_STEPS = 10, 2
#: The tensor that only a mean flow has: it mixes the beginning and the end of a step.
_MIXER = "time_embed_mixer.weight"
#: Upstream's strength of the classifier-free guidance (`CFM_PARAMS`).
_GUIDANCE = 0.7
#: Sizes of the embeddings of a token's position and of a time step.
_TOKEN_SIZE, _TIME_SIZE = 512, 320
_TIME_SCALE = 1000
_MAX_PERIOD = 10_000
#: How many tokens the first layer of the encoder looks ahead, and how many frames a token has.
_LOOK_AHEAD, _FRAMES_PER_TOKEN = 3, 2


class Flow:
    """Computes the same as upstream's `CausalMaskedDiffWithXvec.inference`, for one utterance.

    Turbo's flow is a mean flow (arXiv:2505.13447): two steps without guidance.

    Args:
        weights: of upstream's module; they are used in place.
        executor: makes the regions callable.
    """

    def __init__(self, weights: NamedTensors, executor: Executor) -> None:
        self._weights = weights
        self._encoder, self._estimator = weights.below("encoder"), weights.below("decoder.estimator")
        self._encoders, self._up_encoders = (
            [executor(FLOW_ENCODER_LAYER, encoder_weights(layer)) for layer in self._encoder.layers(name)]
            for name in ("encoders", "up_encoders")
        )
        estimator = self._estimator
        self._is_mean = _MIXER in estimator
        self._steps = _MEAN_STEPS if self._is_mean else _EULER_STEPS
        regions = FLOW_MEAN if self._is_mean else FLOW_GUIDED
        blocks = [block for name in ("down_blocks", "mid_blocks", "up_blocks") for block in estimator.layers(name)]
        self._stages: list[tuple[BoundRegion, list[BoundRegion]]] = [
            (
                executor(regions.resnets[block["0.res_conv.weight"].size(1)], resnet_weights(block.below("0"))),
                [executor(regions.transformer, transformer_weights(layer)) for layer in block.layers("1")],
            )
            for block in blocks
        ]
        self._down = estimator.pair("down_blocks.0.2")
        last = ("up_blocks.0.2", "final_block.block.0", "final_block.block.2", "final_proj")
        self._step = executor(regions.step, estimator.pairs(*last))

    @torch.inference_mode()
    def __call__(
        self,
        tokens: torch.Tensor,
        voice: Mapping[str, torch.Tensor],
        *,
        noise: torch.Tensor | None = None,
        on_step: Callable[[], None] | None = None,
        steps: int | None = None,
    ) -> torch.Tensor:
        """Compute the mel spectrogram of speech tokens.

        Args:
            tokens: int64 (n,), each below 6561.
            voice: `prompt_token` (1, m), `prompt_feat` (1, 2m, 80) and `embedding` (1, 192) of the reference clip.
            noise: (1, frames, 80), at least as many frames as the voice's clip and the speech have. None draws noise
                from the generator of the device.
            on_step: called before each step; its exceptions end the computation.
            steps: how many of the steps to run; None runs all. Fewer give no speech; the check of a start runs one.

        Returns:
            (1, 80, 2n), 50 frames per second.

        Raises:
            BadInputError: the voice's clip and the speech have too many frames together.
        """
        weights = self._weights
        projection = weights["encoder_proj.weight"]
        device, dtype = projection.device, projection.dtype
        prompt = voice["prompt_feat"].to(device, dtype)
        if (frames := prompt.size(1) + 2 * tokens.numel()) > MAX_FRAMES:
            raise BadInputError(
                f"the voice prompt and the speech have {frames} mel frames together; the limit is {MAX_FRAMES}",
                next_step="split the text at sentences and send the parts separately, or request fewer tokens",
            )
        speaker = functional.normalize(voice["embedding"].to(device, dtype).reshape(1, -1), dim=1)
        sequence = torch.cat([voice["prompt_token"].to(device).long().reshape(1, -1), tokens[None]], dim=1)
        mean = self._encode(weights["input_embedding.weight"][sequence])
        condition = torch.zeros_like(mean)
        condition[:, : prompt.size(1)] = prompt
        speaker = functional.linear(speaker, *weights.pair("spk_embed_affine_layer"))
        known = torch.cat([mean, speaker[:, None].expand(-1, mean.size(1), -1), condition], dim=2)
        if noise is None:
            noise = self._noise(mean, 2 * tokens.numel())
        mel = self._solve(noise[:, : mean.size(1)].contiguous(), known, steps or self._steps, on_step)
        return mel[:, prompt.size(1) :].transpose(1, 2).contiguous()

    def _noise(self, mean: torch.Tensor, frames: int) -> torch.Tensor:
        """Draw noise with the shape of `mean`, (1, n, 80), in upstream's layout, so that a seed gives upstream's noise.

        For a mean flow, upstream draws the noise of the speech, `frames`, first.
        """
        speech = mean.new_empty(1, mean.size(2), frames).normal_() if self._is_mean else None
        noise = torch.randn_like(mean.transpose(1, 2).contiguous()).transpose(1, 2)
        if speech is not None:
            noise[:, -frames:] = speech.transpose(1, 2)
        return noise

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode embedded tokens (1, n, 512) into the mean of the mel spectrogram (1, 2n, 80)."""
        encoder = self._encoder
        x, distances = self._embed(x, "embed")
        ahead = functional.pad(x.transpose(1, 2), (0, _LOOK_AHEAD))
        ahead = functional.leaky_relu(functional.conv1d(ahead, *encoder.pair("pre_lookahead_layer.conv1")))
        x = x + causal_convolution(ahead.transpose(1, 2), *encoder.pair("pre_lookahead_layer.conv2"))
        for layer in self._encoders:
            (x,) = layer(x, distances)
        x = causal_convolution(x.repeat_interleave(_FRAMES_PER_TOKEN, dim=1), *encoder.pair("up_layer.conv"))
        x, distances = self._embed(x, "up_embed")
        for layer in self._up_encoders:
            (x,) = layer(x, distances)
        x = functional.layer_norm(x, [x.size(-1)], *encoder.pair("after_norm"))
        return functional.linear(x, *self._weights.pair("encoder_proj"))

    def _embed(self, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Project (1, n, 512) before a stack of encoder layers. Also return the embeddings of all distances."""
        weights = self._encoder.below(f"{name}.out")
        x = functional.linear(x, *weights.pair("0"))
        x = functional.layer_norm(x, [x.size(-1)], *weights.pair("1")) * math.sqrt(_TOKEN_SIZE)
        return x, distance_embeddings(x.size(1), x.device).to(x.dtype)

    def _solve(
        self, mel: torch.Tensor, known: torch.Tensor, steps: int, on_step: Callable[[], None] | None
    ) -> torch.Tensor:
        """Integrate the flow from noise to the mel spectrogram, (1, frames, 80).

        `known` is (1, frames, 240): mean, speaker and condition. With guidance, the estimator has two rows, and only
        the first one gets it.
        """
        times = torch.linspace(0, 1, self._steps + 1, device=mel.device, dtype=mel.dtype)
        if not self._is_mean:
            times = 1 - torch.cos(times * 0.5 * torch.pi)
            known = torch.cat([known, torch.zeros_like(known)])
        embedded = self._embed_times(times)
        guidance = [] if self._is_mean else [torch.full((1,), _GUIDANCE, device=mel.device, dtype=mel.dtype)]
        for step in range(steps):
            if on_step is not None:
                on_step()
            hidden = self._estimate(mel, known, embedded[step : step + 1])
            (mel,) = self._step(hidden, mel, *guidance, times[step + 1 : step + 2] - times[step : step + 1])
        return mel

    def _embed_times(self, times: torch.Tensor) -> torch.Tensor:
        """Embed the beginning of each step, and for a mean flow its end too: (steps, 1024)."""
        weights = self._estimator
        embedded = functional.linear(time_embeddings(times), *weights.pair("time_mlp.linear_1"))
        embedded = functional.linear(functional.silu(embedded), *weights.pair("time_mlp.linear_2"))
        if not self._is_mean:
            return embedded[:-1]
        return functional.linear(torch.cat([embedded[:-1], embedded[1:]], dim=1), weights[_MIXER])

    def _estimate(self, mel: torch.Tensor, known: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Run the estimator up to its last transformer block: (rows, frames, 256)."""
        x = torch.cat([mel.expand(known.size(0), -1, -1), known], dim=2)
        skipped = x
        last = len(self._stages) - 1
        for number, (resnet, transformers) in enumerate(self._stages):
            if number == last:
                x = torch.cat([x, skipped], dim=2)
            (x,) = resnet(x, time)
            for block in transformers:
                (x,) = block(x)
            if number == 0:
                skipped = x
                x = causal_convolution(x, *self._down).contiguous()
        return x


def distance_embeddings(tokens: int, device: torch.device) -> torch.Tensor:
    """Compute the embeddings of the distances from `tokens` - 1 down to 1 - `tokens` (arXiv:1901.02860, appendix B).

    Returns:
        float32 (1, 2 tokens - 1, 512), with sines in even and cosines in odd columns.
    """
    columns = torch.arange(0, _TOKEN_SIZE, 2, dtype=torch.float32, device=device)
    frequencies = torch.exp(columns * -(math.log(_MAX_PERIOD) / _TOKEN_SIZE))
    angles = torch.arange(tokens - 1, -tokens, -1, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None]


def time_embeddings(times: torch.Tensor) -> torch.Tensor:
    """Compute the sinusoidal embeddings of times (n,) from 0 to 1: (n, 320), with the sines first."""
    half = _TIME_SIZE // 2
    frequencies = torch.exp(
        torch.arange(half, device=times.device, dtype=torch.float32) * -(math.log(_MAX_PERIOD) / (half - 1))
    )
    angles = _TIME_SCALE * times[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(times.dtype)


def encoder_weights(layer: NamedTensors) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.encoder_layer` for upstream's `ConformerEncoderLayer`."""
    attention = layer.below("self_attn")
    return [
        *layer.pairs("norm_mha", "self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v"),
        *(attention[name] for name in ("linear_pos.weight", "pos_bias_u", "pos_bias_v")),
        *layer.pairs("self_attn.linear_out", "norm_ff", "feed_forward.w_1", "feed_forward.w_2"),
    ]


def transformer_weights(block: NamedTensors) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.transformer` for upstream's `BasicTransformerBlock`."""
    return [
        *block.pair("norm1"),
        *(block[f"attn1.{name}.weight"] for name in ("to_q", "to_k", "to_v")),
        *block.pairs("attn1.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2"),
    ]


def resnet_weights(block: NamedTensors) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.resnet` for upstream's `CausalResnetBlock1D`."""
    return block.pairs("mlp.1", "block1.block.0", "block1.block.2", "block2.block.0", "block2.block.2", "res_conv")
