"""The ONNX operators as plain, differentiable torch functions, one file a family.

A function bears the operator's own name; its inputs are positional (None where one is omitted), its attributes
keyword-only with the defaults of the standard. Both forms of what once was an attribute and now is an input are taken,
from opset 6 on. Integers about shapes are int64 tensors on the CPU and never meet autograd; data may lie on any device,
the `meta` device included.
"""
