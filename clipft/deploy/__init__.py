"""What leaves the lab: int8 models and ONNX encoders, each with a report of what that changed."""
