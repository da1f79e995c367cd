"""Stand-ins for a training engine in tests of the pipeline below verl: plain tensors, cut as an engine cuts them."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from relex_verl.trajectory.shards import Placement, TensorShard, block_placement, whole


def qwen2(
    folder: Path, vocabulary: int, hidden: int, intermediate: int, tied: bool, dtype: torch.dtype, shard_size: str
) -> Path:
    """A checkpoint of a random Qwen2 with two layers and two heads, as transformers writes one, but without its seconds."""
    kv = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in ("model.layers.0", "model.layers.1"):
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (vocabulary, hidden)})
    state = {
        name: (torch.randn(shape) * 0.02 if len(shape) > 1 else torch.full(shape, float("norm" in name))).to(dtype)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=shard_size, metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def tiny_base(folder: Path, tied: bool = False, shard_size: str = "5GB", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny Qwen2 checkpoint."""
    torch.manual_seed(0)
    return qwen2(folder, 64, 128, 192, tied, dtype, shard_size)


class DriftingModel:
    """Every weight drifts along a line of its own, with noise; some tensors never move. Step t is reproducible."""

    def __init__(self, base: dict[str, torch.Tensor], frozen: str = "norm", rate: float = 1e-4) -> None:
        self.base = {name: tensor.float() for name, tensor in base.items()}
        self.frozen, self.rate = frozen, rate

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """The weights after a step, float32."""
        if step == 0:
            return {name: tensor.clone() for name, tensor in self.base.items()}
        weights = {}
        for i, (name, tensor) in enumerate(self.base.items()):
            slope = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1000 * step + i))
            moved = 0.0 if self.frozen in name else self.rate
            weights[name] = tensor + moved * (step * slope + 0.5 * noise)
        return weights


class RankSource:
    """One rank's shards of a model: rows of 2-D tensors, every other one cut by columns; 1-D tensors are replicated."""

    def __init__(self, weights: dict[str, torch.Tensor], rank: int = 0, world: int = 1) -> None:
        self.weights, self.rank, self.world = weights, rank, world

    def __iter__(self) -> Iterator[TensorShard]:
        for i, (name, tensor) in enumerate(self.weights.items()):
            placement = self._placement(tuple(tensor.shape), i)
            flat = tensor.flatten()
            parts = [flat[start : start + length] for _, start, length in placement.runs()]
            yield TensorShard(name, tuple(tensor.shape), placement, torch.cat([flat[:0], *parts]))

    def _placement(self, shape: tuple[int, ...], i: int) -> Placement:
        if len(shape) == 1 or self.world == 1:
            return whole(shape)
        dim = i % 2
        size = -(-shape[dim] // self.world)
        if dim == 1:
            size = (
                -(-size // 64) * 64
            )  # groups of the quantised encodings begin at the same elements on any number of ranks
        start = min(self.rank * size, shape[dim])
        length = min(size, shape[dim] - start)
        local, offset = list(shape), [0, 0]
        local[dim], offset[dim] = length, start
        return block_placement(tuple(local), tuple(offset), shape)
