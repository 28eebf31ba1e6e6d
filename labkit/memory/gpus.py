"""GPU classes that people own or rent: what each one offers, and how much of it training can use.

A card's label is not its memory. What counts is `torch.cuda.get_device_properties(0).total_memory`:
a "24 GB" A10G has 22.06 GiB, because error correction and the driver take their part. Where people
report several sizes, the smallest is here.

FLOP/s are peaks for dense 16-bit products summed in fp32; real steps reach a third to a half of it.
Processors and Apple's chips are left out: they share their memory with everything else that runs,
so no table can say how much of it is free. `--memory` takes any number of bytes.

>>> find("a10g").memory_bytes < 24 * 10**9
True
>>> find("RTX4090").name
'RTX 4090'
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB, MIB = 2**30, 2**20
GB, TERA = 10**9, 10**12

RESERVE_BYTES, RESERVE_SHARE = round(2.75 * GIB), 0.019
"""What an estimate of allocated bytes does not see, kept free by default: 2.75 GiB and 1.9 % of the
device, for the CUDA context (0.67 to 0.75 GiB in the limits of data/memory/limits.json, 0.13 to
1.8 GiB in public messages, NCCL's buffers included), cached blocks that do not fit the next tensor,
and what else shows on the card.

Cached blocks are most of it. Under torch's default allocator a run failed whose tensors were
2.3 GiB less than the 22.9 GiB that the allocator was allowed; under expandable segments none failed
that was more than 0.1 GiB below. In each of those 12 limits all rows that are planned with this
reserve ran; with 2.25 GiB and 2.5 %, the reserve before they were measured, two would have failed.

It stays a margin. In every one of the 18 public out-of-memory messages of
data/memory/out_of_memory.json it exceeds what was left, so none of those runs would have been
called one that fits. The largest public run is within it, too: 80.3 GB allocated on an A100 80GB.
"""
CPU_RESERVE_BYTES = GIB
"""On a CPU: what a process takes before its first tensor. torch, transformers, trl and peft take
0.54 GB here; a notebook's kernel 0.7 GB."""


BEFORE_HOPPER, FROM_HOPPER, ROCM, MI300 = 8_519_680, 2**25, 2**25, 2**27
"""Bytes of cuBLAS's workspace, one for each thread that multiplies, in torch's CUDABlas
(parseChosenWorkspaceSize). The first two were measured, on an A100 and an H200; Blackwell's cards
have the second in newer versions of torch, AMD's the others."""


@dataclass(frozen=True)
class Gpu:
    """One class of card."""

    name: str
    memory_bytes: int
    """As torch reports it; the smallest that was seen."""
    flops: float
    """Dense 16-bit products summed in fp32, per second, peak."""
    bandwidth: float
    """Bytes per second between its memory and its cores."""
    link: str
    """What connects several of them in one machine."""
    link_bandwidth: float
    """Bytes per second of one card over that link, in one direction."""
    bf16: bool
    """Whether it computes in bf16; the older ones have fp16 only."""
    memory_source: str
    source: str
    """Of FLOP/s and bandwidths."""
    unchecked: tuple[str, ...] = ()
    """Fields for which no data sheet could be read."""

    cublas_workspace: int = BEFORE_HOPPER
    """Bytes that torch lets each thread that multiplies keep to work in."""

    def to_json(self) -> dict:
        return vars(self)


_TORCH = "torch.cuda.get_device_properties"
_MESSAGE = "capacity in PyTorch's out-of-memory messages"
_SHEET = "NVIDIA's data sheet"
_PCIE3, _PCIE4, _PCIE5 = 16 * GB, 32 * GB, 64 * GB

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            Gpu("RTX 3060 12GB", 11938 * MIB, 25.5 * TERA, 360 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_TORCH}, 11,938 to 12,044 MiB",
                "NVIDIA: 101 TFLOP/s sparse with fp16 sums, a quarter of it dense with fp32 sums"),
            Gpu("T4", 14930 * MIB, 65 * TERA, 320 * GB, "PCIe 3 x16", _PCIE3, False,
                f"{_TORCH}, 14,930 to 15,109 MiB", _SHEET),
            Gpu("L4", 22700 * MIB, 121 * TERA, 300 * GB, "PCIe 4 x16", _PCIE4, True,
                "22.17 GiB as Unsloth prints torch's total", _SHEET),
            Gpu("A10G", 22587 * MIB, 70 * TERA, 600 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_TORCH}, 22,587 to 22,723 MiB",
                "Baseten, A10 against A10G; NVIDIA publishes no sheet of it", ("flops",)),
            Gpu("RTX 3090", 24247 * MIB, 71 * TERA, 936 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_TORCH}, 24,259 MiB; {_MESSAGE}, 23.68 GiB",
                "NVIDIA Ampere GA102 whitepaper, appendix A; an NVLink bridge joins two of them",
                ("flops",)),
            Gpu("RTX 4090", 24084 * MIB, 165.2 * TERA, 1008 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_MESSAGE}, 23.52 to 23.65 GiB",
                "165.6 TFLOP/s were measured; 384 bit at 21 Gbit/s"),
            Gpu("RX 7900 XTX", 24553 * MIB, 122.8 * TERA, 960 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_TORCH}, 24,560 MiB; {_MESSAGE}, 23.98 GiB",
                "AMD: 61.4 TFLOP/s in fp32, twice that in 16 bits; 960 GB/s",
                cublas_workspace=ROCM),
            Gpu("RTX 5090", 32112 * MIB, 209.5 * TERA, 1792 * GB, "PCIe 5 x16", _PCIE5, True,
                f"{_MESSAGE}, 31.36 to 31.47 GiB",
                "838 TFLOP/s sparse with fp16 sums, a quarter of it dense with fp32 sums",
                cublas_workspace=FROM_HOPPER),
            Gpu("V100 32GB", 32501 * MIB, 125 * TERA, 900 * GB, "NVLink 2", 150 * GB, False,
                f"{_MESSAGE}, 31.74 to 31.75 GiB", _SHEET),
            Gpu("A100 40GB", 40326 * MIB, 312 * TERA, 1555 * GB, "NVLink 3", 300 * GB, True,
                f"{_TORCH}, 40,326 MiB; {_MESSAGE}, 39.38 to 39.59 GiB", _SHEET),
            Gpu("A40", 45416 * MIB, 149.7 * TERA, 696 * GB, "NVLink 3 bridge", 56.25 * GB, True,
                f"{_TORCH}, 45,416 MiB", _SHEET),
            Gpu("L40S", 45455 * MIB, 362 * TERA, 864 * GB, "PCIe 4 x16", _PCIE4, True,
                f"{_TORCH}, 45,589 MiB; {_MESSAGE}, 44.39 to 44.53 GiB", _SHEET),
            Gpu("RTX A6000", 48505 * MIB, 154.8 * TERA, 768 * GB, "NVLink 3 bridge",
                56.25 * GB, True, f"{_TORCH}, 48,676 MiB; {_MESSAGE}, 47.37 GiB", _SHEET,
                ("flops", "bandwidth")),
            Gpu("A100 80GB", 81029 * MIB, 312 * TERA, 2039 * GB, "NVLink 3", 300 * GB, True,
                f"{_MESSAGE}, 79.13 to 79.35 GiB", _SHEET),
            Gpu("H100 80GB", 80998 * MIB, 989 * TERA, 3350 * GB, "NVLink 4", 450 * GB, True,
                f"{_TORCH}, 81,008 to 81,090 MiB; {_MESSAGE}, 79.10 GiB", _SHEET,
                cublas_workspace=FROM_HOPPER),
            Gpu("H200", 143063 * MIB, 989 * TERA, 4800 * GB, "NVLink 4", 450 * GB, True,
                f"{_TORCH}, 143,156 MiB; {_MESSAGE}, 139.72 to 139.81 GiB", _SHEET,
                cublas_workspace=FROM_HOPPER),
            Gpu("B200", 182620 * MIB, 2250 * TERA, 8000 * GB, "NVLink 5", 900 * GB, True,
                f"{_TORCH}, 182,631 to 182,642 MiB; {_MESSAGE}, 178.35 GiB", _SHEET,
                ("link_bandwidth",),
                cublas_workspace=FROM_HOPPER),
            Gpu("MI300X", 196592 * MIB, 1307 * TERA, 5300 * GB, "Infinity Fabric", 448 * GB, True,
                f"{_TORCH}, 196,592 MiB", "AMD's data sheet", ("link_bandwidth",),
                cublas_workspace=MI300),
        )
    }
)  # fmt: skip


