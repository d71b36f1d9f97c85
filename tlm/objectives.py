"""What the model is asked: masked language modelling, classification, and the paper's joint loss.

An external micro-batch is plain masked LM; a task micro-batch is (rho2 * mlm + task) / (rho2 + 1) (arXiv 2111.04130,
equation 1 and its code). Losses are normalised over the whole optimizer step and over all processes: masks depend on
nothing but (seed, place in the stream), so every process knows every denominator without asking. Hence 4 micro-batches
of 8 give what one of 32 gives, and 2 processes what one gives. A loss whose weight is zero is not computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tlm.batches import IGNORE, Batch, pack
from tlm.cross_entropy import cross_entropy_sum
from tlm.mixture import TASK, MicroBatch, uniforms
from tlm.model import ModelShape, training_flops


@dataclass(frozen=True)
class Masking:
    """BERT's masking (Devlin et al. 2019): of `rate` of the tokens 80% become [MASK], 10% a random token, 10% stay.

    Ids below `ordinary` are special and never chosen.
    """

    rate: float
    vocabulary: int
    ordinary: int
    mask_id: int
    seed: int
    task_rate: float | None = None  # of the task's texts, where it is another

    def rate_of(self, source: str) -> float:
        return self.rate if source != TASK or self.task_rate is None else self.task_rate

    def __call__(self, tokens: np.ndarray, source: str, position: int) -> tuple[np.ndarray, np.ndarray]:
        """One example, int[n], at `position` of its source's stream -> inputs and targets (or IGNORE), int64[n].

        At least one token is chosen, so that no example is computed for nothing.
        """
        n = np.arange(len(tokens))
        choose, replace, random = (uniforms(self.seed, f"{source}/{what}", position, n) for what in "abc")
        choose[tokens < self.ordinary] = 2.0
        chosen = choose < max(self.rate_of(source), np.nextafter(choose.min(), 1.5))
        inputs = tokens.astype(np.int64)
        targets = np.where(chosen, inputs, IGNORE)
        inputs[chosen & (replace < 0.8)] = self.mask_id
        swapped = chosen & (replace >= 0.9)
        inputs[swapped] = self.ordinary + (random[swapped] * (self.vocabulary - self.ordinary)).astype(np.int64)
        return inputs, targets


@dataclass(frozen=True)
class Mixup:
    """Mixup of texts' states (Zhang et al. 2018, arXiv 1710.09412; Verma et al. 2019, arXiv 1806.05236): what is
    classified is `share` of a text and the rest of the next, and so are their labels, share ~ Beta(alpha, alpha), at
    least a half. A text and the next are a pair, each mixed with the other; pairs are never parted.
    """

    alpha: float
    seed: int

    def __call__(self, source: str, positions: np.ndarray) -> np.ndarray:
        """Shares of the texts at int[n] places of the source's stream: float32[n]."""
        from scipy.special import betaincinv

        drawn = [uniforms(self.seed, f"{source}/mixup", int(position), np.zeros(1, int))[0] for position in positions]
        share = betaincinv(self.alpha, self.alpha, np.array(drawn))
        return np.maximum(share, 1 - share).astype(np.float32)


@dataclass(frozen=True)
class Source:
    """Examples of one kind. `sequence(i)`: int[n] tokens with [CLS] and [SEP]; `labels`: int64[size] of a task."""

    sequence: Callable[[int], np.ndarray]
    lengths: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, examples: np.ndarray) -> "Source":
        """Some of the examples, int[m]; of a source without labels."""
        return Source(lambda i: self.sequence(examples[i]), self.lengths[examples])


@dataclass(frozen=True)
class Weighted:
    """A packed micro-batch and what its loss sums are multiplied by (0.0: that loss is off and not computed)."""

    source: str
    batch: Batch
    mlm: float
    task: float


