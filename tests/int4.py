"""Weights quantised to int4 by ONNX Runtime's own tool, and what they stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

BLOCK, ZERO = 16, 8


def quantise(given: Path, file: Path) -> Path:
    """Every product by a constant becomes a MatMulNBits."""
    settings = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True)
    quantiser = nbits.MatMulNBitsQuantizer(str(given), algo_config=settings)
    quantiser.process()
    file.parent.mkdir(exist_ok=True)
    quantiser.model.save_model_to_file(str(file), use_external_data_format=True)
    return file


def packed(file: Path) -> dict[str, Any]:
    """The int4 weights of a graph, as they are stored."""
    nodes = [node for node in ir.load(file).graph if node.op_type == "MatMulNBits"]
    weights = [node.inputs[1] for node in nodes]
    return {value.name: value.const_value.numpy() for value in weights}


def meant(file: Path) -> dict[str, torch.Tensor]:
    """Name before quantisation → what the weight [out, in] stands for."""
    found = {}
    for node in ir.load(file).graph:
        if node.op_type == "MatMulNBits":
            weight, scales = (node.inputs[place].const_value.numpy() for place in (1, 2))
            rows, width = node.attributes["N"].as_int(), node.attributes["K"].as_int()
            entries = np.stack([weight & 15, weight >> 4], -1).reshape(rows, -1, BLOCK)
            values = (entries.astype(np.float32) - ZERO) * scales.reshape(rows, -1, 1)
            name = node.inputs[1].name.partition("_Q4")[0]
            found[name] = torch.tensor(values.reshape(rows, -1)[:, :width])
    return found
