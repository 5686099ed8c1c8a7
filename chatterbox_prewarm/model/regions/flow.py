"""S3Gen's flow with regions: turns speech tokens and a voice into a mel spectrogram, without a host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.regions.flow_blocks import causal_convolution
from chatterbox_prewarm.model.regions.region import (
    FLOW_ENCODER_LAYER,
    FLOW_EULER,
    FLOW_RESNETS,
    FLOW_TRANSFORMER,
    MAX_FRAMES,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor

#: Upstream's number of steps for models that were not distilled.
EULER_STEPS = 10


class Flow:
    """Computes the same as upstream's `CausalMaskedDiffWithXvec.inference`, for one utterance.

    Args:
        flow: upstream's module; its weights are used in place.
        executor: makes the regions callable.
    """

    def __init__(self, flow: Any, executor: Executor) -> None:
        self._flow = flow
        encoder, estimator = flow.encoder, flow.decoder.estimator
        self._encoders = [executor(FLOW_ENCODER_LAYER, encoder_weights(layer)) for layer in encoder.encoders]
        self._up_encoders = [executor(FLOW_ENCODER_LAYER, encoder_weights(layer)) for layer in encoder.up_encoders]
        stages = [
            (resnet, transformers)
            for blocks in (estimator.down_blocks, estimator.mid_blocks, estimator.up_blocks)
            for resnet, transformers, *_ in blocks
        ]
        self._stages: list[tuple[BoundRegion, list[BoundRegion]]] = [
            (
                executor(FLOW_RESNETS[resnet.res_conv.in_channels], resnet_weights(resnet)),
                [executor(FLOW_TRANSFORMER, transformer_weights(block)) for block in transformers],
            )
            for resnet, transformers in stages
        ]
        (down,) = estimator.down_blocks
        self._down = (down[2].weight.detach(), down[2].bias.detach())
        (up,) = estimator.up_blocks
        final = estimator.final_block.block
        self._euler = executor(FLOW_EULER, _weights(up[2], final[0], final[2], estimator.final_proj))

    @torch.inference_mode()
    def __call__(
        self,
        tokens: torch.Tensor,
        voice: Mapping[str, torch.Tensor],
        *,
        noise: torch.Tensor | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Compute the mel spectrogram of speech tokens.

        Args:
            tokens: int64 (n,), each below 6561.
            voice: `prompt_token` (1, m), `prompt_feat` (1, 2m, 80) and `embedding` (1, 192) of the reference clip.
            noise: (1, frames, 80), at least as many frames as the voice's clip and the speech have. None draws noise
                from the generator of the device.
            on_step: called before each Euler step; its exceptions end the computation.

        Returns:
            (1, 80, 2n), 50 frames per second.

        Raises:
            BadInputError: the voice's clip and the speech have too many frames together.
        """
        flow = self._flow
        device, dtype = flow.encoder_proj.weight.device, flow.encoder_proj.weight.dtype
        prompt = voice["prompt_feat"].to(device, dtype)
        if (frames := prompt.size(1) + 2 * tokens.numel()) > MAX_FRAMES:
            raise BadInputError(
                f"the voice prompt and the speech have {frames} mel frames together; the limit is {MAX_FRAMES}",
                next_step="split the text at sentences and send the parts separately, or request fewer tokens",
            )
        speaker = functional.normalize(voice["embedding"].to(device, dtype).reshape(1, -1), dim=1)
        sequence = torch.cat([voice["prompt_token"].to(device).long().reshape(1, -1), tokens[None]], dim=1)
        mean = self._encode(flow.input_embedding(sequence))
        condition = torch.zeros_like(mean)
        condition[:, : prompt.size(1)] = prompt
        mel = self._solve(mean, flow.spk_embed_affine_layer(speaker), condition, noise, on_step)
        return mel[:, prompt.size(1) :].transpose(1, 2).contiguous()

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode embedded tokens (1, n, 512) into the mean of the mel spectrogram (1, 2n, 80)."""
        encoder = self._flow.encoder
        x, distances = encoder.embed.pos_enc(encoder.embed.out(x))
        x = encoder.pre_lookahead_layer(x)
        for layer in self._encoders:
            (x,) = layer(x, distances)
        x, _ = encoder.up_layer(x.transpose(1, 2).contiguous(), x.size(1))
        x, distances = encoder.up_embed.pos_enc(encoder.up_embed.out(x.transpose(1, 2)))
        for layer in self._up_encoders:
            (x,) = layer(x, distances)
        mean: torch.Tensor = self._flow.encoder_proj(encoder.after_norm(x))
        return mean

    def _solve(
        self,
        mean: torch.Tensor,
        speaker: torch.Tensor,
        condition: torch.Tensor,
        noise: torch.Tensor | None,
        on_step: Callable[[], None] | None,
    ) -> torch.Tensor:
        """Integrate the flow from noise to the mel spectrogram.

        All tensors are (1, frames, 80), except `speaker`, which is (1, 80). Only the first of the estimator's two rows
        gets mean, speaker and condition.
        """
        decoder = self._flow.decoder
        estimator = decoder.estimator
        if noise is None:
            # Draw in upstream's layout, so that a seed gives upstream's noise.
            noise = torch.randn_like(mean.transpose(1, 2).contiguous()).transpose(1, 2)
        mel = noise[:, : mean.size(1)].contiguous()
        times = torch.linspace(0, 1, EULER_STEPS + 1, device=mean.device, dtype=mean.dtype)
        times = 1 - torch.cos(times * 0.5 * torch.pi)
        embedded = estimator.time_mlp(estimator.time_embeddings(times[:-1]).to(mean.dtype))
        known = torch.cat([mean, speaker[:, None].expand(-1, mean.size(1), -1), condition], dim=2)
        known = torch.cat([known, torch.zeros_like(known)])
        guidance = torch.full((1,), decoder.inference_cfg_rate, device=mean.device, dtype=mean.dtype)
        for step in range(EULER_STEPS):
            if on_step is not None:
                on_step()
            hidden = self._estimate(mel, known, embedded[step : step + 1])
            (mel,) = self._euler(hidden, mel, guidance, times[step + 1 : step + 2] - times[step : step + 1])
        return mel

    def _estimate(self, mel: torch.Tensor, known: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Run the estimator up to its last transformer block: (2, frames, 256)."""
        x = torch.cat([mel.expand(2, -1, -1), known], dim=2)
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


