"""The demo model: a small decoder that adds numbers, with its attention left to the caller.

The decoder is of the usual kind: token embedding, then blocks of pre-norm (RMSNorm) grouped-query
attention with rotary position embedding (RoPE) and a pre-norm SwiGLU MLP, then a final RMSNorm and
a linear head. One layer has a sliding window, another a logits soft cap; ``DemoConfig.layers`` says
which. Two ways through it compute the same function:

* ``DemoModel.forward`` hands each layer's query, key and value to a callable of the caller, which
  is where a paged cache and a batch of requests in different states come in.
* ``DemoModel.dense_logits`` is the reference: whole sequences, plain dense causal attention
  (``dense_attention``), in whatever dtype the parameters have.

What attention means here: ``score = head_size**-0.5 * (query . key)``; then the soft cap,
``cap * tanh(score / cap)``; then the mask, under which a query at position p sees the keys at
positions ``(p - W, p]`` (W tokens, itself included) for a sliding window of W, and ``[0, p]``
without one; then softmax and the weighted sum of the values. Query head h uses key and value head
``h // (num_heads // num_kv_heads)``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from attn_dispatch.serving import tokenizer

WEIGHTS_PATH = Path(__file__).with_name("weights.safetensors")
"""The trained weights that ship with the package: float16, the config in their metadata."""

CONFIG_KEY = "demo_config"
"""Key of the safetensors metadata under which the config lies as JSON."""

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer_index, query, key, value) -> output``: causal attention of one layer.

query: ``(num_tokens, num_heads, head_size)``; key, value: ``(num_tokens, num_kv_heads,
head_size)``; output: as query. RoPE has been applied to query and key; scale, sliding window and
soft cap are the callable's to apply, as are the keys and values of earlier tokens.
"""


@dataclass(frozen=True)
class LayerConfig:
    """What sets one layer's attention apart from plain causal attention.

    Attributes:
        sliding_window: number of tokens a query sees, itself included; None: all of them.
        logits_soft_cap: the scaled scores s become ``cap * tanh(s / cap)``; None: unchanged.
    """

    sliding_window: int | None = None
    logits_soft_cap: float | None = None


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of a ``DemoModel``.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP.
        num_heads: query heads per layer.
        num_kv_heads: key and value heads per layer; divides ``num_heads``.
        head_size: size of one head; even, for RoPE.
        layers: one record per layer, first layer first.
        rope_base: base of the RoPE frequencies, ``rope_base ** (-2 i / head_size)``. Far below
            the customary 10000, since contexts are short and exact positions matter.
        rms_norm_eps: added to the mean square in RMSNorm.
        max_context: longest sequence that was trained, in tokens, BOS included.
    """

    vocab_size: int = tokenizer.VOCAB_SIZE
    hidden_size: int = 96
    intermediate_size: int = 256
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 16
    layers: tuple[LayerConfig, ...] = (
        LayerConfig(),
        LayerConfig(sliding_window=32),
        LayerConfig(logits_soft_cap=30.0),
        LayerConfig(),
    )
    rope_base: float = 1000.0
    rms_norm_eps: float = 1e-5
    max_context: int = 288

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size ({self.head_size}) must be even for RoPE")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def scale(self) -> float:
        """Factor on query . key, ``head_size ** -0.5``."""
        return float(self.head_size**-0.5)

    def to_json(self) -> str:
        """The config as JSON; ``from_json`` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DemoConfig:
        """Read what ``to_json`` wrote."""
        fields: dict[str, Any] = json.loads(text)
        fields["layers"] = tuple(LayerConfig(**layer) for layer in fields["layers"])
        return cls(**fields)


