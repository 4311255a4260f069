"""What bitsandbytes makes of random weights. `python tests/core/data/bitsandbytes_oracle.py`, where it is installed,
writes bitsandbytes.npz beside this file (made with bitsandbytes 0.50.2 and torch 2.13.0 on a CPU); the inputs are
drawn here."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("bitsandbytes.npz")


def inputs():
    """weights (12, 100), whose last block of 64 is not full, and scales (600,), whose last block of 256 is not."""
    rng = np.random.default_rng(0)
    weights = (0.05 * rng.standard_normal((12, 100))).astype(np.float32)
    return weights, np.abs(0.1 + 0.02 * rng.standard_normal(600)).astype(np.float32)


def expected(weights, scales):
    """Its bytes, states and values, by name."""
    import torch
    from bitsandbytes import functional

    W = torch.from_numpy(weights)
    found = {}
    for name, nested in (("nf4", False), ("nf4_dq", True)):
        codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=nested)
        found |= {f"{name}_codes": codes.flatten(), f"{name}_absmax": state.absmax}
        if nested:
            found |= {"nf4_dq_nested": state.state2.absmax, "nf4_dq_offset": state.offset}
        found[f"{name}_values"] = functional.dequantize_4bit(codes, state)
    # As quantize_4bit does with its scales.
    offset = torch.from_numpy(scales).mean()
    codes, state = functional.quantize_blockwise(torch.from_numpy(scales) - offset, blocksize=256)
    values = functional.dequantize_blockwise(codes, state) + offset
    found |= {"scales_codes": codes, "scales_nested": state.absmax, "scales_offset": offset, "scales_values": values}
    codes, absmax, _ = functional.int8_vectorwise_quant(W.clone())
    values = functional.int8_vectorwise_dequant(codes, absmax)
    found |= {"int8_codes": codes, "int8_absmax": absmax, "int8_values": values, "dynamic_code": state.code}
    return {name: value.numpy() for name, value in found.items()}


if __name__ == "__main__":
    weights, scales = inputs()
    np.savez_compressed(FILE, weights=weights, scales=scales, **expected(weights, scales))
