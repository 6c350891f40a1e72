"""The graph in which both doors end, module and ONNX."""
