"""Modules over pyarch's ops: drop-in subclasses of torch.nn where torch has the layer, and what a transformer needs."""

from torch.nn import Module as Module
from torch.nn import ModuleList as ModuleList

from ._quantized import prepack as prepack
from .attention import Attention as Attention
from .attention import PagedBatch as PagedBatch
from .attention import PagedKVCache as PagedKVCache
from .block import DecoderBlock as DecoderBlock
from .block import DecoderBlocks as DecoderBlocks
from .embedding import Embedding as Embedding
from .embedding import QuantizedEmbedding as QuantizedEmbedding
from .linear import Linear as Linear
from .linear import ParallelLinear as ParallelLinear
from .linear import QuantizedLinear as QuantizedLinear
from .linear import linear as linear
from .linear import parallel as parallel
from .mlp import SwiGLU as SwiGLU
from .norm import RMSNorm as RMSNorm
from .rotary import RotaryEmbedding as RotaryEmbedding
from .rotary import llama3_factors as llama3_factors
from .sampling import Sampler as Sampler