@dataclass(frozen=True)
class Objective:
    """Turns a step's micro-batches into packed batches with loss weights; one a stage. `masking` None: no MLM."""

    sources: dict[str, Source]
    mlm_weight: float
    masking: Masking | None
    hiding: Masking | None = None  # where masked LM is off: tokens that are hidden all the same
    offsets: torch.Tensor | None = None  # added to the classification's logits in training, float32[labels]
    mixup: Mixup | None = None

    def step(
        self, micros: list[MicroBatch], rank: int = 0, world: int = 1, most_tokens: int | None = None
    ) -> list[Weighted]:
        """The share of `rank`, in parts of about `most_tokens` tokens: summed over
        parts and ranks, weight x loss sum is the step's joint loss.

        That is the mean over the step's micro-batches, where each term is a mean over all examples (or masked tokens)
        that the step's micro-batches of that source hold.
        """
        rho2 = self.mlm_weight if self.masking else 0.0
        examples = [self.examples(micro) for micro in micros]
        result = []
        for micro, pairs in zip(micros, examples, strict=True):
            same = [other for m, other in zip(micros, examples, strict=True) if m.source == micro.source]
            share = len(same) / len(micros)
            masked = sum((targets != IGNORE).sum() for group in same for _, targets in group if targets is not None)
            is_task = micro.source == TASK
            mlm_share = share * rho2 / (rho2 + 1) if is_task else share
            mlm_weight = float(mlm_share / masked) if masked else 0.0
            task_weight = share / (rho2 + 1) / sum(map(len, same)) if is_task else 0.0
            labels = self.sources[TASK].labels[micro.examples] if is_task else None
            mixup = self.mixup if is_task else None
            lengths = [len(inputs) for inputs, _ in pairs]
            for part in parts(lengths, rank, world, most_tokens, self.together if is_task else 1):
                inputs, targets = zip(*(pairs[i] for i in part), strict=True)
                batch = pack(
                    inputs,
                    targets if targets[0] is not None else None,
                    labels[part] if is_task else None,
                    shares=mixup(micro.source, micro.positions[part]) if mixup else None,
                )
                result.append(Weighted(micro.source, batch, mlm_weight, task_weight))
        return result

    @property
    def rate(self) -> float:
        """Largest share of a text's tokens that a language-model head is to predict."""
        return max(map(self.masking.rate_of, self.sources)) if self.masking else 0.0

    @property
    def together(self) -> int:
        """Texts that no process or part of a batch divides."""
        return 2 if self.mixup else 1

    def flops(self, source: str, shape: ModelShape) -> float:
        """Of forward and backward of all its examples."""
        examples, rate = self.sources[source], self.masking.rate_of(source) if self.masked(source) else 0.0
        masked, classified = rate * examples.lengths.sum(), (source == TASK) * len(examples)
        return training_flops(shape, examples.lengths, masked, classified)

    def losses(self, model: nn.Module) -> nn.Module:
        return Losses(model, self.offsets)

    def masked(self, source: str) -> bool:
        """Whether masked LM is asked of it."""
        return self.masking is not None and not (source == TASK and self.mlm_weight == 0)

    def examples(self, micro: MicroBatch) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(inputs, targets) of each example of a micro-batch; targets None where masked LM is off."""
        sequence = self.sources[micro.source].sequence
        pairs = zip(micro.examples, micro.positions, strict=True)
        if self.masked(micro.source):
            return [self.masking(sequence(i), micro.source, position) for i, position in pairs]
        if self.hiding:
            return [(self.hiding(sequence(i), micro.source, position)[0], None) for i, position in pairs]
        return [(sequence(i), None) for i in micro.examples]


def parts(lengths: list[int], rank: int, world: int, most_tokens: int | None, together: int = 1) -> list[np.ndarray]:
    """The examples of `rank`, every world-th, in as few parts as keep each rank's within `most_tokens` tokens; as many
    for each rank, since some engines meet after each part. At least one example a part: one may be too long. Where
    so many stand `together`, all this is said of groups of them."""
    group = np.arange(len(lengths)) // together  # of each example
    shares = [np.arange(r, -(-len(lengths) // together), world) for r in range(world)]
    sizes, count = np.bincount(group, lengths), 1

    def fit(share: np.ndarray) -> bool:
        return all(sizes[part].sum() <= most_tokens for part in np.array_split(share, count))

    while most_tokens and count < len(shares[-1]) and not all(map(fit, shares)):
        count += 1
    return [np.flatnonzero(np.isin(group, part)) for part in np.array_split(shares[rank], count)]


class Losses(nn.Module):
    """The module that DeepSpeed wraps: a batch -> (sum of masked-LM losses, sum of task losses), None where off."""

    def __init__(self, model: nn.Module, offsets: torch.Tensor | None = None):
        super().__init__()
        self.model = model
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, batch: Batch, mlm: bool, task: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden_TD = self.model(batch)
        mlm_sum = task_sum = None
        if mlm:
            mlm_sum = self.model.mlm_loss_sum(hidden_TD[batch.masked], batch.masked_tokens)
        if task:
            logits_NC, targets = self.classified(hidden_TD, batch)
            if self.offsets is not None:
                logits_NC = logits_NC + self.offsets
            task_sum = cross_entropy_sum(logits_NC, targets)
        return mlm_sum, task_sum

    def classified(self, hidden_TD: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, C], and labels [N]; or, where states are mixed, the labels' shares [N, C]."""
        if batch.shares is None:
            return self.model.classify(hidden_TD, batch), batch.labels
        order = torch.arange(len(batch), device=hidden_TD.device)
        pair = (order ^ 1).clamp(max=len(batch) - 1)  # the last of an odd number is its own
        states_ND, own_N1 = self.model.pooled(hidden_TD, batch), batch.shares[:, None].to(hidden_TD.dtype)
        labels_NC = F.one_hot(batch.labels, self.model.shape.num_labels).to(own_N1.dtype)
        states_ND, labels_NC = (own_N1 * x + (1 - own_N1) * x[pair] for x in (states_ND, labels_NC))
        return self.model.classifier(self.model.head(states_ND)), labels_NC
