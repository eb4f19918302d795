"""The transformers of diffusers: attention with normalised and rotated queries and keys, adaptive LayerNorm, gates, and
this package's attention as one of diffusers' attention backends.

Imported for models of diffusers alone. Axes: B batch, L tokens, N heads, D head size, C = N*D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from opensora_kernels.ops.attention import attention
from opensora_kernels.ops.gate_residual import gate_residual
from opensora_kernels.ops.modulate import modulate
from opensora_kernels.ops.qk_norm_rope import qk_norm_rope

from .recipes import Forward, Recipe

BACKEND = "opensora_kernels"


def register_attention_backend() -> AttentionBackendName:
    """Make `set_attention_backend("opensora_kernels")` known to diffusers; a second call changes nothing."""
    if BACKEND in AttentionBackendName._value2member_map_:
        return AttentionBackendName(BACKEND)
    # diffusers 0.42 keeps its backends in an Enum, which has no way of its own to take one more
    member = str.__new__(AttentionBackendName, BACKEND)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    # a pickled processor registers it where it is loaded
    member.__reduce_ex__ = lambda protocol: (register_attention_backend, ())
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[BACKEND] = member
    AttentionBackendName._member_names_.append(member._name_)
    _AttentionBackendRegistry.register(member)(_attend)
    return member


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """q, k, v (B, L, N, D). Masks, dropout, causal order, fewer heads of keys and parallel runs: diffusers' own way."""
    is_ours = attn_mask is None and not dropout_p and not is_causal and not enable_gqa and _parallel_config is None
    if is_ours and query.shape[2:] == key.shape[2:] == value.shape[2:]:
        return attention(query, key, value, scale=scale)
    return _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE](
        query=query, key=key, value=value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa, _parallel_config=_parallel_config,
    )  # fmt: skip