def encoder_weights(layer: Any) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.encoder_layer` for upstream's `ConformerEncoderLayer`."""
    attention, feed_forward = layer.self_attn, layer.feed_forward
    return [
        *_weights(layer.norm_mha, attention.linear_q, attention.linear_k, attention.linear_v),
        *(tensor.detach() for tensor in (attention.linear_pos.weight, attention.pos_bias_u, attention.pos_bias_v)),
        *_weights(attention.linear_out, layer.norm_ff, feed_forward.w_1, feed_forward.w_2),
    ]


def transformer_weights(block: Any) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.transformer` for upstream's `BasicTransformerBlock`."""
    attention, feed_forward = block.attn1, block.ff.net
    return [
        *_weights(block.norm1),
        *(part.weight.detach() for part in (attention.to_q, attention.to_k, attention.to_v)),
        *_weights(attention.to_out[0], block.norm3, feed_forward[0].proj, feed_forward[2]),
    ]


def resnet_weights(block: Any) -> list[torch.Tensor]:
    """Return the weight arguments of `flow_blocks.resnet` for upstream's `CausalResnetBlock1D`."""
    first, second = block.block1.block, block.block2.block
    return _weights(block.mlp[1], first[0], first[2], second[0], second[2], block.res_conv)


def _weights(*layers: Any) -> list[torch.Tensor]:
    """Return the weight and the bias of each layer."""
    return [tensor.detach() for layer in layers for tensor in (layer.weight, layer.bias)]