def find(name: str) -> Gpu:
    """The class that a name means, whatever its spaces, dashes and capitals: `h100`, `a100-80gb`.

    Names that torch and nvidia-smi print are known, too, such as `NVIDIA A100-SXM4-80GB`.

    Raises:
        ValueError: no such class, or a name that several share.
    """
    wanted = _plain(name)
    by_plain = {_plain(known): gpu for known, gpu in GPUS.items()}
    if wanted in by_plain:
        return by_plain[wanted]
    meant = [gpu for plain, gpu in by_plain.items() if wanted and wanted in plain]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(
            f"gpu {name!r} may be any of {', '.join(gpu.name for gpu in meant)}: name one of them"
        )
    raise ValueError(
        f"gpu {name!r} is not known here: use one of {', '.join(GPUS)}, or give its memory in bytes"
    )


_MAKER = {"nvidia", "geforce", "tesla", "amd", "instinct", "radeon"}
_FORM = {"sxm", "sxm2", "sxm4", "sxm5", "hbm3", "hbm3e", "oam"}
"""Words that torch and nvidia-smi print of the cards here, and that tell none of them apart. Not
`PCIe`: an H100 or V100 on PCIe is slower than those here; of an A100 it is nearly the same."""


def _plain(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", name.lower())
    idle = _MAKER | _FORM | ({"pcie"} if "a100" in words else set())
    plain = "".join(word for word in words if word not in idle)
    return plain.removeprefix("nvidia").removeprefix("geforce")


def reserve_bytes(memory_bytes: float, device: str = "cuda") -> int:
    """Bytes of a device that are kept free of tensors by default: see `RESERVE_BYTES`.

    Args:
        device: `cuda` or `cpu`, as in `labkit.memory.Options`.
    """
    if device == "cpu":
        return CPU_RESERVE_BYTES
    return round(RESERVE_BYTES + RESERVE_SHARE * memory_bytes)
