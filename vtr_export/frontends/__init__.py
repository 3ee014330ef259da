"""Frontends: a checkpoint, or a foreign ONNX file, becomes graphs whose weights stay on disk."""
