"""The names of weight types and of kernels in settings.

Imports nothing: an ingress reads settings too.
"""

from typing import Literal

DTypeName = Literal["fp32", "bf16", "fp16", "int8", "int4", "auto"]
KernelsName = Literal["auto", "native", "torch"]
