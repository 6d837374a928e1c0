"""The demo model: a small decoder that adds numbers. The caller computes its attention.

The decoder consists of a token embedding, blocks of pre-norm (RMSNorm) grouped-query attention
with rotary position embedding (RoPE) and a pre-norm SwiGLU MLP, a final RMSNorm and a linear head.
One layer has a sliding window and one a logits soft cap; see ``DemoConfig.layers``.

``DemoModel.forward`` passes each layer's query, key and value to a callable, which can use a paged
cache. ``DemoModel.dense_logits`` is the reference: the same function of whole sequences, with the
attention of the conformance suite's float64 oracle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import RMSNorm, functional

from attn_dispatch.conformance.oracle import attention_of_request, positions_of, sees
from support.addition import tokenizer

WEIGHTS_PATH = Path(__file__).with_name("weights.safetensors")
"""The trained weights of the package: float16, with the config in the metadata."""

CONFIG_KEY = "demo_config"
"""Key of the config, as JSON, in the safetensors metadata."""

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer_index, query, key, value) -> output``: causal attention of one layer.

query: ``(num_tokens, num_heads, head_size)``; key, value: ``(num_tokens, num_kv_heads,
head_size)``; output: as query. RoPE is already applied to query and key. The callable applies
scale, sliding window and soft cap, and adds the keys and values of earlier tokens.
"""


@dataclass(frozen=True)
class LayerConfig:
    """How one layer's attention differs from plain causal attention.

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
        rope_base: base of the RoPE frequencies, ``rope_base ** (-2 i / head_size)``. It is far
            below the usual 10000, because contexts are short and exact positions matter.
        rms_norm_eps: added to the mean square in RMSNorm.
        max_context: longest sequence in training, in tokens, BOS included.
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
    """Cosines and sines of the angles of RoPE (arXiv:2104.09864).

    positions: ``(..., num_tokens)``, integer; a token's index in its own sequence. Both results:
    ``(..., num_tokens, 1, head_size // 2)``. The angles are computed in float64 for every dtype,
    so that models of different dtypes use the same angles.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_base ** (-exponents / config.head_size)
    angles = (positions.to(torch.float64)[..., None] * frequencies)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_size // 2]) of a head by its position's angle.

    x: ``(..., num_tokens, heads, head_size)``; cos, sin: from ``rope_tables``; result: as x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
        """x: ``(..., num_tokens, hidden_size)``; cos, sin: from ``rope_tables``; result: as x."""
        h = self.attention_norm(x)
        query = apply_rope(self.query(h).unflatten(-1, (-1, self.head_size)), cos, sin)
        key = apply_rope(self.key(h).unflatten(-1, (-1, self.head_size)), cos, sin)
        value = self.value(h).unflatten(-1, (-1, self.head_size))
        x = x + self.output(attend(layer_index, query, key, value).flatten(-2))
        h = self.mlp_norm(x)
        x = x + self.down(functional.silu(self.gate(h)) * self.up(h))
        return x


class DemoModel(nn.Module):
    """The decoder, see the module's docstring; ``load_demo_model`` returns the trained one.

    A new model has random parameters, drawn from torch's global generator.
    """

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DemoBlock(config) for _ in config.layers)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits of some tokens, with the attention of every layer computed by ``attend``.

        The tokens may be parts of any number of sequences: only ``attend`` combines tokens.

        Args:
            token_ids: ``(num_tokens,)``, integer.
            positions: ``(num_tokens,)``, integer; each token's index in its own sequence, 0 for
                BOS.
            attend: called once per layer, in order; see ``Attend``. If token_ids and positions
                have leading dimensions, such as a batch's, its tensors have them too.

        Returns:
            ``(num_tokens, vocab_size)``, dtype of the parameters: the logits of the token after
            each one.
        """
        x: Tensor = self.embedding(token_ids)
        cos, sin = rope_tables(positions, self.config, x.dtype)
        for layer_index, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer_index, attend)
        logits: Tensor = self.head(self.final_norm(x))
        return logits

    def dense_logits(self, token_ids: Tensor) -> Tensor:
        """Logits of whole sequences, with attention in float64: the reference.

        Args:
            token_ids: ``(batch, length)``, integer; each row is a sequence from its BOS on,
                optionally followed by padding, which causal attention does not see.

        Returns:
            ``(batch, length, vocab_size)``, dtype of the parameters.
        """
        scale, length = self.config.scale, token_ids.shape[1]
        positions = positions_of(length, length, token_ids.device)

        def attend(layer_index: int, *qkv: Tensor) -> Tensor:
            layer = self.config.layers[layer_index]
            seen = sees(positions, length, causal=True, window=layer.sliding_window)
            outputs = [
                attention_of_request(*row, scale=scale, seen=seen, cap=layer.logits_soft_cap)[0]
                for row in zip(*qkv, strict=True)
            ]
            return torch.stack(outputs).to(qkv[0].dtype)

        return self.forward(token_ids, positions.expand_as(token_ids), attend)


def load_demo_model(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    path: Path = WEIGHTS_PATH,
) -> DemoModel:
    """The trained model of the package, in eval mode and without gradients.

    Args:
        dtype: of the parameters and the computation. The file contains float16, so models in
            float32 and float64 have exactly the same parameters.
        device: of the parameters.
        path: of another file that examples/train_demo_model.py wrote.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if CONFIG_KEY not in metadata:
            raise ValueError(f"{path} has no {CONFIG_KEY!r} metadata, so it is not the demo model")
        config = DemoConfig.from_json(metadata[CONFIG_KEY])
        names: list[str] = file.keys()
        tensors = {name: file.get_tensor(name).to(dtype) for name in names}
    with torch.device("meta"):
        model = DemoModel(config)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).requires_grad_(False).eval()
