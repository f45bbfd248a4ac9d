"""Model families, one file each, thin over pyarch.nn."""

from .generation import generate as generate
from .generation import perplexity as perplexity
from .transformer import PRESETS as PRESETS
from .transformer import Llama as Llama
from .transformer import LlamaConfig as LlamaConfig