def rope_tables(positions: Tensor, config: DemoConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate the queries and keys at some positions.

    Args:
        positions: ``(..., num_tokens)``, integer; a token's index in its own sequence.
        config: gives ``head_size`` and ``rope_base``.
        dtype: dtype of the results.

    Returns:
        cos and sin, each ``(..., num_tokens, 1, head_size // 2)``. The angles are computed in
        float64 whatever ``dtype`` is, so that models of different dtypes rotate alike.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_base ** (-exponents / config.head_size)
    angles = (positions.to(torch.float64)[..., None] * frequencies)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_size // 2]) of a head by its position's angle.

    Args:
        x: ``(..., num_tokens, heads, head_size)``.
        cos, sin: ``(..., num_tokens, 1, head_size // 2)``, of ``rope_tables``.

    Returns:
        Shape and dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, layer: LayerConfig
) -> Tensor:
    """Causal attention of whole sequences, every score written out: the reference.

    Args:
        query: ``(batch, length, num_heads, head_size)``.
        key, value: ``(batch, length, num_kv_heads, head_size)``.
        scale: factor on query . key.
        layer: the layer's sliding window and soft cap.

    Returns:
        ``(batch, length, num_heads, head_size)``, dtype of ``query``; nothing is computed in
        another dtype than that.
    """
    length, num_heads, num_kv_heads = query.shape[1], query.shape[2], key.shape[2]
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=2)
    value = value.repeat_interleave(num_heads // num_kv_heads, dim=2)

    scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    if layer.logits_soft_cap is not None:
        scores = layer.logits_soft_cap * torch.tanh(scores / layer.logits_soft_cap)

    position = torch.arange(length, device=query.device)
    visible = position[None, :] <= position[:, None]
    if layer.sliding_window is not None:
        visible &= position[None, :] > position[:, None] - layer.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))

    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: ``(..., size)``; the result has its shape and dtype."""
        # Squares of half-precision numbers overflow or lose too much; float64 stays float64.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class DemoBlock(nn.Module):
    """One layer: attention and a SwiGLU MLP, each on the normed residual stream."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        query_size = config.num_heads * config.head_size
        kv_size = config.num_kv_heads * config.head_size
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.query = nn.Linear(config.hidden_size, query_size, bias=False)
        self.key = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.value = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.output = nn.Linear(query_size, config.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer_index: int, attend: Attend
    ) -> Tensor:
        """x: ``(..., num_tokens, hidden_size)``; cos, sin: of ``rope_tables``; result: as x."""
        h = self.attention_norm(x)
        query = apply_rope(self.query(h).unflatten(-1, (-1, self.head_size)), cos, sin)
        key = apply_rope(self.key(h).unflatten(-1, (-1, self.head_size)), cos, sin)
        value = self.value(h).unflatten(-1, (-1, self.head_size))
        x = x + self.output(attend(layer_index, query, key, value).flatten(-2))
        h = self.mlp_norm(x)
        x = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return x


class DemoModel(nn.Module):
    """The decoder; see the module's docstring.

    A fresh one has random parameters (drawn from torch's global generator), which is what the
    training script starts from; ``load_demo_model`` gives the trained one.
    """

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DemoBlock(config) for _ in config.layers)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits of some tokens, the attention of every layer done by ``attend``.

        The tokens may belong to any number of sequences and be any part of them: the model looks
        across tokens nowhere else than in ``attend``.

        Args:
            token_ids: ``(num_tokens,)``, integer.
            positions: ``(num_tokens,)``, integer; each token's index in its own sequence, the
                BOS token being at 0.
            attend: called once per layer, in order; see ``Attend``. (Where token_ids and
                positions have leading dimensions, such as a batch's, so have its tensors.)

        Returns:
            ``(num_tokens, vocab_size)``, dtype of the parameters: for each token, the logits of
            the one that follows.
        """
        x: Tensor = self.embedding(token_ids)
        cos, sin = rope_tables(positions, self.config, x.dtype)
        for layer_index, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer_index, attend)
        logits: Tensor = self.head(self.final_norm(x))
        return logits

    def dense_logits(self, token_ids: Tensor) -> Tensor:
        """Logits of whole sequences through ``dense_attention``: the reference.

        Args:
            token_ids: ``(batch, length)``, integer, each row a sequence from its BOS on. Padding
                may follow a sequence: attention is causal, so nothing before it changes.

        Returns:
            ``(batch, length, vocab_size)``, dtype of the parameters.
        """

        def attend(layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            layer = self.config.layers[layer_index]
            return dense_attention(query, key, value, self.config.scale, layer)

        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        return self.forward(token_ids, positions.expand_as(token_ids), attend)


def save_demo_model(model: DemoModel, path: Path) -> None:
    """Write a model's parameters as float16, and its config as JSON in the metadata.

    The file is replaced as a whole, so a reader never sees half of one.
    """
    from safetensors.torch import save

    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    # safetensors' own save_file makes a file that only its owner may read; this one is shipped.
    partial.write_bytes(save(tensors, metadata={CONFIG_KEY: model.config.to_json()}))
    partial.replace(path)


def load_demo_model(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    path: Path = WEIGHTS_PATH,
) -> DemoModel:
    """The trained model that ships with the package, ready for inference.

    Args:
        dtype: dtype of the parameters, and so of the computation. The file holds float16, so
            float32 and float64 models have exactly the same parameters.
        device: where the parameters are put.
        path: another file written by ``save_demo_model``.

    Returns:
        The model in eval mode, its parameters not requiring gradients.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if CONFIG_KEY not in metadata:
            raise ValueError(
                f"{path} has no {CONFIG_KEY!r} metadata: not weights of the demo model"
            )
        config = DemoConfig.from_json(metadata[CONFIG_KEY])
        names: list[str] = file.keys()
        tensors = {name: file.get_tensor(name).to(dtype) for name in names}
    with torch.device("meta"):
        model = DemoModel(config)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).requires_grad_(False).eval()
