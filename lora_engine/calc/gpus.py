"""Cards: their memory, speed and power."""

from dataclasses import dataclass

MIB = 2**20

# CUDA context, cuBLAS workspace and what the caching allocator holds beyond tensors: on every card outside
# of what `estimate_memory` counts.
RESERVED_BYTES = 800 * MIB

MAX_BATCH = 4096


@dataclass(frozen=True)
class Gpu:
    """A card; `memory_bytes` as its driver reports it, which is a little less than the box says.

    Peaks are dense (without structured sparsity), operations a second, at the data sheet's boost clock: `fp32`
    outside tensor cores, `tf32` and 16 bits on them with accumulation in float32, which GeForce cards do at half the
    rate of accumulation in float16. A card without TF32 or bfloat16 units computes both as float32.
    `power_watts` is the board's limit."""

    name: str
    memory_bytes: int
    fp32_flops_per_second: float
    tf32_flops_per_second: float
    fp16_flops_per_second: float
    bf16_flops_per_second: float
    bandwidth_bytes_per_second: float
    power_watts: int


def _gpu(
    name: str, mib: int, fp32: float, tf32: float, half: float, bandwidth: float, watts: int, *, bf16: bool = True
) -> Gpu:
    """`mib` MiB of memory, peaks in 10^12 operations, `bandwidth` in 10^9 bytes a second."""
    tera, giga = 1e12, 1e9
    return Gpu(
        name=name,
        memory_bytes=mib * MIB,
        fp32_flops_per_second=fp32 * tera,
        tf32_flops_per_second=tf32 * tera,
        fp16_flops_per_second=half * tera,
        bf16_flops_per_second=(half if bf16 else fp32) * tera,
        bandwidth_bytes_per_second=bandwidth * giga,
        power_watts=watts,
    )


# Memory: "total" of nvidia-smi (drivers of the 5xx series), with error correction on where it is by default.
# Peaks: the document named above each group.
GPUS: tuple[Gpu, ...] = (
    # Ada GPU architecture whitepaper; 4060 and 4060 Ti: 3072 and 4352 CUDA cores at 2.46 and 2.54 GHz.
    _gpu("GeForce RTX 4060, 8 GB", 8188, 15.1, 15.1, 30.2, 272, 115),
    # GA102 GPU architecture whitepaper, table 2 (3080, 3090).
    _gpu("GeForce RTX 3080, 10 GB", 10240, 29.8, 29.8, 59.5, 760, 320),
    # Turing GPU architecture whitepaper, appendix A (reference card): no TF32, no bfloat16.
    _gpu("GeForce RTX 2080 Ti, 11 GB", 11264, 13.4, 13.4, 53.8, 616, 250, bf16=False),
    # GA106: 3584 CUDA cores at 1.78 GHz.
    _gpu("GeForce RTX 3060, 12 GB", 12288, 12.7, 12.7, 25.5, 360, 170),
    # Ada GPU architecture whitepaper, appendix A.
    _gpu("GeForce RTX 4070 Ti, 12 GB", 12282, 40.1, 40.1, 80.2, 504, 285),
    # T4 data sheet: no TF32, no bfloat16.
    _gpu("Tesla T4, 16 GB", 15360, 8.1, 8.1, 65.0, 320, 70, bf16=False),
    # P100 PCIe data sheet: no tensor cores.
    _gpu("Tesla P100, 16 GB", 16384, 9.3, 9.3, 18.7, 732, 250, bf16=False),
    _gpu("GeForce RTX 4060 Ti, 16 GB", 16380, 22.1, 22.1, 44.1, 288, 165),
    # Blackwell (RTX) GPU architecture whitepaper, appendix B.
    _gpu("GeForce RTX 5080, 16 GB", 16303, 56.3, 56.3, 112.6, 960, 360),
    # Ada GPU architecture whitepaper, appendix A.
    _gpu("GeForce RTX 4080, 16 GB", 16376, 48.7, 48.7, 97.5, 717, 320),
    # V100 data sheet (SXM2): no TF32, no bfloat16.
    _gpu("Tesla V100, 16 GB", 16384, 15.7, 15.7, 125.0, 900, 300, bf16=False),
    # L4 data sheet.
    _gpu("L4, 24 GB", 23034, 30.3, 60.0, 121.0, 300, 72),
    # A10 data sheet.
    _gpu("A10, 24 GB", 23028, 31.2, 62.5, 125.0, 600, 150),
    # A10G data sheet (AWS, G5 instances): float32 is faster than A10's, tensor cores are slower.
    _gpu("A10G, 24 GB", 23028, 35.0, 35.0, 70.0, 600, 300),
    # A30 data sheet.
    _gpu("A30, 24 GB", 24576, 10.3, 82.0, 165.0, 933, 165),
    # GA102 GPU architecture whitepaper, table 2.
    _gpu("GeForce RTX 3090, 24 GB", 24576, 35.6, 35.6, 71.0, 936, 350),
    # Ada GPU architecture whitepaper, appendix A.
    _gpu("GeForce RTX 4090, 24 GB", 24564, 82.6, 82.6, 165.2, 1008, 450),
    # Blackwell (RTX) GPU architecture whitepaper, appendix B.
    _gpu("GeForce RTX 5090, 32 GB", 32607, 104.8, 104.8, 209.5, 1792, 575),
    # A100 data sheet (SXM4).
    _gpu("A100, 40 GB", 40960, 19.5, 156.0, 312.0, 1555, 400),
    # RTX A6000 data sheet.
    _gpu("RTX A6000, 48 GB", 49140, 38.7, 77.4, 154.8, 768, 300),
    # L40 data sheet; its tensor cores run at half of L40S's rate.
    _gpu("L40, 48 GB", 46068, 90.5, 90.5, 181.0, 864, 300),
    # L40S data sheet.
    _gpu("L40S, 48 GB", 46068, 91.6, 183.0, 362.0, 864, 350),
    # RTX 6000 Ada data sheet.
    _gpu("RTX 6000 Ada, 48 GB", 49140, 91.1, 182.1, 364.2, 960, 300),
    # A100 data sheet (SXM4).
    _gpu("A100, 80 GB", 81920, 19.5, 156.0, 312.0, 2039, 400),
    # H100 data sheet: PCIe, SXM5 and NVL.
    _gpu("H100 PCIe, 80 GB", 81559, 51.0, 378.0, 756.0, 2000, 350),
    _gpu("H100, 80 GB", 81559, 67.0, 494.7, 989.4, 3350, 700),
    _gpu("H100 NVL, 94 GB", 95830, 60.0, 417.5, 835.5, 3900, 400),
    # RTX PRO Blackwell GPU architecture whitepaper (workstation edition).
    _gpu("RTX PRO 6000 Blackwell, 96 GB", 97887, 126.0, 251.9, 503.8, 1792, 600),
    # H200 data sheet (SXM).
    _gpu("H200, 141 GB", 143771, 67.0, 494.5, 989.5, 4800, 700),
    # HGX B200 data sheet, an eighth.
    _gpu("B200, 180 GB", 183359, 75.0, 1125.0, 2250.0, 7700, 1000),
)


def find_gpu(name: str) -> Gpu | None:
    """The card that `name` means, in any case and with or without maker's words and commas ("T4", "RTX 4090",
    "H100", "A100 80"): the shortest full name that holds all of its words. None when there is none."""
    words = set(name.lower().replace(",", " ").split())
    fitting = [gpu for gpu in GPUS if words and words <= set(gpu.name.lower().replace(",", " ").split())]
    return min(fitting, key=lambda gpu: len(gpu.name), default=None)
