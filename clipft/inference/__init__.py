"""A model in use: pictures and texts to embeddings, classes, vector files; ``onnx_clip`` needs no torch."""
