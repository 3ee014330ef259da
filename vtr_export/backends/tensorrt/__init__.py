"""TensorRT and TensorRT-RTX: one driver, branching on what the library offers."""
