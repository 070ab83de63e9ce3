"""Chips that a plan can be made for: their peaks, each with the document that states it."""

from dataclasses import dataclass

from kvx.errors import unknown

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip's peaks.

    Attributes:
        name: as `--chip` takes it.
        flops: dense bfloat16 operations per second.
        memory: bytes of HBM. What vendors call 80 GB is 80 GiB of memory, and a plan lives on the difference.
        bandwidth: bytes per second between chip and HBM.
        link: bytes per second between chip and host, in one direction.
        topologies: for the TPU compiler: names by number of chips; empty for what it does not compile for.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    topologies: tuple[tuple[int, str], ...] = ()

    @property
    def ridge(self) -> float:
        """Operations per byte of HBM at which arithmetic and memory take equally long.

        For bfloat16 weights also the number of tokens in a step beyond which projections are bound by arithmetic.
        """
        return self.flops / self.bandwidth


def _plane(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((n, f"{name}:{shape}") for n, shape in ((4, "2x2"), (8, "2x4"), (16, "4x4"), (32, "4x8"), (64, "8x8")))


def _cube(name: str) -> tuple[tuple[int, str], ...]:
    shapes = ((4, "2x2x1"), (8, "2x2x2"), (16, "2x2x4"), (32, "2x4x4"), (64, "4x4x4"))
    return tuple((n, f"{name}:{shape}") for n, shape in shapes)


# TPUs: Google Cloud's documentation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), "System architecture", for
# operations, capacity and bandwidth. Their link to the host: "How to Scale Your Model" (Google DeepMind 2025,
# jax-ml.github.io/scaling-book/tpus), about 1.5e10 bytes/s a chip, and 32 GB/s for v6e.
# H100, H200: NVIDIA's data sheets of the SXM5 modules; their operations are half of what is printed there "with
# sparsity". MI300X: AMD's data sheet. All three: PCIe 5.0 x16, whose 128 GB/s are those of both directions.
_ALL = (
    Chip("v4", 275e12, 32 * GIB, 1.200e12, 15e9, _cube("v4")),
    Chip("v5e", 197e12, 16 * GIB, 0.819e12, 15e9, _plane("v5e")),
    Chip("v5p", 459e12, 95 * GIB, 2.765e12, 15e9, _cube("v5p")),
    Chip("v6e", 918e12, 32 * GIB, 1.638e12, 32e9, _plane("v6e")),
    Chip("H100", 989.4e12, 80 * GIB, 3.35e12, 64e9),
    Chip("H200", 989.4e12, 141 * GIB, 4.8e12, 64e9),
    Chip("MI300X", 1307.4e12, 192 * GIB, 5.3e12, 64e9),
)

CHIPS = {chip.name: chip for chip in _ALL}
"""By name."""


def find_chip(name: str) -> Chip:
    """The chip of a name, in upper or lower case.

    Raises:
        BadInput: none of `CHIPS`.
    """
    by_lower = {known.lower(): chip for known, chip in CHIPS.items()}
    if name.lower() not in by_lower:
        raise unknown("chip", name, CHIPS)
    return by_lower[name.lower()]
