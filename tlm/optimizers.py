"""Muon for the layers' matrices and AdamW for everything else, as the one optimizer that DeepSpeed drives.

Muon (Jordan et al. 2024) replaces a matrix's momentum by its nearest orthogonal matrix, by a Newton-Schulz iteration.
At the small batches and few steps of a TLM run it lowers the masked-LM loss most at equal tokens (measured). Matrices
of one shape are orthogonalised as one batch: on a CPU many small products cost more than one large. AdamW with 8-bit
moments (Dettmers et al. 2022), where memory is short, is our own kernel on a CPU and bitsandbytes' on a GPU.
"""

import logging
import math

import torch
from torch import distributed, nn
from torch.optim._functional import adamw

from tasks.errors import InputError
from tlm.lowbit.cpu import adamw8bit as eight_bits
from tlm.precision import products

BETAS = (0.9, 0.98)  # of every AdamW here
# Coefficients of the quintic iteration (Jordan et al. 2024): steepest at zero, so that five steps are enough.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
CACHED = 2**18  # numbers: 1 MB


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[..., m, n] -> about U V^T of each matrix's SVD (singular values between 0.7 and 1.2)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    flat = wide.reshape(-1, *wide.shape[-2:])
    flat = flat / (flat.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    iterate = by_gram if is_wide(*wide.shape[-2:]) else by_matrix
    at_once = len(flat) if flat.is_cuda else max(1, CACHED // flat[0].numel())
    blocks = flat.split(at_once)  # on a CPU all steps of what fits into the cache, then the next
    x = torch.cat([iterate(block, steps) for block in blocks]).view(wide.shape)
    return x.mT if tall else x


def is_wide(m: int, n: int) -> bool:
    """Whether `by_gram` takes fewer operations."""
    return n > 1.5 * m


def by_matrix(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Each step is x <- p(x x^T) x."""
    for _ in range(steps):
        x = polynomial(x @ x.mT) @ x
    return x


def by_gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The same with all steps on the Gram matrix, and x read at both ends alone: polynomials of one matrix commute, so
    that a step is gram <- p gram p, and what comes of x is (p_k ... p_1) x.

    In float32: what a rounded Gram matrix loses, small singular values would get back 500 times.
    """
    with products("fp32", x.device, x.shape[-1]):
        gram, whole = x @ x.mT, None
        for step in range(steps):
            p = polynomial(gram)
            whole = p if whole is None else p @ whole
            if step < steps - 1:
                gram = p @ (p @ gram)
        return whole @ x


def polynomial(gram: torch.Tensor) -> torch.Tensor:
    """p(gram) = a + b gram + c gram^2."""
    a, b, c = NEWTON_SCHULZ
    p = (gram @ gram).mul_(c).add_(gram, alpha=b)
    p.diagonal(dim1=-2, dim2=-1).add_(a)
    return p


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices; the others are given to AdamW. `lr` is set from outside before each step.

    The update of an m x n matrix is scaled by sqrt(max(1, m / n)); weight decay is decoupled. `parts` is how many
    matrices stand on top of each other in one parameter, `rows` x `columns` the size of the blocks that it is cut into
    (None: a part is a block). Each block is orthogonalised by itself. Under ZeRO 1 and 2 a group has one parameter, a
    flat piece of its matrices, end to end; `shape` is that of each.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, betas=BETAS, eps: float = 1e-8):
        super().__init__(
            groups,
            dict(
                lr=0.0,
                muon=False,
                shape=None,
                parts=1,
                rows=None,
                columns=None,
                momentum=momentum,
                betas=betas,
                eps=eps,
                weight_decay=0.0,
            ),
        )

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (muon_step if group["muon"] else adamw_step)(parameters, group, self.state)


def muon_step(parameters: list[torch.Tensor], group: dict, state: dict) -> None:
    """All matrices of a group have one shape. Nesterov momentum, then one batched orthogonalisation."""
    for p in parameters:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    buffers, grads = [state[p]["momentum_buffer"] for p in parameters], [p.grad for p in parameters]
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    directions = torch._foreach_lerp(grads, buffers, group["momentum"])
    if directions[0].ndim == 1:
        updates = [update_of_piece(piece, group) for piece in directions]
    else:
        updates = list(update_of(torch.stack(directions), group).unbind(0))
    torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def update_of(directions: torch.Tensor, group: dict) -> torch.Tensor:
    """[matrices, m, n] -> the same, each block orthogonalised, and scaled."""
    m, n = directions.shape[1] // group["parts"], directions.shape[2]
    blocks = directions.unflatten(2, (-1, group["columns"] or n)).unflatten(1, (-1, group["rows"] or m))
    return orthogonalise(blocks.transpose(2, 3)).transpose(2, 3).reshape(directions.shape) * max(1.0, m / n) ** 0.5


def update_of_piece(piece: torch.Tensor, group: dict) -> torch.Tensor:
    """The same for flat pieces, of one length, of all processes: end to end they are the group's matrices, and padding.

    Whole matrices live for the time of this step alone, and a process orthogonalises those that it has a part of.
    """
    size, width = math.prod(group["shape"]), len(piece)
    total = distributed.get_world_size() * width
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else piece.device
    whole = piece.new_zeros(-(-total // size) * size, device=device)
    distributed.all_gather(list(whole[:total].split(width)), piece.to(device))  # pieces that are offloaded come back
    start = distributed.get_rank() * width
    first, last = start // size, -(-(start + width) // size)
    updates = update_of(whole.view(-1, *group["shape"])[first:last], group)
    return updates.flatten()[start - first * size :][:width].to(piece.device)


def adamw_step(parameters: list[torch.Tensor], group: dict, state: dict) -> None:
    """AdamW (Loshchilov & Hutter 2019) by torch's fused kernel: one pass over memory."""
    for p in parameters:
        if "exp_avg" not in state[p]:
            state[p].update(
                step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
            )
    adamw(
        parameters,
        [p.grad for p in parameters],
        *([state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")),
        [],
        [state[p]["step"] for p in parameters],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


# A layer's matrices: how many stand on top of each other in one parameter (q, k and v; gate and value), and along which
# dimension its neurons lie: as outputs in what reads the stream, as inputs in what writes to it.
PARTS = {"Wqkv": 3, "Wi": 2, "Wo": 1}
NEURONS = {"Wqkv": 0, "Wi": 0, "Wo": 1}
BLOCK = 64  # neurons that Muon orthogonalises together


def parameter_groups(model: nn.Module, optimizer: str, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: the layers' matrices by shape, then other dense matrices, then what has no decay.

    Decay goes to matrices alone: embeddings of rare words, norms and biases it would only pull towards zero. `rate`
    of a group is the stage's learning rate that it follows, "matrix_lr" or "lr".
    """
    matrices: dict[tuple, list] = {}
    dense, embeddings, rest = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = name.split(".")[-2] if "." in name else ""
        if ".layers." in name and p.ndim == 2 and kind in PARTS:
            matrices.setdefault((kind, tuple(p.shape)), []).append(p)
        elif p.ndim == 2 and ".embeddings." not in f".{name}":
            dense.append(p)
        elif p.ndim == 2:
            embeddings.append(p)
        else:
            rest.append(p)
    muon = optimizer == "muon"
    groups = [
        dict(params=group, muon=muon, weight_decay=weight_decay, rate="matrix_lr" if muon else "lr", shape=shape)
        | cut(kind, shape)
        for (kind, shape), group in matrices.items()
    ]
    groups.append(dict(params=dense, muon=False, weight_decay=weight_decay, rate="lr"))
    groups.append(dict(params=embeddings, muon=False, weight_decay=0.0, rate="embedding_lr"))
    groups.append(dict(params=rest, muon=False, weight_decay=0.0, rate="lr"))
    return [g for g in groups if g["params"]]


def cut(kind: str, shape: tuple[int, int]) -> dict[str, int]:
    """How Muon cuts a matrix: into blocks of BLOCK neurons, or of as many as divide both.

    Whole matrices would cost a quarter of a step of 2,048 tokens at hidden 256. The masked-LM loss is the same: 4.56
    over the last 100 of 500 steps (hidden 128, 2,000 tokens a step), 6.30 against 6.35 over the first 100.
    """
    neurons = shape[NEURONS[kind]] // PARTS[kind]
    return {"parts": PARTS[kind], ("rows", "columns")[NEURONS[kind]]: math.gcd(neurons, BLOCK)}


def build_optimizer(model: nn.Module, optimizer: str, weight_decay: float) -> torch.optim.Optimizer:
    """muon, adamw or adamw8bit over all parameters of `model`. Raises InputError if a GPU's bitsandbytes is missing."""
    groups = parameter_groups(model, optimizer, weight_decay)
    if optimizer != "adamw8bit":
        return Muon(groups)
    if next(model.parameters()).is_cuda:
        return bitsandbytes_adamw8bit()(groups, lr=0.0, betas=BETAS)
    return AdamW8bit(groups)


class AdamW8bit(torch.optim.Optimizer):
    """Moments in 8 bits by blocks of 256; parameters of fewer than 4,096 elements keep 32 bits, by torch's kernel.

    Under ZeRO the blocks are cut from flat pieces of many parameters, so that losses differ a little between stages.
    """

    def __init__(self, groups: list[dict], betas=BETAS, eps: float = 1e-8):
        super().__init__(groups, dict(lr=0.0, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if small := [p for p in parameters if p.numel() < eight_bits.SMALLEST]:
                adamw_step(small, group, self.state)
            for p in parameters:
                if p.numel() < eight_bits.SMALLEST:
                    continue
                if "exp_avg" not in self.state[p]:
                    self.state[p].update(step=torch.zeros(()), **eight_bits.new_state(p))
                state = self.state[p]
                state["step"] += 1
                rates = eight_bits.Rates(
                    group["lr"], group["betas"], group["eps"], group["weight_decay"], int(state["step"])
                )
                eight_bits.step(p, p.grad, state, rates)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # turns all it finds into the parameters' type, bytes too
        for state in self.state.values():
            if "exp_avg_scales" in state:
                state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].byte(), state["exp_avg_sq"].byte()


def bitsandbytes_adamw8bit() -> type[torch.optim.Optimizer]:
    """The same by bitsandbytes, whose CPU version takes many times as long."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of 4-bit kernels that nothing here uses
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "optimizer=adamw8bit: on a GPU it is that of bitsandbytes, which is missing; pip install 'tlm[lowbit]'"
        ) from None
    return AdamW8bit


def muon_flops(hidden: int, intermediate: int, layers: int, steps: int = 5) -> int:
    """FLOPs of one orthogonalisation of all layers' matrices, the products with and of each block's Gram matrix."""
    total = 0
    for neurons, times in ((hidden, 4), (intermediate, 3)):  # q, k, v and attention's output; gate, value and output
        block = math.gcd(neurons, BLOCK)
        small, large = sorted((block, hidden))
        if is_wide(small, large):
            of_block = 4 * small * small * large + (8 * steps - 6) * small**3
        else:
            of_block = steps * (4 * small * small * large + 2 * small**3)
        total += times * neurons // block * of_block
    return layers * total


def schedule(kind: str, step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`: linear warm-up, then by `kind`.

    linear and cosine fall to 0 over all that is left; trapezoid (Zhai et al. 2022, as 1-linear) over the last 60%.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    left = (steps - step) / max(1, steps - warm)
    if kind == "linear":
        return left
    if kind == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    if kind == "trapezoid":
        return min(1.0, left / 0.6)
    return 1.0
