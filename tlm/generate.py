"""Greedy generation: prompts are read once, then a token of every answer at a time beside remembered keys and values.

`generate_slowly`, which reads everything again for each token, is the twin.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from tlm.attention import Rotate
from tlm.batches import Batch, pack
from tlm.evaluate import batches_by_length
from tlm.model import Transformer
from tlm.tokenizer import SEP


class Memory:
    """In the place of a layer's attention: of the first batch it keeps keys and values, [N, H, tokens, D], and every
    later one holds one more token of each of the N sequences."""

    def __init__(self, attend, more: int):
        self.attend, self.more = attend, more
        self.keys = self.values = self.lengths = None

    def __call__(self, qkv: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        query, key, value = Rotate.apply(qkv, cos, sin)
        if self.keys is None:
            self.lengths = batch.borders.diff().long()
            sequence = torch.repeat_interleave(torch.arange(len(batch)), self.lengths)
            shape = len(batch), int(self.lengths.max()) + self.more, *key.shape[1:]
            self.keys, self.values = key.new_zeros(shape), key.new_zeros(shape)
            self.keys[sequence, batch.positions], self.values[sequence, batch.positions] = key, value
            return self.attend(qkv, batch, cos, sin)
        rows = torch.arange(len(batch))
        self.keys[rows, self.lengths], self.values[rows, self.lengths] = key, value
        self.lengths = self.lengths + 1
        mask = (torch.arange(self.keys.shape[1]) < self.lengths[:, None])[:, None, None]
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, mask).flatten(1)


@contextmanager
def remembering(model: Transformer, more: int):
    layers = [layer.attn for layer in model.model.layers]
    before = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = Memory(layer.attend, more)
    try:
        yield
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """What `model`, in evaluation mode on a CPU, says after each prompt, int64[p]: at most `most` tokens, without the
    [SEP] that ends them."""
    result: list[np.ndarray] = [np.zeros(0, np.int64)] * len(prompts)
    for part in batches_by_length(np.array([len(prompt) for prompt in prompts])):
        batch = pack([prompts[i] for i in part])
        said = []
        with remembering(model, most):
            states = model(batch)[batch.borders[1:].long() - 1]
            positions, ended = batch.borders.diff().long(), torch.zeros(len(part), dtype=torch.bool)
            while True:
                tokens = model.mlm_logits(states)[: len(part)].argmax(-1)
                said.append(tokens)
                ended |= tokens == SEP
                if ended.all() or len(said) == most:
                    break
                states = model(one_each(tokens, positions))
                positions = positions + 1
        for i, row in zip(part, torch.stack(said, 1)[batch.slots].numpy(), strict=True):
            result[i] = until_end(row)
    return result


def one_each(tokens: torch.Tensor, positions: torch.Tensor) -> Batch:
    """A batch of one more token of each sequence."""
    number = len(tokens)
    return replace(pack([np.zeros(1, np.int64)] * number), tokens=tokens, positions=positions)


@torch.no_grad()
def generate_slowly(model: Transformer, prompts: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    result = []
    for prompt in prompts:
        said: list[int] = []
        while len(said) < most and (not said or said[-1] != SEP):
            batch = pack([np.append(prompt, said).astype(np.int64)], answers=[(len(said),) if said else ()])
            said.append(int(model.mlm_logits(model(batch)[-1:])[0].argmax()))
        result.append(until_end(np.array(said)))
    return result


def until_end(tokens: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(tokens == SEP)
    return tokens[: ends[0]] if len(ends) else tokens
