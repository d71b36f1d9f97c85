"""Random numbers that are a pure function of (seed, place): Philox 4x32-10 (Salmon et al. 2011, Random123).

The same bits on any device, in any order, and hence after a resume. Triton's `tl.randint4x` is the same function.
"""

import torch

LOW = 0xFFFFFFFF


def philox(counter: list, key: tuple[int, int]) -> list[torch.Tensor]:
    """Four words of a counter (int64 tensors or numbers that hold 32 bits each) -> four words, int64 of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits; that int64 wraps around leaves them as they are
        c0, c1, c2, c3 = (b >> 32 & LOW) ^ c1 ^ k0, b & LOW, (a >> 32 & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return [c0, c1, c2, c3]


def uniforms(seed: int, shape: torch.Size, device: torch.device | None = None) -> torch.Tensor:
    """float32 in [0, 1), multiples of 2^-24, in the order of a contiguous tensor of `shape`."""
    count = shape.numel()
    place = torch.arange(-(-count // 4), device=device)
    zero = torch.zeros_like(place)
    words = philox([place, zero, zero, zero], (seed & LOW, seed >> 32 & LOW))
    return (torch.stack(words, -1).flatten()[:count] >> 8).view(shape) * 2.0**-24
