"""The time that collectives take between GPUs: nodes joined by NVLink, a network with a port for each GPU.

A ring passes each byte over every link of its node and, port by port, over the network: with g GPUs of each of N nodes
in a group, M bytes are gathered (or reduced and scattered) in

    max(M (n - 1) / n / NVLink, M (N - 1) / N / (g * port))  +  a hop for each of n - 1 steps

Hops are those of NCCL's own tuning model (src/graph/tuning.cc, rings and trees), for its two protocols of large
messages, Simple and LL128, which sends 120 of 128 bytes; the quicker one is taken, as NCCL does. Links reach `share` of
what their vendors state: an assumption, in the range that NCCL's tests are usually seen to print.
"""

from dataclasses import dataclass
from math import comb

# (hop inside a node, hop over the network, start, share of the bytes), seconds.
RING = ((3.4e-6, 14.0e-6, 8.4e-6, 1.0), (1.9e-6, 4.0e-6, 14.0e-6, 120 / 128))
TREE = ((4.0e-6, 14.0e-6, 8.4e-6, 1.0), (1.25e-6, 8.5e-6, 14.0e-6, 120 / 128))
PEER = 1e-6  # seconds for each partner in an all-to-all: an assumption


@dataclass(frozen=True)
class Network:
    """`nvlink`, `port`: bytes/s that a GPU sends in its node and over the network, by data sheet."""

    node: int = 8
    nvlink: float = 450e9  # H100 SXM: NVLink 4, 900 GB/s both ways
    port: float = 50e9  # InfiniBand NDR, 400 Gb/s a GPU
    share: float = 0.8

    def __post_init__(self):
        for name in ("node", "nvlink", "port", "share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.share > 1:
            raise ValueError(f"share={self.share} of the links' bandwidth must lie in (0, 1]")

    def _members(self, ranks, stride):
        """(GPUs of a group in one node, nodes) of `ranks` ranks that lie `stride` apart."""
        local = min(ranks, max(1, self.node // stride))
        return local, -(-ranks // local)

    def _bandwidth_seconds(self, size, ranks, stride):
        local, nodes = self._members(ranks, stride)
        inside = size * (ranks - 1) / ranks / (self.nvlink * self.share) if local > 1 else 0.0
        return max(inside, size * (nodes - 1) / nodes / (local * self.port * self.share))

    def ring(self, size, ranks, stride=1):
        """Seconds in which `size` bytes are gathered by `ranks` ranks, or reduced and scattered."""
        if ranks == 1 or not size:
            return 0.0
        nodes, plain = self._members(ranks, stride)[1], self._bandwidth_seconds(size, ranks, stride)
        return min(start + (ranks - nodes) * near + (nodes - 1) * far + plain / share
                   for near, far, start, share in RING)  # fmt: skip

    def all_reduce(self, size, ranks, stride=1, bucket=25 * 2**20):
        """Seconds for `size` bytes in buckets of `bucket`, by ring or tree."""
        if ranks == 1 or not size:
            return 0.0
        local, nodes = self._members(ranks, stride)
        plain, buckets = 2 * self._bandwidth_seconds(size, ranks, stride), -(-size // bucket)
        depth = (nodes - 1).bit_length()
        ring = [start + 2 * ((ranks - nodes) * near + (nodes - 1) * far) for near, far, start, _ in RING]
        tree = [start + 2 * ((local - 1) * near + depth * far) for near, far, start, _ in TREE]
        return min(plain / protocol[3] + buckets * min(hops)
                   for protocol, hops in zip(RING, zip(ring, tree)))  # fmt: skip

    def all_to_all(self, size, ranks):
        """Seconds in which each of `ranks` neighbours sends `size` bytes to each of the others, straight there."""
        if ranks == 1:
            return 0.0
        local, _ = self._members(ranks, 1)
        near, far = (local - 1) * size / self.nvlink, (ranks - local) * size / self.port
        return max(near, far) / self.share + ranks * PEER


def shares_a_token(config, ranks):
    """The probability that a token has an expert on a given one of `ranks` ranks, which hold equal runs of experts:
    of num_experts_per_tok choices at random among the experts of `topk_group` groups, themselves at random."""
    experts, choices = config.n_routed_experts, config.num_experts_per_tok
    groups, kept = config.n_group or 1, config.topk_group or 1
    size, here = experts // groups, experts // ranks
    touched, each = (1, here) if here <= size else (here // size, size)
    chance = 0.0
    for open_groups in range(max(0, touched - groups + kept), min(touched, kept) + 1):
        weight = _choose(touched, open_groups) * _choose(groups - touched, kept - open_groups) / _choose(groups, kept)
        missed = _choose(kept * size - open_groups * each, choices) / _choose(kept * size, choices)
        chance += weight * (1 - missed)
    return chance


def _choose(total, taken):
    return comb(total, taken) if 0 <= taken <= total else 0
