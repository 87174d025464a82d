"""RWKV: embedding -> blocks -> head.

Takes the operators (ops.dispatch.Ops) as an argument and knows nothing of backends or adapters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .arch import ARCHS, STATE_NAME, Geometry, state_shapes
from .layers import LayerNorm, Linear
from .state import BlockState, SeqBounds

# version -> its module: rwkv7 for "v7"
VERSIONS = {arch.version: importlib.import_module(f".rwkv{arch.number[1:]}", __package__) for arch in ARCHS.values()}


class Embedding(nn.Module):
    """The embedding.

    Attributes:
        on_host: It stays in the host's memory, wherever the model goes; only the rows that are asked for are copied. It
            cannot be trained then.
    """

    def __init__(self, vocabulary: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, channels))
        self.on_host = False

    def forward(self, ids: Tensor, dtype, device) -> Tensor:
        """ids: [T]; best on the host if the weight is there: the host would wait for them."""
        if not self.on_host:
            return F.embedding(ids, self.weight).to(dtype)
        rows = self.weight.new_empty(len(ids), self.weight.shape[1], pin_memory=torch.device(device).type == "cuda")
        torch.index_select(self.weight.detach(), 0, ids.cpu(), out=rows)
        return rows.to(device, non_blocking=True).to(dtype)

    def _apply(self, function, recurse: bool = True):
        return self if self.on_host else super()._apply(function, recurse)


class Block(nn.Module):
    """A block: time mix and channel mix, each after a layer norm."""

    def __init__(self, geometry: Geometry, layer: int, ops):
        super().__init__()
        version = VERSIONS[geometry.version]
        if layer == 0:
            self.ln0 = LayerNorm(geometry.n_embd)
        self.ln1, self.ln2 = LayerNorm(geometry.n_embd), LayerNorm(geometry.n_embd)
        self.att, self.ffn = version.TimeMix(geometry, layer, ops), version.ChannelMix(geometry, ops)

    def forward(self, x: Tensor, v_first: Tensor | None, bounds: SeqBounds, *state: Tensor):
        """Returns x, v_first and the block's new state as three tensors (plain tensors, so that it can be checkpointed)."""
        att_x, wkv, ffn_x = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, v_first, att_x, wkv = self.att(self.norm(self.ln1, x), v_first, att_x, wkv, bounds)
        x = x + y
        y, ffn_x = self.ffn(self.norm(self.ln2, x), ffn_x, bounds)
        return x + y, v_first, *BlockState(att_x, wkv, ffn_x).tensors()

    def norm(self, layer: LayerNorm, x: Tensor) -> Tensor:
        """Return a layer norm of x, computed by the backend."""
        return self.att.ops.layer_norm(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

    def learnt_state(self) -> dict[str, nn.Parameter]:
        """What state tuning has put here, by the name of its field in BlockState; empty without."""
        places = {"wkv": (self.att, "time_state"), "att_x": (self.att, "ts_state"), "ffn_x": (self.ffn, "ts_state")}
        return {field: getattr(module, leaf) for field, (module, leaf) in places.items() if hasattr(module, leaf)}


class RWKV(nn.Module):
    """An RWKV model.

    Args:
        geometry: Its sizes.
        ops: What it computes with.
        dtype: Of activations; weights keep theirs.
        recompute: What the backward pass recomputes instead of keeping it: "nothing"; "cheap": what costs next to no
            time (norms, token shifts, the squared ReLU); "blocks": all but each block's input (least memory, a third
            more work).
    """

    def __init__(self, geometry: Geometry, ops, dtype: torch.dtype = torch.float32, recompute: str = "nothing"):
        super().__init__()
        self.geometry, self.ops, self.dtype, self.recompute = geometry, ops, dtype, recompute
        self.emb = Embedding(geometry.vocab_size, geometry.n_embd)
        self.blocks = nn.ModuleList(Block(geometry, i, ops) for i in range(geometry.n_layer))
        self.ln_out = LayerNorm(geometry.n_embd)
        self.head = Linear(geometry.n_embd, geometry.vocab_size)
        # takes the place of `through` for whole texts: see train/cuda_graphs.py
        self.replay: Callable[[Tensor, SeqBounds], Tensor] | None = None
        self.one_token = None  # takes the place of the blocks where a single token goes through: see for_generating
        for module in self.modules():
            if isinstance(module, Linear):
                module.product = ops.linear

    def head_weight(self) -> Tensor:
        """The head's matrix [V, C] for the loss: a trained one in its own precision, a compressed one made dense."""
        return self.head.weight if isinstance(self.head, Linear) else self.head.dense(self.dtype)

    def first_state(self, sequences: int) -> list[BlockState]:
        """Return the state before a text's first token, for every sequence: zero, or what state tuning has learnt.

        Blocks share the zeros: many short sequences would fill the memory with them.
        """
        like = torch.empty(0, dtype=self.dtype, device=self.ln_out.weight.device)
        zero, states = BlockState.zeros(sequences, self.geometry.n_head, self.geometry.head_size, like), []
        for block in self.blocks:
            state = BlockState(*zero.tensors())
            assert isinstance(block, Block)
            for field, learnt in block.learnt_state().items():
                like = getattr(state, field)
                setattr(state, field, learnt.to(like.dtype).expand_as(like))
            states.append(state)
        return states

    def features(
        self,
        ids: Tensor,
        state: Sequence[BlockState] | None = None,
        cu_seqlens: Sequence[int] | None = None,
        carry: bool = True,
    ) -> tuple[Tensor, list[BlockState]]:
        """Ids -> what the head reads, and the state after each sequence.

        ids: int64 [B, T]. state: one BlockState per block, for S sequences; None is first_state. cu_seqlens: [S + 1]
        integers, with B = 1: several sequences in one row. Without it every row is a sequence (S = B). carry: whether the state
        after the sequences is wanted; memory holds none of them otherwise.
        Returns [B, T, C] after ln_out, and the new state.
        """
        batch, tokens = ids.shape
        if cu_seqlens is None:
            cu_seqlens = range(0, batch * tokens + 1, tokens)
        device = self.ln_out.weight.device
        bounds = SeqBounds(tuple(cu_seqlens), device)
        x = self.emb(ids.reshape(-1), self.dtype, device)
        if self.one_token and batch * tokens == 1 and not torch.is_grad_enabled():
            state = self.first_state(len(bounds)) if state is None else state
            x, after = self.one_token(self.blocks[0].ln0(x), [before.tensors() for before in state])
            return self.ln_out(x).view(1, 1, -1), [BlockState(*tensors) for tensors in after]
        if self.replay and state is None and not carry and torch.is_grad_enabled():
            return self.replay(x, bounds).view(batch, tokens, -1), []
        x, after = self.through(x, state, bounds, carry)
        return x.view(batch, tokens, -1), after

    def through(
        self, x: Tensor, state: Sequence[BlockState] | None, bounds: SeqBounds, carry: bool
    ) -> tuple[Tensor, list[BlockState]]:
        """What features does behind the embedding. x: [T, C]. Returns [T, C] after ln_out, and the new state if it is wanted."""
        state = self.first_state(len(bounds)) if state is None else state
        v_first, after = None, []
        for block, before in zip(self.blocks, state, strict=True):
            if not torch.is_grad_enabled() or self.recompute == "nothing":
                x, v_first, *new = block(x, v_first, bounds, *before.tensors())
            elif self.recompute == "cheap":
                with self.ops.recomputing():
                    x, v_first, *new = block(x, v_first, bounds, *before.tensors())
            else:
                x, v_first, *new = checkpoint(block, x, v_first, bounds, *before.tensors(), use_reentrant=False)
            if carry:
                after.append(BlockState(*new))
            del new
        return self.ln_out(x), after

    def forward(self, ids, state=None, cu_seqlens=None) -> tuple[Tensor, list[BlockState]]:
        """Logits [B, T, V] and the state after each sequence; arguments as in `features`."""
        x, state = self.features(ids, state, cu_seqlens)
        return self.head(x), state


def skeleton(geometry: Geometry, ops, dtype: torch.dtype = torch.float32, recompute: str = "nothing") -> RWKV:
    """A model without weights (on the meta device): every name and shape, and no memory."""
    with torch.device("meta"):
        return RWKV(geometry, ops, dtype, recompute)


def build(
    geometry: Geometry,
    tensors: Mapping[str, Tensor],
    ops,
    dtype: torch.dtype = torch.float32,
    recompute: str = "nothing",
    keep: torch.dtype | None = None,
) -> RWKV:
    """A model with the weights of a file, made without random numbers first: mapped tensors go straight in.

    tensors: name -> tensor (may be mapped from the disk; never written to); a learnt state in them is begun from.
    keep: dtype that the weights are kept in; None leaves each as it is in the file.
    """
    model = skeleton(geometry, ops, dtype, recompute)
    names = set(model.state_dict())
    weights = {n: t if keep is None else t.to(keep) for n, t in tensors.items() if n in names}
    model.load_state_dict(weights, strict=True, assign=True)
    set_state(model, {n: t for n, t in tensors.items() if STATE_NAME.fullmatch(n)})
    return model


def for_generating(model: RWKV) -> RWKV:
    """Prepare a model for generation: nothing is left to convert at each token.

    Large matrices stay as narrow as in their file where the product reads them so: the time goes into reading them, and
    the sums are the same.
    """
    for module in model.modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            narrow = isinstance(module, (Linear, Embedding)) and weight.dtype in model.ops.reads
            keep = weight.dtype if narrow or leaf.endswith("_state") else model.dtype
            setattr(module, leaf, nn.Parameter(weight.detach().to(keep), requires_grad=False))
    model.one_token = model.ops.decode_step(model)
    return model.eval()


def set_state(model: RWKV, tensors: Mapping[str, Tensor]) -> None:
    """Give blocks a learnt state to begin from, float32, by the names of arch.STATE."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.detach().float()))


def fresh_state(geometry: Geometry, shifts: bool) -> dict[str, Tensor]:
    """A zero state to be learnt, by names. shifts: the token shifts, too."""
    wanted = {name: shape for name, shape in state_shapes(geometry).items() if shifts or name.endswith("time_state")}
    return {name: torch.zeros(shape) for name, shape in wanted.items()}
