"""The hot paths of deep learning in Triton, CUDA C++ and native CPU kernels. One op, one meaning, any machine."""

from .allocator import tune_allocator
from .dispatch import backends, use_backend
from .explain import explain
from .ops import *  # the public functions, one line a room in ops/__init__.py
from .quantized import PackedTensor, QuantizedTensor, quantize

__version__ = "0.1.0"
