"""How long collectives take on a cluster: NCCL's own model of itself, with published bandwidths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.scaling.traffic import BUCKETS, Collective

US = 1e-6
PER_NODE = 8  # GPUs
# NCCL's src/graph/tuning.cc: us before the first byte, for a hop over NVLink and for one over the network.
LATENCIES = {
    ("ring", "LL"): (6.6, 0.6, 2.7),
    ("ring", "Simple"): (8.4, 3.4, 14.0),
    ("tree", "LL"): (6.8, 0.6, 5.0),
    ("tree", "Simple"): (8.4, 4.0, 14.0),
}
OVERHEAD = {"LL": 1.0, "Simple": 3.0}  # us that a hop costs at least where the ring leaves the node
LL_SHARE = {"ring": 0.5, "tree": 1 / 3.8}  # of the bandwidth: every word of LL carries a flag
LL_MOST = 87.7, 20.4  # GB/s of LL, in a node and beyond
TREE_SHARE = 0.92


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs; GB/s are bus bandwidths as nccl-tests reports them."""

    name: str
    nvlink: float
    network: float  # of a node

    def seconds(self, call: Collective, processes: int) -> float:
        """Of one collective, by the algorithm and protocol that this model finds fastest."""
        if processes == 1:
            return 0.0
        algorithms = ("ring", "tree") if call.kind == "all_reduce" else ("ring",)
        return min(self._seconds(call, processes, a, p) for a in algorithms for p in ("LL", "Simple"))

    def _seconds(self, call: Collective, processes: int, algorithm: str, protocol: str) -> float:
        nodes = math.ceil(processes / PER_NODE)
        rate = self.nvlink if nodes == 1 else min(self.nvlink, self.network)
        if protocol == "LL":
            rate = min(rate * LL_SHARE[algorithm], LL_MOST[nodes > 1])
        base, near, far = LATENCIES[algorithm, protocol]
        if algorithm == "tree":
            hops = 2 * ((processes / nodes - 1) * near + math.log2(nodes) * far)
            return (base + hops) * US + 2 * call.size / (TREE_SHARE * rate * 1e9)
        rounds = 2 if call.kind == "all_reduce" else 1
        near = near if nodes == 1 else max(near, OVERHEAD[protocol])
        hops = rounds * ((processes - nodes) * near + (nodes - 1) * far)
        return (base + hops) * US + call.sent(processes) / (rate * 1e9)

    def total(self, calls: Sequence[Collective], processes: int) -> float:
        """Seconds of all, one after the other."""
        return sum(self.seconds(call, processes) for call in calls)


NDR = Cluster("NDR", nvlink=370, network=8 * 47)
HDR = Cluster("HDR", nvlink=370, network=84.8)
SOURCES = (
    "NVLink: 370 GB/s of bus bandwidth in a node of eight H100 without NVLink SHARP, say NCCL's developers (nccl-tests "
    "issue 212).",
    "NDR: a 400 Gb/s card for each GPU, 46 to 48 GB/s of each, say the same (nccl-tests issue 290), so that NVLink is "
    "the limit. HDR: 84.8 GB/s of bus bandwidth, measured by a user over three nodes with four 200 Gb/s cards each "
    "(nccl-tests issue 119).",
    "Latencies: NCCL's model of itself (`src/graph/tuning.cc`, as of the first version with rates for Blackwell): two "
    "algorithms, ring and, for all-reduce alone, tree; two protocols, LL and Simple. LL128, NVLink SHARP and sums in "
    "switches are left out, and would make all of this faster.",
    f"Buckets of DistributedDataParallel: {BUCKETS[0] // 2**20} MiB, then {BUCKETS[1] // 2**20} MiB, PyTorch's own.",
    "Steps without communication: FixMatch in bfloat16 on one H100, `bench/results/nvidia-h100-80gb-hbm3/gpu.md`.",
)