def _forward_wan_attention(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    is_high: bool = False,
    **options: Any,
) -> Tensor:
    """Wan: the mean square over all heads of a token; pairs of neighbours turn."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    is_ours = self.add_k_proj is None and not options and isinstance(self.processor, self._default_processor_cls)
    if not is_ours or getattr(self, "fused_projections", False):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **options
        )  # fmt: skip
    query, key, value = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
    weights: dict[str, Any] = {}
    if is_high and self.norm_q.eps == self.norm_k.eps:  # torch's RMSNorm rounds once, this operator twice
        weights = {"q_weight": self.norm_q.weight, "k_weight": self.norm_k.weight, "norm_scope": "token"}
        weights["eps"] = self.norm_q.eps
    else:
        query, key = self.norm_q(query), self.norm_k(key)
    query, key, value = (x.unflatten(2, (self.heads, -1)) for x in (query, key, value))
    if rotary_emb is not None:
        cos, sin = rotary_emb
        weights |= {"cos": cos[0, :, 0, 0::2], "sin": sin[0, :, 0, 1::2]}
    query, key = qk_norm_rope(query, key, **weights)
    processor = self.processor
    out = dispatch_attention_fn(
        query, key, value, attn_mask=attention_mask, backend=processor._attention_backend,
        parallel_config=processor._parallel_config if encoder_hidden_states is None else None,
    ).flatten(2, 3).type_as(query)  # fmt: skip
    return self.to_out[1](self.to_out[0](out))


def _forward_wan_attention_high(self: nn.Module, *args: Any, **options: Any) -> Tensor:
    return _forward_wan_attention(self, *args, **options, is_high=True)


def _forward_wan_block(
    self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """Wan: shift, scale and gate in fp32 from a table; a table for each token (Wan 2.2 5B) runs its own way."""
    if temb.ndim != 3:
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    table = (self.scale_shift_table + temb.float()).unbind(1)
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = table
    # fp32 as the model has it: bf16 input would round the normalised value
    normed = modulate(hidden_states.float(), shift, scale, eps=self.norm1.eps).type_as(hidden_states)
    hidden_states = gate_residual(hidden_states, self.attn1(normed, None, None, rotary_emb), gate)
    normed = self.norm2(hidden_states.float()).type_as(hidden_states)
    hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)
    normed = modulate(hidden_states.float(), shift_ffn, scale_ffn, eps=self.norm3.eps).type_as(hidden_states)
    return gate_residual(hidden_states, self.ffn(normed), gate_ffn)


def _forward_joint_attention(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """HunyuanVideo: video and text in one attention; the mean square of each head; the video's pairs turn."""
    if options or type(self.processor).__name__ not in _JOINT_PROCESSORS or image_rotary_emb is None:
        if image_rotary_emb is not None:
            options["image_rotary_emb"] = image_rotary_emb
        return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    num_tokens = hidden_states.shape[1]
    has_text_weights = self.add_q_proj is not None
    tokens = hidden_states
    if not has_text_weights and encoder_hidden_states is not None:
        tokens = torch.cat([hidden_states, encoder_hidden_states], 1)
    query, key, value = (layer(tokens).unflatten(2, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
    cos, sin = (angles.to(query.device)[:, 0::2] for angles in image_rotary_emb)
    norm = {"q_weight": self.norm_q.weight, "k_weight": self.norm_k.weight, "eps": self.norm_q.eps}
    turned = qk_norm_rope(query[:, :num_tokens], key[:, :num_tokens], **norm, cos=cos, sin=sin)
    pairs, values = [turned], [value]
    if encoder_hidden_states is not None and has_text_weights:
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        query, key, value = (layer(encoder_hidden_states).unflatten(2, (self.heads, -1)) for layer in layers)
        norm = {
            "q_weight": self.norm_added_q.weight,
            "k_weight": self.norm_added_k.weight,
            "eps": self.norm_added_q.eps,
        }
        pairs.append(qk_norm_rope(query, key, **norm))
        values.append(value)
    elif encoder_hidden_states is not None:
        pairs.append(qk_norm_rope(query[:, num_tokens:], key[:, num_tokens:], **norm))
    query, key = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    out = dispatch_attention_fn(
        query, key, torch.cat(values, 1), attn_mask=attention_mask, backend=self.processor._attention_backend,
        parallel_config=self.processor._parallel_config,
    ).flatten(2, 3).to(query.dtype)  # fmt: skip
    video, text = out, encoder_hidden_states
    if encoder_hidden_states is not None:
        video, text = out[:, :num_tokens], out[:, num_tokens:]
        if getattr(self, "to_out", None) is not None:
            video = self.to_out[1](self.to_out[0](video))
        if getattr(self, "to_add_out", None) is not None:
            text = self.to_add_out(text)
    return video, text


def _forward_ada_zero(
    self: nn.Module,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
    return _modulated(self, x, shift, scale), *others


def _forward_ada_single(self: nn.Module, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return _modulated(self, x, shift, scale), gate


def _forward_ada_continuous(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _modulated(self, x, shift, scale)


def _forward_cogvideox_zero(
    self: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, ...]:
    """CogVideoX: a LayerNorm with weights of its own, then two streams with their own shift and scale."""
    table = self.linear(self.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = table
    video = modulate(self.norm(hidden_states), shift, scale, normalize=False)
    text = modulate(self.norm(encoder_hidden_states), text_shift, text_scale, normalize=False)
    return video, text, gate[:, None, :], text_gate[:, None, :]


def _modulated(module: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    if x.dtype != shift.dtype:  # the model then goes on in the wider dtype, where modulate returns x's
        return module.norm(x) * (1 + scale[:, None]) + shift[:, None]
    return modulate(x, shift, scale, eps=module.norm.eps)


_JOINT_PROCESSORS = ("HunyuanVideoAttnProcessor2_0",)


def _angles(x: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(0, 1, x.shape[1] * (head_size // 2)).view(x.shape[1], -1).repeat_interleave(2, 1)
    return angles.cos().to(x.device), angles.sin().to(x.device)


def _rehearse_wan(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    cos, sin = _angles(x, module.to_q.out_features // module.heads)
    turned = (cos[None, :, None], sin[None, :, None])
    context = x.new_ones(1, 3, module.to_k.in_features)
    own = [forward(x, None, None, turned)] if module.to_k.in_features == module.to_q.in_features else []
    return [*own, forward(x, context)]


def _rehearse_wan_block(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    cos, sin = _angles(x, module.attn1.to_q.out_features // module.attn1.heads)
    return [forward(x, x[:, :3], x[:, :1].expand(-1, 6, -1), (cos[None, :, None], sin[None, :, None]))]


def _rehearse_joint(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    angles = _angles(x, module.to_q.out_features // module.heads)
    return list(forward(x, x[:, :3], image_rotary_emb=angles))


def _rehearse_ada(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    has_keyword = module.linear.out_features == 6 * module.linear.in_features and hasattr(module, "emb")
    out = forward(x, emb=x[:, 0]) if has_keyword else forward(x, x[:, 0])
    return [out] if isinstance(out, Tensor) else list(out)


def _rehearse_two_streams(module: nn.Module, forward: Forward, x: Tensor) -> list[Tensor]:
    size = module.norm.normalized_shape[0]
    video = x[:, :, :1] * torch.linspace(-1, 1, size).to(x)
    return list(forward(video, video[:, :3], x[:, 0]))


def _is_wan_attention(module: nn.Module) -> bool:
    names = ("norm_q", "norm_k", "to_q", "to_k", "to_v", "to_out", "add_k_proj", "heads", "_default_processor_cls")
    if not all(hasattr(module, name) for name in (*names, "is_cross_attention")):
        return False
    is_plain = type(module.norm_q) is nn.RMSNorm and type(module.norm_k) is nn.RMSNorm
    return is_plain and isinstance(module.processor, module._default_processor_cls)


def _is_wan_block(module: nn.Module) -> bool:
    names = ("norm1", "attn1", "attn2", "norm2", "ffn", "norm3", "scale_shift_table")
    if not all(hasattr(module, name) for name in names) or not _is_wan_attention(module.attn1):
        return False
    return all(isinstance(norm, nn.LayerNorm) and norm.weight is None for norm in (module.norm1, module.norm3))


def _is_joint_attention(module: nn.Module) -> bool:
    if type(getattr(module, "processor", None)).__name__ not in _JOINT_PROCESSORS:
        return False
    norms = [module.norm_q, module.norm_k]
    if module.add_q_proj is not None:
        norms += [module.norm_added_q, module.norm_added_k]
    # diffusers' RMSNorm rounds before its weight, as qk_norm_rope does
    are_alike = all(getattr(norm, "weight", None) is not None and norm.eps == norms[0].eps for norm in norms)
    return are_alike and not any(type(norm) is nn.RMSNorm for norm in norms)


def _is_adaptive(module: nn.Module, num_tables: int) -> bool:
    if not all(hasattr(module, name) for name in ("silu", "linear", "norm")) or type(module.norm) is not nn.LayerNorm:
        return False
    size = module.norm.normalized_shape[0]
    return isinstance(module.linear, nn.Linear) and module.linear.out_features == num_tables * size


def _is_ada(module: nn.Module, num_tables: int, has_emb: bool) -> bool:
    is_square = _is_adaptive(module, num_tables) and module.norm.normalized_shape[0] == module.linear.in_features
    return is_square and module.norm.weight is None and hasattr(module, "emb") == has_emb


def recipes(quality: str) -> tuple[Recipe, ...]:
    """What takes the place of diffusers' transformer modules. In "high", normalised q and k are rounded before their
    weight, which torch.nn.RMSNorm does not."""
    tokens = (1, 6, 0)
    is_high = quality == "high"
    wan = ("qk_norm_rope", "attention") if is_high else ("qk_norm_rope(rope)", "attention")
    return (
        Recipe(
            _is_wan_attention, _forward_wan_attention_high if is_high else _forward_wan_attention, wan, _rehearse_wan,
            ("norm_q", "norm_k") if is_high else (), tokens,
        ),
        Recipe(
            _is_wan_block, _forward_wan_block, ("modulate", "gate_residual"), _rehearse_wan_block,
            ("norm1", "norm3"), tokens,
        ),
        Recipe(
            _is_joint_attention, _forward_joint_attention, ("qk_norm_rope", "attention"), _rehearse_joint,
            ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), tokens,
        ),
        Recipe(lambda m: _is_ada(m, 6, True), _forward_ada_zero, ("modulate",), _rehearse_ada, ("norm",), tokens),
        Recipe(lambda m: _is_ada(m, 3, False), _forward_ada_single, ("modulate",), _rehearse_ada, ("norm",), tokens),
        Recipe(
            lambda m: _is_ada(m, 2, False), _forward_ada_continuous, ("modulate",), _rehearse_ada, ("norm",), tokens
        ),
        Recipe(
            lambda m: _is_adaptive(m, 6) and not hasattr(m, "emb") and m.norm.weight is not None,
            _forward_cogvideox_zero, ("modulate",), _rehearse_two_streams, (), tokens,
        ),
    )  # fmt: skip


def processors_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(module's name, processor) of each attention that goes through diffusers' dispatcher and has no backend yet."""
    found = []
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend") and processor._attention_backend is None:
            found.append((name, processor))
    return found


def has_our_backend(module: nn.Module) -> bool:
    """Whether `module`'s processor has been given this package's attention by a patch, rather than by its user."""
    backend = getattr(getattr(module, "processor", None), "_attention_backend", None)
    return getattr(backend, "value", None) == BACKEND and not _is_active()


def _is_active() -> bool:
    """`model.set_attention_backend` also makes its choice that of the whole process."""
    return getattr(_AttentionBackendRegistry._active_backend, "value", None) == BACKEND
