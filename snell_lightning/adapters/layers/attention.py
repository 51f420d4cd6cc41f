"""`nn.MultiheadAttention` with its projections as layers that are called, so that they can be adapted.

torch's own holds q, k and v in a tensor of its own and reads its output layer's weight, so that no layer is ever
called. `open_attention` puts an `OpenAttention` in its place, with layers `in_proj` and `out_proj` that share its
parameters, and `close_attention` puts torch's back. State dicts keep torch's names.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names in a state dict: torch's, and those of the layers.
_NAMES = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}


class OpenAttention(nn.Module):
    """Multi-head attention whose projections are called.

    Args:
        plain: torch's own, with keys and values of the query's width. Its parameters are taken over, not copied.
    """

    def __init__(self, plain: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = plain.embed_dim, plain.num_heads, plain.head_dim
        self.kdim, self.vdim, self.dropout, self.batch_first = plain.kdim, plain.vdim, plain.dropout, plain.batch_first
        # So `nn.TransformerEncoderLayer` calls this module, instead of computing with its weights.
        self._qkv_same_embed_dim, self.in_proj_weight, self.in_proj_bias = False, None, None
        self.in_proj = _layer(plain.in_proj_weight, plain.in_proj_bias)
        self.out_proj: nn.Module = _layer(plain.out_proj.weight, plain.out_proj.bias)
        # In a list, so that it is no submodule.
        self._plain = [plain]
        self.training = plain.training
        self.register_state_dict_post_hook(_to_torchs_names)
        self.register_load_state_dict_pre_hook(_from_torchs_names)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask, as in nn.MultiheadAttention")
        given = {id(tensor): tensor for tensor in (query, key, value)}
        batched = query.dim() == 3
        # Each different input is projected once: to all three, of which what is not asked for is left out.
        found = {place: self.in_proj(self._batch_first(tensor, batched)) for place, tensor in given.items()}
        parts = (found[id(tensor)].chunk(3, -1)[which] for which, tensor in enumerate((query, key, value)))
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        mask = self._mask(attn_mask, key_padding_mask, q, k, batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = (output if self.batch_first else output.transpose(0, 1)) if batched else output[0]
        return output, weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, batched: bool
    ) -> Tensor | None:
        """What is added to the scores `(batch, heads, queries, keys)`; torch masks where a mask is true."""
        total = None
        if attn_mask is not None:
            total = _added(attn_mask, q.dtype)
            total = total.view(-1, self.num_heads, *total.shape[1:]) if total.dim() == 3 else total
        if key_padding_mask is not None:
            padding = _added(key_padding_mask if batched else key_padding_mask[None], q.dtype)[:, None, None]
            total = padding if total is None else total + padding
        return None if total is None else total.expand(len(q), self.num_heads, q.shape[2], k.shape[2])


def why_not_openable(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention's projections cannot be called as layers; `None` if they can."""
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        return f"{type(attention).__name__} has a forward of its own, which uses its weights without calling a layer"
    if attention.in_proj_weight is None:
        return "its keys or values have another width than its queries"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds keys and values of its own (add_bias_kv, add_zero_attn)"
    if type(attention.in_proj_weight) is not nn.Parameter or hasattr(attention, "parametrizations"):
        return "its weight is made from others"
    return None


def open_attention(model: nn.Module) -> None:
    """Put an `OpenAttention` in the place of each attention of torch's own inside a model, in place."""
    opened: dict[int, OpenAttention] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention) and why_not_openable(child) is None:
                setattr(parent, name, opened.setdefault(id(child), OpenAttention(child)))
    _take_nested(model)


def close_attention(model: nn.Module, keep: Any = ()) -> None:
    """Put torch's own back, with the parameters that the layers have now, but for those that hold a layer of `keep`.

    Args:
        model: A model that `open_attention` changed.
        keep: Layers, or their adapted ones.
    """
    kept = {id(layer) for layer in keep}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OpenAttention) and not {id(child.in_proj), id(child.out_proj)} & kept:
                plain: Any = child._plain[0]
                plain.in_proj_weight, plain.in_proj_bias = child.in_proj.weight, child.in_proj.bias
                plain.out_proj.weight, plain.out_proj.bias = child.out_proj.weight, child.out_proj.bias
                plain.train(child.training)
                setattr(parent, name, plain)
    _take_nested(model)


def _take_nested(model: nn.Module) -> None:
    """Have torch's encoders drop padding, by nested tensors, where torch's own attention is in all of their layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            opened = any(isinstance(part, OpenAttention) for part in module.modules())
            if opened and "_snell_nested" not in vars(module):
                vars(module)["_snell_nested"] = module.use_nested_tensor
                module.use_nested_tensor = False
            elif not opened and "_snell_nested" in vars(module):
                module.use_nested_tensor = vars(module).pop("_snell_nested")


def _layer(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer of these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _to_torchs_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for theirs, ours in _NAMES.items():
        if prefix + ours in state:
            state[prefix + theirs] = state.pop(prefix + ours)


def _from_torchs_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for theirs, ours in _NAMES.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)
