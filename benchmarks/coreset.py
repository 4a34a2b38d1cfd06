"""Seconds that a coreset of the patches of normal pictures takes, and what its choice in a random projection costs.

    python benchmarks/coreset.py [--patches 100000] [--dims 1536] [--share 0.01] [--repeats 2]

Patches are drawn around a thousand centres, each of as many numbers as two layers of a ViT-B give. "Radius" is the
largest distance of a patch to its nearest chosen one, in all dimensions; beside it that of as many chosen at random,
and of a choice in all dimensions (of a tenth of the patches, for it is slow).
"""

from __future__ import annotations

import argparse

import torch
from common import interleave, machine, save, summary

from clipft.inference.anomaly import PROJECTED, coreset_of


def drawn(count: int, dims: int) -> torch.Tensor:
    """Points [count, dims] around centres, of length about 1."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, dims, generator=generator)
    near = torch.randn(count, dims, generator=generator)
    return (centres[torch.randint(1000, (count,), generator=generator)] + 0.5 * near) / dims**0.5


def radius(points: torch.Tensor, chosen: torch.Tensor) -> float:
    """Of the points around those that were chosen."""
    return max(float(torch.cdist(part, points[chosen]).amin(1).max()) for part in points.split(8192))


def main() -> None:
    """Runs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=1536)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    points = drawn(arguments.patches, arguments.dims)
    count = round(arguments.share * len(points))
    chosen = coreset_of(points, count)
    part = points[: len(points) // 10]
    few = count // 10
    seconds = interleave(
        {
            "projected": lambda: coreset_of(points, count),
            "a tenth, projected": lambda: coreset_of(part, few),
            "a tenth, all dimensions": lambda: coreset_of(part, few, dims=arguments.dims),
        },
        arguments.repeats,
    )
    random = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))
    radii = {
        "projected": radius(points, chosen),
        "random": radius(points, random[:count]),
        "a tenth, projected": radius(part, coreset_of(part, few)),
        "a tenth, all dimensions": radius(part, coreset_of(part, few, dims=arguments.dims)),
        "a tenth, random": radius(part, random[random < len(part)][:few]),
    }
    result = {
        "arguments": vars(arguments) | {"projected": PROJECTED},
        "chosen": count,
        "gflop": 2e-9 * len(points) * PROJECTED * (arguments.dims + count),
        "seconds": {name: summary(own) for name, own in seconds.items()},
        "radius": radii,
    }
    save("coreset", {"machine": machine(), **result})


if __name__ == "__main__":
    main()
